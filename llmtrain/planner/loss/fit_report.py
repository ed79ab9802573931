"""A fit of own runs as people read it, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain import rng
from llmtrain.errors import ConfigError
from llmtrain.files import plain
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.envelope import (
    USUAL_MISS,
    Envelope,
    Extrapolation,
    Runs,
    chosen_runs,
    extrapolation,
    fit_envelope,
    keep_lowest,
    loss_interval,
    optimum_interval,
    variant_intervals,
)
from llmtrain.planner.loss.fit import FREE, VARIANTS
from llmtrain.planner.loss.isoflop import IsoFlop, isoflop
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN, Band, band
from llmtrain.planner.units import PARAMS, TOKENS, parse_quantity
from llmtrain.units import format_count

COLUMNS = 110
DEFAULT_REACH = (10.0, 100.0)
"""Budgets over the largest run's, when none are asked for."""
FAR = 100.0
"""Compute past the largest run's from which a note says that the interval is a guess too. Assumed."""
NOISY = 0.02
"""Noise past which a note asks whether the runs belong together. Assumed: the sets of tables/loss have 0.4%
to 0.8%."""
COEFFICIENTS = {
    "E": "entropy",
    "A": "params_scale",
    "alpha": "params_exponent",
    "B": "tokens_scale",
    "beta": "tokens_exponent",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A run to foretell."""

    num_params: float
    num_tokens: float


@dataclass(frozen=True, kw_only=True)
class Foretold:
    target: Target
    loss: Interval
    by_variant: dict[str, Interval]
    beyond: Extrapolation


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    flops: float
    num_params: Interval
    beyond: float
    """Times the largest run's FLOPs."""
    band: Band
    """What published laws say."""


@dataclass(frozen=True, kw_only=True)
class FitReport:
    envelope: Envelope
    dropped: list[str]
    left_out: list[str]
    foretold: list[Foretold]
    budgets: list[BudgetRow]
    isoflop: IsoFlop | None


def parse_target(text: str, *, name: str = "at") -> Target:
    """Read PARAMS/TOKENS. ConfigError, with the setting's `name`, for anything else."""
    size, slash, tokens = text.partition("/")
    if not slash:
        raise ConfigError(f"{name}={text} must be PARAMS/TOKENS, as in 7B/4T")
    return Target(
        num_params=parse_quantity(size, PARAMS, name=f"parameters of {name}"),
        num_tokens=parse_quantity(tokens, TOKENS, name=f"tokens of {name}"),
    )


def make_report(
    runs: Runs,
    *,
    targets: Sequence[Target],
    budgets: Sequence[float],
    drop_highest: int,
    huber_delta: float | None,
    num_resamples: int,
    seed: int,
    left_out: Sequence[str] = (),
) -> FitReport:
    kept = keep_lowest(runs.loss, drop_highest)
    dropped = [runs.names[i] for i in sorted(set(range(len(runs.names))) - set(kept.tolist()))]
    runs = chosen_runs(runs, kept)
    envelope = fit_envelope(runs, num_resamples=num_resamples, huber_delta=huber_delta, seed=seed)
    largest = float((FLOPS_PER_PARAM_TOKEN * runs.num_params * runs.num_tokens).max())
    rows = []
    for flops in budgets or [largest * reach for reach in DEFAULT_REACH]:
        rows.append(
            BudgetRow(
                flops=flops,
                num_params=optimum_interval(envelope, flops),
                beyond=flops / largest,
                band=band(flops),
            )
        )
    return FitReport(
        envelope=envelope,
        dropped=dropped,
        left_out=list(left_out),
        foretold=[
            Foretold(
                target=target,
                loss=loss_interval(envelope, target.num_params, target.num_tokens),
                by_variant=variant_intervals(envelope, target.num_params, target.num_tokens),
                beyond=extrapolation(runs, target.num_params, target.num_tokens),
            )
            for target in targets
        ],
        budgets=rows,
        isoflop=isoflop(
            runs.num_params,
            runs.num_tokens,
            runs.loss,
            num_resamples=num_resamples,
            generator=rng.stream(seed, "planner", "isoflop"),
            surface=envelope.variants[FREE.name].point,
        ),
    )


def notes(report: FitReport) -> list[str]:
    """Everything that is weaker than its digits look."""
    envelope = report.envelope
    found = [f"left out: {each}" for each in report.left_out]
    if report.dropped:
        found.append(
            f"dropped, as asked, for the highest losses: {', '.join(report.dropped)}. What is dropped can "
            "move an optimum more than any choice of method: run it without, too"
        )
    if envelope.noise > NOISY:
        found.append(
            f"the runs lie {envelope.noise:.1%} off one surface; runs of one text, tokenizer and recipe lie "
            "about 0.5% off: look whether these runs belong together"
        )
    if envelope.outlying:
        found.append(f"far off the free fit, kept: {', '.join(envelope.outlying)}")
    point = envelope.variants[FREE.name].point
    if not 0.15 <= float(point.params_exponent) <= 0.6 or not 0.15 <= float(point.tokens_exponent) <= 0.6:
        found.append(
            f"the free fit's exponents (alpha {float(point.params_exponent):.3f}, beta "
            f"{float(point.tokens_exponent):.3f}) lie outside what larger studies find on text, 0.25 to "
            "0.37: these runs do not settle them; trust the envelope, not the free fit"
        )
    for each in report.foretold:
        if each.beyond.flops > FAR:
            found.append(
                f"{_target(each.target)} is {each.beyond.flops:.0f} times the largest run's FLOPs: nobody "
                "has shown how wide an honest interval is there; spend a tenth of the run on a run in between"
            )
    if report.isoflop is not None:
        found += report.isoflop.notes()
    found.append(
        "an interval says what these runs leave open, with the same text, tokenizer, recipe and evaluation; "
        "another learning-rate rule or a repeat of data at the larger size is not in it"
    )
    return found


def fit_text(report: FitReport) -> str:
    """The whole report, for a terminal COLUMNS wide."""
    envelope = report.envelope
    runs = envelope.runs
    sizes, tokens = runs.num_params, runs.num_tokens
    head = [
        f"FIT of {len(runs.names)} runs: {_count(sizes.min())}..{_count(sizes.max())} parameters, "
        f"{_count(tokens.min())}..{_count(tokens.max())} tokens, loss {runs.loss.min():.3f}.."
        f"{runs.loss.max():.3f}",
        f"  L = E + A/N^alpha + B/D^beta; Huber loss of log L, delta {envelope.huber_delta:.2g}; noise of "
        f"one run {envelope.noise:.2%}",
    ]
    blocks = [head, ["COEFFICIENTS, 80% of resamples below", *_coefficients(envelope)]]
    if report.foretold:
        blocks.append(["LOSS OF LARGER RUNS", *_foretold(report.foretold)])
    blocks.insert(1, ["BACK-TEST", *_wrapped("  ", _back_test(envelope))])
    blocks.append(["WHAT A BUDGET WOULD TRAIN", *_budgets(report.budgets)])
    if report.isoflop is not None:
        blocks.append(["ISOFLOP PARABOLAS", *_parabolas(report.isoflop)])
    blocks.append(["KEEP IN MIND", *(line for note in notes(report) for line in _wrapped("  - ", note))])
    return "\n\n".join("\n".join(block) for block in blocks)


def fit_json(report: FitReport) -> dict[str, object]:
    envelope = report.envelope
    return {
        "format_version": 1,
        "runs": [
            {"name": name, "num_params": float(size), "num_tokens": float(tokens), "loss": float(loss)}
            for name, size, tokens, loss in zip(
                envelope.runs.names,
                envelope.runs.num_params,
                envelope.runs.num_tokens,
                envelope.runs.loss,
                strict=True,
            )
        ],
        "noise": envelope.noise,
        "spread": envelope.spread,
        "back_test": None if envelope.back_test is None else plain(envelope.back_test),
        "huber_delta": envelope.huber_delta,
        "variants": {
            variant.name: {
                shown: plain(_coefficient(envelope, variant.name, name))
                for shown, name in COEFFICIENTS.items()
            }
            for variant in VARIANTS
        },
        "foretold": [plain(each) for each in report.foretold],
        "budgets": [
            {
                "flops": row.flops,
                "beyond": row.beyond,
                "num_params": plain(row.num_params),
                "published_band": plain(row.band.num_params),
            }
            for row in report.budgets
        ],
        "isoflop": None if report.isoflop is None else plain(report.isoflop),
        "dropped": report.dropped,
        "left_out": report.left_out,
        "outlying": list(envelope.outlying),
        "notes": notes(report),
    }


def _back_test(envelope: Envelope) -> str:
    found = envelope.back_test
    if found is None:
        return (
            f"none: without the dearest quarter of {len(envelope.runs.names)} runs too little is left for a "
            f"fit. Past the runs, {USUAL_MISS:.1%} is added instead, which is usual for published runs"
        )
    low, high = min(found.errors), max(found.errors)
    return (
        f"without the {len(found.names)} dearest runs, the fit of the other {found.num_kept} foretells them "
        f"to {low:+.2%}..{high:+.2%}, up to {found.beyond:.3g} times its own largest FLOPs; 8 of 10 within "
        f"{found.miss:.2%}, which is added to every interval past the runs"
    )


def _coefficient(envelope: Envelope, variant: str, name: str) -> Interval:
    each = envelope.variants[variant]
    low, high = np.quantile(getattr(each.resampled, name), (0.1, 0.9))
    return Interval(low=float(low), mid=float(getattr(each.point, name)), high=float(high))


def _coefficients(envelope: Envelope) -> list[str]:
    rows = [("variant", *COEFFICIENTS)]
    for variant in VARIANTS:
        found = [_coefficient(envelope, variant.name, name) for name in COEFFICIENTS.values()]
        rows.append(
            (variant.name, *(f"{each.mid:.4f}" if each.mid < 10 else f"{each.mid:.1f}" for each in found))
        )
        rows.append(("", *(f"{each.low:.3g}..{each.high:.3g}" for each in found)))
    return _columns(rows)


def _foretold(foretold: Sequence[Foretold]) -> list[str]:
    rows = [("run", "loss", "80%, all variants", *(f"{v.name}" for v in VARIANTS), "N x", "D x", "FLOPs x")]
    for each in foretold:
        beyond = each.beyond
        rows.append(
            (
                _target(each.target),
                f"{each.loss.mid:.3f}",
                f"{each.loss.low:.3f}..{each.loss.high:.3f}",
                *(f"{each.by_variant[v.name].mid:.3f}" for v in VARIANTS),
                *(f"{value:.3g}" for value in (beyond.num_params, beyond.num_tokens, beyond.flops)),
            )
        )
    return [
        *_columns(rows),
        *_wrapped("  ", "N x, D x, FLOPs x: extrapolation, times the largest run's; 1 is inside"),
    ]


def _budgets(rows: Sequence[BudgetRow]) -> list[str]:
    table = [("FLOPs", "x largest", "parameters", "80%, all variants", "tokens/param", "published laws, 80%")]
    for row in rows:
        each = row.num_params
        tokens = row.flops / FLOPS_PER_PARAM_TOKEN
        table.append(
            (
                f"{row.flops:.3g}",
                f"{row.beyond:.3g}",
                _count(each.mid),
                f"{_count(each.low)}..{_count(each.high)}",
                f"{tokens / each.high**2:.3g}..{tokens / each.low**2:.3g}",
                f"{_count(row.band.num_params.low)}..{_count(row.band.num_params.high)}",
            )
        )
    return _columns(table)


def _parabolas(found: IsoFlop) -> list[str]:
    table = [("FLOPs", "runs", "best N", "80%", "loss there", "off-centre", "vertex moved")]
    for each in found.parabolas:
        table.append(
            (
                f"{each.flops:.3g}",
                str(each.num_runs),
                _count(each.num_params.mid),
                f"{_count(each.num_params.low)}..{_count(each.num_params.high)}",
                f"{each.loss:.4f}",
                f"{each.off_centre:+.2f}",
                "" if each.shift is None else f"{each.shift - 1:+.0%}",
            )
        )
    lines = _columns(table)
    if found.exponent is not None:
        lines.append(
            f"  N = const C^a: a = {found.exponent.mid:.4f} ({found.exponent.low:.4f} to "
            f"{found.exponent.high:.4f})"
        )
    return lines


def _target(target: Target) -> str:
    return f"{_count(target.num_params)}/{_count(target.num_tokens)}"


def _count(value: float) -> str:
    return format_count(float(value))


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
