"""Any range of any tensor of a checkpoint, whoever wrote it."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.format import FORMAT_VERSION, MARKER, MARKER_FILE, STEP_NAME, some
from llmtrain.checkpoint.storage import Place, Ranges
from llmtrain.errors import CheckpointError, unknown_name
from llmtrain.units import format_bytes


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

    def __init__(self, path: Place, *, elsewhere: Mapping[str, Place] | None = None) -> None:
        """
        Args:
            elsewhere: where those of its files are, by name, that do not lie in `path`.

        Raises:
            CheckpointError: no checkpoint there, or one whose marker, manifest or sizes are wrong.
        """
        self.path = path
        manifest = self._open_manifest()
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = manifest["state"]
        self._files: list[Place] = [
            (elsewhere or {}).get(file["path"], path / file["path"]) for file in manifest["files"]
        ]
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
            check_size(file, expected)

    def _open_manifest(self) -> dict[str, Any]:
        marker = self.path / MARKER_FILE
        told = storage.read_bytes(marker)
        match = MARKER.fullmatch(told)
        if match is None:
            raise CheckpointError(
                f"{marker} is damaged: it must be a sha256 and the name of a manifest, and is {told[:100]!r}"
            )
        expected, self._manifest_name = match[1].decode(), match[2].decode()
        path = self.path / self._manifest_name
        content = storage.read_bytes(path)
        self.manifest_hash = hashlib.sha256(content).hexdigest()
        if expected != self.manifest_hash:
            raise CheckpointError(
                f"{path} has sha256 {self.manifest_hash}, and {MARKER_FILE} beside it says {expected}: one "
                "of the two is damaged"
            )
        manifest: dict[str, Any] = json.loads(content)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path} has checkpoint format_version={version}, and this llmtrain reads "
                f"{FORMAT_VERSION}; read it with the llmtrain that wrote it"
            )
        named = STEP_NAME.fullmatch(self.path.name)
        if named and int(named[1]) != manifest["step"]:
            raise CheckpointError(
                f"{self.path} is the checkpoint of step {manifest['step']}; give it its own name back"
            )
        return manifest

    @property
    def own_names(self) -> set[str]:
        """Of all its files."""
        return {MARKER_FILE, self._manifest_name, *(file.name for file in self._files)}

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
            with storage.open_ranges(path) as ranges:
                if end - begin < stored.length:
                    _read_into(ranges, path, at, into)
                    continue
                found = _read_and_hash(ranges, path, at, into)
            _check_hash(path, at, found, stored.xxh3_128, f"{kind} {name}[{begin}:{end}]")

    def verify(self) -> None:
        """Compare every byte with its hash. CheckpointError names the file, the tensor and both hashes."""
        for at in range(len(self._files)):
            for problem in self.problems_of(at):
                raise CheckpointError(problem)

    def files(self) -> list[tuple[Place, int, int]]:
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


def check_size(path: Place, num_bytes: int) -> None:
    """Raise CheckpointError unless the file is there with so many bytes."""
    found = storage.num_bytes(path)
    if found != num_bytes:
        raise CheckpointError(
            f"{path} has {found} bytes ({format_bytes(found)}), "
            f"the manifest says {num_bytes} ({format_bytes(num_bytes)})"
        )


def _read_into(ranges: Ranges, path: Place, offset: int, into: memoryview) -> None:
    done = ranges.read_into(offset, into)
    if done < into.nbytes:
        raise CheckpointError(
            f"{path} ends at byte {offset + done}, and {into.nbytes - done} more are needed"
        )


def _read_and_hash(ranges: Ranges, path: Place, offset: int, into: memoryview) -> str:
    """xxh3_128 of what is read."""
    digest = xxhash.xxh3_128()
    for at in range(0, into.nbytes, ranges.block_bytes):
        part = into[at : at + ranges.block_bytes]
        _read_into(ranges, path, offset + at, part)
        digest.update(part)
    return digest.hexdigest()


def check_contents(path: Place, rows: Sequence[tuple[int, int, str, str]]) -> None:
    """Compare a file with its (offset, bytes, xxh3_128, what) rows."""
    for problem in damage(path, rows):
        raise CheckpointError(problem)


def damage(path: Place, rows: Sequence[tuple[int, int, str, str]]) -> Iterator[str]:
    """A sentence for each of the (offset, bytes, xxh3_128, what) rows that the file does not hold."""
    with storage.open_ranges(path) as ranges:
        block = memoryview(bytearray(ranges.block_bytes))
        for offset, num_bytes, expected, what in rows:
            end = offset + num_bytes
            digest = xxhash.xxh3_128()
            for at in range(offset, end, ranges.block_bytes):
                part = block[: min(ranges.block_bytes, end - at)]
                _read_into(ranges, path, at, part)
                digest.update(part)
            found = digest.hexdigest()
            if found != expected:
                yield _damaged(path, offset, found, expected, what)


def _check_hash(path: Place, offset: int, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise CheckpointError(_damaged(path, offset, found, expected, what))


def _damaged(path: Place, offset: int, found: str, expected: str, what: str) -> str:
    return f"{path} is damaged: {what} at byte {offset} has xxh3_128 {found}, the manifest says {expected}"
