"""metrics.jsonl: what is written, what a kill leaves, and what a reader takes for true."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.tracking.metrics import MetricsFile, attempt_begins, next_attempt, read_lines, read_metrics


def steps_of(records):
    return [(record["step"], record["attempt"]) for record in records if record["kind"] == "step"]


def write_attempt(path, attempt, begin, end, *, resumed):
    with MetricsFile(path, attempt=attempt) as metrics:
        if resumed is not None:
            metrics.write("event", begin, what="resume" if resumed else "start")
        for step in range(begin + 1, end + 1):
            metrics.write("step", step, loss=float(step))


def test_a_record_has_kind_step_attempt_and_time(tmp_path):
    with MetricsFile(tmp_path / "run" / "metrics.jsonl", attempt=3) as metrics:
        written = metrics.write("step", 7, loss=2.5)
    (read,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert read == written
    assert (read["kind"], read["step"], read["attempt"], read["loss"]) == ("step", 7, 3, 2.5)
    assert read["time"] > 1.7e9


def test_absent_fields_are_left_out_and_values_that_are_not_finite_become_null(tmp_path):
    with MetricsFile(tmp_path / "m", attempt=1) as metrics:
        metrics.write("step", 1, mfu=None, loss=float("nan"), grad_norm=float("inf"), num_valid=np.int64(5))
    line = (tmp_path / "m").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "mfu" not in record
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert record["num_valid"] == 5


def test_each_line_is_on_disk_when_write_returns(tmp_path):
    metrics = MetricsFile(tmp_path / "m", attempt=1)
    metrics.write("step", 1, loss=1.0)
    assert (tmp_path / "m").read_text().endswith("}\n")
    metrics.sync()
    metrics.close()


@pytest.mark.parametrize("kept", [1, 30, 4999])
def test_a_torn_last_line_is_cut_off_when_the_file_is_opened_again(tmp_path, kept):
    path = tmp_path / "m"
    with MetricsFile(path, attempt=1) as metrics:
        metrics.write("step", 1, loss=1.0)
        whole = path.read_bytes()
        metrics.write("step", 2, loss=2.0, text="x" * 6000)
    path.write_bytes(path.read_bytes()[: len(whole) + kept])
    assert steps_of(read_metrics(path)) == [(1, 1)]
    MetricsFile(path, attempt=2).close()
    assert path.read_bytes() == whole


def test_a_whole_last_line_without_its_newline_is_kept_and_ended(tmp_path):
    path = tmp_path / "m"
    with MetricsFile(path, attempt=1) as metrics:
        metrics.write("step", 1, loss=1.0)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with MetricsFile(path, attempt=2) as metrics:
        metrics.write("step", 2, loss=2.0)
    assert steps_of(read_metrics(path)) == [(1, 1), (2, 2)]


def test_a_write_that_fails_half_way_leaves_no_torn_line(tmp_path, monkeypatch):
    path = tmp_path / "m"
    metrics = MetricsFile(path, attempt=1)
    metrics.write("step", 1, loss=1.0)
    real_write, calls = os.write, []

    def write_half_then_fail(fd, data):
        calls.append(len(data))
        if len(calls) == 1:
            return real_write(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmtrain.tracking.metrics.os.write", write_half_then_fail)
    with pytest.raises(OSError, match="No space left on device"):
        metrics.write("step", 2, loss=2.0)
    monkeypatch.undo()
    metrics.write("step", 2, loss=3.0)
    metrics.close()
    assert [record["loss"] for record in read_metrics(path)] == [1.0, 3.0]


def test_the_last_attempt_wins_for_a_step(tmp_path):
    write_attempt(tmp_path / "m", 1, 0, 10, resumed=False)
    write_attempt(tmp_path / "m", 2, 6, 12, resumed=True)
    expected = [(step, 1) for step in range(1, 7)] + [(step, 2) for step in range(7, 13)]
    assert steps_of(read_metrics(tmp_path / "m")) == expected


def test_steps_that_a_resume_went_back_behind_do_not_stand_even_when_not_done_again(tmp_path):
    write_attempt(tmp_path / "m", 1, 0, 10, resumed=False)
    write_attempt(tmp_path / "m", 2, 6, 8, resumed=True)
    assert steps_of(read_metrics(tmp_path / "m"))[-1] == (8, 2)
    write_attempt(tmp_path / "m", 3, 4, 4, resumed=True)  # killed before its first step
    assert steps_of(read_metrics(tmp_path / "m")) == [(step, 1) for step in range(1, 5)]
    events = [record["step"] for record in read_metrics(tmp_path / "m") if record["kind"] == "event"]
    assert sorted(events) == [0, 4, 6]


def test_an_attempt_without_an_event_begins_one_before_its_first_step(tmp_path):
    write_attempt(tmp_path / "m", 1, 0, 5, resumed=None)
    write_attempt(tmp_path / "m", 2, 3, 5, resumed=None)
    assert attempt_begins(read_lines(tmp_path / "m")) == {1: 0, 2: 3}


def test_an_evaluation_at_the_step_of_the_checkpoint_stands(tmp_path):
    with MetricsFile(tmp_path / "m", attempt=1) as metrics:
        metrics.write("eval", 6, eval_loss=1.0)
        metrics.write("eval", 8, eval_loss=2.0)
    write_attempt(tmp_path / "m", 2, 6, 7, resumed=True)
    evals = [record["eval_loss"] for record in read_metrics(tmp_path / "m") if record["kind"] == "eval"]
    assert evals == [1.0]


def test_lines_that_are_not_records_are_skipped_and_counted(tmp_path, caplog):
    path = tmp_path / "m"
    write_attempt(path, 1, 0, 1, resumed=None)
    path.write_bytes(
        path.read_bytes() + b'{"kind": "step"}\n[1]\n{"kind": "step", "step": "2", "attempt": 1}\n{"ki'
    )
    assert steps_of(read_metrics(path)) == [(1, 1)]
    assert "skipped 4 lines that are not metrics records" in caplog.text


def test_a_missing_file_says_who_writes_it(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; `llmtrain train run\.folder="):
        read_metrics(tmp_path / "metrics.jsonl")


def test_attempts_are_counted_from_the_file(tmp_path):
    assert next_attempt(tmp_path / "m") == 1
    write_attempt(tmp_path / "m", 1, 0, 1, resumed=None)
    write_attempt(tmp_path / "m", 2, 0, 1, resumed=None)
    assert next_attempt(tmp_path / "m") == 3


def test_a_killed_writer_leaves_only_whole_lines_and_at_most_one_torn_one(tmp_path):
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from llmtrain.tracking.metrics import MetricsFile
        metrics = MetricsFile(Path(sys.argv[1]), attempt=1)
        print("writing", flush=True)
        for step in range(1, 10**9):
            metrics.write("step", step, loss=1.0)
    """)
    path = tmp_path / "m"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        while not path.exists() or path.stat().st_size < 20_000:
            pass
        writer.kill()
    steps = [step for step, _ in steps_of(read_metrics(path))]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 100
