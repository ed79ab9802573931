"""`llmtrain status folder=FOLDER`: the runs below a folder, one line each."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError
from llmtrain.tracking.run_events import printable
from llmtrain.tracking.run_list import RunStatus, State, as_json, list_runs
from llmtrain.units import format_count, format_duration

STYLES = {
    State.running: "green",
    State.waiting: "yellow",
    State.silent: "bold red",
    State.finished: "",
    State.stopped: "yellow",
    State.diverged: "bold red",
    State.failed: "bold red",
    State.hang: "bold red",
    State.unreadable: "bold red",
}


class OutputFormat(Enum):
    text = "text"
    json = "json"


@dataclass(kw_only=True)
class StatusConfig:
    folder: str = "runs"
    """Runs at and below it are listed."""
    states: list[State] = field(default_factory=list)
    """Only runs in these states, as in states=[running,silent]; empty: all."""
    silent_after_s: float = 300.0
    """Seconds without a record after which a run without an end is called silent; ten of its steps, where
    that is longer, and a quarter of an hour before its first step."""
    format: OutputFormat = OutputFormat.text
    """json: a list of objects with every figure."""

    def __post_init__(self) -> None:
        if not self.silent_after_s > 0:
            raise ConfigError(f"silent_after_s={self.silent_after_s} must be above 0 seconds")


def main() -> None:
    run_verb("status", StatusConfig, show)


def show(cfg: StatusConfig) -> None:
    """Print the runs, those heard last first."""
    root = Path(cfg.folder)
    runs = list_runs(root, now=time.time(), silent_after_s=cfg.silent_after_s)
    shown = [run for run in runs if not cfg.states or run.state in cfg.states]
    if cfg.format is OutputFormat.json:
        print(json.dumps([as_json(run) for run in shown], indent=1))
        return
    if not runs:
        print(f"no runs at or below {root}; `llmtrain train` makes them in runs/, or where run.folder says")
        return
    table = status_table(shown, root)
    console = Console(highlight=False)
    if not sys.stdout.isatty():  # whole lines for other programs, whatever their length
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console = Console(highlight=False, width=needed)
    if shown:
        console.print(table)
    console.print(summary(runs), style="dim")


def status_table(runs: list[RunStatus], root: Path) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", no_wrap=True)
    for heading in ("step", "loss", "tokens/s", "left", "heard", "beat", "tries", "goodput"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold", min_width=8)
    for run in runs:
        name = str(run.folder.relative_to(root)) if run.folder != root else root.resolve().name
        table.add_row(
            Text(printable(name)),
            Text(run.words, style=STYLES[run.state]),
            *(_steps(run), "–" if run.loss is None else f"{run.loss:.3f}"),
            "–" if run.tokens_per_s is None else format_count(run.tokens_per_s),
            "–" if run.left_s is None else format_duration(run.left_s),
            "–" if run.heard_s is None else f"{format_duration(run.heard_s)} ago",
            "–" if run.pulse is None else f"{format_duration(run.pulse.age_s)} ago",
            *(str(run.attempts), _goodput(run), Text(printable(run.note), style="dim")),
        )
    return table


def summary(runs: list[RunStatus]) -> str:
    """How many runs there are of each state."""
    counts = [(sum(run.state is state for run in runs), state) for state in State]
    told = ", ".join(f"{count:,} {state.value}" for count, state in counts if count)
    return f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'}: {told}"


def _steps(run: RunStatus) -> str:
    if run.step is None:
        return "–"
    return f"{run.step:,}/{run.total_steps:,}" if run.total_steps is not None else f"{run.step:,}"


def _goodput(run: RunStatus) -> str:
    if run.goodput is None:
        return "–"
    return f"{'~' if run.goodput_is_estimate else ''}{run.goodput:.0%}"
