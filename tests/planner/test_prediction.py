"""The stable entry point: what it takes, what it answers, what it refuses, what its import costs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from llmtrain import planner
from llmtrain.errors import ConfigError
from llmtrain.model.config import ModelConfig
from llmtrain.planner import Prediction, predict, predict_many
from llmtrain.planner.cost.architecture import find_model, flops_per_token, from_model_config
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.cost.costs import WIDER_PER_DECADE, find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.legality import ENGINES
from llmtrain.planner.cost.programs import GUESS_HIGH, GUESS_LOW, PROGRAMS, Calibrated
from llmtrain.planner.cost.step_time import Constants
from llmtrain.planner.interval import Interval
from llmtrain.planner.prediction import UNTOLD, choose_program

LAYOUT = Layout(seq_len=4096, dp=8, tp=4, micro_batch_rows=1, grad_accum=16, sequence_parallel=True)
CLUSTER = find_cluster("h100_sxm_8x", num_nodes=4)


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return predict("llama3_8b", LAYOUT, CLUSTER, program="megatron")


def is_ordered(interval: Interval) -> bool:
    return 0 < interval.low <= interval.mid <= interval.high


def test_numbers_of_a_prediction_agree_with_each_other(prediction: Prediction) -> None:
    step = prediction.step_s
    assert is_ordered(step)
    assert step.low < step.high
    assert sum(prediction.time.values()) == pytest.approx(step.mid)
    tokens = 8 * 16 * 4096
    assert prediction.tokens_per_s.mid == pytest.approx(tokens / step.mid)
    assert prediction.tokens_per_s.low == pytest.approx(tokens / step.high)
    assert prediction.tokens_per_s.high == pytest.approx(tokens / step.low)
    peak = prediction.peak_bytes
    assert is_ordered(peak)
    assert sum(prediction.memory.values()) <= peak.mid
    assert sum(prediction.memory.values()) == pytest.approx(max(prediction.instants.values()))
    assert max(prediction.instants, key=lambda name: prediction.instants[name]) == prediction.fullest_instant
    assert prediction.fits is (peak.high <= CLUSTER.gpu.mem_bytes)


def test_utilization_is_flops_over_what_the_gpus_could_do(prediction: Prediction) -> None:
    arch = find_model("llama3_8b")
    for convention in ("palm", "causal", "fused"):
        useful = flops_per_token(arch, 4096, convention) * 8 * 16 * 4096
        wanted = useful / (prediction.step_s.mid * 32 * CLUSTER.gpu.peak("bf16"))
        assert prediction.mfu[convention].mid == pytest.approx(wanted)
        assert is_ordered(prediction.mfu[convention])
    assert prediction.mfu["causal"].mid < prediction.mfu["palm"].mid < prediction.mfu["fused"].mid < 1


def test_names_mappings_and_configurations_mean_the_same(prediction: Prediction) -> None:
    settings = {
        "seq_len": 4096,
        "dp": 8,
        "tp": 4,
        "grad_accum": 16,
        "sequence_parallel": True,
    }
    assert predict("llama3_8b", settings, "h100_sxm_8x", program="megatron") == prediction
    assert predict(find_model("llama3_8b"), LAYOUT, CLUSTER, program="megatron") == prediction
    cfg = ModelConfig(
        vocab_size=32000, num_layers=4, d_model=512, num_heads=8, num_kv_heads=8, ffn_width=1408
    )
    small = {"seq_len": 1024, "dp": 8}
    assert predict(cfg, small, "h100_sxm_8x") == predict(from_model_config(cfg), small, "h100_sxm_8x")


def test_many_are_predicted_as_each_alone_and_in_order() -> None:
    asked = [
        ("llama3_8b", {"seq_len": 8192, "dp": 8, "zero_stage": 3, "recompute": "full"}, "h100_sxm_8x"),
        ("gpt3_6_7b", {"seq_len": 2048, "dp": 8, "tp": 8, "grad_accum": 4}, "a100_sxm_80gb_8x"),
        ("llama3_8b", {"seq_len": 8192, "dp": 8, "zero_stage": 3, "compiled": True}, "h100_sxm_8x"),
        ("mixtral_8x7b", {"seq_len": 4096, "dp": 8, "ep": 8, "tp": 2, "grad_accum": 8}, "h100_sxm_8x"),
        ("llama3_70b", {"seq_len": 8192, "pp": 4, "tp": 8, "dp": 2, "grad_accum": 16}, "h100_sxm_8x"),
        ("llama3_8b", {"seq_len": 4096, "dp": 64, "zero_stage": 3, "precision": "fp8"}, "h100_sxm_8x"),
    ]
    together = predict_many(asked)  # type: ignore[arg-type]
    assert len({each.step_s.mid for each in together}) == len(asked)
    for question, found in zip(asked, together, strict=True):
        alone = predict(*question)  # type: ignore[arg-type]
        # rel: columns of another length are summed in another order
        assert found.step_s.mid == pytest.approx(alone.step_s.mid, rel=1e-12)
        assert found.peak_bytes.high == pytest.approx(alone.peak_bytes.high, rel=1e-12)
        assert (found.program, found.program_reason, found.source) == (
            alone.program,
            alone.program_reason,
            alone.source,
        )
    assert predict_many([]) == []


def test_more_work_takes_longer_and_more_memory() -> None:
    def of(**settings: object) -> Prediction:
        return predict("llama3_8b", {"seq_len": 4096, "dp": 8, "tp": 2, **settings}, "h100_sxm_8x")  # type: ignore[dict-item]

    plain = of(grad_accum=4)
    assert of(grad_accum=8).step_s.mid > 1.7 * plain.step_s.mid
    assert of(grad_accum=4, micro_batch_rows=2).peak_bytes.mid > plain.peak_bytes.mid
    full = of(grad_accum=4, recompute="full")
    assert full.step_s.mid > plain.step_s.mid
    assert full.peak_bytes.mid < plain.peak_bytes.mid
    assert full.time["recompute"] > 0 == plain.time["recompute"]


@pytest.mark.parametrize(
    ("model", "settings", "cluster", "program"),
    [
        ("llama3_8b", {"dp": 8, "zero_stage": 3}, "h100_sxm_8x", "llm_foundry"),
        ("llama3_8b", {"dp": 8, "zero_stage": 3, "compiled": True}, "h100_sxm_8x", "torchtitan"),
        ("llama2_7b", {"dp": 8, "zero_stage": 3}, "a100_sxm_40gb_8x", "llm_foundry"),
        ("llama3_8b", {"dp": 4, "tp": 2, "zero_stage": 3}, "a100_sxm_80gb_8x", "torchtitan"),
        ("mixtral_8x7b", {"dp": 8, "zero_stage": 3}, "h100_sxm_8x", "torchtitan"),
        ("gpt3_6_7b", {"dp": 4, "tp": 2}, "a100_sxm_80gb_8x", "megatron_deepspeed"),
        ("gpt3_6_7b", {"dp": 4, "pp": 2}, "v100_sxm_8x", "megatron_deepspeed"),
        ("gpt3_125m", {"dp": 8}, "a100_sxm_80gb_8x", "llm_foundry"),
        ("gpt3_125m", {"dp": 8, "recompute": "full"}, "a100_sxm_80gb_8x", "megatron_deepspeed"),
        ("llama3_8b", {"dp": 4, "cp": 2}, "a100_sxm_80gb_8x", "megatron"),
        ("llama3_8b", {"dp": 4, "tp": 2}, "h100_sxm_8x", "megatron"),
    ],
)
def test_the_program_is_chosen_by_sharding_and_gpu_and_said(
    model: str, settings: dict[str, int | str], cluster: str, program: str
) -> None:
    found = predict(model, {"seq_len": 2048, **settings}, cluster)
    assert found.program == program
    assert found.program_reason != "given"
    assert predict(model, {"seq_len": 2048, **settings}, cluster, program=program).program_reason == "given"


def test_a_small_model_on_a100_has_an_interval_from_fused_kernels_to_the_megatron_of_2021() -> None:
    settings = {"seq_len": 1024, "dp": 8, "micro_batch_rows": 64}
    found = predict("gpt2_124m", settings, "a100_sxm_80gb_8x")
    old = predict("gpt2_124m", settings, "a100_sxm_80gb_8x", program="megatron_deepspeed")
    assert (found.program, found.legal) == ("llm_foundry", True)
    assert "2.5 times apart" in found.program_reason
    assert found.step_s.mid < old.step_s.mid < found.step_s.high
    assert found.step_s.low < 0.28  # UNTOLD_ALONE: hand-written kernels


def test_a_program_that_nobody_said_has_a_wider_interval() -> None:
    settings = {"seq_len": 2048, "dp": 8, "zero_stage": 3}
    chosen = predict("llama3_8b", settings, "h100_sxm_8x")
    given = predict("llama3_8b", settings, "h100_sxm_8x", program="llm_foundry")
    assert chosen.step_s.mid == given.step_s.mid
    assert math.log(chosen.step_s.high / chosen.step_s.mid) == pytest.approx(
        math.hypot(math.log(given.step_s.high / given.step_s.mid), UNTOLD)
    )
    titan = predict("llama3_8b", settings, "h100_sxm_8x", program="torchtitan")
    assert chosen.step_s.low < titan.step_s.mid < 1.02 * chosen.step_s.high


def test_experts_that_no_row_had_are_less_well_known_than_a_guess() -> None:
    settings = {"seq_len": 4096, "dp": 8, "zero_stage": 3, "sequence_parallel": True}
    found = predict("mixtral_8x7b", settings, "h100_sxm_8x", program="torchtitan")
    assert math.log(found.step_s.high / found.step_s.mid) > 1.49 * GUESS_HIGH
    assert math.log(found.step_s.low / found.step_s.mid) < 1.49 * GUESS_LOW


def test_a_cpu_is_llmtrains() -> None:
    here = find_cluster("this_machine", peak_tflops=0.1)
    layout = Layout(seq_len=512, precision="fp32")
    assert choose_program(find_model("gpt2_124m"), layout, here)[0] == "llmtrain"
    found = predict("gpt2_124m", layout, here)
    assert found.program == "llmtrain"
    assert is_ordered(found.step_s)


def test_this_machine_has_as_many_ranks_as_the_layout() -> None:
    settings = {"seq_len": 512, "dp": 2, "precision": "fp32"}
    two = predict("gpt2_124m", settings, "this_machine")
    assert is_ordered(two.step_s)
    assert two.program == "llmtrain"
    here = find_cluster("this_machine", gpus_per_node=2, peak_tflops=0.1)
    assert predict("gpt2_124m", settings, here).time["dp"] > 0


def test_constants_of_a_users_own_replace_the_programs() -> None:
    known = find_costs("megatron", gpu_name=CLUSTER.gpu.name).calibrated
    plain = predict("llama3_8b", LAYOUT, CLUSTER, program="megatron", constants=known)
    slower = replace(known, log_low=0.0, log_high=0.1, source="own run")
    slower = replace(slower, constants=replace(known.constants, gemm_efficiency=0.3))
    found = predict("llama3_8b", LAYOUT, CLUSTER, program="megatron", constants=slower)
    assert found.source == "own run"
    assert found.step_s.mid > 1.2 * plain.step_s.mid
    assert found.step_s.low == found.step_s.mid
    assert found.step_s.high == pytest.approx(found.step_s.mid * math.exp(0.1))


def test_distance_is_in_decades_outside_of_the_fitted_rows() -> None:
    calibrated = Calibrated(
        constants=Constants(),
        log_low=-0.1,
        log_high=0.1,
        num_rows=12,
        source="a table",
        ranges={"d_model": (1024.0, 8192.0), "seq_len": (1024.0, 2048.0), "tp": (1.0, 8.0)},
    )

    def asked(seq_len: int, **settings: int) -> Prediction:
        layout = {"seq_len": seq_len, "dp": 8, **settings}
        return predict("llama3_8b", layout, "h100_sxm_8x", program="megatron", constants=calibrated)

    # their interval stands: who calibrates says how far a question is
    assert asked(20480, tp=16).step_s.high == pytest.approx(asked(20480, tp=16).step_s.mid * math.exp(0.1))

    inside = asked(2048).distance
    assert (inside.decades, inside.column) == (0.0, "")
    assert inside.text == "inside of the 12 rows fitted"
    outside = asked(20480, tp=16).distance
    assert outside.decades == pytest.approx(1.0)
    assert outside.column == "seq_len"
    assert outside.text == "seq_len=20480 where the 12 rows fitted have 1024 to 2048 (a table)"
    unknown = predict(
        "llama3_8b", LAYOUT, CLUSTER, program="megatron", constants=replace(calibrated, ranges={})
    ).distance
    assert unknown.decades is None
    assert unknown.text == "not known: a table"


@pytest.mark.parametrize(
    ("model", "settings", "cluster", "message"),
    [
        ("llama4_8b", {"seq_len": 512}, "h100_sxm_8x", "unknown model 'llama4_8b'; did you mean"),
        ("llama3_8b", {"seq_len": 512}, "h100_8x", "unknown cluster 'h100_8x'; did you mean"),
        (
            "llama3_8b",
            {"seq_len": 512, "tpp": 8},
            "h100_sxm_8x",
            "unknown field of a layout 'tpp'; did you mean",
        ),
        ("llama3_8b", {"dp": 8}, "h100_sxm_8x", "the layout has no seq_len"),
        ("llama3_8b", {"seq_len": 512, "dp": 0}, "h100_sxm_8x", "layout.dp=0 must be a whole number"),
        (
            "llama3_8b",
            {"seq_len": 512, "pp": 64},
            "h100_sxm_8x",
            "pp \\* vpp=64, and llama3_8b num_layers=32",
        ),
        ("llama3_8b", {"seq_len": 512, "tp": 64}, "h100_sxm_8x", "tp=64, and llama3_8b num_heads=32"),
        ("llama3_8b", {"seq_len": 512, "tp": 3}, "h100_sxm_8x", "tp=3, which does not divide num_heads=32"),
        ("gpt2_124m", {"seq_len": 2048}, "h100_sxm_8x", "seq_len=2048, and gpt2_124m a table of 1024"),
        ("llama3_8b", {"seq_len": 512, "dp": 8, "ep": 8}, "h100_sxm_8x", "ep=8, and llama3_8b num_experts=0"),
        ("llama3_8b", {"seq_len": 512, "precision": "fp8"}, "a100_sxm_80gb_8x", "no matrix products in fp8"),
    ],
)
def test_what_cannot_be_is_refused(
    model: str, settings: dict[str, object], cluster: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(model, settings, cluster)  # type: ignore[arg-type]


def half_width(prediction: Prediction) -> float:
    return math.log(prediction.step_s.high / prediction.step_s.mid)


def test_intervals_widen_with_the_distance_from_the_rows_fitted() -> None:
    def asked(dp: int) -> Prediction:
        settings = {"seq_len": 8192, "dp": dp, "zero_stage": 3, "recompute": "full"}
        return predict("llama3_8b", settings, "h100_sxm_8x", program="llm_foundry")

    near, far = asked(8), asked(2048)
    assert near.distance.decades == 0
    assert far.distance.decades == pytest.approx(math.log10(2048 / 64))
    assert far.distance.column == "dp"
    added = 1.2816 * WIDER_PER_DECADE * math.log10(2048 / 64)
    assert half_width(far) == pytest.approx(math.hypot(half_width(near), added), rel=1e-3)
    widths = [half_width(asked(dp)) for dp in (8, 64, 128, 512, 2048)]
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(widths[1])
    assert asked(2048).step_s.low < asked(2048).step_s.mid


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "megatron_deepspeed"])
@pytest.mark.parametrize("cluster", ["v100_sxm_8x", "h100_sxm_8x", "b200_sxm_8x"])
def test_the_number_of_ranks_counts_for_every_program_and_gpu(program: str, cluster: str) -> None:
    settings = {"seq_len": 2048, "dp": 2**17, "zero_stage": 0}
    found = predict("gpt3_6_7b", settings, cluster, program=program).distance
    assert found.decades is not None
    assert found.decades > 1.5
    assert "world_size" in find_costs(program, gpu_name=find_cluster(cluster).gpu.name).calibrated.ranges


def test_axes_that_no_row_had_are_outside() -> None:
    settings = {"seq_len": 8192, "dp": 8, "tp": 8, "zero_stage": 3, "sequence_parallel": True}
    found = predict("llama3_8b", settings, "h100_sxm_8x", program="torchtitan").distance
    assert found.column in ("tp", "world_size")
    assert found.decades == pytest.approx(math.log10(8))
    assert "=8 where the 7 rows fitted have 1 (" in found.text or "=64 where" in found.text


def test_fp8_is_less_well_known_where_few_rows_have_it() -> None:
    settings = {"seq_len": 4096, "dp": 8, "tp": 2}
    plain = predict("llama3_8b", settings, "h100_sxm_8x", program="megatron")
    fp8 = predict("llama3_8b", {**settings, "precision": "fp8"}, "h100_sxm_8x", program="megatron")
    assert half_width(fp8) == pytest.approx(math.hypot(half_width(plain), 0.1))
    foundry = {"seq_len": 4096, "dp": 8, "zero_stage": 3}
    plain = predict("llama3_8b", foundry, "h100_sxm_8x", program="llm_foundry")
    fp8 = predict("llama3_8b", {**foundry, "precision": "fp8"}, "h100_sxm_8x", program="llm_foundry")
    assert half_width(fp8) == pytest.approx(half_width(plain))


@pytest.mark.parametrize(
    ("model", "settings", "program", "why"),
    [
        ("llama3_8b", {"pp": 2, "zero_stage": 3}, "llm_foundry", "does not run pp=2"),
        ("llama3_8b", {"cp": 2, "zero_stage": 3}, "llm_foundry", "does not run cp=2"),
        ("mixtral_8x7b", {"zero_stage": 3}, "llm_foundry", "does not run experts"),
        ("mixtral_8x7b", {}, "llmtrain", "does not run experts"),
        ("deepseek_v2", {}, "megatron_deepspeed", "does not run experts, latent attention"),
        ("llama3_8b", {"pp": 2, "zero_stage": 3}, "llmtrain", "its rule: pipeline with zero 2 or 3"),
        ("llama3_8b", {"precision": "fp8"}, "llmtrain", "does not run precision=fp8"),
        ("llama3_8b", {"zero_stage": 2}, "megatron", "does not run zero_stage=2"),
        ("llama3_8b", {"zero_stage": 3, "pp": 2}, "megatron", "does not run zero_stage=3"),
        ("llama3_8b", {"zero_stage": 3, "recompute": "selective"}, "llm_foundry", "recompute=selective"),
        ("llama3_8b", {"pp": 2, "vpp": 2, "schedule": "dual_pipe_v"}, "megatron", "schedule=dual_pipe_v"),
    ],
)
def test_what_a_program_does_not_run_is_said_and_widens_the_interval(
    model: str, settings: dict[str, int | str], program: str, why: str
) -> None:
    found = predict(model, {"seq_len": 4096, "dp": 8, **settings}, "h100_sxm_8x", program=program)
    assert not found.legal
    assert why in found.why_not
    assert half_width(found) >= GUESS_HIGH


@pytest.mark.parametrize(
    ("model", "settings", "cluster", "program"),
    [
        ("llama3_8b", {"dp": 8, "zero_stage": 3}, "h100_sxm_8x", "llmtrain"),
        ("llama3_8b", {"dp": 8, "zero_stage": 0}, "h100_sxm_8x", "llmtrain"),  # on its other engine
        ("llama3_8b", {"dp": 4, "cp": 2, "tp": 2, "pp": 2, "grad_accum": 4}, "h100_sxm_8x", "llmtrain"),
        ("deepseek_v3", {"dp": 64, "ep": 64, "pp": 8}, "h100_sxm_8x", "megatron"),
        ("llama3_70b", {"dp": 64, "zero_stage": 3}, "h100_sxm_8x", "megatron"),  # Megatron-FSDP
        ("megatron_22b", {"tp": 8, "sequence_parallel": True}, "dgx_a100", "megatron_deepspeed"),
        (
            "megatron_175b",
            {"tp": 8, "pp": 8, "vpp": 3, "schedule": "interleaved", "grad_accum": 64},
            "dgx_a100",
            "megatron_deepspeed",
        ),
        ("gpt2_124m", {"dp": 8}, "a100_sxm_80gb_8x", None),
    ],
)
def test_what_a_program_runs_is_legal(
    model: str, settings: dict[str, int | str], cluster: str, program: str | None
) -> None:
    length = 1024 if model == "gpt2_124m" else 2048
    found = predict(model, {"seq_len": length, **settings}, cluster, program=program)
    assert (found.legal, found.why_not) == (True, "")


def test_experts_behind_computation_of_dual_pipe_cost_less() -> None:
    """DeepSeek-V3 on 2,048 H800: 180,000 GPU-hours for 1e12 tokens (arXiv:2412.19437, section 1) are 19.5 s a
    step of 15,360 rows of 4,096."""
    layout = {"seq_len": 4096, "pp": 16, "vpp": 2, "dp": 128, "ep": 64, "grad_accum": 120, "precision": "fp8"}
    found = predict("deepseek_v3", {**layout, "schedule": "dual_pipe_v"}, "h800_sxm_8x", program="megatron")
    plain = predict(
        "deepseek_v3", {**layout, "vpp": 1, "schedule": "one_f_one_b"}, "h800_sxm_8x", program="megatron"
    )
    assert found.time["ep"] < 0.4 * plain.time["ep"]
    measured = 180e3 * 3600 / 2048 / 1e12 * 15360 * 4096
    assert measured == pytest.approx(19.9, abs=0.1)
    assert found.step_s.low < measured < found.step_s.mid


def test_tables_of_positions_of_llm_foundry_are_as_long_as_a_row() -> None:
    settings = {"seq_len": 8192, "dp": 8, "zero_stage": 3}
    assert is_ordered(predict("mpt_7b", settings, "h100_sxm_8x").step_s)


def test_numbers_of_a_table_are_taken_for_settings() -> None:
    told = {"seq_len": 4096.0, "dp": np.int64(8), "tp": np.float64(2), "sequence_parallel": 1}
    plain = {"seq_len": 4096, "dp": 8, "tp": 2, "sequence_parallel": True}
    assert predict("llama3_8b", told, "h100_sxm_8x") == predict("llama3_8b", plain, "h100_sxm_8x")  # type: ignore[arg-type]
    told["sequence_parallel"] = np.bool_(True)
    assert predict("llama3_8b", told, "h100_sxm_8x") == predict("llama3_8b", plain, "h100_sxm_8x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "layout", "cluster", "message"),
    [
        (None, {"seq_len": 512}, "h100_sxm_8x", "the model is None; give a name of tables/cost/models.csv"),
        ("llama3_8b", None, "h100_sxm_8x", "the layout is None; give a Layout, or a mapping"),
        ("llama3_8b", {"seq_len": 512}, None, "the cluster is None; give a name of tables/cost/nodes.csv"),
        ("llama3_8b", {"seq_len": "512"}, "h100_sxm_8x", "layout.seq_len='512' must be a whole number"),
        ("llama3_8b", {"seq_len": 512, "dp": None}, "h100_sxm_8x", "layout.dp=None must be a whole number"),
        ("llama3_8b", {"seq_len": 512, "dp": 2.5}, "h100_sxm_8x", "layout.dp=2.5 must be a whole number"),
        ("llama3_8b", {"seq_len": 512, "dp": True}, "h100_sxm_8x", "layout.dp=True must be a whole number"),
        (
            "llama3_8b",
            {"seq_len": 512, "recompute": False},
            "h100_sxm_8x",
            "layout.recompute=False must be a name",
        ),
        (
            "llama3_8b",
            {"seq_len": 512, "sequence_parallel": "yes"},
            "h100_sxm_8x",
            "layout.sequence_parallel='yes' must be true or false",
        ),
    ],
)
def test_values_of_a_wrong_kind_are_refused(
    model: object, layout: object, cluster: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(model, layout, cluster)  # type: ignore[arg-type]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_rules_for_layouts_and_bytes_in_memory(program: str) -> None:
    assert program in ENGINES
    gpus = {
        name: predict("llama3_8b", {"seq_len": 2048, "dp": 8}, name, program=program) for name in CLUSTERS
    }
    for found in gpus.values():
        assert is_ordered(found.step_s)
        assert is_ordered(found.peak_bytes)
        assert found.source
    assert len({found.step_s.mid for found in gpus.values()}) == len(gpus)


def test_a_gpu_without_bf16_is_asked_for_fp16() -> None:
    settings = {"seq_len": 2048, "dp": 8}
    found = predict("gpt3_6_7b", settings, "v100_sxm_8x")
    assert found == predict("gpt3_6_7b", {**settings, "precision": "fp16"}, "v100_sxm_8x")
    with pytest.raises(ConfigError, match="has no matrix products in bf16; it has fp16"):
        predict("gpt3_6_7b", Layout(seq_len=2048, dp=8), "v100_sxm_8x")


CLUSTERS = ("v100_sxm_8x", "a100_sxm_80gb_8x", "h100_sxm_8x", "b200_sxm_8x")


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown program 'megatorn'; did you mean 'megatron'"):
        predict("llama3_8b", LAYOUT, CLUSTER, program="megatorn")


def test_a_layout_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"= 32 ranks, and the cluster h100_sxm_8x 8 GPUs; give it num_nodes=4"
    ):
        predict("llama3_8b", LAYOUT, find_cluster("h100_sxm_8x"))


def import_s(statement: str) -> tuple[float, str]:
    """(CPU seconds of an import in a fresh process, the best of three; heavy modules that came with it)."""
    heavy = ("torch", "pandas", "scipy", "omegaconf", "hydra", "deepspeed")
    code = (
        f"import sys, time; begin = time.process_time(); {statement}; "
        f"print(time.process_time() - begin, *[name for name in {heavy} if name in sys.modules])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    return min(float(run[0]) for run in runs), " ".join(runs[0][1:])


def test_the_import_takes_a_few_times_what_numpy_takes_and_needs_numpy_alone() -> None:
    took, heavy = import_s("from llmtrain.planner import predict")
    numpy_alone, _ = import_s("import numpy")
    assert heavy == ""
    assert took < 4 * numpy_alone  # `llmtrain bench planner` has the seconds


def test_configurations_of_the_planner_load_without_numpy() -> None:
    code = "import sys, llmtrain.planner.config; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'predictt'"):
        planner.predictt  # noqa: B018
