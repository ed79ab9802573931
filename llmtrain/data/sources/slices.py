"""Pieces of the input: slices of files, units of slices, and what comes out of a slice.

Every slice is hashed as it is read, so that a file's hash costs no second reading. The hash of a file is the
sum (modulo 2**128) of xxh3-128 of its chunks, each seeded with its place: slices add up to the same sum
however the file was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from llmtrain.data.document import Record

HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of one file."""

    path: str
    """Where to read it: a path or a URL."""
    name: str
    """What lineage calls it, and document ids are made of."""
    source: str
    start: int
    """First byte or row; lines that begin before it belong to the slice before. Of a data set that is
    streamed: number of the shard."""
    end: int
    """Byte or row to stop at, excluded."""
    num_bytes: int
    """Input bytes, for progress and balance."""
    version: str | None = None
    """What told the state of the file when it was listed; None: nothing to compare with."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one call of the scan reads."""

    number: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    units: list[Unit]
    fingerprint: list[Any]
    """JSON of what identifies the input before it is read: names, sizes and change times or entity tags."""


class BadInput(Exception):
    """A file that broke or ended too early; what came before is good."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Digest:
    """Hash of what was read of a slice: a sum over pieces, whatever their order."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, place: int, content: Any) -> None:
        """Take in a piece that lies at `place`. `content` is anything that has bytes."""
        self._add(xxhash.xxh3_128_intdigest(content, seed=place % (1 << 64)))

    def _add(self, value: int) -> None:
        self.total = (self.total + value) % (1 << 128)

    def hex(self) -> str:
        return f"{self.total:032x}"


class ChunkHasher:
    """Hashes the chunks that begin in a slice, from blocks that come in order.

    `position` is where the first block begins: what comes before the first chunk of the slice is left out.
    """

    def __init__(self, digest: Digest, *, start: int, end: int, position: int) -> None:
        self.digest = digest
        self.position = position
        self.start, self.end = start, end
        self._chunk: Any = None  # Any: xxhash's class has no public name
        self._begin()

    def _begin(self) -> None:
        at_chunk = self.position % HASH_CHUNK_BYTES == 0
        is_ours = at_chunk and self.start <= self.position < self.end
        self._chunk = xxhash.xxh3_128(seed=self.position) if is_ours else None

    @property
    def wants_more(self) -> bool:
        """Whether a chunk of the slice is not complete yet, or not begun."""
        return self._chunk is not None or self.position < self.end

    def update(self, block: bytes) -> None:
        view = memoryview(block)
        while view:
            num_bytes = HASH_CHUNK_BYTES - self.position % HASH_CHUNK_BYTES
            if self._chunk is not None:
                self._chunk.update(view[:num_bytes])
            self.position += min(num_bytes, len(view))
            view = view[num_bytes:]
            if self.position % HASH_CHUNK_BYTES == 0:
                self._close()
                self._begin()

    def finish(self) -> None:
        """Say that the file is at its end."""
        self._close()

    def _close(self) -> None:
        if self._chunk is not None:
            self.digest._add(self._chunk.intdigest())
            self._chunk = None


def hash_bytes(content: bytes) -> Digest:
    """Digest of a whole file that is in memory."""
    digest = Digest()
    hasher = ChunkHasher(digest, start=0, end=max(1, len(content)), position=0)
    hasher.update(content)
    hasher.finish()
    return digest


class Records:
    """The records of a slice, in order. To be used up before the next slice is asked for."""

    def __init__(self, records: Iterator[Record], digest: Digest | None) -> None:
        self._records = records
        self._digest = digest

    def __iter__(self) -> Iterator[Record]:
        return self._records

    @property
    def digest(self) -> str | None:
        """Hash of the raw bytes that were read, once the records are used up; None: the source says
        itself when it changed, in the plan's fingerprint."""
        return None if self._digest is None else self._digest.hex()


def file_digests(units: Iterable[Unit], digests: Iterable[Sequence[str | None]]) -> dict[str, str]:
    """Add up the digests of slices, one list for each unit, to one of each file, by name."""
    totals: dict[str, Digest] = {}
    for unit, found in zip(units, digests, strict=True):
        for piece, digest in zip(unit.slices, found, strict=True):
            if digest is not None:
                totals.setdefault(piece.name, Digest())._add(int(digest, 16))
    return {name: digest.hex() for name, digest in totals.items()}
