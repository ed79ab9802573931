"""One rank that looks at what Accelerate and FSDP2 do below the engine, and prints it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_worker import MODELS, OPTIMIZER, SEED, batch_of
from torch.profiler import ProfilerActivity, profile

from llmtrain.checkpoint.format import FlatSource
from llmtrain.model.config import ModelConfig
from llmtrain.parallel.config import EngineKind, ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.accelerate_engine import AccelerateEngine
from llmtrain.train.config import Precision, TrainConfig
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks

NARROW = ModelConfig(vocab_size=96, num_layers=2, d_model=8, num_heads=4, num_kv_heads=2, ffn_width=20)
"""On 3 ranks no weight is split evenly, and the last rank has none of the keys' and values' 4 rows."""


def open_engine(
    zero_stage: int, *, model: ModelConfig = NARROW, precision: Precision = Precision.fp32, seed: int = SEED
) -> AccelerateEngine:
    groups = build_groups(Topology.of_world(dist.get_world_size(), pp_size=1, cp_size=1, tp_size=1))
    parallel = ParallelConfig(engine=EngineKind.accelerate, zero_stage=zero_stage)
    placement = place(model, parallel, groups, seq_len=24)
    train = TrainConfig(total_tokens=1, global_batch_rows=1, micro_batch_rows=1, precision=precision)
    engine = AccelerateEngine(placement, device=torch.device("cpu"), train=train, optimizer=OPTIMIZER)
    engine.load(fresh_weights(placement, seed=seed))
    return engine


def train_step(engine: AccelerateEngine, step: int, *, num_micro_batches: int = 1) -> tuple[float, float]:
    """Loss and norm of a step of the same row again and again, another one on each rank."""
    batch = batch_of(step, dist.get_rank(), dist.get_rank() + 1)
    result = engine.train_step([batch] * num_micro_batches, lr=OPTIMIZER.peak_lr)
    return result.loss, result.grad_norm


def whole_state(engine: AccelerateEngine) -> dict[tuple[str, str], Any]:
    """(kind, name) -> every element, put together from all ranks' pieces."""
    gathered: list[Any] = [None] * dist.get_world_size()
    mine = [(piece.kind, piece.name, piece.start, piece.values.copy()) for piece in engine.pieces()]
    dist.all_gather_object(gathered, mine)
    found: dict[tuple[str, str], Any] = {}
    for kind, name, start, values in (piece for pieces in gathered for piece in pieces):
        numel = int(np.prod(engine.placement.shapes[name]))
        whole = found.setdefault((kind, name), np.full(numel, np.nan, np.float32))
        assert np.isnan(whole[start : start + len(values)]).all(), f"{kind} {name} is owned twice at {start}"
        whole[start : start + len(values)] = values
    assert not any(np.isnan(whole).any() for whole in found.values()), "an element is owned by nobody"
    return found


def source_of(state: dict[tuple[str, str], Any]) -> FlatSource:
    def source(kind: str, name: str, start: int, into: Any) -> None:
        into[:] = state[kind, name][start : start + into.size]

    return source


def goes_on_elsewhere() -> dict[str, Any]:
    """Losses of 5 steps, the engine changed after the third: {"2 0": begun split, gone on with DDP}."""
    told = {}
    for first, second in ((2, 2), (2, 0), (0, 3), (3, 2)):
        engine = open_engine(first)
        losses = [train_step(engine, step)[0] for step in range(3)]
        state = whole_state(engine)
        engine = open_engine(second, seed=SEED + 1)
        engine.load(source_of(state), num_optimizer_steps=3)
        after = whole_state(engine)
        assert state.keys() == after.keys()
        assert all((state[at] == after[at]).all() for at in state), "a load and a save changed a number"
        losses += [train_step(engine, step)[0] for step in (3, 4)]
        told[f"{first} {second}"] = losses
    return told


