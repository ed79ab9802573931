"""A run beside its plan: before it starts, and while it goes."""

import pytest
import yaml

from llmtrain.planner import config as wishes
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.make import make_plan
from llmtrain.planner.plan import write_plan
from llmtrain.planner.report import experiment_yaml
from llmtrain.planner.runs import forecast_of_run
from llmtrain.tracking.against_plan import against_plan
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.metrics import read_lines
from llmtrain.tracking.recorder import RunRecorder


@pytest.fixture(scope="module")
def plan():
    return make_plan(
        name="trial",
        budget=wishes.BudgetConfig(flops="1e20"),
        model=wishes.ModelWishConfig(vocab_size=32_000),
        data=wishes.DataWishConfig(seq_len=2048),
        inference=wishes.InferenceConfig(),
        choice=wishes.ChoiceConfig(),
        cluster=find_cluster("h100_sxm_8x"),
    ).plan


@pytest.fixture
def config(plan, tmp_path):
    write_plan(tmp_path / "p.json", plan)
    return yaml.safe_load(experiment_yaml(plan, plan_path=tmp_path / "p.json"))


def test_a_run_as_planned_differs_in_nothing_and_hears_what_to_expect(plan, config, tmp_path):
    told = against_plan(tmp_path / "p.json", config)
    assert told.differences == []
    assert told.facts[0].startswith("plan trial: a step of ")


def test_a_run_that_may_not_fit_is_told(config, tmp_path):
    config["train"]["micro_batch_rows"] = config["train"]["global_batch_rows"] // 8
    config["model"]["num_layers"] *= 20
    told = against_plan(tmp_path / "p.json", config)
    assert any(each.startswith("memory: up to ") for each in told.differences), told.differences


def test_a_run_of_other_ranks_hears_why_nothing_is_expected(config, tmp_path):
    config["parallel"]["world_size"], config["train"]["micro_batch_rows"] = 16, 12
    told = against_plan(tmp_path / "p.json", config)
    assert told.facts[0].startswith("plan: nothing to expect of this run: the run has 16 ranks")


def test_plan_records_stand_beside_what_was_measured(plan, config, tmp_path):
    forecast = forecast_of_run(plan, config, world_size=8)
    metrics = tmp_path / "metrics.jsonl"
    with RunRecorder(
        TrackingConfig(wandb=WandbMode.off),
        metrics=metrics,
        attempt=1,
        start_step=0,
        total_steps=10,
        run_name="trial",
        run_config={},
        forecast=forecast,
    ) as recorder:
        for step in range(1, 11):
            seconds = 9.0 if step <= 3 else 2 * forecast.step_s.mid
            recorder.step(step, loss=3.0, step_s=seconds, mem_gib=1.0, tokens=step, tokens_per_s=1.0, lr=1e-3)
        recorder.evaluation(10, eval_loss=2.5, eval_s=1.0)
    first, second, last = [record for record in read_lines(metrics) if record["kind"] == "plan"]
    assert "step_s" not in first, "nothing is measured yet"
    assert first["step_s_mid"] == forecast.step_s.mid
    assert second["step_s_over_plan"] == pytest.approx(2.0), "the first steps of an attempt do not count"
    assert last["eval_loss"] == 2.5
    assert last["mem_gib"] == 1.0
