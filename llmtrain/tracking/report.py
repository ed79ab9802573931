"""report.html: one self-contained page about one run, for someone who has a minute.

The page is a template filled with what `read_run` found. Each panel is a function from a run to plain values;
a panel without data says what is missing and which command makes it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from llmtrain.files import atomic_write
from llmtrain.tracking.operations import operations_of
from llmtrain.tracking.report_curves import loss_chart, small_charts, smoothed_steps
from llmtrain.tracking.report_tables import (
    attempt_row,
    clock,
    comparisons_of,
    compression_bars,
    evaluation_rows,
    funnel_notes,
    funnel_of,
    sample_of,
    versions_of,
)
from llmtrain.tracking.run_data import RunData, as_number, median_of, present_values, read_run
from llmtrain.units import format_count, format_duration

MAX_SAMPLES = 4
DATA_WAIT_WARNING = 0.05
"""Share of the step time that may go into waiting for data before the page warns."""
GAP_WARNING = 0.2
"""Nats by which the held-out loss may exceed the training loss before the page warns; assumed, not
measured."""
MAX_EPOCHS_AS_GOOD_AS_NEW = 4.0
"""Repeats up to here cost almost nothing (Muennighoff et al. 2023, arXiv:2305.16264, section 6)."""
RIVALS = (("gzip", "gzip_bits_per_byte"), ("xz", "xz_bits_per_byte"))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One big figure at the head of the page."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One sentence at the head of the page. `level` is good, warn, bad or info."""

    level: str
    text: str


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of `run_folder` to `out` (None: report.html in it) and return its path.

    Raises:
        DataError: there is no run in that folder.
    """
    path = run_folder / "report.html" if out is None else out
    page = render(read_run(run_folder))
    with atomic_write(path, "w") as handle:
        handle.write(page)
    return path


def template(name: str) -> Template:
    """A page of `templates/`; a name that it is not given is an error."""
    environment = Environment(
        loader=PackageLoader("llmtrain.tracking"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(run: RunData) -> str:
    """The whole page as text."""
    return template("report.html.j2").render(
        run=run,
        status=status_of(run),
        verdict=verdict_of(run),
        tiles=tiles_of(run),
        findings=list(findings_of(run)),
        compression=compression_bars(run),
        loss_chart=loss_chart(run),
        smoothed_steps=smoothed_steps(run),
        charts=small_charts(run),
        funnel=funnel_of(run),
        funnel_notes=funnel_notes(run),
        comparisons=comparisons_of(run),
        evaluation=evaluation_rows(run),
        operations=operations_of(run),
        attempts=[attempt_row(run, attempt) for attempt in run.attempts],
        samples=[sample_of(sample) for sample in run.samples[-MAX_SAMPLES:]],
        versions=versions_of(run),
        written=clock(time.time()),
    )


def status_of(run: RunData) -> Finding:
    """How the last attempt ended."""
    if not run.attempts:
        return Finding("warn", "nothing recorded yet")
    last = run.attempts[-1]
    if last.ending is None:
        return Finding("warn", f"no end recorded: killed or still running, at step {last.last_step:,}")
    what, step = last.ending["what"], last.ending["step"]
    if what == "finished":
        return Finding("good", f"finished at step {step:,}")
    if what == "stopped":
        return Finding("warn", f"stopped by {last.ending.get('signal', 'a signal')} after step {step:,}")
    if what == "diverged":
        return Finding("bad", f"diverged at step {step:,}")
    if what == "hang":
        return Finding("bad", f"hung at step {step:,}: {last.ending.get('error', 'no reason recorded')}")
    return Finding("bad", f"failed at step {step:,}: {last.ending.get('error', 'no reason recorded')}")


def verdict_of(run: RunData) -> str:
    """One or two sentences that say what came out."""
    steps = run.of_kind("step")
    if not steps:
        return "No step was finished."
    tokens = as_number(steps[-1].get("tokens"))
    begin = plural(len(steps), "step") + (f" over {format_count(tokens)} tokens." if tokens else ".")
    bits = run.evaluated("bits_per_byte")
    if bits is None:
        return (
            f"{begin} Not evaluated against compressors yet: run `llmtrain evaluate checkpoint={run.folder}`."
        )
    against = [
        f"{abs(1 - bits / other):.0%} {'fewer' if bits < other else 'more'} than {name} −9"
        for name, key in RIVALS
        if (other := run.evaluated(key))
    ]
    sentence = f"{begin} The model needs {bits:.3f} bits for a byte of held-out text"
    return f"{sentence}: {' and '.join(against)}." if against else f"{sentence}."


def tiles_of(run: RunData) -> list[Tile]:
    """The six figures that are asked for first; an absent one is a dash with the reason."""
    return [
        _loss_tile(run),
        _bits_tile(run),
        _tokens_tile(run),
        _time_tile(run),
        _rate_tile(run),
        _attempts_tile(run),
    ]


def _loss_tile(run: RunData) -> Tile:
    loss = run.held_out_loss()
    if loss is None:
        return Tile(name="Held-out loss", value="–", note="not evaluated yet")
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float just above
    return Tile(
        name="Held-out loss", value=f"{loss:.3f}", unit="nats/token", note=f"perplexity {perplexity:.4g}"
    )


def _bits_tile(run: RunData) -> Tile:
    bits = run.evaluated("bits_per_byte")
    if bits is None:
        return Tile(name="Bits per byte", value="–", note="not evaluated yet")
    rivals = [f"{name} {value:.3f}" for name, key in RIVALS if (value := run.evaluated(key)) is not None]
    return Tile(name="Bits per byte", value=f"{bits:.3f}", note=" · ".join(rivals))


def _tokens_tile(run: RunData) -> Tile:
    seen = present_values(run.of_kind("step"), "tokens")
    if not seen:
        return Tile(name="Tokens trained on", value="–")
    consumed, total = run.consumed_tokens(), as_number(run.setting("train", "total_tokens"))
    share = (
        f"{min(1.0, consumed / total):.0%} of {format_count(total)} consumed" if consumed and total else ""
    )
    return Tile(name="Tokens trained on", value=format_count(seen[-1]), note=share)


def _time_tile(run: RunData) -> Tile:
    busy_s = sum(attempt.ended - attempt.began for attempt in run.attempts)
    step_s = median_of(run.settled(), "step_s")
    note = f"median step {format_duration(step_s)}" if step_s is not None else ""
    return Tile(name="Time", value=format_duration(busy_s), note=note)


def _rate_tile(run: RunData) -> Tile:
    rate, mfu = median_of(run.settled(), "tokens_per_s"), median_of(run.settled(), "mfu")
    return Tile(
        name="Throughput",
        value=format_count(rate) if rate is not None else "–",
        unit="tokens/s",
        note=f"MFU {mfu:.1%}" if mfu is not None else "no device peak, so no MFU",
    )


def _attempts_tile(run: RunData) -> Tile:
    resumes = plural(max(0, len(run.attempts) - 1), "resume")
    return Tile(
        name="Attempts",
        value=str(len(run.attempts)),
        note=f"{resumes}, {plural(len(run.undone), 'step')} redone" if run.undone else resumes,
    )


def findings_of(run: RunData) -> Iterator[Finding]:
    """What a careful reader of the curves would say."""
    steps = run.of_kind("step")
    bits = run.evaluated("bits_per_byte")
    if bits is not None:
        yield from _against_compressors(run, bits)
    not_finite = [record["step"] for record in steps if record.get("loss") is None]
    if not_finite:
        yield Finding(
            "bad", f"The loss was not finite in {plural(len(not_finite), 'step')}, first {not_finite[0]:,}."
        )
    yield from _generalisation(run)
    if run.manifest_note:
        yield Finding("info", run.manifest_note)
    epochs = run.num_epochs()
    if epochs is not None:
        level = "info" if epochs <= MAX_EPOCHS_AS_GOOD_AS_NEW else "warn"
        yield Finding(level, f"The run went over its training text {epochs:.2g} times.")
    waited, worked = sum(present_values(steps, "data_wait_s")), sum(present_values(steps, "step_s"))
    if worked:
        level = "good" if waited / worked < DATA_WAIT_WARNING else "warn"
        yield Finding(level, f"Waiting for data took {waited / worked:.2%} of the step time.")
    clip, norms = as_number(run.setting("train", "grad_clip")), present_values(steps, "grad_norm")
    if clip and norms:
        clipped = sum(norm > clip for norm in norms) / len(norms)
        yield Finding(
            "info", f"Gradients were clipped, with a norm above {clip:g}, in {clipped:.0%} of the steps."
        )
    if run.undone:
        yield _redone_steps(run)
    for text in dict.fromkeys(
        str(event.get("text")) for event in run.of_kind("event") if event.get("what") == "wandb"
    ):
        if "not " in text:
            yield Finding("info", f"W&B: {text}.")


def _against_compressors(run: RunData, bits: float) -> Iterator[Finding]:
    measured = [(name, value) for name, key in RIVALS if (value := run.evaluated(key)) is not None]
    better = " and ".join(name for name, other in measured if bits < other)
    worse = " and ".join(name for name, other in measured if bits >= other)
    if better and worse:
        yield Finding("good", f"Predicts held-out text better than {better}, not yet better than {worse}.")
    elif better:
        yield Finding("good", f"Predicts held-out text better than {better}.")
    elif worse:
        yield Finding("warn", f"Predicts held-out text not yet better than {worse}.")


def _generalisation(run: RunData) -> Iterator[Finding]:
    """Held-out against training loss, where both were measured at the end."""
    steps = run.of_kind("step")
    recent = steps[-max(1, len(steps) // 20) :]
    evals = [record for record in run.of_kind("eval") if as_number(record.get("eval_loss")) is not None]
    losses = present_values(recent, "loss")
    if not (losses and evals and evals[-1]["step"] >= recent[0]["step"]):
        return
    gap = evals[-1]["eval_loss"] - statistics.fmean(losses)
    side = "above" if gap >= 0 else "below"
    text = (
        f"Held-out loss is {abs(gap):.3f} {side} the training loss of the last {plural(len(recent), 'step')}"
    )
    if gap < GAP_WARNING:
        yield Finding("good", f"{text}.")
    else:
        yield Finding("warn", f"{text}: the model learns its text by heart, or the two differ in kind.")


def _redone_steps(run: RunData) -> Finding:
    """How much work a kill cost, and whether the second time gave the same losses."""
    steps = {record["step"]: record.get("loss") for record in run.of_kind("step")}
    share = len(run.undone) / max(1, len(steps))
    verb = "was" if len(run.undone) == 1 else "were"
    text = f"{plural(len(run.undone), 'step')} ({share:.1%}) {verb} undone by a kill"
    pairs = [(as_number(record.get("loss")), as_number(steps.get(record["step"]))) for record in run.undone]
    differences = [abs(now - before) for before, now in pairs if before is not None and now is not None]
    if not differences:
        return Finding("info", f"{text}.")
    if max(differences) == 0:
        return Finding("good", f"{text} and done again; losses equal to the last bit.")
    return Finding("warn", f"{text} and done again; losses differ by up to {max(differences):.2g}.")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
