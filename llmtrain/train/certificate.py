"""What `llmtrain verify` found, on disk, and whether it speaks of a given config. Loads without torch.

A certificate belongs to everything that decides whether a layout computes the right numbers: the model's
shape, the layout, the batch, the optimizer, versions, and the source of the rooms that compute. It does not
belong to learning rates, seeds, data or lengths.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmtrain
from llmtrain import files
from llmtrain.errors import DataError
from llmtrain.train.config import TrainRoot

CERTIFICATE_NAME = "certificate.json"
FORMAT_VERSION = 1
PACKAGES = ("llmtrain", "torch", "deepspeed", "accelerate", "numpy")
ROOMS = ("checkpoint", "model", "parallel", "train")
"""Whose source enters: a certificate of other code says nothing."""
MOST_LISTED = 4
"""Settings that a message names before it only counts the rest."""
FREE = {
    "model": {"init_std"},
    "parallel": {"world_size"},  # `ranks` says it
    "optimizer": {"peak_lr"},
    "train": {
        "total_tokens",
        "eval_every_steps",
        "eval_rows",
        "process_group_timeout_s",
        "device_peak_tflops",
        "device_peak_source",
    },
}
"""Settings of these parts that a certificate does not belong to; a new one does until it is listed here."""


def deciding(cfg: TrainRoot, num_ranks: int) -> dict[str, Any]:
    """All settings that a certificate belongs to."""
    parts = {
        part: {name: value for name, value in files.plain(getattr(cfg, part)).items() if name not in free}
        for part, free in FREE.items()
    }
    return {"ranks": num_ranks, **parts, "data": {"seq_len": cfg.data.seq_len}}


@cache
def versions() -> dict[str, str]:
    """Of everything that computes, our own source included."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"source": _source_hash()}


def _source_hash() -> str:
    root = Path(llmtrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def belongs_to(cfg: TrainRoot, num_ranks: int) -> dict[str, Any]:
    """What the hash of a certificate is taken of."""
    return {**deciding(cfg, num_ranks), "versions": versions()}


def certificate_path(cfg: TrainRoot) -> Path:
    """The one that `train` looks at."""
    if cfg.verify.certificate is not None:
        return Path(cfg.verify.certificate)
    return Path(cfg.run.folder) / CERTIFICATE_NAME


def missing(cfg: TrainRoot, num_ranks: int) -> str | None:
    """Why there is no passing certificate for `cfg` on `num_ranks` ranks; None when there is one.

    Raises:
        DataError: the file is there, and is no certificate.
    """
    path = certificate_path(cfg)
    if not path.is_file():
        return f"{path} does not exist"
    told = read_certificate(path)
    mine = belongs_to(cfg, num_ranks)
    if told["config_hash"] != files.hash_json(mine):
        changed = differences(told["config"], mine)
        listed = [f"{name}={after} (there {before})" for name, (before, after) in changed.items()]
        more = f" and {len(listed) - MOST_LISTED} more" if len(listed) > MOST_LISTED else ""
        return f"{path} is of another config: {', '.join(listed[:MOST_LISTED])}{more}"
    return None if told["passed"] else f"{path} says that the check failed"


def read_certificate(path: Path) -> dict[str, Any]:
    try:
        told = files.read_json(path)
        fits = told["format_version"] == FORMAT_VERSION and {"config_hash", "config", "passed"} <= told.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as a certificate: {error!r}; run `llmtrain verify`"
        ) from error
    if not fits:
        raise DataError(f"{path} is not a certificate of this llmtrain; run `llmtrain verify` again")
    assert isinstance(told, dict)
    return told


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every setting that differs."""
    before, after = files.flatten(old), files.flatten(new)
    names = dict.fromkeys([*after, *before])
    return {
        name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    }
