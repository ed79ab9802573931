"""Packs: which spans of which documents make which row of `seq_len` input tokens.

Three strategies over the same shards, none of them a copy:

* concat: the documents of a split lie back to back, and row r takes input positions [r*S, (r+1)*S) of that
  stream. Arithmetic, so there is no plan: where documents end is read from the shards' indexes.
* best_fit: a document of more than S tokens is cut into rows and a rest; rests and whole documents go,
  longest first, each into the row with the least room that still holds it (best-fit decreasing; Ding et al.
  2024, arXiv:2404.10830, section 3). Planned for `window_documents` at a time.
* padded: no row holds two documents.

Targets are the next tokens inside the same document, so a document's last token (EOS) has none. A document
that goes on in another row loses nothing: the last position of its span still has its target.
"""

from __future__ import annotations

import errno
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled, compiled_lean
from llmtrain.data.config import Packing
from llmtrain.data.manifest import Manifest, PackEntry, ShardTable, shard_files
from llmtrain.data.shards import ShardIndex
from llmtrain.errors import DataError
from llmtrain.files import atomic_write

SPAN = np.dtype([("shard", "<u4"), ("start", "<u8"), ("length", "<u4"), ("has_next", "u1")])
"""`length` input tokens of one document from token `start` of shard number `shard` of the split;
`has_next`: the document goes on after them, so their last position has a target, too."""

MAX_OPEN_INDEXES = 64

Spans = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


class RowPlan(Protocol):
    """Which spans make which row."""

    def spans(self, rows: Int64) -> tuple[Int64, Int64]:
        """The spans of these rows back to back, [4, spans] in the fields of SPAN; how many each row has."""


def open_plan(
    folder: Path, manifest: Manifest, entry: PackEntry, *, max_open: int = MAX_OPEN_INDEXES
) -> RowPlan:
    """The plan of a pack. Nothing of its size is read before it is asked for."""
    if entry.strategy == Packing.concat.name:
        return ConcatPlan(folder, manifest.split_shards(entry.split), entry.seq_len, max_open=max_open)
    return FilePlan(folder, entry)


