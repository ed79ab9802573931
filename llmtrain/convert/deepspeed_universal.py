"""DeepSpeed's universal checkpoints, as ds_to_universal of 0.19.8 writes and `load_universal` reads them.

    latest_universal                       the name of the folder below
    global_step120/
        mp_rank_00_model_states.pt         counters, read by an engine at ZeRO 1 and 2
        zero_pp_rank_0_mp_rank_00_model_states.pt   the same, read at ZeRO 3
        zero/optimizer_state.pt            what the optimizer has but once
        zero/<parameter>/fp32.pt           {"param": tensor, "cat_dim": 0}; bare and flat from ZeRO 3
        zero/<parameter>/exp_avg.pt, exp_avg_sq.pt, step.pt

DeepSpeed itself is not needed. What it is not told here stays as it is configured: it would take the learning
rate, weight decay and clipping of a checkpoint in place of its own, and at ZeRO 3 the first group's for all.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from llmtrain.checkpoint.rewrite import Tensor
from llmtrain.convert.foreign import Foreign, Found, Key, Read, numpy_type
from llmtrain.errors import CheckpointError, ConfigError

DS_VERSION = "0.19.8"
"""Whose layout this is; DeepSpeed asks."""
LATEST = "latest_universal"
FP32 = "fp32"
"""What DeepSpeed calls the kind `weight`."""
PARAM, CAT_DIM = "param", "cat_dim"


def write(folder: Path, tensors: list[Tensor], read: Read, *, step: int, num_updates: int) -> None:
    """Write `tensors` below `folder`, one at a time.

    Raises:
        CheckpointError: a parameter whose name is no name of a folder.
        OSError: the disk.
    """
    tag = f"global_step{step}"
    zero = folder / tag / "zero"
    for tensor in tensors:
        if "/" in tensor.name or tensor.name in ("", ".", ".."):
            raise CheckpointError(f"{tensor.kind} {tensor.name!r} cannot be the name of a folder")
        place = zero / tensor.name
        place.mkdir(parents=True, exist_ok=True)
        name = FP32 if tensor.kind == "weight" else tensor.kind
        # Every weight of ours is split along its first dimension.
        _save(place / f"{name}.pt", {PARAM: torch.from_numpy(read(tensor)), CAT_DIM: 0})
        if tensor.kind != "weight":
            _save(place / "step.pt", torch.tensor(float(num_updates)))
    # As many groups as there could be: DeepSpeed restores only so many as it finds here.
    num_groups = len({tensor.name for tensor in tensors})
    of_zero_3 = {"state": {0: {"step": torch.tensor(float(num_updates))}}, "param_groups": [{}]}
    optimizer_state = {
        "ds_version": DS_VERSION,
        "param_groups": [{} for _ in range(num_groups)],
        "optimizer_state_dict": of_zero_3,
    }
    _save(zero / "optimizer_state.pt", optimizer_state)
    counters: dict[str, Any] = {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": step,
        "skipped_steps": max(0, step - num_updates),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": DS_VERSION,
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(folder / tag / name, counters)
    (folder / LATEST).write_text(tag)


def _save(path: Path, value: Any) -> None:
    with open(path, "wb") as handle:
        torch.save(value, handle)
        handle.flush()
        os.fsync(handle.fileno())


def open_foreign(path: Path, *, prefix: str | None, trust_pickle: bool) -> Foreign:
    """What is in the folder with latest_universal, or in the one that this names.

    Raises:
        ConfigError: no such checkpoint there, or a setting that has no effect.
        CheckpointError: a file that cannot be read, or holds more than numbers and is not trusted.
    """
    if prefix is not None:
        raise ConfigError(
            f"prefix={prefix!r} is of torch_dcp; in deepspeed_universal a folder is a parameter"
        )
    folder = path
    if (path / LATEST).is_file():
        folder = path / (path / LATEST).read_text().strip()
    zero = folder / "zero"
    if not zero.is_dir():
        raise ConfigError(
            f"path={path} is no universal checkpoint: neither {LATEST} nor zero/ is there; first run "
            "DeepSpeed's ds_to_universal"
        )
    tensors: dict[Key, Found] = {}
    places: dict[Key, Path] = {}
    for parameter in sorted(each for each in zero.iterdir() if each.is_dir()):
        for file in sorted(parameter.glob("*.pt")):
            if file.stem != "step":
                key = ("weight" if file.stem == FP32 else file.stem, parameter.name)
                values, is_flat = _load(file, trust_pickle=trust_pickle)
                tensors[key] = Found(tuple(values.shape), numpy_type(str(file), values.dtype), is_flat)
                places[key] = file

    def fill(key: Key, into: NDArray[Any]) -> None:
        values, _ = _load(places[key], trust_pickle=trust_pickle)
        if values.numel() != into.size:
            raise CheckpointError(f"{places[key]} has changed while it was read")
        torch.from_numpy(into).copy_(values.reshape(-1))  # bf16 is widened on the way

    return Foreign(tensors, fill)


def _load(path: Path, *, trust_pickle: bool) -> tuple[torch.Tensor, bool]:
    """The tensor of a file, whose numbers are read when they are used, and whether it has lost its shape."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than numbers, and reading it could run code of its author; if you trust it, "
            f"set trust_pickle=true ({str(error).strip().splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    values = found[PARAM] if isinstance(found, dict) and PARAM in found else found
    if not isinstance(values, torch.Tensor):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a tensor")
    return values.detach(), not isinstance(found, dict)  # weights were saved as what gradients are taken of
