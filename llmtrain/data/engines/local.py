"""Processes on this machine, one unit at a time each.

Written out instead of taken from `concurrent.futures`, whose pool breaks as a whole when one process dies and
does not say what that process had: here the unit is known, done again by a new process, and given up on by
name when it ends one process after the other.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TypeVar

from llmtrain.data.engines.unit import ONE_THREAD, Outcome, limit_threads, name_of, portable, run_unit
from llmtrain.errors import DataError, LaunchError

log = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Result = TypeVar("Result")

PRELOADED = ["llmtrain.data.scan", "llmtrain.data.tokenize"]
"""Loaded once, by the process that workers are forked from."""


@dataclass(kw_only=True, eq=False)
class Worker:
    process: BaseProcess
    connection: Connection
    is_ready: bool = False
    unit: int | None = None
    """Number of the unit it has."""


class Local(AbstractContextManager["Local"]):
    """Up to `workers` processes, started when there is something to do and kept until `close`.

    A unit is handed to a process that waits for one, and results are taken when the caller asks for the next:
    a caller that works long between two results keeps processes waiting.
    """

    def __init__(self, workers: int, *, max_worker_deaths: int) -> None:
        self.workers = workers
        self.max_worker_deaths = max_worker_deaths
        self._crew: list[Worker] = []
        self._is_mapping = False
        self._start_deaths = 0
        self._peak_bytes = 0
        self._end = weakref.finalize(self, end_workers, self._crew)

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """Yield function(unit) of each unit, in order; they finish in any order.

        Raises:
            What the function raised, at once. DataError: a unit whose workers die. LaunchError: processes
            that end before they take a unit.
        """
        assert not self._is_mapping, "one map at a time: the last one has units at work"
        waiting = deque(range(len(units)))
        deaths: Counter[int] = Counter()
        results: dict[int, Result] = {}
        self._is_mapping = True
        try:
            for number in range(len(units)):
                while number not in results:
                    num_left = len(waiting) + sum(worker.unit is not None for worker in self._crew)
                    self._hire(min(self.workers, num_left))
                    self._hand_out(function, units, waiting)
                    for worker, outcome in self._news():
                        if outcome is not None:
                            results[outcome.number] = outcome.result_or_raise()
                        elif worker.unit is not None:
                            deaths[worker.unit] += 1
                            self._explain_death(
                                worker, name_of(function, units[worker.unit], worker.unit, len(units)), deaths
                            )
                            waiting.appendleft(worker.unit)
                    self._hand_out(function, units, waiting)
                yield results.pop(number)
        except BaseException:
            end_workers(self._crew)
            raise
        finally:
            self._is_mapping = False

    def share(self, folder: object) -> None:
        """Nothing to check: the processes are on this machine."""

    def peak_worker_bytes(self) -> int:
        """The most memory that one process had resident so far; 0 before the first result."""
        return self._peak_bytes

    def close(self) -> None:
        """End the processes. A later `map` starts new ones."""
        end_workers(self._crew)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hire(self, num_workers: int) -> None:
        """Start processes until there are `num_workers`."""
        context = multiprocessing.get_context("forkserver")
        while len(self._crew) < num_workers:
            start_fork_server(context)
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._crew.append(Worker(process=process, connection=ours))

    def _hand_out(
        self, function: Callable[[Unit], Result], units: Sequence[Unit], waiting: deque[int]
    ) -> None:
        for worker in self._crew:
            if not waiting:
                return
            if worker.is_ready and worker.unit is None:
                try:
                    worker.connection.send((function, units[waiting[0]], waiting[0]))
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it died idle; the next look at the crew finds it
                worker.unit = waiting.popleft()

    def _news(self) -> Iterator[tuple[Worker, Outcome | None]]:
        """Wait until some worker has something to say: (worker, outcome), or (dead worker, None)."""
        signs = [sign for worker in self._crew for sign in (worker.connection, worker.process.sentinel)]
        seen = set(wait(signs))
        for worker in [w for w in self._crew if seen & {w.connection, w.process.sentinel}]:
            try:
                message = worker.connection.recv() if worker.connection.poll() else None
            except (EOFError, OSError):
                message = None
            if message is None:
                self._crew.remove(worker)
                worker.connection.close()
                worker.process.join()
                if not worker.is_ready:
                    self._count_start_death(worker)
                yield worker, None
            elif isinstance(message, Outcome):
                worker.unit = None
                self._peak_bytes = max(self._peak_bytes, message.peak_bytes)
                yield worker, message
            else:
                worker.is_ready = True
                self._start_deaths = 0

    def _count_start_death(self, worker: Worker) -> None:
        self._start_deaths += 1
        if self._start_deaths > self.max_worker_deaths:
            raise LaunchError(
                f"{self._start_deaths} worker processes in a row ended before they took a unit, the last "
                f"{how_it_ended(worker.process.exitcode)}; see their messages above, or what happens with "
                "engine.kind=inline"
            )

    def _explain_death(self, worker: Worker, unit: str, deaths: Counter[int]) -> None:
        """Warn of a worker that died with `unit`, or give up on the unit."""
        assert worker.unit is not None
        num_deaths = deaths[worker.unit]
        ended = how_it_ended(worker.process.exitcode)
        if num_deaths > self.max_worker_deaths:
            raise DataError(
                f"{num_deaths} workers died with {unit}; the last {ended}. Memory is the usual reason: lower "
                f"engine.workers={self.workers} or engine.unit_bytes, or see what ends them with "
                "engine.kind=inline"
            )
        log.warning("a worker %s; its unit is done again (death %d): %s", ended, num_deaths, unit)


def how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (as the kernel does when memory runs out)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with exit status {exitcode}"


def end_workers(crew: list[Worker]) -> None:
    """Kill the processes: a unit writes its files whole or not at all, so nothing is lost but its time."""
    for worker in crew:
        worker.process.kill()
    for worker in crew:
        worker.process.join()
        worker.process.close()
        worker.connection.close()
    crew.clear()


def start_fork_server(context: multiprocessing.context.ForkServerContext) -> None:
    """Start the process that workers are forked from, if it does not run, with one thread a library."""
    context.set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def work(connection: Connection) -> None:
    """A worker's life: take a unit, send its outcome, until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; whoever runs us decides
    die_with_parent()
    connection.send("ready")
    while True:
        try:
            function, unit, number = connection.recv()
        except EOFError:
            return
        limit_threads()
        outcome = run_unit(function, unit, number)
        try:
            connection.send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # what the function returned cannot be pickled
            connection.send(
                Outcome(number=number, error=portable(error), trace=str(error), peak_bytes=outcome.peak_bytes)
            )


def die_with_parent() -> None:
    """End this process when the one that wanted its results is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
