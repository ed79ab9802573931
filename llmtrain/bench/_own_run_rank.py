"""What one core of this machine can do, for `bench own_runs`: run with one thread, prints JSON.

Seconds are of the CPU: other work on the machine moves them less.
"""

from __future__ import annotations

import json
import time

import numpy as np

SIZES = (512, 1024)
COPY_BYTES = 1 << 26
REPEATS = 12


def best_s(work: object, *arguments: object) -> float:
    """CPU seconds of the fastest of REPEATS calls."""
    assert callable(work), f"{work} cannot be called"
    found = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work(*arguments)
        found.append(time.process_time() - begin)
    return min(found)


def peak_flops() -> float:
    """FLOP/s of numpy's best square fp32 product."""
    rates = []
    for size in SIZES:
        left = np.ones((size, size), dtype=np.float32)
        out = np.empty_like(left)
        rates.append(2 * size**3 / best_s(lambda left=left, out=out: np.matmul(left, left, out=out)))
    return max(rates)


def copied_bytes_s() -> float:
    """Bytes a second that a copy reads and writes."""
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    return 2 * COPY_BYTES / best_s(np.copyto, target, source)


if __name__ == "__main__":
    print(json.dumps({"peak_flops": peak_flops(), "copied_bytes_s": copied_bytes_s()}))
