"""The runs below a folder, each from the ends of its metrics.jsonl: for thousands of runs of any length.

Of a long file the beginning, the end and a few blocks between are read, so a run costs the same whether it
did a thousand steps or a million. What that cannot tell exactly is marked as an estimate.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from llmtrain.errors import DataError
from llmtrain.tracking.beats import Pulse, pulse_of
from llmtrain.tracking.follow import parse_lines
from llmtrain.tracking.metrics import Record, attempt_begins, standing
from llmtrain.tracking.run_data import ENDINGS, as_number, present_values
from llmtrain.tracking.run_events import shortened, start_up_s

METRICS_NAME = "metrics.jsonl"
FACTS_NAME = "run.json"
CONFIG_NAME = "config.yaml"
NOT_SEARCHED = {"checkpoints", "wandb", "tensorboard", "__pycache__", "node_modules"}
"""Folders that hold no runs, but may hold very many files."""
WHOLE_BYTES = 256 << 10
"""A file up to this size, about 800 steps, is read whole, and its goodput is exact."""
HEAD_BYTES = 16 << 10
TAIL_BYTES = 64 << 10
MAX_TAIL_BYTES = 4 << 20
"""How far back a step is looked for, in a run that ends in many other records."""
NUM_BLOCKS = 16
BLOCK_BYTES = 8 << 10
"""About 400 steps altogether, for the mean step time: its error is that of a sample of 400."""
PACE_STEPS = 100
"""Steps over which rate and time left are measured."""
SLOW_STEPS = 10.0
"""So many of its own steps without a record make a run silent, if that is longer than the limit."""
START_UP_S = 900.0
"""Nothing is recorded while a run loads and compiles; until its first step it may be silent so long. Assumed,
not measured."""
CLOCK_TOLERANCE_S = 5.0
NUM_THREADS = 16
"""A network file system answers slowly, but many questions at once."""


class State(Enum):
    running = "running"
    waiting = "waiting"
    """Launched, or about to be, and nothing recorded since."""
    silent = "silent"
    """No end recorded, and no record for longer than a run of its pace takes for one: hung or killed."""
    finished = "finished"
    stopped = "stopped"
    """By a signal, after a checkpoint."""
    diverged = "diverged"
    failed = "failed"
    hang = "hung"
    """A rank hung or was lost, and was named."""
    unreadable = "unreadable"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run at a glance. None is what its files do not say."""

    folder: Path
    state: State
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    """Of the last step, nats per token."""
    tokens_per_s: float | None = None
    """Median of the last steps."""
    left_s: float | None = None
    """At the pace of the last steps, with the evaluations and saves between them; None once it has ended."""
    heard_s: float | None = None
    """Seconds since its last record, or its launch."""
    pulse: Pulse | None = None
    """Of one that has not ended: whether its process still writes, and where it is."""
    attempts: int = 0
    goodput: float | None = None
    """Time of the steps that stand as a share of all time from the first launch to the last record."""
    goodput_is_estimate: bool = False
    note: str = ""
    """Why it failed, or what is odd about it."""

    @property
    def words(self) -> str:
        """The state for people, with how long it has been so where that matters."""
        if self.state is State.silent and self.heard_s is not None:
            return f"silent for {self.heard_s / 60:.0f} min"
        return self.state.value


