"""What this machine's cores can do at most."""

from __future__ import annotations

import os
import time

import numpy as np

GEMM_SIZES = (512, 1024, 2048)
MEASURE_S = 0.3
"""Seconds of repeats at each size; the best one counts, since everything else a machine does only slows it
down."""
LEAST_REPEATS = 3


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
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
