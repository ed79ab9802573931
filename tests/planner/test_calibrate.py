"""Constants learned from runs: on runs that were made up with constants that are known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from llmtrain.bench import own_runs
from llmtrain.bench.table import BenchConfig
from llmtrain.data.manifest import read_manifest, verify
from llmtrain.errors import ConfigError, DataError
from llmtrain.planner.calibrate import (
    WIDTHS,
    Calibration,
    Observation,
    quantities_of,
    read_calibration,
    student_90,
    write_calibration,
)
from llmtrain.planner.calibrate import (
    calibrate as calibrate_program,
)
from llmtrain.planner.cost import architecture
from llmtrain.planner.cost import cluster as clusters
from llmtrain.planner.cost import layout as layouts
from llmtrain.planner.cost.architecture import find_model, num_params
from llmtrain.planner.cost.candidates import DEFAULTS, candidates
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.cost.costs import find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.memory import memory
from llmtrain.planner.cost.step_time import Constants, step_time
from llmtrain.planner.prediction import predict

MODEL = find_model("llama3_8b")
PROGRAM = "megatron_deepspeed"
CLUSTER = find_cluster("a100_sxm_80gb_8x", num_nodes=4)
LAYOUTS = (
    {"dp": 8, "zero_stage": 2, "micro_batch_rows": 1, "grad_accum": 4},
    {"dp": 4, "tp": 2, "zero_stage": 1, "micro_batch_rows": 1, "grad_accum": 8},
    {"dp": 32, "zero_stage": 2, "micro_batch_rows": 1, "grad_accum": 2},
    {"dp": 4, "tp": 8, "zero_stage": 1, "micro_batch_rows": 2, "grad_accum": 4},
    {"dp": 2, "tp": 4, "pp": 4, "zero_stage": 1, "micro_batch_rows": 1, "grad_accum": 16},
    {"dp": 8, "cp": 2, "zero_stage": 2, "micro_batch_rows": 1, "grad_accum": 1, "seq_len": 16384},
    {"dp": 8, "zero_stage": 3, "micro_batch_rows": 2, "grad_accum": 1, "recompute": "full"},
    {"dp": 16, "tp": 2, "zero_stage": 1, "micro_batch_rows": 1, "grad_accum": 2, "seq_len": 2048},
)


def layout(at):
    return Layout(**{"seq_len": 4096, **LAYOUTS[at]})


def shipped():
    return find_costs(PROGRAM, gpu_name=CLUSTER.gpu.name)


def predicted_s(at, constants):
    costs = shipped()
    columns = {
        **DEFAULTS,
        **architecture.columns(MODEL),
        **layouts.columns(layout(at)),
        **clusters.columns(CLUSTER, "bf16"),
    }
    return float(step_time(candidates(**columns), costs.software, constants).total[0])


def calibrate(runs, program=PROGRAM):
    return calibrate_program(runs, program=program)


def made_up(at, *, constants=None, factor=1.0, added_bytes=3e9, name=None):
    """A run that took what `constants` say, times `factor`."""
    constants = constants or shipped().calibrated.constants
    columns = {
        **DEFAULTS,
        **architecture.columns(MODEL),
        **layouts.columns(layout(at)),
        **clusters.columns(CLUSTER, "bf16"),
    }
    peak = float(memory(candidates(**columns), shipped().memory_program).allocated[0])
    return Observation(
        name=name or f"run{at}",
        arch=MODEL,
        layout=layout(at),
        cluster=CLUSTER,
        step_s=factor * predicted_s(at, constants),
        peak_bytes=peak + added_bytes,
    )


def test_one_run_gives_one_factor_and_one_number_of_bytes():
    report = calibrate([made_up(0, factor=1.3)])
    (run,) = report.runs
    assert run.before_s == pytest.approx(run.measured_s / 1.3)
    assert run.after_s == pytest.approx(run.measured_s, rel=1e-6)
    assert run.after_bytes == pytest.approx(run.measured_bytes)
    assert run.left_out_s is None
    assert report.calibration.memory_bytes == pytest.approx(3e9)
    before, after = shipped().calibrated.constants, report.calibration.constants
    ratios = [after[name] / getattr(before, name) for name in WIDTHS]
    logs = [
        math.log(r) if name.endswith("_s") else -math.log(r) for name, r in zip(WIDTHS, ratios, strict=True)
    ]
    assert logs == pytest.approx([math.log(report.calibration.factor)] * len(logs))
    assert report.calibration.factor == pytest.approx(1.3, rel=0.1), "what the optimizer takes is not scaled"


def test_one_factor_from_one_run_helps_all_others():
    slower = calibrate([made_up(0, factor=1.3)]).calibration.calibrated().constants
    for at in range(1, len(LAYOUTS)):
        assert predicted_s(at, slower) == pytest.approx(
            1.3 * predicted_s(at, shipped().calibrated.constants), rel=0.1
        )


def test_two_runs_that_agree_are_met_and_constants_stay_near_the_shipped_ones():
    report = calibrate([made_up(0, factor=1.2), made_up(4, factor=1.2)])
    assert all(run.after_s == pytest.approx(run.measured_s, rel=0.02) for run in report.runs)
    assert report.calibration.factor == pytest.approx(1.2, rel=0.08)


def test_four_runs_tell_products_from_links():
    """Slower products and a much slower network: one factor cannot say that, the constants can."""
    base = shipped().calibrated.constants
    true = replace(
        base, gemm_efficiency=base.gemm_efficiency * 0.8, node_efficiency=base.node_efficiency * 0.55
    )
    runs = [made_up(at, constants=true) for at in range(len(LAYOUTS))]
    report = calibrate(runs)
    after = [abs(math.log(run.after_s / run.measured_s)) for run in report.runs]
    left_out = [abs(math.log(run.left_out_s / run.measured_s)) for run in report.runs]
    alone = calibrate(runs[:1]).calibration.calibrated().constants
    one_factor = [abs(math.log(predicted_s(at, alone) / run.step_s)) for at, run in enumerate(runs)]
    assert np.mean(after) < 0.02
    assert np.mean(left_out) < 0.6 * np.mean(one_factor)
    assert report.calibration.constants["node_efficiency"] < 0.85 * base.node_efficiency


def test_a_constant_that_no_run_depends_on_moves_with_the_common_factor_alone():
    """All runs on one node: nothing is known of the network."""
    runs = [made_up(at, factor=1.1, name=f"{at}-{rows}") for at in (0, 1) for rows in (1, 2)]
    calibration = calibrate(runs).calibration
    ratio = calibration.constants["node_efficiency"] / shipped().calibrated.constants.node_efficiency
    assert ratio == pytest.approx(1 / calibration.factor)


def test_runs_that_match_the_shipped_constants_change_nothing():
    calibration = calibrate([made_up(at, added_bytes=0.0) for at in range(4)]).calibration
    assert calibration.factor == pytest.approx(1.0, abs=1e-6)
    assert calibration.memory_bytes == pytest.approx(0.0, abs=1)
    for name, value in calibration.constants.items():
        assert value == pytest.approx(float(getattr(shipped().calibrated.constants, name)), rel=1e-6)


def test_the_peak_of_rank_0_is_held_against_the_first_stage():
    whole, first = made_up(4), replace(made_up(4), is_first_rank=True)
    told = [calibrate([each]).runs[0].before_bytes for each in (whole, first)]
    assert told[1] <= told[0]


def test_a_run_without_a_peak_counts_for_time_alone():
    report = calibrate([replace(made_up(0, factor=1.1), peak_bytes=None), made_up(1, factor=1.1)])
    assert report.calibration.memory_bytes == pytest.approx(3e9)
    assert report.runs[0].measured_bytes is None


def test_predict_takes_what_was_learned():
    calibration = calibrate([made_up(at, factor=1.25) for at in range(2)]).calibration
    program = calibration.memory_program(shipped().memory_program)
    asked = (MODEL, layout(0), CLUSTER)
    before = predict(*asked, program=PROGRAM)
    after = predict(*asked, program=PROGRAM, constants=calibration.calibrated(), memory_program=program)
    assert after.step_s.mid == pytest.approx(1.25 * before.step_s.mid, rel=0.03)
    assert after.peak_bytes.mid > before.peak_bytes.mid + 2.9e9
    assert after.step_s.low < after.step_s.mid < after.step_s.high
    assert "calibrated on 2 runs: run0, run1" in after.source


def test_the_interval_narrows_with_runs_and_widens_with_distance():
    few = calibrate([made_up(0)]).calibration
    many = calibrate([made_up(at) for at in range(len(LAYOUTS))]).calibration
    assert many.calibrated().log_high < few.calibrated().log_high
    far, near = many.calibrated(decades=2.0), many.calibrated()
    assert far.log_high > 1.5 * near.log_high
    assert far.log_low == -far.log_high


def test_runs_that_scatter_widen_the_interval():
    steady = calibrate([made_up(at) for at in range(8)]).calibration
    noise = [1.0, 1.3, 0.8, 1.25, 0.75, 1.2, 0.8, 1.3]
    scattered = calibrate([made_up(at, factor=noise[at]) for at in range(8)]).calibration
    assert scattered.log_sd > 1.5 * steady.log_sd


@pytest.mark.parametrize(
    ("freedom", "expected"), [(4, 1.5332), (7, 1.4149), (10, 1.3722), (30, 1.3104), (1e9, 1.2816)]
)
def test_students_quantile(freedom, expected):
    assert student_90(freedom) == pytest.approx(expected, abs=2e-3)  # tables of Student's t, 90%


@pytest.mark.slow
def test_eighty_percent_intervals_hold_eight_in_ten():
    """Runs whose logarithms scatter by the spread believed in: another one lies inside as often as
    promised."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        noise = np.exp(random.normal(0, 0.10, 4))
        runs = [made_up(at, factor=noise[n]) for n, at in enumerate((0, 2, 3))]
        calibrated = calibrate(runs).calibration.calibrated()
        error = math.log(
            noise[3] * predicted_s(6, shipped().calibrated.constants) / predicted_s(6, calibrated.constants)
        )
        inside += calibrated.log_low <= error <= calibrated.log_high
    assert 0.65 <= inside / 60 <= 0.95  # 80% with a binomial standard deviation of 5%


