"""A save is one transaction over all ranks: it is there whole, or not at all.

Phase one: rank 0 puts UNFINISHED into the step's folder; every rank writes its file there, flushes it to the
disk, reads it back and compares hashes; all ranks then exchange their outcome. Phase two, on rank 0: the
pieces of every tensor must cover it exactly once; manifest, then marker, which is the commit, each flushed
before the next. A process killed at any moment leaves a checkpoint that is complete, or one that does not
count.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np
import xxhash

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import clean, clean_step, retire, token_of
from llmtrain.checkpoint.format import (
    MARKER_FILE,
    UNFINISHED_FILE,
    Piece,
    Row,
    file_name,
    folder_name,
    free_number,
    lay_out,
    manifest,
    manifest_name,
    marker,
    some,
    to_json,
)
from llmtrain.checkpoint.read import check_contents, check_size
from llmtrain.checkpoint.storage import Place
from llmtrain.errors import CheckpointError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Who saves together, and how they talk."""

    rank: int
    world_size: int
    gather: Callable[[object], list[object]]
    """Given a JSON value, returns every rank's, in rank order, on every rank."""
    leader: int = 0
    """The rank that keeps order in the folder that this one sees: where all share one, rank 0; where each
    host has its own, the first rank there. Then each has the whole manifest, and the files of its ranks."""


ALONE = Ranks(0, 1, lambda value: [value])


def save_checkpoint(
    folder: Place,
    *,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    ranks: Ranks,
    config: SaveConfig,
) -> Place:
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
    own = [(ranks.rank, pieces)]
    return _save(folder, step=step, files=own, state=state, ranks=ranks, config=config)


def write_checkpoint(
    folder: Place, *, step: int, files: Iterable[Iterable[Piece]], state: dict[str, Any], config: SaveConfig
) -> Place:
    """As `save_checkpoint`, by one process that writes several files, one after the other.

    Args:
        files: the pieces of each. `values` that lie elsewhere are asked for one by one, as they are written.
    """
    numbered = list(enumerate(files))
    return _save(folder, step=step, files=numbered, state=state, ranks=ALONE, config=config)


def _save(
    folder: Place,
    *,
    step: int,
    files: Sequence[tuple[int, Iterable[Piece]]],
    state: dict[str, Any],
    ranks: Ranks,
    config: SaveConfig,
) -> Place:
    final = folder / folder_name(step)
    is_leader = ranks.rank == ranks.leader
    token = secrets.token_hex(8)

    def agree(work: Callable[[], Result]) -> list[Result]:
        """Do this rank's part and return what every rank returned; raise on all if it failed on any."""
        result, failure, cause = None, None, None
        try:
            result = work()
        except Exception as error:  # raised again below, on every rank
            cause = error
            known = isinstance(error, OSError | CheckpointError)
            failure = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        outcomes: list[Any] = ranks.gather({"failure": failure, "result": result})
        failures = [
            f"rank {at}: {outcome['failure']}"
            for at, outcome in enumerate(outcomes)
            if outcome["failure"] is not None
        ]
        if failures:
            if is_leader:
                clean_step(final, token=token)
            ranks.gather(None)  # nobody tries again while others are still deleting
            raise CheckpointError(
                f"could not save step {step} in {folder}: {some(failures)}; "
                "the earlier checkpoints there are untouched"
            ) from cause
        return [outcome["result"] for outcome in outcomes]

    def prepare() -> _Claim:
        own = _Claim(
            step=step, world_size=ranks.world_size, leader=ranks.leader, number=0, token="", state={}
        )
        if ranks.rank == 0:
            to_json(state)
            own["state"] = state
        if is_leader:
            is_new = not storage.names(folder)
            clean(folder)
            own |= {"number": free_number(storage.names(final)), "token": token}
            storage.put(final / UNFINISHED_FILE, token.encode())
            storage.flush(folder)  # the step's name outlives a power cut before an older step goes
            if is_new:
                with suppress(PermissionError):  # a folder that one may pass and not list
                    storage.flush(folder.parent)
        return own

    def write() -> list[dict[str, Any]]:
        told = [[claim["step"], claim["world_size"]] for claim in claims]
        if told != [[step, ranks.world_size]] * ranks.world_size:
            raise CheckpointError(f"the ranks disagree on [step, world_size]: {some(map(str, told))}")
        if token_of(final) != claims[ranks.leader]["token"]:
            raise CheckpointError(
                f"{final / UNFINISHED_FILE}, which rank {ranks.leader} has just written, is not there on "
                f"{socket.gethostname()}; all nodes must share the folder of the checkpoints"
            )
        number = max(claim["number"] for claim in claims)
        return [write_rank_file(final / file_name(at, number), list(pieces)) for at, pieces in files]

    def commit() -> None:
        if not is_leader:
            return
        everything = [file for of_rank in written for file in of_rank]
        if token_of(final) != token:
            raise CheckpointError(f"another run saves in {folder}, too; give each its own save.folder")
        for claim, of_rank in zip(claims, written, strict=True):
            for file in of_rank if claim["leader"] == ranks.rank else ():
                check_size(final / file["file"]["path"], file["file"]["num_bytes"])  # it is visible from here
        content = manifest(
            step=step,
            state=claims[0]["state"],
            files=[file["file"] for file in everything],
            tables=[file["rows"] for file in everything],
        )
        name = manifest_name(max(claim["number"] for claim in claims))
        storage.write(final / name, lambda: [memoryview(content)])
        storage.flush(final)
        storage.put(final / MARKER_FILE, marker(content, name))

    claims = agree(prepare)
    written = agree(write)
    agree(commit)
    if is_leader:
        clean_step(final)
        retire(folder, step=step, config=config)
    return final


class _Claim(TypedDict):
    """What a rank thinks it saves; a leader's number tells the files of this save from older ones."""

    step: int
    world_size: int
    leader: int
    number: int
    token: str
    """In UNFINISHED: who sees another is on another file system, or not alone."""
    state: dict[str, Any]


def write_rank_file(path: Place, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write a rank's file, flush it and read it back.

    Returns:
        Its `file` as the manifest has it, and its `rows` with their hashes, as JSON.
    """
    header, rows = lay_out(pieces)
    header_hash = xxhash.xxh3_128_hexdigest(header)
    hashes: list[str] = []

    def chunks() -> Iterator[memoryview]:
        hashes.clear()
        yield memoryview(header)
        for piece in pieces:
            values = np.ascontiguousarray(piece.values, dtype=piece.values.dtype.newbyteorder("<"))
            content = values.view(np.uint8).data
            hashes.append(xxhash.xxh3_128_hexdigest(content))
            yield content

    storage.write(path, chunks)
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
