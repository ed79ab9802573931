"""`llmtrain dashboard project=NAME`: the W&B dashboard of a project, created or brought up to date."""

from __future__ import annotations

import json
from dataclasses import dataclass

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError
from llmtrain.tracking.dashboard import save, spec_of, workspace_of


@dataclass(kw_only=True)
class DashboardConfig:
    project: str = "llmtrain"
    """At W&B; tracking.wandb_project of its runs."""
    entity: str | None = None
    """User or team; null means the key's default."""
    dry_run: bool = False
    """Whether to print the JSON that W&B would store, and ask W&B nothing. Ids of panels differ each time."""

    def __post_init__(self) -> None:
        if not self.project:
            raise ConfigError("project is empty; name the W&B project of the runs")


def main() -> None:
    run_verb("dashboard", DashboardConfig, dashboard)


def dashboard(cfg: DashboardConfig) -> None:
    if cfg.dry_run:
        print(json.dumps(spec_of(workspace_of(cfg.entity or "", cfg.project)), indent=1))
        return
    saved = save(entity=cfg.entity, project=cfg.project)
    print(f"{'created' if saved.is_new else 'updated'} {saved.url}")
