"""From records of metrics.jsonl to rows of W&B's history. No wandb here, only values.

A row's number is its record's place in metrics.jsonl, so W&B's own step is the same in whatever attempt, mode
or process a row is sent, and a row that is sent twice is seen to be the same. Every row has `step`, `tokens`
and `attempt`, so that each can be an axis. What each name means is a table in docs/wandb.md.
"""

from __future__ import annotations

import bisect
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import as_number
from llmtrain.tracking.run_events import shortened, start_up_s, told

GROUPS = {"step": "train"}
"""Kind of record to the first part of its names, where that is not the kind."""
AXES = ("step", "tokens", "attempt")
NO_VALUES = {*AXES, "time"}
OWN_EVENT = "wandb"
"""What tracking itself says: no business of the dashboard's."""
ALERTS = {
    "resume": "INFO",
    "stopped": "INFO",
    "rolled_back": "WARN",
    "spike": "WARN",
    "straggler": "WARN",
    "diverged": "ERROR",
    "failed": "ERROR",
    "hang": "ERROR",
}
"""Events that people are told of, and how loudly."""
MAX_TITLE = 63
"""Characters that W&B takes."""
MAX_TEXT = 1000


@dataclass(frozen=True)
class Alert:
    title: str
    text: str
    level: str


@dataclass(frozen=True)
class Row:
    """What W&B is told of one record."""

    number: int
    """W&B's own step."""
    fields: dict[str, Any]
    """Empty for a record of which W&B is not told."""
    alert: Alert | None = None


class Rows:
    """Turns every record of a run, from the first on, into a row: rows know what was undone, and what a
    moment's tokens were. Memory: 24 bytes a step."""

    def __init__(self, *, run_name: str) -> None:
        self._run_name = run_name
        self._num_records = 0
        self._num_events: Counter[str] = Counter()
        self._launched: float | None = None
        # Steps that stand, in order, each with the tokens and the sum of step_s up to it.
        self._steps = array("q", [0])
        self._tokens = array("q", [0])
        self._seconds = array("d", [0.0])

    def take(self, record: Record) -> Row:
        """The next record's row."""
        number, self._num_records = self._num_records, self._num_records + 1
        what = str(record.get("what", "")) if record["kind"] == "event" else ""
        if what == OWN_EVENT:
            return Row(number, {})
        self._look_for_launch(record, what)
        fields: dict[str, Any] = {"step": record["step"], "attempt": record["attempt"]}
        if record["kind"] == "step":
            fields |= self._went_back(to=record["step"] - 1)
            self._add(record)
        elif what in ("start", "resume"):
            fields |= self._went_back(to=record["step"])
        if (tokens := self._tokens_at(record["step"])) is not None:
            fields["tokens"] = tokens
        if what:
            self._num_events[what] += 1
            fields[f"events/{what}"] = self._num_events[what]
        else:
            fields |= values_of(record)
        if (goodput := self._goodput(record)) is not None:
            fields["run/goodput"] = goodput
        if (at := as_number(record.get("time"))) is not None:
            fields["_timestamp"] = at
        return Row(number, fields, self._alert(record, what))

    def _went_back(self, *, to: int) -> dict[str, int]:
        """Drop the steps past `to`, and say so if there were any."""
        last = self._steps[-1]
        keep = bisect.bisect_right(self._steps, to)
        for column in (self._steps, self._tokens, self._seconds):
            del column[max(keep, 1) :]
        return {"run/went_back_from": last, "run/went_back_to": to} if to < last else {}

    def _add(self, step: Record) -> None:
        tokens = step.get("tokens")
        self._steps.append(step["step"])
        self._tokens.append(tokens if isinstance(tokens, int) else -1)
        self._seconds.append(self._seconds[-1] + (as_number(step.get("step_s")) or 0.0))

    def _tokens_at(self, step: int) -> int | None:
        """Tokens consumed after `step`; None where no record of it has been seen."""
        place = bisect.bisect_left(self._steps, step)
        is_known = place < len(self._steps) and self._steps[place] == step and self._tokens[place] >= 0
        return self._tokens[place] if is_known else None

    def _look_for_launch(self, record: Record, what: str) -> None:
        """When the run's first process began: its first step says it."""
        at, seconds = as_number(record.get("time")), start_up_s(record) if what == "first_step" else None
        if at is not None and seconds is not None and self._launched is None:
            self._launched = at - seconds

    def _goodput(self, record: Record) -> float | None:
        at = as_number(record.get("time"))
        if record["kind"] != "step" or at is None or self._launched is None or at <= self._launched:
            return None
        return self._seconds[-1] / (at - self._launched)

    def _alert(self, record: Record, what: str) -> Alert | None:
        if what not in ALERTS:
            return None
        said = told(record)
        where = f"step {record['step']}, attempt {record['attempt']}"
        text = f"{where}: {said.details}" if said.details else where
        title = shortened(f"{self._run_name}: {said.title}", MAX_TITLE)
        return Alert(title, shortened(text, MAX_TEXT), ALERTS[what])


def values_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's finite numbers under W&B's names: `group/field`, the field without the group's name."""
    group = GROUPS.get(record["kind"], record["kind"])
    return {
        f"{group}/{name.removeprefix(f'{group}_')}": value
        for name, value in record.items()
        if name not in NO_VALUES and as_number(value) is not None
    }
