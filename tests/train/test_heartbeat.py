"""A rank's beat: what it was at, which collectives it joined, where its seconds went."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from llmtrain.tracking import black_box
from llmtrain.tracking.beats import beat_path, read_beat
from llmtrain.tracking.black_box import box_path
from llmtrain.train.collectives import METHODS, flight_record, keep_flight_record
from llmtrain.train.heartbeat import Heartbeat, no_mark, stacks


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Black boxes in the test's own folder."""
    monkeypatch.setattr(black_box, "MEMORY", tmp_path)


def heartbeat_in(folder: Path, **changes: Any) -> Heartbeat:
    settings = {"token": "t", "attempt": 2, "rank": 0, "world_size": 2, "every_s": 0.05}
    return Heartbeat(folder, **settings | changes)


def test_marks_say_where_the_main_thread_is(tmp_path: Path) -> None:
    with heartbeat_in(tmp_path) as heartbeat:
        assert heartbeat.beat().at == "step 0, start_up"
        heartbeat.begin_step(7, position=48, num_rows=8)
        heartbeat.mark("forward", micro_step=2)
        heartbeat.write()
        beat = read_beat(beat_path(tmp_path, 0), token="t")
        assert beat is not None
        assert beat.at == "step 7, micro-step 2, forward"
        assert (beat.position, beat.num_rows, beat.attempt, beat.pid) == (48, 8, 2, os.getpid())
        assert heartbeat.num_marks == 2
    after = read_beat(beat_path(tmp_path, 0))
    assert after is not None
    assert after.end == "well"
    assert not box_path(tmp_path, 0).exists()


def test_the_thread_beats_while_the_main_thread_does_not(tmp_path: Path) -> None:
    with heartbeat_in(tmp_path):
        first = read_beat(beat_path(tmp_path, 0))
        assert first is not None
        limit = time.monotonic() + 30
        while read_beat(beat_path(tmp_path, 0)).alive < first.alive + 3:  # type: ignore[union-attr]
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_seconds_are_of_whole_steps_by_phase(tmp_path: Path) -> None:
    heartbeat = heartbeat_in(tmp_path)
    for step in (1, 2, 3):
        heartbeat.begin_step(step, position=0, num_rows=1)
        heartbeat.mark("forward")
        time.sleep(0.02)
        heartbeat.mark("record")
    beat = heartbeat.beat()
    assert beat.num_steps == 2, "the third is not over"
    assert 0.04 <= beat.seconds["forward"] < 1.0
    assert beat.waited["forward"] == 0
    assert heartbeat.longest_s("forward") is not None
    assert heartbeat.longest_s("evaluate") is None


def test_the_first_time_of_a_phase_is_no_measure(tmp_path: Path) -> None:
    heartbeat = heartbeat_in(tmp_path)
    heartbeat.mark("forward")
    time.sleep(0.2)
    for phase in ("backward", "forward", "backward"):
        heartbeat.mark(phase)  # type: ignore[arg-type]
    longest = heartbeat.longest_s("forward")
    assert longest is not None
    assert longest < 0.2


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ranks").write_text("a file")
    with caplog.at_level(logging.WARNING), heartbeat_in(tmp_path / "ranks") as heartbeat:
        heartbeat.write()
        heartbeat.write()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "a hang will be harder to explain, and training goes on" in told[0]


def test_the_first_word_about_the_end_holds(tmp_path: Path) -> None:
    with heartbeat_in(tmp_path) as heartbeat:
        heartbeat.note_end("error", "ValueError: 7", ["a.py:1 in f: g()"])
    beat = read_beat(beat_path(tmp_path, 0))
    assert beat is not None
    assert (beat.end, beat.error, beat.stacks) == (
        "error",
        "ValueError: 7",
        [("main thread", ["a.py:1 in f: g()"])],
    )
    assert not box_path(tmp_path, 0).exists(), "the beat has it all"


def test_stacks_name_threads_and_lines(tmp_path: Path) -> None:
    release = threading.Event()
    waiting = threading.Thread(target=release.wait, name="waits here")
    waiting.start()
    found: list[Any] = []
    main = threading.get_ident()
    looking = threading.Thread(target=lambda: found.extend(stacks(main)))
    looking.start()
    looking.join()
    release.set()
    waiting.join()
    assert found[0][0] == "main thread"
    assert "looking." in "\n".join(found[0][1])
    assert "waits here" in [name for name, _ in found]
    no_mark("forward")


def test_collectives_are_heard_and_then_no_more(tmp_path: Path) -> None:
    before = {name: vars(dist.ProcessGroup)[name] for name in METHODS}
    wait = dist.distributed_c10d.Work.wait
    with heartbeat_in(tmp_path):
        assert all(vars(dist.ProcessGroup)[name] is not before[name] for name in METHODS)
    assert {name: vars(dist.ProcessGroup)[name] for name in METHODS} == before
    assert dist.distributed_c10d.Work.wait is wait


def test_an_error_of_a_collective_is_told_from_ones_own(tmp_path: Path) -> None:
    heard = heartbeat_in(tmp_path).collectives
    assert heard.is_cause_of(dist.DistBackendError("lost"))
    assert heard.is_cause_of(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"))
    outer = ValueError("no batch")
    outer.__cause__ = RuntimeError("NCCL communicator was aborted on rank 0")
    assert heard.is_cause_of(outer)
    assert not heard.is_cause_of(ValueError("gloo is a word of mine"))
    assert not heard.is_cause_of(RuntimeError("shapes do not match"))


def test_the_flight_recorder_is_asked_for_unless_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        monkeypatch.delenv(name, raising=False)
    keep_flight_record()
    assert os.environ.pop("TORCH_FR_BUFFER_SIZE") == "2000"
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "5")
    keep_flight_record()
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert isinstance(flight_record("gloo"), bytes)
