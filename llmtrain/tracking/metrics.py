"""metrics.jsonl, the truth about a run: one JSON object a line, appended and never rewritten.

Every line has `kind`, `step`, `attempt` and `time` (Unix seconds). An attempt is one start of the run: 1,
then one more for each resume. A resume goes back to a checkpoint, so steps that the attempt before it did
past it are undone; their lines stay in the file, and `read_metrics` leaves them out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtrain.errors import DataError

log = logging.getLogger(__name__)

Record = dict[str, Any]  # values are whatever JSON holds

SETTLING_STEPS = 3
"""First steps of an attempt that warm caches up; medians of time and rate leave them out."""


class MetricsFile:
    """Appends records. A line is one write to the operating system, so a kill tears at most one."""

    def __init__(self, path: Path, *, attempt: int) -> None:
        """Open `path` for appending. A torn last line, left by a kill or a full disk, is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.attempt = attempt
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._mend_last_line()

    def write(self, kind: str, step: int, **fields: object) -> Record:
        """Append one record and return it. None leaves a field out; a number that is not finite becomes null.

        Raises OSError when the disk refuses; the file then ends where it ended before.
        """
        record: Record = {"kind": kind, "step": step, "attempt": self.attempt}
        record.update((name, _plain(value)) for name, value in fields.items() if value is not None)
        record.setdefault("time", time.time())
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            os.ftruncate(self._fd, end)
            raise
        return record

    def sync(self) -> None:
        """Make everything written so far durable, for use beside a checkpoint."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _mend_last_line(self) -> None:
        end = os.fstat(self._fd).st_size
        tail = b""
        start = end
        while start > 0 and b"\n" not in tail:
            length = min(4096, start)
            start -= length
            tail = os.pread(self._fd, length, start) + tail
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        if _parse(torn) is not None:
            os.write(self._fd, b"\n")
            return
        os.ftruncate(self._fd, end - len(torn))
        log.warning("%s ended in a torn line of %d bytes; cut it off", self.path, len(torn))


def next_attempt(path: Path) -> int:
    """The number of the attempt that is about to append to `path`: 1 for a new file."""
    return 1 + max((record["attempt"] for record in read_lines(path)), default=0) if path.exists() else 1


def read_lines(path: Path) -> list[Record]:
    """Every record in order, undone ones too. Lines that are not records are skipped, with a warning."""
    if not path.exists():
        raise DataError(
            f"{path} does not exist; `llmtrain train run.folder={path.parent}` writes it from its first step"
        )
    parsed = [_parse(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    records = [record for record in parsed if record is not None]
    if len(records) < len(parsed):
        log.warning("%s: skipped %d lines that are not metrics records", path, len(parsed) - len(records))
    return records


def read_metrics(path: Path) -> list[Record]:
    """The records that stand, in order of step.

    For each (kind, step) the last attempt's record stands, and steps that a later attempt, or a rollback,
    went back behind do not stand at all. Events are history, not values of a step: all of them are kept.
    """
    return standing(read_lines(path))


def standing(records: Iterable[Record]) -> list[Record]:
    """What `read_metrics` does, for records already read."""
    records = list(records)
    begins = attempt_begins(records)
    # The last step of each attempt that no later attempt went back behind.
    limits = {
        attempt: min((begin for later, begin in begins.items() if later > attempt), default=None)
        for attempt in begins
    }
    last: dict[tuple[object, ...], Record] = {}
    for number, record in enumerate(records):
        limit = limits[record["attempt"]]
        if record["kind"] == "event":
            last["event", number] = record
            if record.get("what") == "rolled_back":
                _take_back(last, record)
        elif limit is None or record["step"] <= limit:
            key = (record["kind"], record["step"])
            if key not in last or last[key]["attempt"] <= record["attempt"]:
                last[key] = record
    return sorted(last.values(), key=lambda record: (record["step"], record["attempt"]))


def _take_back(last: dict[tuple[object, ...], Record], rolled_back: Record) -> None:
    """Of what stood, drop what the run has gone back behind."""
    for key, record in list(last.items()):
        if record["kind"] != "event" and record["step"] > rolled_back["step"]:
            del last[key]


def attempt_begins(records: Iterable[Record]) -> dict[int, int]:
    """The step each attempt went on from: its start or resume event's, else one before its first step."""
    begins: dict[int, int] = {}
    stated: set[int] = set()
    for record in records:
        attempt = record["attempt"]
        if record["kind"] == "event" and record.get("what") in ("start", "resume"):
            begins[attempt] = record["step"]
            stated.add(attempt)
        elif attempt not in stated:
            done_before = record["step"] - 1 if record["kind"] == "step" else record["step"]
            begins[attempt] = min(begins.get(attempt, done_before), done_before)
    return dict(sorted(begins.items()))


def _plain(value: object) -> object:
    """JSON's own types: numpy and torch scalars become numbers, infinities and NaN become null."""
    if not isinstance(value, str | int | float | list | dict) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    if not all(isinstance(record.get(name), int) for name in ("step", "attempt")):
        return None
    return record
