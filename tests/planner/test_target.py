"""Wishes to parameters and tokens."""

import math

import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.inference import inference_optimum
from llmtrain.planner.target import Wishes, choose_target, resolve_law

BESIROGLU = laws.find_law("besiroglu2024")


def target(**wishes):
    return choose_target(BESIROGLU, Wishes(**wishes))


def test_a_law_may_be_named_by_its_beginning():
    assert resolve_law("besiroglu") is BESIROGLU
    assert resolve_law("llama3_2024").name == "llama3_2024", "a whole name wins over longer ones"
    with pytest.raises(ConfigError, match=r"plan\.law=hoffmann is the beginning of several: hoffmann2022_"):
        resolve_law("hoffmann")
    with pytest.raises(ConfigError, match="unknown law 'besirogl0'; did you mean 'besiroglu2024'"):
        resolve_law("besirogl0")


def test_flops_alone_give_the_laws_optimum():
    found, best = target(flops=1e21), laws.optimum(BESIROGLU, 1e21)
    assert found.num_params == best.num_params
    assert found.num_tokens == pytest.approx(best.num_tokens)
    assert found.served is None
    assert found.repeated is None


@pytest.mark.parametrize("given", [{"num_params": 7e9}, {"num_tokens": 3e11}])
def test_what_is_given_stays_and_the_other_is_the_optimum_beside_it(given):
    found = target(**given)
    for name, value in given.items():
        assert getattr(found, name) == value
    best = laws.optimum(BESIROGLU, found.flops)
    assert found.num_params == pytest.approx(best.num_params, rel=1e-6)
    assert found.num_tokens == pytest.approx(best.num_tokens, rel=1e-6)


@pytest.mark.parametrize("given", [{"num_params": 1e9}, {"num_tokens": 2e11}])
def test_a_budget_and_one_of_both_give_the_other(given):
    found = target(flops=1e21, **given)
    assert 6 * found.num_params * found.num_tokens == pytest.approx(1e21)


def test_serving_keeps_the_training_flops_and_is_the_cheapest_of_its_quality():
    found = target(flops=1e21, inference_tokens=2e12)
    assert found.flops == pytest.approx(1e21, rel=1e-6)
    assert found.num_params < target(flops=1e21).num_params
    assert found.served is not None
    assert found.served.best.num_params == pytest.approx(found.num_params, rel=1e-4)
    again = inference_optimum(BESIROGLU.form, inference_tokens=2e12, loss=found.served.best.loss)
    assert again.best.num_params == pytest.approx(found.num_params, rel=1e-3)
    assert any("serving bends the run to" in note for note in found.notes)


def test_few_tokens_to_serve_change_little():
    assert target(flops=1e21, inference_tokens=1e6).num_params == pytest.approx(
        target(flops=1e21).num_params, rel=1e-3
    )


def test_little_text_asks_for_another_size_and_says_what_repeats_cost():
    alone, limited = target(flops=1e23), target(flops=1e23, unique_tokens=2e10)
    assert limited.flops == pytest.approx(1e23, rel=1e-6)
    assert limited.num_params != pytest.approx(alone.num_params, rel=0.01)
    assert limited.repeated is not None
    assert limited.repeated.epochs > 10
    assert limited.repeated.loss > limited.repeated.loss_if_unique


def test_text_that_suffices_changes_nothing():
    found = target(flops=1e21, unique_tokens=1e12)
    assert found.num_params == target(flops=1e21).num_params
    assert found.repeated is None


def test_a_law_without_losses_takes_the_defaults_and_says_so():
    found = choose_target(resolve_law("llama3_2024"), Wishes(flops=1e21, inference_tokens=1e12))
    assert any("llama3_2024 says nothing about losses" in note for note in found.notes)


def test_serving_beside_given_sizes_is_shown_and_changes_nothing():
    found = target(num_params=7e9, num_tokens=1e12, inference_tokens=1e12)
    assert (found.num_params, found.num_tokens) == (7e9, 1e12)
    assert any("inference.tokens changes nothing here" in note for note in found.notes)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({}, "nothing says how large the run is; give one of budget.flops"),
        ({"flops": 1e21, "num_params": 1e9, "num_tokens": 1e10}, "fix the same thing twice"),
    ],
)
def test_too_few_and_too_many_wishes_are_refused(wishes, message):
    with pytest.raises(ConfigError, match=message):
        target(**wishes)


def test_every_law_answers_for_every_wish():
    for law in laws.LAWS.values():
        for wishes in (Wishes(flops=1e22), Wishes(num_params=1e9), Wishes(num_tokens=1e11)):
            found = choose_target(law, wishes)
            assert math.isfinite(found.num_params), law.name
            assert found.num_params > 1e6, law.name
            assert found.num_tokens > 1e6, law.name
