"""Models that will be used: smaller ones trained for longer cost more to train and less to run.

Sardana et al. 2023 (arXiv:2401.00448, section 2): minimise 6 N D + 2 N D_inf over N and D under
L(N, D) = the loss wanted. Their warning holds here too: laws are fitted at 1 to 100 tokens a parameter, and
those at 10,000 are worth less than such a law says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.errors import ConfigError
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN, Parametric, optimal_params, parametric_loss

INFERENCE_FLOPS_PER_PARAM_TOKEN = 2.0
"""A forward pass: a third of training's 6."""
RATIOS = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
"""Tokens per parameter of the over-training table."""
OVER_VALUED_RATIO = 1000.0
"""Past this D/N a law overrates tokens. Assumed: Sardana et al. see it towards 10,000; Gadre et al. 2024
(arXiv:2403.08540) foretell runs at 640 to 1%."""
GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that reaches `loss` and then serves."""

    num_params: float
    num_tokens: float
    loss: float
    training_flops: float
    inference_flops: float

    @property
    def total_flops(self) -> float:
        return self.training_flops + self.inference_flops

    @property
    def tokens_per_param(self) -> float:
        return self.num_tokens / self.num_params


@dataclass(frozen=True, kw_only=True)
class ServedPlan:
    optimum: Served
    """The training optimum of that loss, which serves too."""
    best: Served
    """The least total."""
    saved: float
    """Share of the optimum's total."""
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class OverTrained:
    """One row of the over-training table: the same loss, or the same model trained for longer."""

    tokens_per_param: float
    num_params: float
    """That reaches the optimum's loss at this ratio."""
    num_tokens: float
    extra_training: float
    """Training FLOPs over the optimum's, minus 1."""
    saved_inference: float
    """Share of the optimum's FLOPs a served token."""
    loss_of_same_flops: float
    """Of the optimum's FLOPs, spent at this ratio."""
    penalty: float
    """That loss over the optimum's, minus 1."""
    is_over_valued: bool
    """Past OVER_VALUED_RATIO: both columns flatter the row."""


def inference_optimum(
    form: Parametric, *, inference_tokens: float, flops: float | None = None, loss: float | None = None
) -> ServedPlan:
    """Return the cheapest model to train and serve, of the loss that `flops` reach at their optimum, or of
    `loss`."""
    if (flops is None) == (loss is None):
        raise ConfigError("give the quality wanted as one of training FLOPs and loss")
    if not (inference_tokens >= 0 and math.isfinite(inference_tokens)):
        raise ConfigError(f"inference.tokens={inference_tokens:g} must be a number of at least 0")
    if loss is None:
        assert flops is not None, "one of the two is given"
        num_params = float(optimal_params(form, flops))
        loss = parametric_loss(form, num_params, flops / FLOPS_PER_PARAM_TOKEN / num_params)
    elif loss <= form.entropy:
        raise ConfigError(
            f"loss={loss:g} is not above the law's entropy {form.entropy:g}: no model reaches it"
        )
    smallest = (form.params_scale / (loss - form.entropy)) ** (1 / form.params_exponent)
    optimum = _cheapest(form, loss=loss, smallest=smallest, inference_tokens=0.0)
    optimum = _served(form, optimum.num_params, loss=loss, inference_tokens=inference_tokens)
    best = _cheapest(form, loss=loss, smallest=smallest, inference_tokens=inference_tokens)
    notes = []
    if best.tokens_per_param > OVER_VALUED_RATIO:
        notes.append(
            f"{best.tokens_per_param:.0f} tokens a parameter lie past {OVER_VALUED_RATIO:g}, where laws "
            "overrate tokens (Sardana et al. 2023, arXiv:2401.00448): take the saving as an upper bound"
        )
    return ServedPlan(
        optimum=optimum, best=best, saved=1 - best.total_flops / optimum.total_flops, notes=notes
    )


def over_training(form: Parametric, *, flops: float, ratios: Sequence[float] = RATIOS) -> list[OverTrained]:
    """Return, for each number of tokens a parameter, the model that matches the optimum of `flops`."""
    num_params = float(optimal_params(form, flops))
    loss = parametric_loss(form, num_params, flops / FLOPS_PER_PARAM_TOKEN / num_params)
    rows = []
    for ratio in ratios:
        matched = _params_at_ratio(form, ratio, loss)
        same = math.sqrt(flops / FLOPS_PER_PARAM_TOKEN / ratio)
        rows.append(
            OverTrained(
                tokens_per_param=ratio,
                num_params=matched,
                num_tokens=ratio * matched,
                extra_training=FLOPS_PER_PARAM_TOKEN * ratio * matched**2 / flops - 1,
                saved_inference=1 - matched / num_params,
                loss_of_same_flops=parametric_loss(form, same, ratio * same),
                penalty=parametric_loss(form, same, ratio * same) / loss - 1,
                is_over_valued=ratio > OVER_VALUED_RATIO,
            )
        )
    return rows


def tokens_for_loss(form: Parametric, num_params: float, loss: float) -> float:
    """D that takes a model of N parameters to `loss`; infinity when it never gets there."""
    left = loss - form.entropy - form.params_scale / num_params**form.params_exponent
    return float((form.tokens_scale / left) ** (1 / form.tokens_exponent)) if left > 0 else math.inf


def _served(form: Parametric, num_params: float, *, loss: float, inference_tokens: float) -> Served:
    num_tokens = tokens_for_loss(form, num_params, loss)
    return Served(
        num_params=num_params,
        num_tokens=num_tokens,
        loss=loss,
        training_flops=FLOPS_PER_PARAM_TOKEN * num_params * num_tokens,
        inference_flops=INFERENCE_FLOPS_PER_PARAM_TOKEN * num_params * inference_tokens,
    )


def _cheapest(form: Parametric, *, loss: float, smallest: float, inference_tokens: float) -> Served:
    """Golden-section search in log N above the smallest model that reaches the loss: the total has one
    minimum."""
    low, high = math.log(smallest) + 1e-9, math.log(smallest) + math.log(1e6)

    def total(log_n: float) -> float:
        return _served(form, math.exp(log_n), loss=loss, inference_tokens=inference_tokens).total_flops

    while high - low > 1e-9:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if total(left) < total(right) else (left, high)
    return _served(form, math.exp(0.5 * (low + high)), loss=loss, inference_tokens=inference_tokens)


def _params_at_ratio(form: Parametric, ratio: float, loss: float) -> float:
    """N with L(N, ratio N) = `loss`, by bisection in log N: the loss falls with N."""
    low, high = 0.0, math.log(1e18)
    for _ in range(200):
        middle = 0.5 * (low + high)
        size = math.exp(middle)
        low, high = (middle, high) if parametric_loss(form, size, ratio * size) > loss else (low, middle)
    return math.exp(0.5 * (low + high))
