"""Published scaling laws: how to split a compute budget between parameters and tokens, and the loss to
expect.

Each law carries the range of runs it was fitted to, because a law says nothing certain outside it. Exponents
are kept as published and never rounded further: at 3.8e25 FLOPs Llama 3's (0.53, 0.29), as printed, misses
the paper's own 16.55T tokens by 37%. In the papers' letters: N parameters, D tokens, C = 6ND FLOPs, L loss in
nats per token of the law's own text and tokenizer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.fit import ParametricFit

FLOPS_PER_PARAM_TOKEN = 6.0
"""C = 6ND (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Hoffmann et al. count every matrix product,
within 10% of it (arXiv:2203.15556, table A4). DeepSeek counts attention and leaves the vocabulary out: 6N is
0.81 to 1.32 of its count (arXiv:2401.02954, table 3)."""


@dataclass(frozen=True, kw_only=True)
class Parametric:
    """L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv:2203.15556, equation 2)."""

    entropy: float
    params_scale: float
    tokens_scale: float
    params_exponent: float
    tokens_exponent: float


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Optimal D = coefficient * C^exponent; N follows from C = 6ND."""

    coefficient: float
    exponent: float


@dataclass(frozen=True, kw_only=True)
class FittedRange:
    """Smallest and largest run behind a law, both ends included."""

    num_params: tuple[float, float]
    num_tokens: tuple[float, float]

    def decades_outside(self, num_params: float, num_tokens: float) -> float:
        """How far a run lies outside in the worse of the two directions, in powers of ten; 0 inside."""
        return max(_decades(num_params, self.num_params), _decades(num_tokens, self.num_tokens))


@dataclass(frozen=True, kw_only=True)
class Law:
    name: str
    form: Parametric | PowerLaw
    fitted: FittedRange
    text: str
    """What the runs were trained on."""
    source: str


_CHINCHILLA_RUNS = FittedRange(num_params=(5.7e7, 1.62e10), num_tokens=(8.2e8, 3.2e11))
"""The 240 runs of tables/chinchilla_runs.csv that the refit keeps."""
_LLAMA3_RUNS = FittedRange(num_params=(4e7, 1.6e10), num_tokens=(4e9, 1.6e11))
"""Models as printed (section 3.2.1); tokens: llama3_2024_refit at the printed budgets' ends, 6e18 and 1e22
FLOPs."""
_HOFFMANN_TOKENS = (5e9, 5e11)
"""Of all its runs (abstract): the paper gives no range for one approach. Some runs of approach 2 lie lower
(tables/chinchilla_runs.csv)."""

