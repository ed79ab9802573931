"""Files that appear whole or not at all, their hashes, and folders that only one process may write.

A write goes to a temporary name beside its target, is flushed to the disk, and is then renamed. A process
killed at any moment leaves either the old file or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llmtrain.errors import LaunchError

log = logging.getLogger(__name__)

HASH_BLOCK_BYTES = 1 << 20

LOCK_FILE = ".lock"


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_beside(path: Path) -> Path:
    """A name for a file that becomes `path`, which no other writer takes: on a shared file system, one on
    another machine may have this process's id and the same file to write."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an error, else vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON, atomically."""
    with atomic_write(path, "w") as handle:
        json.dump(value, handle, indent=1, sort_keys=True, ensure_ascii=False)
        handle.write("\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """A config dataclass as dicts, lists, numbers and strings; an enum becomes its member's name, as a user
    types it."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces. The input of every config hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes a user may still write on the file system that holds `path` or its nearest existing parent."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


class FolderLock:
    """The right to write in a folder, held by one process at a time: `with FolderLock(folder): ...`.

    The lock is the kernel's (`flock` on `.lock` inside the folder), so it ends with its holder, however that
    dies; the text in the file only says who it was, and a leftover file blocks nobody. A process forked by
    the holder does not hold it, so a worker that outlives a killed run does not block the next one. On a file
    system without locks the folder is not guarded, and a warning says so.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock at once, or raise LaunchError that names the holder. Creates a missing folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 4096, 0).decode(errors="replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning("%s is not guarded against a second writer: %s", self.path.parent, error)
                return
            raise LaunchError(
                f"{self.path.parent} is being written by {holder or 'another process'}; "
                "wait for it, stop it, or choose another folder"
            ) from None
        os.ftruncate(fd, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        command = " ".join(Path(part).name if at == 0 else part for at, part in enumerate(sys.argv[:2]))
        os.pwrite(
            fd, f"pid {os.getpid()} on {socket.gethostname()} since {started} ({command})\n".encode(), 0
        )
        self._fd = fd
        itself = weakref.ref(self)

        def release_in_child() -> None:
            held = itself()
            if held is not None:
                held.release()  # closes the child's copy; the lock stays with the parent's

        os.register_at_fork(after_in_child=release_in_child)

    def release(self) -> None:
        """Give the lock back. Does nothing when it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every leaf of nested dictionaries."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
