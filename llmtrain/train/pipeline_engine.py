"""Pipeline parallelism by DeepSpeed's PipelineModule and DualPipeVModule, ZeRO-1 below them.

A stage is one layer to DeepSpeed: a span of the model, which makes masks and rotations once and computes
blocks again as it likes. Between stages travel x_BSD and the positions, segments and targets that it belongs
to, always of one shape. The loss is computed by the last stage and scaled by the step's valid targets, never
as a mean of micro-batch means.

All stages of a rank are one model: where it has both the first and the last, a tied embedding is one weight.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from llmtrain.loader.batches import Batch
from llmtrain.loader.dataset import NO_TARGET
from llmtrain.model.transformer import Span, Transformer
from llmtrain.parallel.config import PipelineSchedule
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.deepspeed_engine import DeepSpeedEngine
from llmtrain.train.heartbeat import Phase
from llmtrain.train.optimizer import build_optimizer
from llmtrain.train.placement import Placement, compile_blocks
from llmtrain.train.ranks import sum_once

PHASES: dict[str, Phase] = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "OptimizerStep": "update",
}
"""Instructions of DeepSpeed's schedules. All others move something between ranks: exchange."""

Inputs = tuple[Tensor, ...]
"""x_BSD (tokens for the first stage), positions, segments, targets; keys where something is dropped."""


class _Stage(nn.Module):
    """A span of the model as DeepSpeed calls layers: one tuple in, one out; the last gives the scaled loss
    sum. Weights are used inside `forward` alone: DeepSpeed's bf16 optimizer misses gradients of others."""

    def __init__(self, model: Transformer, span: Span) -> None:
        super().__init__()
        self.model = model
        self.span = span
        self.scale = 1.0
        self.loss_sum: Tensor | None = None
        """Of the micro batches since it was set to None, before scaling: on the last stage alone."""

    def forward(self, inputs: Inputs) -> Inputs | Tensor:
        x_BSD, positions_BS, segments_BS, targets_BS, *rest = inputs
        keys_BS = rest[0] if rest else None
        if self.span.has_embedding:
            x_BSD = self.model.embed(x_BSD, positions_BS, keys_BS)
        x_BSD = self.model.run_blocks(x_BSD, positions_BS, segments_BS, keys_BS, span=self.span)
        if not self.span.has_head:
            return x_BSD, *inputs[1:]
        loss_sum = self.model.read_out(x_BSD, targets_BS)
        told = loss_sum.detach().double()
        self.loss_sum = told if self.loss_sum is None else self.loss_sum + told
        return loss_sum * self.scale


class _TiedPipelineModule(PipelineModule):  # type: ignore[misc]
    """One stage a rank, of which the first and the last have each a copy of the embedding."""

    def __init__(self, stage: _Stage, ends: dist.ProcessGroup, **options: Any) -> None:
        self._stage = [stage]  # in a list: a module may not have submodules before its own set-up
        self._ends = ends
        super().__init__(**options)

    def _index_tied_modules(self) -> dict[str, Any]:
        for weight, _ in self.get_tied_weights_and_groups():
            # In the norm the first stage's copy counts.
            weight.ds_pipe_replicated = self._stage[0].span.has_head  # type: ignore[attr-defined]
        return {}

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, dist.ProcessGroup]]:
        embedding = self._stage[0].model.embedding
        return [] if embedding is None else [(embedding.weight, self._ends)]


