"""Units on the workers of a Dask scheduler (https://distributed.dask.org, version 2026.8).

Nothing is kept in the cluster: a unit reads and writes named files on a file system that all share, and
what comes back is small. So a lost worker costs its unit, which another one does again; a lost scheduler
costs the units at work, and the same command goes on where the files end. Workers must run the same versions
in the same folder: each looks for itself before its first unit, those that join late too.

A scheduler trusts whoever reaches its port. Run it inside a network of your own, or with Dask's TLS settings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, TypeVar

from distributed import Client, Future, KilledWorker, TimeoutError, Worker, get_worker
from distributed.client import CancelledError, FutureCancelledError
from distributed.scheduler import Scheduler
from distributed.versions import VersionMismatchWarning

from llmtrain.data.engines.config import DaskConfig
from llmtrain.data.engines.unit import Outcome, limit_threads, name_of, run_unit
from llmtrain.errors import DataError, LaunchError, LLMTrainError

log = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Result = TypeVar("Result")

PACKAGES = (
    "dask",
    "distributed",
    "llmtrain",
    "numba",
    "numpy",
    "pyarrow",
    "sentencepiece",
    "xxhash",
    "zstandard",
)
"""Whose versions must be those of this process: they decide bytes of the output, or how it is spoken of."""
POLL_S = 1.0
"""How often a `map` that waits looks whether there are workers at all."""
TEND_S = 15.0
"""How often the source of workers may look after them."""
GATHER_S = 60.0
"""How long to wait for a result that is said to be there; then it is waited for as if it were not."""
TOP_UP = 256
"""Units handed over at a time, once the first `max_in_flight` are."""
PROBE_TRIES, PROBE_PAUSE_S = 20, 0.5
"""Patience with a file system that shows a new file late."""


class Source(Protocol):
    """Where the scheduler and its workers come from."""

    def connect(self) -> Client:
        """Raises LaunchError when no scheduler answers."""
        ...

    may_be_long: bool
    """Whether workers were asked for and may take hours to appear."""
    advice: str
    """What to do when no worker appears."""

    def tend(self, *, has_progressed: bool) -> None:
        """Called every TEND_S of a map: replace what is lost. `has_progressed`: units were done since.

        Raises LaunchError when there is no hope.
        """
        ...

    def close(self) -> None: ...


class Running:
    """A scheduler that somebody else started, and whoever joined it."""

    def __init__(self, cfg: DaskConfig) -> None:
        self.cfg = cfg
        self.may_be_long = False
        self.where = cfg.address or f"the address in {cfg.scheduler_file}"
        started_as = cfg.address or f"--scheduler-file {cfg.scheduler_file}"
        self.advice = f"start some with `dask worker {started_as} --nthreads 1 --nworkers CORES`"

    def connect(self) -> Client:
        if self.cfg.scheduler_file is not None and not Path(self.cfg.scheduler_file).is_file():
            raise LaunchError(
                f"engine.dask.scheduler_file={self.cfg.scheduler_file} is not there; start a scheduler with "
                f"`dask scheduler --scheduler-file {self.cfg.scheduler_file}`"
            )
        try:
            return client_of(address=self.cfg.address, scheduler_file=self.cfg.scheduler_file)
        except (OSError, ValueError) as error:
            raise LaunchError(
                f"no Dask scheduler answers at {self.where} ({error}); start one with `dask scheduler` where "
                "this machine reaches it, and name it in engine.dask.address or engine.dask.scheduler_file"
            ) from error

    def tend(self, *, has_progressed: bool) -> None:
        """Whoever started the workers looks after them."""

    def close(self) -> None:
        """It was not ours to start."""


def client_of(**arguments: Any) -> Client:  # Any: of Dask's Client
    quieten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionMismatchWarning)  # ours says more, and is an error
        return Client(**arguments, set_as_default=False)


def quieten() -> None:
    """Keep Dask from telling of every connection, and of every result that was lost with its worker."""
    logging.getLogger("distributed").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Home:
    """What a worker must find as the run has it."""

    token: str
    versions: dict[str, str]
    working_folder: str
    shared_folder: str | None = None


class Dask(AbstractContextManager["Dask"]):
    """Units on the workers of one scheduler. Connects when made; `close` cancels what is not done."""

    def __init__(self, source: Source, cfg: DaskConfig) -> None:
        self.cfg = cfg
        self._source = source
        self._probe: Path | None = None
        self._peak_bytes = 0
        self._tended_s, self._num_done_then = time.monotonic(), 0
        self._home = Home(token=uuid.uuid4().hex, versions=own_versions(), working_folder=os.getcwd())
        self._client = source.connect()
        try:
            self._check_scheduler()
            self._check_workers()
        except BaseException:
            self.close()
            raise

    def map(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """Yield function(unit) of each unit, in order; they finish in any order, on any worker.

        Raises:
            What the function raised, at once; an OSError only after it was tried again. DataError: a unit
            whose workers die; the scheduler is gone. LaunchError: no workers, or workers of another version.
        """
        calls = Calls(self._client, function, units, self.cfg, self._home)
        self._num_done_then = 0
        try:
            for number in range(len(units)):
                while number not in calls.results:
                    calls.submit()
                    outcome = self._next_outcome(calls)
                    self._peak_bytes = max(self._peak_bytes, outcome.peak_bytes)
                    calls.results[outcome.number] = outcome.result_or_raise()
                yield calls.results.pop(number)
        finally:
            calls.cancel()

    def share(self, folder: Path) -> None:
        """Check that a worker sees `folder` as this process does; the others look before their first unit.

        Raises:
            LaunchError: it does not, or there is no worker.
        """
        self._remove_probe()
        token = uuid.uuid4().hex
        folder = folder.absolute()
        probe = folder / probe_name(token)
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text(token, encoding="ascii")
        self._probe = probe
        self._home = Home(
            token=token,
            versions=self._home.versions,
            working_folder=self._home.working_folder,
            shared_folder=str(folder),
        )
        list(self.map(do_nothing, [None]))

    def peak_worker_bytes(self) -> int:
        return self._peak_bytes

    def close(self) -> None:
        self._remove_probe()
        with suppress(TimeoutError, OSError):
            self._client.close()
        self._source.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remove_probe(self) -> None:
        if self._probe is not None:
            with suppress(OSError):  # a full or lost disk is not this file's to report
                self._probe.unlink(missing_ok=True)
            self._probe = None

    def _next_outcome(self, calls: Calls) -> Outcome:
        """The outcome of the next unit that is done, after waiting for it."""
        alone_since: float | None = None
        while True:
            if time.monotonic() > self._tended_s + TEND_S:
                self._source.tend(has_progressed=calls.num_done > self._num_done_then)
                self._tended_s, self._num_done_then = time.monotonic(), calls.num_done
            try:
                return self._outcome(calls, calls.done.get(timeout=POLL_S))
            except Empty:
                if self._client.status in ("closing", "closed"):
                    raise self._lost_scheduler(calls) from None
                if self._num_workers() > 0:
                    alone_since = None
                    continue
                alone_since = alone_since or time.monotonic()
                waited_s = time.monotonic() - alone_since
                if waited_s > self.cfg.worker_timeout_s:
                    if not self._source.may_be_long:
                        raise LaunchError(
                            f"no worker for {waited_s:.0f} s, and {calls.num_left():,} units wait; "
                            f"{self._source.advice}. What is done stays done: the same command goes on there"
                        ) from None
                    log.info("still no worker; %s units wait", f"{calls.num_left():,}")
                    alone_since = None

    def _outcome(self, calls: Calls, future: Future) -> Outcome:
        number = calls.number_of[future.key]
        try:
            outcome = future.result(timeout=GATHER_S)
        except TimeoutError:  # done by a worker that was lost with it, and now done again
            future.add_done_callback(calls.done.put)
            raise Empty from None
        except FutureCancelledError:
            raise self._lost_scheduler(calls) from None
        except KilledWorker as error:
            raise DataError(
                f"{error.allowed_failures + 1} workers died with {calls.name(number)}; the last was "
                f"{error.last_worker.address}. Memory is the usual reason: give a worker more "
                "(engine.slurm.memory_gib, or --memory-limit) or lower engine.unit_bytes; a scheduler that "
                "gives up too early is started with DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=10"
            ) from None
        except ModuleNotFoundError as error:
            raise LaunchError(
                f"a worker or the scheduler cannot import {error.name}, for {calls.name(number)}; start them "
                "with this environment's Python"
            ) from error
        calls.forget(future)
        assert isinstance(outcome, Outcome)
        return outcome

    def _lost_scheduler(self, calls: Calls) -> DataError:
        return DataError(
            f"the Dask scheduler is gone, with {calls.num_left():,} of {len(calls.units):,} units left; what "
            "is done stays done: the same command goes on where it was"
        )

    def _num_workers(self) -> int:
        try:
            return len(self._client.nthreads())
        except (OSError, TimeoutError, ValueError):  # being lost; its units will say so
            return 1

    def _check_scheduler(self) -> None:
        """Compare versions, and warn of a scheduler that gives up on a unit too early."""
        try:
            versions, allowed_failures = self._client.run_on_scheduler(about_scheduler)
        except ModuleNotFoundError as error:
            raise LaunchError(
                f"the Dask scheduler cannot import {error.name}; start it with this environment's Python"
            ) from error
        if wrong := differences(self._home.versions, versions):
            raise LaunchError(
                f"the Dask scheduler has other versions than this process: {wrong}; start it with this "
                "environment's Python"
            )
        if allowed_failures < self.cfg.allowed_failures:
            log.warning(
                "the scheduler gives up on a unit after %d lost workers, fewer than "
                "engine.dask.allowed_failures=%d; start it with "
                "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=%d",
                allowed_failures + 1,
                self.cfg.allowed_failures,
                self.cfg.allowed_failures,
            )

    def _check_workers(self) -> None:
        """Ask the workers that are there already, so that a wrong one is known before the first unit."""
        answers = self._client.run(complaint_about_worker, self._home, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                raise LaunchError(
                    f"worker {address} cannot be used: {answer}; start it with this environment's Python"
                ) from answer
            if answer is not None:
                raise LaunchError(answer)


class Calls:
    """The units of one `map`: which were handed over, and what came back early."""

    def __init__(
        self,
        client: Client,
        function: Callable[[Any], Any],  # Any, here and below: units and results of whoever calls map
        units: Sequence[Any],
        cfg: DaskConfig,
        home: Home,
    ) -> None:
        self.client, self.function, self.units, self.cfg, self.home = client, function, units, cfg, home
        self.results: dict[int, Any] = {}
        self.done: SimpleQueue[Future] = SimpleQueue()
        self.number_of: dict[str, int] = {}
        self._futures: dict[str, Future] = {}
        self.num_done = 0
        self._num_submitted = 0
        self._prefix = f"{getattr(function, '__name__', 'unit')}-{uuid.uuid4().hex}"
        """A scheduler takes two units of one key for the same one, also those of two runs."""

    def submit(self) -> None:
        """Hand over more units while the scheduler has few of them."""
        num_left = len(self.units) - self._num_submitted
        room = self.cfg.max_in_flight - len(self._futures) - len(self.results)
        if not num_left or (room < min(num_left, TOP_UP) and self._futures):
            return
        numbers = range(self._num_submitted, self._num_submitted + min(num_left, max(1, room)))
        keys = [f"{self._prefix}-{number}" for number in numbers]
        self.number_of.update(zip(keys, numbers, strict=True))
        futures = self.client.map(
            run_here,
            [pickle.dumps((self.function, self.units[number])) for number in numbers],
            numbers,
            home=self.home,
            key=keys,
            pure=False,
            retries=self.cfg.retries,
        )
        self._num_submitted = numbers.stop
        for future in futures:
            self._futures[future.key] = future
            future.add_done_callback(self.done.put)

    def forget(self, future: Future) -> None:
        """Let the scheduler drop a unit whose outcome is here."""
        self.num_done += 1
        del self._futures[future.key], self.number_of[future.key]
        future.release()

    def cancel(self) -> None:
        """Call off what is not done. Units at work end by themselves, and write what they would have."""
        if self._futures and self.client.status == "running":
            with suppress(TimeoutError, OSError, CancelledError):
                self.client.cancel(list(self._futures.values()), force=True)
        self._futures.clear()

    def name(self, number: int) -> str:
        return name_of(self.function, self.units[number], number, len(self.units))

    def num_left(self) -> int:
        return len(self.units) - self._num_submitted + len(self._futures)


def run_here(pickled: bytes, number: int, *, home: Home) -> Outcome:
    """On a worker: one unit, after a look at where it is.

    Raises:
        OSError: of the unit, so that Dask tries it again elsewhere. Other errors are in the outcome.
    """
    complaint = complaint_about(home, get_worker().address, get_worker().state.nthreads)
    if complaint is not None:
        return Outcome(number=number, error=LaunchError(complaint), peak_bytes=0)
    function, unit = pickle.loads(pickled)
    limit_threads()
    outcome = run_unit(function, unit, number)
    if isinstance(outcome.error, OSError) and not isinstance(outcome.error, LLMTrainError):
        raise outcome.error
    return outcome


def complaint_about_worker(home: Home, dask_worker: Worker) -> str | None:
    """On a worker that is asked before there are units."""
    return complaint_about(home, dask_worker.address, dask_worker.state.nthreads)


_found: dict[str, str | None] = {}
"""Token of a home -> what this worker process found there. It looks once."""


def complaint_about(home: Home, address: str, num_threads: int) -> str | None:
    """What makes this process unfit for the run, or None. Relative paths mean the same here from now on."""
    if home.token not in _found:
        _found.clear()
        _found[home.token] = _look_around(home, f"{address} on {socket.gethostname()}", num_threads)
    return _found[home.token]


def _look_around(home: Home, worker: str, num_threads: int) -> str | None:
    if num_threads != 1:
        return (
            f"worker {worker} computes with {num_threads} threads, and units use a whole process; start it "
            "with --nthreads 1, and --nworkers for as many as there are cores"
        )
    if wrong := differences(home.versions, own_versions()):
        return (
            f"worker {worker} has other versions than this process: {wrong}; start it with this "
            "environment's Python"
        )
    with suppress(OSError):  # a run with absolute paths does not need it
        os.chdir(home.working_folder)
    if home.shared_folder is None:
        return None
    probe = Path(home.shared_folder, probe_name(home.token))
    for _ in range(PROBE_TRIES):
        if probe.is_file():
            break
        time.sleep(PROBE_PAUSE_S)
    else:
        return (
            f"worker {worker} does not see what this process wrote to {home.shared_folder}; out must be on a "
            "file system that all machines of the run share"
        )
    if not os.access(home.shared_folder, os.W_OK):
        return f"worker {worker} may not write to {home.shared_folder}; check whom it runs as, and the mount"
    return None


def probe_name(token: str) -> str:
    return f".engine-{token}.tmp-probe"


def do_nothing(unit: None) -> None:
    """A unit that only asks the worker to look around."""


def about_scheduler(dask_scheduler: Scheduler) -> tuple[dict[str, str], int]:
    """On the scheduler: its versions, and how many workers may die with a unit."""
    return own_versions(), dask_scheduler.allowed_failures


@cache
def own_versions() -> dict[str, str]:
    """Versions of this process that decide bytes of the output, and a hash of the code that does."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    package_folder = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*package_folder.glob("*.py"), *package_folder.glob("data/**/*.py")]):
        digest.update(path.relative_to(package_folder).as_posix().encode() + b"\0" + path.read_bytes())
    found["llmtrain's code"] = digest.hexdigest()[:12]
    return found


def differences(here: dict[str, str], there: dict[str, str]) -> str:
    """As `numpy 2.4.6 here, 2.3.0 there`; empty when all agree."""
    return ", ".join(
        f"{name} {here.get(name, 'none')} here, {there.get(name, 'none')} there"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    )