def rows_held() -> dict[str, Any]:
    """Rows of two weights on this rank, and whether any rank has memory for more than its share."""
    engine = open_engine(3)
    parts = {name: weight.to_local() for name, weight in engine._parameters.items()}
    share = {
        name: -(-weight.shape[0] // dist.get_world_size()) for name, weight in engine._parameters.items()
    }
    most = {name: share[name] * weight[:1].numel() * 4 for name, weight in engine._parameters.items()}
    return {
        "keys": parts["blocks.0.attention.wk.weight"].shape[0],
        "embedding": parts["embedding.weight"].shape[0],
        "whole": [name for name, part in parts.items() if part.untyped_storage().nbytes() > most[name]],
    }


def collectives() -> dict[str, dict[str, int]]:
    """Calls of each kind in a step of 1 and of 3 micro batches."""
    told = {}
    for stage in (0, 2, 3):
        engine = open_engine(stage)
        for _ in range(2):
            train_step(engine, 0)  # DDP arranges its buckets after the first step
        for num in (1, 3):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                train_step(engine, 0, num_micro_batches=num)
            names = [event.name for event in seen.events() if event.name.startswith("c10d::")]
            told[f"{stage} {num}"] = dict(Counter(name.removeprefix("c10d::") for name in names))
    return told


def norms_over_micro_batches() -> dict[str, list[float]]:
    """Gradient norms in bf16 of 1 and of 16 equal micro batches: the same gradient, if sums are wide."""
    told = {}
    for stage in (0, 2):
        norms = []
        for num in (1, 16):
            engine = open_engine(stage, precision=Precision.bf16)
            norms.append(train_step(engine, 0, num_micro_batches=num)[1])
        told[str(stage)] = norms
    return told


def held_out_after_a_load() -> dict[str, list[float]]:
    """Loss sums of two sets of weights, each in an engine of its own and both in one."""
    told = {}
    batch = batch_of(9, 0, 1)
    for stage in (0, 2, 3):
        fresh = [open_engine(stage, seed=seed).held_out_sums(iter([batch]))[0] for seed in (1, 2)]
        engine = open_engine(stage, seed=1)
        sums = [engine.held_out_sums(iter([batch]))[0]]
        engine.load(fresh_weights(engine.placement, seed=2))
        sums.append(engine.held_out_sums(iter([batch]))[0])
        told[str(stage)] = fresh + sums
    return told


def padding_alone() -> list[float]:
    """Loss and norm of a step without a target."""
    batch = batch_of(0, 0, 1)
    empty = replace(batch, targets_BS=torch.full_like(batch.targets_BS, -100), num_valid=0)
    result = open_engine(2).train_step([empty], lr=0.1)
    return [result.loss, result.grad_norm]


def accelerate_itself() -> dict[str, Any]:
    """What this package works around."""
    from accelerate import Accelerator  # noqa: PLC0415  the engine must have imported all it needs by itself
    from accelerate.state import AcceleratorState  # noqa: PLC0415
    from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: PLC0415

    from llmtrain.model.transformer import Transformer  # noqa: PLC0415
    from llmtrain.train.optimizer import build_optimizer  # noqa: PLC0415

    AcceleratorState._reset_state(reset_partial_state=True)
    before = dict(os.environ)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    hears = accelerator.is_fsdp2
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = "FSDP", plugin
    with torch.device("meta"):
        model = Transformer(MODELS["llama"])
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    updated = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    plugin.set_mixed_precision("bf16")
    policy = plugin.mixed_precision_policy
    return {
        "hears of FSDP on a CPU": hears,
        "weights": len(list(model.parameters())),
        "weights in the optimizer": len(updated),
        "reduces in": str(policy.reduce_dtype),
        "loss in": str(policy.output_dtype),
        "writes": sorted(name for name in os.environ if os.environ[name] != before.get(name)),
    }


if __name__ == "__main__":
    join_ranks(timeout_s=120)
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` does
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
    before = dict(os.environ)
    threads = torch.get_num_threads()
    looks: list[Callable[[], Any]] = [
        goes_on_elsewhere,
        rows_held,
        collectives,
        norms_over_micro_batches,
        held_out_after_a_load,
        padding_alone,
    ]
    told = {look.__name__: look() for look in looks}
    told["environment_changed"] = [name for name, value in os.environ.items() if before.get(name) != value]
    told["environment_changed"] += before.keys() - os.environ.keys()
    told["threads_changed"] = torch.get_num_threads() != threads
    told["deepspeed_imported"] = "deepspeed" in sys.modules
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND"):
        del os.environ[name]
    told["accelerate_itself"] = accelerate_itself()
    print(json.dumps(told))
    dist.destroy_process_group()
