"""The one place that drives DeepSpeed: a step, held-out sums, and the training state in layout-free pieces.

What DeepSpeed 0.19.8 does and this file relies on, each held by a test that runs it:

* Gradients are divided by gradient_accumulation_steps and by the data-parallel size (dp x cp). A micro
  batch's loss sum is scaled by their product over the step's valid targets, so the gradient is that of one
  global mean.
* At ZeRO 1-2 a parameter's `_hp_mapping` names the piece of it that this rank's flat fp32 partition holds;
  at ZeRO-3 every rank holds the same share of every parameter, padded at the end.
* The fp32 master weights are made from the low-precision ones at `initialize`. They are overwritten here,
  so a bf16 run starts from, and resumes with, full-precision weights.
* Whatever its own optimizer is, it has set `_global_grad_norm` and changed nothing when it first calls the
  `step` of torch's, once or for each of its parts. So `_Gate` stands there. The parts' masters are in torch's
  groups then, with the reduced gradient, scaled by one factor.
* Of a norm that is not finite it makes no update, but at stage 0.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

from llmtrain.checkpoint.format import FlatSource, Piece
from llmtrain.loader.batches import Batch
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.mpu import Mpu
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.deepspeed_config import deepspeed_config
from llmtrain.train.engine import Judge, StepResult
from llmtrain.train.heartbeat import Mark, no_mark
from llmtrain.train.measures import GradientSquares, Memory, memory_of, storages
from llmtrain.train.muon import Held, Muon
from llmtrain.train.optimizer import all_state_kinds, build_optimizer, state_kinds
from llmtrain.train.placement import Placement, compile_blocks, even_share
from llmtrain.train.ranks import sum_once
from llmtrain.train.state import fill_all, for_checkpoint

if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # read when deepspeed is imported; its own guess needs packages

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # `initialize` would import it, and torch._dynamo with it
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state


def join_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed use the process group that is there."""
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed: not the user's affair.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", module="torch.distributed")
    # A ZeRO-3 engine leaves its own function here for good. It adds the bias in place to the product; where
    # selective recomputation keeps that, the bias is added twice.
    torch.nn.functional.linear = torch._C._nn.linear
    if device.type == "cpu":
        # Without this DeepSpeed compiles a shared-memory all-reduce with g++ at the first start of every
        # machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


class _Gate:
    """Takes the place of a torch optimizer's `step`, looks at the gradient of each part that it is called
    for, and asks once a training step whether to update."""

    def __init__(self, optimizer: AdamW | Muon) -> None:
        self._update = optimizer.step
        self._ask: Callable[[], bool] = lambda: True
        self._look: Callable[[], None] = lambda: None
        self.answer: bool | None = None
        """None: not asked yet."""
        optimizer.step = self._step  # type: ignore[method-assign]

    def arm(self, ask: Callable[[], bool], look: Callable[[], None]) -> None:
        """For the next training step."""
        self._ask, self._look, self.answer = ask, look, None

    def _step(self, closure: None = None) -> None:
        self._look()
        if self.answer is None:
            self.answer = self._ask()
        if self.answer:
            self._update()


