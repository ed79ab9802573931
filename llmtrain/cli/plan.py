"""`llmtrain plan`: from a budget to a shape, tokens, a recipe and a layout, and an experiment for `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.cli.compose import run_verb, sweep_folder
from llmtrain.errors import ConfigError
from llmtrain.files import atomic_write
from llmtrain.planner.config import (
    BudgetConfig,
    ChoiceConfig,
    DataWishConfig,
    InferenceConfig,
    ModelWishConfig,
)
from llmtrain.planner.cost.cluster import ClusterConfig, resolve_cluster
from llmtrain.planner.make import make_plan
from llmtrain.planner.page import plan_page
from llmtrain.planner.plan import write_plan
from llmtrain.planner.report import experiment_yaml, plan_text


@dataclass(kw_only=True)
class PlanRoot:
    cluster: ClusterConfig
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    model: ModelWishConfig = field(default_factory=ModelWishConfig)
    data: DataWishConfig = field(default_factory=DataWishConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    plan: ChoiceConfig = field(default_factory=ChoiceConfig)
    name: str = "planned"
    """Of the experiment and of the run it starts."""
    out: str = "plans"
    """Folder for experiment/<name>.yaml, <name>.plan.json and <name>.plan.html; `llmtrain train --config-dir`
    takes it."""

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
        budget=cfg.budget,
        model=cfg.model,
        data=cfg.data,
        inference=cfg.inference,
        choice=cfg.plan,
        cluster=resolve_cluster(cfg.cluster),
        unique_tokens=None
        if cfg.data.folder is None
        else _tokens_of(Path(cfg.data.folder), cfg.data.seq_len),
    )
    out = sweep_folder() or Path(cfg.out)  # each job of a --multirun has its own folder
    plan_path, page_path = out / f"{cfg.name}.plan.json", out / f"{cfg.name}.plan.html"
    experiment_path = out / "experiment" / f"{cfg.name}.yaml"
    command = (
        f"llmtrain train --config-dir {out} +experiment={cfg.name} data.folder={cfg.data.folder or '...'}"
    )
    is_ours = cfg.plan.program == "llmtrain"
    files = {page_path: plan_page(planned, commands=[command] if is_ours else [])}
    if is_ours:
        files = {experiment_path: experiment_yaml(planned.plan, plan_path=plan_path), **files}
    try:
        write_plan(plan_path, planned.plan)
        for path, text in files.items():
            with atomic_write(path, "w") as handle:
                handle.write(text)
    except OSError as error:
        raise ConfigError(
            f"out={cfg.out} cannot be written: {error.strerror}; give another folder"
        ) from error
    print(plan_text(planned))
    print(f"\nwritten: {', '.join(map(str, [*files, plan_path]))}")
    if is_ours:
        print(f"train it: {command}")
    else:
        print(f"no experiment was written: the plan is for {cfg.plan.program}, which `llmtrain train` is not")


def _tokens_of(folder: Path, seq_len: int) -> float:
    """Different tokens that a run on this data folder can read."""
    from llmtrain.data.manifest import read_manifest  # noqa: PLC0415  a login node may lack its packages

    pack = read_manifest(folder).pack("train", seq_len)
    return float(pack.num_rows * seq_len - pack.num_padding)
