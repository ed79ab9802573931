"""The one place that drives Hugging Face Accelerate: one process, DDP or FSDP2, and no DeepSpeed.

parallel.zero_stage=0 is DDP, or the bare model in one process; 2 and 3 are FSDP2 on any number of ranks. In
bf16 DDP computes under autocast (fp32 weights and residual stream, bf16 products), FSDP2 in a bf16 copy of
the weights, as DeepSpeed does: near numbers, not equal ones.

What Accelerate 1.15 and torch 2.13 do and this file relies on, each held by a test that runs it:

* DDP and FSDP2 average gradients over their ranks. A micro batch's loss sum is scaled by their number over
  the step's valid targets, so the gradient is that of one global mean.
* Gradients of micro batches are added up in fp32. Under DDP they travel once a step. Under FSDP2 they do
  after every micro batch, so that a rank keeps no more of them than its part.
* `Accelerator.prepare` tells parameters apart by their addresses, which are all 0 on the meta device: an
  optimizer given to it with a model that has no memory yet comes back with one parameter many times. So the
  model is split first, and the optimizer made of what this rank then holds.
* Accelerate hears of FSDP on GPUs alone. On CPUs, its state is told here.
* FSDP2 splits the rows of a weight as `torch.chunk` does: the last ranks have fewer, or none. After a forward
  pass without a backward pass weights stay gathered, and would not notice that their parts have changed.
* Accelerate reads settings from the environment, and writes some there. See `_heard_by_argument_alone`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    fsdp2_prepare_model,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from llmtrain.checkpoint.format import FlatSource, Piece
from llmtrain.loader.batches import Batch
from llmtrain.model.block import Block
from llmtrain.model.seams import Seams
from llmtrain.model.transformer import Transformer
from llmtrain.train.config import OptimizerConfig, Precision, TrainConfig
from llmtrain.train.engine import Judge, StepResult
from llmtrain.train.heartbeat import Mark, no_mark
from llmtrain.train.measures import GradientSquares, Memory, memory_of, storages
from llmtrain.train.muon import Held, Muon
from llmtrain.train.optimizer import all_state_kinds, build_optimizer, state_kinds
from llmtrain.train.placement import Placement, compile_blocks, even_share
from llmtrain.train.ranks import sum_once
from llmtrain.train.state import fill_all, for_checkpoint

log = logging.getLogger(__name__)

WORKING_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
"""What forward and backward pass compute in."""


class AccelerateEngine:
    """Data and context parallelism, with or without splitting the state over their ranks."""

    def __init__(
        self, placement: Placement, *, device: torch.device, train: TrainConfig, optimizer: OptimizerConfig
    ) -> None:
        groups = placement.groups
        assert groups.tp.size == groups.pp.size == 1, "the rules of parallel/compatibility.py let this pass"
        assert groups.data.size == dist.get_world_size(), "DDP and FSDP2 average over every rank"
        self.device = device
        self.placement = placement
        self.groups = groups
        self.data = groups.data
        self.dropout = train.dropout
        self.num_optimizer_steps = 0
        self.optimizer_kind = optimizer.kind
        self.state_kinds = all_state_kinds(optimizer.kind)
        self.mark: Mark = no_mark
        self.is_split = placement.parallel.zero_stage >= 2
        """Whether each rank keeps its rows of every weight alone."""
        self._grad_clip = train.grad_clip
        self._has_sorted_buckets = self.is_split or self.data.size <= 2
        with _heard_by_argument_alone(has_ranks=self.is_split or self.data.size > 1):
            self._accelerator = _open_accelerator(placement.parallel.zero_stage, device, train.precision)
        self._model = self._build(train)
        self._wrapped: Any = self._give_memory()
        if train.compile_blocks:
            compile_blocks(self._model)
        self._parameters = dict(self._model.named_parameters())
        bare = build_optimizer(self._model, optimizer)
        self._optimizer: Any = self._accelerator.prepare_optimizer(bare)
        if isinstance(bare, Muon):
            assert not self.is_split, "the rules of parallel/compatibility.py let this pass"
            whole = [Held(name, 0, weight.numel(), weight, 0) for name, weight in self._parameters.items()]
            bare.attach(whole, self.groups, placement.shapes)  # each rank works on some matrices for all
        assert self._accelerator.is_fsdp2 == self.is_split, f"Accelerate sees {self._accelerator.state}"

    def _build(self, train: TrainConfig) -> Transformer:
        """The model without memory."""
        seams = self.placement.seams()
        if train.precision is not Precision.fp32 and not self.is_split:
            seams = _narrow(seams, WORKING_DTYPES[train.precision], self.device.type)
        with torch.device("meta"):
            return self.placement.build(train, seams=seams)

    def _give_memory(self) -> Any:
        """Split or wrap the model; of one that is split, the whole never exists.

        Returns:
            What is called for a forward pass.
        """
        if self.is_split:
            wrapped = fsdp2_prepare_model(self._accelerator, self._model)
            self._model.to_empty(device=self.device)
            return wrapped
        self._model.to_empty(device=self.device)
        return self._accelerator.prepare_model(self._model)

    @property
    def loss_scale(self) -> None:
        """There is no fp16 here: compatibility.py's accelerate_with_fp16."""

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        raise AssertionError(f"no loss scale to set to {value}: there is no fp16 here")

    # -- the step

    def train_step(
        self, micro_batches: list[Batch], *, lr: float, judge: Judge | None = None, measure: bool = False
    ) -> StepResult:
        """One optimizer update from this rank's micro batches."""
        mine = [self.placement.cut(batch) for batch in micro_batches]
        (num_valid,) = self._sum(sum(batch.num_valid for batch in mine))
        divisor = max(1.0, num_valid)  # a step of padding only has no gradient, and is no division by zero
        self._wrapped.train()
        if not self._has_sorted_buckets:
            # DDP sorts its buckets anew after the first backward pass of a process, and sums of more than two
            # ranks are added in another order from then on: a restart would not be bit-equal. So that is done
            # with a pass that counts for nothing.
            self._add_gradients(mine[:1], scale=1.0)
            self._optimizer.zero_grad(set_to_none=True)
            self._has_sorted_buckets = True
        loss_sum = self._add_gradients(mine, scale=self.data.size / divisor)
        gradients = storages(map(_held, self._gradients().values()), self.device) if measure else {}
        self.mark("update")
        squares = GradientSquares(self.placement, self.device) if measure else None
        if squares is not None:
            for name, _, own in self._owned("gradient"):
                squares.add(name, own)
        norm = self._clip_gradient()
        # of the norm one rank speaks: all judge by the same bits
        loss_sum, norm = self._sum(loss_sum, norm if self.data.rank == 0 else 0.0)
        updates = judge is None or judge(loss_sum / divisor, norm)
        if updates:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self.num_optimizer_steps += 1
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss_sum / divisor,
            grad_norm=norm,
            num_valid=int(num_valid),
            is_withheld=not updates,
            grad_norms=None if squares is None else squares.norms(norm),
            memory=self._memory(sum(gradients.values())) if measure else None,
        )

    def _add_gradients(self, micro_batches: list[Batch], *, scale: float) -> float:
        """Forward and backward of every micro batch; this rank's loss sum."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            travels = self.is_split or number == len(micro_batches)
            with nullcontext() if travels else self._accelerator.no_sync(self._wrapped):
                self.mark("forward", micro_step=number)
                micro_loss_sum = self._loss_sum(batch)
                loss_sum += micro_loss_sum.detach()
                self.mark("backward", micro_step=number)
                self._accelerator.backward(micro_loss_sum * scale)
        return float(loss_sum)

    def _gradients(self) -> dict[str, Tensor]:
        """By canonical name."""
        found = {name: weight.grad for name, weight in self._parameters.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    @torch.no_grad()
    def _clip_gradient(self) -> float:
        """Scale the gradient down to train.grad_clip, and return its global norm before."""
        gradients = [_held(gradient) for gradient in self._gradients().values()]
        square = torch.nn.utils.get_total_norm(gradients).double() ** 2
        if self.is_split:
            dist.all_reduce(square, group=self.data.group)
        norm = math.sqrt(float(square))
        if 0 < self._grad_clip < norm:
            for gradient in gradients:
                gradient.mul_(self._grad_clip / (norm + 1e-6))  # as torch's clip_grad_norm_ and DeepSpeed
        return norm

    @torch.no_grad()
    def held_out_sums(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Loss sum in nats and number of targets over all ranks. Every rank brings as many batches."""
        self._wrapped.eval()
        loss_sum, num_valid = 0.0, 0
        for number, batch in enumerate(map(self.placement.cut, batches), start=1):
            self.mark("evaluate", micro_step=number)
            loss_sum += float(self._loss_sum(batch))
            num_valid += batch.num_valid
        self._drop_gathered_weights()
        loss_sum, total_valid = self._sum(loss_sum, num_valid)
        return loss_sum, int(total_valid)

    def _loss_sum(self, batch: Batch) -> Tensor:
        inputs = self.placement.inputs(batch, self.device, dropout=self.dropout)
        loss_sum: Tensor = self._wrapped(*inputs)
        return loss_sum

    def _sum(self, *values: float) -> list[float]:
        return sum_once(self.groups, self.device, *values)

    def _drop_gathered_weights(self) -> None:
        """Keep this rank's rows alone, as after a backward pass."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _memory(self, gradient_bytes: int) -> Memory:
        states = (value for state in self._optimizer.state.values() for value in state.values())
        return memory_of(
            weights=map(_held, self._parameters.values()),
            optimizer=map(_held, states),
            gradient_bytes=gradient_bytes,
            device=self.device,
        )

    # -- the state

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of weights and optimizer state: over all ranks, every element exactly once."""
        for kind in ("weight", *self.state_kinds):
            for name, start, own in self._owned(kind):
                yield Piece(kind, name, self.placement.shapes[name], start, for_checkpoint(own))

    def _owned(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """Of the fragments of `kind` what this rank answers for: over all ranks, every element once."""
        for name, start, held in self._fragments(kind):
            own = held
            if not self.is_split:  # every rank holds everything, and answers for an equal share
                start, end = even_share(held.numel(), self.data.rank, self.data.size)
                own = held[start:end]
            if own.numel():
                yield name, start, own

    def load(self, source: FlatSource, *, num_optimizer_steps: int = 0) -> None:
        """Fill master weights, and with `num_optimizer_steps` > 0 the optimizer's state too, from
        `source`."""
        kinds = ("weight", *self.state_kinds) if num_optimizer_steps else ("weight",)
        self._create_optimizer_state(num_optimizer_steps)
        fill_all(((kind, *each) for kind in kinds for each in self._fragments(kind)), source)
        self.num_optimizer_steps = num_optimizer_steps

    def _create_optimizer_state(self, num_optimizer_steps: int) -> None:
        """Give the optimizer the state that it would otherwise create at its first step, to be filled by
        `load`."""
        for name, weight in self._parameters.items():
            state = {kind: torch.zeros_like(weight) for kind in state_kinds(name, self.optimizer_kind)}
            steps = torch.tensor(float(num_optimizer_steps), dtype=torch.float32, device=self.device)
            self._optimizer.state[weight] = {"step": steps, **state}

    @torch.no_grad()
    def _fragments(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset in the flattened whole tensor, 1-D fp32 view) of what this rank holds of `kind`: a
        weight, an optimizer state, or the gradient."""
        gradients = self._gradients() if kind == "gradient" else {}
        for name, weight in self._parameters.items():
            whole: Tensor
            if kind == "weight":
                whole = weight
            elif name in gradients:
                whole = gradients[name]
            elif kind in state_kinds(name, self.optimizer_kind):
                whole = self._optimizer.state[weight][kind]
            else:
                continue
            first_row = 0
            if self.is_split:  # as `torch.chunk` does it
                num_rows = whole.shape[0]
                first_row = min(num_rows, self.data.rank * -(-num_rows // self.data.size))
            yield name, first_row * math.prod(whole.shape[1:]), _held(whole).view(-1)


def _held(tensor: Tensor) -> Tensor:
    """This rank's part, in the memory where it lies."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _narrow(seams: Seams, dtype: torch.dtype, device_type: str) -> Seams:
    """Seams for autocast, which does not look into autograd functions of our own: it would leave the head's
    product in fp32, and narrow the sums of ring attention. Here they get `dtype`, as if the model were in it.
    """

    def mask(segments_BS: Tensor, _: torch.dtype) -> Tensor:
        return seams.mask(segments_BS, dtype)

    def attend(
        q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return seams.attend(q_BHSK.to(dtype), k_BGSK.to(dtype), v_BGSK.to(dtype), mask, is_causal)

    def loss(x_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return seams.loss(x_TD.to(dtype), head_VD.to(dtype), targets_T)

    return replace(seams, mask=mask, attend=attend, loss=loss)


def _open_accelerator(zero_stage: int, device: torch.device, precision: Precision) -> Any:
    """Accelerate over the process group that is there. Its state is one a process: who opens an engine is
    done with the one before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = _fsdp2(zero_stage, WORKING_DTYPES[precision]) if zero_stage >= 2 else None
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision is Precision.fp32 else precision.name,
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # not a second copy
    )
    if plugin is not None and device.type == "cpu":
        accelerator.state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # AcceleratorState copies it
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.num_processes == dist.get_world_size(), f"Accelerate sees {accelerator.state}"
    return accelerator


def _fsdp2(zero_stage: int, dtype: torch.dtype) -> Any:
    """A unit a block. At stage 2 weights stay gathered from the forward to the backward pass."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=zero_stage == 3,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Block.__name__],
        # Accelerate's own policy would add ranks' gradients up in bf16, and round the loss to it.
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    )


@contextmanager
def _heard_by_argument_alone(*, has_ranks: bool) -> Iterator[None]:
    """For so long the environment tells Accelerate nothing but whether there are ranks. Then it is as before.

    `accelerate launch` and accelerate.yaml speak through ACCELERATE_* and FSDP_*: the run's own config says
    it all. Of what Accelerate writes, ACCELERATE_USE_FSDP would make the next engine of this process FSDP,
    and WORLD_SIZE would send its ranks to a rendezvous that is not there.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
    if has_ranks:
        os.environ.setdefault("LOCAL_RANK", "0")  # without it Accelerate takes this process for the only one
    else:
        os.environ.pop("LOCAL_RANK", None)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or it would choose the threads
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
