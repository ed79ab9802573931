"""The operations panel of the report: where a run's time went, what interrupted it, and when.

All times are of rank 0, as metrics.jsonl has them. The time between two attempts is what a cluster took: a
queue, a reboot, and whatever a killed process did after its last record.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtrain.tracking.charts import nice_step
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.report_tables import clock
from llmtrain.tracking.run_data import Attempt, RunData, as_number, median_of, present_values
from llmtrain.tracking.run_events import ROUTINE, stall_of_save_s, start_up_s, told
from llmtrain.units import format_duration

MAX_MARKS = 240
"""Of a lane of the timeline; those that fall on one place become one."""
MAX_INCIDENTS = 30
MAX_STALLS = 8
STALL_FACTOR = 3.0
"""A step is a stall from so many median steps on; assumed, not measured."""
MIN_STALL_S = 0.5
"""Below, nobody would look for a reason."""
TICK_STEPS_S = (
    *(1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600),
    *(2 * 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 2 * 86400, 7 * 86400, 30 * 86400),
)
MAX_TICKS = 7
LAST_TICK = 0.94
"""Where the last label may begin, as a share of the width."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of all time. `begin` and `end` are shares of the full width."""

    label: str
    style: str
    begin: float
    end: float
    time: str
    percent: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something on the timeline: a span, or a moment where begin and end are the same."""

    begin: float
    end: float
    style: str
    label: str
    """Shown where the pointer is on it."""
    text: str = ""
    """Written on it, where there is room."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    name: str
    note: str
    marks: list[Mark]


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One event that is no routine."""

    when: str
    attempt: str
    step: str
    title: str
    details: str
    level: str


@dataclass(frozen=True, kw_only=True)
class Operations:
    """What the panel shows."""

    goodput: str
    goodput_level: str
    sentence: str
    shares: list[Share]
    lanes: list[Lane]
    ticks: list[tuple[float, str]]
    """Place on the timeline, and the time since the launch."""
    began: str
    stalls: list[tuple[str, str, str]]
    """Step, seconds, why."""
    stalls_note: str
    incidents: list[Incident]
    num_more_incidents: int


@dataclass(frozen=True)
class Span:
    """An attempt on the clock: from the launch of its first process to its last record."""

    attempt: Attempt
    begin: float
    first_step: float
    """When its first step began, or its end where it did none."""
    end: float
    gap_s: float
    """Between the end of the attempt before and its begin; 0 for the first, and where clocks disagree."""


GOOD_GOODPUT, FAIR_GOODPUT = 0.9, 0.7
"""From where on the panel calls it good, or says nothing; assumed, not measured."""


def operations_of(run: RunData) -> Operations | None:
    """The panel; None for a run whose records have no time."""
    spans = spans_of(run)
    parts = seconds_of(run, spans)
    wall_s = sum(seconds for _, seconds in parts.items())
    if not spans or wall_s <= 0:
        return None
    goodput = (parts["computing"] + parts["data"]) / wall_s
    timeline = Timeline(spans)
    stalls = stalls_of(run)
    incidents = incidents_of(run)
    return Operations(
        goodput=f"{goodput:.1%}",
        goodput_level="good" if goodput >= GOOD_GOODPUT else "info" if goodput >= FAIR_GOODPUT else "warn",
        sentence=sentence_of(run, wall_s, parts),
        shares=shares_of(parts, wall_s),
        lanes=lanes_of(run, spans, timeline, stalls),
        ticks=timeline.ticks(),
        began=clock(spans[0].begin),
        stalls=[
            (f"{stall.record['step']:,}", format_duration(stall.seconds), stall.why)
            for stall in stalls[:MAX_STALLS]
        ],
        stalls_note=stalls_note_of(stalls),
        incidents=incidents[-MAX_INCIDENTS:],
        num_more_incidents=max(0, len(incidents) - MAX_INCIDENTS),
    )


def spans_of(run: RunData) -> list[Span]:
    """Every attempt on the clock."""
    firsts: dict[int, Record] = {}
    launched: dict[int, float] = {}
    for record in [*run.undone, *run.records]:
        number, at = record["attempt"], as_number(record.get("time"))
        if at is None:
            continue
        if record["kind"] == "step" and (number not in firsts or record["step"] < firsts[number]["step"]):
            firsts[number] = record
        seconds = start_up_s(record) if record.get("what") == "first_step" else None
        if seconds is not None:
            launched[number] = at - seconds
    spans: list[Span] = []
    for attempt in run.attempts:
        if attempt.ended <= 0:  # no record of it has a time
            continue
        begin = min(attempt.began, launched.get(attempt.number, attempt.began))
        first = firsts.get(attempt.number)
        first_step = attempt.ended
        if first is not None:
            first_step = max(begin, first["time"] - (as_number(first.get("step_s")) or 0.0))
        gap_s = max(0.0, begin - spans[-1].end) if spans else 0.0
        spans.append(Span(attempt, begin, first_step, max(attempt.ended, begin), gap_s))
    return spans


LABELS = {
    "computing": ("computing", "kept", "in steps that stand"),
    "data": ("waiting for data", "wait", "in steps that stand"),
    "eval": ("held-out evaluation", "eval", ""),
    "save": ("waiting for saves", "save", "the one before, and the copy"),
    "start_up": ("start-up", "start", "until the first step begins"),
    "undone": ("steps done again", "lost", "undone by restarts"),
    "down": ("between attempts", "down", "queue, nodes, unrecorded ends"),
    "other": ("other", "other", "inside attempts, on no record"),
}


def seconds_of(run: RunData, spans: Sequence[Span]) -> dict[str, float]:
    """All time from the first launch to the last record, by what it went into; the parts add up to it."""
    steps = run.of_kind("step")
    step_s = sum(present_values(steps, "step_s"))
    data_s = min(step_s, sum(present_values(steps, "data_wait_s")))
    saves = [record for record in run.records if is_save(record)]
    parts = {
        "computing": step_s - data_s,
        "data": data_s,
        "eval": sum(present_values(run.of_kind("eval"), "eval_s")),
        "save": sum(map(stall_of_save_s, saves)),
        "start_up": sum(span.first_step - span.begin for span in spans),
        "undone": sum(present_values(run.undone, "step_s")),
        "down": sum(span.gap_s for span in spans),
    }
    inside = sum(span.end - span.begin for span in spans)
    recorded = sum(seconds for name, seconds in parts.items() if name != "down")
    return {**parts, "other": max(0.0, inside - recorded)}


def is_save(record: Record) -> bool:
    """A checkpoint on a disk, or a snapshot in memory."""
    return record["kind"] == "checkpoint" or (record["kind"] == "event" and record.get("what") == "snapshot")


def shares_of(parts: dict[str, float], wall_s: float) -> list[Share]:
    """Every part that took time, one after another."""
    shares, at = [], 0.0
    for name, seconds in parts.items():
        if seconds <= 0:
            continue
        label, style, note = LABELS[name]
        end = at + seconds / wall_s
        shares.append(
            Share(
                label=label,
                style=style,
                begin=at,
                end=end,
                time=format_duration(seconds),
                percent=f"{seconds / wall_s:.1%}",
                note=note,
            )
        )
        at = end
    return shares


def sentence_of(run: RunData, wall_s: float, parts: dict[str, float]) -> str:
    """What the goodput is of, and what cost the most."""
    names = ("eval", "save", "start_up", "undone", "down", "other", "data")
    worst = max(names, key=lambda name: parts[name])
    stood_s = parts["computing"] + parts["data"]
    text = f"{format_duration(stood_s)} of {format_duration(wall_s)} went into steps that stand"
    if parts[worst] >= 0.01 * wall_s:
        label, _, note = LABELS[worst]
        text += f"; most of the rest: {label}, {format_duration(parts[worst])}" + (
            f" ({note})" if worst in ("down", "other") else ""
        )
    restarts = len(run.attempts) - 1
    return f"{text}; {restarts:,} restart{'' if restarts == 1 else 's'}."


class Timeline:
    """From a time on the clock to a place on the picture, as a share of its width."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.begin = spans[0].begin
        self.seconds = max(max(span.end for span in spans) - self.begin, 1e-3)

    def at(self, seconds: float) -> float:
        return min(1.0, max(0.0, (seconds - self.begin) / self.seconds))

    def ticks(self) -> list[tuple[float, str]]:
        """Round times since the launch."""
        fitting = [float(step) for step in TICK_STEPS_S if self.seconds / step < MAX_TICKS]
        step = fitting[0] if fitting else nice_step(self.seconds / MAX_TICKS / 86400) * 86400
        places = [number * step / self.seconds for number in range(int(self.seconds / step) + 1)]
        return [(place, _tick(place * self.seconds)) for place in places if place < LAST_TICK]


