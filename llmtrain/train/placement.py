"""What this rank holds of the model, how its layers talk with other ranks', and which tokens it sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmtrain.checkpoint.format import FlatSource
from llmtrain.loader.batches import Batch
from llmtrain.loader.dataset import NO_TARGET
from llmtrain.model import recompute
from llmtrain.model.attend import attend
from llmtrain.model.config import ModelConfig
from llmtrain.model.dropout import token_keys
from llmtrain.model.init import initial_weight
from llmtrain.model.partition import Part, Unit, local_config, part_of, unit_of
from llmtrain.model.seams import Seams
from llmtrain.model.size import block_costs
from llmtrain.model.transformer import Span, Transformer
from llmtrain.parallel import context, tensor
from llmtrain.parallel.balance import balanced_cuts
from llmtrain.parallel.config import ContextKind, ParallelConfig, PipelineSchedule
from llmtrain.parallel.groups import Axis, Groups, split_axis
from llmtrain.parallel.mpu import mark_for_norm
from llmtrain.parallel.vocab_loss import vocab_parallel_sum_cross_entropy
from llmtrain.train.config import Recompute, TrainConfig


def place(
    model: ModelConfig, parallel: ParallelConfig, groups: Groups, *, seq_len: int, seed: int = 0
) -> Placement:
    """Every rank calls this, in the same order as every other collective.

    Args:
        seq_len: Enters the cost of a block, by which pipeline stages are cut.
        seed: Of dropout.
    """
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Transformer(model).named_parameters()}
    tp_size, pp = groups.tp.size, groups.pp
    num_kv_parts = min(model.num_kv_heads, tp_size)
    costs = block_costs(model, seq_len=seq_len)
    schedule = parallel.pp_schedule if pp.size > 1 else PipelineSchedule.one_f_one_b
    cuts = balanced_cuts(costs, schedule.stages_per_rank * pp.size)
    stages = schedule.stages_of(pp.rank, pp.size)
    spans = tuple(Span(cuts[at], cuts[at + 1], model.num_layers) for at in stages)
    kv_copies = split_axis(groups.tp, tp_size // num_kv_parts)
    return Placement(groups, parallel, model, spans, shapes, kv_copies, seed)


def compile_blocks(model: Transformer) -> None:
    """Once the engine has wrapped the model: at ZeRO-3 DeepSpeed does not take one that is compiled."""
    for block in model.blocks.values():
        block.compile(dynamic=False)


def fresh_weights(placement: Placement, *, seed: int) -> FlatSource:
    """Initial weights by name, one tensor at a time; every rank draws the same numbers and keeps its part."""
    last: dict[str, NDArray[np.float32]] = {}
    lock = Lock()

    def source(kind: str, name: str, start: int, into: NDArray[np.float32]) -> None:
        assert kind == "weight", f"fresh {kind} is zero, nobody asks for it"
        with lock:
            if name not in last:
                last.clear()
                last[name] = initial_weight(name, math.prod(placement.shapes[name]), placement.model, seed)
            into[:] = last[name][start : start + into.size]

    return source


def even_share(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The half-open range of `numel` elements that `rank` answers for when all ranks hold all of them."""
    return numel * rank // num_ranks, numel * (rank + 1) // num_ranks


