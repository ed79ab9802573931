"""The fitter on made-up surfaces, and on published runs whose answer is known."""

import time

import numpy as np
import pytest

from llmtrain import rng
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.envelope import keep_lowest
from llmtrain.planner.loss.fit import FREE, TIED, Variant, bootstrap, fit, non_negative_least_squares

TRUE = laws.find_law("besiroglu2024").form


def grid(sizes=(2e7, 5e7, 1e8, 3e8), ratios=(5, 10, 20, 40, 80)):
    pairs = np.array([(size, size * ratio) for size in sizes for ratio in ratios])
    return pairs[:, 0], pairs[:, 1]


def true_loss(num_params, num_tokens):
    return np.array([laws.parametric_loss(TRUE, n, d) for n, d in zip(num_params, num_tokens, strict=True)])


@pytest.mark.parametrize("exponents", [(0.2, 0.5), (0.34, 0.28), (0.6, 0.25), (0.35, 0.35)])
@pytest.mark.parametrize("entropy", [0.8, 1.7, 3.0])
def test_losses_without_noise_give_the_surface_back(exponents, entropy):
    alpha, beta = exponents
    num_params, num_tokens = grid()
    # as much of each term as a real surface has
    a, b = 0.8 * 1e8**alpha, 0.6 * 2e9**beta
    loss = entropy + a / num_params**alpha + b / num_tokens**beta
    found = fit(num_params, num_tokens, loss)
    assert float(found.params_exponent) == pytest.approx(alpha, rel=1e-3)
    assert float(found.tokens_exponent) == pytest.approx(beta, rel=1e-3)
    assert float(found.entropy) == pytest.approx(entropy, rel=1e-3)
    np.testing.assert_allclose(found.loss(num_params, num_tokens), loss, rtol=1e-6)


def test_the_best_three_coefficients_are_those_of_every_subset_tried_by_hand():
    random = np.random.default_rng(0)
    for _ in range(50):
        design, target = random.normal(size=(8, 3)), random.normal(size=8)
        found, cost = non_negative_least_squares(
            (design.T @ design)[None], (design.T @ target)[None], np.array([target @ target])
        )
        assert (found >= 0).all()
        residual = design @ found[0] - target
        assert residual @ residual == pytest.approx(cost[0], abs=1e-9)
        slope = design.T @ residual  # optimal: zero where positive, not negative where zero
        assert np.abs(slope[found[0] > 0]).max(initial=0) < 1e-6
        assert slope[found[0] == 0].min(initial=0) > -1e-6


def test_a_tied_fit_has_one_exponent():
    found = fit(*grid(), true_loss(*grid()), variant=TIED)
    assert float(found.params_exponent) == float(found.tokens_exponent)


def test_a_prior_pulls_the_exponents_and_more_noise_lets_it():
    num_params, num_tokens = grid()
    loss = true_loss(num_params, num_tokens) * np.exp(np.random.default_rng(0).normal(0, 0.002, 20))
    pulled = [
        float(fit(num_params, num_tokens, loss, variant=Variant(name="p", exponent_prior=0.2), noise=noise)
              .params_exponent)
        for noise in (1e-6, 0.003, 0.1)
    ]  # fmt: skip
    assert pulled[0] == pytest.approx(float(fit(num_params, num_tokens, loss).params_exponent), abs=1e-3)
    assert pulled[0] > pulled[1] > pulled[2]
    assert pulled[2] == pytest.approx(0.2, abs=0.01)


def test_a_bootstrap_of_a_thousand_fits_takes_seconds():
    num_params, flops, loss = laws.read_table("chinchilla_runs.csv").T
    kept = keep_lowest(loss, 5)
    begin = time.process_time()
    many = bootstrap(
        num_params[kept],
        flops[kept] / 6 / num_params[kept],
        loss[kept],
        num_resamples=1000,
        generator=rng.stream(0, "planner", "bootstrap"),
    )
    assert time.process_time() - begin < 10  # measured: 2.5 to 4 s on one core of 2026
    assert np.std(many.tokens_exponent) == pytest.approx(0.0206, rel=0.1)  # Besiroglu's standard error


def test_the_free_variant_is_the_default():
    assert FREE.exponent_prior is None
    assert not FREE.is_tied