def _tick(seconds: float) -> str:
    """0, 30 s, 5 min, 2 h, 3 d: ticks are round, so one unit is enough, or two."""
    if seconds == 0:
        return "0"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def lanes_of(run: RunData, spans: Sequence[Span], timeline: Timeline, stalls: Sequence[Stall]) -> list[Lane]:
    """What happened when; a lane without a mark is left out."""
    saves = [record for record in run.records if is_save(record)]
    evals, events = run.of_kind("eval"), run.of_kind("event")
    incidents = [record for record in events if record.get("what") not in ROUTINE]
    save_s = present_values(saves, "save_s")
    lanes = [
        Lane(name="attempts", note=str(len(spans)), marks=attempt_marks(run, spans, timeline)),
        Lane(name="evaluations", note=str(len(evals)), marks=marks_of(evals, "eval", timeline, "eval_s")),
        Lane(
            name="saves",
            note=f"{len(saves)}, median {format_duration(statistics.median(save_s))}"
            if save_s
            else str(len(saves)),
            marks=marks_of(saves, "save", timeline, "save_s"),
        ),
        Lane(
            name="stalls",
            note=str(len(stalls)),
            marks=marks_of([stall.record for stall in stalls], "wait", timeline, "step_s"),
        ),
        Lane(name="incidents", note=str(len(incidents)), marks=marks_of(incidents, "", timeline)),
    ]
    return [lane for lane in lanes if lane.marks]


