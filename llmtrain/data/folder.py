"""A data folder: its parts, and the files that say that a unit of work is done.

Such a file holds what the unit counted, and the sizes of the files that it wrote. When it cannot be read, or
one of those files is gone or cut, the unit counts as not done, so running again mends what was deleted or
lost. Changed bytes of the same size are left to `manifest.verify`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.data.manifest import MANIFEST_NAME, TABLE_PREFIX
from llmtrain.errors import DataError, LaunchError
from llmtrain.files import LOCK_FILE, FolderLock, atomic_write, free_bytes, hash_json, read_json

PARTS = (
    "docs", "documents", "index", "lines", "matches", "ngrams", "packs", "quarantine", "shards", "signals",
    "signatures", "tokenizer", "verdicts",
)  # fmt: skip
"""Folders that a run makes. What else lies in a data folder is somebody else's."""
LISTINGS = (MANIFEST_NAME, "documents.json", "facts.json", "input.json", "report.html")
"""Files that it makes beside them."""
KEY_LETTERS = 16
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def key_of(**parts: Any) -> str:
    """Name of a folder: the hash of everything that decides what goes into it."""
    return hash_json(parts)[:KEY_LETTERS]


def write_done(done: Path, summary: dict[str, Any], files: Iterable[Path]) -> None:
    """Say that a unit is done. Its last act: the files must be in place."""
    sizes = {os.path.relpath(path, done.parent): path.stat().st_size for path in files}
    with atomic_write(done, "w") as handle:
        handle.write(json.dumps({**summary, "file_bytes": sizes}, sort_keys=True))


def read_done(done: Path) -> dict[str, Any] | None:
    """The summary of a unit, or None when it is to be done, or done again."""
    try:
        summary: dict[str, Any] = read_json(done)
        for name, num_bytes in summary.pop("file_bytes").items():
            if (done.parent / name).stat().st_size != num_bytes:
                return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return summary


def is_output(out: Path, path: Path) -> bool:
    """Whether `path` is what a run into `out` writes."""
    try:
        inside = path.resolve().relative_to(out.resolve())
    except ValueError:
        return False
    return inside.parts[0] in (*PARTS, *LISTINGS, LOCK_FILE) or inside.parts[0].startswith(TABLE_PREFIX)


def remove_leftovers(out: Path) -> None:
    """Delete the temporary files of writers that were killed. The folder is ours while the lock is."""
    for part in PARTS:
        for path in (out / part).rglob(".*.tmp-*"):
            path.unlink(missing_ok=True)
    for pattern in (*(f".{name}.tmp-*" for name in LISTINGS), ".engine-*.tmp-probe"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else writes into `out` meanwhile.

    Raises:
        LaunchError: somebody does. DataError: it cannot be written at all.
    """
    lock = FolderLock(out)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, LaunchError) or error.errno in DISK_FULL:
            raise
        raise DataError(f"out={out} cannot be written: {error.strerror}; give another out=FOLDER") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_full_explained(out: Path) -> Iterator[None]:
    """Say what to do when the disk is full, or cannot be written any more."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise DataError(
                f"out={out} cannot be written any more: {error}; mount it for writing again, or give another "
                "out=FOLDER. The same command then goes on where it was"
            ) from error
        if error.errno not in DISK_FULL:
            raise
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        raise DataError(
            f"no space left for {out}: {written:,} bytes written, {free_bytes(out):,} bytes free on its "
            "file system. Free some, or give another out=FOLDER; the same command then goes on where it was"
        ) from error