def advice(error: OSError) -> str:
    """What to do about a file that cannot be opened."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "restore the file"


class FilePlan:
    """A plan in two files, mapped: row r is `spans[rows[r]:rows[r + 1]]`."""

    def __init__(self, folder: Path, entry: PackEntry) -> None:
        self.name = f"pack {entry.path} of split {entry.split!r}"
        paths = [folder / entry.path / f"{entry.split}.{kind}.npy" for kind in ("rows", "spans")]
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path} is missing; run `llmtrain data` again, or restore the file")
        try:
            self._rows, self._spans = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
            fits = (
                len(self._rows) == entry.num_rows + 1
                and self._spans.dtype == SPAN
                and int(self._rows[-1]) == len(self._spans)
            )
        except (ValueError, OSError, IndexError) as error:
            raise DataError(f"{self.name} in {folder} is damaged: {error}") from error
        if not fits:
            raise DataError(f"{self.name} in {folder} does not fit its manifest entry")

    def spans(self, rows: Int64) -> tuple[Int64, Int64]:
        firsts = self._rows[rows]
        num_spans = self._rows[rows + 1] - firsts
        if num_spans.min() < 1 or firsts.min() < 0 or (firsts + num_spans).max() > len(self._spans):
            raise DataError(f"{self.name}: damaged: its rows file points outside its spans file")
        skipped = np.cumsum(num_spans) - num_spans
        chosen = self._spans[np.repeat(firsts - skipped, num_spans) + np.arange(num_spans.sum())]
        return np.stack([chosen[name].astype(np.int64) for name in SPAN.names or ()]), num_spans


class ConcatPlan:
    """Rows by arithmetic. The indexes of the last shards that were needed stay mapped."""

    def __init__(
        self, folder: Path, shards: ShardTable, seq_len: int, *, max_open: int = MAX_OPEN_INDEXES
    ) -> None:
        self.max_open = max_open
        self.folder = folder
        self.shards = shards
        self.seq_len = seq_len
        self._starts = np.concatenate([[0], np.cumsum(shards.records["num_tokens"])])
        self._open: OrderedDict[int, ShardIndex] = OrderedDict()

    def spans(self, rows: Int64) -> tuple[Int64, Int64]:
        begins = rows * self.seq_len
        numbers = np.searchsorted(self._starts, begins, side="right") - 1
        found, filled = np.empty((4, len(rows) * self.seq_len), dtype=np.int64), 0
        num_spans = np.empty(len(rows), dtype=np.int64)
        for at, (begin, number) in enumerate(zip(begins.tolist(), numbers.tolist(), strict=True)):
            first, end = filled, min(begin + self.seq_len, int(self._starts[-1]))
            while begin < end:
                start, last = int(self._starts[number]), min(end, int(self._starts[number + 1]))
                index = self._index(number)
                count = _spans_between(
                    index.content, index.num_documents, index.item_bytes, number, begin - start,
                    last - start, found, filled,
                )  # fmt: skip
                if count < 0:
                    raise DataError(
                        f"{index.path} is damaged: documents do not cover tokens {begin - start} to "
                        f"{last - start}; run `llmtrain data` again, or restore the file"
                    )
                filled, begin, number = filled + count, last, number + 1
            num_spans[at] = filled - first
        return found[:, :filled], num_spans

    def _index(self, number: int) -> ShardIndex:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = shard_files(self.folder / self.shards.path(number))[1]
        try:
            index = ShardIndex(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {advice(error)}") from error
        expected = int(self.shards.records["num_documents"][number])
        if index.num_documents != expected:
            raise DataError(
                f"{path} has {index.num_documents} documents, the manifest says {expected}; restore the file"
            )
        if len(self._open) >= self.max_open:
            self._open.popitem(last=False)
        self._open[number] = index
        return index


@compiled_lean
def _int64_at(content: Any, at: int) -> Any:
    """Eight bytes, little endian, wherever they lie."""
    value = np.uint64(0)
    for byte in range(8):
        value |= np.uint64(content[at + byte]) << np.uint64(8 * byte)
    return np.int64(value)


@compiled_lean
def _spans_between(
    content: Any,
    num_documents: int,
    item_bytes: int,
    shard: int,
    begin: int,
    end: int,
    found: Any,
    place: int,
) -> int:
    """Cut tokens begin..end of a shard where documents end: columns of `found` from `place` on.

    Args:
        content: Bytes of the .idx file.
        found: [4, ...] in the fields of SPAN.

    Returns:
        how many there are; -1 when the documents do not cover the tokens.
    """
    pointers, low, high = 34 + 4 * num_documents, 0, num_documents
    while high - low > 1:
        middle = (low + high) // 2
        if _int64_at(content, pointers + 8 * middle) <= begin * item_bytes:
            low = middle
        else:
            high = middle
    first, at, document = place, begin, low
    while at < end:
        if document >= num_documents:
            return -1
        length: Any = np.int64(0)
        for byte in range(4):
            length |= np.int64(content[34 + 4 * document + byte]) << np.int64(8 * byte)
        start = _int64_at(content, pointers + 8 * document) // item_bytes
        document += 1
        if start > at:
            return -1
        if start + length <= at:
            continue  # a document of no token, as others write them
        last = min(start + length, end)
        found[0, place], found[1, place], found[2, place] = shard, at, last - at
        found[3, place] = last < start + length
        place += 1
        at = last
    return place - first


# Planning.


@dataclass
class Statistics:
    """What a pack did to documents and rows."""

    num_rows: int = 0
    num_tokens: int = 0
    """Of all documents."""
    num_documents: int = 0
    num_cut_documents: int = 0
    """In several rows although one would have held them."""
    num_long_documents: int = 0
    """Of more tokens than a row has."""

    def add(self, lengths: Int64, seq_len: int) -> None:
        """Count these documents."""
        self.num_tokens += int(lengths.sum())
        self.num_documents += len(lengths)
        self.num_long_documents += int((lengths > seq_len).sum())


def concat_statistics(doc_lengths: Iterable[npt.NDArray[np.integer[Any]]], seq_len: int) -> Statistics:
    """Rows of documents back to back, and whom their borders cut. A tail without a target is no row.

    Args:
        doc_lengths: per shard of one split, in order: tokens of each document, EOS counted.
    """
    found = Statistics()
    row_start = num_targets_in_row = 0  # of the last row
    for part in doc_lengths:
        lengths = np.asarray(part, dtype=np.int64)
        ends = found.num_tokens + np.cumsum(lengths)
        begins = ends - lengths
        in_two = (begins // seq_len != (ends - 1) // seq_len) & (lengths > 0)
        found.num_cut_documents += int((in_two & (lengths <= seq_len)).sum())
        found.add(lengths, seq_len)
        last_row = (found.num_tokens - 1) // seq_len * seq_len  # below 0 when there is no token yet
        if last_row > row_start:
            row_start, num_targets_in_row = last_row, 0
        num_targets_in_row += int(np.maximum(ends - 1 - np.maximum(begins, row_start), 0).sum())
    found.num_rows = -(-found.num_tokens // seq_len)
    if found.num_rows and not num_targets_in_row:
        found.num_rows -= 1
    return found


def write_plan(
    folder: Path,
    relative: str,
    split: str,
    seq_len: int,
    strategy: Packing,
    doc_lengths: Iterable[npt.NDArray[np.integer[Any]]],
    *,
    window_documents: int = 1_000_000,
) -> PackEntry:
    """Plan a pack, write its files (none for concat) into `folder / relative`, and return its entry.

    Args:
        doc_lengths: per shard of one split, in order: tokens of each document, EOS counted. Read once, so it
            may be a generator; what is in memory at once is a window.
    """
    hashes: dict[str, str | None] = {"rows_sha256": None, "spans_sha256": None}
    if strategy is Packing.concat:
        found, relative = concat_statistics(doc_lengths, seq_len), ""
        num_row_tokens = min(found.num_tokens, found.num_rows * seq_len)
    else:
        found = Statistics()
        windows = plan_windows(doc_lengths, seq_len, strategy, window_documents, found)
        hashes |= write_rows(folder / relative, split, windows)
        num_row_tokens = found.num_tokens
    return PackEntry(
        path=relative,
        split=split,
        seq_len=seq_len,
        strategy=strategy.name,
        num_rows=found.num_rows,
        num_target_tokens=found.num_tokens - found.num_documents,
        num_padding=found.num_rows * seq_len - num_row_tokens,
        num_cut_documents=found.num_cut_documents,
        num_long_documents=found.num_long_documents,
        **hashes,
    )


def write_rows(folder: Path, split: str, windows: Iterable[tuple[Int64, Spans]]) -> dict[str, str]:
    """Write the two files of a plan, window by window: spans of each row, and spans. Returns their hashes."""
    paths = [folder / f"{split}.{kind}.npy" for kind in ("rows", "spans")]
    with atomic_write(paths[0], "w+b") as rows_handle, atomic_write(paths[1], "w+b") as spans_handle:
        rows, spans = _Growing(rows_handle, np.dtype("<i8")), _Growing(spans_handle, SPAN)
        rows.append(np.zeros(1, dtype="<i8"))
        for counts, part in windows:
            rows.append(spans.length + np.cumsum(counts))
            spans.append(part)
        return {"rows_sha256": rows.finish(), "spans_sha256": spans.finish()}


class _Growing:
    """An .npy file of one dimension that is written piece by piece; its head is right at the end."""

    def __init__(self, handle: IO[bytes], dtype: np.dtype[Any]) -> None:
        self.handle = handle
        self.dtype = dtype
        self.length = 0
        self._write_head()

    def append(self, values: npt.NDArray[Any]) -> None:
        self.handle.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.length += len(values)

    def finish(self) -> str:
        """sha256 of the whole file."""
        self.handle.seek(0)
        self._write_head()  # as long as the first: numpy leaves room for a length of 21 digits
        self.handle.seek(0)
        return hashlib.file_digest(self.handle, "sha256").hexdigest()  # type: ignore[arg-type]

    def _write_head(self) -> None:
        head = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self.handle, head)


def plan_windows(
    doc_lengths: Iterable[npt.NDArray[np.integer[Any]]],
    seq_len: int,
    strategy: Packing,
    window_documents: int,
    found: Statistics,
) -> Iterator[tuple[Int64, Spans]]:
    """Plan window by window: how many spans each row has, and the spans. Counts into `found`."""
    for shard, starts, lengths in _windows(doc_lengths, window_documents):
        counts, document, offset, length = plan_rows(lengths, seq_len, strategy)
        spans = np.empty(len(document), dtype=SPAN)
        spans["shard"] = shard[document]
        spans["start"] = starts[document] + offset
        spans["length"] = length
        spans["has_next"] = offset + length < lengths[document]
        found.add(lengths, seq_len)
        found.num_rows += len(counts)
        yield counts, spans


def _windows(
    doc_lengths: Iterable[npt.NDArray[np.integer[Any]]], window_documents: int
) -> Iterator[tuple[Int64, Int64, Int64]]:
    """(shard, first token in it, tokens) of each document, so many at a time."""
    waiting: list[tuple[Int64, Int64, Int64]] = []
    num_waiting = 0
    for number, part in enumerate(doc_lengths):
        lengths = np.asarray(part, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        shard = np.full(len(lengths), number, dtype=np.int64)
        at = 0
        while at < len(lengths):
            until = min(len(lengths), at + window_documents - num_waiting)
            waiting.append((shard[at:until], starts[at:until], lengths[at:until]))
            num_waiting, at = num_waiting + until - at, until
            if num_waiting == window_documents:
                yield _joined(waiting)
                waiting, num_waiting = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[tuple[Int64, Int64, Int64]]) -> tuple[Int64, Int64, Int64]:
    shard, starts, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    return shard, starts, lengths


def plan_rows(lengths: Int64, seq_len: int, strategy: Packing) -> tuple[Int64, Int64, Int64, Int64]:
    """Plan rows of these documents by best_fit or padded.

    Rows come in the order of their first document, spans of a row in the order of theirs.

    Returns:
        of each row: its number of spans; of each span: document, offset in it, length.
    """
    num_rests = int(np.count_nonzero(lengths % seq_len))
    num_spans = int((lengths // seq_len).sum()) + num_rests
    row_of_rest = np.arange(len(lengths), dtype=np.int64)
    if strategy is Packing.best_fit:
        _best_fit(np.ascontiguousarray(lengths), seq_len, row_of_rest)
    counts, spans = np.zeros(num_spans, dtype=np.int64), np.empty((3, num_spans), dtype=np.int64)
    num_rows = _lay_out(np.ascontiguousarray(lengths), seq_len, row_of_rest, counts, spans)
    return counts[:num_rows], spans[0], spans[1], spans[2]


@compiled
def _best_fit(lengths: Any, seq_len: int, bin_of: Any) -> None:
    """Best-fit decreasing of what is left of each document after whole rows; bins are numbered as they open.

    Bins of equal room are a list, the last one in comes first; a bit for each room that some bin has, and a
    bit for each word of those bits, find the least room that suffices. So a document costs the same however
    many there are.
    """
    num_documents = len(lengths)
    counts = np.zeros(seq_len + 1, dtype=np.int64)
    for document in range(num_documents):
        counts[lengths[document] % seq_len] += 1
    place = np.zeros(seq_len + 1, dtype=np.int64)  # where rests of a length begin, longest first
    total = 0
    for length in range(seq_len - 1, 0, -1):
        place[length] = total
        total += counts[length]
    order = np.empty(total, dtype=np.int64)
    for document in range(num_documents):
        rest = lengths[document] % seq_len
        if rest:
            order[place[rest]] = document
            place[rest] += 1
    head = np.full(seq_len + 1, -1, dtype=np.int64)  # of each room: a bin that has it
    behind = np.empty(total, dtype=np.int64)  # of each bin: another of the same room
    words = np.zeros((seq_len >> 6) + 1, dtype=np.uint64)
    summary = np.zeros((len(words) >> 6) + 1, dtype=np.uint64)
    num_bins = 0
    for at in range(total):
        document = order[at]
        rest = lengths[document] % seq_len
        room = _least_room(words, summary, rest)
        if room < 0:
            room, chosen = seq_len, num_bins
            num_bins += 1
        else:
            chosen = head[room]
            head[room] = behind[chosen]
            if head[room] < 0:
                words[room >> 6] &= ~(np.uint64(1) << np.uint64(room & 63))
                if words[room >> 6] == 0:
                    summary[room >> 12] &= ~(np.uint64(1) << np.uint64((room >> 6) & 63))
        bin_of[document] = chosen
        left = room - rest
        if left:
            behind[chosen] = head[left]
            head[left] = chosen
            words[left >> 6] |= np.uint64(1) << np.uint64(left & 63)
            summary[left >> 12] |= np.uint64(1) << np.uint64((left >> 6) & 63)


@compiled_lean
def _least_room(words: Any, summary: Any, least: int) -> int:
    """The smallest number from `least` on whose bit is set in `words`, or -1."""
    word = least >> 6
    bits = words[word] >> np.uint64(least & 63)
    if bits:
        return least + _lowest_bit(bits)
    word += 1
    at = word >> 6
    if at >= len(summary):
        return -1
    bits = summary[at] >> np.uint64(word & 63)
    if bits:
        word += _lowest_bit(bits)
        return (word << 6) + _lowest_bit(words[word])
    for later in range(at + 1, len(summary)):
        if summary[later]:
            word = (later << 6) + _lowest_bit(summary[later])
            return (word << 6) + _lowest_bit(words[word])
    return -1


@compiled_lean
def _lowest_bit(bits: Any) -> int:
    """Number of the lowest bit that is set; one is."""
    number = 0
    for step in (32, 16, 8, 4, 2, 1):
        if not bits & ((np.uint64(1) << np.uint64(step)) - np.uint64(1)):
            bits >>= np.uint64(step)
            number += step
    return number


@compiled
def _lay_out(lengths: Any, seq_len: int, bin_of: Any, counts: Any, spans: Any) -> int:
    """Number the rows by their first document, and lay their spans back to back. Returns how many rows."""
    row_of = np.full(len(lengths), -1, dtype=np.int64)  # of each bin
    num_rows = 0
    for document in range(len(lengths)):
        for _ in range(lengths[document] // seq_len):
            counts[num_rows] = 1
            num_rows += 1
        if lengths[document] % seq_len:
            chosen = bin_of[document]
            if row_of[chosen] < 0:
                row_of[chosen] = num_rows
                num_rows += 1
            counts[row_of[chosen]] += 1
    place = np.zeros(num_rows, dtype=np.int64)
    for row in range(1, num_rows):
        place[row] = place[row - 1] + counts[row - 1]
    seen = np.zeros(len(lengths), dtype=np.bool_)
    row = 0
    for document in range(len(lengths)):
        offset = 0
        for _ in range(lengths[document] // seq_len):
            at = place[row]
            spans[0, at], spans[1, at], spans[2, at] = document, offset, seq_len
            offset += seq_len
            row += 1
        rest = lengths[document] % seq_len
        if rest:
            chosen = bin_of[document]
            if not seen[chosen]:
                seen[chosen] = True
                row += 1
            at = place[row_of[chosen]]
            spans[0, at], spans[1, at], spans[2, at] = document, offset, rest
            place[row_of[chosen]] += 1
    return num_rows
