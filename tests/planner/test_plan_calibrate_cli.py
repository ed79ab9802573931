"""`llmtrain plan calibrate`: run folders as `llmtrain train` leaves them, read and refused."""

import json
import subprocess
import sys

import pytest
import yaml

from llmtrain.cli.plan_calibrate import (
    CHECKPOINT_BYTES,
    PlanCalibrateConfig,
    cluster_of,
    folders_of,
    layout_of,
    observation_of,
    ranks_of,
    report_text,
)
from llmtrain.errors import ConfigError, DataError
from llmtrain.planner.calibrate import calibrate, read_calibration
from llmtrain.planner.cost.architecture import num_params
from llmtrain.planner.cost.cluster import ClusterConfig, find_cluster
from llmtrain.tracking.run_data import read_run

H100 = "NVIDIA H100 80GB HBM3"
CLUSTER = find_cluster("h100_sxm_8x")
MODEL = {
    "family": "llama",
    "vocab_size": 32000,
    "num_layers": 22,
    "d_model": 2048,
    "num_heads": 32,
    "num_kv_heads": 4,
    "ffn_width": 5632,
}


def write_run(
    folder,
    *,
    name=None,
    num_steps=10,
    step_s=0.5,
    first_s=2.0,
    data_wait_s=0.0,
    mem_gib=20.0,
    world_size=8,
    device=H100,
    rows=64,
    groups=None,
    attempts=1,
    **facts,
):
    """A run folder of `num_steps` steps a start, the first three of which took `first_s`."""
    folder.mkdir(parents=True)
    groups = groups or {}
    config = {
        "run": {"name": name or folder.name, "folder": str(folder)},
        "data": {"seq_len": 2048},
        "model": MODEL,
        "train": {"micro_batch_rows": 4, "global_batch_rows": rows, "precision": "bf16"}
        | groups.get("train", {}),
        "parallel": {"zero_stage": 1} | groups.get("parallel", {}),
        "save": {"in_background": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    entries, lines, step = [], [], 0
    for attempt in range(1, attempts + 1):
        entries.append({"attempt": attempt, "world_size": world_size, "device": device, **facts})
        lines.append({"kind": "event", "what": "resume", "step": step, "attempt": attempt, "time": 1.0})
        for at in range(num_steps):
            step += 1
            seconds = first_s if at < 3 else step_s
            rate = None if seconds is None else rows * 2048 / seconds
            lines.append(
                {"kind": "step", "step": step, "attempt": attempt, "time": 1.0 + step, "step_s": seconds}
                | {
                    "tokens_per_s": rate,
                    "data_wait_s": data_wait_s,
                    "mem_gib": mem_gib,
                    "position": rows * step,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"format_version": 1, "attempts": entries}))
    return folder


def observed(folder, cluster=CLUSTER):
    return observation_of(read_run(folder), cluster)


def test_a_run_is_its_settled_median_without_the_wait_for_data(tmp_path):
    each = observed(write_run(tmp_path / "a", step_s=0.5, first_s=3.0, data_wait_s=0.1))
    assert each.step_s == pytest.approx(0.4)
    assert each.peak_bytes == 20 * 2**30
    assert (each.name, each.is_resident, each.is_first_rank) == ("a", False, True)


def test_the_last_start_counts(tmp_path):
    assert observed(write_run(tmp_path / "a", attempts=3, num_steps=6)).step_s == pytest.approx(0.5)


def test_a_layout_is_read_from_the_config(tmp_path):
    groups = {
        "train": {"recompute_every": 1, "recompute": "selective", "precision": "bf16"},
        "parallel": {"pp_size": 2, "tp_size": 2, "pp_schedule": "dual_pipe_v", "sequence_parallel": True},
    }
    layout = layout_of(read_run(write_run(tmp_path / "a", groups=groups)), world_size=8)
    assert (layout.pp, layout.vpp, layout.tp, layout.dp, layout.zero_stage) == (2, 2, 2, 2, 1)
    assert (layout.micro_batch_rows, layout.grad_accum) == (4, 8)
    assert (layout.recompute, layout.schedule, layout.sequence_parallel) == ("selective", "dual_pipe_v", True)


def test_on_a_cpu_the_copy_that_a_background_save_holds_is_taken_off(tmp_path):
    cluster = find_cluster("this_machine", peak_tflops=0.1, mem_gbs=10.0, link_gbs=2.0)
    each = observed(
        write_run(tmp_path / "a", device="cpu", world_size=1, groups={"train": {"precision": "fp32"}}),
        cluster,
    )
    assert each.is_resident
    assert each.peak_bytes == pytest.approx(20 * 2**30 - CHECKPOINT_BYTES * num_params(each.arch))


def test_folders_and_patterns_and_folders_of_runs_are_found(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / "runs" / name)
    both = [tmp_path / "runs" / "one", tmp_path / "runs" / "two"]
    assert folders_of([str(tmp_path / "runs")]) == both
    assert folders_of([str(tmp_path / "runs" / "*"), str(both[0])]) == both
    with pytest.raises(DataError, match=r"no folder .*missing; `llmtrain train` makes one"):
        folders_of([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run folder"):
        folders_of([str(tmp_path / "empty")])


def test_more_ranks_than_a_node_has_are_more_nodes():
    assert cluster_of(ClusterConfig(name="h100_sxm_8x"), 20).num_nodes == 3


def test_the_ranks_of_the_last_start_count(tmp_path):
    assert ranks_of(read_run(write_run(tmp_path / "a", world_size=4))) == 4


def test_no_runs_is_a_mistake():
    with pytest.raises(ConfigError, match="give the folder of a run"):
        PlanCalibrateConfig(cluster=ClusterConfig(name="h100_sxm_8x"))


def test_one_run_may_be_given_as_one_value():
    cluster = ClusterConfig(name="h100_sxm_8x")
    assert PlanCalibrateConfig(cluster=cluster, run="a", runs="b").patterns == ["a", "b"]
    assert PlanCalibrateConfig(cluster=cluster, runs=["a", "b"]).patterns == ["a", "b"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"num_steps": 3}, "has 3 steps and none that is settled"),
        ({"step_s": None}, "step_s of step 4 is no time"),
        ({"step_s": -0.5}, "step_s of step 4 is no time"),
        (
            {"device": "NVIDIA A100-SXM4-80GB"},
            r"ran on NVIDIA A100-SXM4-80GB, and cluster=h100_sxm_8x has h100_sxm",
        ),
        ({"device": "cpu"}, "ran on cpu, and cluster=h100_sxm_8x has h100_sxm; name the cluster"),
        ({"groups": {"train": {"recompute_every": 2}}}, "train.recompute_every=2; costs are known for"),
        ({"groups": {"parallel": {"tp_size": 3}}}, "8 ranks with pp, cp and tp of 1, 1 and 3"),
        ({"groups": {"train": {"micro_batch_rows": None}}}, "train.micro_batch_rows=None in its config.yaml"),
    ],
)
def test_runs_that_say_nothing_are_refused_with_the_reason(tmp_path, made, message):
    with pytest.raises(DataError, match=message):
        observed(write_run(tmp_path / "a", **made))