def pipeline_module(stages: Sequence[_Stage], placement: Placement) -> PipelineModule:
    """The whole pipeline, of which this rank has `stages`. Every rank calls this."""
    topology, schedule = placement.groups.topology, placement.parallel.pp_schedule
    pp_size = topology.pp_size
    mine = dict(zip(schedule.stages_of(placement.groups.pp.rank, pp_size), stages, strict=True))
    num_stages = schedule.stages_per_rank * pp_size
    options = {
        "layers": [mine.get(at) or LayerSpec(_Stage) for at in range(num_stages)],
        "topology": PipeModelDataParallelTopology(
            num_pp=pp_size, num_dp=topology.dp_size * topology.cp_size, num_mp=topology.tp_size
        ),
        "partition_method": "uniform",
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
        if schedule is PipelineSchedule.dual_pipe_v:
            return DualPipeVModule(**options)
        if placement.model.tie_embeddings:
            return _TiedPipelineModule(stages[0], tied_group(topology), **options)
        return PipelineModule(**options)


def tied_group(topology: Topology) -> dist.ProcessGroup:
    """The first and last stage of this rank's pipeline. Every rank calls this."""
    pipelines = topology.groups("pp")
    ends = [dist.new_group([ranks[0], ranks[-1]]) for ranks in pipelines]
    mine: dist.ProcessGroup = ends[[dist.get_rank() in ranks for ranks in pipelines].index(True)]
    return mine


class PipelineEngine(DeepSpeedEngine):
    def _initialize(
        self, config: dict[str, Any], train: TrainConfig, optimizer: OptimizerConfig
    ) -> tuple[Any, Any]:
        with torch.device("meta"):
            model = self.placement.build(train)
        self._fit_out(model)
        self._model = model
        stages = [_Stage(model, span) for span in self.placement.spans]
        self._last = stages[-1]
        self._shape: torch.Size | None = None
        self._num_forwards = 0
        engine, wrapped, *_ = deepspeed.initialize(
            model=pipeline_module(stages, self.placement),
            optimizer=build_optimizer(model, optimizer),
            config=config,
        )
        self._mark_instructions(engine)
        if train.compile_blocks:
            compile_blocks(model)
        return engine, wrapped

    def _mark_instructions(self, engine: Any) -> None:
        """Have this engine of DeepSpeed's say which instruction of its schedule it is at. A rank's micro-step
        is the number of forward passes that it has begun."""

        def marked(instruction: str, work: Callable[..., None]) -> Callable[..., None]:
            def call(engine: Any, *arguments: Any, **options: Any) -> None:
                self._num_forwards += instruction == "ForwardPass"
                phase = PHASES.get(instruction, "exchange") if engine.module.training else "evaluate"
                if phase == "update":
                    self._count_gradient()
                self.mark(phase, micro_step=self._num_forwards)
                work(engine, *arguments, **options)

            return call

        engine._INSTRUCTION_MAP = {
            kind: marked(kind.__name__, work) for kind, work in engine._INSTRUCTION_MAP.items()
        }

    def _named_parameters(self) -> dict[str, Any]:
        return dict(self._model.named_parameters())

    def _run_micro_batches(self, micro_batches: list[Batch], *, scale: float) -> None:
        self._engine.micro_batches, self._num_forwards = len(micro_batches), 0
        self._last.scale, self._last.loss_sum = scale, None
        self._engine.train_batch(self._inputs(micro_batches))

    def _own_loss_sum(self) -> float:
        return float(self._last.loss_sum or 0.0)

    @torch.no_grad()
    def held_out_sums(self, batches: Iterator[Batch]) -> tuple[float, int]:
        self._last.scale, self._last.loss_sum, self._num_forwards = 1.0, None, 0
        num_valid = 0
        at_once = 2 * self.groups.pp.size  # dual_pipe_v takes no fewer
        cut = map(self.placement.cut, batches)
        while some := list(itertools.islice(cut, at_once)):
            num_valid += sum(batch.num_valid for batch in some)
            if self.placement.parallel.pp_schedule is PipelineSchedule.dual_pipe_v:
                blank = replace(some[-1], targets_BS=torch.full_like(some[-1].targets_BS, NO_TARGET))
                some += [blank] * (at_once - len(some))
            self._engine.micro_batches = len(
                some
            )  # as an argument DeepSpeed's dual_pipe_v forgets it halfway
            self._engine.eval_batch(self._inputs(some), reduce_output=None, bcast_loss=False)
        loss_sum, total_valid = self._sum(float(self._last.loss_sum or 0.0), num_valid)
        return loss_sum, int(total_valid)

    def _sum(self, *values: float) -> list[float]:
        loss_rank = self.placement.parallel.pp_schedule.loss_rank(self.groups.pp.size)
        return sum_once(self.groups, self.device, *values, loss_rank=loss_rank)

    def _inputs(self, batches: list[Batch]) -> Iterator[tuple[Inputs, Tensor]]:
        for batch in batches:
            shape = batch.tokens_BS.shape
            self._shape = self._shape or shape
            assert shape == self._shape, f"stages exchange one shape, {self._shape}, and a batch has {shape}"
            inputs = self.placement.inputs(batch, self.device, dropout=self.dropout)
            yield inputs, inputs[3]  # as labels, too: the last stage loads a batch in any case