def attempt_marks(run: RunData, spans: Sequence[Span], timeline: Timeline) -> list[Mark]:
    """Start-up pale, steps full, in the colour of how it ended."""
    marks = []
    for span in spans:
        number, ending = span.attempt.number, span.attempt.ending
        if ending is not None:
            style, how = f"ended-{told(ending).level}", told(ending).line
        elif span.attempt is run.attempts[-1]:
            style, how = "ended-open", "no end recorded"
        else:
            style, how = "ended-bad", "killed"
        steps = f"steps {span.attempt.begin_step:,} to {span.attempt.last_step:,}"
        label = f"attempt {number}: {steps}, {format_duration(span.end - span.begin)}, {how}"
        begin, first, end = (timeline.at(at) for at in (span.begin, span.first_step, span.end))
        if first > begin:
            shown = f"attempt {number}: start-up, {format_duration(span.first_step - span.begin)}"
            marks.append(Mark(begin=begin, end=first, style="start", label=shown))
        marks.append(Mark(begin=first, end=end, style=style, label=label, text=str(number)))
    return marks


def marks_of(
    records: Iterable[Record], style: str, timeline: Timeline, seconds_field: str | None = None
) -> list[Mark]:
    """A mark for each record, from its time minus its seconds on; neighbours too close to tell are joined.

    Args:
        style: "" takes the level of the event.
    """
    marks: list[Mark] = []
    counts: list[int] = []
    for record in sorted(records, key=lambda record: as_number(record.get("time")) or 0.0):
        at = as_number(record.get("time"))
        if at is None:
            continue
        seconds = as_number(record.get(seconds_field)) if seconds_field else None
        begin, end = timeline.at(at - (seconds or 0.0)), timeline.at(at)
        it = told(record) if record["kind"] != "step" else None
        shown = f"step {record['step']:,}: {it.line if it else _reason(record)}"
        look = style or f"level-{it.level if it else 'warn'}"
        same_place = marks and begin - marks[-1].begin < 1 / MAX_MARKS and look == marks[-1].style
        if same_place:
            counts[-1] += 1
            last = marks.pop()
            first = last.label.split(" (and ")[0]
            marks.append(
                Mark(
                    begin=last.begin,
                    end=max(last.end, end),
                    style=look,
                    label=f"{first} (and {counts[-1] - 1} more)",
                )
            )
        else:
            counts.append(1)
            marks.append(Mark(begin=begin, end=end, style=look, label=shown))
    return marks


