"""The bars and tables of the report, as plain values that the template only lays out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.planner.interval import Interval
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import Attempt, RunData, as_number, median_of, present_values
from llmtrain.units import format_bytes, format_count, format_duration

INTERPRETER = re.compile(r"^\S*python[\d.]* (-m llmtrain\.cli\.main|\S*\bllmtrain) ")
"""How the shell's `llmtrain` looks from inside the process."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One horizontal bar. `begin` and `end` are shares of the full width."""

    label: str
    style: str
    begin: float
    end: float
    figures: list[str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of plan beside measured. low, mid, high and at are positions, as shares of the drawn range."""

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


def compression_bars(run: RunData) -> list[Bar]:
    """Bits per byte of the model and of two compressors, on one scale from 0."""
    if not run.evaluated("bits_per_byte"):
        return []
    named = (
        ("this model", "bits_per_byte", "model"),
        ("xz −9", "xz_bits_per_byte", "rival"),
        ("gzip −9", "gzip_bits_per_byte", "rival"),
    )
    found = [(label, bits, style) for label, key, style in named if (bits := run.evaluated(key)) is not None]
    longest = max(bits for _, bits, _ in found)
    return [
        Bar(label=label, style=style, begin=0.0, end=bits / longest, figures=[f"{bits:.3f}"])
        for label, bits, style in found
    ]


def funnel_of(run: RunData) -> list[Bar]:
    """A bar for what was read, one for each reason to drop, one for what was kept; widths are bytes."""
    passes = [entry for entry in _funnel(run) if _count(entry["in"], "bytes")]
    if not passes:
        return []
    read, kept = passes[0]["in"], passes[-1]["kept"]
    all_bytes = float(read["bytes"])
    bars = [Bar(label="read", style="in", begin=0.0, end=1.0, figures=_figures(read, all_bytes))]
    for entry in passes:
        left = float(entry["in"]["bytes"])
        dropped = entry.get("dropped") or {}
        largest_first = sorted(dropped.items(), key=lambda item: -(_count(item[1], "bytes") or 0.0))
        for reason, counts in largest_first:
            after = left - (_count(counts, "bytes") or 0.0)
            bars.append(
                Bar(
                    label=f"{entry['pass']}: {reason.replace('_', ' ')}",
                    style="dropped",
                    begin=after / all_bytes,
                    end=left / all_bytes,
                    figures=_figures(counts, all_bytes),
                )
            )
            left = after
    share = (_count(kept, "bytes") or 0.0) / all_bytes
    return [*bars, Bar(label="kept", style="kept", begin=0.0, end=share, figures=_figures(kept, all_bytes))]


def funnel_notes(run: RunData) -> list[str]:
    """What became of the kept text: its splits, and the packs made of it."""
    notes = []
    for entry in _funnel(run):
        for split, counts in (entry.get("splits") or {}).items():
            size, documents = _count(counts, "bytes"), _count(counts, "documents")
            if size is not None and documents is not None:
                notes.append(f"{split.replace('_', '-')}: {documents:,.0f} documents, {format_bytes(size)}")
        tokens, targets = _count(entry["in"], "tokens"), _count(entry["kept"], "tokens")
        if tokens and targets is not None:
            notes.append(
                f"{entry['pass']}: {format_count(tokens)} tokens, {targets / tokens:.1%} of them targets"
            )
    return notes


def _funnel(run: RunData) -> list[dict[str, Any]]:
    return run.manifest.funnel if run.manifest is not None else []


def _count(counts: Mapping[str, Any], measure: str) -> float | None:
    return as_number(counts.get(measure))


def _figures(counts: Mapping[str, Any], all_bytes: float) -> list[str]:
    """Share of the bytes, bytes, documents, tokens."""
    size, documents, tokens = (_count(counts, measure) for measure in ("bytes", "documents", "tokens"))
    return [
        f"{size / all_bytes:.1%}" if size is not None else "–",
        format_bytes(size) if size is not None else "–",
        f"{documents:,.0f}" if documents is not None else "–",
        format_count(tokens) if tokens is not None else "–",
    ]


def evaluation_rows(run: RunData) -> list[tuple[str, str, str]]:
    """(what, value, meaning) of everything `llmtrain evaluate` measured."""
    wanted = (
        ("Loss", "held_out_loss", ".4f", "nats per token"),
        ("Perplexity", "perplexity", ".5g", "exp of the loss"),
        ("Bits per byte", "bits_per_byte", ".4f", "of the held-out text, whatever the tokenizer"),
        ("gzip −9", "gzip_bits_per_byte", ".4f", "bits per byte of the same text"),
        ("xz −9", "xz_bits_per_byte", ".4f", "bits per byte of the same text"),
        ("Targets", "num_targets", ",.0f", "tokens that were predicted"),
        ("Text", "text_bytes", ",.0f", "bytes of UTF-8"),
        ("Checkpoint", "step", ",.0f", "steps"),
    )
    return [
        (name, format(value, form), meaning)
        for name, key, form, meaning in wanted
        if (value := run.evaluated(key)) is not None
    ]


def comparisons_of(run: RunData) -> list[Comparison]:
    """Predicted intervals beside what was measured; empty without a plan."""
    if run.forecast is None:
        return []
    predicted, settled = run.forecast, run.settled()
    spent_s = sum(present_values(run.of_kind("step"), "step_s")) or None
    return [
        comparison("Step time", "median", predicted.step_s, median_of(settled, "step_s"), format_duration),
        comparison("Time of all steps", "sum", predicted.train_s, spent_s, format_duration),
        comparison("Peak memory", "of rank 0", predicted.recorded_bytes, _peak_bytes(settled), format_bytes),
        comparison(
            "Held-out loss", "nats per token", predicted.loss, run.held_out_loss(), lambda nats: f"{nats:.3f}"
        ),
    ]


def _peak_bytes(steps: list[Record]) -> float | None:
    """Most memory that rank 0 has held, bytes."""
    held = present_values(steps, "mem_gib")
    return max(held) * 2**30 if held else None


def comparison(
    name: str, what: str, interval: Interval, measured: float | None, form: Callable[[float], str]
) -> Comparison:
    """Hold `measured` against `interval`, and lay both out on one line."""
    ends = [interval.low, interval.high, *([] if measured is None else [measured])]
    pad = (max(ends) - min(ends)) * 0.08 or abs(max(ends)) * 0.08 or 1.0
    left, width = min(ends) - pad, max(ends) - min(ends) + 2 * pad
    if measured is None:
        verdict, level = "not measured", "info"
    elif measured < interval.low:
        verdict, level = _outside(interval.low, measured, "below"), "warn"
    elif measured > interval.high:
        verdict, level = _outside(measured, interval.high, "above"), "warn"
    else:
        verdict, level = "inside", "good"
    return Comparison(
        name=name,
        what=what,
        predicted=f"{form(interval.low)} – {form(interval.high)}",
        measured=form(measured) if measured is not None else "–",
        verdict=verdict,
        level=level,
        low=(interval.low - left) / width,
        mid=(interval.mid - left) / width,
        high=(interval.high - left) / width,
        at=(measured - left) / width if measured is not None else None,
    )


def _outside(larger: float, smaller: float, side: str) -> str:
    """'12% below', or '3.4 times above' for what is far off."""
    if smaller <= 0 or larger >= 2 * smaller:
        return f"{larger / smaller:.2g} times {side}" if smaller > 0 else side
    share = larger / smaller - 1 if side == "above" else 1 - smaller / larger
    return f"{share:.0%} {side}"


def attempt_row(run: RunData, attempt: Attempt) -> dict[str, str]:
    ending = attempt.ending
    if ending is None:
        end = "no end recorded" if attempt is run.attempts[-1] else "killed"
    elif ending["what"] == "stopped":
        end = f"stopped by {ending.get('signal', 'a signal')}"
    else:
        end = str(ending["what"])
    commit = str(attempt.facts.get("git_commit") or "–")[:10]
    return {
        "number": str(attempt.number),
        "began": clock(attempt.began).removesuffix(" UTC"),
        "steps": f"{attempt.begin_step:,} → {attempt.last_step:,}",
        "time": format_duration(attempt.ended - attempt.began),
        "end": end,
        "host": str(attempt.facts.get("host", "–")),
        "ranks": str(attempt.facts.get("world_size", "–")),
        "commit": f"{commit} + changes" if attempt.facts.get("git_dirty") else commit,
        "command": INTERPRETER.sub("llmtrain ", str(attempt.facts.get("command_line", "–"))),
    }


def sample_of(sample: Mapping[str, Any]) -> dict[str, str]:
    """Prompt, continuation and how it was drawn. A text that repeats its prompt loses it."""
    settings = [
        f"{name.replace('_', '-')} {value:g}"
        for name in ("temperature", "top_k", "top_p", "step")
        if (value := as_number(sample.get(name))) is not None
    ]
    text = str(sample["text"]).removeprefix(str(sample["prompt"]))
    return {"prompt": str(sample["prompt"]), "text": text, "settings": " · ".join(settings)}


def versions_of(run: RunData) -> list[tuple[str, str]]:
    """Versions and machine of the last attempt."""
    facts = run.attempts[-1].facts if run.attempts else {}
    memory_bytes, peak = as_number(facts.get("memory_bytes")), run.setting("train", "device_peak_tflops")
    source = run.setting("train", "device_peak_source")
    named = [
        ("python", facts.get("python")),
        *sorted((facts.get("versions") or {}).items()),
        ("platform", facts.get("platform")),
        ("cpu", facts.get("cpu")),
        ("cores", facts.get("num_cpus")),
        ("memory", format_bytes(memory_bytes) if memory_bytes else None),
        ("device peak", f"{peak:g} TFLOP/s, {source}" if as_number(peak) is not None else None),
    ]
    return [(name, str(value)) for name, value in named if value is not None]


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
