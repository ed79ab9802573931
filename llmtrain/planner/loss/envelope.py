"""What own runs say about larger ones: fits under several assumptions, and intervals that hold all of them.

With few runs the data do not settle the exponents, and no one assumption about them is right. On the 16 runs
of OLMo's ladder up to 1.3B parameters a free fit is 2% low at 13B on 5T tokens, alpha = beta 3% low, priors
at 0.30 and 0.34 2% and 4% high (tables/loss/olmo_ladder.csv). So four variants are kept, and an interval
reaches from the lowest 10% point of their bootstraps to the highest 90% point.

A bootstrap knows nothing of a form that is itself a little wrong, and larger runs show that first. So the
dearest quarter of the runs is left out once and foretold from the rest, and what that misses widens every
answer past the runs. Over 26 splits of the six sets in tables/loss into cheap and dear runs, the intervals
then hold 85% of the dear ones; without the widening 66% (docs/planner_laws.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain import rng
from llmtrain.errors import DataError
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.fit import FREE, VARIANTS, ParametricFit, bootstrap, fit
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN, optimal_params

NUM_RESAMPLES = 250
"""Of each variant: 1,000 fits in all."""
ROBUST_DELTA = 1.345
"""Huber's delta in standard deviations of the noise: on normal noise as good as least squares to 5% (Huber
1981, Robust Statistics)."""
LEAST_NOISE = 5e-4
"""Of log loss. Assumed: reruns in tables/loss/olmo_ladder.csv differ by 2e-4 to 3e-4."""
LEAST_RUNS = 7
"""Two more than coefficients."""
LEAST_SPREAD = 2.0
"""Largest over smallest N, and D, below which no exponent is measured. Assumed."""
LEAST_RATIO_SPREAD = 1.5
"""What must remain of D's spread when D follows N, and of N's when N follows D: runs of one tokens-per-
parameter ratio cannot tell A/N^alpha from B/D^beta. Assumed."""
BACK_TEST_SHARE = 0.25
"""Of the runs, those of most compute, at least two."""
USUAL_MISS = 0.012
"""Miss of a back-test when there are too few runs for one: about the median over splits of the six sets in
tables/loss."""
SAME_BUDGET = 0.94
"""Runs of at least this part of the least FLOPs left out are left out too: budgets are met roughly."""
OUTLYING = 5.0
"""Residuals past so many standard deviations of the noise are named."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs as arrays of one length; loss in nats per token at the end of the run."""

    names: tuple[str, ...]
    num_params: np.ndarray
    num_tokens: np.ndarray
    loss: np.ndarray

    def __post_init__(self) -> None:
        """DataError when a fit could not mean anything."""
        count = len(self.names)
        if count < LEAST_RUNS:
            raise DataError(
                f"{count} runs, and a fit of 5 coefficients needs at least {LEAST_RUNS}; add runs"
            )
        for what, values in (("N", self.num_params), ("D", self.num_tokens), ("loss", self.loss)):
            wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if wrong.size:
                listed = ", ".join(f"{self.names[i]} ({values[i]})" for i in wrong[:5])
                raise DataError(
                    f"{wrong.size} of {count} runs have a {what} that is not a number above 0: {listed}; "
                    "leave diverged and unfinished runs out"
                )
        for what, values in (("N", self.num_params), ("D", self.num_tokens)):
            spread = float(values.max() / values.min())
            if spread < LEAST_SPREAD:
                raise DataError(
                    f"no spread in {what}: the largest is {spread:.3g} times the smallest of {count} runs, "
                    f"and its exponent needs at least {LEAST_SPREAD:g}; add runs of another "
                    f"{'size' if what == 'N' else 'length'}"
                )
        left = math.exp(math.sqrt(12) * _residual_spread(np.log(self.num_params), np.log(self.num_tokens)))
        if left < LEAST_RATIO_SPREAD:
            raise DataError(
                f"no spread in D beside N: D follows N to a factor {left:.3g} over {count} runs, so that "
                "A/N^alpha and B/D^beta cannot be told apart; add runs with other tokens per parameter"
            )


@dataclass(frozen=True, kw_only=True)
class VariantFit:
    point: ParametricFit
    resampled: ParametricFit


