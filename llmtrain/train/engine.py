"""The one place that drives DeepSpeed: a step, held-out sums, and the training state in layout-free pieces.

What DeepSpeed 0.19.8 does and this file relies on, each held by a test that runs it:

* Gradients are divided by gradient_accumulation_steps and by the data-parallel size. A micro batch's loss
  sum is scaled
  by their product over the step's valid targets, so the gradient is that of one global mean.
* At ZeRO 1-2 a parameter's `_hp_mapping` names the piece of it that this rank's flat fp32 partition holds;
  at ZeRO-3
  every rank holds the same share of every parameter, padded at the end.
* The fp32 master weights are made from the low-precision ones at `initialize`. They are overwritten here,
  so a bf16 run
  starts from, and resumes with, full-precision weights.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from llmtrain.errors import LaunchError
from llmtrain.loader.batches import Batch
from llmtrain.loader.ledger import MASK_64
from llmtrain.parallel.config import ParallelConfig
from llmtrain.train.checkpoint import Piece
from llmtrain.train.config import OptimizerConfig, Precision, TrainConfig
from llmtrain.train.deepspeed_config import deepspeed_config
from llmtrain.train.optimizer import build_optimizer

if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # read when deepspeed is imported; its own guess needs packages

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # `initialize` would import it, and torch._dynamo with it
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

FlatSource = Callable[[str, str, int, int], NDArray[np.float32]]
"""(kind, parameter name, start, length) -> that part of the flattened logical tensor."""

OPTIMIZER_KINDS = ("exp_avg", "exp_avg_sq")
_LOW_32 = 2**32 - 1


def init_ranks(*, timeout_s: float) -> torch.device:
    """Join the process group that torchrun (or nobody: then a group of one) set up, and return this rank's
    device.

    Raises:
        LaunchError: the rendezvous port is taken, or not every rank arrived in time.
    """
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed: not the user's affair.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", module="torch.distributed")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                f"start no more processes than GPUs (NPROC)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cpu":
        # Without this DeepSpeed compiles a shared-memory all-reduce with g++ at the first start of every
        # machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        at = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "in use" in str(error):
                raise LaunchError(
                    f"the rendezvous port is in use: {at}; choose another MASTER_PORT"
                ) from error
            raise LaunchError(f"ranks could not meet at {at}: {str(error).splitlines()[0]}") from error
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def build_context(
    train: TrainConfig, parallel: ParallelConfig, *, dp_size: int
) -> AbstractContextManager[Any]:
    """The context to build the module in: at ZeRO-3 every weight is split as soon as it exists."""
    if parallel.zero_stage == 3:
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            config_dict_or_path=deepspeed_config(train, parallel, dp_size=dp_size),
            dtype=torch.bfloat16 if train.precision is Precision.bf16 else torch.float32,
        )
        return context
    return torch.device("meta")


@dataclass(frozen=True)
class StepResult:
    """Numbers that every rank agrees on, or that the loop reduces itself."""

    loss: float
    """Mean over the step's valid targets, in nats."""
    grad_norm: float
    """Global L2 norm before clipping."""
    num_valid: int


