"""Shipped constants against a new fit, left-out rows against the issue's figures, and programs by name.

Fits of all studies take some ten seconds, once.
"""

import csv
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.cost import calibration, cluster, programs
from llmtrain.planner.cost.candidates import FULL, NO_RECOMPUTE, SELECTIVE, candidates
from llmtrain.planner.cost.step_time import Constants, step_time

PUBLISHED = Path(__file__).parents[3] / "shared" / "planner_data"
STUDY_KEYS = [(study.program, study.generation) for study in calibration.STUDIES]


@pytest.fixture(scope="module")
def results():
    return {key: calibration.run_study(calibration.find_study(*key)) for key in STUDY_KEYS}


def mean_error(log_error):
    return np.abs(np.expm1(log_error)).mean()


# -- what is shipped


@pytest.mark.parametrize("key", STUDY_KEYS)
def test_shipped_constants_are_those_of_a_new_fit(results, key):
    shipped, fitted = programs.find_program(key[0]).calibrated[key[1]], results[key]
    for each in fields(Constants):
        new, old = getattr(fitted.constants, each.name), getattr(shipped.constants, each.name)
        assert old == pytest.approx(new, rel=1e-3), each.name
    assert shipped.num_rows == len(fitted.errors)
    assert dict(shipped.ranges) == fitted.ranges


@pytest.mark.parametrize("key", STUDY_KEYS)
def test_shipped_intervals_are_those_of_rows_left_out(results, key):
    shipped, fitted = programs.find_program(key[0]).calibrated[key[1]], results[key]
    dense = calibration.log_quantiles(fitted.errors[~fitted.has_experts])
    assert shipped.left_out == pytest.approx(dense, abs=2e-3)
    assert (shipped.log_low, shipped.log_high) == programs.widened(*shipped.left_out)
    assert shipped.log_low < dense[0]
    assert shipped.log_high > dense[1]


def test_intervals_of_models_with_experts_are_those_of_their_rows(results):
    both = [results["megatron", generation] for generation in ("hopper", "blackwell")]
    of_experts = calibration.log_quantiles(np.concatenate([each.errors[each.has_experts] for each in both]))
    megatron = programs.find_program("megatron")
    for gpu in ("h100_sxm", "b200_sxm"):
        found = megatron.on(gpu, has_experts=True)
        assert (found.log_low, found.log_high) == pytest.approx(of_experts, abs=2e-3)
        assert found.log_low < megatron.on(gpu).log_low


# -- how far off rows are that were left out: the figures


def test_vtrain_rows_left_out_are_within_4_percent_in_the_median(results):
    errors = np.abs(np.expm1(results["megatron_deepspeed", "ampere"].errors))
    assert len(errors) == 775
    assert np.median(errors) <= 0.04
    assert errors.mean() <= 0.07
    assert errors[720:].mean() <= 0.07  # the rows of many nodes alone


def test_layouts_of_one_model_are_ranked_as_measured(results):
    _, multi = calibration.vtrain_runs()
    errors = results["megatron_deepspeed", "ampere"].errors[-len(multi) :]
    ranks = []
    for group in np.unique(multi.group):
        here = multi.group == group
        assert here.sum() >= 4
        ranks.append(calibration.spearman(multi.step_s[here] * np.exp(errors[here]), multi.step_s[here]))
    assert np.mean(ranks) >= 0.85
    assert np.median(ranks) >= 0.85
    assert min(ranks) >= 0.65  # 8192 wide on 512 GPUs: some of its rows are twice as slow as their like


@pytest.mark.parametrize("generation", ["ampere", "hopper"])
def test_llm_foundry_rows_left_out_beat_one_utilization_for_all(results, generation):
    found = mean_error(results["llm_foundry", generation].errors)
    assert found <= 0.04
    runs = calibration.llm_foundry_runs(generation)
    useful = np.concatenate([6 * each.group * each.c.tokens * each.c.grad_accum for each in runs])
    speed = np.log(useful / np.concatenate([each.step_s for each in runs]))
    assert mean_error(speed - np.median(speed)) > 2 * found


