"""The runs of a ladder: what they are, what they cost, and that a fit can be made of them."""

import json

import pytest
import yaml

from llmtrain.errors import ConfigError
from llmtrain.model.size import flops_per_token
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.ladder import (
    Devices,
    experiment_yaml,
    judge,
    ladder_json,
    make_ladder,
    sweep_script,
)

DEVICES = Devices(
    name="h100_sxm",
    num_devices=8,
    peak_flops=989e12,
    peak_source="a test",
    utilization=Interval(low=0.2, mid=0.4, high=0.5),
    precision="bf16",
)


def ladder_of(**changes):
    asked = {
        "name": "ladder",
        "sizes": (2e7, 4e7, 8e7),
        "ratios": (10.0, 20.0, 40.0),
        "vocab_size": 8192,
        "seq_len": 512,
        "devices": DEVICES,
    }
    return make_ladder(**(asked | changes))


def test_every_size_meets_every_ratio_and_the_cheapest_comes_first():
    ladder = ladder_of()
    assert len(ladder.rungs) == 9
    costs = [rung.flops for rung in ladder.rungs]
    assert costs == sorted(costs)
    sizes = sorted({rung.num_params for rung in ladder.rungs})
    assert sizes == pytest.approx([2e7, 4e7, 8e7], rel=0.1)
    for rung in ladder.rungs:
        nearest = min((10, 20, 40), key=lambda ratio: abs(ratio - rung.tokens_per_param))
        assert rung.tokens_per_param == pytest.approx(nearest, rel=0.01)
        assert rung.num_tokens % (rung.recipe.global_batch_rows * 512) == 0
        assert rung.recipe.global_batch_rows % 8 == 0, "eight ranks share a batch"


def test_its_cost_is_the_sum_of_its_runs():
    ladder = ladder_of()
    assert ladder.flops == sum(
        flops_per_token(rung.model, 512, convention="palm") * rung.num_tokens for rung in ladder.rungs
    )
    hours = ladder.device_hours
    assert hours.mid == pytest.approx(ladder.flops / (0.4 * 989e12) / 3600)
    assert (hours.low, hours.high) == pytest.approx((hours.mid * 0.4 / 0.5, hours.mid * 2))
    seconds = sum(ladder.seconds(rung).mid for rung in ladder.rungs)
    assert seconds * 8 / 3600 == pytest.approx(hours.mid), "device-hours are of all eight"


def test_a_budget_scales_all_sizes_by_one_factor():
    ladder = ladder_of(budget_flops=1e19)
    assert ladder.flops == pytest.approx(1e19, rel=0.25)  # shapes come in steps, and heads cost more than 6ND
    sizes = sorted({rung.num_params for rung in ladder.rungs})
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.15)
    assert sizes[2] / sizes[1] == pytest.approx(2, rel=0.15)


def test_runs_that_no_fit_could_use_are_refused_before_they_are_trained():
    with pytest.raises(ConfigError, match=r"tokens_per_param=\[20\] is no ladder: no spread in D beside N"):
        ladder_of(sizes=(1e7, 2e7, 3e7, 5e7, 8e7, 1.2e8, 2e8), ratios=(20.0,))
    with pytest.raises(ConfigError, match="is no ladder: 4 runs, and a fit of 5 coefficients needs"):
        ladder_of(sizes=(2e7, 4e7), ratios=(10.0, 20.0))
    with pytest.raises(ConfigError, match=r"sizes 4e\+07 and 4\.01e\+07 both give a shape of .*spread sizes"):
        ladder_of(sizes=(2e7, 4e7, 4.01e7))


def test_a_larger_run_is_foretold_within_the_interval_if_a_published_law_were_true():
    ladder = ladder_of(sizes=(2e7, 4e7, 8e7, 1.6e8), ratios=(10.0, 20.0, 40.0, 80.0))
    reach = judge(ladder, num_params=3e9, num_tokens=6e10)
    form = laws.find_law("besiroglu2024").form
    assert reach.true_loss == laws.parametric_loss(form, 3e9, 6e10)
    assert reach.loss.low < reach.true_loss < reach.loss.high
    assert reach.share_of_cost == pytest.approx(ladder.flops / (6 * 3e9 * 6e10))
    assert reach.flops_beyond > 10


def test_an_experiment_says_what_the_rung_is():
    rung = ladder_of().rungs[0]
    text = experiment_yaml(rung, DEVICES)
    assert text.startswith("# @package _global_\n")
    found = yaml.safe_load(text)
    assert found["run"]["name"] == rung.name
    assert found["train"]["total_tokens"] == rung.num_tokens
    assert found["train"]["device_peak_tflops"] == 989
    assert found["train"]["eval_every_steps"] == rung.recipe.num_steps // 10
    assert found["model"]["d_model"] == rung.model.d_model
    assert found["schedule"] == {"kind": "cosine", "warmup_tokens": rung.recipe.warmup_tokens}
    assert found["optimizer"]["peak_lr"] == rung.recipe.peak_lr


def test_the_script_trains_every_rung_and_fits_what_they_left(tmp_path):
    ladder = ladder_of()
    text = sweep_script(ladder, out=tmp_path / "a b")
    assert text.startswith("#!/bin/sh\n")
    for rung in ladder.rungs:
        assert rung.name in text
    assert f"--config-dir '{tmp_path}/a b'" in text
    assert "hydra.sweep.dir=runs/ladder 'hydra.sweep.subdir=${run.name}'" in text
    assert text.rstrip().endswith("llmtrain plan fit runs=runs/ladder")


def test_its_json_has_every_run_with_its_cost():
    ladder = ladder_of()
    found = json.loads(ladder_json(ladder))
    assert [row["name"] for row in found["runs"]] == [rung.name for rung in ladder.rungs]
    assert found["flops"] == ladder.flops
    assert found["device_hours"]["mid"] == ladder.device_hours.mid
    assert found["devices"]["name"] == "h100_sxm"
