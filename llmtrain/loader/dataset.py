"""Rows of a pack as arrays: tokens, targets, positions, segments.

Opening reads the manifest's table and the pack's entry; a shard's files are opened when one of its rows is
read, and at most `MAX_OPEN_SHARDS` stay open. Tokens are read with `pread`, not mapped: a file cut short
under a running job is then an error with a path, where a map would end the process by SIGBUS.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.compiled import compiled_lean
from llmtrain.data.config import Packing
from llmtrain.data.manifest import (
    SUM_BLOCK_BYTES,
    Manifest,
    damaged_block,
    shard_files,
    sums_file,
    xxh3_of_file,
)
from llmtrain.data.pack import advice, open_plan
from llmtrain.errors import DataError
from llmtrain.files import hash_json
from llmtrain.loader.config import Verify

NO_TARGET = -100
"""Target of a position that counts for nothing: the end of a document, and padding."""

MAX_OPEN_SHARDS = 64
"""Files, so that thousands of shards stay below the usual limit of 1024 open files a process."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Arrays of shape [seq_len], or [num_rows, seq_len] for several rows."""

    tokens: Int64
    targets: Int64
    """The next token of the same document, or NO_TARGET."""
    positions: Int64
    """From 0 in each segment."""
    segments: npt.NDArray[np.int32]
    """Number of the span within the row, from 0; padding comes last and has its own."""


