"""Folder locks: one writer, and no lock that outlives its holder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.errors import LaunchError
from llmtrain.files import LOCK_FILE, FolderLock, temporary_beside

HOLD = """
import sys, time
from pathlib import Path
from llmtrain.files import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_writer_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(LaunchError) as caught:
        FolderLock(tmp_path).acquire()
    assert re.search(
        rf"{re.escape(str(tmp_path))} is being written by pid {os.getpid()} on {socket.gethostname()} since "
        r"\d{4}-\d\d-\d\d .*; wait for it, stop it, or choose another folder",
        str(caught.value),
    )


def test_lock_is_free_again_after_the_block_and_after_release(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"):
        pass
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    lock.release()
    lock.release()
    with FolderLock(tmp_path / "run"):
        pass


def test_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match=rf"pid {holder.pid} on "):
            FolderLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert f"pid {holder.pid}" in (tmp_path / LOCK_FILE).read_text()
    with FolderLock(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()


def test_forked_worker_that_outlives_a_killed_holder_blocks_nobody(tmp_path: Path) -> None:
    # os.write: two processes share the pipe, and print may write a line in pieces
    tell = 'import os; os.fork()\n    os.write(1, b"held %d\\n" % os.getpid())'
    fork_first = HOLD.replace('print("held", flush=True)', tell)
    holder = subprocess.Popen(
        [sys.executable, "-c", fork_first, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder.stdout:
        pids = {int(holder.stdout.readline().split()[1]) for _ in range(2)}
        with pytest.raises(LaunchError, match=rf"pid {holder.pid} on "):
            FolderLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
        (worker,) = pids - {holder.pid}
        try:
            with FolderLock(tmp_path):
                os.kill(worker, 0)  # it lives
        finally:
            os.kill(worker, signal.SIGKILL)


def test_file_system_without_locks_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), FolderLock(tmp_path):
        pass
    assert f"{tmp_path} is not guarded against a second writer: [Errno {errno.ENOLCK}]" in caplog.text


def test_two_writers_of_one_file_take_two_temporary_names(tmp_path: Path) -> None:
    names = {temporary_beside(tmp_path / "x.bin").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(f".x.bin.tmp-{os.getpid()}-") for name in names)
