"""Workers that die. The functions live in a script of their own, as a worker imports them from there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.engines.engine import Inline, Local, make_engine, num_usable_cores
from llmtrain.errors import ConfigError

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from llmtrain.data.engines.engine import Local
from llmtrain.errors import DataError

def double(number):
    return 2 * number

def die_once(marker):
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker

def die(number):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(number):
    raise DataError(f"unit {number} is bad")

def sleep(marker):
    Path(marker).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    engine = Local(2, max_worker_deaths=2)
    folder = Path(sys.argv[2])
    match sys.argv[1]:
        case "order":
            print(list(engine.map(double, range(20))))
        case "die_once":
            units = [str(folder / f"m{number}") for number in range(6)]
            (folder / "m0").touch()
            for name in units[2:]:
                Path(name).touch()
            assert list(engine.map(die_once, units)) == units
            print("all done")
        case "die":
            try:
                list(engine.map(die, range(3)))
            except DataError as error:
                print(error)
        case "fail":
            try:
                list(engine.map(fail, range(30)))
            except DataError as error:
                print(error)
        case "sleep":
            list(engine.map(sleep, [str(folder / "pid")]))
"""


def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("order", str([2 * number for number in range(20)])),
        ("die_once", "all done"),
        (
            "die",
            "a worker died 3 times, last in units 0..2 of 3; memory is the usual reason",
        ),
        ("fail", "unit 0 is bad"),
    ],
)
def test_local_processes_give_results_in_order_and_survive_deaths(
    tmp_path: Path, what: str, expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, script(tmp_path), what, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert expected in done.stdout


def test_workers_of_a_killed_run_end_with_it(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, script(tmp_path), "sleep", str(tmp_path)])
    marker = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = Path("/proc", marker.read_text())
    assert worker.exists()
    run.kill()
    run.wait()
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists()


def test_the_settings_name_the_engine() -> None:
    assert isinstance(make_engine(EngineConfig(kind=EngineKind.inline)), Inline)
    local = make_engine(EngineConfig())
    assert isinstance(local, Local)
    assert local.workers == num_usable_cores()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "engine.workers=0 must be at least 1, or null"),
        ({"unit_bytes": 0}, "engine.unit_bytes=0 must be at least 1"),
        ({"max_worker_deaths": -1}, "engine.max_worker_deaths=-1 must be at least 0"),
    ],
)
def test_settings_of_an_engine_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)
