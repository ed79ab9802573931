"""From wishes to a number of parameters and of tokens: what is given stays, the law decides the rest.

Two things bend a law's optimum. A model that will serve many tokens should be smaller and trained for longer
(Sardana et al. 2023, arXiv:2401.00448), and text that runs out is worth less each time it is read again
(Muennighoff et al. 2023, arXiv:2305.16264). Both keep the training FLOPs of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.loss.inference import ServedPlan, inference_optimum
from llmtrain.planner.loss.laws import (
    FLOPS_PER_PARAM_TOKEN,
    LAWS,
    Law,
    Optimum,
    Parametric,
    loss_of,
    optimal_params,
    optimum,
    parametric_loss,
)
from llmtrain.planner.loss.repetition import Repeated, data_limited_optimum, repeated

FLOPS_BOUNDS = (1e10, 1e32)
"""Between them a law is asked which budget's optimum has given tokens or parameters."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """None: not given."""

    flops: float | None = None
    """6ND of training."""
    num_params: float | None = None
    num_tokens: float | None = None
    unique_tokens: float | None = None
    inference_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to train, before a shape and a batch round it."""

    num_params: float
    num_tokens: float
    reason: str
    """How the two were found, in a sentence."""
    law_optimum: Optimum
    """The law's own for as many FLOPs."""
    served: ServedPlan | None
    """With tokens to serve: the trade, at the quality that the budget reaches."""
    repeated: Repeated | None
    """With a limit on unique tokens that the run passes."""
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return FLOPS_PER_PARAM_TOKEN * self.num_params * self.num_tokens


def resolve_law(name: str) -> Law:
    """The law of that name, or the only one that begins so, the default among several.

    Raises:
        ConfigError: no law, or several, begin so.
    """
    if name in LAWS:
        return LAWS[name]
    found = [law for known, law in LAWS.items() if known.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(unknown_name("law", name, LAWS))
    listed = ", ".join(law.name for law in found)
    raise ConfigError(f"plan.law={name} is the beginning of several: {listed}; give one of them")


def choose_target(law: Law, wishes: Wishes) -> Target:
    """Return N and D. Of FLOPs, parameters and tokens at least one and at most two may be given.

    Raises:
        ConfigError: none or all three were given.
    """
    flops, params, tokens = wishes.flops, wishes.num_params, wishes.num_tokens
    if flops is None and params is None and tokens is None:
        raise ConfigError(
            "nothing says how large the run is; give one of budget.flops, budget.gpu_hours, budget.usd, "
            "budget.days, budget.tokens and model.params"
        )
    if flops is not None and params is not None and tokens is not None:
        raise ConfigError(
            f"a compute budget, model.params={params:.4g} and budget.tokens={tokens:.4g} fix the same thing "
            "twice: of compute, parameters and tokens two decide the third; leave one out"
        )
    notes: list[str] = []
    form = _form(law, notes, is_asked=bool(wishes.unique_tokens or wishes.inference_tokens))
    served: ServedPlan | None = None
    if params is not None and tokens is not None:
        reason = "parameters and tokens as given"
    elif params is not None and flops is not None:
        tokens = flops / FLOPS_PER_PARAM_TOKEN / params
        reason = "parameters as given, and the tokens that the budget leaves"
    elif tokens is not None and flops is not None:
        params = flops / FLOPS_PER_PARAM_TOKEN / tokens
        reason = "tokens as given, and the parameters that the budget leaves"
    elif params is not None:
        tokens = optimum(law, _budget_where(law, params, lambda best: best.num_params)).num_tokens
        reason = f"parameters as given, and the tokens at which they are {law.name}'s optimum"
    elif tokens is not None:
        params = optimum(law, _budget_where(law, tokens, lambda best: best.num_tokens)).num_params
        reason = f"tokens as given, and the parameters for which they are {law.name}'s optimum"
    else:
        assert flops is not None, "one of the three is given"
        params, tokens, reason, served = _by_compute(law, form, flops, wishes)
    spent = FLOPS_PER_PARAM_TOKEN * params * tokens
    if served is not None:
        size = float(optimal_params(form, spent))
        alone = parametric_loss(form, size, spent / FLOPS_PER_PARAM_TOKEN / size)
        notes.append(
            f"serving bends the run to {served.best.loss:.3f} nats a token, where the same training FLOPs "
            f"reach {alone:.3f} at the law's own optimum; without inference.tokens you get that"
        )
    elif wishes.inference_tokens:
        served = inference_optimum(form, inference_tokens=wishes.inference_tokens, flops=spent)
        notes.append(
            "inference.tokens changes nothing here, because parameters or tokens are given; the trade is "
            "shown for the quality that as many FLOPs reach"
        )
    if wishes.unique_tokens is not None and wishes.inference_tokens and wishes.unique_tokens < tokens:
        notes.append(
            "the size is the one for serving: with data.unique_tokens alone it would be chosen for what the "
            "text can give; what its repeats cost is counted"
        )
    return Target(
        num_params=params,
        num_tokens=tokens,
        reason=reason,
        law_optimum=optimum(law, spent),
        served=served,
        repeated=(
            repeated(form, num_params=params, num_tokens=tokens, unique_tokens=wishes.unique_tokens)
            if wishes.unique_tokens is not None and wishes.unique_tokens < tokens
            else None
        ),
        notes=tuple(notes) + (tuple(served.notes) if served else ()),
    )


def _form(law: Law, notes: list[str], *, is_asked: bool) -> Parametric:
    """The law's loss; where it has none, the default's."""
    name, form = loss_of(law)
    if is_asked and name != law.name:
        notes.append(
            f"{law.name} says nothing about losses: what serving and repeated text cost is by {name}"
        )
    return form


def _by_compute(
    law: Law, form: Parametric, flops: float, wishes: Wishes
) -> tuple[float, float, str, ServedPlan | None]:
    best = optimum(law, flops)
    params, reason, served = best.num_params, f"{law.name}'s optimum for the budget", None
    if wishes.inference_tokens:
        served = _serving_within(form, flops, wishes.inference_tokens)
        params *= served.best.num_params / float(optimal_params(form, flops))
        reason = (
            f"{law.name}'s optimum, moved to where training and serving {wishes.inference_tokens:.3g} tokens "
            "cost least for the same quality"
        )
    tokens = flops / FLOPS_PER_PARAM_TOKEN / params
    if wishes.unique_tokens is not None and wishes.unique_tokens < tokens and not wishes.inference_tokens:
        limited = data_limited_optimum(form, flops=flops, unique_tokens=wishes.unique_tokens)
        params, tokens = limited.num_params, limited.num_tokens
        reason = (
            f"the best of the budget on {wishes.unique_tokens:.3g} unique tokens, by the shape of repetition"
        )
    return params, tokens, reason, served


def _serving_within(form: Parametric, flops: float, inference_tokens: float) -> ServedPlan:
    """The cheapest model to train and serve whose training takes `flops`: of the quality that fewer reach."""

    def training(log_flops: float) -> float:
        plan = inference_optimum(form, inference_tokens=inference_tokens, flops=math.exp(log_flops))
        return plan.best.training_flops

    middle = _bisect(training, flops, math.log(flops) - 10.0, math.log(flops))
    return inference_optimum(form, inference_tokens=inference_tokens, flops=math.exp(middle))


def _budget_where(law: Law, wanted: float, count: Callable[[Optimum], float]) -> float:
    low, high = (math.log(bound) for bound in FLOPS_BOUNDS)
    return math.exp(_bisect(lambda log_flops: count(optimum(law, math.exp(log_flops))), wanted, low, high))


def _bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return 0.5 * (low + high)
