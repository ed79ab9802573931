"""`llmtrain plan check`: a plan beside what a run measured, each with its interval."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llmtrain.cli.compose import run_verb
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import DataError
from llmtrain.planner.runs import differences
from llmtrain.tracking.report_tables import Comparison, comparisons_of
from llmtrain.tracking.run_data import RunData, find_plan, read_run

STYLES = {"good": "green", "warn": "yellow", "info": "dim"}


@dataclass(kw_only=True)
class PlanCheckConfig:
    run: str
    """The run folder."""
    plan: str | None = None
    """A plan file; null: the one that the run was started with (run.plan)."""
    format: OutputFormat = OutputFormat.text


def main() -> None:
    run_verb("plan_check", PlanCheckConfig, show)


def show(cfg: PlanCheckConfig) -> None:
    """Print every planned interval beside the measured value, and in what the run was not the plan's."""
    run = read_run(Path(cfg.run))
    if cfg.plan is not None:
        run = _held_against(run, cfg.plan)
    if run.plan is None or run.forecast is None:
        mend = "" if cfg.plan is not None else "; or give plan=FILE"
        raise DataError(f"{run.plan_note.rstrip('.')}{mend}")
    rows = comparisons_of(run)
    other = differences(run.plan, run.config, world_size=_world_size(run))
    if cfg.format is OutputFormat.json:
        print(
            json.dumps({"plan": run.plan.name, "rows": [asdict(row) for row in rows], "differences": other})
        )
        return
    console = Console(highlight=False)
    console.print(_table(run, rows))
    for each in other:
        console.print(f"not as planned: {each}", style="yellow")
    if any(row.level == "warn" for row in rows) and run.plan.calibration is None:
        console.print(
            f"The plan knew published figures alone: `llmtrain plan calibrate run={cfg.run}` learns from "
            "this run."
        )


def _held_against(run: RunData, plan: str) -> RunData:
    config: dict[str, Any] = {**run.config, "run": {**(run.config.get("run") or {}), "plan": plan}}
    found, forecast, note = find_plan(config, world_size=_world_size(run))
    return replace(run, plan=found, forecast=forecast, plan_note=note)


def _world_size(run: RunData) -> int | None:
    return run.attempts[-1].facts.get("world_size") if run.attempts else None


def _table(run: RunData, rows: list[Comparison]) -> Table:
    assert run.plan is not None, "asked for only with a plan"
    table = Table(box=box.SIMPLE, title=f"{run.name} beside plan {run.plan.name}", title_justify="left")
    for name in ("", "8 runs in 10", "measured", ""):
        table.add_column(name, no_wrap=bool(name))
    for row in rows:
        style = STYLES.get(row.level, "")
        table.add_row(f"{row.name} ({row.what})", row.predicted, row.measured, f"[{style}]{row.verdict}[/]")
    return table
