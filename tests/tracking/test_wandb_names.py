"""docs/wandb.md's table is what a run logs: no name more, no name less."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from data_folder import train_arguments, write_data_folder
from wandb_file import records_of
from wandb_table import names

from llmtrain.planner import config as wishes
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.make import make_plan
from llmtrain.planner.plan import write_plan
from llmtrain.planner.report import experiment_yaml
from llmtrain.planner.runs import forecast_of_run
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.metrics import read_lines
from llmtrain.tracking.recorder import RunRecorder
from llmtrain.tracking.wandb_rows import Rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run, tracked offline, whose device's peak is said to be known."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data_folder(folder / "data")
    arguments = train_arguments(
        data,
        folder / "run",
        "tracking.wandb=offline",
        "tracking.wandb_finish_timeout_s=60",
        "tracking.log_every_steps=4",
        "model.num_layers=3",  # so that every third of the depth has a block
        "model.tie_embeddings=false",
        "train.device_peak_tflops=0.1",
        "train.device_peak_source=invented",
    )
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def names_of(records):
    rows = Rows(run_name="any")
    fields = {name for record in records for name in rows.take(record).fields}
    return {"events/*" if name.startswith("events/") else name for name in fields} - {"_timestamp"}


def plan_records(folder):
    """What a run with a plan records of it."""
    plan = make_plan(
        name="trial",
        budget=wishes.BudgetConfig(flops="1e20"),
        model=wishes.ModelWishConfig(vocab_size=32_000),
        data=wishes.DataWishConfig(seq_len=2048),
        inference=wishes.InferenceConfig(),
        choice=wishes.ChoiceConfig(),
        cluster=find_cluster("h100_sxm_8x"),
    ).plan
    write_plan(folder / "p.json", plan)
    config = yaml.safe_load(experiment_yaml(plan, plan_path=folder / "p.json"))
    with RunRecorder(
        TrackingConfig(wandb=WandbMode.off),
        metrics=folder / "metrics.jsonl",
        attempt=1,
        start_step=0,
        total_steps=5,
        run_name="trial",
        run_config={},
        forecast=forecast_of_run(plan, config, world_size=8),
    ) as recorder:
        for step in range(1, 6):
            recorder.step(step, step_s=0.5, mem_gib=1.0)
        recorder.evaluation(5, eval_loss=2.5)
    return [record for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "plan"]


def of_several():
    """Names of what only several ranks or sources log: tests/train/test_hang_runs.py and test_elastic.py."""
    return {name for name in names() if name.startswith(("ranks/", "mixture/"))}


def test_the_table_is_what_a_run_logs(trained, tmp_path):
    records = read_lines(trained / "metrics.jsonl")
    undone = {"kind": "event", "what": "resume", "step": 4, "attempt": 2, "time": records[-1]["time"]}
    found = names_of([*records, undone]) | names_of(plan_records(tmp_path))
    assert found == names().keys() - of_several()


def test_norms_by_group_and_memory_by_component_add_up_to_the_step(trained):
    records = read_lines(trained / "metrics.jsonl")
    steps = {record["step"]: record for record in records if record["kind"] == "step"}
    grads = [record for record in records if record["kind"] == "grads"]
    assert [record["step"] for record in grads] == [4, 8, 12]
    for record in grads:
        squares = sum(record[kind] ** 2 for kind in ("embedding", "attention", "mlp", "norm", "head"))
        assert squares == pytest.approx(steps[record["step"]]["grad_norm"] ** 2, rel=1e-6)
    memory = [record for record in records if record["kind"] == "memory"]
    assert [record["step"] for record in memory] == [1, 6, 12]
    for record in memory:
        parts = [record[f"{part}_gib"] for part in ("weights", "gradients", "optimizer", "rest")]
        assert sum(parts) == pytest.approx(steps[record["step"]]["mem_gib"], rel=1e-6)
        assert min(parts) > 0


def test_w_and_b_has_these_names_and_no_other(trained):
    (path,) = (trained / "wandb").glob("offline-run-*/*.wandb")
    rows = [record["item"] for record in records_of(path, "history")]
    sent = {name for row in rows for name in row if not name.startswith("_")}
    assert {"events/*" if name.startswith("events/") else name for name in sent} == names_of(
        read_lines(trained / "metrics.jsonl")
    )
    assert {"train/loss", "train/mfu", "eval/loss", "checkpoint/save_s", "run/goodput"} <= sent


def test_without_a_known_peak_mfu_is_left_out():
    record = {"kind": "step", "step": 1, "attempt": 1, "time": 1.0, "loss": 2.0, "mfu": None}
    assert "train/mfu" not in Rows(run_name="any").take(record).fields
