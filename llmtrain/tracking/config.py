"""What a run tells, and to whom. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from llmtrain.errors import ConfigError

MAX_TAG_LENGTH = 64


class WandbMode(Enum):
    """Where W&B's records go."""

    off = "off"
    """No W&B. In a YAML file write 'off' in quotes: without them YAML reads it as false."""
    offline = "offline"
    """A .wandb file in the run folder; `wandb sync` sends it later."""
    online = "online"
    """Sent while training; needs an API key, and falls back to offline without one."""
    auto = "auto"
    """online if WANDB_API_KEY is set, else offline; W&B's own WANDB_MODE is obeyed."""


@dataclass(kw_only=True)
class TrackingConfig:
    """metrics.jsonl is always written, one line a step; these settings are about what is shown beside it."""

    log_every_steps: int = 10
    """Steps between two progress lines when the output is not a terminal. Metrics are written every step."""
    wandb: WandbMode = WandbMode.auto
    """off, offline, online or auto."""
    wandb_project: str = "llmtrain"
    wandb_entity: str | None = None
    """User or team; null means the key's default."""
    wandb_group: str | None = None
    """What W&B shows together; null: the job array or the Hydra sweep that the run is a job of, else none."""
    wandb_job_type: str | None = None
    """The run's part in its group, as in train or ablation."""
    wandb_tags: list[str] = field(default_factory=list)
    wandb_node_metrics: bool = False
    """Whether W&B also has the system metrics of the nodes that rank 0 is not on: each is a run of its own in
    the run's group, of job type `node`. The group is the run's id unless wandb_group says otherwise."""
    wandb_init_timeout_s: float = 30.0
    """Seconds that W&B may take to start before it is given up. Training does not wait for it."""
    wandb_finish_timeout_s: float = 15.0
    """Seconds that the end of a run waits for W&B. What was not sent by then is on disk for `wandb sync`."""

    def __post_init__(self) -> None:
        if self.log_every_steps < 1:
            raise ConfigError(f"tracking.log_every_steps={self.log_every_steps} must be at least 1")
        for name in ("wandb_init_timeout_s", "wandb_finish_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"tracking.{name}={getattr(self, name)} must be above 0 seconds")
        if not self.wandb_project:
            raise ConfigError("tracking.wandb_project is empty; name a project, or set tracking.wandb=off")
        for tag in self.wandb_tags:
            if not 1 <= len(tag) <= MAX_TAG_LENGTH:
                raise ConfigError(
                    f"tracking.wandb_tags has {tag!r}; W&B takes tags of 1 to {MAX_TAG_LENGTH} characters"
                )


def sweep_group(*, array_job: str | None, sweep_folder: Path | None) -> str | None:
    """The W&B group of a job of an array or a Hydra sweep by default; None for a run of its own.

    Args:
        array_job: id of the scheduler's job array.
        sweep_folder: this job's folder in the sweep's.
    """
    if array_job:
        return f"array-{array_job}"
    return None if sweep_folder is None else "/".join(sweep_folder.parent.parts[-2:])
