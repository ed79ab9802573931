"""Engines on one machine: order, errors, and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import unit_functions as units

from llmtrain.data.engines.config import DaskConfig, EngineConfig, EngineKind, SlurmConfig
from llmtrain.data.engines.engine import Inline, Local, make_engine, num_usable_cores
from llmtrain.data.engines.unit import name_of, peak_bytes
from llmtrain.errors import ConfigError, DataError, LaunchError

DEADLINE_S = 60.0

RUN = """
import sys
import unit_functions
from llmtrain.data.engines.engine import Local

if __name__ == "__main__":
    with Local(2, max_worker_deaths=2) as engine:
        list(engine.map(unit_functions.wait_for, [(f"{sys.argv[1]}/{name}", "never") for name in "ab"]))
"""


@pytest.fixture
def engine() -> Iterator[Local]:
    with Local(2, max_worker_deaths=2) as local:
        yield local


def test_results_come_in_the_order_of_the_units_whatever_finishes_first(engine: Local) -> None:
    assert list(engine.map(units.double_later, range(12))) == [2 * number for number in range(12)]
    assert list(engine.map(units.double, [])) == []


def test_processes_are_kept_from_one_map_to_the_next_and_ended_by_close(engine: Local) -> None:
    list(engine.map(units.double, range(8)))
    first = [worker.process.pid for worker in engine._crew]
    list(engine.map(units.double, range(8)))
    assert [worker.process.pid for worker in engine._crew] == first
    engine.close()
    assert not any(Path("/proc", str(pid)).exists() for pid in first)
    assert list(engine.map(units.double, [3])) == [6]


def test_a_killed_worker_costs_nothing_but_its_unit(
    engine: Local, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(engine.map(units.die_once, [(str(tmp_path), number) for number in range(20)])) == [*range(20)]
    assert {(tmp_path / f"{number}.txt").read_text() for number in range(20)} == {
        str(number * number) for number in range(20)
    }
    (line,) = caplog.messages
    assert line.startswith(
        "a worker was ended by SIGKILL (as the kernel does when memory runs out); its unit is"
    )
    assert "(death 1): unit 3 of 20 of die_once, (" in line


def test_a_unit_that_kills_its_workers_is_named_and_the_others_are_not_blamed(engine: Local) -> None:
    with pytest.raises(
        DataError,
        match=r"^3 workers died with unit 2 of 9 of die_at_two, 2; the last was ended by SIGKILL .*: lower "
        r"engine\.workers=2 or engine\.unit_bytes, or see what ends them with engine\.kind=inline$",
    ):
        list(engine.map(units.die_at_two, range(9)))
    assert list(engine.map(units.double, [4])) == [8]


def test_a_unit_that_leaves_the_process_is_told_with_the_exit_status(engine: Local) -> None:
    with pytest.raises(
        DataError, match=r"3 workers died with unit 0 of 1 .*; the last ended with exit status 7"
    ):
        list(engine.map(units.exit_politely, [0]))


def test_processes_that_cannot_start_are_told_and_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmtrain.data.engines.local.work", units.exit_politely)
    with (
        Local(2, max_worker_deaths=1) as engine,
        pytest.raises(
            LaunchError, match=r"^2 worker processes in a row ended before they took a unit, the last "
        ),
    ):
        list(engine.map(units.double, range(3)))


def test_an_error_of_a_unit_comes_at_once_with_the_workers_traceback(engine: Local) -> None:
    with pytest.raises(DataError, match=r"^unit 5 is bad: mend it$") as caught:
        list(engine.map(units.fail_at_five, range(100_000)))
    assert "in fail_at_five" in str(caught.value.__cause__)


def test_an_exception_that_cannot_be_pickled_is_told_in_words(engine: Local) -> None:
    with pytest.raises(RuntimeError, match=r"^Odd: a and b$"):
        list(engine.map(units.fail_oddly, [0]))


def test_a_result_that_cannot_be_pickled_is_an_error_and_no_hang(engine: Local) -> None:
    with pytest.raises(Exception, match=r"pickle .*lambda"):
        list(engine.map(units.unpicklable, [0]))


def test_an_error_of_the_operating_system_keeps_its_number(engine: Local) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(engine.map(units.full_disk, [0]))
    assert caught.value.errno == 28


def test_a_map_that_is_left_early_ends_its_processes(engine: Local) -> None:
    results = engine.map(units.double_later, range(1000))
    assert next(results) == 0
    pids = [worker.process.pid for worker in engine._crew]
    results.close()
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert list(engine.map(units.double, [1])) == [2]


def test_a_second_map_inside_a_map_is_refused(engine: Local) -> None:
    results = engine.map(units.double, range(9))
    next(results)
    with pytest.raises(AssertionError, match="one map at a time"):
        next(engine.map(units.double, [1]))


def test_workers_have_one_thread_and_this_process_keeps_its_environment(engine: Local) -> None:
    forkserver._forkserver._stop()  # one that other tests of this process have started has their environment
    before = dict(os.environ)
    assert next(engine.map(units.thread_settings, [0])) == ["1", "1", "1"]
    assert dict(os.environ) == before


def test_the_peak_memory_of_the_workers_is_known(engine: Local) -> None:
    assert engine.peak_worker_bytes() == 0
    list(engine.map(units.double, [1]))
    small = engine.peak_worker_bytes()
    list(engine.map(units.use_memory, [300 << 20]))
    assert small + (250 << 20) < engine.peak_worker_bytes() < small + (800 << 20)
    assert 10 << 20 < Inline().peak_worker_bytes() <= peak_bytes()


def started(folder: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A run with two workers at work, and their places in /proc."""
    path = [str(Path(units.__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    script = folder / "script.py"
    script.write_text(RUN)
    run = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stderr=subprocess.PIPE,
        text=True,
    )
    markers = [folder / name for name in "ab"]
    deadline = time.monotonic() + DEADLINE_S
    while not all(marker.exists() and marker.read_text() for marker in markers):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    workers = [Path("/proc", marker.read_text()) for marker in markers]
    assert all(worker.exists() for worker in workers)
    return run, workers


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_of_a_run_that_ends_end_with_it(tmp_path: Path, how: signal.Signals) -> None:
    run, workers = started(tmp_path)
    run.send_signal(how)
    _, errors = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == -how
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    deadline = time.monotonic() + DEADLINE_S
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_on_a_terminal_reaches_workers_too_and_they_leave_the_word_to_the_run(tmp_path: Path) -> None:
    run, workers = started(tmp_path)
    for worker in workers:
        os.kill(int(worker.name), signal.SIGINT)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=DEADLINE_S)
    assert errors.count("Traceback") == 1


def test_a_long_unit_is_named_in_short() -> None:
    named = name_of(units.double, "x" * 1000, 3, 7)
    assert named.startswith("unit 3 of 7 of double, 'xxx")
    assert len(named) < 250
    assert named.endswith("...")


def test_the_settings_name_the_engine() -> None:
    with make_engine(EngineConfig(kind=EngineKind.inline)) as inline:
        assert isinstance(inline, Inline)
        assert list(inline.map(units.double, [1, 2])) == [2, 4]
        inline.share(Path("anywhere"))
    with make_engine(EngineConfig()) as local:
        assert isinstance(local, Local)
        assert local.workers == num_usable_cores()
        local.share(Path("anywhere"))


@pytest.mark.parametrize(
    ("kind", "package"), [("dask_address", "distributed"), ("dask_slurm", "dask_jobqueue")]
)
def test_a_cluster_without_its_packages_says_what_to_install(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llmtrain.data.engines.dask", "llmtrain.data.engines.slurm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    address = "tcp://127.0.0.1:1" if kind == "dask_address" else None
    cfg = EngineConfig(kind=EngineKind[kind], dask=DaskConfig(address=address))
    with pytest.raises(ConfigError, match=rf"{kind} needs the package {package}.*llmtrain\[cluster\]"):
        make_engine(cfg)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "engine.workers=0 must be at least 1, or null"),
        ({"unit_bytes": 0}, "engine.unit_bytes=0 must be at least 1"),
        ({"max_worker_deaths": -1}, "engine.max_worker_deaths=-1 must be at least 0"),
        (
            {"kind": EngineKind.dask_address},
            "needs one of engine.dask.address=None and engine.dask.scheduler_f",
        ),
    ],
)
def test_settings_of_an_engine_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_a_dask_scheduler_is_named_once() -> None:
    with pytest.raises(
        ConfigError, match=r"one of engine\.dask\.address=tcp://h:1 and .*scheduler_file=file; "
    ):
        EngineConfig(
            kind=EngineKind.dask_address, dask=DaskConfig(address="tcp://h:1", scheduler_file="file")
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allowed_failures": -1}, "engine.dask.allowed_failures=-1 must be at least 0"),
        ({"retries": -1}, "engine.dask.retries=-1 must be at least 0"),
        ({"max_in_flight": 0}, "engine.dask.max_in_flight=0 must be at least 1"),
        ({"worker_timeout_s": 0}, "engine.dask.worker_timeout_s=0 must be above 0"),
    ],
)
def test_settings_of_dask_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DaskConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cores": 0}, "engine.slurm.cores=0 must be at least 1"),
        ({"processes": 0}, "engine.slurm.processes=0 must be at least 1"),
        ({"max_jobs": 0}, "engine.slurm.max_jobs=0 must be at least 1"),
        (
            {"cores": 2, "processes": 3},
            "processes=3 must not exceed engine.slurm.cores=2: a process uses one",
        ),
        ({"memory_gib": 0}, "engine.slurm.memory_gib=0 must be above 0"),
        ({"walltime_hours": 0.01}, r"walltime_hours=0\.01 must be at least 0\.05: a worker needs some time"),
        ({"min_jobs": 2}, r"engine.slurm.min_jobs=2 must lie in 0\.\.engine.slurm.max_jobs=1"),
    ],
)
def test_settings_of_jobs_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlurmConfig(**settings)
