"""Checkpoints: layout-free tensors on disk, saved as one transaction over all ranks.

A checkpoint is a set of logical tensors, each named by (kind, canonical parameter name). A rank hands over
the pieces it owns, as ranges of the flattened logical tensor, and any other layout reads any range back;
nothing on disk knows of dp, tp, pp or ZeRO. `docs/checkpoint_format.md` has the bytes.

    checkpoints/step-00000120/
        rank-00000.bin ...   pieces back to back, little-endian
        manifest.json        state, shapes, dtypes; file, offset and xxh3_128 of every piece
        COMMITTED            sha256 of manifest.json

A save is a two-phase commit. Phase one: every rank writes its file into `.tmp-step-...`, flushes it to the
disk, reads it back and compares hashes; all ranks then exchange their outcome. Phase two, on rank 0: the
pieces of every tensor must cover it exactly once; manifest, marker, rename to the final name, each flushed
before the next. A process killed at any moment leaves a checkpoint that is complete or one that nobody
sees.

Contents are hashed by xxh3_128, and sha256 guards only the manifest, which holds those hashes: sha256 runs at
1.2 GB/s a core where xxh3_128 runs at 14 (measured on a Xeon with SHA extensions), slower than one NVMe disk
writes. Both find damage; neither is meant against an attacker, who could rewrite the marker too.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import xxhash

from llmtrain.errors import CheckpointError, ConfigError, unknown_name
from llmtrain.files import fsync_folder
from llmtrain.units import format_bytes

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"

_STEP_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_TEMPORARY_PREFIX = ".tmp-"
_READ_BLOCK_BYTES = 4 << 20
_MAX_LISTED = 4
"""Ranks or tensors that a message names before it only counts the rest."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """A range of one logical tensor, owned by one rank."""

    kind: str
    """What it is to the run: weight, exp_avg, exp_avg_sq."""
    name: str
    """Canonical parameter name, equal in every layout."""
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    start: int
    """Where `values` begins in the flattened (row-major) logical tensor."""
    values: np.ndarray[Any, Any]
    """1-D. May be empty: that says only that the tensor exists."""


FlatSource = Callable[[str, str, int, int], np.ndarray[Any, Any]]
"""(kind, parameter name, start, length) -> that part of the flattened logical tensor."""


@dataclass(frozen=True)
class _Stored:
    """Where a piece lies: `length` elements from `start` of its tensor, at byte `offset` of file `file`."""

    file: int
    offset: int
    start: int
    length: int
    xxh3_128: str


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: list[_Stored]
    """Ascending by start; together they are the whole tensor."""


# --- saving


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    gather: Callable[[object], list[object]],
    keep: int,
) -> Path:
    """Save `step` in `folder` as one transaction over all ranks, and return the checkpoint's path.

    Every rank calls this with the same `step`, and with the pieces that it owns. Each piece is written as
    the iterable yields it, so one tensor at a time has to exist on the CPU; the iterable is always run to
    its end, also after a failed write, so it may hold collectives of its own. An older checkpoint of the
    same step is replaced.

    Once the save is committed, checkpoints of earlier steps are deleted but for the newest `keep - 1`. The
    one just saved was read back before its commit and is never deleted, nor are those of later steps, which
    belong to a future that the run has gone back from.

    Args:
        state: What else a resume needs, as JSON; rank 0's is stored.
        barrier: Returns when every rank has called it.
        gather: Given a JSON value, returns every rank's, in rank order, on every rank.

    Raises:
        CheckpointError: On every rank when any rank fails (a full disk, pieces that overlap or leave a gap).
            Nothing is left of this save, and the earlier checkpoints are as they were.
    """
    if keep < 1:
        raise ConfigError(f"keep={keep} must be at least 1: the checkpoint just saved is always kept")
    temporary = folder / f"{_TEMPORARY_PREFIX}{_folder_name(step)}"
    final = folder / _folder_name(step)

    def agree(work: Callable[[], Result]) -> list[Result]:
        """Do this rank's part and return what every rank returned; raise on all if it failed on any."""
        result, failure, cause = None, "", None
        try:
            result = work()
        except Exception as error:  # raised again below, on every rank
            cause = error
            known = isinstance(error, OSError | CheckpointError)
            failure = str(error) if known else f"{type(error).__name__}: {error}"
        outcomes: list[Any] = gather({"failure": failure, "result": result})
        failures = [
            f"rank {at}: {outcome['failure']}" for at, outcome in enumerate(outcomes) if outcome["failure"]
        ]
        if failures:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            barrier()  # nobody tries again while rank 0 is still removing the folder
            raise CheckpointError(
                f"could not save step {step} in {folder}: {_some(failures)}; "
                "the earlier checkpoints there are untouched"
            ) from cause
        return [outcome["result"] for outcome in outcomes]

    def prepare() -> list[int]:
        if rank == 0:
            _to_json(state)
            _clean(folder)
            temporary.mkdir(parents=True)
        return [step, world_size]

    def write() -> dict[str, Any]:
        if len(set(map(tuple, claims))) > 1 or len(claims) != world_size:
            raise CheckpointError(f"the ranks disagree on [step, world_size]: {_some(map(str, claims))}")
        return _write_pieces(temporary, rank, pieces)

    def commit() -> None:
        if rank == 0:
            _commit(temporary, final, step=step, state=state, tables=tables)
            _retire(folder, step=step, keep=keep)

    claims = agree(prepare)
    tables = agree(write)
    agree(commit)
    return final


