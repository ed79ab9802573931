"""How a run is spread over ranks. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    """Every rank is a data-parallel rank; what a rank keeps of the training state is the ZeRO stage's
    choice."""

    zero_stage: int = 1
    """0: every rank keeps all; 1: optimizer states are split; 2: gradients too; 3: weights too
    (Rajbhandari et al. 2020, arXiv:1910.02054)."""

    world_size: int | None = None
    """Ranks that the run is meant for. A launch with another number is refused; null takes any that divides
    the batch."""

    def __post_init__(self) -> None:
        if self.world_size is not None and self.world_size < 1:
            raise ConfigError(f"parallel.world_size={self.world_size} must be at least 1, or null")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