# -- distance


def test_a_question_among_the_runs_is_at_no_distance():
    calibration = calibrate([made_up(at) for at in range(4)]).calibration
    found = calibration.distance(MODEL, layout(0), CLUSTER)
    assert found.decades == 0
    assert found.sentences == ()


def test_distance_names_what_is_outside_the_furthest_first():
    calibration = calibrate([made_up(0), made_up(1)]).calibration
    question = Layout(seq_len=4096, dp=80, tp=8, zero_stage=1, micro_batch_rows=1, grad_accum=1)
    found = calibration.distance(MODEL, question, CLUSTER)
    assert found.decades == pytest.approx(math.log10(80))
    assert found.sentences[0] == "num_nodes=80, and the runs' 1"
    assert "dp=80, and the runs' 4 to 8" in found.sentences
    assert not any("tokens" in sentence for sentence in found.sentences)


def test_another_gpu_or_precision_is_a_decade_away():
    calibration = calibrate([made_up(0)]).calibration
    assert calibration.distance(MODEL, replace(layout(0), precision="fp8"), CLUSTER).sentences[0] == (
        "the precision is fp8, and the runs' bf16"
    )
    elsewhere = calibration.distance(MODEL, layout(0), find_cluster("h100_sxm_8x"))
    assert elsewhere.decades == 1
    assert "the GPU is h100_sxm, and the runs' a100_sxm_80gb" in elsewhere.sentences


