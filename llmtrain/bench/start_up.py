"""Seconds from `llmtrain train` to the end of step 1, and whose they are.

Each run is a process of its own: the demo's model on the demo's data (options.data names another folder).
The floor is what Python needs to import torch and DeepSpeed, measured by processes that do only that, in
turns with the runs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.errors import LLMTrainError
from llmtrain.tracking.metrics import read_metrics

PROMISED_S = 15.0


def run(config: BenchConfig) -> list[Row]:
    config.only_options("data")
    data = Path(config.option("data", "data/python_docs")).absolute()
    turns = config.scaled(3)
    imports = "import torch, deepspeed, deepspeed.runtime.zero.muon.muon_optimizer"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds: dict[str, list[float]] = {}
        floors = []
        for turn in range(turns):
            floors.append(seconds_of([sys.executable, "-c", imports], folder))
            command = [
                *(sys.executable, "-m", "llmtrain.cli.main", "train", "+experiment=demo"),
                *(f"run.folder={folder / str(turn)}", f"data.folder={data}", "tracking.wandb=off"),
                *("train.total_tokens=4096", "schedule.warmup_tokens=0", "train.eval_rows=1"),
            ]
            seconds_of(command, folder)
            for part, spent in parts_of(folder / str(turn)).items():
                seconds.setdefault(part, []).append(spent)
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    total = medians.pop("total")
    floor = statistics.median(floors)
    return [
        Row(name="to the end of step 1, limit: our promise", value=total, unit="s", limit=PROMISED_S),
        Row(name="to the end of step 1, rival: import torch, deepspeed", value=total, unit="s", rival=floor),
        *(Row(name=f"of it: {part}", value=spent, unit="s", limit=total) for part, spent in medians.items()),
    ]


def seconds_of(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LLMTrainError(f"{' '.join(command[:5])} ... failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def parts_of(run_folder: Path) -> dict[str, float]:
    """What the run itself recorded at its first step."""
    for record in read_metrics(run_folder / "metrics.jsonl"):
        if record.get("what") == "first_step":
            parts: dict[str, float] = record["start_up_s"]
            return parts
    raise LLMTrainError(f"{run_folder / 'metrics.jsonl'} tells of no first step")