class DeepSpeedEngine:
    """ZeRO 0-3 over the data ranks, tensor and context parallelism inside the model."""

    def __init__(
        self, placement: Placement, *, device: torch.device, train: TrainConfig, optimizer: OptimizerConfig
    ) -> None:
        self.device = device
        self.placement = placement
        self.groups = placement.groups
        self.data = placement.groups.data
        self.zero_stage = placement.parallel.zero_stage
        self.dropout = train.dropout
        self.num_optimizer_steps = 0
        self.optimizer_kind = optimizer.kind
        self.state_kinds = all_state_kinds(optimizer.kind)
        self.mark: Mark = no_mark
        self._measures = False
        join_deepspeed(device)
        self.mpu = Mpu(self.groups)
        config = deepspeed_config(train, placement.parallel, dp_size=self.data.size)
        self._engine, self._optimizer = self._initialize(config, train, optimizer)
        self._parameters: dict[str, Any] = self._named_parameters()
        if isinstance(self._torch_optimizer, Muon):
            self._torch_optimizer.attach(self._held(), self.groups, placement.shapes)
        self._gate = _Gate(self._torch_optimizer)

    def _initialize(
        self, config: dict[str, Any], train: TrainConfig, optimizer: OptimizerConfig
    ) -> tuple[Any, Any]:
        with self._build_context(config):
            model = self.placement.build(train)
        self._fit_out(model)
        engine, wrapped, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, optimizer), config=config, mpu=self.mpu
        )
        if train.compile_blocks:
            compile_blocks(model)
        return engine, wrapped

    def _build_context(self, config: dict[str, Any]) -> AbstractContextManager[Any]:
        """At ZeRO-3 every weight is split as soon as it exists."""
        if self.zero_stage < 3:
            return torch.device("meta")
        # Not by dtype=: DeepSpeed 0.19.8 takes bf16 in its place on a CPU without fp16 instructions.
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            config_dict_or_path=config,
            mpu=self.mpu,
            data_parallel_group=self.mpu.get_data_parallel_group(),
        )
        return context

    def _fit_out(self, model: Transformer) -> None:
        """Give a model on the meta device memory, and everything that has to be said before `initialize`."""
        if self.zero_stage < 3:
            model.to_empty(device=self.device)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()  # DeepSpeed compares and broadcasts before `load` fills them
        self.placement.prepare(model)

    def _named_parameters(self) -> dict[str, Any]:
        """By canonical name. Any: DeepSpeed hangs attributes of its own on parameters."""
        return dict(self._engine.module.named_parameters())

    # -- the step

    def train_step(
        self, micro_batches: list[Batch], *, lr: float, judge: Judge | None = None, measure: bool = False
    ) -> StepResult:
        """One optimizer update from this rank's micro batches."""
        gas = self._engine.gradient_accumulation_steps()  # what DeepSpeed divides by, however many there are
        mine = [self.placement.cut(batch) for batch in micro_batches]
        (num_valid,) = self._sum(sum(batch.num_valid for batch in mine))
        divisor = max(1.0, num_valid)  # a step of padding only has no gradient, and is no division by zero
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        skipped_before = self._engine.skipped_steps
        scaler = None if self.loss_scale is None else vars(self._optimizer.loss_scaler)
        scaler_before = dict(scaler or {})
        found: tuple[float, float] | None = None
        self._measures, self._gradient_bytes = measure, 0
        squares = GradientSquares(self.placement, self.device) if measure else None

        def measure_part() -> None:
            if squares is not None:
                for name, _, own in self._owned("gradient"):
                    squares.add(name, own)

        def look() -> tuple[float, float]:
            nonlocal found
            # of the norm one rank speaks: all judge by the same bits
            loss_sum, norm = self._sum(self._own_loss_sum(), self._norm() if self.data.rank == 0 else 0.0)
            found = loss_sum / divisor, norm
            return found

        self._gate.arm(lambda: judge is None or judge(*look()), measure_part)
        self._run_micro_batches(mine, scale=gas * self.data.size / divisor)
        if self.zero_stage == 3 and self._gate.answer is None:
            self._gather_small_weights()  # which DeepSpeed forgets when it has dropped a gradient
        loss, norm = found or look()
        is_skipped = scaler is not None and self._engine.skipped_steps > skipped_before
        if judge is not None and self._gate.answer is None and not is_skipped:
            judge(loss, norm)  # it is asked once, also where DeepSpeed has decided by itself
        is_withheld = not self._gate.answer and not is_skipped
        if is_withheld and scaler is not None:
            scaler.update(scaler_before)  # it has counted a step
        self.num_optimizer_steps += bool(self._gate.answer)
        return StepResult(
            loss=loss,
            grad_norm=norm,
            num_valid=int(num_valid),
            is_skipped=is_skipped,
            is_withheld=is_withheld,
            grad_norms=None if squares is None else squares.norms(norm),
            memory=self._memory() if measure else None,
        )

    @property
    def loss_scale(self) -> float | None:
        """What fp16's losses are multiplied with now; None in other precisions."""
        return float(self._optimizer.loss_scaler.cur_scale) if self._engine.fp16_enabled() else None

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._optimizer.loss_scaler.cur_scale = value

    def _run_micro_batches(self, micro_batches: list[Batch], *, scale: float) -> None:
        """Forward, backward and update."""
        self._step_loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            at_boundary = number == len(micro_batches)
            # ZeRO-1/2 silently keep only the last micro batch when the boundary is off by one, and
            # DeepSpeed's own count knows one number of micro batches.
            self._engine.set_gradient_accumulation_boundary(at_boundary)
            self.mark("forward", micro_step=number)
            micro_loss_sum = self._loss_sum(batch)
            self._step_loss_sum += micro_loss_sum.detach()
            self.mark("backward", micro_step=number)
            self._engine.backward(micro_loss_sum * scale)
            if at_boundary and self.zero_stage == 0:
                self._full_norm = self._full_gradient_norm()  # DeepSpeed has none at stage 0
            if at_boundary:
                self._count_gradient()
                self.mark("update")
            self._engine.step()

    def _own_loss_sum(self) -> float:
        """Over this rank's micro batches of the step."""
        return float(self._step_loss_sum)

    def _norm(self) -> float:
        """Of the step's whole gradient, as soon as it is known."""
        return self._full_norm if self.zero_stage == 0 else float(self._optimizer._global_grad_norm)

    @torch.no_grad()
    def held_out_sums(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Loss sum in nats and number of targets over all ranks. Every rank brings as many batches."""
        self._engine.eval()
        loss_sum, num_valid = 0.0, 0
        for number, batch in enumerate(map(self.placement.cut, batches), start=1):
            self.mark("evaluate", micro_step=number)
            loss_sum += float(self._loss_sum(batch))
            num_valid += batch.num_valid
        loss_sum, total_valid = self._sum(loss_sum, num_valid)
        return loss_sum, int(total_valid)

    def _loss_sum(self, batch: Batch) -> Tensor:
        inputs = self.placement.inputs(batch, self.device, dropout=self.dropout)
        loss_sum: Tensor = self._engine(*inputs)
        return loss_sum

    def _sum(self, *values: float) -> list[float]:
        return sum_once(self.groups, self.device, *values)

    def _full_gradient_norm(self) -> float:
        """Over all tp ranks, each element once."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and self.placement.part(name).copy == 0:
                squares += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double() ** 2
        if self.groups.tp.group is not None:
            dist.all_reduce(squares, group=self.groups.tp.group)
        return math.sqrt(float(squares))

    # -- what is measured

    def _count_gradient(self) -> None:
        """Called when backward passes are over: the update drops it bit by bit."""
        if self._measures:
            self._gradient_bytes = sum(storages(self._gradient_tensors(), self.device).values())

    def _gradient_tensors(self) -> Iterator[Tensor | None]:
        """Wherever DeepSpeed's optimizers keep gradients until the update."""
        for parameter in self._parameters.values():
            yield parameter.grad
            yield getattr(parameter, "grad_accum", None)
        if self.zero_stage > 0:
            kept = vars(self._optimizer)
            yield from (master.grad for master in self._masters)
            yield from kept.get("fp32_groups_gradients_flat", ())  # BF16_Optimizer
            yield kept.get("grad_partitions_flat_buffer")  # ZeRO-3
            for some in kept.get("averaged_gradients", {}).values():
                yield from some or ()

    def _memory(self) -> Memory:
        weights = list(self._parameters.values())
        states = (value for state in self._torch_state.values() for value in state.values())
        return memory_of(
            weights=[*weights, *(getattr(weight, "ds_tensor", None) for weight in weights)],
            optimizer=[*self._masters, *states],
            gradient_bytes=self._gradient_bytes,
            device=self.device,
        )

    # -- the state

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of weights and optimizer state: over all ranks, every element exactly once."""
        # The optimizer has no state before its first update, which fp16's overflows put off.
        for kind in ("weight", *self.state_kinds) if self.num_optimizer_steps else ("weight",):
            for name, start, own in self._owned(kind):
                yield Piece(kind, name, self.placement.shapes[name], start, for_checkpoint(own))

    def _owned(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """Of the fragments of `kind` what this rank answers for: over all ranks, every element once."""
        for name, start, held in self._fragments(kind):
            begin, end = 0, held.numel()
            if self.zero_stage == 0:  # every data rank holds everything, and answers for an equal share
                begin, end = even_share(end, self.data.rank, self.data.size)
            first, last = self.placement.share_of(name, end - begin)
            if first < last:
                yield name, start + begin + first, held[begin + first : begin + last]

    def load(self, source: FlatSource, *, num_optimizer_steps: int = 0) -> None:
        """Fill master weights, and with `num_optimizer_steps` > 0 the optimizer's state too, from
        `source`."""
        kinds = ("weight", *self.state_kinds) if num_optimizer_steps else ("weight",)
        self._torch_state.clear()  # some of DeepSpeed's optimizers have taken a step on zeros by now
        if num_optimizer_steps:
            self._create_optimizer_state(num_optimizer_steps)
        fill_all(((kind, *each) for kind in kinds for each in self._fragments(kind)), source)
        self.num_optimizer_steps = num_optimizer_steps
        self._masters_to_working_weights()

    @torch.no_grad()
    def _fragments(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset in the flattened whole tensor, 1-D fp32 view) of what this rank holds of `kind`: a
        weight, an optimizer state, or the gradient, as far as torch's optimizer is to step with it now."""
        if kind == "gradient":
            at_hand = {
                id(master) for group in self._torch_optimizer.param_groups for master in group["params"]
            }
            for each in self._held():
                if id(each.master) in at_hand and each.master.grad is not None:
                    yield each.name, each.start, each.of(each.master.grad, each.start, each.end)
            return
        if self.zero_stage < 3:
            for each in self._held():
                if kind == "weight" or kind in state_kinds(each.name, self.optimizer_kind):
                    # Not through _hp_mapping: DeepSpeed links the optimizer's state after the first group's
                    # first step, when the second group has none yet, and never again.
                    flat = each.master if kind == "weight" else self._torch_state[each.master][kind]
                    yield each.name, each.start, each.of(flat.detach(), each.start, each.end)
            return
        for name, parameter in self._parameters.items():
            first, last = self._share_at_zero_3(parameter)
            held = (
                safe_get_local_fp32_param(parameter)
                if kind == "weight"
                else safe_get_local_optimizer_state(parameter, kind)
            )
            if first < last:
                yield name, self.placement.offset(name) + first, held.detach().view(-1)[: last - first]

    def _held(self) -> Iterator[Held]:
        """Where the optimizer finds what this rank holds of each weight."""
        for name, parameter in self._parameters.items():
            offset = self.placement.offset(name)
            if self.zero_stage == 0:
                yield Held(name, offset, parameter.numel(), parameter, 0)
            elif self.zero_stage == 3:
                first, last = self._share_at_zero_3(parameter)
                if first < last:
                    part, begin, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                    yield Held(name, offset + first, last - first, self._masters[part], begin)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                at = mapping.get_hp_fragment_address()
                start = offset + mapping.lp_fragment_address.start
                yield Held(name, start, at.numel, self._masters[mapping.param_group_index], at.start)

    def _share_at_zero_3(self, parameter: Any) -> tuple[int, int]:
        """This rank's elements of the flattened weight; the last ranks' shares are padded."""
        first = min(parameter.ds_numel, self.data.rank * parameter.partition_numel())
        return first, min(parameter.ds_numel, first + parameter.partition_numel())

    @property
    def _masters(self) -> list[Tensor]:
        """The tensors that the optimizer updates: this rank's flat fp32 partitions, but at stage 0."""
        if self.zero_stage == 0:
            return list(self._parameters.values())
        if self.zero_stage == 3:
            masters: list[Tensor] = self._optimizer.fp32_partitioned_groups_flat
        elif self._is_bf16_optimizer:
            masters = self._optimizer.fp32_groups_flat_partition
        else:
            masters = self._optimizer.single_partition_of_fp32_groups
        return masters

    @property
    def _is_bf16_optimizer(self) -> bool:
        """bf16 with fp32 accumulation at ZeRO-1 has a class of its own."""
        return hasattr(self._optimizer, "fp32_groups_flat_partition")

    @property
    def _torch_optimizer(self) -> AdamW | Muon:
        wrapped: AdamW | Muon = self._optimizer if self.zero_stage == 0 else self._optimizer.optimizer
        return wrapped

    @property
    def _torch_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The optimizer's own state, by master."""
        state: dict[Tensor, dict[str, Tensor]] = self._torch_optimizer.state
        return state

    def _create_optimizer_state(self, num_optimizer_steps: int) -> None:
        """Give the optimizer the state that it would otherwise create at its first step, to be filled by
        `load`."""
        held = self._held() if self.zero_stage < 3 else ()
        kinds = {each.master: state_kinds(each.name, self.optimizer_kind) for each in held}
        for master in self._masters:
            # A master that is all padding may have any.
            state = {kind: torch.zeros_like(master) for kind in kinds.get(master, self.state_kinds)}
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
            if persistent := self._optimizer.persistent_parameters:
                persistent[0].partition(persistent)
            self._gather_small_weights()

    def _gather_small_weights(self) -> None:
        """Those that ZeRO-3 never leaves split."""
        if persistent := self._optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)