def test_quantities_are_those_that_sizes_are_told_in():
    found = quantities_of(MODEL, layout(5), CLUSTER)
    assert found["num_params"] == num_params(MODEL)
    assert found["tokens"] == 8192
    assert (found["cp"], found["dp"], found["num_nodes"]) == (2, 8, 2)


# -- the file


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "calibration.json"
    calibration = calibrate([made_up(0, factor=1.2), made_up(1, factor=1.1)]).calibration
    write_calibration(path, calibration)
    return path, calibration


def test_a_file_gives_back_what_was_written(written):
    path, calibration = written
    assert read_calibration(path) == calibration


def test_a_missing_file_says_what_writes_one(tmp_path):
    with pytest.raises(
        DataError, match=r"no calibration .*c\.json; `llmtrain plan calibrate run=FOLDER out="
    ):
        read_calibration(tmp_path / "c.json")


def test_a_torn_file_is_refused(written):
    path, _ = written
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_calibration(path)


def test_a_file_changed_by_hand_is_refused(written):
    path, _ = written
    content = json.loads(path.read_text())
    content["calibration"]["factor"] = 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged or was changed by hand"):
        read_calibration(path)


def test_a_file_of_another_version_is_refused(written):
    path, _ = written
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(DataError, match="format_version=7, and this version reads 1"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": math.nan}, "numbers that are none"),
        ({"runs": []}, "or no runs"),
        ({"log_sd": 0.0}, "spreads log_sd=0.0"),
        ({"constants": {"gemm_efficiency": 0.5}}, "has constants gemm_efficiency, and this version"),
        ({"factor": "much"}, "a value of a wrong kind"),
        ({"extra": 1}, "a calibration has .*, and this"),
    ],
)
def test_content_that_cannot_be_is_refused(written, change, message):
    _, calibration = written
    content = {**vars(calibration), **change}
    with pytest.raises(DataError, match=message):
        Calibration.from_json(content)


