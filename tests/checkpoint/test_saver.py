"""Saving in the background: what is on the disk is what was handed over, errors reach the caller, one save is
under way."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import list_checkpoints
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.write import ALONE, Ranks
from llmtrain.errors import CheckpointError

WEIGHTS = {"w": (40, 30), "b": (7,)}


def pieces(values: dict[str, np.ndarray]) -> list[Piece]:
    """Views of `values`, which training goes on to change."""
    return [Piece("weight", name, array.shape, 0, array.reshape(-1)) for name, array in values.items()]


def filled(number: float) -> dict[str, np.ndarray]:
    return {name: np.full(shape, number, np.float32) for name, shape in WEIGHTS.items()}


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        write_all = storage.write_all

        def wait_and_write(handle: Any, content: memoryview) -> None:
            self.reached.set()
            assert self.opened.wait(timeout=20)
            write_all(handle, content)

        monkeypatch.setattr(storage, "write_all", wait_and_write)


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, ALONE, SaveConfig())
    values = filled(1.0)
    saver.save(1, pieces(values), {"position": 8})
    assert gate.reached.wait(timeout=20)
    assert (list_checkpoints(tmp_path), saver.take_saved()) == ([], [])
    for array in values.values():
        array += 1  # the next step
    gate.opened.set()
    saver.finish()
    reader = CheckpointReader(tmp_path / "step-00000001")
    assert reader.state == {"position": 8}
    for name, array in filled(1.0).items():
        assert np.array_equal(reader.read("weight", name), array)
    (saved,) = saver.take_saved()
    assert saved.step == 1
    assert saved.save_s > saved.copy_s + saved.wait_s
    assert saver.take_saved() == []


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, ALONE, SaveConfig(keep_last=9))
    saver.save(1, pieces(filled(1.0)), {})
    second = threading.Thread(target=saver.save, args=(2, pieces(filled(2.0)), {}))
    second.start()
    second.join(timeout=0.3)
    assert second.is_alive()
    gate.opened.set()
    second.join(timeout=20)
    saver.finish()
    assert list_checkpoints(tmp_path) == [1, 2]
    first, last = saver.take_saved()
    assert (first.step, last.step) == (1, 2)
    assert last.wait_s > 0.2
    assert CheckpointReader(tmp_path / "step-00000002").read("weight", "b").tolist() == [2.0] * 7


def test_saves_share_a_buffer_and_not_their_numbers(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, SaveConfig(keep_last=9))
    for step in range(1, 6):
        saver.save(step, pieces(filled(step)), {})
    saver.finish()
    for step in range(1, 6):
        reader = CheckpointReader(tmp_path / f"step-{step:08d}")
        reader.verify()
        assert (reader.read("weight", "w") == step).all()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(handle: object, content: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_all", no_space)


@pytest.mark.parametrize("at", ["the next save", "the end"])
def test_a_failure_in_the_background_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    full_disk(monkeypatch)
    saver = Saver(tmp_path, ALONE, SaveConfig())
    saver.save(1, pieces(filled(1.0)), {})
    with pytest.raises(CheckpointError, match=r"could not save step 1 in .* No space left on device"):
        saver.finish() if at == "the end" else saver.save(2, pieces(filled(2.0)), {})
    assert saver.failure is not None
    saver.leave()  # quiet: another error is being told
    assert list_checkpoints(tmp_path) == []


def test_without_a_background_a_save_is_on_the_disk_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, ALONE, SaveConfig(in_background=False))
    saver.save(3, pieces(filled(1.0)), {})
    assert list_checkpoints(tmp_path) == [3]
    (saved,) = saver.take_saved()
    assert saved.copy_s == pytest.approx(saved.save_s, abs=0.05), "training waited for all of it"
    full_disk(monkeypatch)
    with pytest.raises(CheckpointError, match="could not save step 4"):
        saver.save(4, pieces(filled(1.0)), {})


def test_an_error_that_is_no_disk_error_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: object, content: memoryview) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(storage, "write_all", broken)
    saver = Saver(tmp_path, ALONE, SaveConfig())
    saver.save(1, pieces(filled(1.0)), {})
    with pytest.raises(CheckpointError, match="rank 0: RuntimeError: a bug"):
        saver.finish()


def test_ranks_that_are_gone_are_an_error_of_the_save(tmp_path: Path) -> None:
    def gone(value: object) -> list[object]:
        raise RuntimeError("connection closed by peer")

    saver = Saver(tmp_path, Ranks(0, 2, gone), SaveConfig())
    saver.save(7, pieces(filled(1.0)), {})
    with pytest.raises(CheckpointError, match="could not save step 7: RuntimeError: connection closed"):
        saver.finish()


def test_a_save_that_does_not_end_does_not_keep_the_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, ALONE, SaveConfig(exit_wait_s=0.2))
    saver.save(4, pieces(filled(1.0)), {})
    with pytest.raises(CheckpointError, match=r"the save step 4 is not over after save.exit_wait_s=0.2 s"):
        saver.finish()
    gate.opened.set()


def test_memory_for_copies_is_there_before_the_first_save(tmp_path: Path) -> None:
    asked: list[int] = []

    def allocate(num_bytes: int) -> np.ndarray[Any, Any]:
        asked.append(num_bytes)
        return np.empty(num_bytes, np.uint8)

    saver = Saver(tmp_path, ALONE, SaveConfig(), allocate=allocate)
    saver.reserve(pieces(filled(1.0)))
    for step in (1, 2):
        saver.save(step, pieces(filled(1.0)), {})
    saver.finish()
    assert asked == [4800 + 64], "each piece begins at a multiple of 64 bytes"


def test_no_memory_for_copies_is_told_with_the_way_out(tmp_path: Path) -> None:
    def allocate(num_bytes: int) -> np.ndarray[Any, Any]:
        raise MemoryError("planted")

    saver = Saver(tmp_path, ALONE, SaveConfig(), allocate=allocate)
    saver.reserve(pieces(filled(1.0)))
    with pytest.raises(
        CheckpointError,
        match=r"no 4.75 KiB of host memory for copies .* MemoryError: planted; save.in_background",
    ):
        saver.finish()
