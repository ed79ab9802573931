"""What the levels of train.determinism cost: a step at each, against one at `fast`.

A process a level, since libraries read their variables once; they take turns step by step, so that a machine
whose speed drifts slows all. Figures are medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.train.config import Determinism

WARM_UP = 2
"""Turns that are not counted."""


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    num_turns = WARM_UP + config.scaled(15, least=3)
    processes = {level: _start(level) for level in Determinism}
    times: dict[Determinism, list[float]] = {level: [] for level in Determinism}
    try:
        for turn in range(num_turns):
            for level, process in processes.items():
                taken_s = _step(process)
                if turn >= WARM_UP:
                    times[level].append(taken_s)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    medians = {level: statistics.median(taken) for level, taken in times.items()}
    return [
        Row(
            name=f"step, {level.name}, rival: fast",
            value=medians[level],
            rival=medians[Determinism.fast],
            unit="s",
        )
        for level in Determinism
    ]


def _start(level: Determinism) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmtrain.bench.determinism", level.name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _step(process: subprocess.Popen[str]) -> float:
    """Seconds of one, timed by the process itself."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def be_a_level(level: Determinism) -> None:
    """Take a step for every line of the standard input, and print its seconds."""
    from llmtrain.bench.train_step import engine_step  # noqa: PLC0415  torch, which only these processes need
    from llmtrain.train import determinism  # noqa: PLC0415
    from llmtrain.train.ranks import join_ranks  # noqa: PLC0415

    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what DeepSpeed prints is not for the parent
    determinism.apply(level)
    device = join_ranks(timeout_s=60)
    step = engine_step(device, stage=1)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, file=told, flush=True)


if __name__ == "__main__":
    be_a_level(Determinism[sys.argv[1]])
