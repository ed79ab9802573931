"""`llmtrain plan`: from a compute budget to a shape, tokens, a recipe, and an experiment for `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.cli.compose import run_verb, sweep_folder
from llmtrain.errors import ConfigError
from llmtrain.files import atomic_write
from llmtrain.planner.config import BudgetConfig, HardwareConfig, RowsConfig, VocabularyConfig
from llmtrain.planner.laws import DEFAULT_LAW
from llmtrain.planner.plan import make_plan, write_plan
from llmtrain.planner.report import experiment_yaml, plan_text


@dataclass(kw_only=True)
class PlanRoot:
    budget: BudgetConfig
    hardware: HardwareConfig
    model: VocabularyConfig = field(default_factory=VocabularyConfig)
    data: RowsConfig = field(default_factory=RowsConfig)
    name: str = "planned"
    """Of the experiment and of the run it starts."""
    law: str = DEFAULT_LAW
    """Which law chooses; all of them are printed."""
    out: str = "plans"
    """Folder for experiment/<name>.yaml and <name>.plan.json: what `llmtrain train --config-dir` takes."""

    def __post_init__(self) -> None:
        if not self.name or any(mark in self.name for mark in "/\\ ="):
            raise ConfigError(
                f"name={self.name!r} must be a file name without spaces, slashes and equal signs"
            )


def main() -> None:
    run_verb("plan", PlanRoot, run)


def run(cfg: PlanRoot) -> None:
    planned = make_plan(
        name=cfg.name,
        law=cfg.law,
        budget=cfg.budget,
        hardware=cfg.hardware,
        vocab_size=cfg.model.vocab_size,
        seq_len=cfg.data.seq_len,
    )
    out = sweep_folder() or Path(cfg.out)  # each job of a --multirun has its own folder
    plan_path = out / f"{cfg.name}.plan.json"
    experiment_path = out / "experiment" / f"{cfg.name}.yaml"
    write_plan(plan_path, planned.plan)
    with atomic_write(experiment_path, "w") as handle:
        handle.write(experiment_yaml(planned.plan, plan_path=plan_path))
    print(plan_text(planned))
    print(f"\nwritten: {experiment_path} and {plan_path}")
    print(f"train it: llmtrain train --config-dir {out} +experiment={cfg.name} data.folder=...")
