"""Beats are read whole or not at all, whoever wrote them last; a black box outlives its process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.tracking import black_box
from llmtrain.tracking.beats import (
    BLOCK_BYTES,
    Beat,
    Collective,
    Group,
    beat_path,
    own_start,
    process_state,
    read_beat,
    read_beats,
    this_machine,
    write_beat,
)
from llmtrain.tracking.black_box import KEPT, BlackBox, box_path, with_box

CALL = Collective(7, "0", 5, "all_reduce", 128, None, 3, 2, "backward", "returned")


def beat_of(rank: int = 0, **changes: object) -> Beat:
    beat = Beat(
        token="now",
        attempt=1,
        rank=rank,
        world_size=2,
        host="node0",
        machine=this_machine(),
        pid=os.getpid(),
        born=own_start(),
        work="",
        alive=1,
        every_s=1.0,
        step=3,
        micro_step=2,
        phase="backward",
        age_s=0.5,
        num_marks=9,
        position=16,
        num_rows=8,
        num_collectives=7,
        waiting=CALL,
        waiting_s=0.4,
        num_steps=2,
        seconds={"forward": 1.5},
        waited={"forward": 0.25},
        is_exact=True,
        groups={"0": Group(2, 5, "world", [0, 1])},
        last=[CALL],
    )
    return replace(beat, **changes)  # type: ignore[arg-type]


def test_a_beat_comes_back_as_it_was(tmp_path: Path) -> None:
    beat = beat_of(stacks=[("main thread", ["a.py:1 in f: x"])], address=("10.0.0.1", 5), reached={"1": True})
    write_beat(beat_path(tmp_path, 0), beat)
    assert read_beat(beat_path(tmp_path, 0), token="now") == beat
    assert beat_path(tmp_path, 0).stat().st_size == BLOCK_BYTES


def test_a_shorter_beat_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    path = beat_path(tmp_path, 0)
    write_beat(path, beat_of(stacks=[("main thread", ["x" * 3 * BLOCK_BYTES])]))
    inode = path.stat().st_ino
    write_beat(path, beat_of())
    assert read_beat(path) == beat_of()
    assert path.stat().st_ino == inode, "a file of another machine's cache would be read"


def test_a_torn_beat_is_none_and_a_whole_one_is_waited_for(tmp_path: Path) -> None:
    path = beat_path(tmp_path, 0)
    write_beat(path, beat_of())
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert read_beat(path) is None
    path.write_bytes(json.dumps({"token": "now"}).encode())
    assert read_beat(path) is None, "no beat"


def test_beats_of_another_launch_are_not_read(tmp_path: Path) -> None:
    for rank, token in ((0, "now"), (1, "before")):
        write_beat(beat_path(tmp_path, rank), beat_of(rank, token=token))
    assert list(read_beats(tmp_path, range(3), token="now")) == [0]


def test_the_state_of_a_process_is_seen() -> None:
    assert process_state(os.getpid()) == ("R", own_start())
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        state = process_state(child)
        assert state is not None
        assert state[0] == "T"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert process_state(child) is None


def _write_and_die(folder: Path) -> None:
    box = BlackBox(folder, 1, pid=os.getpid(), born=own_start())
    box.note_rows(24, 8)
    for number in range(1, KEPT + 10):
        call = Collective(number, "dp", number, "all_reduce", 2 * number, None, 4, 1, "forward", "waits")
        box.note_call(call)
        box.note_state(number, "returned")
    box.note_call(Collective(number + 1, "dp", number + 1, "send", 5, 0, 4, 2, "exchange", "waits"))
    box.note_place(4, 2, "exchange", time.monotonic_ns())
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not black_box.MEMORY.exists(), reason="no /dev/shm")
def test_a_black_box_tells_what_a_killed_process_did_last(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    state = process_state(process.pid)
    assert state is not None
    process.join()
    known = beat_of(1, pid=process.pid, born=state[1], groups={"dp": Group(2, 3, "dp")})
    found = with_box(known, tmp_path)
    assert (found.step, found.micro_step, found.phase, found.position) == (4, 2, "exchange", 24)
    assert len(found.last) == KEPT
    assert [call.number for call in found.last] == list(range(11, KEPT + 11))
    assert found.waiting == found.last[-1]
    assert (found.last[-1].kind, found.last[-1].peer) == ("send", 0)
    assert found.last[-2].state == "returned"
    assert found.groups["dp"].num_issued == KEPT + 10
    assert found.age_s < 60
    other = replace(known, born=known.born + 1)
    assert with_box(other, tmp_path) == other, "the box of another process"
    box_path(tmp_path, 1).unlink()
    assert with_box(known, tmp_path) == known


def test_a_box_without_shared_memory_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(black_box, "MEMORY", tmp_path / "absent")
    box = BlackBox(tmp_path, 0, pid=1, born=2)
    box.note_place(1, 0, "data", 0)
    box.note_call(CALL)
    assert box.path is None
    box.remove()
