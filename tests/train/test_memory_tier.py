"""Snapshots in memory: what a process that was killed leaves to the one that takes its place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from data_folder import train_arguments, wait_for, write_data_folder

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import list_checkpoints
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.peers import PeerFileSystem, Server
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.write import ALONE, save_checkpoint
from llmtrain.errors import EXIT_FAILED, CheckpointError
from llmtrain.tracking.metrics import read_lines
from llmtrain.train.deadline import EXIT_AGAIN
from llmtrain.train.memory_tier import MemoryTier, folder_in

if TYPE_CHECKING:
    from conftest import Launcher, Run

ENDLESS = ("train.total_tokens=2000000", "data.max_epochs=999", "train.eval_every_steps=0")
EVERY = 4


def lines(folder: Path, kind: str, attempt: int) -> list[dict]:
    path = folder / "metrics.jsonl"
    found = read_lines(path) if path.exists() else []
    return [line for line in found if line["kind"] == kind and line["attempt"] == attempt]


def losses(folder: Path, attempt: int) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder, "step", attempt)}


def arguments_of(data: Path, folder: Path, memory: Path, *more: str) -> list[str]:
    memory.mkdir(exist_ok=True)
    settings = ("run.intent=fresh_or_resume", "save.every_steps=100000")
    in_memory = (f"save.memory_every_steps={EVERY}", f"save.memory_folder={memory}")
    return train_arguments(data, folder, *ENDLESS, *settings, *in_memory, *more)


def run_past(
    launcher: Launcher, arguments: Sequence[str], folder: Path, *, attempt: int, steps: int,
    num_ranks: int = 2, own: Callable[[int], Sequence[str]] = lambda rank: (), victim: int = 1,
) -> Run:  # fmt: skip
    """Kill one rank once so many steps of the attempt are done; the other must leave by itself."""
    run = launcher.start(arguments, num_ranks=num_ranks, own=own)

    def is_past() -> bool:
        assert all(process.is_alive() for process in run.processes), run.text()
        return len(losses(folder, attempt)) >= steps

    wait_for(is_past)
    run.processes[victim].kill()
    for process in run.processes:
        process.join(timeout=30)
        assert not process.is_alive(), run.text()
    return run


@pytest.fixture(scope="module")
def reference(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of two ranks that nobody killed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    arguments = train_arguments(
        data, folder, *ENDLESS, "save.every_steps=100000", "train.global_batch_rows=8"
    )
    run = launcher.start(arguments, num_ranks=2)
    wait_for(lambda: len(losses(folder, 1)) > 60)
    run.processes[0].terminate()
    assert run.wait() == EXIT_AGAIN, run.text()
    return losses(folder, 1)


@pytest.mark.slow
def test_a_run_goes_on_from_the_memory_of_a_killed_rank(
    launcher: Launcher, data: Path, tmp_path: Path, reference: dict[int, float]
) -> None:
    folder, memory = tmp_path / "run", tmp_path / "memory"
    arguments = arguments_of(data, folder, memory)
    run_past(launcher, arguments, folder, attempt=1, steps=11)
    assert list_checkpoints(folder / "checkpoints") == []
    saved = [line["step"] for line in lines(folder, "event", 1) if line["what"] == "snapshot"]
    assert saved[0] == EVERY
    text = run_past(launcher, arguments, folder, attempt=2, steps=7, victim=0).text()
    assert "going on from the snapshot in memory, newer than nothing" in text
    first = min(losses(folder, 2))
    assert first > EVERY
    assert first % EVERY == 1, "it went on right after a snapshot"
    text = run_past(launcher, arguments, folder, attempt=3, steps=3).text()
    assert "going on from the snapshot in memory" in text
    assert min(losses(folder, 3)) > first
    for attempt in (1, 2, 3):
        for step, loss in losses(folder, attempt).items():
            assert loss == reference[step], f"attempt {attempt}, step {step}"
    status, text = launcher.run([*arguments, f"train.total_tokens={8 * 32 * 60}"], num_ranks=2)
    assert status == 0, text
    assert list(memory.iterdir()) == [], "an end by itself leaves nothing in memory"


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.zero_stage=3",
        pytest.param("parallel.zero_stage=1", marks=pytest.mark.slow),
        pytest.param("parallel.tp_size=2", marks=pytest.mark.slow),
    ],
)
def test_hosts_that_see_only_their_own_memory_read_from_each_other(
    launcher: Launcher, data: Path, tmp_path: Path, layout: str
) -> None:
    folder = tmp_path / "run"
    arguments = arguments_of(data, folder, tmp_path / "memory", layout)

    def own(rank: int) -> list[str]:
        (tmp_path / f"memory-{rank}").mkdir(exist_ok=True)
        return [f"save.memory_folder={tmp_path}/memory-{rank}"]

    run_past(launcher, arguments, folder, attempt=1, steps=14, own=own)
    for rank in (0, 1):
        files = {path.name for path in (tmp_path / f"memory-{rank}").glob("*/step-*/rank-*")}
        assert files == {f"rank-{rank:05d}.safetensors"}
    text = run_past(launcher, arguments, folder, attempt=2, steps=7, own=own).text()
    assert "going on from the snapshot in memory" in text
    first, second = losses(folder, 1), losses(folder, 2)
    both = first.keys() & second.keys()
    assert both, "no step was done twice, so nothing is compared"
    assert {step: first[step] for step in both} == {step: second[step] for step in both}


@pytest.mark.parametrize("fault", ["damaged", "another attempt's"])
def test_a_snapshot_that_is_damaged_or_not_of_the_attempt_before_is_not_used(
    launcher: Launcher, data: Path, tmp_path: Path, fault: str
) -> None:
    folder, memory = tmp_path / "run", tmp_path / "memory"
    arguments = arguments_of(data, folder, memory, "save.every_steps=30", "save.memory_every_steps=1")
    run_past(launcher, arguments, folder, attempt=1, steps=40, num_ranks=1, victim=0)
    saved = list_checkpoints(folder / "checkpoints")[-1]
    (own,) = memory.iterdir()
    assert list_checkpoints(own)[-1] > saved, "the disk is as new: nothing to choose"
    if fault == "damaged":
        file = own / f"step-{list_checkpoints(own)[-1]:08d}" / "rank-00000.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        message = f"not using the snapshot in memory: {file} is damaged: "
    else:
        facts = json.loads((folder / "run.json").read_text())
        facts["attempts"][-1]["id"] = "0" * 16  # as if an attempt elsewhere had come between
        (folder / "run.json").write_text(json.dumps(facts))
        message = f"not the last attempt of {folder} left it"
    text = run_past(launcher, arguments, folder, attempt=2, steps=1, num_ranks=1, victim=0).text()
    assert message in text
    assert f"resumed from {folder}/checkpoints/step-{saved:08d}" in text


def test_a_stop_right_after_a_start_from_memory_puts_it_on_the_disk(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    """What memory alone has is not left to memory."""
    folder, memory = tmp_path / "run", tmp_path / "memory"
    arguments = arguments_of(data, folder, memory)
    run_past(launcher, arguments, folder, attempt=1, steps=10, num_ranks=1, victim=0)
    (own,) = memory.iterdir()
    step = list_checkpoints(own)[-1]  # killed before an older one was deleted, it has two
    # fewer tokens than the snapshot has seen: over before the first step, as after an early stop signal
    status, text = launcher.run([*arguments, f"train.total_tokens={8 * 32 * (step - 1)}"])
    assert status == 0, text
    assert list_checkpoints(folder / "checkpoints") == [step]
    assert not own.exists()


@pytest.mark.parametrize("what", ["another setting", "other data"])
def test_a_snapshot_that_does_not_fit_the_settings_is_an_error_and_stays(
    launcher: Launcher, data: Path, tmp_path: Path, what: str
) -> None:
    folder, memory = tmp_path / "run", tmp_path / "memory"
    arguments = arguments_of(data, folder, memory)
    run_past(launcher, arguments, folder, attempt=1, steps=10, num_ranks=1, victim=0)
    changed = "model.num_layers=3"
    if what == "other data":
        other = write_data_folder(tmp_path / "other", seed=1)
        changed = f"data.folder={other}"
    status, text = launcher.run([*arguments, changed])
    assert status == EXIT_FAILED, text
    assert "is newer than the disk, and" in text
    (own,) = memory.iterdir()
    assert list_checkpoints(own) != []


def test_a_folder_in_memory_that_others_may_open_is_refused(tmp_path: Path) -> None:
    own = folder_in(tmp_path, Path("runs/mine"))
    assert folder_in(tmp_path, Path("runs/mine")) == own
    own.chmod(0o777)
    with pytest.raises(PermissionError, match="no folder that you alone may open"):
        folder_in(tmp_path, Path("runs/mine"))
    own.rmdir()
    (tmp_path / "victim").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "victim")
    with pytest.raises(PermissionError, match="no folder that you alone may open"):
        folder_in(tmp_path, Path("runs/mine"))


def test_of_snapshots_the_newest_after_the_disk_is_taken_and_the_others_go(tmp_path: Path) -> None:
    own = folder_in(tmp_path, Path("runs/mine"))
    piece = Piece("weight", "w", (3,), 0, np.arange(3, dtype=np.float32))

    def tier_with(*steps: int) -> MemoryTier:
        for step in steps:
            keep = SaveConfig(keep_last=9)
            save_checkpoint(own, step=step, pieces=[piece], state={}, ranks=ALONE, config=keep)
        return MemoryTier(own, rank=0, gather=lambda value: [value])

    def newest(tier: MemoryTier, after: int) -> int | None:
        with ExitStack() as stack:
            found = tier.newest(after=after, is_ours=lambda reader: True, stack=stack)
            return None if found is None else found.open().step

    assert newest(tier_with(3, 5), after=4) == 5
    assert list_checkpoints(own) == [5]
    assert newest(tier_with(), after=5) is None
    assert list_checkpoints(own) == [], "a disk that is as new makes it worthless"
    assert newest(tier_with(), after=0) is None


def test_a_snapshot_that_fails_is_the_last_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = storage.write

    def full(place: Path, chunks: Any) -> None:
        if "memory" in str(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(place, chunks)

    monkeypatch.setattr(storage, "write", full)
    saver = Saver(tmp_path / "disk", ALONE, SaveConfig(), memory=(tmp_path / "memory", ALONE))
    piece = Piece("weight", "w", (3,), 0, np.arange(3, dtype=np.float32))
    saver.save(1, [piece], {}, in_memory=True)
    saver.save(2, [piece], {}, in_memory=True)  # due while the first is failing
    saver.finish()
    assert saver.memory is None
    assert saver.has_memory
    assert "no more snapshots in memory: could not save step 1" in caplog.text
    saver.save(2, [piece], {})
    saver.finish()
    assert [saved.step for saved in saver.take_saved()] == [2]
    assert list_checkpoints(tmp_path / "disk") == [2]


def test_only_who_has_the_key_reads_and_only_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(b"0123456789")
    (tmp_path / "secret").write_bytes(b"secret")
    server = Server(tmp_path / "served", host="127.0.0.1", key=b"right")
    with closing(server), pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "FIRST_PAUSE_S", 0.0)
        patch.setattr(PeerFileSystem, "key", b"wrong")
        with pytest.raises(CheckpointError, match="AuthenticationError"):
            storage.read_bytes(server.url / "file")
        patch.setattr(PeerFileSystem, "key", b"right")
        assert storage.read_bytes(server.url / "file") == b"0123456789"
        into = bytearray(4)
        with storage.open_ranges(server.url / "file") as ranges:
            assert ranges.read_into(3, memoryview(into)) == 4
        assert into == b"3456"
        assert storage.num_bytes(server.url / "file") == 10
        with socket.create_connection(server.url.text.removeprefix("peer://").split(":")):  # says nothing
            assert storage.num_bytes(server.url / "file") == 10
        for name in ("../secret", "nowhere"):
            with pytest.raises(CheckpointError, match="cannot be read: No such file"):
                storage.read_bytes(server.url / name)


def test_too_little_memory_is_told_and_the_run_goes_on_without(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(memory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    try:
        folder = tmp_path / "run"
        arguments = train_arguments(data, folder, "save.memory_every_steps=3", f"save.memory_folder={memory}")
        status, text = launcher.run(arguments)
        assert status == 0, text
        assert "no snapshots in memory: " in text
        assert "bytes free, and two snapshots take" in text
        assert list_checkpoints(folder / "checkpoints")[-1] == 12
    finally:
        subprocess.run(["umount", str(memory)], check=True)
