"""What tracking costs a step of a real run while W&B's server answers every request with 500.

The demo's model is trained on drawn tokens, with W&B and without, in turns. From metrics.jsonl: the time
between two records of steps, less the second one's `step_s`, is all that happens outside a step; writing the
record, the console and W&B are in it. The promise is about its median.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

from llmtrain.bench.own_runs import write_data
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.errors import LLMTrainError
from llmtrain.tracking.metrics import SETTLING_STEPS, read_lines

PROMISED_PERCENT = 0.5
SEQ_LEN, ROWS, VOCAB_SIZE = 512, 4, 4096


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    num_steps, num_turns = config.scaled(60, least=SETTLING_STEPS + 5), config.scaled(2)
    outside: dict[str, list[float]] = {"off": [], "online": []}
    inside: dict[str, list[float]] = {"off": [], "online": []}
    with tempfile.TemporaryDirectory() as scratch, failing_server() as server:
        data = write_data(
            Path(scratch) / "data",
            seq_lens={SEQ_LEN},
            vocab_size=VOCAB_SIZE,
            num_tokens=num_steps * ROWS * SEQ_LEN * 2,
            seed=config.seed,
        )
        for turn in range(num_turns):
            for mode in outside:
                folder = Path(scratch) / f"{mode}-{turn}"
                train(folder, data, mode=mode, num_steps=num_steps, url=server.url)
                gaps, steps = times_of(folder / "metrics.jsonl")
                outside[mode] += gaps
                inside[mode] += steps
        num_refused = server.num_requests
    if not num_refused:
        raise LLMTrainError("W&B asked the server nothing, so nothing was measured")
    step_s = {mode: statistics.median(steps) for mode, steps in inside.items()}
    return [
        Row(
            name=f"outside a step, W&B and {num_refused} answers of 500, limit: our promise",
            value=100 * statistics.median(outside["online"]) / step_s["online"],
            unit="% of a step",
            limit=PROMISED_PERCENT,
        ),
        Row(
            name="outside a step, W&B and a server that fails, rival: no W&B",
            value=1e3 * statistics.median(outside["online"]),
            unit="ms",
            rival=1e3 * statistics.median(outside["off"]),
        ),
        Row(
            name="the same, mean: what the slowest add",
            value=1e3 * statistics.fmean(outside["online"]),
            unit="ms",
            rival=1e3 * statistics.fmean(outside["off"]),
        ),
        Row(
            name="a step, W&B and a server that fails, rival: no W&B",
            value=step_s["online"],
            unit="s",
            rival=step_s["off"],
        ),
    ]


def times_of(metrics: Path) -> tuple[list[float], list[float]]:
    """Seconds outside and inside each settled step that follows another one with nothing between them."""
    outside, inside = [], []
    records = [record for record in read_lines(metrics) if record.get("what") != "wandb"]
    for before, record in pairwise(records):
        if before["kind"] == record["kind"] == "step" and before["step"] >= SETTLING_STEPS:
            outside.append(record["time"] - before["time"] - record["step_s"])
            inside.append(record["step_s"])
    return outside, inside


def train(folder: Path, data: Path, *, mode: str, num_steps: int, url: str) -> None:
    settings: dict[str, object] = {
        "run.folder": folder,
        "data.folder": data,
        "data.seq_len": SEQ_LEN,
        "data.max_epochs": 1000,
        "model.vocab_size": VOCAB_SIZE,
        "train.total_tokens": num_steps * ROWS * SEQ_LEN,
        "train.eval_every_steps": 0,
        "train.eval_rows": 1,
        "save.every_steps": 10**6,
        "schedule.warmup_tokens": 0,
        "tracking.wandb": mode,
    }
    if mode == "online":
        settings |= {"tracking.wandb_init_timeout_s": 3600, "tracking.wandb_finish_timeout_s": 1}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", "train", "+experiment=demo", *overrides],
        env={**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LLMTrainError(f"the run with tracking.wandb={mode} failed:\n{done.stderr[-2000:]}")


class FailingServer(ThreadingHTTPServer):
    """Answers 500, whatever it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refusal)
        self.num_requests = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Refusal(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, FailingServer), "made by it"
        self.server.num_requests += 1
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *words: object) -> None: ...


@contextmanager
def failing_server() -> Iterator[FailingServer]:
    with FailingServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