class Engine:
    """A module under DeepSpeed with its optimizer. `model(tokens, positions, segments, targets)` returns a
    loss sum."""

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        train: TrainConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        """`model` comes out of `build_context`: on the meta device, or already split. Weights are undefined
        until `load`."""
        self.device = device
        self.rank = dist.get_rank()
        self.dp_size = dist.get_world_size()
        self.zero_stage = parallel.zero_stage
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in model.named_parameters()
        }
        if self.zero_stage < 3:
            model.to_empty(device=device)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()  # DeepSpeed compares and broadcasts before `load` fills them
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, optimizer),
            config=deepspeed_config(train, parallel, dp_size=self.dp_size),
        )
        # Any: DeepSpeed hangs attributes of its own on parameters
        self._parameters: dict[str, Any] = dict(self._engine.module.named_parameters())
        self.num_optimizer_steps = 0

    # -- the step
    # ---------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[Batch], *, lr: float) -> StepResult:
        """One optimizer update from this rank's micro batches. Every rank calls it with as many; another step
        may have another number."""
        gas = self._engine.gradient_accumulation_steps()  # what DeepSpeed divides by, however many there are
        num_valid = self._sum_over_ranks(float(sum(batch.num_valid for batch in micro_batches)))
        divisor = max(1.0, num_valid)  # a step of padding only has no gradient, and is no division by zero
        scale = gas * self.dp_size / divisor
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        norm = math.nan
        for number, batch in enumerate(micro_batches, start=1):
            at_boundary = number == len(micro_batches)
            # ZeRO-1/2 silently keep only the last micro batch when the boundary is off by one, and
            # DeepSpeed's own count knows one number of micro batches.
            self._engine.set_gradient_accumulation_boundary(at_boundary)
            micro_loss_sum = self._loss_sum(batch)
            loss_sum += micro_loss_sum.detach()
            self._engine.backward(micro_loss_sum * scale)
            if at_boundary and self.zero_stage == 0:
                norm = self._full_gradient_norm()  # DeepSpeed has none at stage 0
            self._engine.step()
        if self.zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm())
        self.num_optimizer_steps += 1
        return StepResult(
            loss=self._sum_over_ranks(float(loss_sum)) / divisor, grad_norm=norm, num_valid=int(num_valid)
        )

    @torch.no_grad()
    def held_out_sums(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Loss sum in nats and number of targets over all ranks. Every rank brings as many batches."""
        self._engine.eval()
        loss_sum, num_valid = 0.0, 0
        for batch in batches:
            loss_sum += float(self._loss_sum(batch))
            num_valid += batch.num_valid
        return self._sum_over_ranks(loss_sum), int(self._sum_over_ranks(float(num_valid)))

    def agree(self, level: int, tokens_hash: int) -> tuple[int, int]:
        """The highest level that any rank brings, and the sum of all hashes modulo 2^64, in one collective.

        Args:
            level: 0 to 2.
            tokens_hash: of this rank's rows. Its halves are summed apart: nothing overflows below 2^31 ranks.
        """
        if self.dp_size == 1:
            return level, tokens_hash
        brought = [int(level == each) for each in range(3)]
        told = torch.tensor([*brought, tokens_hash & _LOW_32, tokens_hash >> 32], device=self.device)
        dist.all_reduce(told)
        *counts, low, high = told.tolist()
        worst = max(each for each in range(3) if counts[each])
        return worst, (low + (high << 32)) & MASK_64

    def _loss_sum(self, batch: Batch) -> Tensor:
        on_device = batch.to(self.device)
        loss_sum: Tensor = self._engine(
            on_device.tokens_BS, on_device.positions_BS, on_device.segments_BS, on_device.targets_BS
        )
        return loss_sum

    def _sum_over_ranks(self, value: float) -> float:
        if self.dp_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def _full_gradient_norm(self) -> float:
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    # -- the state
    # --------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of weights and optimizer state: over all ranks, every element exactly once."""
        for kind in ("weight", *OPTIMIZER_KINDS):
            for name, start, held in self._fragments(kind):
                values = held
                if self.zero_stage == 0:  # every rank holds everything, and answers for an equal share
                    start, end = even_share(held.numel(), self.rank, self.dp_size)
                    values = held[start:end]
                if values.numel():
                    array = values.float().cpu().numpy()
                    yield Piece(kind=kind, name=name, shape=self.shapes[name], start=start, values=array)

    def load(self, source: FlatSource, *, num_optimizer_steps: int = 0) -> None:
        """Fill master weights, and with `num_optimizer_steps` > 0 the optimizer's state too, from
        `source`."""
        kinds = ("weight", *OPTIMIZER_KINDS) if num_optimizer_steps else ("weight",)
        if num_optimizer_steps:
            self._create_optimizer_state(num_optimizer_steps)
        for kind in kinds:
            for name, start, held in self._fragments(kind):
                held.copy_(torch.from_numpy(source(kind, name, start, held.numel())))
        self.num_optimizer_steps = num_optimizer_steps
        self._masters_to_working_weights()

    @torch.no_grad()
    def _fragments(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset in the flattened logical tensor, 1-D fp32 view) of what this rank holds of `kind`."""
        for name, parameter in self._parameters.items():
            if self.zero_stage == 0:
                held = parameter if kind == "weight" else self._torch_state[parameter][kind]
                yield name, 0, held.detach().view(-1)
            elif self.zero_stage == 3:
                share = parameter.partition_numel()
                first = min(parameter.ds_numel, self.rank * share)
                last = min(parameter.ds_numel, first + share)  # the last ranks' shares are padded
                held = (
                    safe_get_local_fp32_param(parameter)
                    if kind == "weight"
                    else safe_get_local_optimizer_state(parameter, kind)
                )
                if first < last:
                    yield name, first, held.detach().view(-1)[: last - first]
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                master = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                # Not mapping.get_hp_fragment(kind): DeepSpeed links AdamW's state after the first group's
                # first step,
                # when the second group has none yet, and never again.
                whole = master if kind == "weight" else self._torch_state[master][kind]
                at = mapping.get_hp_fragment_address()
                yield name, mapping.lp_fragment_address.start, whole.detach()[at.start : at.start + at.numel]

    @property
    def _torch_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's own state. Under ZeRO its keys are this rank's flat fp32 partitions."""
        adamw = self._optimizer if self.zero_stage == 0 else self._optimizer.optimizer
        state: dict[Tensor, dict[str, Tensor]] = adamw.state
        return state

    def _create_optimizer_state(self, num_optimizer_steps: int) -> None:
        """Give AdamW the state that it would otherwise create at its first step, to be filled by `load`."""
        if self.zero_stage == 0:
            masters = list(self._parameters.values())
        elif self.zero_stage == 3:
            masters = self._optimizer.fp32_partitioned_groups_flat
        else:
            masters = self._optimizer.single_partition_of_fp32_groups
        for master in masters:
            state = {kind: torch.zeros_like(master) for kind in OPTIMIZER_KINDS}
            steps = torch.tensor(float(num_optimizer_steps), dtype=torch.float32, device=master.device)
            self._torch_state[master] = {"step": steps, **state}

    @torch.no_grad()
    def _masters_to_working_weights(self) -> None:
        """Copy fp32 masters into the weights of the forward pass, on every rank that needs them."""
        if self.zero_stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.zero_stage == 3:
            for parameter in self._parameters.values():
                held = safe_get_local_fp32_param(parameter)
                parameter.ds_tensor.copy_(held.view(-1))
            if persistent := self._optimizer.persistent_parameters:  # small ones that are never split
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


def even_share(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The half-open range of `numel` elements that `rank` answers for when all ranks hold all of them."""
    return numel * rank // num_ranks, numel * (rank + 1) // num_ranks
