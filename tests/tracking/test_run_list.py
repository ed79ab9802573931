"""The runs below a folder: what each is said to do, from the ends of its files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from test_beats import beat_of

from llmtrain.errors import DataError
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.tracking import run_list
from llmtrain.tracking.beats import beat_path, write_beat
from llmtrain.tracking.facts import record_start
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.run_list import (
    State,
    as_json,
    config_parts,
    goodput_of_lines,
    list_runs,
    status_of_run,
    total_steps,
)

NOW = 2_000_000_000.0


def write_run(folder, *, steps=(1, 10), attempt=1, what="start", ending=(), end_at=NOW, step_s=1.0, **fields):
    """Steps a second apart, the last at `end_at`; then the events of `ending`."""
    first, last = steps
    with MetricsFile(folder / "metrics.jsonl", attempt=attempt) as metrics:
        metrics.write("event", first - 1, what=what, time=end_at - (last - first + 1))
        for step in range(first, last + 1):
            values = {"loss": 5 - step / 1e6, "position": step * 10, "tokens_per_s": 80.0, "step_s": step_s}
            at = end_at - (last - step)
            metrics.write("step", step, **{**values, "time": at, **fields})
        for event in ending:
            metrics.write("event", last, time=end_at, **event)
    os.utime(folder / "metrics.jsonl", (end_at, end_at))


def write_config(folder, *, total_tokens=1600, **train):
    config = {
        "run": {"name": "x"},
        "data": {"seq_len": 8, "folder": "d"},
        "model": {"d_model": 4},
        "train": {"total_tokens": total_tokens, "global_batch_rows": 10, "micro_batch_rows": 5, **train},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def status(folder, *, now=NOW, silent_after_s=300.0):
    return status_of_run(folder, now=now, silent_after_s=silent_after_s)


def test_a_run_that_goes_on_says_where_it_is_and_when_it_will_be_done(tmp_path):
    write_config(tmp_path)
    write_run(tmp_path)
    found = status(tmp_path, now=NOW + 5)
    assert found.state is State.running
    assert (found.step, found.total_steps, found.attempts) == (10, 20, 1)
    assert found.loss == pytest.approx(5 - 10e-6)
    assert found.tokens_per_s == 80.0
    assert found.left_s == pytest.approx(10.0)
    assert found.heard_s == pytest.approx(5.0)
    assert found.words == "running"


@pytest.mark.parametrize(
    ("ending", "state", "note"),
    [
        ([{"what": "finished"}], State.finished, ""),
        ([{"what": "stopped", "signal": "SIGUSR1"}], State.stopped, "by SIGUSR1"),
        ([{"what": "failed", "error": "DataError: no row 7"}], State.failed, "DataError: no row 7"),
        (
            [{"what": "diverged", "loss": None}, {"what": "failed", "error": "DivergedError: loss=nan"}],
            State.diverged,
            "DivergedError: loss=nan",
        ),
    ],
)
def test_the_end_that_an_attempt_recorded_is_its_state(tmp_path, ending, state, note):
    write_run(tmp_path, ending=[*ending, {"what": "wandb", "text": "offline"}])
    found = status(tmp_path, now=NOW + 1e6)
    assert (found.state, found.note, found.left_s) == (state, note, None)


def test_an_end_before_later_steps_is_none(tmp_path):
    write_run(tmp_path, ending=[{"what": "stopped", "signal": "SIGTERM"}], end_at=NOW - 100)
    write_run(tmp_path, steps=(11, 20), attempt=2, what="resume")
    assert status(tmp_path).state is State.running
    assert status(tmp_path).attempts == 2


def test_a_resume_without_a_step_yet_is_where_it_went_back_to(tmp_path):
    write_run(tmp_path, end_at=NOW - 100)
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=2) as metrics:
        metrics.write("event", 6, what="resume", time=NOW)
    found = status(tmp_path)
    assert (found.state, found.step, found.attempts, found.loss) == (State.running, 6, 2, None)


def test_a_run_that_says_nothing_is_silent(tmp_path):
    write_config(tmp_path)
    write_run(tmp_path)
    found = status(tmp_path, now=NOW + 720)
    assert found.state is State.silent
    assert found.words == "silent for 12 min"
    assert status(tmp_path, now=NOW + 720, silent_after_s=721).state is State.running


def test_a_silent_run_says_whether_its_process_lives_and_where_it_is(tmp_path):
    write_run(tmp_path)
    path = beat_path(tmp_path / "ranks", 0)
    path.parent.mkdir()
    write_beat(path, beat_of(age_s=118.0))
    os.utime(path, (NOW + 718, NOW + 718))
    found = status(tmp_path, now=NOW + 720)
    assert found.state is State.silent, "a thread that writes is no step that is done"
    assert found.note == "rank 0 lives, at step 3, micro-step 2, backward, for 2:00"
    assert (as_json(found)["beat_s"], as_json(found)["at"]) == (2.0, "step 3, micro-step 2, backward")
    found = status(tmp_path, now=NOW + 1318)
    assert found.note == "rank 0 wrote last 10:00 ago, at step 3, micro-step 2, backward"
    write_beat(path, beat_of(attempt=7))
    assert status(tmp_path, now=NOW + 720).pulse is None, "of another attempt"
    write_beat(path, beat_of(end="well"))
    assert status(tmp_path, now=NOW + 720).pulse is None


def test_a_run_of_slow_steps_may_be_silent_for_ten_of_them(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        for step in range(1, 6):
            metrics.write("step", step, time=NOW - 500 * (5 - step))
    os.utime(tmp_path / "metrics.jsonl", (NOW, NOW))
    assert status(tmp_path, now=NOW + 4_900).state is State.running
    assert status(tmp_path, now=NOW + 5_100).state is State.silent


def test_before_the_first_step_there_is_more_patience(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 0, what="start", time=NOW)
    os.utime(tmp_path / "metrics.jsonl", (NOW, NOW))
    assert status(tmp_path, now=NOW + 800).state is State.running
    assert status(tmp_path, now=NOW + 1000).state is State.silent


def test_a_launch_without_a_record_is_waited_for(tmp_path):
    record_start(tmp_path, attempt=1)
    found = status(tmp_path, now=time.time() + 10)
    assert (found.state, found.attempts, found.step) == (State.waiting, 1, None)
    assert found.note == "attempt 1 was launched and has recorded nothing yet"
    assert status(tmp_path, now=time.time() + 3600).state is State.silent


def test_a_requeued_run_is_waiting_for_its_next_attempt(tmp_path):
    write_run(tmp_path, ending=[{"what": "stopped", "signal": "SIGUSR1"}])
    for attempt in (1, 2):
        record_start(tmp_path, attempt=attempt)
    found = status(tmp_path, now=time.time())
    assert (found.state, found.attempts, found.step) == (State.waiting, 2, 10)


def test_an_empty_metrics_file_is_waited_for(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert status(tmp_path, now=time.time()).state is State.waiting


def test_a_run_killed_in_the_middle_of_a_line_is_read_up_to_it(tmp_path):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as handle:
        handle.write(b'{"kind": "step", "step": 11, "att')
    assert status(tmp_path).step == 10


def test_bytes_that_are_no_records_are_passed_over(tmp_path):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as handle:
        handle.write(b"\x00" * 4096 + b"\n")
    assert status(tmp_path).step == 10


def test_a_clock_ahead_of_ours_is_said_and_the_run_is_not_from_the_future(tmp_path):
    write_run(tmp_path, end_at=NOW + 3600)
    os.utime(tmp_path / "metrics.jsonl", (NOW - 20, NOW - 20))
    found = status(tmp_path)
    assert found.state is State.running
    assert found.heard_s == pytest.approx(20.0)
    assert found.note == "its host's clock is 3600 s ahead of this one's"


def test_a_host_whose_clock_is_behind_is_not_silent(tmp_path):
    write_run(tmp_path, end_at=NOW - 3600)
    os.utime(tmp_path / "metrics.jsonl", (NOW - 2, NOW - 2))
    found = status(tmp_path)
    assert found.state is State.running
    assert found.heard_s == pytest.approx(2.0)


def test_both_clocks_ahead_of_ours_count_as_now(tmp_path):
    write_run(tmp_path, end_at=NOW + 3600)
    assert status(tmp_path).heard_s == 0.0


def test_goodput_is_the_time_of_steps_that_stand(tmp_path):
    """Ten steps of half a second each second; three of them are undone and done again 20 s later."""
    write_run(tmp_path, steps=(1, 10), step_s=0.5, end_at=NOW - 40)
    write_run(tmp_path, steps=(8, 20), attempt=2, what="resume", step_s=0.5, end_at=NOW)
    found = status(tmp_path)
    assert found.goodput == pytest.approx(20 * 0.5 / 50)
    assert not found.goodput_is_estimate


def test_goodput_counts_the_start_up_before_the_first_record(tmp_path):
    lines = [
        {"kind": "event", "what": "start", "step": 0, "attempt": 1, "time": 95.0},
        {"kind": "step", "step": 1, "attempt": 1, "time": 100.0, "step_s": 2.0},
        {
            "kind": "event",
            "what": "first_step",
            "step": 1,
            "attempt": 1,
            "time": 100.0,
            "start_up_s": {"total": 20.0},
        },
        {"kind": "step", "step": 2, "attempt": 1, "time": 110.0, "step_s": 4.0},
    ]
    assert goodput_of_lines(lines) == pytest.approx(6 / 30)
    assert goodput_of_lines([]) is None


def test_a_long_run_is_read_at_its_ends_and_says_the_same(tmp_path, monkeypatch):
    """A file of 3,000 steps, whole and as if it were too long."""
    write_config(tmp_path, total_tokens=10**6)
    write_run(tmp_path, steps=(1, 2000), end_at=NOW - 1000, step_s=0.75)
    write_run(tmp_path, steps=(1951, 3000), attempt=2, what="resume", step_s=0.75)
    monkeypatch.setattr(run_list, "WHOLE_BYTES", 1 << 30)
    whole = as_json(status(tmp_path))
    monkeypatch.setattr(run_list, "WHOLE_BYTES", 1 << 10)
    ends = as_json(status(tmp_path))
    assert ends.pop("goodput_is_estimate")
    assert not whole.pop("goodput_is_estimate")
    assert ends.pop("goodput") == pytest.approx(whole.pop("goodput"), rel=0.01)
    assert ends == whole


def test_what_is_read_of_a_long_run_does_not_grow_with_it(tmp_path, monkeypatch):
    sizes = []
    original = os.pread

    def counted(fd, length, offset):
        sizes.append(length)
        return original(fd, length, offset)

    read = {}
    for steps in (4_000, 40_000):
        folder = tmp_path / str(steps)
        folder.mkdir()
        text = "".join(
            json.dumps(
                {"kind": "step", "step": step, "attempt": 1, "time": NOW - steps + step, "step_s": 1.0}
            )
            + "\n"
            for step in range(1, steps + 1)
        )
        (folder / "metrics.jsonl").write_text(text)
        monkeypatch.setattr(os, "pread", counted)
        assert status(folder).step == steps
        monkeypatch.undo()
        read[steps], sizes[:] = sum(sizes), []
    assert read[40_000] <= read[4_000] <= 1 << 20


def test_a_step_far_from_the_end_is_found(tmp_path):
    write_run(tmp_path, steps=(1, 3000))
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        for _ in range(3000):
            metrics.write("event", 3000, what="wandb", text="not keeping up", time=NOW)
    assert status(tmp_path).loss == pytest.approx(5 - 3000e-6)


def test_all_runs_below_a_folder_are_found_those_heard_last_first(tmp_path):
    for name, age in (("a", 50), ("sweep/0", 10), ("sweep/1", 90)):
        (tmp_path / name).mkdir(parents=True)
        write_run(tmp_path / name, end_at=NOW - age)
    for hidden in ("a/checkpoints/step-1", "a/wandb/x", ".cache/y"):
        (tmp_path / hidden).mkdir(parents=True)
        write_run(tmp_path / hidden)
    found = list_runs(tmp_path, now=NOW, silent_after_s=300)
    assert [str(run.folder.relative_to(tmp_path)) for run in found] == ["sweep/0", "a", "sweep/1"]


def test_the_folder_may_be_a_run_itself(tmp_path):
    write_run(tmp_path)
    assert [run.folder for run in list_runs(tmp_path, now=NOW, silent_after_s=300)] == [tmp_path]


def test_a_run_that_vanishes_while_it_is_read_is_left_out(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name)
    original = run_list.read_ends

    def vanishing(path: Path):
        if path.parent.name == "a":
            path.unlink()
        return original(path)

    monkeypatch.setattr(run_list, "read_ends", vanishing)
    found = list_runs(tmp_path, now=NOW, silent_after_s=300)
    assert [run.folder.name for run in found] == ["b"]


def test_a_file_that_may_not_be_read_is_listed_with_the_reason(tmp_path):
    (tmp_path / "a").mkdir()
    write_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    record_start(tmp_path / "b", attempt=1)
    (tmp_path / "b/metrics.jsonl").mkdir()  # root may read any file, and nobody a folder
    found = {run.folder.name: run for run in list_runs(tmp_path, now=NOW, silent_after_s=300)}
    assert found["b"].state is State.unreadable
    assert found["b"].note == "metrics.jsonl: Is a directory"
    assert found["a"].state is State.running


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_without_read_permission_is_listed_as_unreadable(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").chmod(0)
    assert status(tmp_path).state is State.unreadable


def test_no_folder_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*/none; give the one that holds your runs"):
        list_runs(tmp_path / "none", now=NOW, silent_after_s=300)


def test_a_folder_that_cannot_be_listed_says_so(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cannot be listed: Permission denied; ask its owner"):
        list_runs(tmp_path, now=NOW, silent_after_s=300)


@pytest.mark.parametrize("text", ["", "train: [", "train: 3\ndata: 4\n", "train:\n  total_tokens: many\n"])
def test_a_damaged_config_only_leaves_the_length_unknown(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    found = status(tmp_path)
    assert (found.step, found.total_steps, found.left_s) == (10, None, None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attempts": 3}', '{"attempts": [3]}'])
def test_a_damaged_run_json_is_passed_over(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(text)
    assert status(tmp_path).state is State.running


def test_only_the_blocks_that_are_needed_are_taken_of_a_config(tmp_path):
    write_config(tmp_path, batch_ramp=[{"until_tokens": 80, "rows": 5}])
    parts = config_parts(tmp_path / "config.yaml")
    whole = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert parts == {"data": whole["data"], "train": whole["train"]}


@pytest.mark.parametrize("ramp", [[], [(100, 5)], [(100, 5), (777, 15), (900, 20)]])
def test_a_runs_length_is_the_trainers_from_every_step(ramp):
    seq_len, rows, total_tokens = 8, 30, 12_345
    stages = [{"until_tokens": tokens, "rows": size} for tokens, size in ramp]
    config = {
        "data": {"seq_len": seq_len},
        "train": {"total_tokens": total_tokens, "global_batch_rows": rows, "batch_ramp": stages},
    }
    sizes = BatchSizes.of([(-(-tokens // seq_len), size) for tokens, size in ramp], rows)
    expected = sizes.walk(0, -(-total_tokens // seq_len))[0]
    position = 0
    for step in range(expected):
        assert total_steps(config, {"step": step, "position": position}) == expected
        position += sizes.rows_at(position)


def test_json_holds_plain_values(tmp_path):
    write_run(tmp_path, ending=[{"what": "finished"}])
    told = json.loads(json.dumps(as_json(status(tmp_path))))
    assert told["state"] == "finished"
    assert told["folder"] == str(tmp_path)
    assert told["left_s"] is None
