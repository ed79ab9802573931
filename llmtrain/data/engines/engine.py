"""Who runs work units: this process, processes on this machine, or a Dask cluster.

A unit function reads and writes named files and returns counts, so losing a worker, or the scheduler of a
cluster, loses nothing but unfinished units. Functions live at the top of a module, units can be pickled, and
results come back in the order of the units.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.engines.local import Local
from llmtrain.data.engines.unit import peak_bytes
from llmtrain.errors import ConfigError

Unit = TypeVar("Unit")
Result = TypeVar("Result")


class Engine(Protocol):
    """`with make_engine(cfg) as engine: engine.map(...)`."""

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """Yield function(unit) of each unit, in order. What the function raises is raised here, at once."""
        ...

    def share(self, folder: Path) -> None:
        """Check that workers can read and write `folder`, before there is much to lose."""
        ...

    def peak_worker_bytes(self) -> int:
        """The most memory that one worker had resident, of those that gave a result so far."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Inline(AbstractContextManager["Inline"]):
    """One unit after another in this process."""

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            yield function(unit)

    def share(self, folder: Path) -> None:
        """Nothing to check: this process is the worker."""

    def peak_worker_bytes(self) -> int:
        return peak_bytes()

    def close(self) -> None:
        """Nobody to let go."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_engine(cfg: EngineConfig) -> Engine:
    """The engine that the settings name.

    Raises:
        ConfigError: a Dask engine without the packages for it, or without `sbatch`. LaunchError: no scheduler
        answers.
    """
    match cfg.kind:
        case EngineKind.inline:
            return Inline()
        case EngineKind.local:
            return Local(cfg.workers or num_usable_cores(), max_worker_deaths=cfg.max_worker_deaths)
    try:
        from llmtrain.data.engines.dask import Dask, Running  # noqa: PLC0415 - optional, and slow to load
        from llmtrain.data.engines.slurm import SlurmJobs, load_jobqueue  # noqa: PLC0415 - as above

        if cfg.kind is EngineKind.dask_slurm:
            load_jobqueue()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine.kind={cfg.kind.name} needs the package {error.name}; install what clusters need with "
            "`pip install llmtrain[cluster]`, here and where the workers run"
        ) from error
    if cfg.kind is EngineKind.dask_slurm:
        return Dask(SlurmJobs(cfg.slurm, cfg.dask), cfg.dask)
    return Dask(Running(cfg.dask), cfg.dask)


def num_usable_cores() -> int:
    return len(os.sched_getaffinity(0))