@dataclass(frozen=True)
class Stall:
    seconds: float
    record: Record
    why: str


def stalls_of(run: RunData) -> list[Stall]:
    """Settled steps, undone ones too, that took far longer than the median step, and saves that held training
    up for longer than such a step; the longest first."""
    settled = run.settled()
    typical_s = median_of(settled, "step_s") or 0.0
    timed = [(as_number(step.get("step_s")) or 0.0, step) for step in [*settled, *run.undone]]
    slow_s = max(MIN_STALL_S, STALL_FACTOR * typical_s)
    found = [Stall(seconds, step, _reason(step)) for seconds, step in timed if seconds > slow_s]
    for record in filter(is_save, run.records):
        seconds = stall_of_save_s(record)
        if seconds > max(MIN_STALL_S, typical_s):
            found.append(Stall(seconds, record, "waited for a save"))
    return sorted(found, key=lambda stall: -stall.seconds)


def stalls_note_of(stalls: Sequence[Stall]) -> str:
    if not stalls:
        return f"No step took {STALL_FACTOR:g} times the median, and no save held training up for one."
    total_s = sum(stall.seconds for stall in stalls)
    if len(stalls) == 1:
        return f"One, {format_duration(total_s)}."
    return f"{len(stalls):,}, {format_duration(total_s)} together; the longest:"


def _reason(step: Record) -> str:
    """Whether a slow step waited for data or was slow in itself."""
    seconds, wait_s = as_number(step.get("step_s")) or 0.0, as_number(step.get("data_wait_s")) or 0.0
    if wait_s > seconds / 2:
        return f"waited {format_duration(wait_s)} for data"
    return f"step of {format_duration(seconds)}, not for data"


def incidents_of(run: RunData) -> list[Incident]:
    """Events that are no routine, and kills, in the order of time."""
    found: list[tuple[float, Incident]] = []
    for record in run.of_kind("event"):
        if record.get("what") in ROUTINE:
            continue
        it, at = told(record), as_number(record.get("time")) or 0.0
        found.append(
            (
                at,
                Incident(
                    when=_when(at),
                    attempt=str(record["attempt"]),
                    step=f"{record['step']:,}",
                    title=it.title,
                    details=it.details,
                    level=it.level,
                ),
            )
        )
    for attempt in run.attempts[:-1]:
        if attempt.ending is None:
            killed = Incident(
                when=_when(attempt.ended),
                attempt=str(attempt.number),
                step=f"{attempt.last_step:,}",
                title="killed",
                details="no end recorded; this is its last record",
                level="bad",
            )
            found.append((attempt.ended, killed))
    return [incident for _, incident in sorted(found, key=lambda pair: pair[0])]


def _when(at: float) -> str:
    return clock(at).removesuffix(" UTC") if at else "–"
