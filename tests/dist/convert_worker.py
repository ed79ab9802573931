"""One rank that has DeepSpeed or DCP itself read or write a checkpoint: argv is what, and a folder or two."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_worker import MODELS, OPTIMIZER, SEED, batch_of

from llmtrain.model.init import build_transformer
from llmtrain.train.optimizer import build_optimizer
from llmtrain.train.ranks import join_ranks

LR, CLIP = 0.02, 0.7
"""Not those of the checkpoint."""


def engine_of(stage: int, *, bf16: bool = False) -> Any:
    import deepspeed  # noqa: PLC0415  only where it is asked for

    from llmtrain.train.deepspeed_engine import join_deepspeed  # noqa: PLC0415

    join_deepspeed(torch.device("cpu"))
    model = build_transformer(MODELS["llama"], seed=SEED)
    model.universal_checkpoint_info = {"universal_checkpoint_version": 0.2}  # ds_to_universal asks for it
    optimizer = build_optimizer(model, OPTIMIZER)
    for group in optimizer.param_groups:
        group["lr"] = LR
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": True},
        "zero_allow_untested_optimizer": True,
    }
    if bf16:
        config |= {"bf16": {"enabled": True}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train_step(engine: Any, step: int) -> float:
    batch = batch_of(step, dist.get_rank(), dist.get_rank() + 1)
    inputs = (batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.targets_BS)
    loss = engine(*inputs) / batch.num_valid
    engine.backward(loss)
    engine.step()
    return loss.item()


def state_of(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor, whole, by `kind/name`. Every rank calls this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

    if engine.zero_optimization_stage() < 3:
        # DeepSpeed links the optimizer's state after the first group's first step, and never the second's.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[f"weight/{name}"] = safe_get_full_fp32_param(parameter).numpy().copy()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).numpy().copy()
    return found


def load_universal(folder: Path, out: Path, stage: str, precision: str) -> dict[str, Any]:
    """Into DeepSpeed's engine; its state to `out`."""
    engine = engine_of(int(stage), bf16=precision == "bf16")
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    state = state_of(engine)
    if dist.get_rank() == 0:
        np.savez(out, **state)
    wrapped = engine.optimizer.optimizer
    held = wrapped.state.values()
    return {
        "global_steps": engine.global_steps,
        "steps": sorted({float(each["step"]) for each in held if "step" in each}),
        "lr": [group["lr"] for group in engine.optimizer.param_groups],
        "weight_decay": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "clip": engine.gradient_clipping(),
        "loss": train_step(engine, 0),
    }


def save_universal(folder: Path, out: Path, stage: str) -> dict[str, Any]:
    """Two steps, saved by DeepSpeed in `folder`, made universal there; the true state to `out`."""
    engine = engine_of(int(stage))
    for step in range(2):
        train_step(engine, step)
    state = state_of(engine)
    engine.save_checkpoint(str(folder), tag="global_step2")
    dist.barrier()
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal  # noqa: PLC0415

        np.savez(out, **state)
        ds_to_universal.main(
            Namespace(
                input_folder=str(folder / "global_step2"),
                output_folder=str(folder / "global_step2_universal"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
    dist.barrier()
    return {}


def save_dcp(folder: Path, out: Path) -> dict[str, Any]:
    """Weights that are split over the ranks, as FSDP has them, and things that are no weights."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build_transformer(MODELS["llama"], seed=SEED + 1)
    whole = {name: weight.detach() for name, weight in model.named_parameters()}
    split = {name: distribute_tensor(weight.clone(), mesh, [Shard(0)]) for name, weight in whole.items()}
    dcp.save({"model": split, "data": {"position": 5, "words": "text"}}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        np.savez(out, **{f"weight/{name}": weight.numpy() for name, weight in whole.items()})
    return {}


WORK = {"load_universal": load_universal, "save_universal": save_universal, "save_dcp": save_dcp}

join_ranks(timeout_s=120)
told = WORK[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
print(json.dumps(told), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # DCP's own threads once aborted a rank that left as usual, its work done