@dataclass(frozen=True, kw_only=True)
class BackTest:
    """How well the runs of less compute foretell those of most."""

    names: tuple[str, ...]
    """Runs that were left out."""
    num_kept: int
    errors: tuple[float, ...]
    """Foretold loss (the middle of the variants) over the measured one, minus 1, run by run."""
    beyond: float
    """FLOPs of the largest run left out, over the largest one kept."""
    miss: float
    """What 80% of the errors stay below in size."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A fit under every variant."""

    runs: Runs
    noise: float
    """Standard deviation of log loss about the free fit, from the median residual."""
    spread: float
    """What 80% of the runs' residuals of log loss stay below in size."""
    huber_delta: float
    variants: dict[str, VariantFit]
    back_test: BackTest | None
    """None when too few runs would be left."""
    outlying: tuple[str, ...]
    """Runs far off the free fit; they are kept, with the weight that the Huber loss leaves them."""


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """How far a question lies past the runs: factors above 1 past the largest, below 1 under the smallest, 1
    inside."""

    num_params: float
    num_tokens: float
    flops: float


def fit_envelope(
    runs: Runs, *, num_resamples: int = NUM_RESAMPLES, huber_delta: float | None = None, seed: int = 0
) -> Envelope:
    """Fit every variant and its bootstrap.

    Args:
        huber_delta: None: ROBUST_DELTA times the noise. 1e-3 is Hoffmann et al.'s.
    """
    sample = (runs.num_params, runs.num_tokens, runs.loss)
    first = fit(*sample, huber_delta=math.inf)
    noise = _noise(first, runs)
    delta = ROBUST_DELTA * noise if huber_delta is None else huber_delta
    variants = {}
    for variant in VARIANTS:
        point = fit(*sample, variant=variant, huber_delta=delta, noise=noise)
        resampled = bootstrap(
            *sample,
            num_resamples=num_resamples,
            generator=rng.stream(seed, "planner", "bootstrap"),
            variant=variant,
            huber_delta=delta,
            noise=noise,
        )
        variants[variant.name] = VariantFit(point=point, resampled=resampled)
    residual = np.log(variants[FREE.name].point.loss(runs.num_params, runs.num_tokens) / runs.loss)
    far = np.flatnonzero(np.abs(residual) > OUTLYING * noise)
    return Envelope(
        runs=runs,
        noise=noise,
        spread=max(LEAST_NOISE, _for_lost_freedom(runs) * float(np.quantile(np.abs(residual), 0.8))),
        huber_delta=delta,
        variants=variants,
        back_test=_back_test(runs, huber_delta=huber_delta),
        outlying=tuple(f"{runs.names[i]} ({math.expm1(-residual[i]):+.1%})" for i in far),
    )


def loss_interval(envelope: Envelope, num_params: float, num_tokens: float) -> Interval:
    """Loss of a run: the lowest end of the variants' intervals, the middle of their fits, the highest end."""
    intervals = variant_intervals(envelope, num_params, num_tokens).values()
    return Interval(
        low=min(each.low for each in intervals),
        mid=float(np.median([each.mid for each in intervals])),
        high=max(each.high for each in intervals),
    )


def variant_intervals(envelope: Envelope, num_params: float, num_tokens: float) -> dict[str, Interval]:
    """Each variant's own interval: the 10% and 90% points of its bootstrap, joined in squares with the spread
    of single runs and, past the runs, with what the back-test missed."""
    apart = envelope.spread
    beyond = extrapolation(envelope.runs, num_params, num_tokens)
    if max(beyond.num_params, beyond.num_tokens, beyond.flops) > 1:
        apart = math.hypot(apart, USUAL_MISS if envelope.back_test is None else envelope.back_test.miss)
    found = {}
    for name, each in envelope.variants.items():
        low, high = np.quantile(each.resampled.loss(num_params, num_tokens), (0.1, 0.9))
        mid = float(each.point.loss(num_params, num_tokens))
        found[name] = Interval(
            low=mid - math.hypot(max(0.0, mid - low), apart * mid),
            mid=mid,
            high=mid + math.hypot(max(0.0, high - mid), apart * mid),
        )
    return found


