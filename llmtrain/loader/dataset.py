"""Rows of a pack as arrays: tokens, targets, positions, segments.

Opening reads the manifest's entries and maps the pack; a shard's file is opened when one of its rows is
read, and at most `MAX_OPEN_SHARDS` stay open. Shards are read with `pread`, not mapped: a file cut short
under a running job is then an error with a path, where a map would end the process by SIGBUS.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import Manifest, shard_files
from llmtrain.data.pack import open_pack
from llmtrain.data.shards import Lineage, ShardReader
from llmtrain.errors import DataError
from llmtrain.files import hash_json

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
    """The rows of one split, packed at one length."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, seq_len: int) -> None:
        entry = manifest.pack(split, seq_len)
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
        self.text_bytes = sum(shard.text_bytes for shard in self._shards)
        """UTF-8 bytes of the text that one epoch of the rows encodes."""
        self.hash = hash_json(
            {
                "tokenizer": manifest.tokenizer.fingerprint,
                "shards": [shard.sha256 for shard in self._shards],
                "pack": [seq_len, entry.rows_sha256, entry.spans_sha256],
            }
        )
        """Of what decides every token of every row; packs of other lengths may come and go beside it."""
        self._pad_id = manifest.tokenizer.eos_id
        self._vocab_size = manifest.tokenizer.vocab_size
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        try:
            self._pack = open_pack(folder, entry)
        except (ValueError, OSError) as error:
            raise DataError(f"{self._pack_name}: damaged: {error}") from error
        self._lock = threading.Lock()
        self._open_files: OrderedDict[int, int] = OrderedDict()
        """Shard number → file descriptor, the longest unused first."""
        weakref.finalize(self, _close_all, self._open_files)

    def read(self, row: int) -> Row:
        """Return one row."""
        block = self.read_many(np.array([row]))
        return Row(block.tokens[0], block.targets[0], block.positions[0], block.segments[0])

    def read_many(self, rows: npt.NDArray[np.integer[Any]]) -> Row:
        """Return these rows, in this order, as arrays [len(rows), seq_len].

        Raises:
            DataError: A shard is missing, has changed its size, or holds a token outside the vocabulary;
                the message names the file and the row.
        """
        spans, num_spans = self._spans(rows)
        shape = len(rows), self.seq_len
        lengths = spans["length"].astype(np.int64)
        row_firsts = np.cumsum(num_spans) - num_spans
        begins = np.cumsum(lengths) - lengths  # of each span, were the rows laid back to back without padding
        row_of_span = np.repeat(np.arange(len(rows)), num_spans)
        num_tokens = np.add.reduceat(lengths, row_firsts)
        if num_tokens.max() > self.seq_len or lengths.min() < 1:
            worst = int(rows[int(num_tokens.argmax())])
            raise DataError(f"{self._pack_name}: row {worst} has {num_tokens.max()} tokens, or an empty span")
        places = begins + np.repeat(np.arange(len(rows)) * self.seq_len - begins[row_firsts], num_spans)

        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        targets = np.full(shape, NO_TARGET, dtype=np.int64)
        self._read_runs(rows, spans, lengths, row_of_span, places, tokens.reshape(-1), targets.reshape(-1))
        targets.reshape(-1)[(places + lengths - 1)[spans["has_next"] == 0]] = NO_TARGET

        # Padding is one more span at the end of its row: positions from 0, a segment of its own.
        row_begins = np.arange(len(rows)) * self.seq_len
        starts = np.sort(np.concatenate([places, (row_begins + num_tokens)[num_tokens < self.seq_len]]))
        starts_in_row = np.searchsorted(starts, starts - starts % self.seq_len)
        covered = np.diff(starts, append=len(rows) * self.seq_len)
        positions = np.arange(len(rows) * self.seq_len) - np.repeat(starts, covered)
        segments = np.repeat((np.arange(len(starts)) - starts_in_row).astype(np.int32), covered)
        return Row(tokens, targets, positions.reshape(shape), segments.reshape(shape))

    def lineage(self, row: int) -> list[Lineage]:
        """Return where each document of the row came from, in the row's order."""
        spans, _ = self._spans(np.array([row]))
        readers = {
            int(number): ShardReader(self.folder / self._shards[int(number)].path)
            for number in np.unique(spans["shard"])
        }
        found = []
        for span in spans:
            reader = readers[int(span["shard"])]
            found.append(reader.lineage(reader.document_at(int(span["start"]))))
        return found

    @property
    def _pack_name(self) -> str:
        return f"{self.folder}, pack of split {self.split!r} with seq_len={self.seq_len}"

    def _spans(self, rows: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[Any], Int64]:
        """The spans of these rows back to back, and how many each row has."""
        at = np.asarray(rows, dtype=np.int64)
        if at.size == 0 or at.min() < 0 or at.max() >= self.num_rows:
            raise DataError(f"{self._pack_name}: rows {at.tolist()} asked, it has 0 to {self.num_rows - 1}")
        firsts = self._pack.rows[at]
        num_spans = self._pack.rows[at + 1] - firsts
        if num_spans.min() < 1 or firsts.min() < 0 or (firsts + num_spans).max() > len(self._pack.spans):
            raise DataError(f"{self._pack_name}: rows {at.tolist()} point outside its spans; it is damaged")
        skips = np.repeat(firsts - (np.cumsum(num_spans) - num_spans), num_spans)
        return self._pack.spans[skips + np.arange(int(num_spans.sum()))], num_spans

    def _read_runs(
        self,
        rows: npt.NDArray[np.integer[Any]],
        spans: npt.NDArray[Any],
        lengths: Int64,
        row_of_span: Int64,
        places: Int64,
        tokens: Int64,
        targets: Int64,
    ) -> None:
        """Fill flat `tokens` and `targets`, one read for each run of spans that lie back to back in a shard.

        A position's target is the token after it in the run; where that belongs to the next document, the
        caller masks it.
        """
        starts = spans["start"].astype(np.int64)
        ends = starts + lengths
        shards = spans["shard"]
        breaks = np.flatnonzero(
            (shards[1:] != shards[:-1]) | (starts[1:] != ends[:-1]) | (row_of_span[1:] != row_of_span[:-1])
        )
        run_firsts = np.concatenate([[0], breaks + 1])
        run_lasts = np.concatenate([breaks, [len(spans) - 1]])
        for first, last in zip(run_firsts.tolist(), run_lasts.tolist(), strict=True):
            begin, length = int(starts[first]), int(ends[last] - starts[first])
            extra = int(spans["has_next"][last] != 0)
            row = int(rows[row_of_span[first]])
            run = self._read_tokens(int(shards[first]), begin, length + extra, row=row)
            place = int(places[first])
            tokens[place : place + length] = run[:length]
            targets[place : place + length - 1 + extra] = run[1:]

    def _read_tokens(self, number: int, start: int, length: int, *, row: int) -> npt.NDArray[Any]:
        """`length` tokens from token `start` of shard `number`."""
        if number >= len(self._shards) or start + length > self._shards[number].num_tokens:
            raise DataError(
                f"{self._pack_name}: row {row} names tokens {start} to {start + length} of shard {number}, "
                "which does not have them; the pack is damaged"
            )
        shard = self._shards[number]
        item_bytes = self._dtype.itemsize
        try:
            with self._lock:
                fd = self._open(number)
                size = os.fstat(fd).st_size
                content = os.pread(fd, length * item_bytes, start * item_bytes)
        except OSError as error:
            raise DataError(f"{self._needed(number, row)}, cannot be read: {error.strerror}") from error
        if size != shard.num_bytes or len(content) != length * item_bytes:
            raise DataError(
                f"{self._needed(number, row)}, has {size} bytes, the manifest says {shard.num_bytes}"
            )
        tokens = np.frombuffer(content, dtype=self._dtype)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self._needed(number, row)}, is damaged: its tokens {start} to {start + length} are from "
                f"{low} to {high}, the vocabulary has {self._vocab_size}"
            )
        return tokens

    def _open(self, number: int) -> int:
        """The shard's file descriptor; closes the longest unused one when there are too many.

        The caller holds the lock.
        """
        if number in self._open_files:
            self._open_files.move_to_end(number)
            return self._open_files[number]
        if len(self._open_files) >= MAX_OPEN_SHARDS:
            os.close(self._open_files.popitem(last=False)[1])
        self._open_files[number] = os.open(self._path(number), os.O_RDONLY)
        return self._open_files[number]

    def _path(self, number: int) -> Path:
        return shard_files(self.folder / self._shards[number].path)[0]

    def _needed(self, number: int, row: int) -> str:
        return f"{self._path(number)}, needed for row {row}"


def _close_all(open_files: OrderedDict[int, int]) -> None:
    while open_files:
        os.close(open_files.popitem()[1])
