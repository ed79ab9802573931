"""What a resume may change: every setting of a run has one class, and the comparison with a checkpoint.

`CLASSES` is the only table; a test holds it against the dataclasses, so that a new setting cannot be without
one. Loads without torch: `llmtrain train check_only=true` shows the comparison on a login node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from llmtrain import files
from llmtrain.train.config import Determinism, TrainRoot
from llmtrain.train.settings import by_name, defaults
from llmtrain.train.unread import unread_names


class Change(Enum):
    """What it does to a run when a setting is another one after a resume."""

    safe = "safe"
    """No number of the training depends on it."""
    layout = "layout"
    """The same numbers, but for the order of sums and the rounding of the working precision."""
    trajectory = "trajectory"
    """What is learned from here on is something else."""
    forbidden = "forbidden"
    """The run does not start."""


SAFE = """
    check_only
    run.name run.folder run.intent run.init_from run.fallback run.time_limit_s run.leave_before_s
    run.max_same_failures run.plan
    data.verify data.prefetch_steps data.accept_changed
    train.eval_every_steps train.eval_rows train.process_group_timeout_s train.start_up_silence_s
    train.hang_timeout_s train.straggler_slower_than train.device_peak_tflops train.device_peak_source
    tracking.log_every_steps tracking.wandb tracking.wandb_project tracking.wandb_entity
    tracking.wandb_group tracking.wandb_job_type tracking.wandb_tags tracking.wandb_node_metrics
    tracking.wandb_init_timeout_s tracking.wandb_finish_timeout_s
    save.folder save.every_steps save.in_background save.memory_every_steps save.memory_folder
    save.exit_wait_s save.check_loss save.keep_last save.keep_every_tokens save.keep_best
    verify.ranks verify.max_ranks verify.num_steps verify.timeout_s verify.folder verify.certificate
    verify.required
    preflight.enabled preflight.idle_nodes preflight.max_clock_skew_s preflight.max_lookup_s
    preflight.min_free_gib preflight.min_free_inodes preflight.min_shared_memory_mib
    preflight.max_gpu_celsius preflight.max_gpu_used_gib preflight.max_gpu_memory_errors
    preflight.storage_mib preflight.storage_s preflight.min_storage_mb_per_s preflight.all_reduce_mib
    preflight.network_s preflight.min_bus_gb_per_s preflight.slow_ratio preflight.answer_s
"""
BY_THE_DATA_HASH = """
    data.folder data.sources data.stages data.on_exhausted data.block_rows data.locality data.packing
    data.objective.kind data.objective.fim_rate data.objective.spm_rate data.objective.mask_rate
    data.objective.span_rate data.objective.mean_span_tokens data.max_epochs
"""
"""Safe by themselves: a folder may move. Whether they change a row is known by the hash of the data, which is
compared as one setting more, `DATA_HASH`."""
LAYOUT = """
    train.micro_batch_rows train.recompute_every train.recompute train.compile_blocks train.determinism
    parallel.engine parallel.zero_stage parallel.pp_size parallel.pp_schedule parallel.cp_size
    parallel.tp_size parallel.sequence_parallel parallel.context parallel.world_size
"""
TRAJECTORY = """
    train.total_tokens train.global_batch_rows train.batch_ramp train.precision train.dropout train.grad_clip
    optimizer.peak_lr optimizer.beta1 optimizer.beta2 optimizer.eps optimizer.weight_decay optimizer.momentum
    schedule.kind schedule.warmup_tokens schedule.decay_tokens schedule.decay_shape schedule.floor_ratio
    spikes.on_spike spikes.on_non_finite spikes.loss_z spikes.grad_norm_z spikes.window_steps
    spikes.warmup_steps spikes.budget spikes.budget_steps spikes.cooldown_steps spikes.rollback_checkpoints
    spikes.rollback_steps_before
    parallel.deepspeed
"""
KEEPS_SHAPE = "set it back; weights of another shape are another run, with another run.folder"
WARM_START = "set it back, or begin anew with these weights: run.intent=warm_start in another run.folder"
FORBIDDEN = {
    **dict.fromkeys(
        (
            *("model.family", "model.vocab_size", "model.num_layers", "model.d_model", "model.num_heads"),
            *("model.num_kv_heads", "model.ffn_width", "model.head_width", "model.tie_embeddings"),
            "model.max_positions",
        ),
        KEEPS_SHAPE,
    ),
    **dict.fromkeys(("model.rope_theta", "model.norm_eps", "model.init_std"), WARM_START),
    "run.seed": WARM_START,
    "data.seq_len": f"{WARM_START}; a position counts rows of that length",
    "optimizer.kind": f"{WARM_START}; the checkpoint has the state of the other optimizer",
}
"""Setting -> what to do."""

CLASSES: dict[str, Change] = {
    **dict.fromkeys((SAFE + BY_THE_DATA_HASH).split(), Change.safe),
    **dict.fromkeys(LAYOUT.split(), Change.layout),
    **dict.fromkeys(TRAJECTORY.split(), Change.trajectory),
    **dict.fromkeys(FORBIDDEN, Change.forbidden),
}
"""Of every setting, by the name that a user types."""

DATA_HASH = "data"
"""What the hash of all that decides the rows is called among the settings."""
NUM_RANKS = "ranks"
"""And the number of ranks that were launched."""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A setting that is not what the checkpoint was trained with."""

    name: str
    old: Any
    new: Any
    change: Change
    text: str
    """A sentence for people, with what to do about it if it is forbidden."""

    def record(self) -> dict[str, Any]:
        """For the event and the checkpoint."""
        return {"name": self.name, "old": self.old, "new": self.new, "change": self.change.name}


