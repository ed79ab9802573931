"""A run's config as the planner sees it, and beside a plan."""

import copy
import re

import pytest
import yaml

from llmtrain.errors import ConfigError
from llmtrain.planner import config as wishes
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.make import make_plan
from llmtrain.planner.report import experiment_yaml
from llmtrain.planner.runs import differences, forecast_of_run, layout_of, model_of


@pytest.fixture(scope="module")
def plan():
    planned = make_plan(
        name="trial",
        budget=wishes.BudgetConfig(flops="1e20"),
        model=wishes.ModelWishConfig(vocab_size=32_000),
        data=wishes.DataWishConfig(seq_len=2048),
        inference=wishes.InferenceConfig(),
        choice=wishes.ChoiceConfig(),
        cluster=find_cluster("h100_sxm_8x"),
    )
    return planned.plan


@pytest.fixture
def config(plan, tmp_path):
    """The plan's own experiment, as a run would resolve it."""
    return yaml.safe_load(experiment_yaml(plan, plan_path=tmp_path / "p.json"))


def changed(config, **settings):
    made = copy.deepcopy(config)
    for name, value in settings.items():
        section, key = name.split("__")
        made[section][key] = value
    return made


def test_a_plans_experiment_is_the_plans_layout_and_model(plan, config):
    assert layout_of(config, world_size=8) == plan.choice.layout
    assert model_of(config) == plan.choice.model
    assert differences(plan, config, world_size=8) == []
    assert forecast_of_run(plan, config, world_size=8) == plan.forecast


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model__num_layers": 3}, "model: .* parameters where the plan has .*: num_layers=3 \\(plan "),
        ({"train__total_tokens": 1}, "train.total_tokens=1, and the plan has "),
        ({"optimizer__peak_lr": 1.0}, "optimizer.peak_lr=1, and the plan has "),
        ({"parallel__zero_stage": 3}, "layout: .*ZeRO 3.*; the plan has .*ZeRO"),
        ({"parallel__world_size": 4}, "4 ranks, and the plan's cluster has 8 GPUs"),
        ({"schedule__kind": "constant"}, "schedule.kind=constant, and the plan has cosine"),
        ({"parallel__tp_size": 3}, "8 ranks are not a multiple of pp \\* cp \\* tp = 3"),
        ({"train__micro_batch_rows": 7}, "is not a multiple of dp \\* train.micro_batch_rows = "),
    ],
)
def test_what_is_not_as_planned_is_told(plan, config, settings, told):
    found = differences(plan, changed(config, **settings), world_size=None)
    assert any(re.search(told, each) for each in found), found


def test_recomputation_and_the_v_schedule_are_read(config):
    some = changed(config, train__recompute_every=1, train__recompute="selective", train__micro_batch_rows=1)
    assert layout_of(some, world_size=8).recompute == "selective"
    piped = changed(some, parallel__pp_size=2, parallel__pp_schedule="dual_pipe_v")
    assert layout_of(piped, world_size=8).vpp == 2


def test_ranks_that_do_not_divide_are_refused(config):
    with pytest.raises(ConfigError, match=r"2 ranks are not a multiple of pp \* cp \* tp = 4"):
        layout_of(changed(config, parallel__tp_size=4), world_size=2)


def test_an_older_runs_config_has_the_defaults(config):
    older = copy.deepcopy(config)
    del older["parallel"], older["train"]["recompute_every"]
    assert layout_of(older, world_size=8).zero_stage == 1
