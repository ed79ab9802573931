"""`llmtrain plan fit`: what own runs say about larger ones."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import atomic_write
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_non_embedding_params, num_params
from llmtrain.planner.loss.envelope import NUM_RESAMPLES
from llmtrain.planner.loss.fit import HUBER_DELTA
from llmtrain.planner.loss.fit_report import FitReport, fit_json, fit_text, make_report, parse_target
from llmtrain.planner.loss.own_runs import OwnRun, Reading, as_runs, read_table
from llmtrain.planner.units import FLOPS, parse_quantity
from llmtrain.tracking.run_data import as_number, read_run
from llmtrain.units import format_count


class Objective(Enum):
    """Where residuals of log loss stop counting by their squares."""

    robust = "robust"
    """At 1.345 standard deviations of the noise."""
    hoffmann = "hoffmann"
    """At 1e-3, as Hoffmann et al. 2022 and Besiroglu et al. 2024 fit."""


class OutputFormat(Enum):
    text = "text"
    json = "json"


@dataclass(kw_only=True)
class ColumnsConfig:
    """Columns of a table whose names do not say what they hold; null: known by its name."""

    params: str | None = None
    tokens: str | None = None
    loss: str | None = None


@dataclass(kw_only=True)
class PlanFitConfig:
    runs: Any  # Any, thrice: one value or a list of them
    """Run folders, folders of run folders, CSV files (N, D, loss, or a W&B export), or patterns of them."""
    at: Any = field(default_factory=list)
    """Runs to foretell, as PARAMS/TOKENS: 7B/4T or [7B/4T,13B/5T]."""
    budgets: Any = field(default_factory=list)
    """FLOPs whose optimum to print: 1e21 or [1e21,1e22]; none: 10 and 100 times the largest run's."""
    objective: Objective = Objective.robust
    drop_highest: int = 0
    """Runs with the highest losses to leave out. Besiroglu et al. drop 5 of 245."""
    embeddings: bool = True
    """Whether N counts embeddings, where it is computed from a shape."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    num_resamples: int = NUM_RESAMPLES
    """Of each of the four variants."""
    seed: int = 0
    format: OutputFormat = OutputFormat.text
    out: str | None = None
    """JSON file to write as well; null: none."""

    def __post_init__(self) -> None:
        if not listed(self.runs):
            raise ConfigError("runs=[] names nothing; give run folders or a CSV, as in runs=runs/ladder")
        if self.num_resamples < 10:
            raise ConfigError(f"num_resamples={self.num_resamples} must be at least 10 for an 80% interval")
        if self.drop_highest < 0:
            raise ConfigError(f"drop_highest={self.drop_highest} must be at least 0")


def main() -> None:
    run_verb("plan_fit", PlanFitConfig, run)


def run(cfg: PlanFitConfig) -> None:
    targets = [parse_target(text) for text in listed(cfg.at)]
    budgets = [parse_quantity(text, FLOPS, name="budgets") for text in listed(cfg.budgets)]
    reading = read_own_runs(cfg)
    try:
        runs = as_runs(reading.runs)
    except DataError as error:
        if not reading.left_out:
            raise
        raise DataError(f"{error}. Left out: {'; '.join(reading.left_out)}") from error
    report = make_report(
        runs,
        targets=targets,
        budgets=budgets,
        drop_highest=cfg.drop_highest,
        huber_delta=HUBER_DELTA if cfg.objective is Objective.hoffmann else None,
        num_resamples=cfg.num_resamples,
        seed=cfg.seed,
        left_out=reading.left_out,
    )
    show(report, cfg)


def listed(value: Any) -> list[str]:
    """One value or a list of them, as texts."""
    if value is None or value == "":
        return []
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def show(report: FitReport, cfg: PlanFitConfig) -> None:
    text = json.dumps(fit_json(report), indent=1)
    if cfg.out is not None:
        with atomic_write(Path(cfg.out), "w") as handle:
            handle.write(text + "\n")
    print(text if cfg.format is OutputFormat.json else fit_text(report))


def read_own_runs(cfg: PlanFitConfig) -> Reading:
    """All of cfg.runs, each by what it is."""
    runs: list[OwnRun] = []
    left_out: list[str] = []
    for path in expanded(listed(cfg.runs)):
        if path.is_dir():
            found = read_folder(path, embeddings=cfg.embeddings)
        else:
            found = read_table(path, names=vars(cfg.columns), embeddings=cfg.embeddings)
        runs += found.runs
        left_out += found.left_out
    if not runs:
        why = f"; left out: {'; '.join(left_out)}" if left_out else ""
        raise DataError(f"runs={','.join(listed(cfg.runs))} holds no run that is over{why}")
    return Reading(runs=runs, left_out=left_out)


def expanded(patterns: list[str]) -> list[Path]:
    """Every pattern's paths; a folder without metrics.jsonl stands for the run folders below it."""
    paths: list[Path] = []
    for pattern in patterns:
        matched = [Path(name) for name in sorted(glob.glob(pattern))]
        if not matched:
            raise DataError(f"no {pattern}: runs takes run folders, folders of them, and CSV files")
        for path in matched:
            if path.is_dir() and not (path / "metrics.jsonl").exists():
                inside = sorted(inner.parent for inner in path.rglob("metrics.jsonl"))
                if not inside:
                    raise DataError(f"{path} holds no run folder (none with metrics.jsonl)")
                paths += inside
            elif path.is_dir() or path.suffix.lower() == ".csv":
                paths.append(path)
            elif len(matched) == 1:
                raise DataError(f"{path} is neither a folder nor a CSV file")
    return paths


def read_folder(folder: Path, *, embeddings: bool) -> Reading:
    """N from the config's shape, D and the held-out loss from the metrics."""
    data = read_run(folder)
    steps, evals = data.of_kind("step"), data.of_kind("eval")
    ending = data.attempts[-1].ending if data.attempts else None
    tokens = data.consumed_tokens()
    wanted = as_number(data.setting("train", "total_tokens"))
    shape, loss = data.setting("model"), data.held_out_loss()
    is_stale = bool(steps and evals) and evals[-1]["step"] < steps[-1]["step"]
    reason = None
    if not isinstance(shape, dict):
        reason = "no model in its config.yaml"
    elif ending is not None and ending.get("what") == "diverged":
        reason = "diverged"
    elif tokens is None or wanted is None or tokens < wanted:
        seen, whole = (format_count(count) if count is not None else "unknown" for count in (tokens, wanted))
        reason = f"stopped at {seen} of {whole} tokens: a cut schedule is no point of L(N, D)"
    elif loss is None or (is_stale and data.evaluated("held_out_loss") is None):
        reason = "no held-out loss of its end; `llmtrain evaluate` measures it"
    if reason is not None:
        return Reading(runs=[], left_out=[f"{folder}: {reason}"])
    assert isinstance(shape, dict)
    assert tokens is not None
    assert loss is not None
    try:
        model = ModelConfig(**shape)
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder}/config.yaml has no shape that this llmtrain knows: {error}") from error
    size = num_params(model) if embeddings else num_non_embedding_params(model)
    run = OwnRun(name=data.name, num_params=size, num_tokens=tokens, loss=loss)
    return Reading(runs=[run], left_out=[])