def optimum_interval(envelope: Envelope, flops: float) -> Interval:
    """N of the optimum at `flops`: the lowest 10% point of all bootstraps, the middle of the variants' fits,
    the highest 90% point. D is C/6N."""
    lows, mids, highs = [], [], []
    for each in envelope.variants.values():
        sizes = optimal_params(each.resampled, flops)
        lows.append(float(np.quantile(sizes, 0.1)))
        highs.append(float(np.quantile(sizes, 0.9)))
        mids.append(float(optimal_params(each.point, flops)))
    mid = float(np.exp(np.median(np.log(mids))))
    return Interval(low=min(*lows, mid), mid=mid, high=max(*highs, mid))


def extrapolation(runs: Runs, num_params: float, num_tokens: float) -> Extrapolation:
    flops = FLOPS_PER_PARAM_TOKEN * runs.num_params * runs.num_tokens
    return Extrapolation(
        num_params=_factor(num_params, runs.num_params),
        num_tokens=_factor(num_tokens, runs.num_tokens),
        flops=_factor(FLOPS_PER_PARAM_TOKEN * num_params * num_tokens, flops),
    )


def keep_lowest(losses: Sequence[float] | np.ndarray, drop_highest: int) -> np.ndarray:
    """Positions of all but the `drop_highest` highest losses, in order."""
    values = np.asarray(losses)
    return np.sort(np.argsort(values, kind="stable")[: max(0, len(values) - drop_highest)])


def chosen_runs(runs: Runs, positions: np.ndarray) -> Runs:
    return Runs(
        names=tuple(runs.names[i] for i in positions),
        num_params=runs.num_params[positions],
        num_tokens=runs.num_tokens[positions],
        loss=runs.loss[positions],
    )


def _back_test(runs: Runs, *, huber_delta: float | None) -> BackTest | None:
    """Foretell the dearest BACK_TEST_SHARE of the runs, whole budgets at a time, from the others."""
    flops = FLOPS_PER_PARAM_TOKEN * runs.num_params * runs.num_tokens
    dearest = np.argsort(flops, kind="stable")[-max(2, round(len(flops) * BACK_TEST_SHARE)) :]
    is_out = flops >= SAME_BUDGET * flops[dearest[0]]
    try:
        kept = chosen_runs(runs, np.flatnonzero(~is_out))
    except DataError:
        return None
    sample = (kept.num_params, kept.num_tokens, kept.loss)
    noise = _noise(fit(*sample, huber_delta=math.inf), kept)
    delta = ROBUST_DELTA * noise if huber_delta is None else huber_delta
    out = np.flatnonzero(is_out)
    foretold = np.median(
        [
            fit(*sample, variant=variant, huber_delta=delta, noise=noise).loss(
                runs.num_params[out], runs.num_tokens[out]
            )
            for variant in VARIANTS
        ],
        axis=0,
    )
    errors = foretold / runs.loss[out] - 1
    return BackTest(
        names=tuple(runs.names[i] for i in out),
        num_kept=len(kept.names),
        errors=tuple(map(float, errors)),
        beyond=float(flops.max() / flops[~is_out].max()),
        miss=float(np.quantile(np.abs(errors), 0.8)),
    )


def _noise(found: ParametricFit, runs: Runs) -> float:
    """1.4826 times the median residual: a normal distribution's standard deviation."""
    residual = np.log(found.loss(runs.num_params, runs.num_tokens) / runs.loss)
    return max(LEAST_NOISE, 1.4826 * float(np.median(np.abs(residual))) * _for_lost_freedom(runs))


def _for_lost_freedom(runs: Runs) -> float:
    """What residuals about a fit of 5 coefficients are too small by."""
    count = len(runs.names)
    return math.sqrt(count / (count - 5))


def _residual_spread(left: np.ndarray, right: np.ndarray) -> float:
    """Standard deviation of what neither logarithm says about the other, the smaller of both directions."""
    correlation = float(np.corrcoef(left, right)[0, 1])
    return float(min(left.std(), right.std())) * math.sqrt(max(0.0, 1 - correlation**2))


def _factor(value: float, values: np.ndarray) -> float:
    return float(max(value / values.max(), 1.0) if value >= values.min() else value / values.min())
