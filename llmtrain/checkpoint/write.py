"""A save is one transaction over all ranks: it is there whole, or not at all.

Phase one: every rank writes its file into `.tmp-step-...`, flushes it to the disk, reads it back and compares
hashes; all ranks then exchange their outcome. Phase two, on rank 0: the pieces of every tensor must cover it
exactly once; manifest, marker, rename to the final name, each flushed before the next. A process killed at
any moment leaves a checkpoint that is complete or one that nobody sees.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import xxhash

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import clean, remove, retire
from llmtrain.checkpoint.format import (
    MANIFEST_FILE,
    MARKER_FILE,
    TEMPORARY_PREFIX,
    Piece,
    Row,
    file_name,
    folder_name,
    lay_out,
    manifest,
    marker,
    some,
    to_json,
)
from llmtrain.checkpoint.read import CheckpointReader, check_contents
from llmtrain.errors import CheckpointError
from llmtrain.files import fsync_folder

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Who saves together, and how they talk."""

    rank: int
    world_size: int
    gather: Callable[[object], list[object]]
    """Given a JSON value, returns every rank's, in rank order, on every rank."""


ALONE = Ranks(0, 1, lambda value: [value])


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    ranks: Ranks,
    config: SaveConfig,
) -> Path:
    """Save `step` in `folder` as one transaction over all ranks, and return the checkpoint's path.

    Every rank calls this with the same `step`, and with the pieces that it owns. An older checkpoint of the
    same step is replaced.

    Once the save is committed, checkpoints of earlier steps are deleted but for those that `config` keeps.
    The one just saved was read back before its commit and is never deleted, nor are those of later steps,
    which belong to a future that the run has gone back from.

    Args:
        state: What else a resume needs, as JSON; rank 0's is stored.

    Raises:
        CheckpointError: On every rank when any rank fails (a full disk, pieces that overlap or leave a gap).
            Nothing is left of this save, and the earlier checkpoints are as they were.
    """
    own = [(file_name(ranks.rank), pieces)]
    return _save(folder, step=step, files=own, state=state, ranks=ranks, config=config)


def write_checkpoint(
    folder: Path, *, step: int, files: Iterable[Iterable[Piece]], state: dict[str, Any], config: SaveConfig
) -> Path:
    """As `save_checkpoint`, by one process that writes several files, one after the other.

    Args:
        files: the pieces of each. `values` that lie elsewhere are asked for one by one, as they are written.
    """
    named = [(file_name(at), pieces) for at, pieces in enumerate(files)]
    return _save(folder, step=step, files=named, state=state, ranks=ALONE, config=config)


def _save(
    folder: Path,
    *,
    step: int,
    files: Sequence[tuple[str, Iterable[Piece]]],
    state: dict[str, Any],
    ranks: Ranks,
    config: SaveConfig,
) -> Path:
    temporary = folder / f"{TEMPORARY_PREFIX}{folder_name(step)}"
    final = folder / folder_name(step)

    def agree(work: Callable[[], Result]) -> list[Result]:
        """Do this rank's part and return what every rank returned; raise on all if it failed on any."""
        result, failure, cause = None, "", None
        try:
            result = work()
        except Exception as error:  # raised again below, on every rank
            cause = error
            known = isinstance(error, OSError | CheckpointError)
            failure = str(error) if known else f"{type(error).__name__}: {error}"
        outcomes: list[Any] = ranks.gather({"failure": failure, "result": result})
        failures = [
            f"rank {at}: {outcome['failure']}" for at, outcome in enumerate(outcomes) if outcome["failure"]
        ]
        if failures:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            ranks.gather(None)  # nobody tries again while rank 0 is still removing the folder
            raise CheckpointError(
                f"could not save step {step} in {folder}: {some(failures)}; "
                "the earlier checkpoints there are untouched"
            ) from cause
        return [outcome["result"] for outcome in outcomes]

    def prepare() -> list[int]:
        if ranks.rank == 0:
            to_json(state)
            clean(folder)
            temporary.mkdir(parents=True)
        return [step, ranks.world_size]

    def write() -> list[dict[str, Any]]:
        if len(set(map(tuple, claims))) > 1 or len(claims) != ranks.world_size:
            raise CheckpointError(f"the ranks disagree on [step, world_size]: {some(map(str, claims))}")
        if not temporary.is_dir():
            raise CheckpointError(
                f"{temporary}, which rank 0 has just made, is not there on {socket.gethostname()}; "
                "the run folder must be on a file system that all nodes share"
            )
        return [write_rank_file(temporary / name, list(pieces)) for name, pieces in files]

    def commit() -> None:
        if ranks.rank == 0:
            everything = [file for of_rank in written for file in of_rank]
            _commit(temporary, final, step=step, state=state, written=everything)
            retire(folder, step=step, config=config)

    claims = agree(prepare)
    written = agree(write)
    agree(commit)
    return final


def write_rank_file(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write a rank's file, flush it and read it back.

    Returns:
        Its `file` as the manifest has it, and its `rows` with their hashes, as JSON.
    """
    header, rows = lay_out(pieces)
    header_hash, hashes = xxhash.xxh3_128_hexdigest(header), []
    with open(path, "xb", buffering=0) as handle:
        write_all(handle, memoryview(header))
        for piece in pieces:
            values = np.ascontiguousarray(piece.values, dtype=piece.values.dtype.newbyteorder("<"))
            content = values.view(np.uint8).data
            hashes.append(xxhash.xxh3_128_hexdigest(content))
            write_all(handle, content)
        os.fsync(handle.fileno())
    hashed = list(zip(rows, hashes, strict=True))
    contents = [(row.offset, row.num_bytes, found, str(row)) for row, found in hashed]
    check_contents(path, [(0, len(header), header_hash, "its header"), *contents])
    return {
        "file": {
            "path": path.name,
            "num_bytes": len(header) + sum(row.num_bytes for row in rows),
            "header_bytes": len(header),
            "header_xxh3_128": header_hash,
        },
        "rows": [_plain(row, found) for row, found in hashed],
    }


def _plain(row: Row, xxh3_128: str) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "name": row.name,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "start": row.start,
        "length": row.length,
        "offset": row.offset,
        "xxh3_128": xxh3_128,
    }


def write_all(handle: IO[bytes], content: memoryview) -> None:
    """A raw `write` may take only a part: at most 2 GiB on Linux, less on a disk that is almost full."""
    while content:
        content = content[handle.write(content) :]


def _commit(
    temporary: Path, final: Path, *, step: int, state: dict[str, Any], written: Sequence[Mapping[str, Any]]
) -> None:
    """Make the files in `temporary` the checkpoint `final`."""
    content = manifest(
        step=step,
        state=state,
        files=[each["file"] for each in written],
        tables=[each["rows"] for each in written],
    )
    _write_durably(temporary / MANIFEST_FILE, content)
    fsync_folder(temporary)
    _write_durably(temporary / MARKER_FILE, marker(content))
    fsync_folder(temporary)
    CheckpointReader(temporary)  # every rank's file is visible from here with its full size
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # still counts as committed, until the new one has its name
    temporary.rename(final)
    fsync_folder(final.parent)
    remove(replaced)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "xb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
