"""Laws of mixtures of experts and of precision: their formulas at points that can be checked by hand."""

import math

import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.loss.other_data import (
    CLARK,
    DIFFERENT_DATA,
    KRAJEWSKI_DENSE,
    KRAJEWSKI_MOE,
    PRECISION_GAMMA,
    effective_params_at,
    find_clark,
    other_answers,
)


@pytest.mark.parametrize("router", sorted(CLARK))
def test_one_expert_is_the_dense_model_and_more_experts_are_worth_more_until_they_saturate(router):
    law = find_clark(router)
    assert law.saturating(1) == pytest.approx(law.experts_start)
    assert law.equivalent_params(1e8, 1) == pytest.approx(1e8)
    worth = [law.equivalent_params(1e8, experts) for experts in (1, 8, 64, 512)]
    assert worth == sorted(worth)
    assert law.saturating(1e9) == pytest.approx(law.experts_max, rel=1e-3)


def test_clarks_formula_by_hand():
    # S-BASE at N = 1e8, E = 1: log10 L = -0.082 * 8 - 0.108 x + 0.009 * 8 x + 1.104 at x = log10 E_start
    x = math.log10(1.847)
    assert math.log10(CLARK["s_base"].loss(1e8, 1)) == pytest.approx(-0.656 - 0.108 * x + 0.072 * x + 1.104)


def test_routing_helps_a_small_dense_model_more_than_a_large_one():
    law = CLARK["s_base"]
    gains = [law.equivalent_params(size, 64) / size for size in (1e8, 1e9, 1e10)]
    assert gains[0] > gains[1] > gains[2] > 1


def test_finer_experts_lower_krajewskis_loss_and_the_formula_is_the_papers():
    losses = [KRAJEWSKI_MOE.loss(1e9, 2e10, granularity) for granularity in (1, 4, 16)]
    assert losses == sorted(losses, reverse=True)
    by_hand = 0.47 + (2.1 / 4**0.58 + 18.1) / 1e9**0.115 + 30.8 / 2e10**0.147
    assert losses[1] == pytest.approx(by_hand)
    dense = 0.47 + 16.3 / 1e9**0.126 + 26.7 / 2e10**0.127
    assert KRAJEWSKI_DENSE.loss(1e9, 2e10) == pytest.approx(dense)


def test_sixteen_bits_are_worth_almost_all_parameters_and_four_much_less():
    assert 0.995 < effective_params_at(1e9) / 1e9 < 1
    by_hand = 1 - math.exp(-4 / PRECISION_GAMMA["weights"])
    assert effective_params_at(1e9, weights=4) / effective_params_at(1e9) == pytest.approx(by_hand, rel=0.005)
    assert effective_params_at(1e9, weights=4) < effective_params_at(1e9, weights=8)


def test_what_the_laws_cannot_speak_about_is_refused():
    with pytest.raises(ConfigError, match="weights of 2 bits: the law was fitted from 3 to 16 bits"):
        effective_params_at(1e9, weights=2)
    with pytest.raises(ConfigError, match="granularity=0 must be above 0"):
        KRAJEWSKI_MOE.loss(1e9, 2e10, 0)
    with pytest.raises(ConfigError, match=r"unknown router 's_bas'; did you mean 's_base'\?"):
        find_clark("s_bas")


def test_they_say_that_they_are_of_different_data():
    assert DIFFERENT_DATA.startswith("different data: ")


def test_a_plan_is_told_what_mixtures_and_low_precision_would_do():
    answers = other_answers(1e9, 20e9)
    assert [each.source.split()[0] for each in answers] == ["Clark"] * 2 + ["Krajewski"] * 2 + ["Kumar"] * 2
    worth = CLARK["s_base"].equivalent_params(1e9, 64) / 1e9
    assert answers[1].answer == f"as good as a dense model of {worth:.2g} times the size"
    moved = KRAJEWSKI_MOE.loss(1e9, 20e9, 8) - KRAJEWSKI_DENSE.loss(1e9, 20e9)
    assert answers[3].answer.startswith(f"{moved:+.3f} nats")
    bits = effective_params_at(1e9, weights=8, activations=8, kv_cache=8) / 1e9
    assert answers[4].answer == f"worth {bits:.0%} of its parameters; fitted from 30M to 220M parameters"
    assert all("fitted from" in each.answer for each in other_answers(70e9, 2e12) if "Clark" in each.source)