def list_runs(root: Path, *, now: float, silent_after_s: float) -> list[RunStatus]:
    """Every run at or below `root`, those heard last first.

    A run that vanishes while it is read is left out; one that may not be read is there, with the reason.

    Raises:
        DataError: `root` is no folder that can be read.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}; give the one that holds your runs, as in folder=runs")
    try:
        os.scandir(root).close()
    except OSError as error:
        raise DataError(
            f"{root} cannot be listed: {error.strerror}; ask its owner for the right to"
        ) from None

    def look(folder: Path) -> RunStatus | None:
        return status_of_run(folder, now=now, silent_after_s=silent_after_s)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = [status for status in pool.map(look, run_folders(root)) if status is not None]
    return sorted(found, key=lambda run: (run.heard_s is None, run.heard_s or 0.0, str(run.folder)))


def run_folders(root: Path) -> Iterator[Path]:
    """Folders that hold a run, `root` itself among them. Folders that cannot be listed are passed over."""
    for path, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_SEARCHED and not name.startswith("."))
        if METRICS_NAME in files or FACTS_NAME in files:
            yield Path(path)


def status_of_run(folder: Path, *, now: float, silent_after_s: float) -> RunStatus | None:
    """What the files of one run say; None where they are gone.

    Args:
        now: Unix seconds.
        silent_after_s: longest silence of a run that is well; for one with slow steps, ten steps.
    """
    metrics = folder / METRICS_NAME
    launches = _launches(folder / FACTS_NAME)
    try:
        ends = read_ends(metrics)
    except FileNotFoundError:
        if not launches:
            return None
        ends = Ends(head=[], tail=[], blocks=[], is_whole=True, modified=None)
    except OSError as error:
        return RunStatus(folder=folder, state=State.unreadable, note=f"{metrics.name}: {error.strerror}")
    status = _from_ends(folder, ends, now=now, silent_after_s=silent_after_s)
    status = _with_launch(status, launches, now=now, silent_after_s=silent_after_s)
    if status.state not in (State.running, State.waiting, State.silent):
        return status
    pulse = pulse_of(folder, attempt=status.attempts, now=now)
    if pulse is not None and status.state is State.silent:
        status = replace(status, note=pulse.words)
    return replace(status, pulse=pulse)


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Records of a metrics file: all of them, or those at both ends and in blocks between."""

    head: list[Record]
    tail: list[Record]
    blocks: list[Record]
    is_whole: bool
    """Whether `tail` is the whole file."""
    modified: float | None
    """Unix seconds, by the clock of the file system."""


def read_ends(path: Path) -> Ends:
    """Read at most a few hundred KiB of a file of any size. A last line without an end is left out."""
    with open(path, "rb", buffering=0) as handle:
        status = os.fstat(handle.fileno())
        size = status.st_size
        if size <= WHOLE_BYTES:
            return Ends(
                head=[],
                tail=_lines_in(handle.fileno(), 0, size),
                blocks=[],
                is_whole=True,
                modified=status.st_mtime,
            )
        head = _lines_in(handle.fileno(), 0, HEAD_BYTES)
        length = TAIL_BYTES
        tail = _lines_in(handle.fileno(), size - length, length)
        while length < min(size, MAX_TAIL_BYTES) and not any(record["kind"] == "step" for record in tail):
            length = min(4 * length, size)
            tail = _lines_in(handle.fileno(), size - length, length)
        blocks: list[Record] = []
        for number in range(NUM_BLOCKS):
            at = int((number + 0.5) / NUM_BLOCKS * (size - BLOCK_BYTES))
            blocks += _lines_in(handle.fileno(), at, BLOCK_BYTES)
        return Ends(head=head, tail=tail, blocks=blocks, is_whole=False, modified=status.st_mtime)


def _lines_in(fd: int, begin: int, length: int) -> list[Record]:
    """Records of the lines that lie whole in a span of bytes."""
    text = os.pread(fd, length, begin)
    first = 0 if begin == 0 else text.find(b"\n") + 1
    return parse_lines(text[first : text.rfind(b"\n") + 1])


