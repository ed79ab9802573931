"""Start a script as 1 to 4 gloo ranks, and collect what they say."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import forked

from llmtrain.bench.ranks import free_port
from llmtrain.errors import LLMTrainError

__all__ = ["REPOSITORY", "free_port", "run_ranks"]

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(script: Path, *arguments: str, num_ranks: int, timeout_s: float = 240.0) -> list[Any]:
    """The JSON that each rank printed as its last line.

    Raises:
        LLMTrainError: a rank failed, or was not done after `timeout_s`; all that did are told. None is left.
    """
    environment = {
        **os.environ,
        **forked.TORCH.environment,
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name, f"{rank}.out") for rank in range(num_ranks)]
        errors = [Path(name, f"{rank}.err") for rank in range(num_ranks)]
        processes = [
            forked.TORCH.start(
                forked.be_script,
                *(str(script), list(arguments), outputs[rank], errors[rank]),
                environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(num_ranks)
        ]
        end = time.monotonic() + timeout_s
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            failed = [
                f"rank {rank} of {num_ranks} exited with {process.exitcode}:\n{errors[rank].read_text()[-4000:]}"
                for rank, process in enumerate(processes)
                if process.exitcode != 0
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()
        if failed:
            raise LLMTrainError("\n".join(failed))
        return [json.loads(output.read_text().splitlines()[-1]) for output in outputs]
