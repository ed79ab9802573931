"""Everything that a run left in its folder, read once. What is not there yet is None, with a note that says
why."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmtrain.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_json
from llmtrain.planner.plan import Forecast, PlanFile, read_plan
from llmtrain.planner.runs import forecast_of_run
from llmtrain.tracking.metrics import SETTLING_STEPS, Record, attempt_begins, read_lines, standing

log = logging.getLogger(__name__)

ENDINGS = ("finished", "stopped", "diverged", "failed", "hang")
"""Events that end an attempt. An attempt with none of them was killed, or still runs."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the run, and how it ended."""

    number: int
    begin_step: int
    """Steps done before it."""
    last_step: int
    began: float
    """Unix seconds."""
    ended: float
    """Time of its last record."""
    ending: Record | None
    """Its last event of `ENDINGS`."""
    facts: dict[str, Any]
    """Its entry of run.json; empty when there is none."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    folder: Path
    name: str
    config: dict[str, Any]
    config_text: str
    attempts: list[Attempt]
    records: list[Record]
    """Those that stand, in order of step."""
    undone: list[Record]
    """Steps that were done, and done again after a resume."""
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    manifest: Manifest | None
    manifest_note: str
    """Why there is no manifest."""
    plan: PlanFile | None
    forecast: Forecast | None
    """What the plan's cluster and laws say about this very run."""
    plan_note: str
    """Why there is no forecast."""

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def setting(self, *path: str) -> Any:
        """A value of the resolved config, or None where it has none."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def evaluated(self, name: str) -> float | None:
        """A number of evaluation.json."""
        return as_number((self.evaluation or {}).get(name))

    def held_out_loss(self) -> float | None:
        """That of `llmtrain evaluate`, else of the run's last evaluation."""
        evals = self.of_kind("eval")
        loss = self.evaluated("held_out_loss")
        return as_number(evals[-1].get("eval_loss")) if loss is None and evals else loss

    def settled(self) -> list[Record]:
        """Steps past the first few of their attempt; all of them when that leaves none."""
        begins = {attempt.number: attempt.begin_step for attempt in self.attempts}
        steps = self.of_kind("step")
        later = [step for step in steps if step["step"] > begins.get(step["attempt"], 0) + SETTLING_STEPS]
        return later or steps

    def consumed_tokens(self) -> int | None:
        """Input positions of all rows taken, as train.total_tokens counts them: the valid targets among them
        are fewer, and fewer still have taught the weights anything where steps were withheld."""
        steps, seq_len = self.of_kind("step"), self.setting("data", "seq_len")
        position = steps[-1].get("position") if steps else None
        return position * seq_len if isinstance(position, int) and isinstance(seq_len, int) else None

    def num_epochs(self) -> float | None:
        """How often the run went over its rows."""
        steps, seq_len = self.of_kind("step"), self.setting("data", "seq_len")
        if self.manifest is None or not steps or as_number(steps[-1].get("position")) is None:
            return None
        packs = [pack for pack in self.manifest.packs if (pack.split, pack.seq_len) == ("train", seq_len)]
        return float(steps[-1]["position"]) / packs[0].num_rows if packs and packs[0].num_rows else None