def compare(
    cfg: TrainRoot,
    *,
    step: int,
    state: Mapping[str, Any],
    data_hash: str | None,
    num_ranks: int | None = None,
) -> list[Changed]:
    """What a resume of `cfg` changes against a checkpoint, in the order of the settings.

    A setting that the checkpoint's llmtrain did not have yet counts as its default; one that this llmtrain
    has no more is listed with the new value None.

    Args:
        step: of the checkpoint.
        state: of the checkpoint.
        data_hash: of the data as it is now; None: it could not be opened, and is not compared.
        num_ranks: None: not known here, and not compared.
    """
    before, after = by_name(state["config"]), by_name(files.plain(cfg))
    gone = {name: value for name, value in before.items() if name not in after}
    dead = unread_names(cfg)
    found = []
    for name, new in after.items():
        old = before.get(name, defaults().get(name))
        if old != new:
            change = Change.safe if name in dead else CLASSES[name]
            found.append(_changed(name, old, new, change, step))
    found += [_changed(name, old, None, Change.trajectory, step) for name, old in gone.items()]
    has_other_rows = any(each.name == "data.seq_len" for each in found)
    then = state.get("data_hash", "none: an older llmtrain wrote it")
    if data_hash is not None and data_hash != then and not has_other_rows:
        found.append(_changed_data(cfg, then, data_hash, step, state.get("position", 0)))
    if num_ranks is not None and state.get("world_size", num_ranks) != num_ranks:
        found.append(_changed(NUM_RANKS, state["world_size"], num_ranks, Change.layout, step))
    is_bitwise = cfg.train.determinism is Determinism.bitwise
    if is_bitwise and before.get("train.determinism") == Determinism.bitwise.name:
        found = [_refused_at_bitwise(each, step) if each.change is Change.layout else each for each in found]
    return found


def sentences(changes: list[Changed], *kinds: Change) -> list[str]:
    """Those of these classes, for people."""
    return [each.text for each in changes if each.change in kinds]


def _changed(name: str, old: Any, new: Any, change: Change, step: int) -> Changed:
    if change is Change.forbidden:
        text = f"{name}={new}, but step {step} was trained with {old}; a resume cannot change it: "
        text += FORBIDDEN[name]
    elif change is Change.trajectory:
        text = f"resuming with {name}={new}, which was {old}: losses from here on may differ"
    elif change is Change.layout:
        text = f"resuming with {name}={new}, which was {old}: the same numbers, in another order of sums"
    else:
        text = f"resuming with {name}={new}, which was {old}: changes no number"
    return Changed(name=name, old=old, new=new, change=change, text=text)


def _refused_at_bitwise(changed: Changed, step: int) -> Changed:
    """A change of the layout, where the last bits were promised."""
    text = (
        f"{changed.name}={changed.new}, but step {step} was trained with {changed.old}, and "
        "train.determinism=bitwise promises the same bits, which another order of sums has not: set it back, "
        "or train.determinism=reproducible"
    )
    return replace(changed, change=Change.forbidden, text=text)


def _changed_data(cfg: TrainRoot, then: str, now: str, step: int, position: int) -> Changed:
    folders = [cfg.data.folder] if cfg.data.folder else [each.folder for each in cfg.data.sources.values()]
    text = (
        f"the data in {', '.join(map(str, folders))} is not what step {step} was trained on, or it comes in "
        f"another order (hash {now[:12]}, checkpoint {then[:12]})"
    )
    if cfg.data.accept_changed:
        change = Change.trajectory
        text += f"; data.accept_changed=true: going on at row {position:,}"
    else:
        change = Change.forbidden
        text += (
            "; point data.folder at the old data, set data.accept_changed=true to go on with what is there "
            "now, or use run.intent=warm_start to begin anew with these weights"
        )
    return Changed(name=DATA_HASH, old=then, new=now, change=change, text=text)
