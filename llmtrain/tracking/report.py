"""report.html: one self-contained page about one run, for someone who has a minute.

The page is a template filled with what `read_run` found. Each panel is a function from a run to plain values; a panel
without data says what is missing and which command makes it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llmtrain.files import atomic_write
from llmtrain.planner.laws import Interval
from llmtrain.tracking.charts import Chart, Mark, Series, number, smoothed, svg
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import Attempt, RunData, read_run
from llmtrain.units import format_bytes, format_count, format_duration

SETTLING_STEPS = 3
"""First steps of an attempt that warm caches up; medians of time and rate leave them out."""
SMOOTHING_SHARE = 30
"""The smoothed loss is a mean over the last 1/30 of the run's steps."""
MIN_STEPS_TO_CUT = 100
CUT_SHARE = 15
"""The loss picture begins at the height that the curve has after 1/15 of the steps; the fall before it is cut off."""
MAX_SAMPLES = 4
SMALL_CHART_POINTS = 150
DATA_WAIT_WARNING = 0.05
"""Share of the step time that may go into waiting for data before the page says so."""


@dataclass(frozen=True)
class Tile:
    """One big figure at the head of the page."""

    name: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True)
class Finding:
    """One sentence at the head of the page. `level` is good, warn, bad or info."""

    level: str
    text: str


@dataclass(frozen=True)
class Bar:
    """One horizontal bar. `begin` and `end` are shares of the full width."""

    label: str
    style: str
    begin: float
    end: float
    figures: list[str]