def _from_ends(folder: Path, ends: Ends, *, now: float, silent_after_s: float) -> RunStatus:
    tail = ends.tail
    if not tail:
        return RunStatus(folder=folder, state=State.waiting, heard_s=age_s(None, ends.modified, now))
    attempt = tail[-1]["attempt"]
    steps = [record for record in tail if record["kind"] == "step" and record["attempt"] == attempt]
    last = steps[-1] if steps else None
    heard_s = age_s(as_number(tail[-1].get("time")), ends.modified, now)
    state, note = _ending(tail, attempt)
    pace_s = pace_of(steps)
    limit_s = max(silent_after_s, SLOW_STEPS * (pace_s or 0.0) if last is not None else START_UP_S)
    if state is State.running and heard_s is not None and heard_s > limit_s:
        state = State.silent
    ahead_s = (as_number(tail[-1].get("time")) or 0.0) - now
    if ahead_s > CLOCK_TOLERANCE_S:
        note = note or f"its host's clock is {ahead_s:.0f} s ahead of this one's"
    step = last["step"] if last is not None else tail[-1]["step"]
    config = config_parts(folder / CONFIG_NAME)
    total = total_steps(config, last) if last is not None else total_steps(config, {"step": 0, "position": 0})
    left_s = None
    if state in (State.running, State.silent) and pace_s is not None and total is not None:
        left_s = max(0, total - step) * pace_s
    goodput = goodput_of_lines(tail) if ends.is_whole else _estimated_goodput(ends, step)
    rates = present_values(steps[-PACE_STEPS:], "tokens_per_s")
    return RunStatus(
        folder=folder,
        state=state,
        step=step,
        total_steps=total,
        loss=as_number(last.get("loss")) if last is not None else None,
        tokens_per_s=statistics.median(rates) if rates else None,
        left_s=left_s,
        heard_s=heard_s,
        attempts=attempt,
        goodput=goodput,
        goodput_is_estimate=not ends.is_whole,
        note=note,
    )


def _with_launch(
    status: RunStatus, launches: Sequence[Mapping[str, Any]], *, now: float, silent_after_s: float
) -> RunStatus:
    """A start that run.json knows of, and metrics.jsonl not yet, is what the run is doing now."""
    newest = launches[-1] if launches else {}
    number = newest.get("attempt")
    if not isinstance(number, int) or number <= status.attempts or status.state is State.unreadable:
        return status
    waited_s = age_s(as_number(newest.get("started")), None, now)
    is_late = waited_s is not None and waited_s > max(silent_after_s, START_UP_S)
    return replace(
        status,
        state=State.silent if is_late else State.waiting,
        attempts=number,
        heard_s=waited_s,
        left_s=None,
        note=f"attempt {number} was launched and has recorded nothing yet",
    )


def _ending(tail: Sequence[Record], attempt: int) -> tuple[State, str]:
    """How the attempt ended, by what it recorded after its last step."""
    endings: list[Record] = []
    for record in tail:
        if record["attempt"] != attempt or record["kind"] == "step":
            endings = []
        elif record["kind"] == "event" and record.get("what") in ENDINGS:
            endings.append(record)
    names = {record["what"] for record in endings}
    if not endings:
        return State.running, ""
    error = next((str(record["error"]) for record in reversed(endings) if "error" in record), "")
    if "diverged" in names:
        return State.diverged, shortened(error)
    last = endings[-1]
    if last["what"] == "stopped":
        return State.stopped, f"by {last.get('signal', 'a signal')}"
    return State[last["what"]], shortened(error)


def pace_of(steps: Sequence[Record]) -> float | None:
    """Seconds from step to step, with what lies between, over the last of one attempt; None before the
    third."""
    recent = [step for step in steps[1:] if as_number(step.get("time")) is not None][-PACE_STEPS:]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    seconds = max(0.0, float(recent[-1]["time"]) - float(recent[0]["time"]))
    return seconds / int(recent[-1]["step"] - recent[0]["step"])


def age_s(recorded: float | None, modified: float | None, now: float) -> float | None:
    """Seconds since the latest sign of life that does not lie in the future.

    Two clocks witness a record: its own time is its host's, the file's is the file system's. A host whose
    clock is behind would look silent by the first alone.
    """
    times = [time for time in (recorded, modified) if time is not None]
    past = [time for time in times if time <= now + CLOCK_TOLERANCE_S]
    if not times:
        return None
    return max(0.0, now - max(past)) if past else 0.0


def goodput_of_lines(lines: Sequence[Record]) -> float | None:
    """Σ step_s of the steps that stand, over the time from the first launch to the last record."""
    steps = [record for record in standing(lines) if record["kind"] == "step"]
    return _share(sum(present_values(steps, "step_s")), _launched_at(lines), _last_time(lines))


