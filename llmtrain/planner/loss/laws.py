"""Published scaling laws: how to split a compute budget between parameters and tokens, and the loss to
expect.

Each law carries the range of runs it was fitted to, because a law says nothing certain outside it, and the
traps that its printed form holds. Exponents are kept as published and never rounded further. No law is the
truth: `band` shows the optimum under all of them. In the papers' letters: N parameters, D tokens, C = 6ND
FLOPs, L loss in nats per token of the law's own text and tokenizer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.fit import ParametricFit

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
    family: str
    """Whose runs: laws through the same runs count as one opinion."""
    counted: str = "all parameters"
    """What N counts."""
    traps: tuple[str, ...] = ()
    """What its printed form gets wrong, or what a reader of it gets wrong."""
    exponent_80: tuple[float, float] | None = None
    """10% and 90% points of a in N = const C^a, as published."""
    is_superseded: bool = False
    """Known to be wrong about the optimum: shown, and left out of the band."""
    forecasts: bool = False
    """Whether `forecast_loss` asks it."""


_CHINCHILLA_RUNS = FittedRange(num_params=(5.7e7, 1.62e10), num_tokens=(8.2e8, 3.2e11))
"""The 240 runs of tables/loss/chinchilla_runs.csv that the refit keeps."""
_LLAMA3_RUNS = FittedRange(num_params=(4e7, 1.6e10), num_tokens=(4e9, 1.6e11))
"""Models as printed (section 3.2.1); tokens: llama3_2024_refit at the printed budgets' ends, 6e18 and 1e22
FLOPs."""
_HOFFMANN_TOKENS = (5e9, 5e11)
"""Of all its runs (abstract): the paper gives no range for one approach. Some runs of approach 2 lie lower
(tables/loss/chinchilla_runs.csv)."""

KAPLAN = "kaplan2020"
KAPLAN_RANGE = FittedRange(num_params=(768, 1.5e9), num_tokens=(2.2e7, 2.3e10))
"""Kaplan et al. 2020, arXiv:2001.08361, section 3: non-embedding parameters, and WebText2 data-set sizes."""
_PF_DAY = 1e15 * 86400


def _anchored(exponent: float, *, flops: float, tokens_per_param: float) -> float:
    """The coefficient of D = coefficient C^exponent that gives D/N = `tokens_per_param` at `flops`."""
    return math.sqrt(tokens_per_param * flops / FLOPS_PER_PARAM_TOKEN) / float(flops**exponent)


def _gadre(*, entropy: float, rising: float, falling: float, eta: float) -> Parametric:
    """E + (a M^eta + b M^-eta) C^-eta in N and D, by M = D/N and C = 6ND: alpha = beta = 2 eta."""
    return Parametric(
        entropy=entropy,
        params_scale=rising * FLOPS_PER_PARAM_TOKEN**-eta,
        tokens_scale=falling * FLOPS_PER_PARAM_TOKEN**-eta,
        params_exponent=2 * eta,
        tokens_exponent=2 * eta,
    )


LAWS = {
    law.name: law
    for law in (
        Law(
            name="besiroglu2024",
            family="Chinchilla",
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
            traps=(
                "the 5 highest losses are left out: with them beta is 0.453, and 119B parameters, not 72B, "
                "are best at 5.76e23 FLOPs",
                "the printed A, B and beta are not the minimum of the printed objective, which lies at A "
                "477.8, B 2143, beta 0.3672; the difference is far inside the standard errors",
            ),
            forecasts=True,
        ),
        Law(
            name="hoffmann2022_approach1",
            family="Chinchilla",
            form=PowerLaw(coefficient=1.69608, exponent=0.501854),
            fitted=FittedRange(num_params=(7e7, 1e10), num_tokens=_HOFFMANN_TOKENS),
            text="MassiveText",
            source="Hoffmann et al. 2022, arXiv:2203.15556, least squares in logs through table 3's 9 rows",
            exponent_80=(0.488, 0.502),
        ),
        Law(
            name="hoffmann2022_approach2",
            family="Chinchilla",
            form=PowerLaw(coefficient=1.15276, exponent=0.510020),
            fitted=FittedRange(num_params=(7e7, 1.6e10), num_tokens=_HOFFMANN_TOKENS),
            text="MassiveText",
            source="Hoffmann et al. 2022, arXiv:2203.15556, least squares in logs through table A3's 9 rows",
            exponent_80=(0.462, 0.534),
        ),
        Law(
            name="hoffmann2022_approach3",
            family="Chinchilla",
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
            traps=(
                "its optimum at Chinchilla's 5.76e23 FLOPs is 40B on 2.4T tokens (59 tokens a parameter), "
                "not the 70B on 1.4T that were trained",
                "table A3 prints 1.26e24 FLOPs for 175B under approach 3: a slip for 1.26e25, its 6ND",
                "the published intervals of its exponents (0.454 to 0.455) would need hundreds of thousands "
                "of runs (arXiv:2404.10102)",
            ),
            is_superseded=True,
            forecasts=True,
        ),
        Law(
            name="kaplan2020",
            family="Kaplan",
            form=PowerLaw(coefficient=float(_PF_DAY**0.73) / (6 * 1.3e9), exponent=0.27),
            fitted=KAPLAN_RANGE,
            text="WebText2",
            source="Kaplan et al. 2020, arXiv:2001.08361, section 6.1: N = 1.3e9 C^0.73 at C in PF-days; D "
            "from C = 6ND",
            counted="without embeddings and head",
            traps=(
                "it asks for models many times too large: it left the head's FLOPs out, warmed small models "
                "up for too long and did not tune the optimizer per size (arXiv:2406.19146)",
                "its C is that of training far below the critical batch size, which a real run exceeds",
            ),
            is_superseded=True,
        ),
        Law(
            name="llama3_2024",
            family="Llama 3",
            form=PowerLaw(coefficient=0.299, exponent=0.537),
            fitted=_LLAMA3_RUNS,
            text="Llama 3's web mix",
            source="Grattafiori et al. 2024, arXiv:2407.21783, figure 3: 0.537 and 0.299, which give the "
            "paper's 16T tokens at 3.8e25 FLOPs",
            traps=(
                "the text (section 3.2.1) prints the constants as 0.53 and 0.29: 10.5T tokens at 3.8e25 "
                "FLOPs, where the paper says 16.55T",
                "one unit in the third digit of the exponent is 6% of the tokens at 3.8e25 FLOPs",
            ),
        ),
        Law(
            name="llama3_2024_refit",
            family="Llama 3",
            form=PowerLaw(coefficient=1.378, exponent=0.503),
            fitted=FittedRange(num_params=(5.9e7, 9.9e9), num_tokens=(3.8e9, 5e10)),
            text="Llama 3's web mix",
            source="minima of the IsoFLOP parabolas of arXiv:2407.21783, figure 2, read off by Open-Athena, "
            "at the 8 budgets up to 1e21; range: the models read off, and this law's tokens at 6e18 and 1e21",
        ),
        Law(
            name="deepseek2024",
            family="DeepSeek",
            form=PowerLaw(coefficient=5.8316, exponent=0.4757),
            fitted=FittedRange(num_params=(2.3e7, 1.6e9), num_tokens=(7e8, 3.2e10)),
            text="DeepSeek's Chinese and English mix",
            source="DeepSeek-AI 2024, arXiv:2401.02954, equation 4; C there is non-embedding FLOPs; range: "
            "its own optima at the ends of its budgets, 1e17 and 3e20",
            counted="non-embedding FLOPs a token over 6",
            traps=(
                "the exponent depends on the text: 0.550 on their early data, 0.422 on OpenWebText2 "
                "(section 3.3)",
            ),
        ),
        Law(
            name="porian2024",
            family="Porian",
            form=PowerLaw(coefficient=_anchored(0.503, flops=5.66e17, tokens_per_param=20), exponent=0.503),
            fitted=FittedRange(num_params=(5.2e6, 9.0e8), num_tokens=(2e8, 9.3e9)),
            text="RefinedWeb",
            source="Porian et al. 2024, arXiv:2406.19146: N exponent 0.497 with tuned hyper-parameters and a "
            "constant rate; the coefficient is assumed, not published: 20 tokens a parameter at the middle "
            "of its budgets, because the paper finds 'excellent agreement' with Hoffmann et al.",
            counted="with the head, without input embeddings",
            traps=(
                "its small models were tuned one by one: untuned ones give 0.571, and 0.835 as Kaplan did",
            ),
        ),
        Law(
            name="minicpm2024",
            family="MiniCPM",
            form=PowerLaw(coefficient=10 * 1e18**-0.05 / 6**0.55, exponent=0.55),
            fitted=FittedRange(num_params=(4e7, 2e9), num_tokens=(4e8, 1.2e11)),
            text="MiniCPM's Chinese, English and code",
            source="Hu et al. 2024, arXiv:2404.06395, section 4.5: N/D = 0.01 (C/6)^-0.10, C in 1e18 FLOPs "
            "and N, D in 1e9, the mean over its evaluations",
            counted="without embeddings",
            traps=(
                "its 192 tokens a parameter are the fit's, past its own runs; out of Llama 2's curves the "
                "paper reads 70 to 100, and calls that rough",
                "K^2 and eta are printed with one and two digits, in units that only a sum in the text shows",
            ),
        ),
        *(
            Law(
                name=f"gadre2024_{text.lower()}",
                family="Gadre",
                form=_gadre(entropy=entropy, rising=rising, falling=falling, eta=eta),
                fitted=FittedRange(num_params=(1.05e7, 4.12e8), num_tokens=(5.2e7, 3.3e10)),
                text=text,
                source="Gadre et al. 2024, arXiv:2403.08540: E + (a M^eta + b M^-eta) C^-eta at M = D/N; "
                "range: the runs of mlfoundations/scaling@a003c49 up to M = 80",
                traps=(
                    "alpha = beta is assumed, so that the optimal tokens a parameter are the same at every "
                    "budget; it was fitted to foretell over-trained runs, not to find that optimum",
                ),
            )
            for text, entropy, rising, falling, eta in (
                ("C4", 1.51, 141.0, 190.0, 0.121),
                ("RedPajama", 1.84, 212.0, 367.0, 0.136),
                ("RefinedWeb", 1.73, 157.0, 246.0, 0.127),
            )
        ),
    )
}
DEFAULT_LAW = "besiroglu2024"

NORMAL_90 = 1.2815515655446004
"""90% point of the normal distribution."""
EXPONENT_SPREAD = 0.03
"""Standard deviation of a law's exponent whose paper gives none: that of the exponents 0.43 to 0.54 of the
IsoFLOP sets in tables/loss/isoflop_runs.csv and of Llama 3's."""
VERTEX_SPREAD = 0.1
"""Standard deviation of log N at the middle of a law's own runs. Assumed: about that of one parabola's
vertex."""

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