@dataclass(frozen=True)
class Comparison:
    """One row of plan beside measured; positions are shares of the drawn range."""

    name: str
    what: str
    predicted: str
    measured: str
    verdict: str
    level: str
    low: float
    mid: float
    high: float
    at: float | None


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of `run_folder` to `out` (null: report.html in it) and return its path.

    Raises:
        DataError: there is no run in that folder.
    """
    path = run_folder / "report.html" if out is None else out
    page = render(read_run(run_folder))
    with atomic_write(path, "w") as handle:
        handle.write(page)
    return path


def render(run: RunData) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("llmtrain.tracking"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clock"] = clock
    return environment.get_template("report.html.j2").render(
        run=run,
        status=status_of(run),
        verdict=verdict_of(run),
        tiles=tiles_of(run),
        findings=findings_of(run),
        compression=compression_bars(run),
        charts=charts_of(run),
        funnel=funnel_of(run),
        evaluation=evaluation_rows(run),
        comparisons=comparisons_of(run),
        attempts=[attempt_row(run, attempt) for attempt in run.attempts],
        samples=[sample_of(sample) for sample in run.samples[-MAX_SAMPLES:]],
        versions=versions_of(run),
        loss_chart=loss_chart(run),
        written=clock(time.time()),
    )


# --- the head of the page ---


def status_of(run: RunData) -> Finding:
    """How the last attempt ended."""
    ending = run.attempts[-1].ending if run.attempts else None
    step = run.attempts[-1].last_step if run.attempts else 0
    if ending is None:
        return Finding("warn", f"no end recorded: killed, or running, at step {step:,}")
    if ending["what"] == "finished":
        return Finding("good", f"finished at step {step:,}")
    if ending["what"] in ("stopped", "stop_signal"):
        return Finding("warn", f"stopped by {ending.get('signal', 'a signal')} after step {step:,}")
    if ending["what"] == "diverged":
        return Finding("bad", f"diverged at step {ending['step']:,}")
    return Finding("bad", f"failed at step {ending['step']:,}: {ending.get('error', 'no reason recorded')}")


def verdict_of(run: RunData) -> str:
    """One sentence that says what came out."""
    steps = run.of_kind("step")
    if not steps:
        return "No step was finished."
    tokens = steps[-1].get("tokens")
    begin = f"{len(steps):,} steps" + (f" over {format_count(tokens)} tokens" if tokens else "")
    bits, gzip, xz = (evaluated(run, name) for name in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte"))
    if bits is None:
        return f"{begin}. How well the model predicts held-out text in bits per byte is not measured yet: run `llmtrain evaluate`."
    against = [f"{beside(bits, other)} than {name}" for name, other in (("gzip −9", gzip), ("xz −9", xz)) if other]
    return f"{begin}. The model needs {bits:.3f} bits for a byte of held-out text" + (
        f": {' and '.join(against)}." if against else "."
    )


def beside(value: float, other: float) -> str:
    return f"{abs(1 - value / other):.0%} {'fewer' if value < other else 'more'}"


def tiles_of(run: RunData) -> list[Tile]:
    steps, evals = run.of_kind("step"), run.of_kind("eval")
    tiles = []
    loss, source = evaluated(run, "held_out_loss"), ""
    if loss is None and evals and is_number(evals[-1].get("eval_loss")):
        loss, source = evals[-1]["eval_loss"], f", at step {evals[-1]['step']:,}"
    if loss is not None:
        tiles.append(Tile("Held-out loss", f"{loss:.3f}", "nats/token", f"perplexity {math.exp(min(loss, 700)):.4g}{source}"))
    else:
        tiles.append(Tile("Held-out loss", "–", "", "not evaluated yet"))
    bits = evaluated(run, "bits_per_byte")
    if bits is None and evals and is_number(evals[-1].get("eval_bits_per_byte")):
        bits = evals[-1]["eval_bits_per_byte"]
    rivals = [
        f"{name} {value:.3f}"
        for name in ("gzip", "xz")
        if (value := evaluated(run, f"{name}_bits_per_byte")) is not None
    ]
    tiles.append(
        Tile("Bits per byte", f"{bits:.3f}" if bits is not None else "–", "", " · ".join(rivals) or "run llmtrain evaluate")
    )
    tokens, total = (steps[-1].get("tokens") if steps else None), run.setting("train", "total_tokens")
    share = f"{min(1.0, tokens / total):.0%} of {format_count(total)} planned" if tokens and total else ""
    tiles.append(Tile("Tokens seen", format_count(tokens) if tokens else "–", "", share))
    busy = sum(attempt.ended - attempt.began for attempt in run.attempts)
    median = median_of(settled(run), "step_s")
    tiles.append(
        Tile("Time", format_duration(busy), "", f"median step {format_duration(median)}" if median is not None else "")
    )
    rate, mfu = median_of(settled(run), "tokens_per_s"), median_of(settled(run), "mfu")
    tiles.append(
        Tile(
            "Throughput",
            format_count(rate) if rate is not None else "–",
            "tokens/s",
            f"MFU {mfu:.1%}" if mfu is not None else "MFU unknown: no device peak given",
        )
    )
    again = len(run.undone)
    tiles.append(
        Tile(
            "Attempts",
            str(len(run.attempts)),
            "",
            f"{plural(len(run.attempts) - 1, 'resume')}, {plural(again, 'step')} done twice",
        )
    )
    return tiles


def findings_of(run: RunData) -> list[Finding]:
    """What a careful reader of the curves would say."""
    steps = run.of_kind("step")
    findings = []
    bits, gzip, xz = (evaluated(run, name) for name in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte"))
    if bits is not None and gzip is not None:
        better = [name for name, other in (("gzip", gzip), ("xz", xz)) if other is not None and bits < other]
        worse = [name for name, other in (("gzip", gzip), ("xz", xz)) if other is not None and bits >= other]
        text = f"Predicts held-out text better than {' and '.join(better)}" if better else ""
        text += (", not yet better than " if better else "Not yet better than ") + " and ".join(worse) if worse else ""
        findings.append(Finding("good" if not worse else "warn", f"{text}."))
    not_finite = [record["step"] for record in steps if record.get("loss") is None]
    if not_finite:
        findings.append(Finding("bad", f"The loss was not finite at {plural(len(not_finite), 'step')}, first at {not_finite[0]:,}."))
    evals = [record for record in run.of_kind("eval") if is_number(record.get("eval_loss"))]
    recent = [record["loss"] for record in steps[-max(1, len(steps) // 20) :] if is_number(record.get("loss"))]
    if evals and recent and steps and evals[-1]["step"] >= steps[-1]["step"] - max(1, len(steps) // 20):
        gap = evals[-1]["eval_loss"] - statistics.fmean(recent)
        findings.append(
            Finding(
                "good" if gap < 0.2 else "warn",
                f"Held-out loss is {abs(gap):.3f} {'above' if gap >= 0 else 'below'} the training loss of the last steps"
                + ("." if gap < 0.2 else ": the model remembers more than it generalises."),
            )
        )
    epochs = epochs_of(run)
    if epochs is not None:
        findings.append(
            Finding("info" if epochs <= 4 else "warn", f"Each row of the training text was seen {epochs:.2g} times on average.")
        )
    waited, worked = total_of(steps, "data_wait_s"), total_of(steps, "step_s")
    if waited is not None and worked:
        share = waited / worked
        findings.append(
            Finding(
                "good" if share < DATA_WAIT_WARNING else "warn",
                f"Waiting for data took {share:.2%} of the step time.",
            )
        )
    clip = run.setting("train", "grad_clip")
    norms = [record["grad_norm"] for record in steps if is_number(record.get("grad_norm"))]
    if clip and norms:
        clipped = sum(norm > clip for norm in norms) / len(norms)
        findings.append(Finding("info", f"Gradients were clipped (norm above {clip:g}) in {clipped:.0%} of the steps."))
    if len(run.attempts) > 1:
        findings.append(
            Finding(
                "info",
                f"Resumed {plural(len(run.attempts) - 1, 'time')}; {plural(len(run.undone), 'step')} lost to a kill "
                f"and done again ({len(run.undone) / max(1, len(steps)):.1%} of the run).",
            )
        )
    said = [record["text"] for record in run.of_kind("event") if record.get("what") == "wandb" and "text" in record]
    findings += [Finding("info", f"W&B: {text}.") for text in dict.fromkeys(said) if "drop" in text or "not" in text]
    return findings


def compression_bars(run: RunData) -> list[Bar]:
    """Bits per byte of the model and of two compressors, on one scale from 0."""
    named = [("this model", "bits_per_byte", "model"), ("xz −9", "xz_bits_per_byte", "rival"), ("gzip −9", "gzip_bits_per_byte", "rival")]
    values = [(label, value, style) for label, key, style in named if (value := evaluated(run, key)) is not None]
    longest = max((value for _, value, _ in values), default=0.0)
    if longest <= 0 or evaluated(run, "bits_per_byte") is None:
        return []
    return [Bar(label, style, 0.0, value / longest, [f"{value:.3f}"]) for label, value, style in values]


# --- curves ---


def loss_chart(run: RunData) -> Markup:
    steps, evals = run.of_kind("step"), run.of_kind("eval")
    xs = [record["step"] for record in steps]
    ys = values_of(steps, "loss")
    window = max(1, len(steps) // SMOOTHING_SHARE)
    calm = smoothed(ys, window)
    series = [Series(xs=xs, ys=ys, style="faint-train")]
    for begin in sorted({record["attempt"] for record in run.undone}):
        lost = [record for record in run.undone if record["attempt"] == begin]
        series.append(Series(xs=[r["step"] for r in lost], ys=values_of(lost, "loss"), style="undone"))
    series.append(Series(xs=xs, ys=calm, style="train", label=end_label("train", calm)))
    if evals:
        held_out = values_of(evals, "eval_loss")
        series.append(
            Series(
                xs=[record["step"] for record in evals],
                ys=held_out,
                style="held-out",
                label=end_label("held-out", held_out),
                has_points=True,
            )
        )
    y_high = None
    if len(steps) >= MIN_STEPS_TO_CUT:
        after_start = [y for y in calm[len(calm) // CUT_SHARE :] if y is not None]
        y_high = max([*after_start, *(y for y in values_of(evals, "eval_loss") if y is not None)], default=None)
    tokens = {record["step"]: record["tokens"] for record in steps if is_number(record.get("tokens"))}
    per_step = max(tokens.values()) / max(tokens) if tokens else None
    return Markup(
        svg(
            Chart(
                series=series,
                y_unit="nats per token",
                width=800,
                height=430,
                y_high=y_high,
                marks=resume_marks(run),
                right=110,
                second_x=(lambda step: number(float(f"{step * per_step:.3g}"))) if per_step else None,
                second_x_unit="tokens",
            )
        )
    )


def end_label(name: str, ys: Sequence[float | None]) -> str:
    last = next((y for y in reversed(ys) if y is not None), None)
    return f"{name} {last:.3f}" if last is not None else name


def charts_of(run: RunData) -> list[tuple[str, str, Markup]]:
    """(title, note, chart) of every smaller curve that has values."""
    steps = run.of_kind("step")
    xs = [record["step"] for record in steps]

    def curve(
        title: str,
        name: str,
        y_unit: str,
        *,
        note: str = "",
        log_y: bool = False,
        from_zero: bool = False,
        scale: float = 1.0,
        format_y: Callable[[float], str] | None = None,
    ) -> tuple[str, str, Markup]:
        ys = [None if y is None else y * scale for y in values_of(steps, name)]
        chart = Chart(
            series=[Series(xs=xs, ys=ys, style="train", has_band=True)],
            y_unit=y_unit,
            marks=[Mark(x=mark.x, label="") for mark in resume_marks(run)],
            log_y=log_y,
            from_zero=from_zero,
            format_y=format_y,
            max_points=SMALL_CHART_POINTS,
        )
        return title, note, Markup(svg(chart))

    rate, wait, step_s = (median_of(settled(run), name) for name in ("tokens_per_s", "data_wait_s", "step_s"))
    memory = [record["mem_gib"] for record in steps if is_number(record.get("mem_gib"))]
    norms = [record["grad_norm"] for record in steps if is_number(record.get("grad_norm"))]
    peak = run.setting("train", "device_peak_tflops")
    lr = [y for y in values_of(steps, "lr") if y is not None]
    charts = [
        curve("Throughput", "tokens_per_s", "tokens per second", from_zero=True, note=f"median {format_count(rate)}" if rate else ""),
        curve("Model FLOPs utilization", "mfu", "share of the devices' peak", from_zero=True, format_y=lambda y: f"{y:.0%}", note=f"of {peak:g} TFLOP/s" if peak else ""),
        curve("Step time", "step_s", "milliseconds", from_zero=True, scale=1e3, note=f"median {format_duration(step_s)}" if step_s else ""),
        curve("Waiting for data", "data_wait_s", "milliseconds per step", from_zero=True, scale=1e3, note=f"median {wait * 1e3:.2g} ms" if wait is not None else ""),
        curve("Learning rate", "lr", "step size", from_zero=True, note=f"peak {max(lr):.3g}" if lr else ""),
        curve("Gradient norm", "grad_norm", "L2, before clipping, log scale", log_y=True, note=f"largest {max(norms):.3g}" if norms else ""),
        curve("Memory", "mem_gib", "GiB, peak of one rank", from_zero=True, note=f"peak {max(memory):.3g} GiB" if memory else ""),
    ]  # fmt: skip
    drawn = [chart for chart in charts if chart[2]]
    if len(drawn) == len(charts):  # throughput and step time are one curve and its inverse: six fill two rows
        drawn = [chart for chart in drawn if chart[0] != "Step time"]
    return drawn


def resume_marks(run: RunData) -> list[Mark]:
    marks = []
    for before, attempt in zip(run.attempts, run.attempts[1:], strict=False):
        word = "resumed" if before.ending is not None else "killed, resumed"
        marks.append(Mark(x=attempt.begin_step, label=word))
    return marks


# --- tables ---


def funnel_of(run: RunData) -> list[Bar]:
    """A bar for what came in, one for each reason to drop, one for what was kept: widths are documents."""
    passes = run.manifest.funnel if run.manifest is not None else []
    first = next((count_of(entry, "documents", "in") for entry in passes), None)
    if not first:
        return []
    bars = [Bar("read", "in", 0.0, 1.0, figures_of(passes[0], "in", first))]
    for entry in passes:
        left = count_of(entry, "documents", "in") or 0
        reasons = (entry.get("documents") or {}).get("dropped") or {}
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            bars.append(
                Bar(
                    f"{pass_name(entry)}: {reason.replace('_', ' ')}",
                    "dropped",
                    (left - count) / first,
                    left / first,
                    figures_of(entry, reason, first),
                )
            )
            left -= count
    kept = count_of(passes[-1], "documents", "kept") or 0
    bars.append(Bar("kept", "kept", 0.0, kept / first, figures_of(passes[-1], "kept", first)))
    return bars


def pass_name(entry: dict[str, Any]) -> str:
    return str(entry.get("pass") or entry.get("name") or "pass")


def count_of(entry: dict[str, Any], measure: str, what: str) -> float | None:
    """documents, bytes or tokens that came in, were kept, or were dropped for the reason `what`."""
    counts = entry.get(measure) or {}
    value = counts.get(what) if what in ("in", "kept") else (counts.get("dropped") or {}).get(what)
    return float(value) if is_number(value) else None


def figures_of(entry: dict[str, Any], what: str, all_documents: float) -> list[str]:
    """Share of documents, documents, bytes, tokens."""
    documents, size, tokens = (count_of(entry, measure, what) for measure in ("documents", "bytes", "tokens"))
    return [
        f"{documents / all_documents:.1%}" if documents is not None else "–",
        f"{documents:,.0f}" if documents is not None else "–",
        format_bytes(size) if size is not None else "–",
        format_count(tokens) if tokens is not None else "–",
    ]


def evaluation_rows(run: RunData) -> list[tuple[str, str, str]]:
    """(what, value, meaning) of `llmtrain evaluate`."""
    wanted = [
        ("Loss", "held_out_loss", ".4f", "nats per token"),
        ("Perplexity", "perplexity", ".5g", "exp of the loss"),
        ("Bits per byte", "bits_per_byte", ".4f", "of the held-out text, free of the tokenizer"),
        ("gzip −9", "gzip_bits_per_byte", ".4f", "bits per byte of the same text"),
        ("xz −9", "xz_bits_per_byte", ".4f", "bits per byte of the same text"),
        ("Targets", "num_targets", ",.0f", "tokens that were predicted"),
        ("Text", "text_bytes", ",.0f", "bytes of UTF-8"),
        ("Checkpoint", "step", ",.0f", "steps"),
    ]
    return [
        (name, format(value, form), meaning)
        for name, key, form, meaning in wanted
        if (value := evaluated(run, key)) is not None
    ]


def comparisons_of(run: RunData) -> list[Comparison]:
    """Predicted intervals beside what was measured."""
    if run.prediction is None:
        return []
    prediction, steady = run.prediction, settled(run)
    evals = run.of_kind("eval")
    loss = evaluated(run, "held_out_loss")
    if loss is None and evals and is_number(evals[-1].get("eval_loss")):
        loss = evals[-1]["eval_loss"]
    return [
        comparison("Step time", "median", prediction.step_s, median_of(steady, "step_s"), format_duration),
        comparison("Tokens per second", "median", prediction.tokens_per_s, median_of(steady, "tokens_per_s"), format_count),
        comparison("Time of all steps", "sum", prediction.total_s, total_of(run.of_kind("step"), "step_s"), format_duration),
        comparison("Held-out loss", "nats/token", prediction.loss, loss, lambda value: f"{value:.3f}"),
    ]  # fmt: skip


def comparison(
    name: str, what: str, interval: Interval, measured: float | None, form: Callable[[float], str]
) -> Comparison:
    ends = [interval.low, interval.high, *([measured] if measured is not None else [])]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.08 or abs(high) * 0.08 or 1.0
    low, high = low - pad, high + pad

    def share(value: float) -> float:
        return (value - low) / (high - low)

    if measured is None:
        verdict, level = "not measured", "info"
    elif measured < interval.low:
        verdict, level = outside(interval.low / measured, "below"), "warn"
    elif measured > interval.high:
        verdict, level = outside(measured / interval.high, "above"), "warn"
    else:
        verdict, level = "inside", "good"
    return Comparison(
        name=name,
        what=what,
        predicted=f"{form(interval.low)} – {form(interval.high)}",
        measured=form(measured) if measured is not None else "–",
        verdict=verdict,
        level=level,
        low=share(interval.low),
        mid=share(interval.mid),
        high=share(interval.high),
        at=share(measured) if measured is not None else None,
    )


def outside(factor: float, side: str) -> str:
    """'12% below', or '3.4 times above' for what is far off."""
    return f"{factor:.2g} times {side}" if factor >= 2 else f"{factor - 1:.0%} {side}"


def attempt_row(run: RunData, attempt: Attempt) -> dict[str, str]:
    ending = attempt.ending
    if ending is not None:
        end = {"stopped": f"stopped by {ending.get('signal', 'a signal')}", "stop_signal": "stopped by a signal"}.get(
            ending["what"], str(ending["what"])
        )
    else:
        end = "no end recorded" if attempt is run.attempts[-1] else "killed"
    commit = str(attempt.facts.get("git_commit") or "")[:10]
    return {
        "number": str(attempt.number),
        "began": clock(attempt.began).removesuffix(" UTC"),
        "steps": f"{attempt.begin_step:,} → {attempt.last_step:,}",
        "time": format_duration(attempt.ended - attempt.began),
        "end": end,
        "host": str(attempt.facts.get("host", "–")),
        "ranks": str(attempt.facts.get("world_size", "–")),
        "commit": (commit + (" + changes" if attempt.facts.get("git_dirty") else "")) if commit else "–",
        "command": str(attempt.facts.get("command_line", "–")),
    }


def sample_of(sample: dict[str, Any]) -> dict[str, str]:
    settings = [f"{name} {sample[name]:g}" for name in ("temperature", "top_k", "top_p") if is_number(sample.get(name))]
    if is_number(sample.get("step")):
        settings.append(f"step {sample['step']:,}")
    text = sample["text"].removeprefix(sample["prompt"])
    return {"prompt": sample["prompt"], "text": text, "settings": " · ".join(settings)}


def versions_of(run: RunData) -> list[tuple[str, str]]:
    facts = run.attempts[-1].facts if run.attempts else {}
    peak = run.setting("train", "device_peak_tflops")
    named = [
        ("python", facts.get("python")),
        *sorted((facts.get("versions") or {}).items()),
        ("platform", facts.get("platform")),
        ("cpu", facts.get("cpu")),
        ("cores", facts.get("num_cpus")),
        ("device peak", f"{peak:g} TFLOP/s, {run.setting('train', 'device_peak_source')}" if peak else None),
        ("memory", format_bytes(facts["memory_bytes"]) if facts.get("memory_bytes") else None),
    ]
    return [(name, str(value)) for name, value in named if value is not None]


# --- arithmetic on records ---


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def values_of(records: Sequence[Record], name: str) -> list[float | None]:
    return [float(record[name]) if is_number(record.get(name)) else None for record in records]


def median_of(records: Sequence[Record], name: str) -> float | None:
    present = [value for value in values_of(records, name) if value is not None]
    return statistics.median(present) if present else None


def total_of(records: Sequence[Record], name: str) -> float | None:
    present = [value for value in values_of(records, name) if value is not None]
    return math.fsum(present) if present else None


def settled(run: RunData) -> list[Record]:
    """Steps past the first of their attempt; all of them when that leaves none."""
    begins = {attempt.number: attempt.begin_step for attempt in run.attempts}
    steps = run.of_kind("step")
    return [r for r in steps if r["step"] > begins.get(r["attempt"], 0) + SETTLING_STEPS] or steps


def evaluated(run: RunData, name: str) -> float | None:
    """A number of evaluation.json."""
    value = (run.evaluation or {}).get(name)
    return float(value) if value is not None and is_number(value) else None


def epochs_of(run: RunData) -> float | None:
    """How often the run went over its rows."""
    steps, seq_len = run.of_kind("step"), run.setting("data", "seq_len")
    if run.manifest is None or not steps or not is_number(steps[-1].get("position")):
        return None
    rows = [pack.num_rows for pack in run.manifest.packs if pack.split == "train" and pack.seq_len == seq_len]
    return steps[-1]["position"] / rows[0] if rows and rows[0] else None


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
