"""How far a run repeats itself: what each level of train.determinism sets, and what it refuses.

`apply` comes before the ranks join and before anything computes: CUDA, cuBLAS, NCCL and MKL read their
variables once. What decides the last bits beside the settings is `facts`: kept in run.json and in every
checkpoint, and at `bitwise` a resume elsewhere is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.errors import ConfigError
from llmtrain.tracking.facts import cpu_name, package_versions
from llmtrain.train.config import Determinism

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_FIXED = (":4096:8", ":16:8")
"""Workspaces of a fixed size a stream, with which cuBLAS gives the same bits (cuBLAS documentation, section
2.1.4, results reproducibility)."""

REPRODUCIBLE = {CUBLAS_WORKSPACE: CUBLAS_FIXED[0]}
BITWISE = {
    **REPRODUCIBLE,
    # By itself NCCL picks an algorithm by a model of the network, and adds in the switches where it can.
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_COLLNET_ENABLE": "0",
    # Fixed cache sizes, deterministic reductions, static scheduling (oneMKL developer guide, code branches).
    "MKL_CBWR": "AUTO",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
}
"""Variables that a level sets where the user has not; what then holds is in `facts`."""
RECORDED = (
    *BITWISE,
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
    "ATEN_CPU_CAPABILITY",
)
"""Variables that change results, whoever set them."""

NO_DETERMINISTIC_FORM = re.compile(r"(\S+) does not have a deterministic implementation")
"""torch 2.13's words, in `Context::alertNotDeterministic`; held by a test."""


def apply(level: Determinism) -> None:
    """Set what `level` promises, for the whole process.

    Raises:
        ConfigError: the environment asks for what the level cannot have.
    """
    if level is Determinism.fast:
        return
    cuda: Any = torch.cuda  # untyped
    assert not cuda.is_initialized(), "cuBLAS has read its variables already"
    assert not dist.is_initialized(), "NCCL has read its variables already"
    for name, value in (BITWISE if level is Determinism.bitwise else REPRODUCIBLE).items():
        os.environ.setdefault(name, value)
    if os.environ[CUBLAS_WORKSPACE] not in CUBLAS_FIXED:
        raise ConfigError(
            f"{CUBLAS_WORKSPACE}={os.environ[CUBLAS_WORKSPACE]} with train.determinism={level.name}: set it "
            f"to {' or '.join(CUBLAS_FIXED)}, or unset it"
        )
    torch.use_deterministic_algorithms(True)
    # NaN into every torch.empty: what reads memory before it is written shows, at the cost of the writing.
    fills: Any = torch.utils.deterministic
    fills.fill_uninitialized_memory = level is Determinism.bitwise
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def facts(level: Determinism, device: torch.device) -> dict[str, Any]:
    """What decides the last bits on this rank beside the settings: machine, threads, versions, variables."""
    is_cuda = device.type == "cuda"
    cudnn: Any = torch.backends.cudnn  # untyped, as is nccl
    nccl: Any = torch.cuda.nccl
    return {
        "level": level.name,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": cudnn.version() if is_cuda else None,
        "nccl": ".".join(map(str, nccl.version())) if is_cuda else None,
        "versions": {
            name: version
            for name, version in package_versions().items()
            if name in ("torch", "deepspeed", "numpy")
        },
        "environment": {name: os.environ[name] for name in RECORDED if name in os.environ},
    }


def refuse_unlike(
    level: Determinism, ranks: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None
) -> None:
    """At `bitwise`: every rank must be as the first, and a resume as the checkpoint says the run was.

    Args:
        ranks: `facts` of each.
        before: of the checkpoint; None: fresh weights, or an older llmtrain. Other levels promised nothing.

    Raises:
        ConfigError: they differ; everything is told.
    """
    if level is not Determinism.bitwise:
        return
    way_out = "train.determinism=reproducible goes on without the promise"
    for rank, other in enumerate(ranks):
        if found := _differences(ranks[0], other):
            raise ConfigError(
                f"train.determinism=bitwise, and rank {rank} is not like rank 0: {', '.join(found)}; take "
                f"hosts that are alike, or {way_out}"
            )
    if before is not None and before["level"] == level.name and (found := _differences(before, ranks[0])):
        raise ConfigError(
            f"train.determinism=bitwise, and this is not where the checkpoint was made: {', '.join(found)}; "
            f"set it back, or {way_out}"
        )


@contextmanager
def named_errors(level: Determinism) -> Iterator[None]:
    """Around the steps: an operation without a deterministic form is an error that names it.

    Raises:
        ConfigError: one was called.
    """
    try:
        yield
    except RuntimeError as error:
        match = NO_DETERMINISTIC_FORM.search(str(error))
        if match is None:
            raise
        raise ConfigError(
            f"train.determinism={level.name}: {match[1]} has no deterministic form; leave out the setting "
            "that needs it, or set train.determinism=fast"
        ) from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """name old -> new, of every fact and every variable or version inside one."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after)
        elif before != after:
            found.append(f"{name} {before} -> {after}")
    return found
