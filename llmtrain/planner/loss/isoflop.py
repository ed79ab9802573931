"""Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.2): at each compute budget a parabola of
loss in log N, and a line of log N at its minimum through the logs of the budgets.

A parabola is only the middle of the curve: with alpha and beta apart, or with sizes sampled off the minimum,
its vertex is moved, and a move that changes with the budget bends the exponent (Open-Athena/
scaling-law-analysis@3e0656e). So a budget whose sizes lie off-centre is named, and the move is measured: the
same parabolas through a fitted surface, whose true minimum is known, at the same sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.fit import ParametricFit
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN, optimal_params

SAME_BUDGET = 0.1
"""Runs are of one budget when the logs of their 6ND lie within it of the next, and within MOST_SPAN in
all."""
MOST_SPAN = 0.25
LEAST_SIZES = 4
"""Different sizes a budget needs: one more than a parabola has coefficients."""
OFF_CENTRE = 0.25
"""Distance of the vertex from the middle of the sampled log N, in half widths, past which a note says so.
Assumed."""
SAME_SIZE = 1.02
"""Sizes closer than this factor are one."""


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """One budget."""

    flops: float
    num_runs: int
    num_params: Interval
    """10% of resamples, the vertex, 90%."""
    loss: float
    """At the vertex."""
    off_centre: float
    """-1 and 1 at the smallest and the largest size, 0 in the middle of their logs."""
    shift: float | None
    """Vertex over true minimum for the fitted surface at these sizes; None without a surface."""


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    parabolas: list[Parabola]
    refused: list[str]
    """Budgets without a vertex between their sizes, and why."""
    exponent: Interval | None
    """a of N = const C^a; None with fewer than 3 parabolas."""
    coefficient: float | None

    def notes(self) -> list[str]:
        """What makes these minima weaker than they look."""
        found = list(self.refused)
        for each in self.parabolas:
            if abs(each.off_centre) > OFF_CENTRE:
                side = "large" if each.off_centre < 0 else "small"
                moved = f"; this moves its vertex by {each.shift - 1:+.0%}" if each.shift is not None else ""
                found.append(
                    f"budget {each.flops:.3g}: sizes are sampled off-centre, too {side} "
                    f"({each.off_centre:+.2f} of the half width){moved}"
                )
        return found


def isoflop(
    num_params: np.ndarray,
    num_tokens: np.ndarray,
    loss: np.ndarray,
    *,
    num_resamples: int,
    generator: np.random.Generator,
    surface: ParametricFit | None = None,
) -> IsoFlop | None:
    """Return the parabolas of all budgets that have them; None when no budget has LEAST_SIZES sizes."""
    flops = FLOPS_PER_PARAM_TOKEN * num_params * num_tokens
    groups = [
        group
        for group in _budgets(flops)
        if _num_sizes(num_params[group]) >= LEAST_SIZES and np.ptp(np.log(flops[group])) <= MOST_SPAN
    ]
    if not groups:
        return None
    parabolas, refused, resampled = [], [], []
    for group in groups:
        budget = float(np.exp(np.log(flops[group]).mean()))
        log_n, values = np.log(num_params[group]), loss[group]
        vertex, height = _vertex(log_n, values)
        low, high = log_n.min(), log_n.max()
        if not low <= vertex <= high:
            why = "curves down" if math.isnan(vertex) else "has its minimum outside the sizes"
            refused.append(f"budget {budget:.3g}: the parabola through its {len(group)} runs {why}; left out")
            continue
        draws = _resampled_vertices(log_n, values, num_resamples=num_resamples, generator=generator)
        resampled.append(draws)
        shift = None
        if surface is not None:
            seen, _ = _vertex(log_n, surface.loss(num_params[group], budget / 6 / num_params[group]))
            shift = math.exp(seen) / float(optimal_params(surface, budget))
        parabolas.append(
            Parabola(
                flops=budget,
                num_runs=len(group),
                num_params=Interval(
                    low=math.exp(np.nanquantile(draws, 0.1)),
                    mid=math.exp(vertex),
                    high=math.exp(np.nanquantile(draws, 0.9)),
                ),
                loss=height,
                off_centre=float((vertex - 0.5 * (low + high)) / (0.5 * (high - low))),
                shift=shift,
            )
        )
    exponent, coefficient = _line(parabolas, resampled)
    return IsoFlop(parabolas=parabolas, refused=refused, exponent=exponent, coefficient=coefficient)


def _budgets(flops: np.ndarray) -> list[np.ndarray]:
    """Positions of the runs of each budget: neighbours in log C less than SAME_BUDGET apart."""
    order = np.argsort(flops)
    cuts = np.flatnonzero(np.diff(np.log(flops[order])) > SAME_BUDGET) + 1
    return np.split(order, cuts)


def _num_sizes(num_params: np.ndarray) -> int:
    return 1 + int((np.diff(np.log(np.sort(num_params))) > math.log(SAME_SIZE)).sum())


def _vertex(log_n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """Return log N and loss at the minimum of the least-squares parabola; nan when it has none."""
    middle = log_n.mean()
    curve, slope, level = np.polyfit(log_n - middle, loss, 2)
    if curve <= 0:
        return math.nan, math.nan
    return float(middle - slope / (2 * curve)), float(level - slope**2 / (4 * curve))


def _resampled_vertices(
    log_n: np.ndarray, loss: np.ndarray, *, num_resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Vertices of parabolas through fitted losses plus drawn residuals: sizes stay, since few runs drawn with
    replacement often hold too few of them."""
    middle = log_n.mean()
    design = np.stack([(log_n - middle) ** 2, log_n - middle, np.ones_like(log_n)], axis=1)
    inverse = np.linalg.pinv(design)
    fitted = design @ (inverse @ loss)
    lost = math.sqrt(len(loss) / (len(loss) - 3))
    residual = (loss - fitted) * lost
    drawn = residual[generator.integers(0, len(loss), size=(num_resamples, len(loss)))]
    curve, slope, _ = inverse @ (fitted + drawn).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(curve > 0, middle - slope / (2 * curve), np.nan)


def _line(parabolas: list[Parabola], resampled: list[np.ndarray]) -> tuple[Interval | None, float | None]:
    if len(parabolas) < 3:
        return None, None
    log_c = np.log([each.flops for each in parabolas])
    exponent, level = np.polyfit(log_c, np.log([each.num_params.mid for each in parabolas]), 1)
    draws = np.stack(resampled)
    draws = draws[:, np.isfinite(draws).all(axis=0)]
    exponents = np.polyfit(log_c, draws, 1)[0]
    low, high = np.quantile(exponents, (0.1, 0.9))
    return Interval(low=float(low), mid=float(exponent), high=float(high)), float(math.exp(level))
