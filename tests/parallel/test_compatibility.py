"""Every rule by a layout that breaks it alone, and what is suggested instead."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from llmtrain.parallel.compatibility import (
    RULES,
    Layout,
    describe,
    explain,
    legal_layouts,
    near_world_sizes,
    nearest,
    problems,
    warnings,
)
from llmtrain.parallel.config import ContextKind, EngineKind, PipelineSchedule

ONE_RANK = Layout(
    engine=EngineKind.deepspeed,
    pp_size=1,
    dp_size=1,
    cp_size=1,
    tp_size=1,
    zero_stage=1,
    sequence_parallel=False,
    context=ContextKind.heads,
    precision="fp32",
    optimizer="adamw",
    device="cpu",
    micro_batch_rows=2,
    rows_per_step=(48,),
    num_layers=4,
    num_heads=12,
    num_kv_heads=4,
    ffn_width=96,
    vocab_size=240,
    seq_len=96,
    tie_embeddings=False,
)


def layout(**changes: Any) -> Layout:
    return replace(ONE_RANK, **changes)


ACCELERATE = {"engine": EngineKind.accelerate, "zero_stage": 2}
RING = {"context": ContextKind.sequence}
DUAL = {"pp_schedule": PipelineSchedule.dual_pipe_v}

BROKEN = {  # rule -> layouts that break it and no other, each with its message
    "pipeline_with_zero_2_or_3": [
        (
            {"pp_size": 2, "zero_stage": 2},
            "parallel.pp_size=2 with parallel.zero_stage=2: DeepSpeed's pipeline refuses ZeRO-2 and ZeRO-3; "
            "set parallel.zero_stage=1",
        ),
        (
            {"pp_size": 4, "zero_stage": 3},
            "parallel.pp_size=4 with parallel.zero_stage=3: DeepSpeed's pipeline refuses ZeRO-2 and ZeRO-3; "
            "set parallel.zero_stage=1",
        ),
    ],
    "pipeline_with_zero_0": [
        (
            {"pp_size": 2, "zero_stage": 0},
            "parallel.pp_size=2 with parallel.zero_stage=0: each pipeline stage would clip by the norm of "
            "its own gradients; set parallel.zero_stage=1",
        )
    ],
    "few_micro_batches_for_dual_pipe_v": [
        (
            {**DUAL, "pp_size": 2, "dp_size": 8},
            "parallel.pp_schedule=dual_pipe_v wants 2 * parallel.pp_size = 4 micro batches a step and rank "
            "or more, of train.micro_batch_rows=2 rows, and train.global_batch_rows=48 is 3; raise it to 64, "
            "lower train.micro_batch_rows, or set parallel.pp_schedule=one_f_one_b",
        ),
        (
            {**DUAL, "pp_size": 2, "rows_per_step": (4, 6, 48)},
            "parallel.pp_schedule=dual_pipe_v wants 2 * parallel.pp_size = 4 micro batches a step and rank "
            "or more, of train.micro_batch_rows=2 rows, and train.batch_ramp[0].rows=4 is 2, "
            "train.batch_ramp[1].rows=6 is 3; raise it to 8, lower train.micro_batch_rows, or set "
            "parallel.pp_schedule=one_f_one_b",
        ),
    ],
    "half_precision_with_zero_0": [
        (
            {"precision": "bf16", "zero_stage": 0},
            "train.precision=bf16 with parallel.zero_stage=0: DeepSpeed's bf16 optimizer at stage 0 makes an "
            "update of its own before the first, so that the optimizer's count of steps is one ahead; set "
            "parallel.zero_stage=1",
        ),
        (
            {"precision": "fp16", "zero_stage": 0, "device": None},
            "train.precision=fp16 with parallel.zero_stage=0: DeepSpeed's fp16 optimizer at stage 0 makes an "
            "update of its own before the first, so that the optimizer's count of steps is one ahead; set "
            "parallel.zero_stage=1",
        ),
    ],
    "fp16_off_cuda": [
        (
            {"precision": "fp16"},
            "train.precision=fp16 on cpu: fp16 is for CUDA devices; set train.precision=bf16 or fp32",
        )
    ],
    "muon_at_zero_3": [
        (
            {"optimizer": "muon", "zero_stage": 3},
            "optimizer.kind=muon with parallel.zero_stage=3: Muon needs whole matrices, and ZeRO-3 splits "
            "each over all ranks; set parallel.zero_stage=2 or optimizer.kind=adamw",
        )
    ],
    "selective_at_zero_3": [
        (
            {"recompute": "selective", "zero_stage": 3},
            "train.recompute=selective with parallel.zero_stage=3: weights are gathered inside what is "
            "computed again, which selective recomputation does not take; set train.recompute=full or "
            "parallel.zero_stage=2",
        )
    ],
    "accelerate_with_pipeline": [
        (
            {**ACCELERATE, "pp_size": 2},
            "parallel.pp_size=2 with parallel.engine=accelerate, which has no pipeline here; set "
            "parallel.pp_size=1 or parallel.engine=deepspeed",
        )
    ],
    "accelerate_with_tensor": [
        (
            {**ACCELERATE, "tp_size": 2},
            "parallel.tp_size=2 with parallel.engine=accelerate, which splits no matrix here; set "
            "parallel.tp_size=1 or parallel.engine=deepspeed",
        )
    ],
    "accelerate_at_zero_1": [
        (
            {**ACCELERATE, "zero_stage": 1, "optimizer": optimizer},
            "parallel.zero_stage=1 with parallel.engine=accelerate, which has DDP (0) and FSDP2 (2 and 3); "
            "set parallel.zero_stage=2, or 0 to split nothing",
        )
        for optimizer in ("adamw", "muon")
    ],
    "accelerate_with_fp16": [
        (
            {**ACCELERATE, "precision": "fp16", "device": "cuda"},
            "train.precision=fp16 with parallel.engine=accelerate: only DeepSpeed scales the loss here; set "
            "train.precision=bf16 or parallel.engine=deepspeed",
        )
    ],
    "accelerate_with_muon": [
        (
            {**ACCELERATE, "zero_stage": stage, "optimizer": "muon"},
            f"optimizer.kind=muon with parallel.engine=accelerate and parallel.zero_stage={stage}: Muon "
            "needs whole matrices, and FSDP2 splits each over all ranks; set parallel.zero_stage=0 or "
            "optimizer.kind=adamw",
        )
        for stage in (2, 3)
    ],
    "heads_over_tensor": [
        (
            {"tp_size": 8, "seq_len": 64},
            "model.num_heads=12 is not a multiple of parallel.tp_size=8: a tensor-parallel rank holds whole "
            "heads; set parallel.tp_size=6 or 12 or model.num_heads=8 or 16",
        ),
        (
            {"tp_size": 24},
            "model.num_heads=12 is not a multiple of parallel.tp_size=24: a tensor-parallel rank holds whole "
            "heads; set parallel.tp_size=12 or model.num_heads=24",
        ),
    ],
    "kv_heads_over_tensor": [
        (
            {"tp_size": 6},
            "model.num_kv_heads=4 and parallel.tp_size=6: one must be a multiple of the other, for a "
            "tensor-parallel rank holds whole key/value heads, or as many ranks share each; set "
            "parallel.tp_size=4 or 12",
        )
    ],
    "ffn_width_over_tensor": [
        (
            {"tp_size": 4, "ffn_width": 98},
            "model.ffn_width=98 is not a multiple of parallel.tp_size=4: tensor-parallel ranks hold equal "
            "numbers of columns; set model.ffn_width=96 or 100",
        )
    ],
    "vocabulary_over_tensor": [
        (
            {"tp_size": 4, "vocab_size": 32_001},
            "model.vocab_size=32001 is not a multiple of parallel.tp_size=4: tensor-parallel ranks hold "
            "equal numbers of rows of the embedding; set model.vocab_size=32004, whose last rows are padding",
        )
    ],
    "positions_over_context": [
        (
            {"cp_size": 3, "seq_len": 100},
            "data.seq_len=100 is not a multiple of parallel.cp_size=3: context-parallel ranks hold equal "
            "numbers of positions; set data.seq_len=99 or 102",
        ),
        (
            {**RING, "cp_size": 4, "seq_len": 100},
            "data.seq_len=100 is not a multiple of 2 * parallel.cp_size = 2 * 4 = 8: with "
            "parallel.context=sequence a rank holds two equal pieces, an early and a late one; set "
            "data.seq_len=96 or 104",
        ),
        (  # the rule on tensor-parallel ranks waits for this one
            {"cp_size": 3, "tp_size": 2, "seq_len": 100, "sequence_parallel": True},
            "data.seq_len=100 is not a multiple of parallel.cp_size=3: context-parallel ranks hold equal "
            "numbers of positions; set data.seq_len=99 or 102",
        ),
    ],
    "positions_over_tensor": [
        (
            {"cp_size": 3, "tp_size": 4, "seq_len": 90, "sequence_parallel": True},
            "data.seq_len / parallel.cp_size = 90 / 3 = 30 is not a multiple of parallel.tp_size=4: with "
            "parallel.sequence_parallel=true tensor-parallel ranks share positions evenly; set "
            "data.seq_len=84 or 96 or parallel.sequence_parallel=false",
        ),
        (
            {**RING, "cp_size": 3, "tp_size": 4, "seq_len": 90, "sequence_parallel": True},
            "data.seq_len / parallel.cp_size = 90 / 3 = 30 is not a multiple of parallel.tp_size=4: with "
            "parallel.sequence_parallel=true tensor-parallel ranks share positions evenly; set "
            "data.seq_len=84 or 96 or parallel.sequence_parallel=false",
        ),
    ],
    "heads_over_context": [
        (
            {"cp_size": 4, "tp_size": 2},
            "model.num_heads / parallel.tp_size = 12 / 2 = 6 is not a multiple of parallel.cp_size=4: with "
            "parallel.context=heads a context-parallel rank attends for whole heads; set parallel.cp_size=3 "
            "or 6 or parallel.context=sequence",
        )
    ],
    "layers_over_pipeline": [
        (
            {"pp_size": 6},
            "parallel.pp_size=6 is more than model.num_layers=4: a pipeline stage holds at least one block; "
            "set parallel.pp_size=4 or less",
        ),
        (
            {**DUAL, "pp_size": 3},
            "2 * parallel.pp_size=3 = 6 (pp_schedule=dual_pipe_v) is more than model.num_layers=4: a "
            "pipeline stage holds at least one block; set parallel.pp_size=2 or less",
        ),
    ],
    "rows_over_data": [
        (
            {"dp_size": 5},
            "train.global_batch_rows=48: not a multiple of train.micro_batch_rows * dp = 2 * 5 = 10, and "
            "every micro batch must be full; set train.global_batch_rows=40 or 50, or launch ranks for dp=4 "
            "or 6",
        ),
        (
            {"dp_size": 16},
            "train.global_batch_rows=48: not a multiple of train.micro_batch_rows * dp = 2 * 16 = 32, and "
            "every micro batch must be full; set train.micro_batch_rows=1 or 3",
        ),
        (
            {"dp_size": 4, "rows_per_step": (12, 24, 52)},
            "train.batch_ramp[0].rows=12, train.global_batch_rows=52: not a multiple of "
            "train.micro_batch_rows * dp = 2 * 4 = 8, and every micro batch must be full; set "
            "train.micro_batch_rows=1",
        ),
        (
            {"dp_size": 4, "rows_per_step": (6, 16)},
            "train.batch_ramp[0].rows=6: not a multiple of train.micro_batch_rows * dp = 2 * 4 = 8, and "
            "every micro batch must be full; set train.batch_ramp[0].rows=8, or launch ranks for dp=1",
        ),
        (
            {"dp_size": 3, "micro_batch_rows": 7, "rows_per_step": (32,)},
            "train.global_batch_rows=32: not a multiple of train.micro_batch_rows * dp = 7 * 3 = 21, and "
            "every micro batch must be full; set train.global_batch_rows=21 or 42",
        ),
    ],
}

LEGAL = [
    {},
    {"zero_stage": 0},
    {"zero_stage": 3, "tp_size": 4, "dp_size": 2, "sequence_parallel": True},
    {"pp_size": 4, "tp_size": 2, "cp_size": 3, "dp_size": 2, "sequence_parallel": True},
    {"pp_size": 2, "optimizer": "muon"},
    {**DUAL, "pp_size": 2, "rows_per_step": (8, 48)},
    {**DUAL, "rows_per_step": (2,), "num_layers": 1},  # no pipeline
    {"pp_size": 2, "precision": "bf16", "tie_embeddings": True},
    {"optimizer": "muon", "zero_stage": 2, "tp_size": 4},
    {"optimizer": "muon", "zero_stage": 0},
    {"tp_size": 12},  # three ranks share each key/value head
    {"cp_size": 12},
    {**RING, "cp_size": 16},
    {**RING, "cp_size": 1, "seq_len": 97},  # no ring
    {"vocab_size": 241, "ffn_width": 97, "seq_len": 97},  # nothing is split
    {"precision": "fp16", "device": "cuda"},
    {"precision": "fp16", "device": None},
    {"rows_per_step": (8, 16, 24), "dp_size": 4},
    {"engine": EngineKind.accelerate, "zero_stage": 0, "precision": "bf16", "optimizer": "muon"},
    {**ACCELERATE, "cp_size": 2, "dp_size": 2, "precision": "bf16"},
    {**ACCELERATE, **RING, "zero_stage": 3, "cp_size": 2},
]


def test_rules_have_names_reasons_and_layouts_that_break_them() -> None:
    assert [rule.name for rule in RULES] == list(BROKEN), "every rule has a layout that breaks it"
    assert all(rule.reason.endswith(".") for rule in RULES)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [(name, changes, message) for name, cases in BROKEN.items() for changes, message in cases],
)
def test_a_rule_is_broken_alone_and_says_so(name: str, changes: dict[str, Any], message: str) -> None:
    broken = {rule.name: rule.broken(layout(**changes)) for rule in RULES}
    assert {rule: told for rule, told in broken.items() if told} == {name: message}
    assert problems(layout(**changes)) == [message]


@pytest.mark.parametrize("changes", LEGAL)
def test_a_legal_layout_has_no_problem(changes: dict[str, Any]) -> None:
    asked = layout(**changes)
    assert problems(asked) == []
    assert nearest(asked, asked.world_size, most=1) == [asked]
    assert explain(replace(asked, dp_size=7), asked.world_size) == [], "dp follows from the other axes"


def test_all_problems_are_told_at_once() -> None:
    found = problems(layout(pp_size=6, zero_stage=3, tp_size=5, optimizer="muon"))
    assert [message.split()[0] for message in found] == [
        "parallel.pp_size=6",
        "optimizer.kind=muon",
        "model.num_heads=12",
        "model.num_kv_heads=4",
        "model.ffn_width=96",
        "parallel.pp_size=6",
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"sequence_parallel": True},
            ["parallel.sequence_parallel=true has no effect at parallel.tp_size=1"],
        ),
        (RING, ["parallel.context=sequence has no effect at parallel.cp_size=1"]),
        (DUAL, ["parallel.pp_schedule=dual_pipe_v has no effect at parallel.pp_size=1"]),
        ({"sequence_parallel": True, "tp_size": 2, **RING, "cp_size": 2}, []),
        ({"pp_size": 4, "dp_size": 6}, []),  # 4 micro batches
        (
            {"pp_size": 4, "dp_size": 4, "rows_per_step": (8, 16, 48)},
            [
                "with train.batch_ramp[0].rows=8 a step has fewer micro batches (1) than "
                "parallel.pp_size=4 pipeline stages, which then wait 75% of the time, (pp - 1) / (micro "
                "batches + pp - 1); lower train.micro_batch_rows or parallel.pp_size",
                "with train.batch_ramp[1].rows=16 a step has fewer micro batches (2) than "
                "parallel.pp_size=4 pipeline stages, which then wait 60% of the time, (pp - 1) / (micro "
                "batches + pp - 1); lower train.micro_batch_rows or parallel.pp_size",
            ],
        ),
    ],
)
def test_what_is_legal_but_useless_or_slow_is_warned_of(changes: dict[str, Any], told: list[str]) -> None:
    assert problems(layout(**changes)) == []
    assert warnings(layout(**changes)) == told


ASKED = [
    layout(),
    layout(**RING, sequence_parallel=True, num_layers=2),
    layout(optimizer="muon", num_heads=6, num_kv_heads=6),
    layout(precision="bf16", rows_per_step=(8, 48), vocab_size=250),
    layout(engine=EngineKind.accelerate, zero_stage=0, seq_len=98),
    layout(**DUAL, rows_per_step=(16, 48)),
]


@pytest.mark.parametrize("asked", ASKED)
def test_legal_layouts_are_those_that_trying_every_grid_finds(asked: Layout) -> None:
    for world_size in range(1, 9):
        grids = itertools.product(range(1, world_size + 1), repeat=4)
        expected = {
            one
            for pp, dp, cp, tp in grids
            if pp * dp * cp * tp == world_size
            for stage in range(4)
            if not problems(
                one := replace(asked, pp_size=pp, dp_size=dp, cp_size=cp, tp_size=tp, zero_stage=stage)
            )
        }
        found = list(legal_layouts(asked, world_size))
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize(
    "changes", [changes for cases in BROKEN.values() for changes, _ in cases], ids=lambda case: str(case)[:60]
)
def test_the_nearest_layouts_are_legal_and_keep_the_ranks(changes: dict[str, Any]) -> None:
    asked = layout(**changes)
    found = nearest(asked, asked.world_size)
    assert len(found) <= 3
    for other in found:
        assert problems(other) == []
        assert other.world_size == asked.world_size
        axes = {"pp_size", "dp_size", "cp_size", "tp_size", "zero_stage"}
        assert replace(other, **{axis: getattr(asked, axis) for axis in axes}) == asked, "only axes change"


def test_few_changed_settings_come_before_small_changes() -> None:
    asked = layout(pp_size=2, zero_stage=3, dp_size=2, tp_size=2)
    assert [describe(other) for other in nearest(asked, 8)] == [
        "parallel.pp_size=2 parallel.tp_size=2 parallel.zero_stage=1 (dp 2)",  # one setting, no size
        "parallel.tp_size=2 parallel.zero_stage=3 (dp 4)",  # one setting, a factor of 2, and dp by it
        "parallel.tp_size=4 parallel.zero_stage=3 (dp 2)",  # two settings, and the ZeRO stage kept
    ]


def test_a_description_names_what_goes_back_to_one() -> None:
    asked, other = layout(pp_size=2, tp_size=2), layout(tp_size=4)
    assert describe(other) == "parallel.tp_size=4 parallel.zero_stage=1 (dp 1)"
    assert (
        describe(other, instead_of=asked)
        == "parallel.pp_size=1 parallel.tp_size=4 parallel.zero_stage=1 (dp 1)"
    )


def test_an_explanation_ends_with_what_works() -> None:
    *found, last = explain(layout(tp_size=8, seq_len=64), 8)
    assert found == [BROKEN["heads_over_tensor"][0][1]]
    assert last == (
        "nearest layouts of 8 ranks that work: parallel.tp_size=4 parallel.zero_stage=1 (dp 2); "
        "parallel.tp_size=2 parallel.zero_stage=1 (dp 4); parallel.tp_size=1 parallel.zero_stage=1 (dp 8)"
    )


def test_ranks_that_the_axes_do_not_divide_are_explained() -> None:
    assert explain(layout(pp_size=2, tp_size=2), 6) == [
        "world_size=6 is not a multiple of parallel.pp_size * cp_size * tp_size = 2 * 1 * 2 = 4; launch 4 or "
        "8 ranks, or lower one of them",
        "nearest layouts of 6 ranks that work: parallel.pp_size=3 parallel.tp_size=2 parallel.zero_stage=1 "
        "(dp 1); parallel.pp_size=1 parallel.tp_size=2 parallel.zero_stage=1 (dp 3); parallel.pp_size=2 "
        "parallel.tp_size=1 parallel.zero_stage=1 (dp 3)",
    ]
    odd = layout(pp_size=2, micro_batch_rows=5)  # 48 rows are no number of whole micro batches
    assert explain(odd, 3) == [
        "world_size=3 is not a multiple of parallel.pp_size * cp_size * tp_size = 2 * 1 * 1 = 2; lower one "
        "of them",
        "no layout of 3 ranks works with the other settings as they are; change them first",
    ]


def test_where_no_layout_works_it_is_said() -> None:
    assert explain(layout(precision="fp16"), 4) == [
        BROKEN["fp16_off_cuda"][0][1],
        "no layout of 4 ranks works with the other settings as they are; change them first",
    ]


def test_without_a_number_of_ranks_all_but_batches_is_checked() -> None:
    assert explain(layout(rows_per_step=(7,)), None) == []
    assert explain(layout(pp_size=6), None) == [BROKEN["layers_over_pipeline"][0][1]]


@pytest.mark.parametrize(
    ("world_size", "changes", "near"),
    [
        (6, {"tp_size": 4}, [4, 8]),
        (3, {"tp_size": 4}, [4]),  # too few
        (5, {}, [4, 6]),
        (10, {"tp_size": 2}, [8, 12]),  # dp=5 does not divide 24 micro batches
        (100, {}, [24]),
        (100, {"rows_per_step": ()}, [99, 101]),
        (5, {"rows_per_step": (20, 48)}, [2]),
    ],
)
def test_near_numbers_of_ranks_divide_every_batch(
    world_size: int, changes: dict[str, Any], near: list[int]
) -> None:
    assert near_world_sizes(layout(**changes), world_size) == near
