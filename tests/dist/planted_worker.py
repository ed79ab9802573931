"""One rank of the planted faults: what `llmtrain verify` runs, with our own code broken while a case runs.

A case is named LAYOUT or LAYOUT:FAULT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.model.partition import Part, Unit, unit_of
from llmtrain.parallel import tensor
from llmtrain.train import verify_rank
from llmtrain.train.placement import Placement

FORGOTTEN = "blocks.0.mlp.w_up.weight"


@contextmanager
def patched(owner: Any, **changes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in changes}
    for name, value in changes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def with_gradient_times(loss: Tensor, factor: float) -> Tensor:
    """The same value; so only gradients tell."""
    return loss * factor + (loss * (1.0 - factor)).detach()


@contextmanager
def micro_batch_mean() -> Iterator[None]:
    """Every micro batch counts the same, however many targets it has."""
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415  3 s of imports

    step, loss_sum = DeepSpeedEngine.train_step, DeepSpeedEngine._loss_sum

    def train_step(self: Any, micro_batches: Any, *, lr: float) -> Any:
        valid = torch.tensor(float(sum(batch.num_valid for batch in micro_batches)))
        dist.all_reduce(valid, group=self.data.group)
        self.planted_mean = float(valid) / (len(micro_batches) * self.data.size)
        return step(self, micro_batches, lr=lr)

    def weighted(self: Any, batch: Any) -> Tensor:
        return with_gradient_times(loss_sum(self, batch), self.planted_mean / max(1, batch.num_valid))

    with patched(DeepSpeedEngine, train_step=train_step, _loss_sum=weighted):
        yield


@contextmanager
def dropped_micro_batch() -> Iterator[None]:
    """The first micro batch of a step leaves no gradient."""
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415

    step, loss_sum = DeepSpeedEngine.train_step, DeepSpeedEngine._loss_sum

    def train_step(self: Any, micro_batches: Any, *, lr: float) -> Any:
        self.planted_first = True
        return step(self, micro_batches, lr=lr)

    def dropped(self: Any, batch: Any) -> Tensor:
        factor = 0.0 if self.planted_first else 1.0
        self.planted_first = False
        return with_gradient_times(loss_sum(self, batch), factor)

    with patched(DeepSpeedEngine, train_step=train_step, _loss_sum=dropped):
        yield


@contextmanager
def norm_not_summed() -> Iterator[None]:
    """Under sequence parallelism a norm's gradient stays that of the rank's own positions."""
    with patched(tensor, sum_gradient=lambda parameter, axis: None):
        yield


@contextmanager
def wrong_kv_head() -> Iterator[None]:
    """A tensor-parallel rank holds its neighbour's key/value heads."""
    part_of = Placement.part

    def part(self: Placement, name: str) -> Part:
        found = part_of(self, name)
        if unit_of(name) is not Unit.kv_heads:
            return found
        return replace(found, index=(found.index + 1) % found.num_parts)

    with patched(Placement, part=part):
        yield


@contextmanager
def gradient_times_cp() -> Iterator[None]:
    """Context-parallel ranks are summed where the mean was meant."""
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415

    run = DeepSpeedEngine._run_micro_batches

    def scaled(self: Any, micro_batches: Any, *, scale: float) -> Any:
        return run(self, micro_batches, scale=scale * self.groups.cp.size)

    with patched(DeepSpeedEngine, _run_micro_batches=scaled):
        yield


@contextmanager
def clipped_by_stage() -> Iterator[None]:
    """Each pipeline stage clips by the norm of its own gradients."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: PLC0415

    with patched(DeepSpeedZeroOptimizer, _model_parallel_all_reduce=lambda self, tensor, op: None):
        yield


@contextmanager
def tied_not_summed() -> Iterator[None]:
    """First and last stage each keep their own gradient of the embedding that they share."""
    from deepspeed.runtime.pipe import schedule  # noqa: PLC0415
    from deepspeed.runtime.pipe.engine import PipelineEngine  # noqa: PLC0415

    instructions = dict(PipelineEngine._INSTRUCTION_MAP)
    instructions[schedule.ReduceTiedGrads] = lambda self: None
    with patched(PipelineEngine, _INSTRUCTION_MAP=instructions):
        yield


@contextmanager
def dropout_by_rank() -> Iterator[None]:
    """Tensor-parallel ranks drop other elements of what they hold alike."""
    inputs = Placement.inputs

    def moved(self: Placement, batch: Any, device: Any, *, dropout: float) -> tuple[Tensor, ...]:
        *rest, keys_BS = inputs(self, batch, device, dropout=dropout)
        return (*rest, keys_BS + self.groups.tp.rank)

    with patched(Placement, inputs=moved):
        yield


@contextmanager
def weight_not_reloaded() -> Iterator[None]:
    """One weight stays what it was at the start."""
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415

    load = DeepSpeedEngine.load

    def forgetful(self: Any, source: Any, *, num_optimizer_steps: int = 0) -> None:
        def without(kind: str, name: str, start: int, into: Any) -> None:
            if num_optimizer_steps and (kind, name) == ("weight", FORGOTTEN):
                numel = math.prod(self.placement.shapes[name])
                whole = verify_rank.start_weight(name, numel, self.placement.model)
                into[:] = whole[start : start + into.size]
            else:
                source(kind, name, start, into)

        load(self, without, num_optimizer_steps=num_optimizer_steps)

    with patched(DeepSpeedEngine, load=forgetful):
        yield


@contextmanager
def steps_not_reloaded() -> Iterator[None]:
    """AdamW's moments come back, and the number of its steps does not."""
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415

    create = DeepSpeedEngine._create_optimizer_state
    with patched(DeepSpeedEngine, _create_optimizer_state=lambda self, steps: create(self, steps + 1)):
        yield


FAULTS = {
    fault.__name__: fault
    for fault in (
        micro_batch_mean,
        dropped_micro_batch,
        norm_not_summed,
        wrong_kv_head,
        gradient_times_cp,
        clipped_by_stage,
        tied_not_summed,
        dropout_by_rank,
        weight_not_reloaded,
        steps_not_reloaded,
    )
}


def around(name: str) -> Any:
    fault = name.partition(":")[2]
    return FAULTS[fault]() if fault else nullcontext()


if __name__ == "__main__":
    verify_rank.main(around=around)
