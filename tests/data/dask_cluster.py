"""A Dask cluster of separate processes on this machine, for tests: `with dask_cluster(folder, 2) as cluster`.

Scheduler and workers are started as a user starts them, listen on the loopback only, and are ended by their
ids. Workers can import the modules in tests/data. They have no nanny, so one that is killed is gone, as a
lost machine is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 60.0


@dataclass
class Cluster:
    address: str
    scheduler_file: Path
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@contextmanager
def dask_cluster(
    folder: Path,
    num_workers: int,
    *,
    allowed_failures: int = 10,
    worker_options: tuple[str, ...] = ("--nthreads", "1"),
) -> Iterator[Cluster]:
    """Yield when the scheduler can be reached; workers join when they are ready. Logs are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scheduler_file = folder / "scheduler.json"
    scheduler_file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures),
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",  # of 30, which a result lost with its worker costs
    }
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", "--host", "127.0.0.1", *arguments],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
        return process

    try:
        scheduler = start(
            "scheduler", "dask_scheduler", "--port", "0", "--no-dashboard",
            "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(scheduler_file),
        )  # fmt: skip
        workers = [
            start(
                f"worker-{number}", "dask_worker", "--scheduler-file", str(scheduler_file), "--no-nanny",
                "--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--local-directory", str(folder),
                "--death-timeout", str(START_S), *worker_options,
            )
            for number in range(num_workers)
        ]  # fmt: skip
        yield Cluster(_address(scheduler_file, scheduler), scheduler_file, scheduler, workers)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _address(scheduler_file: Path, scheduler: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and scheduler.poll() is None:
        try:
            return str(json.loads(scheduler_file.read_text())["address"])
        except (FileNotFoundError, ValueError):
            time.sleep(0.05)
    raise RuntimeError(f"no scheduler: {scheduler_file.with_name('scheduler.log').read_text()}")
