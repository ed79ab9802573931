"""Models that will serve, and those trained for longer than their optimum."""

import itertools
import math

import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.inference import (
    OVER_VALUED_RATIO,
    RATIOS,
    inference_optimum,
    over_training,
    tokens_for_loss,
)

BESIROGLU = laws.find_law("besiroglu2024").form
SARDANA = laws.Parametric(
    entropy=1.69, params_scale=406.4, tokens_scale=410.7, params_exponent=0.336, tokens_exponent=0.283
)
"""The constants that give the paper's pairs: Hoffmann et al.'s, exponents to three digits."""


@pytest.mark.parametrize(
    ("optimum", "served", "best", "saved"),
    [  # arXiv:2401.00448: parameters and tokens of both, share of all FLOPs
        ((30e9, 1.56e12), 5e12, (16.4e9, 3.27e12), 0.16),
        ((70e9, 4.26e12), 10e12, (41.6e9, 7.92e12), 0.12),
    ],
)
def test_sardanas_examples(optimum, served, best, saved):
    quality = laws.parametric_loss(SARDANA, *optimum)
    found = inference_optimum(SARDANA, inference_tokens=served, loss=quality)
    assert found.optimum.num_params == pytest.approx(optimum[0], rel=0.04)  # 30B and 70B are rounded names
    assert found.best.num_params == pytest.approx(best[0], rel=0.03)
    assert found.best.num_tokens == pytest.approx(best[1], rel=0.03)
    assert found.saved == pytest.approx(saved, abs=0.01)


def test_a_30b_model_that_serves_5t_tokens_is_16_4b_on_3_27t_to_the_printed_digits():
    found = inference_optimum(
        SARDANA, inference_tokens=5e12, loss=laws.parametric_loss(SARDANA, 30e9, 1.56e12)
    )
    assert f"{found.best.num_params / 1e9:.1f}" == "16.4"
    assert f"{found.best.num_tokens / 1e12:.2f}" == "3.27"


def test_nothing_to_serve_leaves_the_training_optimum():
    found = inference_optimum(BESIROGLU, inference_tokens=0, flops=1e21)
    best = laws.optimum(laws.find_law("besiroglu2024"), 1e21)
    assert found.best.num_params == pytest.approx(best.num_params, rel=1e-3)
    assert found.saved == pytest.approx(0, abs=1e-9)


def test_both_reach_the_same_loss_and_no_other_size_is_cheaper():
    found = inference_optimum(BESIROGLU, inference_tokens=2e12, flops=1e22)
    best = found.best
    assert laws.parametric_loss(BESIROGLU, best.num_params, best.num_tokens) == pytest.approx(best.loss)
    assert best.loss == pytest.approx(found.optimum.loss)
    for factor in (0.7, 0.95, 1.05, 1.4):
        size = best.num_params * factor
        tokens = tokens_for_loss(BESIROGLU, size, best.loss)
        assert 6 * size * tokens + 2 * size * 2e12 > best.total_flops


def test_more_to_serve_means_a_smaller_model_and_a_warning_where_laws_overrate_tokens():
    plans = [
        inference_optimum(BESIROGLU, inference_tokens=tokens, flops=1e21) for tokens in (1e11, 1e13, 1e15)
    ]
    sizes = [plan.best.num_params for plan in plans]
    assert sizes[0] > sizes[1] > sizes[2]
    assert plans[0].notes == []
    assert plans[2].best.tokens_per_param > OVER_VALUED_RATIO
    assert "take the saving as an upper bound" in plans[2].notes[0]


def test_a_quality_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"loss=1\.7 is not above the law's entropy 1\.8172"):
        inference_optimum(BESIROGLU, inference_tokens=1e12, loss=1.7)
    with pytest.raises(ConfigError, match="one of training FLOPs and loss"):
        inference_optimum(BESIROGLU, inference_tokens=1e12)
    with pytest.raises(ConfigError, match=r"inference\.tokens=-1 must be a number of at least 0"):
        inference_optimum(BESIROGLU, inference_tokens=-1, flops=1e21)


def test_the_over_training_table_goes_from_20_to_2000_tokens_a_parameter():
    rows = over_training(BESIROGLU, flops=1e21)
    assert [row.tokens_per_param for row in rows] == list(RATIOS)
    assert (RATIOS[0], RATIOS[-1]) == (20, 2000)
    best = laws.optimum(laws.find_law("besiroglu2024"), 1e21)
    quality = laws.parametric_loss(BESIROGLU, best.num_params, best.num_tokens)
    for row in rows:
        assert row.num_tokens / row.num_params == pytest.approx(row.tokens_per_param)
        assert laws.parametric_loss(BESIROGLU, row.num_params, row.num_tokens) == pytest.approx(quality)
        assert row.extra_training == pytest.approx(6 * row.num_params * row.num_tokens / 1e21 - 1)
        assert row.saved_inference == pytest.approx(1 - row.num_params / best.num_params)
        size = math.sqrt(1e21 / 6 / row.tokens_per_param)
        assert row.loss_of_same_flops == pytest.approx(laws.parametric_loss(BESIROGLU, size, 1e21 / 6 / size))
        assert row.penalty == pytest.approx(row.loss_of_same_flops / quality - 1)
    assert [row.is_over_valued for row in rows] == [False] * 6 + [True]


def test_the_further_over_trained_the_more_training_and_the_less_inference():
    rows = over_training(BESIROGLU, flops=1e21)
    for left, right in itertools.pairwise(rows):
        assert left.extra_training < right.extra_training
        assert left.saved_inference < right.saved_inference
        assert left.penalty < right.penalty


def test_a_model_too_small_for_a_loss_never_reaches_it():
    assert tokens_for_loss(BESIROGLU, 1e6, 2.0) == math.inf