def _estimated_goodput(ends: Ends, last_step: int) -> float | None:
    """The same from the mean of a sample, times how many steps stand."""
    sample = present_values([record for record in ends.blocks if record["kind"] == "step"], "step_s")
    if not sample or not ends.head:
        return None
    begin = next(iter(attempt_begins(ends.head).values()))
    spent_s = statistics.fmean(sample) * max(0, last_step - begin)
    return _share(spent_s, _launched_at(ends.head), _last_time(ends.tail))


def _share(spent_s: float, begin: float | None, end: float | None) -> float | None:
    if begin is None or end is None or end <= begin or spent_s <= 0:
        return None
    return min(1.0, spent_s / (end - begin))


def _launched_at(lines: Sequence[Record]) -> float | None:
    """When the run's first process began: before its first record, by what the first step's event says."""
    times = present_values(lines[:1], "time")
    for record in lines:
        if record["attempt"] != lines[0]["attempt"]:
            break
        seconds = start_up_s(record) if record.get("what") == "first_step" else None
        at = as_number(record.get("time"))
        if seconds is not None and at is not None:
            return min([*times, at - seconds])
    return times[0] if times else None


def _last_time(lines: Sequence[Record]) -> float | None:
    times = present_values(lines[-1:], "time")
    return times[0] if times else None


TOP_LEVEL = re.compile(r"^(train|data):[^\n]*\n(?:(?:[ \-][^\n]*)?\n)*", re.MULTILINE)


def config_parts(path: Path) -> dict[str, Any]:
    """The settings that a run's length follows from; empty where there are none to be read.

    Only these two blocks are parsed: YAML takes longer than everything else that is read of a run.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    blocks = "".join(match.group(0) for match in TOP_LEVEL.finditer(text + "\n"))
    try:
        config = yaml.load(blocks, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def total_steps(config: Mapping[str, Any], at: Mapping[str, Any]) -> int | None:
    """Steps of the whole run, from where it is at a record that has `step` and `position`.

    A batch that still rises makes the steps that are left fewer: each stage is walked through, as the loader
    does it.
    """
    train, data = config.get("train"), config.get("data")
    if not isinstance(train, dict) or not isinstance(data, dict):
        return None
    total, rows = _count(train, "total_tokens"), _count(train, "global_batch_rows")
    seq_len, position = _count(data, "seq_len"), at.get("position")
    if total is None or rows is None or seq_len is None:
        return None
    if not isinstance(position, int):
        return -(-total // (rows * seq_len))
    steps, until = int(at["step"]), -(-total // seq_len)
    ramp = [stage for stage in train.get("batch_ramp") or [] if isinstance(stage, dict)]
    stages = [(-(-int(stage["until_tokens"]) // seq_len), int(stage["rows"])) for stage in ramp]
    for end, size in [*stages, (until, rows)]:
        more = max(0, -(-(min(end, until) - position) // size))
        steps, position = steps + more, position + more * size
    return steps


def _count(settings: Mapping[str, Any], name: str) -> int | None:
    value = settings.get(name)
    return value if isinstance(value, int) and value > 0 else None


def as_json(run: RunStatus) -> dict[str, Any]:
    """Everything that is known, for other programs: seconds, steps, shares from 0 to 1, null for unknown."""
    return {
        "folder": str(run.folder),
        "state": run.state.value,
        "step": run.step,
        "total_steps": run.total_steps,
        "loss": run.loss,
        "tokens_per_s": run.tokens_per_s,
        "left_s": run.left_s,
        "heard_s": run.heard_s,
        "beat_s": run.pulse and run.pulse.age_s,
        "at": run.pulse and run.pulse.at,
        "attempts": run.attempts,
        "goodput": run.goodput,
        "goodput_is_estimate": run.goodput_is_estimate,
        "note": run.note,
    }


def _launches(path: Path) -> list[dict[str, Any]]:
    """Entries of run.json; empty where it is absent, damaged, or may not be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    attempts = content.get("attempts") if isinstance(content, dict) else None
    return [entry for entry in attempts if isinstance(entry, dict)] if isinstance(attempts, list) else []
