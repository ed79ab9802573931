"""The most this device does: dense matrix products per number format, the denominator of MFU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.planner.hardware import measure_peak

CPU_SIZES = (512, 1024, 2048)
CUDA_SIZES = (4096, 8192, 16384)
SECONDS_PER_SIZE = 0.5
LEAST_REPEATS = 3


def run(config: BenchConfig) -> list[Row]:
    """One row a format: the best of square products. On a CPU, numpy's sgemm is the rival."""
    config.only_options()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    sizes = CUDA_SIZES if on_cuda else CPU_SIZES
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    seconds = SECONDS_PER_SIZE * config.scale

    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        flops, size = best_flops(dtype, device=device, sizes=sizes, seconds=seconds)
        compare = not on_cuda and dtype is torch.float32
        rows.append(
            Row(
                name=f"{name} matrix product on {where}, best at {size}"
                + (", rival: numpy" if compare else ""),
                value=flops / 1e12,
                unit="TFLOP/s",
                rival=measure_peak()[0] / 1e12 if compare else None,
            )
        )
    return rows


def best_flops(
    dtype: torch.dtype, *, device: torch.device, sizes: tuple[int, ...], seconds: float
) -> tuple[float, int]:
    """Return the best FLOP/s of [n, n] x [n, n] over `sizes`, and its n; each n runs for `seconds`."""
    best, best_size = 0.0, sizes[0]
    for size in sizes:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(left)

        def product(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
            torch.mm(left, right, out=out)

        product()  # the first call starts threads and picks a kernel
        spent, repeats = 0.0, 0
        while spent < seconds or repeats < LEAST_REPEATS:
            took = timed(product, device=device)
            spent, repeats = spent + took, repeats + 1
            if 2 * size**3 / took > best:
                best, best_size = 2 * size**3 / took, size
    return best, best_size


def timed(work: Callable[[], None], *, device: torch.device) -> float:
    """Seconds that `work` takes, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
