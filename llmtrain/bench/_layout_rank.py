"""One rank of `bench layouts`: what it hands to collectives in one step, counted and by the formula.

Counted where all of torch.distributed's functions end, at the methods of ProcessGroup, so that what DeepSpeed
sends under older names, and what `batch_isend_irecv` sends, is counted once each.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmtrain.loader.batches import Batch
from llmtrain.model.config import Family, ModelConfig
from llmtrain.parallel.config import ContextKind, ParallelConfig, PipelineSchedule
from llmtrain.parallel.groups import Groups, build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.parallel.volume import Sizes, bytes_per_step
from llmtrain.train.config import OptimizerConfig, Precision, TrainConfig
from llmtrain.train.engines import open_engine
from llmtrain.train.optimizer import is_vector
from llmtrain.train.placement import Placement, fresh_weights, place
from llmtrain.train.ranks import join_ranks

INPUTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "allreduce": ("all_reduce", lambda tensors, *_: tensors),
    "allgather": ("all_gather", lambda outputs, inputs, *_: inputs),
    "all_gather_single": ("all_gather", lambda output, told, *_: [told]),
    "_allgather_base": ("all_gather", lambda output, told, *_: [told]),
    "reduce_scatter": ("reduce_scatter", lambda outputs, inputs, *_: inputs[0]),
    "reduce_scatter_single": ("reduce_scatter", lambda output, told, *_: [told]),
    "_reduce_scatter_base": ("reduce_scatter", lambda output, told, *_: [told]),
    "all_to_all_single": ("all_to_all", lambda output, told, *_: [told]),
    "alltoall_base": ("all_to_all", lambda output, told, *_: [told]),
    "alltoall": ("all_to_all", lambda outputs, inputs, *_: inputs),
    "reduce": ("reduce", lambda tensors, *_: tensors),
    "broadcast": ("broadcast", lambda tensors, *_: tensors),
    "send": ("send", lambda tensors, *_: tensors),
}
"""Method of ProcessGroup -> its kind, and which of its arguments this rank brings."""


@contextmanager
def counting(heard: Callable[[dist.ProcessGroup, str, int], None]) -> Iterator[None]:
    """Call `heard(group, kind, bytes)` for each collective of more than one rank inside."""

    def counted(name: str, kind: str, inputs: Callable[..., Any]) -> Callable[..., Any]:
        method = getattr(dist.ProcessGroup, name)

        def call(group: dist.ProcessGroup, *arguments: Any) -> Any:
            is_mine = kind != "broadcast" or arguments[1].rootRank == group.rank()
            if group.size() > 1 and is_mine:
                heard(group, kind, sum(tensor.nbytes for tensor in inputs(*arguments)))
            return method(group, *arguments)

        return call

    before = {name: vars(dist.ProcessGroup)[name] for name in INPUTS}  # as bound to instances
    for name, (kind, inputs) in INPUTS.items():
        setattr(dist.ProcessGroup, name, counted(name, kind, inputs))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(dist.ProcessGroup, name, method)


def axis_of(group: dist.ProcessGroup, kind: str, groups: Groups) -> str:
    """Which axis a collective belongs to.

    DeepSpeed's pipeline sends through the group of all ranks, and makes its own groups for pp and data. cp's
    bytes go through our group alone: its ranks may be data's, too.
    """
    if group is dist.group.WORLD:
        return "pp" if kind == "send" else "world"
    axes = {name: getattr(groups, name) for name in ("cp", "tp", "pp", "data")}
    for name, axis in axes.items():
        if group is axis.group:
            return name
    ranks = set(dist.get_process_group_ranks(group))  # a part of tp's, where ranks share a key/value head
    return next((name for name, axis in axes.items() if name != "cp" and ranks <= set(axis.ranks)), "other")


MODEL = {"vocab_size": 96, "num_layers": 3, "d_model": 32, "num_heads": 4, "ffn_width": 80}
SEQ_LEN, MICRO_ROWS, NUM_MICRO_BATCHES = 24, 2, 2
WARM_UP_STEPS = 2
"""At ZeRO-3 DeepSpeed watches the first steps, and fetches weights by what it has seen from then on."""
ONE_NUMBER = 8
"""Bytes of a collective of one number, which the formulas leave out."""
LOSS_AND_NORM_BYTES = 16
"""Of what all ranks sum at the end of a step, which they leave out, too."""
PARALLEL_KEYS = ("zero_stage", "pp_size", "cp_size", "tp_size", "sequence_parallel", "deepspeed")


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Counted and expected bytes of one step, by axis and kind.

    Args:
        case: Keys of ParallelConfig; `model`: keys of ModelConfig; `precision`, `recompute_every`,
            `num_micro_batches`.
    """
    keys = {key: case[key] for key in PARALLEL_KEYS if key in case}
    parallel = ParallelConfig(
        **keys,
        context=ContextKind[case.get("context", "heads")],
        pp_schedule=PipelineSchedule[case.get("pp_schedule", "one_f_one_b")],
    )
    num_micro_batches = case.get("num_micro_batches", NUM_MICRO_BATCHES)
    overrides = dict(case.get("model", {}))
    overrides["family"] = Family[overrides.get("family", "llama")]
    model = ModelConfig(**{**MODEL, "num_kv_heads": 2, **overrides})
    grid = {"pp_size": parallel.pp_size, "cp_size": parallel.cp_size, "tp_size": parallel.tp_size}
    groups = build_groups(Topology.of_world(dist.get_world_size(), **grid))
    train = TrainConfig(
        total_tokens=1,
        global_batch_rows=MICRO_ROWS * num_micro_batches * groups.dp.size,
        micro_batch_rows=MICRO_ROWS,
        precision=Precision[case.get("precision", "fp32")],
        recompute_every=case.get("recompute_every", 0),
    )
    placement = place(model, parallel, groups, seq_len=SEQ_LEN)
    engine = open_engine(placement, device=device, train=train, optimizer=OptimizerConfig(peak_lr=1e-3))
    engine.load(fresh_weights(placement, seed=0))
    batches = [a_batch(model, device) for _ in range(num_micro_batches)]
    for _ in range(WARM_UP_STEPS):
        engine.train_step(batches, lr=1e-3)

    counted: dict[str, Counter[str]] = {}
    numbers = 0

    def heard(group: dist.ProcessGroup, kind: str, num_bytes: int) -> None:
        nonlocal numbers
        of_all = group is dist.group.WORLD and num_bytes <= LOSS_AND_NORM_BYTES
        if num_bytes <= ONE_NUMBER or of_all:
            numbers += 1
        else:
            counted.setdefault(axis_of(group, kind, groups), Counter())[kind] += num_bytes

    with counting(heard):
        engine.train_step(batches, lr=1e-3)
    return {
        "counted": {axis: dict(sorted(volume.items())) for axis, volume in counted.items()},
        "expected": bytes_per_step(*sizes_of(placement, train, num_micro_batches)),
        "numbers": numbers,
    }


