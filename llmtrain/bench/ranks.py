"""Start a program as a few gloo ranks on this machine, and collect what each says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

from llmtrain.errors import LLMTrainError


def run_ranks(command: Sequence[str], *, num_ranks: int, timeout_s: float) -> list[Any]:
    """The JSON that each rank printed as its last line, by rank.

    Raises:
        LLMTrainError: a rank failed; all that failed are told, for the first is often not the first in
            number.
        subprocess.TimeoutExpired: after `timeout_s`; every rank is ended.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            command,
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
        f"rank {rank} of {num_ranks} exited with {process.returncode}:\n{errors[-4000:]}"
        for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True))
        if process.returncode
    ]
    if failed:
        raise LLMTrainError("\n".join(failed))
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
