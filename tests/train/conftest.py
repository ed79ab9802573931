"""Runs of `llmtrain train` without paying for torch's and DeepSpeed's import each time: see `forked`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import pytest
from data_folder import Finished, train_arguments, write_data_folder
from ranks import free_port


@dataclass
class Run:
    """A started run: one process a rank."""

    processes: list[Any]
    outputs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Exit status of rank 0, once every rank has left."""
        for process in self.processes:
            process.join(timeout_s)
            assert not process.is_alive(), f"still running after {timeout_s} s:\n{self.text()}"
        status: int = self.processes[0].exitcode
        return status

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def text(self) -> str:
        return "\n".join(output.read_text() for output in self.outputs if output.exists())


class Launcher:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._runs: list[Run] = []

    def close(self) -> None:
        """Leave no process behind, whatever a test did."""
        for run in self._runs:
            run.kill()

    def start(
        self,
        arguments: Sequence[str],
        *,
        num_ranks: int = 1,
        own: Callable[[int], Sequence[str]] = lambda rank: (),
        **environment: str,
    ) -> Run:
        """`own`: more arguments, of a rank alone."""
        self._count += 1
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        if num_ranks > 1:
            shared |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": str(free_port())}
        run = Run([], [])
        self._runs.append(run)
        for rank in range(num_ranks):
            number = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            output = self._folder / f"{self._count}-{rank}.txt"
            place = (output, output, shared | number | environment)
            run.processes.append(forked.TORCH.start(forked.be_verb, [*arguments, *own(rank)], *place))
            run.outputs.append(output)
        return run

    def run(self, arguments: Sequence[str], *, num_ranks: int = 1, **environment: str) -> tuple[int, str]:
        """Exit status of rank 0, and everything that all ranks printed."""
        run = self.start(arguments, num_ranks=num_ranks, **environment)
        status = run.wait()
        return status, run.text()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    launcher = Launcher(tmp_path_factory.mktemp("output"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An uninterrupted run of 12 steps with every checkpoint kept; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    arguments = train_arguments(data, folder, "save.keep_last=9")
    status, text = launcher.run(arguments)
    assert status == 0, text
    return Finished(folder, arguments)
