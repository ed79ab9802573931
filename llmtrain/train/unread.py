"""Settings that nothing reads in a combination with others: whoever sets one means something, so it is an
error.

A setting counts as set when it is on the command line, whatever its value, or when its value is not the
default: in a file a default is hard to tell from what was left alone. What depends on more than the
settings (a terminal, Slurm's limits, the intent of this one start, other verbs that read the same file) has
no row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from operator import eq
from typing import Any

from llmtrain import files
from llmtrain.errors import ConfigError
from llmtrain.loader.config import SETTINGS_OF, ObjectiveKind
from llmtrain.train.config import TrainRoot
from llmtrain.train.settings import defaults, value_of


@dataclass(frozen=True)
class Row:
    """Settings that count only with some values of others."""

    names: tuple[str, ...]
    decided_by: tuple[str, ...]
    is_read: Callable[..., bool]
    """Given the plain values of `decided_by`."""
    live: str
    """What makes them count, as a user types it."""


ON_SPIKES = ("spikes.on_spike", "spikes.on_non_finite")
ROWS = (
    Row(("schedule.decay_shape",), ("schedule.kind",), lambda kind: kind == "wsd", "schedule.kind=wsd"),
    Row(
        ("schedule.floor_ratio",),
        ("schedule.kind",),
        lambda kind: kind != "constant",
        "schedule.kind=cosine, wsd or inverse_sqrt",
    ),
    Row(("optimizer.momentum",), ("optimizer.kind",), lambda kind: kind == "muon", "optimizer.kind=muon"),
    Row(("train.recompute",), ("train.recompute_every",), lambda every: every > 0, "train.recompute_every=1"),
    Row(
        ("train.start_up_silence_s",),
        ("parallel.world_size",),
        lambda size: size != 1,
        "more than one rank",
    ),
    Row(
        tuple(
            f"tracking.wandb_{name}"
            for name in (
                *("project", "entity", "group", "job_type", "tags", "node_metrics"),
                *("init_timeout_s", "finish_timeout_s"),
            )
        ),
        ("tracking.wandb",),
        lambda mode: mode != "off",
        "tracking.wandb=auto",
    ),
    Row(
        ("save.memory_folder",),
        ("save.memory_every_steps",),
        lambda every: every > 0,
        "save.memory_every_steps=50",
    ),
    Row(("save.exit_wait_s",), ("save.in_background",), bool, "save.in_background=true"),
    Row(
        ("parallel.pp_schedule",), ("parallel.pp_size",), lambda size: size > 1, "parallel.pp_size=2 or more"
    ),
    Row(
        ("parallel.sequence_parallel",),
        ("parallel.tp_size",),
        lambda size: size > 1,
        "parallel.tp_size=2 or more",
    ),
    Row(("parallel.context",), ("parallel.cp_size",), lambda size: size > 1, "parallel.cp_size=2 or more"),
    Row(
        ("parallel.deepspeed",),
        ("parallel.engine",),
        lambda engine: engine == "deepspeed",
        "parallel.engine=deepspeed",
    ),
    Row(
        ("spikes.loss_z", "spikes.grad_norm_z", "spikes.window_steps", "spikes.warmup_steps"),
        ("spikes.on_spike",),
        lambda on_spike: on_spike != "ignore",
        "spikes.on_spike=warn",
    ),
    Row(
        ("spikes.budget", "spikes.budget_steps"),
        ON_SPIKES,
        lambda *actions: bool({"skip", "rollback"} & {*actions}),
        "spikes.on_spike=skip or rollback",
    ),
    Row(
        ("spikes.cooldown_steps",),
        ON_SPIKES,
        lambda *actions: bool({"warn", "rollback"} & {*actions}),
        "spikes.on_spike=warn or rollback",
    ),
    Row(
        ("spikes.rollback_checkpoints", "spikes.rollback_steps_before"),
        ON_SPIKES,
        lambda *actions: "rollback" in actions,
        "spikes.on_spike=rollback",
    ),
    Row(
        tuple(
            f"preflight.{name}"
            for name in (
                "idle_nodes",
                "max_clock_skew_s",
                "max_lookup_s",
                "min_free_gib",
                "min_free_inodes",
                "min_shared_memory_mib",
                "max_gpu_celsius",
                "max_gpu_used_gib",
                "max_gpu_memory_errors",
                "storage_mib",
                "storage_s",
                "min_storage_mb_per_s",
                "all_reduce_mib",
                "network_s",
                "min_bus_gb_per_s",
                "slow_ratio",
                "answer_s",
            )
        ),
        ("preflight.enabled",),
        bool,
        "preflight.enabled=true",
    ),
    Row(("model.rope_theta",), ("model.family",), lambda family: family == "llama", "model.family=llama"),
    Row(("data.on_exhausted",), ("data.sources",), lambda sources: len(sources) > 0, "data.sources"),
    Row(
        ("data.block_rows",), ("data.sources",), lambda sources: len(sources) > 1, "two or more data.sources"
    ),
    *(
        Row(
            tuple(f"data.objective.{name}" for name in names),
            ("data.objective.kind",),
            partial(eq, kind.name),
            f"data.objective.kind={kind.name}",
        )
        for kind, names in SETTINGS_OF.items()
        if names and kind is not ObjectiveKind.causal
    ),
)


def unread_names(cfg: TrainRoot) -> dict[str, Row]:
    """Every setting that nothing reads with the others as they are, set or not."""
    plain = files.plain(cfg)
    return {
        name: row
        for row in ROWS
        if not row.is_read(*(value_of(plain, each) for each in row.decided_by))
        for name in row.names
    }


def unread(cfg: TrainRoot, given: Collection[str] = ()) -> list[str]:
    """A sentence for each setting that the user set and nothing reads.

    Args:
        given: dotted names that are on the command line.
    """
    plain, found = files.plain(cfg), []
    for name, row in unread_names(cfg).items():
        value = value_of(plain, name)
        if name in given or value != defaults()[name]:
            deciding = {each: value_of(plain, each) for each in row.decided_by}
            found.append(_sentence(name, value, deciding, row.live))
    for name, source in cfg.data.sources.items() if cfg.data.stages else ():
        if source.weight is not None:
            setting = f"data.sources.{name}.weight"
            found.append(
                _sentence(setting, source.weight, {"data.stages": plain["data"]["stages"]}, "data.stages=[]")
            )
    return found


def refuse_unread(cfg: TrainRoot, given: Collection[str] = ()) -> None:
    """
    Raises:
        ConfigError: the user set what nothing reads; all of it is told.
    """
    if found := unread(cfg, given):
        raise ConfigError("\n       ".join(found))


def _sentence(name: str, value: Any, deciding: Mapping[str, Any], live: str) -> str:
    because = " and ".join(
        f"{len(by)} entries in {each}" if isinstance(by, list | dict) else f"{each}={by}"
        for each, by in deciding.items()
    )
    return (
        f"{name}={value} is read by nothing with {because}; it counts with {live}: set that, or leave {name} "
        "out"
    )
