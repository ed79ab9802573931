"""What a run tells, and to whom. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmtrain.errors import ConfigError


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
