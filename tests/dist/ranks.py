"""Start a script as 1 to 4 gloo ranks on this machine, and collect what rank 0 says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(script: Path, *arguments: str, num_ranks: int, timeout_s: float = 240.0) -> list[Any]:
    """Run `script` once a rank; return the JSON that each rank printed as its last line."""
    environment = os.environ | {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [
        f"rank {rank} exited with {process.returncode}:\n{errors[-4000:]}"
        for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True))
        if process.returncode
    ]
    assert not failed, "\n".join(failed)  # the first to fail is often not the first in number
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]
