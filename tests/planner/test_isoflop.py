"""IsoFLOP parabolas: where they find the optimum, where they are moved, and that they say so."""

import numpy as np
import pytest

from llmtrain import rng
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.fit import fit
from llmtrain.planner.loss.isoflop import isoflop

TRUE = laws.find_law("besiroglu2024").form


def true_loss(num_params, num_tokens):
    return np.array([laws.parametric_loss(TRUE, n, d) for n, d in zip(num_params, num_tokens, strict=True)])


def isoflop_runs(*, shift):
    """Seven sizes a budget over a factor 16, their middle at the optimum times `shift`."""
    rows = []
    for flops in (1e18, 1e19, 1e20):
        best = laws.optimum(laws.find_law("besiroglu2024"), flops).num_params * shift
        rows += [(size, flops / 6 / size) for size in best * np.geomspace(0.25, 4, 7)]
    num_params, num_tokens = np.array(rows).T
    return num_params, num_tokens, true_loss(num_params, num_tokens)


def test_centred_parabolas_find_the_exponent():
    found = isoflop(*isoflop_runs(shift=1.0), num_resamples=50, generator=rng.stream(0, "test"))
    assert len(found.parabolas) == 3
    assert found.exponent.mid == pytest.approx(0.3658 / (0.3478 + 0.3658), abs=0.01)
    assert found.notes() == []


def test_parabolas_that_are_sampled_off_centre_say_so_and_by_how_much_they_are_moved():
    runs = isoflop_runs(shift=2.5)
    surface = fit(*runs)
    found = isoflop(*runs, num_resamples=50, generator=rng.stream(0, "test"), surface=surface)
    assert len(found.notes()) == 3
    assert "sampled off-centre, too large" in found.notes()[0]
    for each in found.parabolas:
        truth = laws.optimum(laws.find_law("besiroglu2024"), each.flops).num_params
        assert each.shift == pytest.approx(each.num_params.mid / truth, abs=0.02)


def test_a_budget_without_a_minimum_between_its_sizes_is_left_out_and_named():
    found = isoflop(*isoflop_runs(shift=12.0), num_resamples=10, generator=rng.stream(0, "test"))
    assert found.parabolas == []
    assert len(found.refused) == 3
    assert "has its minimum outside the sizes" in found.refused[0]


def test_runs_without_a_shared_budget_have_no_parabolas():
    grid = np.array([(size, size * ratio) for size in (2e7, 5e7, 1e8) for ratio in (5, 11, 23)]).T
    assert isoflop(*grid, true_loss(*grid), num_resamples=5, generator=rng.stream(0, "test")) is None


@pytest.mark.parametrize(
    ("data_set", "low", "high"),
    [(0, 2.5e9, 3.7e9), (1, 2.7e9, 4.7e9), (2, 2.7e9, 4.7e9), (3, 2.7e9, 4.7e9)],
)
def test_published_isoflop_sets_ask_for_about_3b_at_1e21(data_set, low, high):
    """Parabola minima at 1e21 of the whole collection: 3.1B (Chinchilla), 3.4B to 3.9B (Marin); exponents
    0.43 to 0.54."""
    table = laws.read_table("isoflop_runs.csv")
    rows = table[table[:, 0] == data_set]
    found = isoflop(*rows[:, 2:].T, num_resamples=100, generator=rng.stream(0, "test"))
    assert low < found.coefficient * 1e21**found.exponent.mid < high
    assert 0.4 < found.exponent.mid < 0.57
    assert found.exponent.low < found.exponent.mid < found.exponent.high
    for each in found.parabolas:
        assert each.num_params.low < each.num_params.mid < each.num_params.high


def test_an_interval_of_a_vertex_grows_with_the_noise():
    num_params, num_tokens, loss = isoflop_runs(shift=1.0)
    widths = []
    for noise in (1e-4, 1e-3, 3e-3):
        noisy = loss * np.exp(np.random.default_rng(0).normal(0, noise, len(loss)))
        found = isoflop(num_params, num_tokens, noisy, num_resamples=200, generator=rng.stream(0, "test"))
        widths.append(np.mean([np.log(p.num_params.high / p.num_params.low) for p in found.parabolas]))
    assert widths[0] < widths[1] < widths[2]
