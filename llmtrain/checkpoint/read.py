"""Any range of any tensor of a checkpoint, whoever wrote it."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from llmtrain.checkpoint.format import FORMAT_VERSION, MANIFEST_FILE, MARKER_FILE, marker, some
from llmtrain.errors import CheckpointError, unknown_name
from llmtrain.units import format_bytes

HASH_BLOCK_BYTES = 1 << 20


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
        self._headers = [(file["header_bytes"], file["header_xxh3_128"]) for file in manifest["files"]]
        self._sizes: list[int] = [file["num_bytes"] for file in manifest["files"]]
        self.num_bytes = sum(self._sizes)
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
        for file, expected in zip(self._files, self._sizes, strict=True):
            _check_size(file, expected)

    def _open_manifest(self) -> dict[str, Any]:
        expected = _read_bytes(self.path / MARKER_FILE)
        content = _read_bytes(self.path / MANIFEST_FILE)
        self.manifest_hash = hashlib.sha256(content).hexdigest()
        if expected != marker(content):
            raise CheckpointError(
                f"{self.path / MANIFEST_FILE} has sha256 {self.manifest_hash}, "
                f"but {MARKER_FILE} beside it says "
                f"{expected[:100].decode(errors='replace').strip()!r}: one of the two is damaged"
            )
        manifest: dict[str, Any] = json.loads(content)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path} has checkpoint format_version={version}, and this llmtrain reads "
                f"{FORMAT_VERSION}; read it with the llmtrain that wrote it"
            )
        return manifest

    def num_elements(self, kind: str) -> int:
        """Of all tensors of a kind."""
        return sum(math.prod(tensor.shape) for tensor in self._tensors.get(kind, {}).values())

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
            raise CheckpointError(f"{self.path} does not fit the model: {some(problems)}")

    def read(self, kind: str, name: str) -> np.ndarray[Any, Any]:
        """Return the whole logical tensor, in its shape."""
        shape = self._tensor(kind, name).shape
        return self.read_flat(kind, name, 0, math.prod(shape)).reshape(shape)

    def read_flat(self, kind: str, name: str, start: int, length: int) -> np.ndarray[Any, Any]:
        """Return `length` elements from `start` of the flattened tensor, from whatever pieces hold them."""
        values = np.empty(max(0, length), dtype=self._tensor(kind, name).dtype)
        self._fill(kind, name, start, length, values)
        return values

    def read_into(self, kind: str, name: str, start: int, into: np.ndarray[Any, Any]) -> None:
        """Fill the 1-D `into` with elements from `start` of the flattened tensor: a FlatSource."""
        if into.dtype == self._tensor(kind, name).dtype and into.flags.c_contiguous:
            self._fill(kind, name, start, into.size, into)
        else:
            into[:] = self.read_flat(kind, name, start, into.size)

    def _fill(self, kind: str, name: str, start: int, length: int, values: np.ndarray[Any, Any]) -> None:
        tensor = self._tensor(kind, name)
        if not 0 <= start <= start + length <= math.prod(tensor.shape):
            raise CheckpointError(
                f"{self.path}: elements {start} to {start + length} asked of {kind} {name}, "
                f"which has shape {list(tensor.shape)} of {math.prod(tensor.shape)} elements"
            )
        first = max(0, bisect.bisect_right(tensor.stored, start, key=lambda stored: stored.start) - 1)
        for stored in tensor.stored[first:]:
            if stored.start >= start + length:
                break
            begin, end = max(start, stored.start), min(start + length, stored.start + stored.length)
            if begin >= end:
                continue
            into = values[begin - start : end - start].view(np.uint8).data
            path = self._files[stored.file]
            at = stored.offset + (begin - stored.start) * tensor.dtype.itemsize
            with _open(path) as handle:
                if end - begin < stored.length:
                    _read_into(handle, path, at, into)
                    continue
                found = _read_and_hash(handle, path, at, into)
            _check_hash(path, at, found, stored.xxh3_128, f"{kind} {name}[{begin}:{end}]")

    def verify(self) -> None:
        """Compare every byte with its hash. CheckpointError names the file, the tensor and both hashes."""
        for at in range(len(self._files)):
            for problem in self.problems_of(at):
                raise CheckpointError(problem)

    def files(self) -> list[tuple[Path, int, int]]:
        """Path, bytes and number of pieces of every rank's file."""
        sizes = zip(self._files, self._sizes, self._contents, strict=True)
        return [(path, num_bytes, len(rows) - 1) for path, num_bytes, rows in sizes]

    def problems_of(self, file: int) -> Iterator[str]:
        """A sentence for every damaged piece of a file, which is read as a whole."""
        return damage(self._files[file], self._contents[file])

    @cached_property
    def _contents(self) -> list[list[tuple[int, int, str, str]]]:
        """Of each file (offset, bytes, xxh3_128, what), by offset; the first is its header."""
        found = [[(0, num_bytes, xxh3_128, "its header")] for num_bytes, xxh3_128 in self._headers]
        for kind, by_name in self._tensors.items():
            for name, tensor in by_name.items():
                for stored in tensor.stored:
                    what = f"{kind} {name}[{stored.start}:{stored.start + stored.length}]"
                    num_bytes = stored.length * tensor.dtype.itemsize
                    found[stored.file].append((stored.offset, num_bytes, stored.xxh3_128, what))
        return [sorted(rows) for rows in found]

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Of every tensor of a kind, by name."""
        return {name: tensor.shape for name, tensor in self._tensors.get(kind, {}).items()}

    def _tensor(self, kind: str, name: str) -> _Tensor:
        if kind not in self._tensors:
            raise CheckpointError(f"{self.path}: {unknown_name('kind of tensor', kind, self.kinds)}")
        if name not in self._tensors[kind]:
            raise CheckpointError(f"{self.path}: {unknown_name(f'{kind} tensor', name, self._tensors[kind])}")
        return self._tensors[kind][name]


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


def _read_and_hash(handle: IO[bytes], path: Path, offset: int, into: memoryview) -> str:
    """xxh3_128 of what is read: in blocks, which the processor's caches still hold when they are hashed."""
    digest = xxhash.xxh3_128()
    for at in range(0, into.nbytes, HASH_BLOCK_BYTES):
        part = into[at : at + HASH_BLOCK_BYTES]
        _read_into(handle, path, offset + at, part)
        digest.update(part)
    return digest.hexdigest()


def check_contents(path: Path, rows: Sequence[tuple[int, int, str, str]]) -> None:
    """Compare a file with its (offset, bytes, xxh3_128, what) rows."""
    for problem in damage(path, rows):
        raise CheckpointError(problem)


def damage(path: Path, rows: Sequence[tuple[int, int, str, str]]) -> Iterator[str]:
    """A sentence for each of the (offset, bytes, xxh3_128, what) rows that the file does not hold."""
    block = memoryview(bytearray(HASH_BLOCK_BYTES))
    with _open(path) as handle:
        for offset, num_bytes, expected, what in rows:
            end = offset + num_bytes
            digest = xxhash.xxh3_128()
            for at in range(offset, end, HASH_BLOCK_BYTES):
                part = block[: min(HASH_BLOCK_BYTES, end - at)]
                _read_into(handle, path, at, part)
                digest.update(part)
            found = digest.hexdigest()
            if found != expected:
                yield _damaged(path, offset, found, expected, what)


def _check_hash(path: Path, offset: int, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise CheckpointError(_damaged(path, offset, found, expected, what))


def _damaged(path: Path, offset: int, found: str, expected: str, what: str) -> str:
    return f"{path} is damaged: {what} at byte {offset} has xxh3_128 {found}, the manifest says {expected}"
