"""`llmtrain plan ladder`: the small runs that a fit needs, as one sweep of `train`, with their cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError, unknown_name
from llmtrain.files import atomic_write
from llmtrain.planner.cost.cluster import THIS_MACHINE, ClusterConfig, resolve_cluster
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.fit_report import parse_target
from llmtrain.planner.loss.ladder import (
    PRECISIONS,
    RUN_NOISE,
    Devices,
    Ladder,
    Reach,
    experiment_yaml,
    judge,
    ladder_json,
    make_ladder,
    sweep_script,
)
from llmtrain.planner.units import FLOPS, PARAMS, parse_quantity
from llmtrain.units import format_count, format_duration


@dataclass(kw_only=True)
class LadderModelConfig:
    vocab_size: int = 8192
    """Rows of the embedding: the tokenizer's vocabulary, that of the large run too."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(f"model.vocab_size={self.vocab_size} must be at least 2")


@dataclass(kw_only=True)
class LadderDataConfig:
    seq_len: int = 512
    """Tokens a row. The data folder must hold a pack of this length."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2: a token and a target")


@dataclass(kw_only=True)
class PlanLadderConfig:
    cluster: ClusterConfig
    """What each run has; runs come one after another."""
    sizes: list[str] = field(default_factory=lambda: ["15M", "30M", "60M", "120M"])
    """Parameters, embeddings included; the nearest real shapes are taken."""
    tokens_per_param: list[float] = field(default_factory=lambda: [10.0, 20.0, 40.0, 80.0])
    """Each with each size."""
    budget: str | None = None
    """FLOPs of the whole ladder: all sizes are scaled by one factor to it; null: they stay."""
    target: str | None = None
    """A run that the ladder is for, as PARAMS/TOKENS: its cost beside the ladder's, and how wide an interval
    to expect."""
    utilization: list[float] = field(default_factory=lambda: [0.2, 0.35, 0.5])
    """Useful FLOPs over the peak: low, middle and high. Assumed, not measured: small models fill a GPU
    badly."""
    precision: str | None = None
    """bf16 or fp32; null: fp32 on this_machine, bf16 elsewhere."""
    model: LadderModelConfig = field(default_factory=LadderModelConfig)
    data: LadderDataConfig = field(default_factory=LadderDataConfig)
    name: str = "ladder"
    out: str = "plans"
    """Folder for experiment/<run>.yaml, <name>.json and <name>.sh."""

    def __post_init__(self) -> None:
        if not self.name or any(mark in self.name for mark in "/\\ =,"):
            raise ConfigError(
                f"name={self.name!r} must be a file name without spaces, slashes, commas and equal signs"
            )
        if not self.sizes or not self.tokens_per_param:
            raise ConfigError("sizes and tokens_per_param must not be empty")
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in self.tokens_per_param):
            raise ConfigError(f"tokens_per_param={self.tokens_per_param} must be numbers above 0")
        if len(set(self.tokens_per_param)) < len(self.tokens_per_param):
            raise ConfigError(f"tokens_per_param={self.tokens_per_param} names a number twice")
        use = self.utilization
        if len(use) != 3 or not 0 < use[0] <= use[1] <= use[2] <= 1:
            raise ConfigError(
                f"utilization={use} must be three rising parts of the peak, above 0 and at most 1, as in "
                "[0.2,0.35,0.5]"
            )
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("precision", self.precision, PRECISIONS))


def main() -> None:
    run_verb("plan_ladder", PlanLadderConfig, run)


def run(cfg: PlanLadderConfig) -> None:
    target = None if cfg.target is None else parse_target(cfg.target, name="target")
    ladder = make_ladder(
        name=cfg.name,
        sizes=[parse_quantity(size, PARAMS, name="sizes") for size in cfg.sizes],
        ratios=cfg.tokens_per_param,
        vocab_size=cfg.model.vocab_size,
        seq_len=cfg.data.seq_len,
        devices=resolve_devices(cfg),
        budget_flops=None if cfg.budget is None else parse_quantity(cfg.budget, FLOPS, name="budget"),
    )
    reach = None
    if target is not None:
        reach = judge(ladder, num_params=target.num_params, num_tokens=target.num_tokens)
    out = Path(cfg.out)
    for rung in ladder.rungs:
        with atomic_write(out / "experiment" / f"{rung.name}.yaml", "w") as handle:
            handle.write(experiment_yaml(rung, ladder.devices))
    with atomic_write(out / f"{cfg.name}.json", "w") as handle:
        handle.write(ladder_json(ladder))
    with atomic_write(out / f"{cfg.name}.sh", "w") as handle:
        handle.write(sweep_script(ladder, out=out))
    print(ladder_text(ladder, reach))
    print(f"\nwritten: {out}/experiment/{cfg.name}_*.yaml, {out}/{cfg.name}.json and {out}/{cfg.name}.sh")
    print(f"train and fit: sh {out}/{cfg.name}.sh data.folder=...")


def resolve_devices(cfg: PlanLadderConfig) -> Devices:
    """The cluster as one pool of equal devices, one rank each."""
    cluster = resolve_cluster(cfg.cluster)
    precision = cfg.precision or ("fp32" if cluster.name == THIS_MACHINE else "bf16")
    low, mid, high = cfg.utilization
    return Devices(
        name=cluster.gpu.name,
        num_devices=cluster.num_gpus,
        peak_flops=cluster.gpu.peak(precision),
        peak_source=cluster.gpu.source,
        utilization=Interval(low=low, mid=mid, high=high),
        precision=precision,
    )


def ladder_text(ladder: Ladder, reach: Reach | None) -> str:
    hours = ladder.device_hours
    width = max(len(rung.name) for rung in ladder.rungs)
    lines = [f"{'run'.ljust(width)}  parameters     tokens  tokens/param     FLOPs          time"]
    for rung in ladder.rungs:
        lines.append(
            f"{rung.name.ljust(width)}  {format_count(rung.num_params):>10}  "
            f"{format_count(rung.num_tokens):>9}  {rung.tokens_per_param:>12.3g}  {rung.flops:>8.2e}  "
            f"{format_duration(ladder.seconds(rung).mid):>12}"
        )
    devices, use = ladder.devices, ladder.devices.utilization
    lines += [
        f"all {len(ladder.rungs)} runs: {ladder.flops:.3g} FLOPs, {hours.mid:.3g} device-hours "
        f"({hours.low:.3g} to {hours.high:.3g})",
        f"on {devices.num_devices} x {devices.name}, {devices.peak_flops / 1e12:.4g} TFLOP/s each, at "
        f"{use.mid:g} of it ({use.low:g} to {use.high:g}, as utilization=... says)",
    ]
    if reach is not None:
        loss = reach.loss
        lines += [
            f"for {format_count(reach.num_params)}/{format_count(reach.num_tokens)}, "
            f"{reach.flops_beyond:.3g} times the largest run's FLOPs: the ladder costs "
            f"{reach.share_of_cost:.2%} of it.",
            f"Were a published law true, with {RUN_NOISE:.1%} noise on each run, the fit would say "
            f"{loss.mid:.3f} ({loss.low:.3f} to {loss.high:.3f}) there,",
            f"where the law has {reach.true_loss:.3f}",
        ]
    return "\n".join(lines)
