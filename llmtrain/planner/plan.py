"""A plan as its file has it, which a run is later held against: what to train, how, and what to expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import plain, read_json, write_json
from llmtrain.model.config import ModelConfig
from llmtrain.planner.cost.cluster import Cluster, Gpu
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.interval import Interval

FORMAT_VERSION = 2
FLOPS_CONVENTION = "palm"
"""The count of FLOPs in a budget: PaLM's (arXiv:2204.02311, appendix B)."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the plan trains."""

    model: ModelConfig
    layout: Layout
    total_tokens: int
    num_steps: int
    peak_lr: float
    schedule: str
    warmup_tokens: int
    decay_tokens: int
    """Of wsd; under cosine all after the warm-up."""

    @property
    def seq_len(self) -> int:
        return self.layout.seq_len

    @property
    def global_batch_rows(self) -> int:
        return self.layout.global_batch_rows

    @property
    def micro_batch_rows(self) -> int:
        return self.layout.micro_batch_rows

    @property
    def global_batch_tokens(self) -> int:
        return self.layout.global_batch_tokens


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect of a run: 8 runs in 10 lie inside each interval."""

    step_s: Interval
    tokens_per_s: Interval
    """Of all ranks, while steps are done."""
    train_s: Interval
    """All steps, nothing else."""
    total_s: Interval
    """train_s / goodput: with restarts, lost steps, checkpoints."""
    gpu_hours: Interval
    usd: Interval | None
    """None without a price."""
    goodput: float
    loss: Interval
    """Nats per token at the end, on held-out text, repeats counted; `forecast_loss` says what the ends
    are."""
    loss_law: str
    loss_decades_outside: float
    """How far outside that law's runs this one lies, in powers of ten."""
    peak_bytes: Interval
    """On the fullest rank's device."""
    recorded_bytes: Interval
    """As metrics.jsonl has it in mem_gib: on a GPU what the allocator gave out at most, on a CPU all that the
    process holds. Of the fullest rank; metrics.jsonl has rank 0's."""
    mfu: Mapping[str, Interval]
    """Useful FLOPs over peak in each of model/size.FLOPS_CONVENTIONS."""
    time_parts: Mapping[str, float]
    """Seconds of a step."""
    memory_parts: Mapping[str, float]
    """Bytes at the fullest instant."""
    memory_instants: Mapping[str, float]
    """Bytes allocated at each instant."""
    constants_from: str
    """Where the constants of time come from, and how far this question lies from there."""


@dataclass(frozen=True, kw_only=True)
class RunnerUp:
    """A layout that lost."""

    layout: Layout
    step_s: Interval
    peak_bytes: Interval
    why: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the plan becomes when something else does."""

    change: str
    total_ratio: float | None
    """Time for as many tokens over the plan's; None where no layout fits."""
    layout: str
    """The best one then; "the same", or why there is none."""


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """`<name>.plan.json`."""

    name: str
    budget_flops: float
    """Training FLOPs of the run in FLOPS_CONVENTION."""
    budget_text: str
    """The sum behind it."""
    law: str
    cluster: Cluster
    precision: str
    program: str
    calibration: Mapping[str, Any] | None
    """As `llmtrain plan calibrate` wrote it."""
    unique_tokens: float | None
    choice: Choice
    forecast: Forecast
    runners_up: tuple[RunnerUp, ...]
    sensitivity: tuple[Change, ...]


# -- the file


def write_plan(path: Path, plan: PlanFile) -> None:
    write_json(path, {"format_version": FORMAT_VERSION, **plain(plan)})


def read_plan(path: Path) -> PlanFile:
    """Read a plan file. DataError when it is missing, damaged or of another version."""
    try:
        content = read_json(path)
    except OSError:
        raise DataError(f"no plan at {path}; `llmtrain plan` writes one and prints where") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a plan: {error}; write it anew with `llmtrain plan`") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version={version} and this llmtrain reads {FORMAT_VERSION}; "
            f"write it anew with `llmtrain plan`"
        )
    try:
        return _from_json(content)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} does not hold a whole plan: {error}; write it anew with `llmtrain plan`"
        ) from error


def _from_json(content: dict[str, Any]) -> PlanFile:
    choice, cluster = content["choice"], content["cluster"]
    gpu = cluster["gpu"]
    forecast = {key: _interval_or_value(value) for key, value in content["forecast"].items()}
    for name in (
        "step_s",
        "tokens_per_s",
        "train_s",
        "total_s",
        "gpu_hours",
        "loss",
        "peak_bytes",
        "recorded_bytes",
    ):
        if not isinstance(forecast[name], Interval):
            raise TypeError(f"forecast.{name}={forecast[name]} is no interval")
    forecast["mfu"] = {key: Interval(**value) for key, value in forecast["mfu"].items()}
    whole = {each.name: content[each.name] for each in fields(PlanFile)}
    return PlanFile(
        **{
            **whole,
            "cluster": Cluster(**{**cluster, "gpu": Gpu(**{**gpu, "unverified": tuple(gpu["unverified"])})}),
            "choice": Choice(
                **{**choice, "model": ModelConfig(**choice["model"]), "layout": Layout(**choice["layout"])}
            ),
            "forecast": Forecast(**forecast),
            "runners_up": tuple(
                RunnerUp(**{key: _runner_up(key, value) for key, value in each.items()})
                for each in content["runners_up"]
            ),
            "sensitivity": tuple(Change(**each) for each in content["sensitivity"]),
        }
    )


def _interval_or_value(value: Any) -> Any:
    """JSON holds no types."""
    if isinstance(value, dict) and set(value) == {"low", "mid", "high"}:
        if not all(isinstance(end, int | float) for end in value.values()):
            raise TypeError(f"{value} is no interval of numbers")
        return Interval(**value)
    return value


def _runner_up(key: str, value: Any) -> Any:
    return Layout(**value) if key == "layout" else _interval_or_value(value)