def test_torchtitan_rows_left_out_are_within_8_percent(results):
    assert mean_error(results["torchtitan", "hopper"].errors) <= 0.08


def test_weak_scaling_rows_left_out_are_within_5_percent(results):
    assert mean_error(results["megatron", "hopper"].errors[:3]) <= 0.05


def test_b200_rows_left_out_are_within_5_percent(results):
    assert mean_error(results["megatron_plain", "blackwell"].errors) <= 0.05


@pytest.mark.slow
def test_intervals_from_other_folds_cover_rows_left_out():
    studies = [calibration.find_study("llm_foundry", generation) for generation in ("ampere", "hopper")]
    studies.append(calibration.find_study("megatron_deepspeed", "ampere"))
    covered = [calibration.coverage(study.read(), study.prior, study.free) for study in studies]
    assert 0.72 <= np.concatenate(covered).mean() <= 0.88


# -- tables that no constant is fitted to (SEQUENCE_PARALLEL_COST is from the second's forward passes)


def published(name):
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def gpt(d_model, num_layers, num_heads, *, seq_len, tp=1):
    return {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_width": d_model / num_heads,
        "ffn_width": 4 * d_model,
        "vocab_size": 51200,
        "is_tied": 1,
        "has_biases": 1,
        "position_rows": seq_len,
        "seq_len": seq_len,
        "tp": tp,
    }


def test_megatrons_a100_rows_of_2020_are_predicted_within_10_percent():
    shapes = {
        "1B": (1920, 24, 15, 1),
        "2B": (2304, 30, 18, 2),
        "4B": (3072, 36, 24, 4),
        "8B": (4096, 42, 32, 8),
    }
    program, errors = programs.find_program("megatron_deepspeed"), []
    for row in published("perf_megatron_2020.csv"):
        if row["gpu"] == "v100":
            continue
        d, num_layers, heads, tp = shapes[row["case"]]
        dp, step_s = int(row["gpus"]) / tp, float(row["iter_ms"]) / 1e3
        # the shapes are those whose FLOPs, recomputation included, the table prints
        printed = float(row["tflops_per_gpu"]) * 1e12 * step_s * int(row["gpus"]) / float(row["batch"])
        flops = 96 * 1024 * num_layers * d**2 * (1 + 1024 / 6 / d + 51200 / 16 / num_layers / d)
        assert flops == pytest.approx(printed, rel=0.05)
        c = candidates(
            **gpt(d, num_layers, heads, seq_len=1024, tp=tp),
            **cluster.columns(cluster.find_cluster("a100_sxm_40gb_8x")),
            dp=dp,
            zero_stage=0,
            micro_batch=float(row["batch"]) / dp,
            recompute=FULL,
        )
        predicted = step_time(c, program.does(), program.on("a100_sxm_40gb").constants).total[0]
        errors.append(np.log(predicted / step_s))
    assert len(errors) == 8
    assert np.abs(np.expm1(errors)).max() < 0.12
    assert mean_error(np.array(errors)) < 0.06


def test_a_layer_of_korthikantis_22b_is_predicted_within_8_percent():
    rows = published("perf_korthikanti2022_layer_times.csv")
    recompute = {"full recompute": FULL, "selective": SELECTIVE, "selective+SP": SELECTIVE}
    program = programs.find_program("megatron_deepspeed")
    c = candidates(
        **gpt(6144, 1, 64, seq_len=2048, tp=8),
        **cluster.columns(cluster.find_cluster("dgx_a100")),
        micro_batch=4,
        recompute=np.array([float(recompute.get(row["experiment"], NO_RECOMPUTE)) for row in rows]),
        sequence_parallel=np.array(
            [float("SP" in row["experiment"] or row["experiment"] == "sequence parallel") for row in rows]
        ),
    )
    found = step_time(c, program.does(), program.on("a100_sxm_80gb").constants)
    layer = found.products + found.attention + found.elementwise + found.launches + found.recompute + found.tp
    measured = np.array([float(row["total_ms"]) for row in rows]) / 1e3
    assert np.abs(layer / measured - 1).max() < 0.08


