"""The W&B dashboard of a project, as code: one saved view, created once and then updated in place.

A chart here is a title with its unit, an axis and names of docs/wandb.md's table; a test holds that every
name is there. The view's own name is a hash of entity and project, so whoever runs this finds the same view.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from llmtrain.errors import LLMTrainError

TITLE = "llmtrain"
EVENTS_TABLE = "run/events"
"""Of a run's summary."""


@dataclass(frozen=True)
class Chart:
    """Lines over one of the axes that every row has."""

    title: str
    names: tuple[str, ...]
    """Of docs/wandb.md's table; one with a star stands for all that begin like it."""
    x: str = "tokens"

    @property
    def regex(self) -> str | None:
        """For names with a star, which the chart finds by itself."""
        starred = [name.replace("*", ".*") for name in self.names if name.endswith("*")]
        return "|".join(starred) or None


@dataclass(frozen=True)
class Table:
    """A table of a run's summary."""

    name: str


def _planned(name: str) -> tuple[str, ...]:
    return (f"plan/{name}", *(f"plan/{name}_{end}" for end in ("low", "mid", "high")))


SECTIONS: dict[str, list[Chart | Table]] = {
    "Loss and evaluation by tokens": [
        Chart("training loss (nats per target)", ("train/loss",)),
        Chart("held-out loss (nats per target)", ("eval/loss",)),
        Chart("training and held-out loss (nats per target)", ("train/loss", "eval/loss")),
        Chart("learning rate", ("train/lr",)),
    ],
    "Plan against measured": [
        Chart("step time: measured, and the plan's interval (s)", _planned("step_s"), "step"),
        Chart("step time over the plan's (ratio)", ("plan/step_s_over_plan",), "step"),
        Chart("peak memory: measured, and the plan's interval (GiB)", _planned("mem_gib"), "step"),
        Chart("peak memory over the plan's (ratio)", ("plan/mem_over_plan",), "step"),
        Chart("held-out loss: measured, and the plan's interval (nats per target)", _planned("eval_loss")),
    ],
    "Throughput": [
        Chart("throughput, valid targets (targets/s)", ("train/tokens_per_s",), "step"),
        Chart("MFU, causal: half the attention square counts (share of peak)", ("train/mfu",), "step"),
        Chart("step time, and waiting for data in it (s)", ("train/step_s", "train/data_wait_s"), "step"),
    ],
    "Memory": [
        Chart("peak memory of rank 0 (GiB)", ("train/mem_gib",), "step"),
        Chart(
            "memory of rank 0 by component (GiB)",
            ("memory/weights_gib", "memory/gradients_gib", "memory/optimizer_gib", "memory/rest_gib"),
            "step",
        ),
    ],
    "Data": [
        Chart("data mixture so far, and as asked now (share)", ("mixture/share_*", "mixture/asked_*")),
        Chart("valid targets of a step (targets)", ("train/num_valid",), "step"),
    ],
    "Gradients": [
        Chart("gradient norm before clipping", ("train/grad_norm",)),
        Chart(
            "gradient norm by layer group before clipping",
            (
                *("grads/embedding", "grads/attention", "grads/mlp", "grads/norm", "grads/head"),
                *("grads/blocks_first", "grads/blocks_middle", "grads/blocks_last"),
            ),
        ),
    ],
    "Stragglers": [
        Chart(
            "compute time of a step: slowest rank and median (s)",
            ("ranks/compute_s_max", "ranks/compute_s_median"),
            "step",
        ),
        Chart("longest wait for data of any rank (s)", ("ranks/data_s_max",), "step"),
        Chart("slowest rank (rank)", ("ranks/slowest_rank",), "step"),
    ],
    "Restarts and goodput": [
        Chart("goodput: time since the launch in steps that stand (share)", ("run/goodput",), "step"),
        Chart("attempt (number)", ("attempt",), "step"),
        Chart("went back: from and to (steps)", ("run/went_back_from", "run/went_back_to"), "step"),
        Chart("ends so far (events)", ("events/stopped", "events/failed", "events/hang"), "step"),
        Chart(
            "a checkpoint's time: all of it, and training's (s)",
            ("checkpoint/save_s", "checkpoint/wait_s", "checkpoint/copy_s"),
            "step",
        ),
    ],
    "Spikes": [
        Chart(
            "so far (events)",
            ("events/spike", "events/rolled_back", "events/overflow", "events/diverged"),
            "step",
        ),
        Table(EVENTS_TABLE),
    ],
}


def view_name(entity: str, project: str) -> str:
    """11 characters, as W&B's own views have; in a link they follow `?nw=`."""
    return hashlib.sha256(f"{entity}/{project}/{TITLE}".encode()).hexdigest()[:11]


def workspace_of(entity: str, project: str) -> Any:
    """The dashboard as wandb-workspaces has it, not sent to anyone."""
    import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415  imports wandb, which takes a second
    import wandb_workspaces.workspaces as ws  # noqa: PLC0415

    def panel(item: Chart | Table) -> Any:
        if isinstance(item, Table):
            return wr.WeavePanelSummaryTable(table_name=item.name)
        if item.regex is not None:
            return wr.LinePlot(title=item.title, x=item.x, metric_regex=item.regex)
        return wr.LinePlot(title=item.title, x=item.x, y=list(item.names))

    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(name=name, panels=[panel(item) for item in items], is_open=True)
            for name, items in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="tokens", smoothing_type="none"),
        runset_settings=ws.RunsetSettings(
            pinned_columns=["run:displayName", "summary:step", "summary:train/loss", "summary:eval/loss"]
        ),
    )


def spec_of(workspace: Any) -> Any:
    """What W&B stores of it, as plain values. Ids of its panels are drawn anew each time."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


@dataclass(frozen=True)
class Saved:
    url: str
    is_new: bool


def save(*, entity: str | None, project: str) -> Saved:
    """Create the dashboard, or put it back in place of what its view holds now.

    Raises:
        LLMTrainError: no key, no such project, or a server that does not take it.
    """
    import wandb  # noqa: PLC0415
    import wandb_workspaces.workspaces as ws  # noqa: PLC0415

    if not os.environ.get("WANDB_API_KEY"):
        raise LLMTrainError(
            "WANDB_API_KEY is not set, and saving a dashboard needs it; dry_run=true prints it without W&B"
        )
    try:
        owner = entity or wandb.Api().default_entity
        workspace = workspace_of(owner, project)
        name = view_name(owner, project)
        workspace._internal_name = f"nw-{name}-v"
        try:
            before = ws.Workspace.from_url(f"https://wandb/{owner}/{project}?nw={name}")
        except ValueError as error:
            if str(error).startswith("Project"):
                raise LLMTrainError(
                    f"W&B has no project {owner}/{project}; its first run makes it, online or by `wandb sync`"
                ) from None
        else:
            workspace._internal_id = before._internal_id
        is_new = not workspace._internal_id
        workspace.save()
        return Saved(workspace.url, is_new)
    except LLMTrainError:
        raise
    except Exception as error:  # wandb's own have no base in common
        raise LLMTrainError(
            f"W&B did not take the dashboard of {project}: {type(error).__name__}: "
            f"{str(error).partition(os.linesep)[0]}"
        ) from None
