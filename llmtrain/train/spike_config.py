"""What counts as a spike, and what a run does about one. stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from llmtrain.errors import ConfigError

MIN_WARMUP_STEPS = 16
"""Of fewer values the spread is a guess: of 8 normal ones, the next is 8 of their robust deviations up once
in 550 steps; of 16, never in 60,000 draws."""


class SpikeAction(Enum):
    """What a run does about a step that it does not like."""

    ignore = "ignore"
    """Nothing; spikes are not looked for."""
    warn = "warn"
    """Say so, and train on the batch."""
    skip = "skip"
    """Read the batch and do not update: weights, moments and the optimizer's counters stay as they were."""
    rollback = "rollback"
    """Go back to an earlier checkpoint, and pass over the batch's rows from then on."""
    stop = "stop"
    """End the run with an error."""


@dataclass(kw_only=True)
class SpikeConfig:
    """A spike is a loss or a gradient norm that stands far above those of the steps before it."""

    on_spike: SpikeAction = SpikeAction.warn
    on_non_finite: SpikeAction = SpikeAction.stop
    """For a loss or a norm that is nan or inf. An overflow of fp16 is none: its loss scale falls, and the
    run goes on."""
    loss_z: float = 8.0
    """A loss is a spike from so many robust standard deviations above the median of the window on."""
    grad_norm_z: float = 10.0
    """The same for the logarithm of the gradient norm, whose tail is heavier."""
    window_steps: int = 128
    """Steps that a loss is compared with. Spikes are not among them."""
    warmup_steps: int = 64
    """Nothing is a spike before so many steps are in the window. So many spikes in a row are no spikes but
    a new level, and the window begins again with them."""
    budget: int = 5
    """Most updates withheld and rollbacks in budget_steps; the next one ends the run."""
    budget_steps: int = 1000
    cooldown_steps: int = 50
    """After a rollback so many steps pass before there may be another; what would have been one withholds
    the update. After a warning so many pass before the next."""
    rollback_checkpoints: int = 1
    """How many checkpoints a rollback goes back: 1 is the newest from before the spike. One that is too near
    may hold what led to it."""
    rollback_steps_before: int = 0
    """A rollback passes over the rows of so many steps before the spike's, too. PaLM passed over 200 to 500
    batches, from before the spike and during it (arXiv:2204.02311, section 5.1)."""

    def __post_init__(self) -> None:
        if self.on_non_finite in (SpikeAction.ignore, SpikeAction.warn):
            raise ConfigError(
                f"spikes.on_non_finite={self.on_non_finite.name}: an update that is not finite destroys the "
                "weights; choose skip, rollback or stop"
            )
        for name in ("loss_z", "grad_norm_z"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"spikes.{name}={getattr(self, name)} must be finite and above 0")
        if not MIN_WARMUP_STEPS <= self.warmup_steps <= self.window_steps:
            raise ConfigError(
                f"need {MIN_WARMUP_STEPS} <= spikes.warmup_steps <= spikes.window_steps, got "
                f"{self.warmup_steps} and {self.window_steps}: of fewer steps the spread is a guess"
            )
        for name, least in (
            ("budget", 0),
            ("budget_steps", 1),
            ("cooldown_steps", 0),
            ("rollback_checkpoints", 1),
            ("rollback_steps_before", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"spikes.{name}={getattr(self, name)} must be at least {least}")

    @property
    def withholds(self) -> bool:
        """Whether an engine has to ask before it updates."""
        return bool({self.on_spike, self.on_non_finite} & {SpikeAction.skip, SpikeAction.rollback})
