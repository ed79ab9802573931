"""Steps of a run done again in one process: losses, gradient norms, and the first number that is not finite.

Plain torch on whole weights, no engine and no process group: fp32 master weights, and a copy of them in the
working precision, as DeepSpeed does it. Batches, dropout and updates are the run's own; what differs from it
is the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtrain.inference.perplexity import losses_of_tokens
from llmtrain.loader.batches import Batch
from llmtrain.model.dropout import token_keys
from llmtrain.model.transformer import Transformer
from llmtrain.train.config import Precision, TrainRoot
from llmtrain.train.optimizer import build_optimizer, state_kinds

CLIP_EPSILON = 1e-6
"""As torch's clip_grad_norm_ and DeepSpeed have it."""

Tensors = Callable[[str, str], npt.NDArray[Any]]
"""(kind, canonical name) -> the whole tensor."""


@dataclass
class StepAgain:
    """What a step gave."""

    loss: float
    """Mean over its targets, in nats."""
    grad_norm: float
    num_valid: int
    group_norms: dict[str, float] = field(default_factory=dict)
    """Of the gradient, by group of layers: embedding, blocks.0, ..., head."""
    first_non_finite: str | None = None
    """Where the first number that is not finite came up, in the order of computing; None: nowhere."""


class Rerun:
    """A model with its optimizer, at the step after which its weights were saved."""

    def __init__(
        self,
        cfg: TrainRoot,
        tensors: Tensors,
        *,
        num_optimizer_steps: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        """
        Args:
            num_optimizer_steps: that the weights have had; 0: their optimizer has no state.
            precision: of forward and backward pass, fp32 or bf16.
        """
        self.cfg = cfg
        self.device = device
        self.num_optimizer_steps = num_optimizer_steps
        self.masters = _build(cfg, device, torch.float32)
        kinds = {name: state_kinds(name, cfg.optimizer.kind) for name, _ in self.masters.named_parameters()}
        self._optimizer = build_optimizer(self.masters, cfg.optimizer)
        with torch.no_grad():
            for name, master in self.masters.named_parameters():
                master.copy_(torch.from_numpy(np.asarray(tensors("weight", name), dtype=np.float32)))
                if num_optimizer_steps:
                    state: dict[str, Tensor] = {"step": torch.tensor(float(num_optimizer_steps))}
                    for kind in kinds[name]:
                        state[kind] = torch.from_numpy(np.array(tensors(kind, name), dtype=np.float32)).to(
                            device
                        )
                    self._optimizer.state[master] = state
        self.model = self.masters
        if precision is not Precision.fp32:
            self.model = _build(cfg, device, torch.bfloat16)
            self._copy_masters()

    def step(
        self, batches: Sequence[Batch], *, lr: float, updates: bool = True, watches: bool = False
    ) -> StepAgain:
        """Forward, backward and update.

        Args:
            batches: the step's micro batches, of all ranks, with their places in the run.
            updates: whether the weights take the step.
            watches: whether to look for what is not finite: at every tensor, which takes time.
        """
        num_valid = sum(batch.num_valid for batch in batches)
        divisor = max(1, num_valid)
        watch = FiniteWatch(self.model) if watches else None
        self.model.train()
        loss_sum = 0.0
        for number, batch in enumerate(batches):
            with ExitStack() as stack:
                if watch is not None:
                    stack.enter_context(watch.micro_batch(number, batch))
                micro_loss_sum = self.model(*self._inputs(batch))
                loss_sum += float(micro_loss_sum.detach())
                if watch is not None:
                    watch.look("the loss", micro_loss_sum)
                (micro_loss_sum / divisor).backward()
            self._take_gradients()
        group_norms = self._group_norms()
        norm = math.sqrt(math.fsum(each**2 for each in group_norms.values()))
        if updates:
            self._update(norm, lr)
        for master in self.masters.parameters():
            master.grad = None
        return StepAgain(
            loss=loss_sum / divisor,
            grad_norm=norm,
            num_valid=num_valid,
            group_norms=group_norms,
            first_non_finite=None if watch is None else watch.first,
        )

    @torch.no_grad()
    def losses_of_rows(self, batch: Batch) -> Iterator[tuple[float, int]]:
        """Mean loss and number of targets of each row, with nothing dropped."""
        self.model.eval()
        losses_BS = losses_of_tokens(self.model, batch, device=self.device).double()
        for losses_S, targets_S in zip(losses_BS, batch.targets_BS, strict=True):
            count = int((targets_S >= 0).sum())
            yield float(losses_S.sum()) / max(1, count), count

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        there = batch.to(self.device)
        inputs = (there.tokens_BS, there.positions_BS, there.segments_BS, there.targets_BS)
        if not self.cfg.train.dropout:
            return inputs
        assert batch.places is not None, "rows of a run have places in it"
        keys_BS = token_keys(self.cfg.run.seed, batch.places, there.segments_BS.shape[1])
        return (*inputs, keys_BS.to(self.device))

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """Add those of the working copy to the masters', in fp32."""
        if self.model is self.masters:
            return
        for master, working in zip(self.masters.parameters(), self.model.parameters(), strict=True):
            if working.grad is not None:
                wide = working.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                working.grad = None

    @torch.no_grad()
    def _group_norms(self) -> dict[str, float]:
        squares: dict[str, list[float]] = {}
        for name, master in self.masters.named_parameters():
            if master.grad is not None:
                norm = float(torch.linalg.vector_norm(master.grad, dtype=torch.float64))
                squares.setdefault(group_of(name), []).append(norm**2)
        return {group: math.sqrt(math.fsum(parts)) for group, parts in squares.items()}

    @torch.no_grad()
    def _update(self, norm: float, lr: float) -> None:
        clip = self.cfg.train.grad_clip
        if 0 < clip < norm:
            for master in self.masters.parameters():
                if master.grad is not None:
                    master.grad.mul_(clip / (norm + CLIP_EPSILON))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.num_optimizer_steps += 1
        if self.model is not self.masters:
            self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for master, working in zip(self.masters.parameters(), self.model.parameters(), strict=True):
            working.copy_(master)


class FiniteWatch:
    """Looks at weights, at what every module returns, and at every gradient, and remembers the first tensor
    with a nan or an inf."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first: str | None = None
        self._where = ""
        self._places: npt.NDArray[np.int64] | None = None
        for name, weight in model.named_parameters():
            self.look(f"weight {name}, before the step", weight)

    @contextmanager
    def micro_batch(self, number: int, batch: Batch) -> Iterator[None]:
        """While this one is worked on."""
        self._where, self._places = f" in micro batch {number}", batch.places
        hooks = [
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: self.look(f"the output of {name}", output)
            )
            for name, module in self.model.named_modules()
            if name
        ]
        hooks += [
            weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda weight, name=name: self.look(f"the gradient of {name}", weight.grad, by_row=False)
            )
            for name, weight in self.model.named_parameters()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def look(self, what: str, tensor: object, *, by_row: bool = True) -> None:
        if self.first is not None or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return
        bad = ~torch.isfinite(tensor.detach())
        if not bool(bad.any()):
            return
        rows = ""
        places = self._places
        if by_row and places is not None and tensor.ndim > 1 and len(tensor) == len(places):
            at = bad.flatten(1).any(1).nonzero()[:, 0].tolist()
            told = ", ".join(str(int(places[each])) for each in at)
            rows = f", in row {told} of the run" if len(at) == 1 else f", in rows {told} of the run"
        self.first = f"{what}{self._where}: {int(bad.sum()):,} of {tensor.numel():,} elements{rows}"


def group_of(name: str) -> str:
    """The group of layers of a canonical parameter name."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == "blocks" else first


def _build(cfg: TrainRoot, device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(cfg.model).to(dtype)
    model.to_empty(device=device)
    model.dropout = cfg.train.dropout
    return model
