"""Events, evaluations and saves as people read them: one title, one line of details, and how bad it is.

Kinds of events that are not named here are shown with whatever they carry, so that a new one is never hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.units import format_duration

TITLES = {
    "start": "started",
    "resume": "resumed",
    "first_step": "first step done",
    "replayed": "steps done again",
    "snapshot": "snapshot in memory",
    "wandb": "W&B",
    "config_changed": "settings changed at the resume",
    "capsule": "failure capsule",
    "overflow": "fp16 overflow, step skipped",
    "hang": "a rank hung or was lost",
    "straggler": "a slow rank",
    "rolled_back": "went back",
}
LEVELS = {
    "finished": "good",
    "replayed": "good",
    "start": "info",
    "resume": "info",
    "first_step": "info",
    "snapshot": "info",
    "wandb": "info",
    "config_changed": "info",
    "capsule": "info",
    "failed": "bad",
    "diverged": "bad",
    "hang": "bad",
}
"""Events of any other kind are something that went wrong, and the run went on: warn."""
ROUTINE = {"start", "first_step", "replayed", "snapshot", "wandb"}
"""Events of every run, of which a list of incidents says nothing."""
KINDS = {
    "ranks": "ranks compared",
    "mixture": "data mixture",
    "grads": "gradient norms",
    "memory": "memory by component",
}
"""Records that are no events."""
OWN_FIELDS = {"kind", "step", "attempt", "time", "what"}
MAX_DETAIL = 300
"""Characters; an error may carry a page."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """One record for people. `level` is good, info, warn or bad."""

    level: str
    title: str
    details: str

    @property
    def line(self) -> str:
        return f"{self.title}: {self.details}" if self.details else self.title


def told(record: Mapping[str, Any]) -> Told:
    """What an event, an evaluation or a checkpoint says."""
    if record["kind"] == "eval":
        loss = record.get("eval_loss")
        shown = f"{loss:.4f}" if isinstance(loss, int | float) else "not finite"
        return Told(level="info", title="evaluated", details=f"held-out loss {shown}")
    if record["kind"] == "checkpoint":
        return Told(level="info", title="checkpoint saved", details=_save_details(record))
    if record["kind"] == "plan":
        ratio = record.get("step_s_over_plan")
        shown = f"a step takes {ratio:.2f} of the plan's" if isinstance(ratio, int | float) else ""
        return Told(level="info", title="held against the plan", details=shown)
    if record["kind"] in KINDS:
        return Told(level="info", title=KINDS[record["kind"]], details=fields_of(record))
    what = str(record.get("what", "an event without a name"))
    details = {
        "resume": lambda: f"from {record['source']}" if "source" in record else "",
        "first_step": lambda: _start_up(record),
        "replayed": lambda: _replayed(record),
        "snapshot": lambda: _save_details(record),
        "wandb": lambda: str(record.get("text", "")),
        "config_changed": lambda: _config_changed(record),
        "stopped": lambda: f"by {record.get('signal', 'a signal')}",
        "spike": lambda: _spike(record),
        "rolled_back": lambda: f"after step {record['step']}: {record.get('reason', '')}",
        "failed": lambda: str(record.get("error", "no reason recorded")),
        "hang": lambda: str(record.get("error", "no reason recorded")),
    }.get(what, lambda: fields_of(record))()
    return Told(
        level=LEVELS.get(what, "warn"),
        title=printable(TITLES.get(what, what.replace("_", " "))),
        details=shortened(printable(details)),
    )


def fields_of(record: Mapping[str, Any]) -> str:
    """Every field of an event's own: `loss=3.21 · rows=[10, 20]`."""
    named = [(name, value) for name, value in record.items() if name not in OWN_FIELDS]
    return " · ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in named
    )


def printable(text: str) -> str:
    """`text` on one line, without characters that would steer a terminal."""
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "?" for character in text
    )


def shortened(text: str, limit: int = MAX_DETAIL) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def start_up_s(record: Mapping[str, Any]) -> float | None:
    """Seconds from the launch to the end of the first step, of a `first_step` event."""
    seconds = record.get("start_up_s")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    return float(total) if isinstance(total, int | float) and math.isfinite(total) else None


def _start_up(record: Mapping[str, Any]) -> str:
    total = start_up_s(record)
    return f"{format_duration(total)} after the launch" if total is not None else ""


def _spike(record: Mapping[str, Any]) -> str:
    if "reason" not in record:
        return fields_of(record)
    return f"{record.get('action', '?')}: {record['reason']}"


def _replayed(record: Mapping[str, Any]) -> str:
    worst = record.get("max_loss_difference")
    how = "equal to the last bit" if worst == 0 else f"different by at most {worst:.2g}" if worst else "?"
    return f"{record.get('num_steps', '?')} from {record.get('first_step', '?')} on, losses {how}"


def _save_details(record: Mapping[str, Any]) -> str:
    save, stall = record.get("save_s"), stall_of_save_s(record)
    if not isinstance(save, int | float):
        return ""
    return f"in {format_duration(save)}, training waited {format_duration(stall)}"


def _config_changed(record: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{each.get('name')} {each.get('old')} -> {each.get('new')} ({each.get('change')})"
        for each in record.get("changes", [])
        if isinstance(each, dict)
    )


def stall_of_save_s(record: Mapping[str, Any]) -> float:
    """Seconds that training stood still for a save: for the one before it, and for the copy."""
    parts = (record.get("wait_s"), record.get("copy_s"))
    return sum(float(part) for part in parts if isinstance(part, int | float) and math.isfinite(part))