def a_batch(model: ModelConfig, device: torch.device) -> Batch:
    tokens = torch.randint(0, model.vocab_size, (MICRO_ROWS, SEQ_LEN + 1))
    return Batch(
        tokens_BS=tokens[:, :-1].contiguous(),
        targets_BS=tokens[:, 1:].contiguous(),
        positions_BS=torch.arange(SEQ_LEN).repeat(MICRO_ROWS, 1),
        segments_BS=torch.zeros(MICRO_ROWS, SEQ_LEN, dtype=torch.int32),
        num_valid=MICRO_ROWS * SEQ_LEN,
        rows=np.arange(MICRO_ROWS),
    ).to(device)


def sizes_of(placement: Placement, train: TrainConfig, num_micro_batches: int) -> list[Sizes]:
    """What the formulas take, of each of this rank's stages."""
    model, parallel, spans, groups = placement.model, placement.parallel, placement.spans, placement.groups
    with torch.device("meta"):
        held = {name: weight.numel() for name, weight in placement.build(train).named_parameters()}
    zero = parallel.deepspeed.get("zero_optimization", {})
    threshold = zero.get("stage3_param_persistence_threshold")
    whole = Sizes(
        d_model=model.d_model,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_width=model.width_per_head,
        num_positions=model.max_positions or 0,
        has_biases=model.has_biases,
        tie_embeddings=model.tie_embeddings,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        ends_meet=spans[0].has_embedding and spans[-1].has_head,
        weights=tuple(
            tuple(numel for name, numel in held.items() if is_vector(name) is wanted)
            for wanted in (False, True)
        ),
        micro_batch_rows=train.micro_batch_rows,
        seq_len=SEQ_LEN,
        num_micro_batches=num_micro_batches,
        element_bytes=4 if train.precision is Precision.fp32 else 2,
        recompute_every=train.recompute_every,
        tp_size=groups.tp.size,
        cp_size=groups.cp.size,
        pp_size=groups.pp.size,
        dp_size=groups.dp.size,
        sequence_parallel=parallel.sequence_parallel,
        context=parallel.context,
        zero_stage=parallel.zero_stage,
    )
    if threshold is not None:
        whole = replace(whole, persistence_threshold=threshold)
    borders = {span.first for span in spans} & {span.last for span in spans}
    return [
        replace(
            whole,
            first_layer=span.first,
            num_layers=span.last - span.first,
            has_embedding=span.has_embedding,
            has_head=span.has_head,
            previous_is_here=span.first in borders,
            next_is_here=span.last in borders,
        )
        for span in spans
    ]


if __name__ == "__main__":
    rank_device = join_ranks(timeout_s=120)
    results = {name: measure(case, rank_device) for name, case in json.loads(sys.argv[1]).items()}
    print(json.dumps(results))
    dist.destroy_process_group()