def read_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        DataError: no such folder, or no metrics in it; the message says what to run.
    """
    if not folder.is_dir():
        raise DataError(f"no run folder {folder}; {_other_runs(folder)}")
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise DataError(
            f"{folder} holds no metrics.jsonl, so no training has begun there; `llmtrain train` writes it "
            "from its "
            f"first step"
        )
    lines = read_lines(metrics)
    config_text, config = _read_config(folder / "config.yaml")
    records = standing(lines)
    standing_steps = {(record["step"], record["attempt"]) for record in records if record["kind"] == "step"}
    facts = _read_facts(folder / "run.json")
    manifest, manifest_note = _find_manifest(config, facts)
    plan, forecast, plan_note = find_plan(config, world_size=facts[-1].get("world_size") if facts else None)
    return RunData(
        folder=folder,
        name=str((config.get("run") or {}).get("name") or folder.resolve().name),
        config=config,
        config_text=config_text,
        attempts=attempts_of(lines, facts),
        records=records,
        undone=[
            record
            for record in lines
            if record["kind"] == "step" and (record["step"], record["attempt"]) not in standing_steps
        ],
        evaluation=_read_optional_json(folder / "evaluation.json"),
        samples=_read_samples(folder / "samples.jsonl"),
        manifest=manifest,
        manifest_note=manifest_note,
        plan=plan,
        forecast=forecast,
        plan_note=plan_note,
    )


def attempts_of(lines: list[Record], facts: list[dict[str, Any]]) -> list[Attempt]:
    """The attempts in `lines`, each with its entry of run.json."""
    attempts = []
    for number, begin_step in attempt_begins(lines).items():
        own = [record for record in lines if record["attempt"] == number]
        times = [float(record["time"]) for record in own if isinstance(record.get("time"), int | float)] or [
            0.0
        ]
        endings = [record for record in own if record["kind"] == "event" and record.get("what") in ENDINGS]
        steps = [record["step"] for record in own if record["kind"] == "step"]
        attempts.append(
            Attempt(
                number=number,
                begin_step=begin_step,
                last_step=max(steps, default=begin_step),
                began=min(times),
                ended=max(times),
                ending=endings[-1] if endings else None,
                facts=next((entry for entry in facts if entry.get("attempt") == number), {}),
            )
        )
    return attempts


def _other_runs(folder: Path) -> str:
    parent = folder.parent
    runs = sorted(path.parent.name for path in parent.glob("*/metrics.jsonl")) if parent.is_dir() else []
    if runs:
        return f"runs in {parent}: {', '.join(runs)}"
    return "`llmtrain train` makes one; give its folder as run=FOLDER"


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        log.warning("%s is not YAML (%s); the report goes on without it", path, error)
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _read_facts(path: Path) -> list[dict[str, Any]]:
    content = _read_optional_json(path) or {}
    attempts = content.get("attempts", [])
    return [entry for entry in attempts if isinstance(entry, dict)]


def _read_optional_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except ValueError as error:
        log.warning("%s is not JSON (%s); the report goes on without it", path, error)
        return None
    return content if isinstance(content, dict) else None


def _read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            sample = json.loads(line)
            samples.append({**sample, "prompt": str(sample["prompt"]), "text": str(sample["text"])})
        except (ValueError, KeyError, TypeError):
            log.warning("%s:%d is not a sample; skipped", path, number)
    return samples


def _find_manifest(config: dict[str, Any], facts: list[dict[str, Any]]) -> tuple[Manifest | None, str]:
    data = config.get("data") or {}
    if sources := data.get("sources"):
        return None, f"The run reads a mixture of {', '.join(sources)}: each folder has a report of its own."
    given = data.get("folder")
    if not given:
        return None, "The run's config names no data folder."
    started_in = [Path(entry["working_folder"]) for entry in facts if entry.get("working_folder")]
    candidates = [Path(given), *(base / given for base in started_in)]
    folder = next((each for each in candidates if (each / MANIFEST_NAME).exists()), Path(given))
    try:
        return read_manifest(folder), ""
    except DataError as error:
        return None, str(error)


def find_plan(
    config: Mapping[str, Any], *, world_size: int | None
) -> tuple[PlanFile | None, Forecast | None, str]:
    """The plan that a run's config names, what it says about this run, and why it says nothing if so."""
    given = (config.get("run") or {}).get("plan")
    if not given:
        return None, None, "No plan was given. `llmtrain plan` writes one; name it with run.plan=FILE."
    try:
        plan = read_plan(Path(given))
        forecast = forecast_of_run(plan, config, world_size=world_size or plan.cluster.num_gpus)
    except (DataError, ConfigError, KeyError, TypeError) as error:
        return None, None, f"The plan {given} cannot be held against this run: {error}"
    return plan, forecast, ""


def as_number(value: object) -> float | None:
    """`value` as a float, or None when it is no finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def values_of(records: Sequence[Record], name: str) -> list[float | None]:
    return [as_number(record.get(name)) for record in records]


def present_values(records: Sequence[Record], name: str) -> list[float]:
    return [value for value in values_of(records, name) if value is not None]


def median_of(records: Sequence[Record], name: str) -> float | None:
    present = present_values(records, name)
    return statistics.median(present) if present else None