def test_a_run_on_another_cpu_is_refused(tmp_path):
    cluster = find_cluster("this_machine", peak_tflops=0.1, mem_gbs=10.0, link_gbs=2.0)
    folder = write_run(
        tmp_path / "a", device="cpu", cpu="Another CPU", groups={"train": {"precision": "fp32"}}
    )
    with pytest.raises(DataError, match="ran on Another CPU, and this machine, which was measured, is"):
        observed(folder, cluster)


def test_the_table_shows_before_after_and_left_out(tmp_path):
    runs = [
        observed(write_run(tmp_path / name, step_s=seconds, rows=rows))
        for name, seconds, rows in (("a", 0.5, 64), ("b", 0.9, 128))
    ]
    text = report_text(calibrate(runs, program="megatron"))
    lines = text.splitlines()
    assert lines[0].split() == ["run", "measured", "before", "after", "left", "out"]
    assert lines[1].startswith("a  step")
    assert lines[1].count("%") == 3
    assert lines[2].split()[:3] == ["memory", "20", "GiB"]
    assert "all seconds x" in text
    assert "calibrated for: h100_sxm in bf16" in text


def test_the_verb_reads_runs_and_writes_a_file_that_can_be_read(tmp_path):
    write_run(tmp_path / "runs" / "a", step_s=0.5)
    write_run(tmp_path / "runs" / "b", step_s=0.52)
    for copy in ("c", "d"):
        write_run(tmp_path / "runs" / copy, step_s=0.51, name="same")
    done = subprocess.run(
        [
            *[
                sys.executable,
                "-m",
                "llmtrain.cli.main",
                "plan",
                "calibrate",
                "runs=[runs/a,runs/b,runs/c,runs/d]",
            ],
            *["cluster=h100_sxm_8x", "out=c.json", "program=megatron"],
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "written: c.json; use it: llmtrain plan plan.calibration=c.json" in done.stdout
    assert read_calibration(tmp_path / "c.json").runs == ("a", "b", "runs/c", "runs/d")


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llmtrain.cli.main",
            "plan",
            "calibrate",
            "run=missing",
            "cluster=h100_sxm_8x",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no folder missing; `llmtrain train` makes one")