LAWS = {
    law.name: law
    for law in (
        Law(
            name="besiroglu2024",
            form=Parametric(
                entropy=1.8172,
                params_scale=482.01,
                tokens_scale=2085.43,
                params_exponent=0.3478,
                tokens_exponent=0.3658,
            ),
            fitted=_CHINCHILLA_RUNS,
            text="MassiveText",
            source="Besiroglu et al. 2024, arXiv:2404.10102, refit of Hoffmann et al.'s approach 3; "
            "standard errors 0.0257, 124.58, 1293.23, 0.0154, 0.0206",
        ),
        Law(
            name="hoffmann2022_approach1",
            form=PowerLaw(coefficient=1.69608, exponent=0.501854),
            fitted=FittedRange(num_params=(7e7, 1e10), num_tokens=_HOFFMANN_TOKENS),
            text="MassiveText",
            source="Hoffmann et al. 2022, arXiv:2203.15556, least squares in logs through table 3's 9 rows",
        ),
        Law(
            name="hoffmann2022_approach2",
            form=PowerLaw(coefficient=1.15276, exponent=0.510020),
            fitted=FittedRange(num_params=(7e7, 1.6e10), num_tokens=_HOFFMANN_TOKENS),
            text="MassiveText",
            source="Hoffmann et al. 2022, arXiv:2203.15556, least squares in logs through table A3's 9 rows",
        ),
        Law(
            name="hoffmann2022_approach3",
            form=Parametric(
                entropy=1.6934,
                params_scale=406.4,
                tokens_scale=410.7,
                params_exponent=0.3392,
                tokens_exponent=0.2849,
            ),
            fitted=_CHINCHILLA_RUNS,
            text="MassiveText",
            source="Hoffmann et al. 2022, arXiv:2203.15556, equation 10, exponents to four digits from "
            "arXiv:2404.10102; its optimum contradicts approaches 1 and 2, which besiroglu2024 mends",
        ),
        Law(
            name="llama3_2024",
            form=PowerLaw(coefficient=0.29, exponent=0.53),
            fitted=_LLAMA3_RUNS,
            text="Llama 3's web mix",
            source="Grattafiori et al. 2024, arXiv:2407.21783, section 3.2.1, constants as printed in the "
            "text; figure 3 prints 0.537 and 0.299, which give the paper's 16T tokens at 3.8e25",
        ),
        Law(
            name="llama3_2024_refit",
            form=PowerLaw(coefficient=1.378, exponent=0.503),
            fitted=FittedRange(num_params=(5.9e7, 9.9e9), num_tokens=(3.8e9, 5e10)),
            text="Llama 3's web mix",
            source="minima of the IsoFLOP parabolas of arXiv:2407.21783, figure 2, read off by Open-Athena, "
            "at the 8 budgets up to 1e21; range: the models read off, and this law's tokens at 6e18 and 1e21",
        ),
        Law(
            name="deepseek2024",
            form=PowerLaw(coefficient=5.8316, exponent=0.4757),
            fitted=FittedRange(num_params=(2.3e7, 1.6e9), num_tokens=(7e8, 3.2e10)),
            text="DeepSeek's Chinese and English mix",
            source="DeepSeek-AI 2024, arXiv:2401.02954, equation 4; C there is non-embedding FLOPs; range: "
            "its own optima at the ends of its budgets, 1e17 and 3e20",
        ),
    )
}
DEFAULT_LAW = "besiroglu2024"

KAPLAN = "kaplan2020"
KAPLAN_RANGE = FittedRange(num_params=(768, 1.5e9), num_tokens=(2.2e7, 2.3e10))
"""Kaplan et al. 2020, arXiv:2001.08361, section 3: non-embedding parameters, and WebText2 data-set sizes."""

TEXT_FACTOR = 1.3
"""How far loss per token may lie from a law's on other text with another tokenizer. Upwards: 1.19 to 1.30
between MassiveText and Comma, DCLM and Nemotron at 9e18 to 3e20 FLOPs, in the IsoFLOP minima that Open-Athena
collected (marin_202603 against epochai_chinchilla). Downwards the same is assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """What one law would train for a budget."""

    law: str
    num_params: float
    num_tokens: float
    decades_outside: float
    """Distance from the runs the law was fitted to, in powers of ten."""

    @property
    def tokens_per_param(self) -> float:
        return self.num_tokens / self.num_params


@dataclass(frozen=True, kw_only=True)
class Interval:
    """mid lies in [low, high]; what the ends mean is said where the interval is made."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LossForecast:
    """Nats per token at the end of a run."""

    loss: Interval
    law: str
    """The law behind loss.mid: the one whose fitted range lies nearest."""
    decades_outside: float
    """How far outside that law's range the run lies."""
    by_law: dict[str, float]
    """What each law says, before any bound. Above log(vocab_size) a law has left its domain."""


def find_law(name: str) -> Law:
    if name not in LAWS:
        raise ConfigError(unknown_name("law", name, LAWS))
    return LAWS[name]


def optimum(law: Law, flops: float) -> Optimum:
    """Return the N and D with 6ND = `flops` that the law prefers."""
    if isinstance(law.form, PowerLaw):
        num_tokens = law.form.coefficient * flops**law.form.exponent
        num_params = flops / (FLOPS_PER_PARAM_TOKEN * num_tokens)
    else:
        num_params = float(_optimal_params(law.form, flops))
        num_tokens = flops / (FLOPS_PER_PARAM_TOKEN * num_params)
    return Optimum(
        law=law.name,
        num_params=num_params,
        num_tokens=num_tokens,
        decades_outside=law.fitted.decades_outside(num_params, num_tokens),
    )


def all_optima(flops: float) -> list[Optimum]:
    return [optimum(law, flops) for law in LAWS.values()]