class Rows:
    """The rows of one split, packed at one length by one strategy."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: str,
        seq_len: int,
        packing: Packing = Packing.concat,
        *,
        verify: Verify = Verify.none,
        max_open: int = MAX_OPEN_SHARDS,
    ) -> None:
        """
        Args:
            verify: `open` hashes a shard when it is first needed, `touch` each of its blocks.
            max_open: shards whose files stay open; a process that reads several packs shares the limit.
        """
        entry = manifest.pack(split, seq_len, packing.name)
        if entry.num_rows < 1:
            raise DataError(
                f"the pack of split {split!r} with seq_len={seq_len} in {folder} has no row; "
                "prepare more text, or choose a smaller seq_len"
            )
        self.folder = folder
        self.split = split
        self.seq_len = seq_len
        self.num_rows = entry.num_rows
        self.num_target_tokens = entry.num_target_tokens
        self._shards = manifest.split_shards(split)
        self.text_bytes = int(self._shards.records["text_bytes"].sum())
        """UTF-8 bytes of the text that one epoch of the rows encodes."""
        self.hash = hash_json(
            {
                "tokenizer": manifest.tokenizer.fingerprint,
                "shards": self._shards.content_hash(),
                "pack": [seq_len, packing.name, entry.rows_sha256, entry.spans_sha256],
            }
        )
        """Of what decides every token of every row; packs of other lengths may come and go beside it."""
        self._pad_id = manifest.tokenizer.eos_id
        self._vocab_size = manifest.tokenizer.vocab_size
        self._dtype = np.dtype(manifest.dtype).newbyteorder("=")
        self._plan = open_plan(folder, manifest, entry, max_open=max_open)
        self._max_open = max_open
        self.view: Callable[[Int64, Row], Row] | None = None
        """What turns rows into what the model gets (loader/objectives.py); None: they are that."""
        self._verify = verify
        self._lock = threading.Lock()
        self._open_files: OrderedDict[int, _Shard] = OrderedDict()
        """Shard number → its open file, the longest unused first."""
        weakref.finalize(self, _close_all, self._open_files)

    def read(self, row: int) -> Row:
        """Return one row."""
        block = self.read_many(np.array([row]))
        return Row(block.tokens[0], block.targets[0], block.positions[0], block.segments[0])

    def read_many(self, rows: npt.NDArray[np.integer[Any]]) -> Row:
        """Return these rows, in this order, as arrays [len(rows), seq_len].

        Raises:
            DataError: A shard is missing, has changed its size, fails its checksum, or holds a token outside
                the vocabulary; the message names the file and the row.
        """
        shape = len(rows), self.seq_len
        tokens, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        positions, segments = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int32)
        with self._lock:
            spans, num_spans = self._spans(rows)
            runs = np.empty((4, spans.shape[1]), dtype=np.int64)
            num_runs, num_read, worst = _runs(num_spans, spans, self.seq_len, runs)
            if worst >= 0:
                raise DataError(
                    f"{self._pack_name}: row {int(rows[worst])} has more than {self.seq_len} tokens, or an "
                    "empty span; the pack is damaged"
                )
            raw = np.empty(num_read, dtype=self._dtype)
            content, at = memoryview(raw.data).cast("B"), 0
            item_bytes = self._dtype.itemsize
            for number, begin, count, row in runs[:, :num_runs].T.tolist():
                until = at + count * item_bytes
                self._read_tokens(number, begin, count, content[at:until], row=int(rows[row]))
                at = until
        if raw.max() >= self._vocab_size or raw.min() < 0:
            raise DataError(self._outside(raw, runs[:, :num_runs], rows))
        _fill(raw, num_spans, spans, self._pad_id, tokens, targets, positions, segments)
        block = Row(tokens, targets, positions, segments)
        return block if self.view is None else self.view(np.asarray(rows, dtype=np.int64), block)

    @property
    def _pack_name(self) -> str:
        return f"{self.folder}, pack of split {self.split!r} with seq_len={self.seq_len}"

    def _spans(self, rows: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """The spans of these rows back to back, and how many each row has."""
        at = np.asarray(rows, dtype=np.int64)
        if at.size == 0 or at.min() < 0 or at.max() >= self.num_rows:
            raise DataError(f"{self._pack_name}: rows {at.tolist()} asked, it has 0 to {self.num_rows - 1}")
        return self._plan.spans(at)

    def _read_tokens(self, number: int, start: int, count: int, into: memoryview, *, row: int) -> None:
        """`count` tokens from token `start` of shard `number`. The caller holds the lock."""
        if number >= len(self._shards) or start + count > self._shards.records["num_tokens"][number]:
            raise DataError(
                f"{self._pack_name}: row {row} names tokens {start} to {start + count} of shard {number}, "
                "which does not have them; the pack is damaged"
            )
        begin = start * self._dtype.itemsize
        try:
            shard = self._open(number, row=row)
            num_read = os.preadv(shard.fd, [into], begin)
        except OSError as error:
            raise DataError(
                f"{self._needed(number, row)}, cannot be read: {error.strerror}; {advice(error)}"
            ) from error
        if num_read != len(into):
            raise DataError(self._other_size(number, row, os.fstat(shard.fd).st_size))
        if shard.is_checked is not None:
            self._check_blocks(shard, begin, begin + len(into))

    def _open(self, number: int, *, row: int) -> _Shard:
        """The shard's open file; closes the longest unused one when there are too many."""
        if number in self._open_files:
            self._open_files.move_to_end(number)
            return self._open_files[number]
        if len(self._open_files) >= self._max_open:
            self._open_files.popitem(last=False)[1].close()
        path = self._path(number)
        sums = is_checked = None
        if self._verify in (Verify.open, Verify.touch):
            sums = self._sums(number)
            is_checked = np.zeros(len(sums), dtype=np.bool_)
        shard = _Shard(os.open(path, os.O_RDONLY), path, sums, is_checked)
        self._open_files[number] = shard
        if (size := os.fstat(shard.fd).st_size) != self._shards.records["num_bytes"][number]:
            raise DataError(self._other_size(number, row, size))
        if self._verify is Verify.open:
            self._check_blocks(shard, 0, int(self._shards.records["num_bytes"][number]))
        return shard

    def _sums(self, number: int) -> npt.NDArray[np.uint64]:
        path = sums_file(self.folder / self._shards.path(number))
        found, expected = xxh3_of_file(path), self._shards[number].sums_xxh3_128
        if found != expected:
            raise DataError(
                f"{path} is damaged: its xxh3_128 is {found}, the manifest says {expected}; restore the file"
            )
        return np.fromfile(path, dtype="<u8")

    def _check_blocks(self, shard: _Shard, begin: int, end: int) -> None:
        """Compare the blocks of these bytes with their sums, unless that is done."""
        assert shard.is_checked is not None, "only with verify=open or touch"
        assert shard.sums is not None, "only with verify=open or touch"
        for block in range(begin // SUM_BLOCK_BYTES, -(-end // SUM_BLOCK_BYTES)):
            if shard.is_checked[block]:
                continue
            content = os.pread(shard.fd, SUM_BLOCK_BYTES, block * SUM_BLOCK_BYTES)
            found, expected = xxhash.xxh3_64_intdigest(content), int(shard.sums[block])
            if found != expected:
                raise DataError(
                    f"{damaged_block(shard.path, block, expected=expected, found=found)}; restore the file"
                )
            shard.is_checked[block] = True

    def _outside(self, raw: npt.NDArray[Any], runs: Int64, rows: npt.NDArray[np.integer[Any]]) -> str:
        """Which tokens that were read are outside the vocabulary."""
        ends = np.cumsum(runs[2])
        bad = int(np.flatnonzero((raw < 0) | (raw >= self._vocab_size))[0])
        run = int(np.searchsorted(ends, bad, side="right"))
        number, start, count, row = runs[:, run].tolist()
        part = raw[ends[run] - count : ends[run]]
        return (
            f"{self._needed(number, int(rows[row]))}, is damaged: its tokens {start} to {start + count} are "
            f"from {part.min()} to {part.max()}, the vocabulary has {self._vocab_size}"
        )

    def _other_size(self, number: int, row: int, found: int) -> str:
        expected = self._shards.records["num_bytes"][number]
        return f"{self._needed(number, row)}, has {found} bytes, the manifest says {expected}"

    def _path(self, number: int) -> Path:
        return shard_files(self.folder / self._shards.path(number))[0]

    def _needed(self, number: int, row: int) -> str:
        return f"{self._path(number)}, needed for row {row}"


@dataclass
class _Shard:
    """An open shard, and which of its blocks were compared with their sums."""

    fd: int
    path: Path
    sums: npt.NDArray[np.uint64] | None
    is_checked: npt.NDArray[np.bool_] | None

    def close(self) -> None:
        os.close(self.fd)


def _close_all(open_files: OrderedDict[int, _Shard]) -> None:
    while open_files:
        open_files.popitem()[1].close()


@compiled_lean
def _runs(num_spans: Any, spans: Any, seq_len: int, runs: Any) -> Any:
    """Join spans of a row that lie back to back in a shard: a run is read at once, with the token after it
    where that is a target.

    Returns:
        how many runs; tokens to read; the first row that cannot be, or -1. `runs` gets shard, first token,
        tokens to read and row.
    """
    shard, start, length, has_next = spans[0], spans[1], spans[2], spans[3]
    num_runs, total, at = 0, 0, 0
    for row in range(len(num_spans)):
        in_row = 0
        for place in range(num_spans[row]):
            if length[at] < 1:
                return 0, 0, row
            in_row += length[at]
            if place > 0 and shard[at] == shard[at - 1] and start[at] == start[at - 1] + length[at - 1]:
                extra = length[at] + has_next[at] - has_next[at - 1]
                runs[2, num_runs - 1] += extra
                total += extra
            else:
                runs[0, num_runs], runs[1, num_runs] = shard[at], start[at]
                runs[2, num_runs], runs[3, num_runs] = length[at] + has_next[at], row
                total += length[at] + has_next[at]
                num_runs += 1
            at += 1
        if in_row > seq_len:
            return 0, 0, row
    return num_runs, total, -1


@compiled_lean
def _fill(
    raw: Any,
    num_spans: Any,
    spans: Any,
    pad_id: int,
    tokens: Any,
    targets: Any,
    positions: Any,
    segments: Any,
) -> None:
    """Every array of every row from what was read for `_runs`."""
    shard, start, length, has_next = spans[0], spans[1], spans[2], spans[3]
    at, source = 0, 0
    for row in range(len(num_spans)):
        place = 0
        for number in range(num_spans[row]):
            joined = number > 0 and shard[at] == shard[at - 1] and start[at] == start[at - 1] + length[at - 1]
            if number > 0 and not joined:
                source += has_next[at - 1]  # the token after the last run was a target only
            count = length[at]
            _copy(raw[source : source + count], tokens[row, place : place + count])
            num_targets = count - 1 + has_next[at]
            _copy(raw[source + 1 : source + 1 + num_targets], targets[row, place : place + num_targets])
            targets[row, place + num_targets : place + count] = NO_TARGET
            _count_up(positions[row, place : place + count])
            segments[row, place : place + count] = number
            source += count
            place += count
            at += 1
        source += has_next[at - 1]
        tokens[row, place:] = pad_id
        targets[row, place:] = NO_TARGET
        _count_up(positions[row, place:])
        segments[row, place:] = num_spans[row]


@compiled_lean
def _copy(source: Any, into: Any) -> None:
    """A loop of its own over whole slices, which the compiler turns into wide moves."""
    for at in range(len(into)):
        into[at] = source[at]


@compiled_lean
def _count_up(into: Any) -> None:
    for at in range(len(into)):
        into[at] = at
