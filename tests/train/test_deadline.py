"""When a run must leave, and what its launcher is told."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmtrain.launch.environment import job_end
from llmtrain.train.deadline import (
    EXIT_AGAIN,
    EXIT_FILE,
    EXIT_NEVER,
    SIGNALS,
    Deadline,
    leave_with,
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_seconds(seconds: float) -> float:
    return job_end({"SLURM_JOB_END_TIME": str(round(time.time() + seconds))})


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_reason_however_often_it_comes(number: signal.Signals) -> None:
    deadline = Deadline()
    assert deadline.reason() is None
    os.kill(os.getpid(), number)
    if number != signal.SIGINT:
        os.kill(os.getpid(), number)
    assert deadline.reason() == number.name
    assert deadline.is_due()


def test_the_first_signal_is_the_reason() -> None:
    deadline = Deadline()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert deadline.reason() == "SIGUSR1"


def test_a_signal_ends_a_lone_process_that_is_starting(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "status"))
    deadline = Deadline()
    deadline.leave_at_once(during_start=True)
    with pytest.raises(SystemExit) as left:
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == EXIT_AGAIN
    assert (tmp_path / "status").read_text() == f"{EXIT_AGAIN}\n"


def test_a_signal_from_before_the_settings_were_known_counts_too() -> None:
    deadline = Deadline()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        deadline.leave_at_once(during_start=True)


def test_slurms_limit_is_a_reason_in_time() -> None:
    deadline = Deadline(end=in_seconds(1000), watch_signals=False)
    deadline.set_limits(time_limit_s=None, leave_before_s=300)
    assert deadline.reason() is None
    assert 998 < deadline.remaining_s() < 1001
    assert "5:00 before" in str(deadline.describe())
    late = Deadline(end=in_seconds(200), watch_signals=False)
    late._began = time.time() - 1000
    late.set_limits(time_limit_s=None, leave_before_s=300)
    assert late.reason() == "the time limit of the job"


def test_a_short_job_is_not_all_leaving() -> None:
    deadline = Deadline(end=in_seconds(100), watch_signals=False)
    deadline._began = time.time()
    deadline.set_limits(time_limit_s=None, leave_before_s=300)
    assert deadline.reason() is None, "half of the time is left to work in"


def test_the_users_limit_counts_from_the_start_of_the_process() -> None:
    deadline = Deadline(end=in_seconds(10**6), watch_signals=False)
    age = time.time() - psutil.Process().create_time()
    deadline.set_limits(time_limit_s=age + 100, leave_before_s=10)
    assert 99 < deadline.remaining_s() < 101
    assert deadline.reason() is None
    deadline.set_limits(time_limit_s=age, leave_before_s=0)
    time.sleep(0.05)
    assert deadline.reason() == "the time limit of run.time_limit_s"


def test_a_save_is_begun_only_if_it_can_end() -> None:
    deadline = Deadline(end=in_seconds(100), watch_signals=False)
    assert deadline.has_time_for(60)
    assert not deadline.has_time_for(80)
    assert Deadline(watch_signals=False).has_time_for(1e9), "a signal without a limit"


def test_without_a_limit_there_is_nothing_to_say() -> None:
    assert Deadline(watch_signals=False).describe() is None
    assert [job_end({"SLURM_JOB_END_TIME": told}) for told in ("0", "soon", "")] == [math.inf] * 3


@pytest.mark.parametrize(
    ("status", "environment", "exits_with", "told"),
    [
        (EXIT_AGAIN, {}, EXIT_AGAIN, True),
        (EXIT_AGAIN, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}, 0, True),
        (EXIT_AGAIN, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1"}, 0, False),
        (EXIT_NEVER, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}, EXIT_NEVER, True),
    ],
)
def test_the_launcher_is_told_the_status_that_is_meant(
    tmp_path, status, environment, exits_with, told
) -> None:
    path = tmp_path / "status"
    assert leave_with(status, environment={**environment, EXIT_FILE: str(path)}) == exits_with
    assert path.exists() == told
    assert leave_with(status, environment=environment) == exits_with


def test_the_reason_follows_the_status(tmp_path: Path) -> None:
    path = tmp_path / "status"
    leave_with(EXIT_AGAIN, "the time limit of the job", environment={EXIT_FILE: str(path)})
    assert path.read_text() == f"{EXIT_AGAIN} the time limit of the job\n"
