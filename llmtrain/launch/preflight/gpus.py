"""The GPUs of a host, as `nvidia-smi` tells of them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import dataclass

FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same bits, by their name since driver 535 and before."""
THROTTLED = {
    0x08: "slowed down by hardware",
    0x20: "too hot, slowed down by software",
    0x40: "too hot, slowed down by hardware",
    0x80: "slowed down by the power supply",
}
"""Bits of nvmlClocksEventReasons that a healthy GPU does not show, in NVIDIA's NVML reference. Idle clocks, a
power cap and clocks that somebody set are not among them."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """None: this GPU or driver does not tell."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_bytes: int | None
    used_bytes: int | None
    celsius: int | None
    uncorrected_errors: int | None
    """Of memory, since the driver was loaded."""
    repair_is_pending: bool
    """Rows of memory are replaced at the next reset."""
    repair_failed: bool
    throttled: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Gpus:
    gpus: tuple[Gpu, ...]
    missing: str | None = None
    """Why nothing is known."""
    is_broken: bool = False
    """Whether nvidia-smi is there, and fails."""


def list_gpus(*, limit_s: float) -> Gpus:
    """All that nvidia-smi shows: in a container or a job, those that it was given."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Gpus(gpus=(), missing="there is no nvidia-smi on PATH")
    said = ""
    for fields in ((*FIELDS, REASONS[0]), (*FIELDS, REASONS[1]), FIELDS[:8]):
        command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return Gpus(gpus=(), missing=f"nvidia-smi gave no answer in {limit_s:g} s", is_broken=True)
        except OSError as error:
            return Gpus(gpus=(), missing=f"nvidia-smi: {error.strerror}", is_broken=True)
        if done.returncode == 0:
            rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
            return Gpus(gpus=tuple(_gpu(dict(zip(fields, row, strict=True))) for row in rows if row))
        said = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        if "not a valid field" not in said:
            break
    return Gpus(gpus=(), missing=f"nvidia-smi fails: {' '.join(said.split())}", is_broken=True)


def _gpu(told: dict[str, str]) -> Gpu:
    memory, used = _number(told["memory.total"]), _number(told["memory.used"])
    active = next((_number(told[name]) for name in REASONS if name in told), None) or 0
    return Gpu(
        index=int(told["index"]),
        uuid=told["uuid"],
        name=told["name"],
        driver=told["driver_version"],
        memory_bytes=None if memory is None else memory * MIB,
        used_bytes=None if used is None else used * MIB,
        celsius=_number(told["temperature.gpu"]),
        uncorrected_errors=_number(told["ecc.errors.uncorrected.volatile.total"]),
        repair_is_pending=told.get("remapped_rows.pending") in ("Yes", "1"),
        repair_failed=told.get("remapped_rows.failure") in ("Yes", "1"),
        throttled=tuple(reason for bit, reason in THROTTLED.items() if active & bit),
    )


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None
