"""Who runs work units: this process, or processes on this machine.

A unit function reads and writes named files and returns counts, so losing a process loses nothing but
its unfinished units. Functions and units are pickled; results come back in the order of the units.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Protocol, TypeVar

from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.errors import DataError

log = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Result = TypeVar("Result")

UNITS_AHEAD = 4
"""Units handed out for each worker, finished or not, before the oldest result is taken."""


class Engine(Protocol):
    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """Yield function(unit) of each unit, in order."""
        ...


class Inline:
    """One unit after another in this process."""

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        for unit in units:
            yield function(unit)


class Local:
    """Processes on this machine. A worker that dies is replaced, and what it and its neighbours had is
    done again."""

    def __init__(self, workers: int, *, max_worker_deaths: int) -> None:
        self.workers = workers
        self.max_worker_deaths = max_worker_deaths

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        deaths = 0
        first = 0  # units before it are done
        while first < len(units):
            with self._pool(len(units) - first) as pool:
                waiting: deque[Future[Result]] = deque()
                submitted = first
                try:
                    while first < len(units):
                        while submitted < len(units) and len(waiting) < UNITS_AHEAD * self.workers:
                            waiting.append(pool.submit(function, units[submitted]))
                            submitted += 1
                        result = waiting.popleft().result()
                        first += 1
                        yield result
                except BrokenProcessPool as error:
                    deaths += 1
                    if deaths > self.max_worker_deaths:
                        raise DataError(
                            f"a worker died {deaths} times, last in units {first}..{submitted - 1} of "
                            f"{len(units)}; memory is the usual reason: lower engine.workers={self.workers} "
                            "or engine.unit_bytes, or see what ends them with engine.kind=inline"
                        ) from error
                    log.warning("a worker died; units from %d on are done again (death %d)", first, deaths)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

    def _pool(self, num_units: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llmtrain.data.scan", "llmtrain.data.tokenize"])
        return ProcessPoolExecutor(
            max_workers=min(self.workers, num_units), mp_context=context, initializer=_die_with_parent
        )


def make_engine(cfg: EngineConfig) -> Engine:
    """The engine that the settings name."""
    if cfg.kind is EngineKind.inline:
        return Inline()
    return Local(cfg.workers or num_usable_cores(), max_worker_deaths=cfg.max_worker_deaths)


def num_usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _die_with_parent() -> None:
    """End this worker when the process that wanted its results is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
