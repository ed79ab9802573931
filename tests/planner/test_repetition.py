"""Repeated text: the published shape against the published runs, on top of any base law."""

import itertools

import numpy as np
import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.repetition import (
    THEIRS,
    data_limited_optimum,
    effective_params,
    effective_tokens,
    notes,
    published_loss,
    repeated,
    repetition_factor,
    useful_params,
)

BASE = laws.find_law("besiroglu2024").form


def pairs_of_runs():
    """Runs with repeats that were done on new text too: (N, D, unique tokens, D, ratio of losses)."""
    rows = laws.read_table("repeat_runs.csv")
    for left, right in itertools.combinations(rows, 2):
        if (left[:2] == right[:2]).all() and left[2] != right[2]:
            few, many = (left, right) if left[2] < right[2] else (right, left)
            if many[2] >= 0.999 * many[1]:
                yield (*few[:3], many[2], few[3] / many[3])


def test_the_shape_says_what_repeats_cost_in_the_published_pairs_of_runs():
    errors, nothing, tokens_only = [], [], []
    for num_params, num_tokens, few, many, measured in pairs_of_runs():
        factors = [
            repetition_factor(num_params=num_params, num_tokens=num_tokens, unique_tokens=unique)
            for unique in (few, many)
        ]
        errors.append(factors[0] / factors[1] / measured - 1)
        nothing.append(1 / measured - 1)
        seen = [
            laws.parametric_loss(THEIRS, num_params, effective_tokens(num_tokens, unique))
            for unique in (few, many)
        ]
        tokens_only.append(seen[0] / seen[1] / measured - 1)
    assert len(errors) == 28
    assert np.abs(errors).mean() == pytest.approx(0.0042, abs=5e-5)
    assert np.abs(nothing).mean() == pytest.approx(0.0115, abs=5e-5)
    assert np.abs(tokens_only).mean() == pytest.approx(0.0083, abs=5e-5)


def test_the_published_law_itself_is_below_its_own_runs_so_that_only_its_shape_is_used():
    rows = laws.read_table("repeat_runs.csv")
    off = [
        published_loss(THEIRS, num_params=n, num_tokens=d, unique_tokens=u) / loss - 1
        for n, d, u, loss in rows
    ]
    assert -0.12 < np.median(off) < -0.05


def test_up_to_four_epochs_cost_less_than_a_percent_and_forty_cost_much():
    """2.8B parameters on 55B tokens: 2.574 on new text, 2.585 at 3.1 epochs, 2.589 at 3.9."""
    few = repeated(BASE, num_params=2.8e9, num_tokens=55e9, unique_tokens=55e9 / 3.9)
    many = repeated(BASE, num_params=2.8e9, num_tokens=55e9, unique_tokens=55e9 / 44)
    assert 0 < few.penalty < 0.01
    assert many.penalty > 0.1
    assert few.epochs == pytest.approx(3.9)


def test_enough_text_costs_nothing():
    found = repeated(BASE, num_params=1e9, num_tokens=2e10, unique_tokens=1e12)
    assert found.unique_tokens == found.num_tokens == found.effective_tokens
    assert found.penalty == 0
    assert found.loss == laws.parametric_loss(BASE, 1e9, 2e10)
    assert notes(found) == []


def test_effective_tokens_and_parameters_saturate():
    assert effective_tokens(1e10, 1e10) == 1e10
    assert effective_tokens(2e10, 1e10) == pytest.approx(1.968e10, rel=1e-3)  # the second epoch is worth 97%
    assert effective_tokens(1e15, 1e10) == pytest.approx(1e10 * (1 + 15.387756))
    assert effective_params(1e9, 2e9) == 1e9
    assert effective_params(1e15, 1e9) == pytest.approx(1e9 * (1 + 5.309743))


def test_useful_parameters_are_those_whose_optimal_tokens_are_the_unique_ones():
    size = useful_params(BASE, 2e10)
    best = laws.optimum(laws.find_law("besiroglu2024"), 6 * size * 2e10)
    assert best.num_params == pytest.approx(size)


def test_with_text_to_spare_the_best_run_is_the_laws():
    found = data_limited_optimum(BASE, flops=1e21, unique_tokens=1e15)
    best = laws.optimum(laws.find_law("besiroglu2024"), 1e21)
    assert found.num_params == pytest.approx(best.num_params, rel=1e-3)
    assert found.penalty == 0


@pytest.mark.parametrize("unique_tokens", [1e9, 4e9, 1e10, 1.2e11])
def test_no_other_split_of_the_budget_is_better_on_limited_text(unique_tokens):
    found = data_limited_optimum(BASE, flops=1e22, unique_tokens=unique_tokens)
    assert 6 * found.num_params * found.num_tokens == pytest.approx(1e22)
    assert found.epochs == pytest.approx(found.num_tokens / unique_tokens)

    def loss(size):
        return published_loss(BASE, num_params=size, num_tokens=1e22 / 6 / size, unique_tokens=unique_tokens)

    sizes = found.num_params * np.geomspace(0.01, 100, 60)
    assert loss(found.num_params) <= min(map(loss, sizes)) + 1e-9


def test_the_scarcer_the_text_the_smaller_the_model_and_the_higher_the_loss():
    found = [data_limited_optimum(BASE, flops=1e22, unique_tokens=u) for u in (1e11, 1e10, 1e9)]
    assert found[0].num_params > found[1].num_params > found[2].num_params
    assert found[0].loss < found[1].loss < found[2].loss


def test_notes_say_what_repeats_are_worth_and_where_nothing_was_measured():
    found = repeated(BASE, num_params=2.8e9, num_tokens=55e9, unique_tokens=1e9)
    text = notes(found)
    assert "55.0 epochs over 1e+09 unique tokens are worth" in text[0]
    assert text[1].startswith("past 44 epochs nothing was measured")
    far = notes(repeated(BASE, num_params=1e12, num_tokens=1e14, unique_tokens=5e13))
    assert "powers of ten outside the runs with repeats" in far[1]


@pytest.mark.parametrize("unique_tokens", [0, -1e9, float("nan"), float("inf")])
def test_no_text_at_all_is_refused(unique_tokens):
    with pytest.raises(ConfigError, match=r"data\.unique_tokens=.* must be a number above 0"):
        data_limited_optimum(BASE, flops=1e21, unique_tokens=unique_tokens)
    with pytest.raises(ConfigError, match=r"data\.unique_tokens=.* must be a number above 0"):
        repeated(BASE, num_params=1e9, num_tokens=1e10, unique_tokens=unique_tokens)
