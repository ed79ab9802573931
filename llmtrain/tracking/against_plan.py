"""A run that is about to start, beside its plan: for `llmtrain train check_only=true`. Loads without
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.planner.interval import Interval
from llmtrain.planner.plan import read_plan
from llmtrain.planner.runs import differences, forecast_of_run
from llmtrain.units import format_bytes, format_duration


@dataclass(frozen=True, kw_only=True)
class AgainstPlan:
    differences: list[str]
    """In what the run will not be the plan's."""
    facts: list[str]
    """What the plan expects of this very run."""


def against_plan(path: Path, config: Mapping[str, Any]) -> AgainstPlan:
    """Compare a resolved config with the plan at `path`. DataError when there is none, or not a whole one."""
    plan = read_plan(path)
    found = differences(plan, config, world_size=None)
    ranks = config["parallel"]["world_size"] or plan.cluster.num_gpus
    try:
        forecast = forecast_of_run(plan, config, world_size=ranks)
    except ConfigError as error:
        return AgainstPlan(differences=found, facts=[f"plan: nothing to expect of this run: {error}"])
    capacity = plan.cluster.gpu.mem_bytes
    if forecast.peak_bytes.high > capacity:
        found.append(
            f"memory: up to {format_bytes(forecast.peak_bytes.high)} a rank where {plan.cluster.gpu.name} "
            "has "
            f"{format_bytes(capacity)}"
        )
    facts = [
        f"plan {plan.name}: a step of {_span(forecast.step_s)}, the run {_span(forecast.total_s)}, loss "
        f"{forecast.loss.low:.2f} to {forecast.loss.high:.2f}"
    ]
    return AgainstPlan(differences=found, facts=facts)


def _span(interval: Interval) -> str:
    return f"{format_duration(interval.low)} to {format_duration(interval.high)}"
