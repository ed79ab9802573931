"""Pipeline parallelism by DeepSpeed's PipelineModule: one forward, one backward in turn (Narayanan et al.
2021, arXiv:2104.04473, section 2.2), ZeRO-1 below it.

A stage is one layer to DeepSpeed: a span of the model, which makes masks and rotations once and computes
blocks again as it likes. Between stages travel x_BSD and the positions, segments and targets that it belongs
to, always of one shape. The loss is computed by the last stage and scaled by the step's valid targets, never
as a mean of micro-batch means.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from llmtrain.loader.batches import Batch
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.deepspeed_engine import DeepSpeedEngine
from llmtrain.train.optimizer import build_optimizer
from llmtrain.train.placement import compile_blocks

Inputs = tuple[Tensor, ...]
"""x_BSD (tokens for the first stage), positions, segments, targets; keys where something is dropped."""


class _Stage(nn.Module):
    """A span of the model as DeepSpeed calls layers: one tuple in, one out; the last gives the scaled loss
    sum. Weights are used inside `forward` alone: DeepSpeed's bf16 optimizer misses gradients of others."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.scale = 1.0
        self.loss_sum: Tensor | None = None
        """Of the micro batches since it was set to None, before scaling: on the last stage alone."""

    def forward(self, inputs: Inputs) -> Inputs | Tensor:
        x_BSD, positions_BS, segments_BS, targets_BS, *rest = inputs
        keys_BS = rest[0] if rest else None
        if self.model.span.has_embedding:
            x_BSD = self.model.embed(x_BSD, positions_BS, keys_BS)
        x_BSD = self.model.run_blocks(x_BSD, positions_BS, segments_BS, keys_BS)
        if not self.model.span.has_head:
            return x_BSD, *inputs[1:]
        loss_sum = self.model.read_out(x_BSD, targets_BS)
        told = loss_sum.detach().double()
        self.loss_sum = told if self.loss_sum is None else self.loss_sum + told
        return loss_sum * self.scale


class _Stages(PipelineModule):  # type: ignore[misc]
    """The stages, of which this rank has one; and the embedding that the first and last share."""

    def __init__(self, stage: _Stage, topology: Topology, *, tied: dist.ProcessGroup | None) -> None:
        self._tied = tied
        self._stage = [stage]  # in a list: a module may not have submodules before its own set-up
        at = topology.coordinates(dist.get_rank())["pp"]
        layers = [stage if each == at else LayerSpec(_Stage) for each in range(topology.pp_size)]
        grid = PipeModelDataParallelTopology(
            num_pp=topology.pp_size, num_dp=topology.dp_size * topology.cp_size, num_mp=topology.tp_size
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
            super().__init__(layers, topology=grid, partition_method="uniform")

    def _index_tied_modules(self) -> dict[str, Any]:
        for weight, _ in self.get_tied_weights_and_groups():
            # In the norm the first stage's copy counts.
            weight.ds_pipe_replicated = self._stage[0].model.span.has_head  # type: ignore[attr-defined]
        return {}

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, dist.ProcessGroup]]:
        embedding = self._stage[0].model.embedding
        return [] if self._tied is None or embedding is None else [(embedding.weight, self._tied)]


def tied_group(topology: Topology) -> dist.ProcessGroup | None:
    """The first and last stage of this rank's pipeline. Every rank calls this."""
    mine = None
    for ranks in topology.groups("pp"):
        group = dist.new_group([ranks[0], ranks[-1]])
        mine = group if dist.get_rank() in ranks else mine
    return mine


class PipelineEngine(DeepSpeedEngine):
    def _initialize(
        self, config: dict[str, Any], train: TrainConfig, optimizer: OptimizerConfig
    ) -> tuple[Any, Any]:
        with torch.device("meta"):
            model = self.placement.build(train)
        self._fit_out(model)
        self._stage = _Stage(model)
        self._shape: torch.Size | None = None
        topology = self.groups.topology
        tied = tied_group(topology) if self.placement.model.tie_embeddings else None
        stages = _Stages(self._stage, topology, tied=tied)
        engine, wrapped, *_ = deepspeed.initialize(
            model=stages, optimizer=build_optimizer(model, optimizer), config=config
        )
        if train.compile_blocks:
            compile_blocks(model)
        return engine, wrapped

    def _named_parameters(self) -> dict[str, Any]:
        return dict(self._stage.model.named_parameters())

    def _run_micro_batches(self, micro_batches: list[Batch], *, scale: float) -> tuple[float, float]:
        self._engine.micro_batches = len(micro_batches)
        self._stage.scale, self._stage.loss_sum = scale, None
        self._engine.train_batch(self._inputs(micro_batches))
        return float(self._stage.loss_sum or 0.0), float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def held_out_sums(self, batches: Iterator[Batch]) -> tuple[float, int]:
        self._stage.scale, self._stage.loss_sum = 1.0, None
        num_valid = 0
        for batch in map(self.placement.cut, batches):
            num_valid += batch.num_valid
            self._engine.eval_batch(
                self._inputs([batch]), num_micro_batches=1, reduce_output=None, bcast_loss=False
            )
        loss_sum, total_valid = self._sum(float(self._stage.loss_sum or 0.0), num_valid)
        return loss_sum, int(total_valid)

    def _inputs(self, batches: list[Batch]) -> Iterator[tuple[Inputs, Tensor]]:
        for batch in batches:
            shape = batch.tokens_BS.shape
            self._shape = self._shape or shape
            assert shape == self._shape, f"stages exchange one shape, {self._shape}, and a batch has {shape}"
            inputs = self.placement.inputs(batch, self.device, dropout=self.dropout)
            yield inputs, inputs[3]  # as labels, too: the last stage loads a batch in any case
