"""What a plan is made from: a budget, a device, a vocabulary, a row length. stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.errors import ConfigError

PRECISIONS = ("fp32", "bf16")


@dataclass(kw_only=True)
class BudgetConfig:
    """How much compute there is. Give exactly one of the three."""

    device_hours: float | None = None
    """Hours summed over devices, as clouds bill them: 8 GPUs for 2 hours are 16."""
    wall_hours: float | None = None
    """Hours that hardware.num_devices devices run at once."""
    flops: float | None = None
    """Training FLOPs of the model itself (forward and backward, no recomputation), whatever the hardware does
    with them."""

    def __post_init__(self) -> None:
        given = {
            f"budget.{name}": value
            for name in ("device_hours", "wall_hours", "flops")
            if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            listed = ", ".join(f"{name}={value:g}" for name, value in given.items()) or "none of them"
            raise ConfigError(
                f"give exactly one of budget.device_hours, budget.wall_hours and budget.flops; got {listed}"
            )
        for name, value in given.items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value:g} must be a number above 0")


@dataclass(kw_only=True)
class HardwareConfig:
    """One kind of device, and how many of them."""

    name: str
    peak_tflops: float | None
    """Dense matrix products of one device in `precision`, 1e12 FLOP/s; null: measured now on this machine
    with numpy."""
    peak_source: str = "given on the command line"
    precision: str = "bf16"
    """fp32 or bf16: what the experiment trains in, and what the peak is for."""
    utilization_low: float = 0.2
    """Model FLOPs utilization that 9 runs in 10 exceed: useful FLOPs (PaLM's count) over peak."""
    utilization_mid: float = 0.35
    utilization_high: float = 0.5
    """What 1 run in 10 exceeds."""
    utilization_source: str = "assumed, not measured"
    num_devices: int = 1
    """Devices that train at once. The cores of one machine are one device."""
    ranks_per_device: int = 1
    """Processes that share a device; the batch is made to divide among all of them."""
    mem_gib: float | None = None
    """Memory of one device, for a first check that the training state fits; null: not checked."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"hardware.precision={self.precision} must be one of {', '.join(PRECISIONS)}")
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            raise ConfigError(
                f"hardware.peak_tflops={self.peak_tflops} must be above 0, or null to measure this machine"
            )
        if not 0 < self.utilization_low <= self.utilization_mid <= self.utilization_high <= 1:
            raise ConfigError(
                f"need 0 < hardware.utilization_low <= utilization_mid <= utilization_high <= 1, got "
                f"{self.utilization_low}, {self.utilization_mid} and {self.utilization_high}"
            )
        for name in ("num_devices", "ranks_per_device"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hardware.{name}={getattr(self, name)} must be at least 1")


@dataclass(kw_only=True)
class VocabularyConfig:
    """What the plan cannot choose about the model."""

    vocab_size: int = 8192
    """Rows of the embedding: the tokenizer's vocabulary."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(f"model.vocab_size={self.vocab_size} must be at least 2")


@dataclass(kw_only=True)
class RowsConfig:
    seq_len: int = 512
    """Tokens a row. The data folder must hold a pack of this length when the plan is trained."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(
                f"data.seq_len={self.seq_len} must be at least 2: a row needs a token and a target"
            )