def _write_pieces(temporary: Path, rank: int, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write this rank's file, flush it and read it back. Returns its table, as JSON."""
    path = temporary / _file_name(rank)
    remaining = iter(pieces)
    rows: list[dict[str, Any]] = []
    offset = 0
    try:
        if not temporary.is_dir():
            raise CheckpointError(
                f"{temporary}, which rank 0 has just made, is not there on {socket.gethostname()}; "
                "the run folder must be on a file system that all nodes share"
            )
        with open(path, "xb", buffering=0) as handle:
            for piece in remaining:
                values = _checked_values(piece)
                content = values.view(np.uint8).data
                _write_all(handle, content)
                rows.append(
                    {
                        "kind": piece.kind,
                        "name": piece.name,
                        "shape": list(piece.shape),
                        "dtype": values.dtype.str,
                        "start": piece.start,
                        "length": values.size,
                        "offset": offset,
                        "xxh3_128": xxhash.xxh3_128_hexdigest(content),
                    }
                )
                offset += content.nbytes
            os.fsync(handle.fileno())
    except Exception:
        for _ in remaining:  # the other ranks may be waiting for this one in a collective of the iterable
            pass
        raise
    _check_contents(
        path, [(row["offset"], row["length"], row["dtype"], row["xxh3_128"], _range(row)) for row in rows]
    )
    return {"num_bytes": offset, "rows": rows}


def _write_all(handle: IO[bytes], content: memoryview) -> None:
    """A raw `write` may take only a part: at most 2 GiB on Linux, less on a disk that is almost full."""
    while content:
        content = content[handle.write(content) :]


def _checked_values(piece: Piece) -> np.ndarray[Any, Any]:
    """The piece's values as contiguous little-endian numbers."""
    what = f"{piece.kind} {piece.name}"
    num_elements = math.prod(piece.shape)
    if piece.values.ndim != 1 or piece.values.dtype.kind not in "fiub":
        raise CheckpointError(
            f"a piece of {what} is a {piece.values.ndim}-D array of {piece.values.dtype}; need 1-D numbers"
        )
    if not 0 <= piece.start <= piece.start + piece.values.size <= num_elements:
        raise CheckpointError(
            f"a piece of {what} is elements {piece.start} to {piece.start + piece.values.size}, "
            f"outside its shape {list(piece.shape)} of {num_elements} elements"
        )
    return np.ascontiguousarray(piece.values, dtype=piece.values.dtype.newbyteorder("<"))


def _commit(
    temporary: Path, final: Path, *, step: int, state: dict[str, Any], tables: Sequence[dict[str, Any]]
) -> None:
    """Make the files in `temporary` the checkpoint `final`."""
    files = [{"path": _file_name(rank), "num_bytes": table["num_bytes"]} for rank, table in enumerate(tables)]
    manifest = {
        "format": "llmtrain checkpoint",
        "format_version": FORMAT_VERSION,
        "step": step,
        "state": state,
        "files": files,
        "tensors": _tile(tables),
    }
    content = _to_json(manifest)
    _write_durably(temporary / MANIFEST_FILE, content)
    fsync_folder(temporary)
    _write_durably(temporary / MARKER_FILE, _marker(content))
    fsync_folder(temporary)
    CheckpointReader(temporary)  # every rank's file is visible from here with its full size
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # still counts as committed, until the new one has its name
    temporary.rename(final)
    fsync_folder(final.parent)
    _remove(replaced)


def _tile(tables: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return kind → name → {shape, dtype, pieces by start}, checked: each tensor is covered exactly once."""
    tensors: dict[str, dict[str, Any]] = {}
    shapes: dict[str, list[int]] = {}
    for file, table in enumerate(tables):
        for row in table["rows"]:
            what = f"{row['kind']} {row['name']}"
            if shapes.setdefault(row["name"], row["shape"]) != row["shape"]:
                raise CheckpointError(
                    f"{what} has shape {row['shape']} and {shapes[row['name']]} in different pieces"
                )
            fresh = {"shape": row["shape"], "dtype": row["dtype"], "pieces": []}
            tensor = tensors.setdefault(row["kind"], {}).setdefault(row["name"], fresh)
            if tensor["dtype"] != row["dtype"]:
                raise CheckpointError(
                    f"{what} has dtype {row['dtype']} and {tensor['dtype']} in different pieces"
                )
            if row["length"]:
                stored = {key: row[key] for key in ("offset", "start", "length", "xxh3_128")}
                tensor["pieces"].append({"file": file, **stored})
    for kind, by_name in tensors.items():
        for name, tensor in by_name.items():
            tensor["pieces"].sort(key=lambda piece: piece["start"])
            num_elements = math.prod(tensor["shape"])
            end = 0
            for piece in [*tensor["pieces"], {"start": num_elements, "length": 0, "file": None}]:
                if piece["start"] > end:
                    raise CheckpointError(
                        f"no rank holds elements {end} to {piece['start']} of {kind} {name}"
                    )
                if piece["start"] < end:
                    raise CheckpointError(
                        f"more than one piece holds element {piece['start']} of {kind} {name}; "
                        f"the second is of rank {piece['file']}"
                    )
                end = piece["start"] + piece["length"]
    return tensors


def _retire(folder: Path, *, step: int, keep: int) -> None:
    """Delete the checkpoints before `step` but for the newest `keep - 1`."""
    earlier = [older for older in list_checkpoints(folder) if older < step]
    for older in earlier[: max(0, len(earlier) - (keep - 1))]:
        _remove(checkpoint_path(folder, older))


def _remove(checkpoint: Path) -> None:
    """Delete a folder that nothing needs any more: unseen first, so that no half of it is ever found."""
    doomed = checkpoint.with_name(f"{_TEMPORARY_PREFIX}retired-{checkpoint.name}")
    try:
        if checkpoint.exists():
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        log.warning("could not delete the old checkpoint %s: %s", checkpoint, error)


def _clean(folder: Path) -> None:
    """Remove what saves that were killed have left behind."""
    for leftover in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        log.info("removing %s, left by a save that was cut off", leftover)
        shutil.rmtree(leftover)
    for replaced in folder.glob("step-*.replaced"):
        if (replaced.with_suffix("") / MARKER_FILE).exists():
            _remove(replaced)


def _to_json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of the run cannot be written as JSON: {error}") from error


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "xb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


# --- finding


def list_checkpoints(folder: Path) -> list[int]:
    """Return the committed steps in `folder`, ascending. A folder that does not exist holds none."""
    return sorted(step for step, path in _step_folders(folder).items() if (path / MARKER_FILE).exists())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the committed checkpoint of `step`; CheckpointError lists the steps there are."""
    steps = list_checkpoints(folder)
    if step not in steps:
        there = f"it holds {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; {there}")
    return _step_folders(folder)[step]


def newest_checkpoint(folder: Path, *, verify: bool = True) -> Path | None:
    """Return the newest checkpoint in `folder` that is whole, or None if there never was one.

    A damaged one is logged as an error and the next older is tried. With `verify=False` only its marker,
    manifest and file sizes are checked, not its contents.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    failures: list[str] = []
    for _, path in sorted(_step_folders(folder).items(), reverse=True):
        try:
            reader = CheckpointReader(path)
            if verify:
                reader.verify()
        except CheckpointError as error:
            log.error("not using a damaged checkpoint: %s", error)
            failures.append(str(error))
        else:
            return path
    if failures:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged: {_some(failures)}; restore one from a copy, "
            "or start a fresh run in another folder"
        )
    return None


def _step_folders(folder: Path) -> dict[int, Path]:
    """Step → its folder. One set aside by a replacement counts only while the new one is not there."""
    if not folder.is_dir():
        return {}
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # "step-N" sorts before "step-N.replaced"
        if match := _STEP_NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), path)
    return found


# --- reading


class CheckpointReader:
    """A committed checkpoint: its state, and any range of any of its tensors.

    Opening it checks the marker, the manifest and the sizes of the files; `verify` also hashes their
    contents. A read that covers a whole piece compares its hash on the way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = self._open_manifest()
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = manifest["state"]
        self._files: list[Path] = [path / file["path"] for file in manifest["files"]]
        self.num_bytes: int = sum(file["num_bytes"] for file in manifest["files"])
        self._tensors = {
            kind: {
                name: _Tensor(
                    shape=tuple(tensor["shape"]),
                    dtype=np.dtype(tensor["dtype"]),
                    stored=[_Stored(**piece) for piece in tensor["pieces"]],
                )
                for name, tensor in by_name.items()
            }
            for kind, by_name in manifest["tensors"].items()
        }
        self.kinds: list[str] = sorted(self._tensors)
        self.tensors: dict[str, tuple[int, ...]] = {
            name: tensor.shape for by_name in self._tensors.values() for name, tensor in by_name.items()
        }
        """Name → logical shape, of every parameter that any kind holds."""
        for file, expected in zip(self._files, manifest["files"], strict=True):
            _check_size(file, expected["num_bytes"])

    def _open_manifest(self) -> dict[str, Any]:
        marker = _read_bytes(self.path / MARKER_FILE)
        content = _read_bytes(self.path / MANIFEST_FILE)
        if marker != _marker(content):
            raise CheckpointError(
                f"{self.path / MANIFEST_FILE} has sha256 {hashlib.sha256(content).hexdigest()}, "
                f"but {MARKER_FILE} beside it says "
                f"{marker[:100].decode(errors='replace').strip()!r}: one of the two is damaged"
            )
        manifest: dict[str, Any] = json.loads(content)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path} has checkpoint format_version={version}, and this llmtrain reads "
                f"{FORMAT_VERSION}; read it with the llmtrain that wrote it"
            )
        return manifest

    def dtype(self, kind: str, name: str) -> np.dtype[Any]:
        """Type of the stored numbers, little-endian."""
        return self._tensor(kind, name).dtype

    def require(self, shapes: Mapping[str, Sequence[int]], *, kinds: Iterable[str]) -> None:
        """Raise CheckpointError unless each of `kinds` holds exactly these parameters with these shapes."""
        problems: list[str] = []
        for kind in kinds:
            there = self._tensors.get(kind, {})
            problems += [f"{kind} {name} is missing" for name in shapes if name not in there]
            problems += [f"{kind} {name} is not part of this model" for name in there if name not in shapes]
            problems += [
                f"{kind} {name} has shape {list(there[name].shape)}, the model needs {list(shape)}"
                for name, shape in shapes.items()
                if name in there and there[name].shape != tuple(shape)
            ]
        if problems:
            raise CheckpointError(f"{self.path} does not fit the model: {_some(problems)}")

    def read(self, kind: str, name: str) -> np.ndarray[Any, Any]:
        """Return the whole logical tensor, in its shape."""
        shape = self._tensor(kind, name).shape
        return self.read_flat(kind, name, 0, math.prod(shape)).reshape(shape)

    def read_flat(self, kind: str, name: str, start: int, length: int) -> np.ndarray[Any, Any]:
        """Return `length` elements from `start` of the flattened tensor, from whatever pieces hold them."""
        tensor = self._tensor(kind, name)
        if not 0 <= start <= start + length <= math.prod(tensor.shape):
            raise CheckpointError(
                f"{self.path}: elements {start} to {start + length} asked of {kind} {name}, "
                f"which has shape {list(tensor.shape)} of {math.prod(tensor.shape)} elements"
            )
        values = np.empty(length, dtype=tensor.dtype)
        first = max(0, bisect.bisect_right(tensor.stored, start, key=lambda stored: stored.start) - 1)
        for stored in tensor.stored[first:]:
            if stored.start >= start + length:
                break
            begin, end = max(start, stored.start), min(start + length, stored.start + stored.length)
            if begin >= end:
                continue
            into = values[begin - start : end - start].view(np.uint8).data
            path = self._files[stored.file]
            with _open(path) as handle:
                _read_into(handle, path, stored.offset + (begin - stored.start) * tensor.dtype.itemsize, into)
            if end - begin == stored.length:
                what = f"{kind} {name}[{begin}:{end}]"
                _check_hash(path, stored.offset, xxhash.xxh3_128_hexdigest(into), stored.xxh3_128, what)
        return values

    def verify(self) -> None:
        """Compare every byte with its hash. CheckpointError names the file, the tensor and both hashes."""
        by_file: list[list[tuple[int, int, str, str, str]]] = [[] for _ in self._files]
        for kind, by_name in self._tensors.items():
            for name, tensor in by_name.items():
                for stored in tensor.stored:
                    what = f"{kind} {name}[{stored.start}:{stored.start + stored.length}]"
                    row = (stored.offset, stored.length, tensor.dtype.str, stored.xxh3_128, what)
                    by_file[stored.file].append(row)
        for path, rows in zip(self._files, by_file, strict=True):
            _check_contents(path, sorted(rows))

    def _tensor(self, kind: str, name: str) -> _Tensor:
        if kind not in self._tensors:
            raise CheckpointError(f"{self.path}: {unknown_name('kind of tensor', kind, self.kinds)}")
        if name not in self._tensors[kind]:
            raise CheckpointError(f"{self.path}: {unknown_name(f'{kind} tensor', name, self._tensors[kind])}")
        return self._tensors[kind][name]