# -- the fitter


def test_a_fit_finds_the_constants_that_made_its_rows():
    runs = calibration.llm_foundry_runs("ampere")
    truth = replace(calibration.PRIOR, gemm_efficiency=0.6, attention_efficiency=0.9, memory_efficiency=0.5)
    made = [replace(each, step_s=step_time(each.c, each.software, truth).total) for each in runs]
    free = ("gemm_efficiency", "attention_efficiency", "memory_efficiency")
    found = calibration.fit_constants(made, calibration.PRIOR, free)
    for name in free:
        assert getattr(found, name) == pytest.approx(
            getattr(truth, name), rel=5e-3
        )  # drawn to the prior a little


def test_a_few_bad_days_do_not_move_a_fit():
    runs = calibration.llm_foundry_runs("ampere")
    truth = replace(calibration.PRIOR, gemm_efficiency=0.6)
    made = [replace(each, step_s=step_time(each.c, each.software, truth).total) for each in runs]
    slow = np.where(np.arange(len(made[0])) % 13 == 0, 1.5, 1.0)
    spoiled = [replace(made[0], step_s=made[0].step_s * slow)]
    found = calibration.fit_constants(spoiled, calibration.PRIOR, ("gemm_efficiency",))
    assert found.gemm_efficiency == pytest.approx(0.6, rel=0.01)


def test_constants_that_no_row_depends_on_stay_at_their_prior():
    runs = [each.rows(np.arange(3)) for each in calibration.torchtitan_runs()[2:]]
    found = calibration.fit_constants(runs, calibration.PRIOR, ("gemm_efficiency", "expert_efficiency"))
    assert found.expert_efficiency == pytest.approx(calibration.PRIOR.expert_efficiency)
    assert found.gemm_efficiency != calibration.PRIOR.gemm_efficiency


def test_times_that_are_not_above_0_are_refused():
    (runs,) = calibration.simumax_runs()
    broken = replace(runs, step_s=runs.step_s * 0)
    with pytest.raises(ValueError, match="above 0"):
        calibration.fit_constants([broken], calibration.PRIOR, ("gemm_efficiency",))


def test_folds_are_even_and_always_the_same():
    folds = calibration.folds_of(78)
    assert sorted(np.bincount(folds).tolist()) == [15, 15, 16, 16, 16]
    assert (folds == calibration.folds_of(78)).all()
    assert (np.sort(folds) != folds).any()


@pytest.mark.parametrize(
    ("degrees", "exact"), [(2, 1.8856), (4, 1.5332), (6, 1.4398), (10, 1.3722), (30, 1.3104)]
)
def test_students_quantiles_are_the_tables(degrees, exact):
    assert calibration.student_t_90(degrees) == pytest.approx(exact, rel=0.02)


def test_quantiles_of_many_rows_leave_a_tenth_on_each_side():
    low, high = calibration.log_quantiles(np.linspace(-1, 1, 99))
    assert (low, high) == pytest.approx((-0.8163, 0.8163), abs=1e-3)  # the 10th of 99 from either end


def test_quantiles_of_few_rows_are_wider_than_their_spread():
    errors = np.array([-0.05, 0.0, 0.05])
    low, high = calibration.log_quantiles(errors)
    assert high == pytest.approx(-low)
    assert high == pytest.approx(1.8856 * 0.05 * np.sqrt(4 / 3), rel=0.02)
    with pytest.raises(ValueError, match="2 rows say nothing"):
        calibration.log_quantiles(errors[:2])


