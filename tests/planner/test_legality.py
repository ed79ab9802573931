"""Masks over many layouts against the rules that look at one; what is enumerated against what was
published."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from llmtrain.errors import ConfigError
from llmtrain.parallel.compatibility import RULES, Layout
from llmtrain.parallel.config import ContextKind, EngineKind, PipelineSchedule
from llmtrain.planner.cost.candidates import FULL, NO_RECOMPUTE, SELECTIVE
from llmtrain.planner.cost.legality import (
    ENGINES,
    MASKS,
    Grid,
    Limits,
    Workload,
    broken_by_llmtrain,
    divisors,
    enumerate_layouts,
    find_engine,
    grid,
    legal,
)
from llmtrain.planner.cost.schedule import DUAL_PIPE_V, INTERLEAVED, ONE_F_ONE_B

SHARED = Path(__file__).parents[3] / "shared" / "planner_data"

RECOMPUTES = {NO_RECOMPUTE: "none", SELECTIVE: "selective", FULL: "full"}
SCHEDULES = {ONE_F_ONE_B: PipelineSchedule.one_f_one_b, DUAL_PIPE_V: PipelineSchedule.dual_pipe_v}
CONTEXTS = (ContextKind.heads, ContextKind.sequence)

LLAMA = Workload(
    num_layers=5,
    num_heads=12,
    num_kv_heads=4,
    ffn_width=96,
    vocab_size=240,
    seq_len=96,
    global_batch_rows=48,
)
GPT2 = replace(LLAMA, num_layers=12, num_heads=8, num_kv_heads=8, ffn_width=64, vocab_size=50257, seq_len=64)
MULTI_QUERY = replace(LLAMA, num_layers=3, num_heads=16, num_kv_heads=1, ffn_width=88, global_batch_rows=40)
ODD = replace(LLAMA, num_heads=6, num_kv_heads=3, seq_len=90, vocab_size=256, global_batch_rows=36)


def one_by_one(g: Grid, w: Workload) -> list[Layout]:
    columns = {each.name: getattr(g, each.name).tolist() for each in fields(Grid)}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [
        Layout(
            engine=w.engine,
            pp_size=row["pp"],
            dp_size=row["dp"],
            cp_size=row["cp"],
            tp_size=row["tp"],
            zero_stage=row["zero_stage"],
            sequence_parallel=bool(row["sequence_parallel"]),
            context=CONTEXTS[row["context"]],
            precision=w.precision,
            optimizer=w.optimizer,
            device=w.device,
            micro_batch_rows=row["micro_batch"],
            rows_per_step=(w.global_batch_rows,),
            num_layers=w.num_layers,
            num_heads=w.num_heads,
            num_kv_heads=w.num_kv_heads,
            ffn_width=w.ffn_width,
            vocab_size=w.vocab_size,
            seq_len=w.seq_len,
            tie_embeddings=False,
            recompute=RECOMPUTES[row["recompute"]],
            pp_schedule=SCHEDULES[row["schedule"]],
        )
        for row in rows
    ]


def everything(world_size: int) -> Grid:
    """All settings of all axes whose product is the world, legal or not."""
    axes = [
        (pp, dp, cp, world_size // (pp * dp * cp))
        for pp, dp, cp in itertools.product(divisors(world_size), repeat=3)
        if world_size % (pp * dp * cp) == 0
    ]
    settings = itertools.product(axes, (1, 2, 3), range(4), RECOMPUTES, (0, 1), SCHEDULES, (0, 1))
    table = np.array([(*each[0], *each[1:]) for each in settings])
    names = (
        "pp",
        "dp",
        "cp",
        "tp",
        "micro_batch",
        "zero_stage",
        "recompute",
        "sequence_parallel",
        "schedule",
    )
    return grid(**dict(zip((*names, "context"), table.T, strict=True)))


def test_every_rule_has_a_mask() -> None:
    assert MASKS.keys() == {rule.name for rule in RULES}


@pytest.mark.parametrize(
    ("workload", "worlds"),
    [
        (LLAMA, range(1, 17)),
        (replace(GPT2, precision="fp32"), range(1, 17)),
        (replace(MULTI_QUERY, precision="fp16", optimizer="muon"), (1, 4, 6, 16)),
        (replace(ODD, precision="fp16", device="cpu"), (3, 6, 9)),
        (replace(LLAMA, engine=EngineKind.accelerate, optimizer="muon"), (1, 2, 4, 12)),
        (replace(LLAMA, engine=EngineKind.accelerate, precision="fp16", device=None), (1, 6)),
    ],
    ids=[
        "llama",
        "gpt2",
        "multi_query_muon_fp16",
        "odd_sizes_fp16_cpu",
        "accelerate_muon",
        "accelerate_fp16",
    ],
)
def test_masks_agree_with_the_rules_on_every_layout(
    workload: Workload, worlds: range | tuple[int, ...]
) -> None:
    seen: Counter[str] = Counter()
    for world_size in worlds:
        g = everything(world_size)
        broken = broken_by_llmtrain(g, workload)
        layouts = one_by_one(g, workload)
        is_broken = np.zeros(len(g), dtype=bool)
        for rule in RULES:
            verdicts = [rule.broken(layout) is not None for layout in layouts]
            mask = broken.get(rule.name, np.zeros(len(g), dtype=bool))
            assert mask.tolist() == verdicts, (rule.name, world_size)
            is_broken |= verdicts
            seen[rule.name] += sum(verdicts)
        assert np.array_equal(legal(ENGINES["llmtrain"], g, workload), ~is_broken)
    assert sum(count > 0 for count in seen.values()) >= 5, (
        "the layouts must break rules for this to say anything"
    )


@pytest.mark.parametrize("workload", [LLAMA, replace(GPT2, precision="fp32"), ODD])
@pytest.mark.parametrize("world_size", [1, 4, 6, 12, 16])
def test_what_is_enumerated_is_what_is_legal_and_has_an_effect(workload: Workload, world_size: int) -> None:
    g = enumerate_layouts(
        ENGINES["llmtrain"], workload, world_size=world_size, limits=Limits(max_micro_batch_rows=3)
    )

    def key(each: Layout) -> tuple[object, ...]:
        return (
            each.pp_size, each.dp_size, each.cp_size, each.tp_size, each.zero_stage, each.micro_batch_rows,
            each.recompute, each.sequence_parallel, each.pp_schedule,
        )  # fmt: skip

    wanted = {
        key(each)
        for each in one_by_one(everything(world_size), workload)
        if not any(rule.broken(each) for rule in RULES)
        and (each.tp_size > 1 or not each.sequence_parallel)
        and (each.pp_size > 1 or each.pp_schedule is PipelineSchedule.one_f_one_b)
    }
    found = [key(each) for each in one_by_one(g, workload)]
    assert len(found) == len(set(found))
    assert set(found) == wanted


@pytest.mark.parametrize("program", ["llmtrain", "megatron", "torchtitan"])
@pytest.mark.parametrize(("rows", "most"), [(224, 64), (1, 64), (360, 7), (97, 100), (30030, 64)])
def test_every_number_of_rows_that_divides_is_a_micro_batch(program: str, rows: int, most: int) -> None:
    workload = replace(GPT2, global_batch_rows=rows, vocab_size=256)
    limits = Limits(max_micro_batch_rows=most)
    for world_size in (1, 2, 8, 14):
        g = enumerate_layouts(ENGINES[program], workload, world_size=world_size, limits=limits)
        found = set(zip(g.dp.tolist(), g.pp.tolist(), g.micro_batch.tolist(), strict=True))
        wanted = set()
        for dp, pp in {(dp, pp) for dp, pp, _ in found}:
            micro_batch = 1
            while micro_batch <= min(most, rows):
                if rows % (dp * micro_batch) == 0:
                    wanted.add((dp, pp, micro_batch))
                micro_batch += 1
        assert found == wanted
    g = enumerate_layouts(ENGINES[program], workload, world_size=2 if rows % 2 == 0 else 1, limits=limits)
    assert len(g)


def test_megatrons_experts_train_with_tp_only_where_it_is_sequence_parallel() -> None:
    g = enumerate_layouts(ENGINES["megatron"], replace(DEEPSEEK_V3, global_batch_rows=64), world_size=64)
    assert np.array_equal(g.tp > 1, g.sequence_parallel > 0)
    assert set(g.tp) == {1, 2, 4, 8, 16, 32, 64}
    dense = enumerate_layouts(ENGINES["megatron"], replace(GPT2, vocab_size=256), world_size=4)
    assert np.any((dense.tp > 1) & (dense.sequence_parallel == 0))


def is_in(g: Grid, **wanted: int) -> bool:
    found = np.ones(len(g), dtype=bool)
    for name, value in wanted.items():
        found &= getattr(g, name) == value
    return bool(found.any())


LLAMA_405B = Workload(
    num_layers=126,
    num_heads=128,
    num_kv_heads=8,
    ffn_width=53248,
    vocab_size=128256,
    seq_len=8192,
    global_batch_rows=2048,
)
LLAMA_8B = replace(LLAMA_405B, num_layers=32, num_heads=32, ffn_width=14336)
DEEPSEEK_V3 = Workload(
    num_layers=61,
    num_heads=128,
    num_kv_heads=128,
    ffn_width=18432,
    vocab_size=129280,
    seq_len=4096,
    global_batch_rows=15360,
    num_experts=256,
    expert_width=2048,
    shared_width=2048,
    is_latent=True,
)


@pytest.mark.parametrize(
    ("program", "workload", "world_size", "wanted"),
    [  # Llama 3 (arXiv:2407.21783, table 4), all three rows; DeepSeek-V3 (arXiv:2412.19437, section 3.2)
        ("megatron", LLAMA_405B, 8192, {"tp": 8, "cp": 1, "pp": 16, "dp": 64}),
        ("megatron", LLAMA_405B, 16384, {"tp": 8, "cp": 1, "pp": 16, "dp": 128}),
        (
            "megatron",
            replace(LLAMA_405B, seq_len=131072, global_batch_rows=128),
            16384,
            {"tp": 8, "cp": 16, "pp": 16, "dp": 8},
        ),
        ("megatron", DEEPSEEK_V3, 2048, {"tp": 1, "cp": 1, "pp": 16, "dp": 128, "ep": 64, "zero_stage": 1}),
        # Megatron-Bridge@067f987 docs/performance-summary-archive.md: interleaved
        (
            "megatron",
            replace(LLAMA_405B, global_batch_rows=512),
            1024,
            {"tp": 8, "cp": 2, "pp": 8, "dp": 8, "vpp": 8, "schedule": INTERLEAVED, "micro_batch": 1},
        ),
        # torchtitan@b5bcd76 benchmarks/llama3_h100_202412_torchtitan.md, table 2
        (
            "torchtitan",
            replace(LLAMA_8B, seq_len=131072, global_batch_rows=2),
            8,
            {"tp": 1, "cp": 4, "pp": 1, "dp": 2, "recompute": FULL, "zero_stage": 3},
        ),
        ("llmtrain", LLAMA_405B, 8192, {"tp": 8, "cp": 1, "pp": 16, "dp": 64, "schedule": DUAL_PIPE_V}),
    ],
)  # fmt: skip
def test_published_layouts_are_enumerated(
    program: str, workload: Workload, world_size: int, wanted: dict[str, int]
) -> None:
    g = enumerate_layouts(ENGINES[program], workload, world_size=world_size)
    assert is_in(g, **wanted)


@pytest.mark.parametrize("program", ["megatron", "megatron_deepspeed"])
@pytest.mark.parametrize("name", ["multi", "single"])
def test_all_layouts_of_vtrains_tables_are_enumerated(name: str, program: str) -> None:
    path = SHARED / "vtrain" / f"ground_truth_{name}.csv"
    if not path.exists():
        pytest.skip(f"no {path.name} beside this checkout")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{k: int(v) for k, v in row.items() if k in WANTED} for row in csv.DictReader(file)]
    assert len(rows) > 50
    known: dict[tuple[int, ...], Grid] = {}
    for row in rows:
        key = (row["gpus"], row["global_batch"], row["n_heads"], row["layers"], row["seq_len"])
        if key not in known:
            workload = replace(
                GPT2,
                num_layers=row["layers"],
                num_heads=row["n_heads"],
                num_kv_heads=row["n_heads"],
                ffn_width=4 * row["hidden"],
                seq_len=row["seq_len"],
                global_batch_rows=row["global_batch"],
            )
            known[key] = enumerate_layouts(ENGINES[program], workload, world_size=row["gpus"])
        settings = {axis: row[axis] for axis in ("tp", "dp", "pp")}
        assert is_in(known[key], **settings, micro_batch=row["micro_batch"], recompute=FULL), row


def test_published_layouts_of_megatron_bridge_are_enumerated() -> None:
    path = SHARED / "perf_megatron_bridge.csv"
    if not path.exists():
        pytest.skip(f"no {path.name} beside this checkout")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seen = 0
    for row, which in itertools.product(rows, (0, 1)):  # "4 (8)": with fp8, with bf16
        names = ("gpus", "gbs", "mbs", "seq_len", "fsdp", "tp", "pp", "cp", "vp", "ep")
        if row["model"].split()[0] not in BRIDGE_MODELS or not all(row[name] for name in names):
            continue
        cells = {
            name: row[name].replace("n/a", "1").replace("(", "").replace(")", "").split() for name in names
        }
        at = {name: int(each[min(which, len(each) - 1)]) for name, each in cells.items()}
        if at["fsdp"] > 1:  # Megatron's FSDP is another program
            continue
        workload = replace(
            BRIDGE_MODELS[row["model"].split()[0]], seq_len=at["seq_len"], global_batch_rows=at["gbs"]
        )
        dp = at["gpus"] // (at["tp"] * at["pp"] * at["cp"])
        if (
            at["ep"] > dp * at["cp"]
        ):  # experts over tensor-parallel ranks too, as "expert tensor parallel 1" does
            continue
        g = enumerate_layouts(ENGINES["megatron"], workload, world_size=at["gpus"])
        axes = {name: at[name] for name in ("tp", "pp", "cp", "ep")}
        schedule = INTERLEAVED if at["vp"] > 1 else ONE_F_ONE_B
        assert is_in(g, **axes, dp=dp, vpp=at["vp"], micro_batch=at["mbs"], schedule=schedule), (row, which)
        seen += 1
    assert seen > 15


BRIDGE_MODELS = {
    "LLAMA3_8B": LLAMA_8B,
    "LLAMA3_70B": replace(LLAMA_8B, num_layers=80, num_heads=64, ffn_width=28672),
    "LLAMA3.1_405B": LLAMA_405B,
    "DeepSeekV3": DEEPSEEK_V3,
    "Qwen3_30B_a3B": replace(
        LLAMA_8B, num_layers=48, num_heads=32, num_kv_heads=4, num_experts=128, expert_width=768, ffn_width=0
    ),
    "Qwen3_235B_a22B": replace(
        LLAMA_8B, num_layers=94, num_heads=64, num_kv_heads=4, num_experts=128, expert_width=1536, ffn_width=0
    ),
}
WANTED = ("gpus", "global_batch", "micro_batch", "hidden", "n_heads", "layers", "seq_len", "tp", "dp", "pp")


def test_limits_leave_out_what_they_name() -> None:
    limits = Limits(max_tp=2, max_pp=1, max_micro_batch_rows=2, zero_stages=(1,), recomputes=(FULL,))
    g = enumerate_layouts(ENGINES["llmtrain"], LLAMA, world_size=4, limits=limits)
    assert len(g)
    assert g.tp.max() == 2
    assert g.pp.max() == 1
    assert g.micro_batch.max() == 2
    assert set(g.zero_stage) == {1}
    assert set(g.recompute) == {FULL}
    only_dual = Limits(schedules=(DUAL_PIPE_V,))
    g = enumerate_layouts(ENGINES["llmtrain"], GPT2, world_size=4, limits=only_dual)
    assert set(g.schedule[g.pp > 1]) == {DUAL_PIPE_V}
    with pytest.raises(ConfigError, match="max_tp=0 must be at least 1"):
        Limits(max_tp=0)


def test_a_program_without_experts_refuses_them() -> None:
    with pytest.raises(
        ConfigError,
        match=r"llmtrain trains no model with experts; set plan\.program=megatron or plan\.program=",
    ):
        enumerate_layouts(ENGINES["llmtrain"], DEEPSEEK_V3, world_size=64)
    with pytest.raises(ConfigError, match="llm_foundry trains no model with latent attention"):
        enumerate_layouts(ENGINES["llm_foundry"], replace(LLAMA, is_latent=True), world_size=4)


def test_an_unknown_program_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown training program 'megatorn'; did you mean 'megatron'"):
        find_engine("megatorn")


def test_sequence_parallel_ranks_share_positions_evenly_in_every_program() -> None:
    for name, engine in ENGINES.items():
        g = enumerate_layouts(engine, replace(LLAMA, seq_len=88), world_size=12)
        shared = g.rows(g.sequence_parallel > 0)
        assert not np.any(88 % (shared.cp * shared.tp)), name