# --- bytes


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.bin"


def _marker(manifest: bytes) -> bytes:
    """In the form that `sha256sum --check COMMITTED` reads."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_FILE}\n".encode()


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['kind']} {row['name']}[{row['start']}:{row['start'] + row['length']}]"


def _some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    listed = list(items)
    more = f"; and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
    return "; ".join(listed[:_MAX_LISTED]) + more


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb", buffering=0) as handle:
            yield handle
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_bytes(path: Path) -> bytes:
    with _open(path) as handle:
        return handle.read()


def _check_size(path: Path, num_bytes: int) -> None:
    with _open(path) as handle:  # opening, unlike stat, makes NFS ask the server
        found = os.fstat(handle.fileno()).st_size
    if found != num_bytes:
        raise CheckpointError(
            f"{path} has {found} bytes ({format_bytes(found)}), "
            f"the manifest says {num_bytes} ({format_bytes(num_bytes)})"
        )


def _read_into(handle: IO[bytes], path: Path, offset: int, into: memoryview) -> None:
    done = 0
    while done < into.nbytes:
        num_read = os.preadv(handle.fileno(), [into[done:]], offset + done)
        if num_read == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + done}, and {into.nbytes - done} more are needed"
            )
        done += num_read


def _check_contents(path: Path, rows: Sequence[tuple[int, int, str, str, str]]) -> None:
    """Compare a file with its (offset, length, dtype, xxh3_128, what) rows."""
    block = memoryview(bytearray(_READ_BLOCK_BYTES))
    with _open(path) as handle:
        for offset, length, dtype, expected, what in rows:
            end = offset + length * np.dtype(dtype).itemsize
            digest = xxhash.xxh3_128()
            for at in range(offset, end, _READ_BLOCK_BYTES):
                part = block[: min(_READ_BLOCK_BYTES, end - at)]
                _read_into(handle, path, at, part)
                digest.update(part)
            _check_hash(path, offset, digest.hexdigest(), expected, what)


def _check_hash(path: Path, offset: int, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: {what} at byte {offset} has xxh3_128 {found}, the manifest says {expected}"
        )