def test_intervals_cover_8_in_10_of_new_rows():
    generator = np.random.Generator(np.random.Philox(key=3))
    for num in (5, 30):
        inside = []
        for _ in range(2000):
            drawn = generator.standard_normal(num + 1)
            low, high = calibration.log_quantiles(drawn[:-1])
            inside.append(low <= -drawn[-1] <= high)
        assert 0.77 < np.mean(inside) < 0.84


def test_rank_correlation_shares_ranks_of_ties():
    assert calibration.spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 15])) == pytest.approx(0.5)
    assert calibration.spearman(np.array([1.0, 1, 2]), np.array([1.0, 1, 2])) == pytest.approx(1.0)


# -- programs by name


def test_every_gpu_of_the_table_has_a_generation_and_constants():
    for gpu in cluster.gpu_names():
        assert programs.generation_of(gpu) is not None, gpu
        for program in programs.PROGRAMS.values():
            found = program.on(gpu)
            assert found.log_low < 0 < found.log_high
            is_measured = program.name != "llmtrain" and programs.generation_of(gpu) in program.calibrated
            assert (found.num_rows > 0) == is_measured
            if not found.num_rows:
                assert "assumed, not measured" in found.source
                assert found.log_high - found.log_low >= 0.6


def test_guesses_take_the_generations_own_efficiency():
    foundry = programs.find_program("llm_foundry")
    h100, b200 = foundry.on("h100_sxm").constants, foundry.on("b200_sxm").constants
    assert b200.gemm_efficiency == pytest.approx(h100.gemm_efficiency * 0.77 / 0.9)
    assert foundry.on("v100_sxm_32gb").source.startswith("guessed from llm_foundry on ampere")
    assert foundry.on("some_new_gpu").source.startswith("guessed from llm_foundry on hopper")


def test_llmtrain_says_that_it_was_not_measured():
    for gpu in ("a100_sxm_80gb", "h100_sxm", "this_machine"):
        found = programs.find_program("llmtrain").on(gpu)
        assert found.num_rows == 0
        assert "not measured" in found.source
    assert programs.find_program("llmtrain").on("this_machine").constants.is_synchronous


def test_llmtrains_attention_computes_masked_keys():
    """Less than half of a kernel's that skips them."""
    llmtrain, foundry = programs.find_program("llmtrain"), programs.find_program("llm_foundry")
    masked = llmtrain.on("a100_sxm_80gb").constants.attention_efficiency
    assert masked == pytest.approx(0.35 * foundry.on("a100_sxm_80gb").constants.attention_efficiency)
    assert llmtrain.does().context == "heads"


def test_experts_that_no_row_had_have_the_widest_interval():
    guess = (1.5 * programs.GUESS_LOW, 1.5 * programs.GUESS_HIGH)
    for name in ("llm_foundry", "torchtitan"):
        found = programs.find_program(name).on("h100_sxm", has_experts=True)
        assert (found.log_low, found.log_high) == guess
    cpu = programs.find_program("llmtrain").on("this_machine")
    assert programs.find_program("llmtrain").on("this_machine", has_experts=True).log_high >= cpu.log_high


def test_guesses_are_as_far_away_as_the_rows_they_are_from():
    foundry = programs.find_program("llm_foundry")
    assert foundry.on("v100_sxm_32gb").ranges == foundry.on("a100_sxm_80gb").ranges
    assert programs.find_program("llmtrain").on("h100_sxm").ranges["world_size"] == (8, 64)


def test_precision_and_compiling_change_what_a_program_does():
    titan = programs.find_program("torchtitan")
    assert titan.does(precision="fp8").product_speed == programs.FP8_SPEED
    assert titan.does(is_compiled=True).elementwise_passes < titan.does().elementwise_passes
    assert titan.does(precision="fp32").element_bytes == 4
    assert (
        programs.find_program("megatron").does(is_compiled=True) == programs.find_program("megatron").does()
    )


def test_an_unknown_program_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'megatron'"):
        programs.find_program("megatronn")
