"""A run's resolved config (config.yaml, as plain values) as the planner sees it, and beside a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.files import plain
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_params
from llmtrain.parallel.config import ParallelConfig
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.layouts import describe
from llmtrain.planner.forecast import forecast_run
from llmtrain.planner.plan import Forecast, PlanFile
from llmtrain.units import format_count

Config = Mapping[str, Any]

LR_TOLERANCE = 1e-6


def model_of(config: Config) -> ModelConfig:
    return ModelConfig(**config["model"])


def layout_of(config: Config, *, world_size: int) -> Layout:
    """The layout of a run on `world_size` ranks, at its final batch size.

    Raises:
        ConfigError: The ranks or the batch do not divide among the axes.
    """
    parallel, train = _parallel(config), config["train"]
    model_ranks = parallel["pp_size"] * parallel["cp_size"] * parallel["tp_size"]
    dp, left = divmod(world_size, model_ranks)
    if left or not dp:
        raise ConfigError(f"{world_size} ranks are not a multiple of pp * cp * tp = {model_ranks}")
    accum, left = divmod(train["global_batch_rows"], dp * train["micro_batch_rows"])
    if left or not accum:
        raise ConfigError(
            f"train.global_batch_rows={train['global_batch_rows']} is not a multiple of dp * "
            f"train.micro_batch_rows = {dp} * {train['micro_batch_rows']}"
        )
    if train.get("recompute_every", 0) > 1:
        raise ConfigError(
            f"train.recompute_every={train['recompute_every']}: the planner knows recomputation of every "
            "block, or none"
        )
    schedule = parallel["pp_schedule"] if parallel["pp_size"] > 1 else "one_f_one_b"
    return Layout(
        seq_len=config["data"]["seq_len"],
        pp=parallel["pp_size"],
        vpp=2 if schedule == "dual_pipe_v" else 1,
        dp=dp,
        cp=parallel["cp_size"],
        tp=parallel["tp_size"],
        zero_stage=parallel["zero_stage"],
        micro_batch_rows=train["micro_batch_rows"],
        grad_accum=accum,
        recompute=train["recompute"] if train.get("recompute_every") else "none",
        sequence_parallel=parallel["sequence_parallel"] and parallel["tp_size"] > 1,
        schedule=schedule,
        precision=train["precision"],
        compiled=train.get("compile_blocks", False),
    )


def _parallel(config: Config) -> dict[str, Any]:
    """Of a run of an older version, too, which knew fewer settings."""
    return {**plain(ParallelConfig()), **(config.get("parallel") or {})}


def forecast_of_run(plan: PlanFile, config: Config, *, world_size: int) -> Forecast:
    """What the plan's cluster, program and laws say about this very run.

    Raises:
        ConfigError: The run's ranks are not the plan's, or its sizes do not divide.
        KeyError: The config lacks a setting.
    """
    layout = layout_of(config, world_size=world_size)
    return forecast_run(plan, model_of(config), layout, total_tokens=config["train"]["total_tokens"])


def differences(plan: PlanFile, config: Config, *, world_size: int | None) -> list[str]:
    """In what a run will not be the plan's, one line each; empty when it is.

    Args:
        world_size: None where it is not known: then the layout's dp is not compared.
    """
    choice, train = plan.choice, config["train"]
    found = []
    model = model_of(config)
    if model != choice.model:
        ours, theirs = vars(model), vars(choice.model)
        changed = [
            f"{name}={ours[name]} (plan {theirs[name]})" for name in ours if ours[name] != theirs[name]
        ]
        found.append(
            f"model: {format_count(num_params(model))} parameters where the plan has "
            f"{format_count(num_params(choice.model))}: {', '.join(changed)}"
        )
    wanted = {
        "data.seq_len": (config["data"]["seq_len"], choice.seq_len),
        "train.total_tokens": (train["total_tokens"], choice.total_tokens),
        "train.global_batch_rows": (train["global_batch_rows"], choice.global_batch_rows),
        "train.precision": (train["precision"], plan.precision),
        "schedule.kind": (config["schedule"]["kind"], choice.schedule),
        "schedule.warmup_tokens": (config["schedule"]["warmup_tokens"], choice.warmup_tokens),
        "schedule.decay_tokens": (
            config["schedule"].get("decay_tokens"),
            choice.decay_tokens if choice.schedule == "wsd" else None,
        ),
        "optimizer.kind": (config["optimizer"].get("kind", "adamw"), "adamw"),
        "parallel.engine": (_parallel(config)["engine"], "deepspeed"),
    }
    found += [
        f"{name}={ours}, and the plan has {theirs}"
        for name, (ours, theirs) in wanted.items()
        if ours != theirs
    ]
    peak_lr = config["optimizer"]["peak_lr"]
    if abs(peak_lr / choice.peak_lr - 1) > LR_TOLERANCE:
        found.append(f"optimizer.peak_lr={peak_lr:g}, and the plan has {choice.peak_lr:g}")
    ranks = world_size or _parallel(config)["world_size"] or plan.cluster.num_gpus
    if ranks != plan.cluster.num_gpus:
        found.append(f"{ranks} ranks, and the plan's cluster has {plan.cluster.num_gpus} GPUs")
    try:
        layout = layout_of(config, world_size=ranks)
    except ConfigError as error:
        found.append(str(error))
        return found
    if layout != choice.layout:
        found.append(f"layout: {describe(layout)}; the plan has {describe(choice.layout)}")
    return found
