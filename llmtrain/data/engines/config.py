"""Settings of the engines: who runs work units. Nothing here changes a byte of the output. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmtrain.errors import ConfigError


class EngineKind(Enum):
    inline = "inline"
    """In this process, one unit after another."""
    local = "local"
    """Processes on this machine."""


@dataclass(kw_only=True)
class EngineConfig:
    """How the work is spread. Nothing here changes a byte of the output."""

    kind: EngineKind = EngineKind.local
    workers: int | None = None
    """Processes; null: one for each core that this process may use."""
    unit_bytes: int = 16 << 20
    """Input bytes a work unit of the scan."""
    max_worker_deaths: int = 3
    """How often dead workers are replaced and their units done again before the run gives up."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"engine.workers={self.workers} must be at least 1, or null for one a core")
        if self.unit_bytes < 1:
            raise ConfigError(f"engine.unit_bytes={self.unit_bytes} must be at least 1")
        if self.max_worker_deaths < 0:
            raise ConfigError(f"engine.max_worker_deaths={self.max_worker_deaths} must be at least 0")
