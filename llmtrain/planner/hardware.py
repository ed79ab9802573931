"""What this machine's cores can do: at most, and each rank's share when several run at once.

As a program (`python -m llmtrain.planner.hardware`) it is one of those ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

GEMM_SIZES = (512, 1024, 2048)
MEASURE_S = 0.3
"""Seconds of repeats at each size; the best one counts, since everything else a machine does only slows it
down."""
LEAST_REPEATS = 3
COPY_BYTES = 1 << 26
SETTLE_S = 0.1
"""Of a rank's work before it counts: the others have begun by then."""
RANKS_TIMEOUT_S = 120.0
THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class RankSpeed:
    """Of one rank while all of them work; medians, for a run goes on for longer than the best moment."""

    flops: float
    """FLOP/s of fp32 matrix products."""
    copied_bytes_s: float
    """Read and written by copies that no cache holds."""
    source: str


def measure_ranks(num_ranks: int, *, threads_per_rank: int) -> RankSpeed:
    """Let `num_ranks` processes work at once: they share caches, memory bandwidth and clock. About a second.

    Raises:
        OSError: no process can be started; subprocess.TimeoutExpired: one does not end.
    """
    environment = os.environ | dict.fromkeys(THREAD_SETTINGS, str(threads_per_rank))
    command = [sys.executable, "-m", "llmtrain.planner.hardware", str(MEASURE_S), *map(str, GEMM_SIZES)]
    ranks = [
        subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(num_ranks)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None, "opened with a pipe"
            rank.stdout.readline()  # its imports are done
        for rank in ranks:
            assert rank.stdin is not None, "opened with a pipe"
            rank.stdin.write("go\n")
            rank.stdin.flush()
        told = [json.loads(rank.communicate(timeout=RANKS_TIMEOUT_S)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return RankSpeed(
        flops=float(np.mean([each["flops"] for each in told])),
        copied_bytes_s=float(np.mean([each["copied_bytes_s"] for each in told])),
        source=f"measured here: median numpy sgemm and copy of {num_ranks} processes at once, "
        f"{threads_per_rank} threads each",
    )


def be_a_rank(measure_s: float, sizes: list[int]) -> dict[str, float]:
    """What `measure_ranks` starts: the median rate of the best size, and of copies."""
    rates = []
    for size in sizes:
        left = np.ones((size, size), dtype=np.float32)
        out = np.empty_like(left)
        rates.append(2 * size**3 / _median_s(partial(np.matmul, left, left, out=out), measure_s))
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    copied = 2 * COPY_BYTES / _median_s(partial(np.copyto, target, source), measure_s)
    return {"flops": max(rates), "copied_bytes_s": copied}


def _median_s(work: Callable[[], object], measure_s: float) -> float:
    """Seconds of a call, of those within `measure_s` after it has settled."""
    took: list[float] = []
    began = time.perf_counter()
    while len(took) < LEAST_REPEATS or time.perf_counter() - began < measure_s + SETTLE_S:
        begin = time.perf_counter()
        work()
        if time.perf_counter() - began > SETTLE_S or measure_s < SETTLE_S:
            took.append(time.perf_counter() - begin)
    return float(np.median(took))


def measure_peak() -> tuple[float, str]:
    """Return the best FLOP/s of an fp32 matrix product in numpy, and the sentence that says how it was
    measured."""
    best_flops, best_size, num_products = 0.0, 0, 0
    for size in GEMM_SIZES:
        generator = np.random.Generator(np.random.Philox(key=size))
        left = generator.standard_normal((size, size), dtype=np.float32)
        right = generator.standard_normal((size, size), dtype=np.float32)
        out = np.empty_like(left)
        np.matmul(left, right, out=out)  # the first call starts the threads
        spent, repeats = 0.0, 0
        while spent < MEASURE_S or repeats < LEAST_REPEATS:
            begin = time.perf_counter()
            np.matmul(left, right, out=out)
            took = time.perf_counter() - begin
            spent, repeats = spent + took, repeats + 1
            if 2 * size**3 / took > best_flops:
                best_flops, best_size = 2 * size**3 / took, size
        num_products += repeats
    return best_flops, (
        f"measured here: best of {num_products} numpy sgemm of {', '.join(map(str, GEMM_SIZES))} square "
        f"(best at {best_size}), {num_threads()} threads"
    )


def num_threads() -> int:
    """Threads that numpy's BLAS uses: what the environment says, else the cores this process may run on."""
    for name in THREAD_SETTINGS:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(be_a_rank(float(sys.argv[1]), [int(size) for size in sys.argv[2:]])))
