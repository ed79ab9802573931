"""What one step pays for being recorded: metrics.jsonl, the console's line, W&B."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.console import Console
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.wandb import WandbSink

STEP_LIMIT_MS = 1.0
"""W&B may never cost a step more; the promise of `WandbSink.relay`."""
FIELDS = {
    "tokens": 9_830_400,
    "position": 19_200,
    "loss": 2.8763291,
    "grad_norm": 0.38127,
    "lr": 1.5e-4,
    "tokens_per_s": 37_402.1,
    "step_s": 0.43805,
    "data_wait_s": 0.00071,
    "mem_gib": 1.39,
    "mfu": 0.309,
    "num_valid": 16_103,
}


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    num_steps = config.scaled(2000)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with MetricsFile(folder / "metrics.jsonl", attempt=1) as metrics:
            rows += _rows(
                "metrics.jsonl, one line", num_steps, lambda step: metrics.write("step", step, **FIELDS)
            )
        with Console(num_steps, stream=io.StringIO(), is_terminal=True) as console:
            rows += _rows(
                "console, live line", num_steps, lambda step: console.step({"step": step, **FIELDS})
            )
        sink = WandbSink(
            TrackingConfig(wandb=WandbMode.offline),
            folder / "metrics.jsonl",
            attempt=1,
            run_name="bench",
            run_config={},
            report=lambda text: None,
        )
        rows += _rows("W&B offline, looking after its process", num_steps, lambda step: sink.relay())
        begin = time.perf_counter()
        sink.finish()
        rows.append(Row(name="W&B offline, finish", value=time.perf_counter() - begin, unit="s"))
    return rows


def _rows(name: str, num_steps: int, record: Callable[[int], object]) -> list[Row]:
    """The median and the 99th percentile of one call. The very worst is other work of the machine."""
    times_ms = []
    for step in range(1, num_steps + 1):
        begin = time.perf_counter()
        record(step)
        times_ms.append((time.perf_counter() - begin) * 1e3)
    return [
        Row(name=f"{name}, median", value=float(np.median(times_ms)), unit="ms", limit=STEP_LIMIT_MS),
        Row(
            name=f"{name}, 99th of 100",
            value=float(np.quantile(times_ms, 0.99)),
            unit="ms",
            limit=STEP_LIMIT_MS,
        ),
    ]