@dataclass(frozen=True)
class Placement:
    groups: Groups
    parallel: ParallelConfig
    model: ModelConfig
    """The whole model."""
    spans: tuple[Span, ...]
    """This rank's pipeline stages, in the order of the model."""
    shapes: dict[str, tuple[int, ...]]
    """Canonical name -> shape of the whole weight: every weight of the model, here or not."""

    kv_copies: Axis
    """The tp ranks that hold the same key/value heads as this one."""
    seed: int
    """Of dropout."""

    def build(self, train: TrainConfig, *, seams: Seams | None = None) -> Transformer:
        """This rank's part, in the caller's device context.

        Args:
            seams: in place of `seams()`.
        """
        local = local_config(self.model, tp_size=self.groups.tp.size)
        seams = seams or self.seams()
        if train.compile_blocks:  # what talks is left out: the compiler does not know process groups
            alone = Seams()
            ours = {each.name: getattr(seams, each.name) for each in fields(Seams)}
            talking = {name: call for name, call in ours.items() if call is not getattr(alone, name)}
            quiet: Any = torch.compiler.disable
            seams = replace(seams, **{name: quiet(call) for name, call in talking.items()})
        model = Transformer(local, seams=seams, spans=self.spans)
        model.recompute_every, model.dropout = train.recompute_every, train.dropout
        if train.recompute is Recompute.selective:
            model.recompute_contexts = recompute.selective
        return model

    def seams(self) -> Seams:
        """What the layers call where ranks have to talk."""
        tp, cp = self.groups.tp, self.groups.cp
        seams = Seams()
        if tp.size > 1:
            is_split = self.parallel.sequence_parallel
            seams = replace(
                seams,
                embed=partial(tensor.embed, axis=tp, sequence_parallel=is_split),
                own_positions=partial(tensor.own_positions, axis=tp, sequence_parallel=is_split),
                enter=partial(tensor.enter, axis=tp, sequence_parallel=is_split),
                leave=partial(tensor.leave, axis=tp, sequence_parallel=is_split),
                loss=partial(vocab_parallel_sum_cross_entropy, axis=tp),
            )
        if cp.size > 1 and self.parallel.context is ContextKind.heads:
            seams = replace(seams, attend=partial(context.attend_over_heads, axis=cp, attend=attend))
        elif cp.size > 1:
            seams = replace(
                seams,
                mask=partial(context.own_mask, axis=cp),
                attend=partial(context.attend_over_sequence, axis=cp),
            )
        return seams

    def part(self, name: str) -> Part:
        return part_of(name, self.model, tp_rank=self.groups.tp.rank, tp_size=self.groups.tp.size)

    def offset(self, name: str) -> int:
        """Where this rank's weight begins in the flattened whole one."""
        return self.part(name).range_of(math.prod(self.shapes[name]))[0]

    def share_of(self, name: str, numel: int) -> tuple[int, int]:
        """Of `numel` elements that this rank holds of a weight, the half-open range that a checkpoint takes
        from it: tp ranks with copies of them each give an equal share."""
        if name == "embedding.weight" and not self.spans[0].has_embedding:
            return 0, 0  # tied: the first stage gives its copy
        part = self.part(name)
        return even_share(numel, part.copy, part.num_copies)

    def prepare(self, model: nn.Module) -> None:
        """Once the weights have memory: what DeepSpeed's norm counts, and which gradients are sums."""
        tp = self.groups.tp
        if tp.group is None:
            return
        for name, parameter in model.named_parameters():
            part = self.part(name)
            mark_for_norm(parameter, counts_here=part.copy == 0)
            if unit_of(name) is Unit.whole:
                if self.parallel.sequence_parallel:  # each rank used it on its own positions
                    tensor.sum_gradient(parameter, tp)
            elif part.num_copies > 1:  # each rank used it for its own query heads
                tensor.sum_gradient(parameter, self.kv_copies)

    def inputs(self, batch: Batch, device: torch.device, *, dropout: float) -> tuple[Tensor, ...]:
        """A batch that is cut already, as `Transformer.forward` takes it: with keys where something is
        dropped."""
        batch = batch.to(device)
        inputs = (batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.targets_BS)
        if not dropout:
            return inputs
        if batch.places is None:  # held-out rows: nothing is dropped, but pipelines want one kind of input
            return (*inputs, torch.zeros_like(batch.tokens_BS))
        keys_BS = token_keys(self.seed, batch.places, batch.segments_BS.shape[1])
        return (*inputs, self._own(keys_BS).to(device, non_blocking=True))

    def cut(self, batch: Batch) -> Batch:
        """The positions of a batch's rows that this rank works on. `segments_BS` stays that of whole rows."""
        if self.groups.cp.size == 1:
            return batch
        own, targets_BS = self._own, self._own(batch.targets_BS)
        return replace(
            batch,
            tokens_BS=own(batch.tokens_BS),
            targets_BS=targets_BS,
            positions_BS=own(batch.positions_BS),
            num_valid=int((targets_BS != NO_TARGET).sum()),
        )

    def _own(self, x_BS: Tensor) -> Tensor:
        if self.groups.cp.size == 1:
            return x_BS
        zigzag = self.parallel.context is ContextKind.sequence
        return context.own_positions(x_BS, self.groups.cp, zigzag=zigzag)
