"""Packs: which spans of which documents make which row of `seq_len` input tokens.

The documents of a split, in shard order, are laid back to back, and row r takes input positions [r*S,
(r+1)*S) of that stream (concat-chunk). Targets are the next tokens inside the same document, so a
document's last token (EOS) has none. A document that goes on in the next row loses nothing: the last
position of this row still has its target, which is the first input of the next. The tail of the stream
is a short last row if it holds a target. A pack is a plan over the shards, not a copy of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import PackEntry
from llmtrain.errors import DataError
from llmtrain.files import atomic_write, hash_file

SPAN = np.dtype([("shard", "<u4"), ("start", "<u8"), ("length", "<u4"), ("has_next", "u1")])
"""`length` input tokens of one document from token `start` of shard number `shard` of the split;
`has_next`: the document goes on after them, so their last position has a target, too."""

Spans = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """An open pack: row r is `spans[rows[r]:rows[r + 1]]`."""

    rows: Rows
    spans: Spans

    @property
    def num_rows(self) -> int:
        return len(self.rows) - 1


def plan_rows(doc_lengths: list[npt.NDArray[np.integer[Any]]], seq_len: int) -> Pack:
    """Lay documents back to back and cut the stream into rows.

    Args:
        doc_lengths: per shard of one split, in order: tokens of each document, EOS counted.
        seq_len: input tokens of a row.
    """
    lengths = np.concatenate(
        [np.asarray(part, dtype=np.int64) for part in doc_lengths] or [np.zeros(0, np.int64)]
    )
    doc_starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=doc_starts[1:])
    num_tokens = int(doc_starts[-1])
    row_starts = np.arange(0, num_tokens, seq_len, dtype=np.int64)
    starts = np.union1d(doc_starts[:-1], row_starts)
    ends = np.append(starts[1:], num_tokens)
    document = np.searchsorted(doc_starts, starts, side="right") - 1
    shard_docs = np.cumsum([len(part) for part in doc_lengths])
    shard = np.searchsorted(shard_docs, document, side="right")
    first_doc_of_shard = np.append(0, shard_docs)[:-1] if len(shard_docs) else np.zeros(0, dtype=np.int64)
    spans = np.empty(len(starts), dtype=SPAN)
    spans["shard"] = shard
    spans["start"] = starts - doc_starts[first_doc_of_shard[shard]]
    spans["length"] = ends - starts
    spans["has_next"] = ends < doc_starts[document + 1]
    rows = np.append(np.searchsorted(starts, row_starts), len(starts)).astype(np.int64)
    if len(rows) > 1 and num_targets(spans[rows[-2] :]) == 0:
        spans, rows = spans[: rows[-2]], rows[:-1]
    return Pack(rows=rows, spans=spans)


def num_targets(spans: Spans) -> int:
    """Targets that these spans hold: every position but the last of a document."""
    return int(spans["length"].sum(dtype=np.int64)) - int((spans["has_next"] == 0).sum())


def write_pack(folder: Path, relative: str, split: str, seq_len: int, pack: Pack) -> PackEntry:
    """Write the two files of a pack into `folder / relative` and return its manifest entry."""
    paths = {kind: folder / relative / f"{split}.{kind}.npy" for kind in ("rows", "spans")}
    for kind, values in (("rows", pack.rows.astype("<i8")), ("spans", pack.spans)):
        with atomic_write(paths[kind]) as handle:  # np.save does not tell a full disk from other errors
            header = np.lib.format.header_data_from_array_1_0(values)
            np.lib.format.write_array_header_1_0(handle, header)
            handle.write(np.ascontiguousarray(values).data)
    return PackEntry(
        path=relative,
        split=split,
        seq_len=seq_len,
        num_rows=pack.num_rows,
        num_target_tokens=num_targets(pack.spans),
        rows_sha256=hash_file(paths["rows"]),
        spans_sha256=hash_file(paths["spans"]),
    )


def open_pack(folder: Path, entry: PackEntry) -> Pack:
    """Map the pack's files; nothing is read before it is asked for."""
    paths = [folder / entry.path / f"{entry.split}.{kind}.npy" for kind in ("rows", "spans")]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing; run `llmtrain data` again, or restore the file")
    rows, spans = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    if len(rows) != entry.num_rows + 1 or spans.dtype != SPAN or int(rows[-1]) != len(spans):
        raise DataError(f"pack {paths[0].parent} of split {entry.split!r} does not fit its manifest entry")
    return Pack(rows=rows, spans=spans)
