"""Training on less unique text than tokens: what repeated tokens are worth.

Muennighoff et al. 2023 (arXiv:2305.16264, equation 5 and section 6) replace D and N of a law by effective
ones: tokens seen again decay in worth with R_D*, parameters past what the unique tokens can use with R_N*.

    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*))    U_D unique tokens, R_D = D / U_D - 1 repeats
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*))    U_N = min(N, the optimal N for U_D), R_N = N / U_N - 1

Only the shape is used: the loss of any base law times what their law says repeats cost, L(N', D' for U_D)
over L(N', D' for U_D = D). Their law itself is 5 to 12% below the losses of their own runs; for the 28 runs
of tables/loss/repeat_runs.csv that were done on new text too, this factor is off by 0.42% in the mean,
"repeats cost nothing" by 1.15%, and D' without N' by 0.83%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.errors import ConfigError
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN, FittedRange, Parametric, parametric_loss

THEIRS = Parametric(
    entropy=math.exp(0.6254804),
    params_scale=math.exp(6.255414),
    tokens_scale=math.exp(7.3049974),
    params_exponent=0.3526596,
    tokens_exponent=0.3526596,
)
"""Their base law, for the shape alone: 182 runs, huggingface/datablations@1370131
utils/parametric_fit.ipynb."""
TOKENS_DECAY = 15.387756
"""R_D*: huggingface/datablations@1370131 utils/parametric_fit.ipynb, unrounded."""
PARAMS_DECAY = 5.309743
"""R_N*, from the same place."""
FITTED = FittedRange(num_params=(8.27e7, 8.67e9), num_tokens=(4e9, 9e11))
"""tables/loss/repeat_runs.csv; the largest number of epochs there is 14.5."""
MOST_EPOCHS = 44.0
"""Longest run of the paper, on 4e9 unique tokens; past it the shape was never seen."""
CHEAP_EPOCHS = 4.0
"""Up to here a repeated token is worth almost a new one (section 1)."""
GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A run that repeats its text."""

    num_params: float
    num_tokens: float
    unique_tokens: float
    """At most num_tokens."""
    effective_tokens: float
    """New tokens that the run's are worth, by D'."""
    loss: float
    loss_if_unique: float
    """Of the same run on new tokens only."""

    @property
    def epochs(self) -> float:
        return self.num_tokens / self.unique_tokens

    @property
    def penalty(self) -> float:
        """The loss over that of the same run on new tokens only, minus 1."""
        return self.loss / self.loss_if_unique - 1


def effective_tokens(num_tokens: float, unique_tokens: float) -> float:
    """D': at most (1 + R_D*) times the unique tokens, whatever is spent."""
    unique = min(num_tokens, unique_tokens)
    return unique * (1 + TOKENS_DECAY * -math.expm1(-(num_tokens / unique - 1) / TOKENS_DECAY))


def effective_params(num_params: float, useful_params: float) -> float:
    """N', of which `useful_params` is what the unique tokens can use."""
    useful = min(num_params, useful_params)
    return useful * (1 + PARAMS_DECAY * -math.expm1(-(num_params / useful - 1) / PARAMS_DECAY))


def useful_params(form: Parametric, unique_tokens: float) -> float:
    """The N whose optimal D under `form` is `unique_tokens`: alpha A N^-alpha = beta B D^-beta."""
    ratio = (form.params_exponent * form.params_scale) / (form.tokens_exponent * form.tokens_scale)
    return float((ratio * unique_tokens**form.tokens_exponent) ** (1 / form.params_exponent))


def published_loss(form: Parametric, *, num_params: float, num_tokens: float, unique_tokens: float) -> float:
    """L(N', D'), equation 5 with the coefficients of `form`.

    A run without repeats but larger than its tokens can use is penalised too, against `form` itself.
    """
    unique = min(unique_tokens, num_tokens)
    params = effective_params(num_params, useful_params(form, unique))
    return parametric_loss(form, params, effective_tokens(num_tokens, unique))


def repetition_factor(*, num_params: float, num_tokens: float, unique_tokens: float) -> float:
    """What repeats multiply the loss with: 1 without any."""
    again, new = (
        published_loss(THEIRS, num_params=num_params, num_tokens=num_tokens, unique_tokens=unique)
        for unique in (unique_tokens, num_tokens)
    )
    return max(1.0, again / new)


def repeated(form: Parametric, *, num_params: float, num_tokens: float, unique_tokens: float) -> Repeated:
    """Return the loss under `form` of a run that has only `unique_tokens` different ones."""
    if not (unique_tokens > 0 and math.isfinite(unique_tokens)):
        raise ConfigError(f"data.unique_tokens={unique_tokens:g} must be a number above 0")
    unique = min(unique_tokens, num_tokens)
    factor = repetition_factor(num_params=num_params, num_tokens=num_tokens, unique_tokens=unique)
    new = parametric_loss(form, num_params, num_tokens)
    return Repeated(
        num_params=num_params,
        num_tokens=num_tokens,
        unique_tokens=unique,
        effective_tokens=effective_tokens(num_tokens, unique),
        loss=new * factor,
        loss_if_unique=new,
    )


def data_limited_optimum(form: Parametric, *, flops: float, unique_tokens: float) -> Repeated:
    """Return the best N and D of 6ND = `flops` when only `unique_tokens` are there.

    They minimise the published form on top of `form`, which saturates in N and in D, as the factor on a base
    law's loss does not far from any run.
    """

    def tokens(num_params: float) -> float:
        return flops / (FLOPS_PER_PARAM_TOKEN * num_params)

    def loss(log_n: float) -> float:
        size = math.exp(log_n)
        return published_loss(form, num_params=size, num_tokens=tokens(size), unique_tokens=unique_tokens)

    if not (unique_tokens > 0 and math.isfinite(unique_tokens)):
        raise ConfigError(f"data.unique_tokens={unique_tokens:g} must be a number above 0")
    middle = 0.5 * math.log(flops / FLOPS_PER_PARAM_TOKEN)
    # two valleys are possible, one on each side of the first repeat: start from the best of a coarse grid
    grid = [middle + math.log(1e4) * (i / 200 - 1) for i in range(401)]
    best = min(range(1, 400), key=lambda i: loss(grid[i]))
    low, high = grid[best - 1], grid[best + 1]
    while high - low > 1e-6:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    size = math.exp(0.5 * (low + high))
    return repeated(form, num_params=size, num_tokens=tokens(size), unique_tokens=unique_tokens)


def notes(run: Repeated) -> list[str]:
    """What to tell about this run's repeats."""
    if run.epochs <= 1:
        return []
    found = [
        f"{run.epochs:.1f} epochs over {run.unique_tokens:.3g} unique tokens are worth "
        f"{run.effective_tokens:.3g} new ones: the loss is {run.penalty:.1%} above that on new text "
        "(Muennighoff et al. 2023, arXiv:2305.16264)"
    ]
    if run.epochs > MOST_EPOCHS:
        found.append(
            f"past {MOST_EPOCHS:g} epochs nothing was measured, and loss may rise with more training"
        )
    outside = FITTED.decades_outside(run.num_params, run.num_tokens)
    if outside > 0.5:
        found.append(f"the run lies {outside:.1f} powers of ten outside the runs with repeats")
    return found