def loss_of(law: Law) -> tuple[str, Parametric]:
    """The law's loss and its name; where it has none, the default's."""
    for each in (law, LAWS[DEFAULT_LAW]):
        if isinstance(each.form, Parametric):
            return each.name, each.form
    raise AssertionError("the default law has a loss")


def optimum(law: Law, flops: float) -> Optimum:
    """Return the N and D with 6ND = `flops` that the law prefers."""
    if isinstance(law.form, PowerLaw):
        num_tokens = law.form.coefficient * flops**law.form.exponent
        num_params = flops / (FLOPS_PER_PARAM_TOKEN * num_tokens)
    else:
        num_params = float(optimal_params(law.form, flops))
        num_tokens = flops / (FLOPS_PER_PARAM_TOKEN * num_params)
    return Optimum(
        law=law.name,
        num_params=num_params,
        num_tokens=num_tokens,
        decades_outside=law.fitted.decades_outside(num_params, num_tokens),
    )


def all_optima(flops: float) -> list[Optimum]:
    return [optimum(law, flops) for law in LAWS.values()]


@dataclass(frozen=True, kw_only=True)
class BandRow:
    """One law's optimum and how far the law itself leaves it open."""

    optimum: Optimum
    num_params: Interval
    """10% to 90%."""
    votes: bool
    """Whether the band counts it."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """The optimum for a budget under every law."""

    rows: list[BandRow]
    num_params: Interval
    """10%, 50% and 90% points of all laws that vote, each family with the same weight."""
    num_tokens: Interval
    tokens_per_param: Interval


def band(flops: float) -> Band:
    """Return every law's optimum for `flops`, and the 80% interval of them all.

    A law stands for a normal distribution of log N. Its width is, for besiroglu2024, that of the refits; for
    a law with published intervals of its exponent, what these give at `flops`, turned about the middle of the
    law's runs; else VERTEX_SPREAD beside EXPONENT_SPREAD turned likewise. The interval is of the mixture in
    which every family of runs has the same weight: three laws through the same runs are one opinion.
    """
    rows, centres, widths, shares = [], [], [], []
    voting = [law for law in LAWS.values() if not law.is_superseded]
    for law in LAWS.values():
        best = optimum(law, flops)
        width = _log_params_width(law, flops)
        reach = math.exp(NORMAL_90 * width)
        interval = Interval(low=best.num_params / reach, mid=best.num_params, high=best.num_params * reach)
        rows.append(BandRow(optimum=best, num_params=interval, votes=law in voting))
        if law in voting:
            centres.append(math.log(best.num_params))
            widths.append(width)
            shares.append(1 / sum(other.family == law.family for other in voting))
    low, mid, high = (
        math.exp(_mixture_quantile(share, centres, widths, shares)) for share in (0.1, 0.5, 0.9)
    )
    per_token = flops / FLOPS_PER_PARAM_TOKEN
    return Band(
        rows=rows,
        num_params=Interval(low=low, mid=mid, high=high),
        num_tokens=Interval(low=per_token / high, mid=per_token / mid, high=per_token / low),
        tokens_per_param=Interval(low=per_token / high**2, mid=per_token / mid**2, high=per_token / low**2),
    )


def _log_params_width(law: Law, flops: float) -> float:
    """Standard deviation of log N at `flops`."""
    if law.name == DEFAULT_LAW:
        params, _ = optimum_interval(flops)
        return math.log(params.high / params.low) / (2 * NORMAL_90)
    fitted = law.fitted
    middle = FLOPS_PER_PARAM_TOKEN * math.sqrt(math.prod(fitted.num_params) * math.prod(fitted.num_tokens))
    spread = EXPONENT_SPREAD
    if law.exponent_80 is not None:
        spread = (law.exponent_80[1] - law.exponent_80[0]) / (2 * NORMAL_90)
    return math.hypot(VERTEX_SPREAD, spread * math.log(flops / middle))


def _mixture_quantile(
    share: float, centres: Sequence[float], widths: Sequence[float], weights: Sequence[float]
) -> float:
    """Where a mixture of normal distributions has `share` of its weight below, by bisection."""
    low, high = min(centres) - 10 * max(widths), max(centres) + 10 * max(widths)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = sum(
            weight * 0.5 * math.erfc((centre - middle) / (width * math.sqrt(2)))
            for centre, width, weight in zip(centres, widths, weights, strict=True)
        )
        low, high = (middle, high) if below < share * sum(weights) else (low, middle)
    return 0.5 * (low + high)


def optimum_interval(flops: float) -> tuple[Interval, Interval]:
    """Return the 10%, 50% and 90% points of besiroglu2024's (N, D) over refits of resampled runs.

    It is what the sample of runs leaves open; how laws differ among each other is wider, and `all_optima`
    shows it.
    """
    num_params = optimal_params(bootstrap_fits(), flops)
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
    """Return the loss of a run of one epoch, as the envelope of the laws that forecast.

    The middle is the law whose fitted range lies nearest. The ends are the lowest and the highest law, moved
    outwards by TEXT_FACTOR, because none of them saw the user's text; above is log(vocab_size), the loss of a
    model that has learned nothing. Where every law says more than that, none speaks of such runs: low is 0.
    """
    by_law = {
        law.name: parametric_loss(law.form, num_params, num_tokens)
        for law in LAWS.values()
        if law.forecasts and isinstance(law.form, Parametric)
    }
    distance = {name: LAWS[name].fitted.decades_outside(num_params, num_tokens) for name in by_law}
    by_law[KAPLAN] = kaplan_loss(num_non_embedding_params, num_tokens)
    distance[KAPLAN] = KAPLAN_RANGE.decades_outside(num_non_embedding_params, num_tokens)
    nearest = min(by_law, key=lambda name: (distance[name], list(by_law).index(name)))
    learned_nothing = math.log(vocab_size)
    mid = min(by_law[nearest], learned_nothing)
    low = min(by_law.values()) / TEXT_FACTOR
    return LossForecast(
        loss=Interval(
            low=min(low, mid) if low < learned_nothing else 0.0,
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
    path = Path(__file__).parents[1] / "tables" / "loss" / name
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])


def optimal_params(form: Parametric | ParametricFit, flops: float) -> np.ndarray:
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