def optimum_interval(flops: float) -> tuple[Interval, Interval]:
    """Return the 10%, 50% and 90% points of besiroglu2024's (N, D) over refits of resampled runs.

    It is what the sample of runs leaves open; how laws differ among each other is wider, and `all_optima`
    shows it.
    """
    num_params = _optimal_params(bootstrap_fits(), flops)
    low, mid, high = (float(np.quantile(num_params, share)) for share in (0.1, 0.5, 0.9))
    tokens_low, tokens_mid, tokens_high = (flops / (FLOPS_PER_PARAM_TOKEN * n) for n in (high, mid, low))
    return Interval(low=low, mid=mid, high=high), Interval(low=tokens_low, mid=tokens_mid, high=tokens_high)


def parametric_loss(form: Parametric, num_params: float, num_tokens: float) -> float:
    params_term = form.params_scale / num_params**form.params_exponent
    tokens_term = form.tokens_scale / num_tokens**form.tokens_exponent
    return float(form.entropy + params_term + tokens_term)


def kaplan_loss(num_non_embedding_params: float, num_tokens: float) -> float:
    """L(N, D) of Kaplan et al. 2020, equation 1.5 with the constants of 1.1 and 1.2: WebText2, trained until
    it no longer improves."""
    params_exponent, tokens_exponent = 0.076, 0.095
    params_term = (8.8e13 / num_non_embedding_params) ** (params_exponent / tokens_exponent)
    return float((params_term + 5.4e13 / num_tokens) ** tokens_exponent)


def forecast_loss(
    *, num_params: int, num_non_embedding_params: int, num_tokens: float, vocab_size: int
) -> LossForecast:
    """Return the loss of a run of one epoch, as the envelope of every law that predicts one.

    The middle is the law whose fitted range lies nearest. The ends are the lowest and the highest law, moved
    outwards by TEXT_FACTOR, because none of them saw the user's text; above is log(vocab_size), the loss of a
    model that has learned nothing.
    """
    by_law = {
        law.name: parametric_loss(law.form, num_params, num_tokens)
        for law in LAWS.values()
        if isinstance(law.form, Parametric)
    }
    distance = {name: LAWS[name].fitted.decades_outside(num_params, num_tokens) for name in by_law}
    by_law[KAPLAN] = kaplan_loss(num_non_embedding_params, num_tokens)
    distance[KAPLAN] = KAPLAN_RANGE.decades_outside(num_non_embedding_params, num_tokens)
    nearest = min(by_law, key=lambda name: (distance[name], list(by_law).index(name)))
    learned_nothing = math.log(vocab_size)
    mid = min(by_law[nearest], learned_nothing)
    return LossForecast(
        loss=Interval(
            low=min(min(by_law.values()) / TEXT_FACTOR, mid),
            mid=mid,
            high=min(max(by_law.values()) * TEXT_FACTOR, learned_nothing),
        ),
        law=nearest,
        decades_outside=distance[nearest],
        by_law=by_law,
    )


@functools.cache
def bootstrap_fits() -> ParametricFit:
    """200 refits of besiroglu2024 on resampled runs, as arrays of shape (200,)."""
    columns = read_table("besiroglu_bootstrap.csv").T
    return ParametricFit(
        entropy=columns[0],
        params_scale=columns[1],
        tokens_scale=columns[2],
        params_exponent=columns[3],
        tokens_exponent=columns[4],
    )


def read_table(name: str) -> np.ndarray:
    """Return a table of this package as a float array, one row a line; lines of source and heading are
    skipped."""
    path = Path(__file__).with_name("tables") / name
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])


def _optimal_params(form: Parametric | ParametricFit, flops: float) -> np.ndarray:
    """Minimise L(N, C/6N) over N: Hoffmann et al. 2022, equation 4."""
    alpha, beta = np.asarray(form.params_exponent), np.asarray(form.tokens_exponent)
    balance = (alpha * form.params_scale / (beta * form.tokens_scale)) ** (1 / (alpha + beta))
    found: np.ndarray = balance * (flops / FLOPS_PER_PARAM_TOKEN) ** (beta / (alpha + beta))
    return found


def _decades(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    if value < low:
        return math.log10(low / value)
    return math.log10(value / high) if value > high else 0.0