# -- refusals


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (list, "no runs to calibrate on"),
        (lambda: [made_up(0), made_up(0)], "the run run0 is given twice"),
        (lambda: [replace(made_up(0), step_s=math.nan)], "run0: step_s=nan is no time"),
        (lambda: [replace(made_up(0), peak_bytes=-1.0)], r"run0: peak_bytes=-1.0 is no size"),
        (
            lambda: [made_up(0), replace(made_up(1), cluster=find_cluster("h100_sxm_8x"))],
            "run1 ran on h100_sxm and run0 on a100_sxm_80gb; calibrate each kind of hardware by itself",
        ),
        (
            lambda: [made_up(0), replace(made_up(1), layout=replace(layout(1), precision="fp16"))],
            "run1 ran in fp16 and run0 in bf16",
        ),
    ],
)
def test_runs_that_say_nothing_together_are_refused(runs, message):
    with pytest.raises(DataError, match=message):
        calibrate(runs())


def test_an_unknown_program_is_named():
    with pytest.raises(ConfigError, match="megatorn"):
        calibrate([made_up(0)], program="megatorn")


def test_every_constant_that_is_fitted_exists():
    assert set(WIDTHS) <= set(vars(Constants()))
    assert len(WIDTHS) <= 8


# -- bench own_runs: the figures of runs that took exactly what is predicted, and of runs that did not


@pytest.fixture(scope="module")
def one_core():
    gpu = replace(
        CLUSTER.gpu,
        name="this_machine",
        peak_flops={"fp32": 1e11},
        mem_bytes_s=1e10,
        link_bytes_s=2.5e9,
        num_multiprocessors=1,
    )
    return replace(CLUSTER, name="this_machine", gpu=gpu, gpus_per_node=2, num_nodes=1, node_bytes_s=2.5e9)


def as_predicted(run, cluster):
    told = predict(
        own_runs.observation_of(run, NOTHING, cluster, clock="cpu").arch, own_runs.layout_of(run), cluster
    )
    return own_runs.Measured(
        step_s=[told.step_s.mid], cpu_s=[told.step_s.mid], peak_bytes=[round(told.peak_bytes.mid)]
    )


NOTHING = own_runs.Measured(step_s=[1.0], cpu_s=[1.0], peak_bytes=[1])


def all_as_predicted(cluster):
    return {each.name: as_predicted(each, cluster) for each in (*own_runs.CALIBRATION, *own_runs.RUNS)}


def test_own_runs_that_took_what_is_predicted_have_no_error(one_core):
    measured = all_as_predicted(one_core)
    figures = {
        row.name: row.value for row in own_runs.judged(measured, {1: one_core, 2: one_core}, clock="wall")
    }
    for name in ("step_time_mean", "step_time_max", "memory_mean", "memory_max"):
        assert figures[f"own_runs_{name}_error"] == pytest.approx(0.0, abs=0.01)  # percent; bytes are whole


def test_own_runs_errors_are_of_the_twelve_that_did_not_calibrate(one_core):
    measured = all_as_predicted(one_core)
    last = measured[own_runs.RUNS[-1].name]
    last.step_s[0] *= 2
    rows = own_runs.judged(measured, {1: one_core, 2: one_core}, clock="wall")
    figures = {row.name: row.value for row in rows}
    assert figures["own_runs_step_time_max_error"] == pytest.approx(50.0, abs=0.01)
    assert figures["own_runs_step_time_mean_error"] == pytest.approx(50.0 / 12, abs=0.01)
    assert len(own_runs.RUNS) == 12
    assert not {each.name for each in own_runs.RUNS} & {each.name for each in own_runs.CALIBRATION}


def test_cpu_seconds_know_no_waiting_so_pipelines_are_left_out(one_core):
    measured = all_as_predicted(one_core)
    names = [row.name for row in own_runs.judged(measured, {1: one_core, 2: one_core}, clock="cpu")]
    assert not [name for name in names if name.startswith("step,") and "pp 2" in name]
    assert [name for name in names if name.startswith("peak,") and "pp 2" in name]


def test_drawn_data_is_what_a_run_reads(tmp_path):
    folder = own_runs.write_data(
        tmp_path / "data", seq_lens={64, 128}, vocab_size=512, num_tokens=5000, seed=0
    )
    manifest = read_manifest(folder)
    assert manifest.pack("train", 64).num_rows >= 5000 // 64
    assert manifest.pack("held_out", 128).num_rows >= 4
    verify(folder, manifest, content=True)


def test_an_unknown_clock_is_named():
    with pytest.raises(ConfigError, match="clock"):
        own_runs.run(BenchConfig(topic="own_runs", options={"clock": "sun"}))
