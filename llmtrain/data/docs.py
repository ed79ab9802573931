"""Read back the documents that the scan wrote, as training reads them: without the lines that deduplication
cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtrain.data.dedup.line_text import remove_spans, spans_of_rows
from llmtrain.data.dedup.lines import read_removals
from llmtrain.data.scan import unit_files
from llmtrain.files import read_json

TextBatch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
Ints = npt.NDArray[np.int64]


def documents_of(
    rows: pa.Table, out: Path, scan_key: str, cuts: Path | None
) -> Iterator[tuple[pa.Table, TextBatch, pa.RecordBatch]]:
    """The documents of rows of a verdict table, in order, a batch of the scan at a time.

    Args:
        cuts: folder of the lines to leave out, a file a unit; None: whole texts.

    Yields:
        the rows; their texts; their columns in the file of documents, `text` before the cuts.
    """
    unit_numbers = rows.column("unit").to_numpy()
    unit_rows = rows.column("row").to_numpy()
    starts = np.flatnonzero(np.diff(unit_numbers, prepend=-1))
    done = 0
    for start, stop in zip(starts, np.append(starts[1:], len(unit_numbers)), strict=True):
        number = int(unit_numbers[start])
        spans = None if cuts is None else read_removals(cut_file(cuts, number))
        for wanted, batch in read_batches(out, scan_key, number, unit_rows[start:stop]):
            texts = text_of(batch)
            if spans is not None:
                texts = remove_spans(*texts, spans_of_rows(spans, wanted))
            yield rows.slice(done, len(wanted)), texts, batch
            done += len(wanted)


def read_batches(out: Path, scan_key: str, unit: int, rows: Ints) -> Iterator[tuple[Ints, pa.RecordBatch]]:
    """Yield the batches of a unit's documents that hold one of `rows` (ascending): which rows, and their
    columns."""
    files = unit_files(out, scan_key, unit)
    batch_starts = np.concatenate([[0], np.cumsum(_batch_rows(files.done))])
    with pa.memory_map(str(files.docs)) as handle:
        reader = pa.ipc.open_file(handle, options=pa.ipc.IpcReadOptions(use_threads=False))
        cuts = np.searchsorted(rows, batch_starts)
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            first, last = cuts[number : number + 2].tolist()
            batch = reader.get_batch(number)
            if last - first < batch.num_rows:
                batch = batch.take(pa.array(rows[first:last] - batch_starts[number]))
            yield rows[first:last], batch


def text_of(batch: pa.RecordBatch) -> TextBatch:
    """The texts back to back, and where each begins and ends."""
    column = batch.column("text")
    _, offsets, text = column.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(text or b"", dtype=np.uint8), ends


def cut_file(cuts: Path, unit: int) -> Path:
    """Where `dedup.lines` lists the lines that go from a unit's texts."""
    return cuts / f"unit-{unit:06d}.npy"


@lru_cache(maxsize=64)
def _batch_rows(done: Path) -> tuple[int, ...]:
    return tuple(read_json(done)["batch_rows"])


@dataclass(frozen=True)
class StoredTexts:
    """The texts of documents given by dense number, before any line is cut. Picklable."""

    out: Path
    scan_key: str
    firsts: npt.NDArray[np.int64]
    """Number of the first document of each unit."""

    def texts(self, documents: Ints) -> TextBatch:
        """Texts of these documents (ascending), back to back, and where each starts."""
        parts, ends = [], [np.zeros(1, dtype=np.int64)]
        units = np.searchsorted(self.firsts, documents, side="right") - 1
        for unit in np.unique(units).tolist():
            rows = documents[units == unit] - self.firsts[unit]
            for _, batch in read_batches(self.out, self.scan_key, unit, rows):
                text, offsets = text_of(batch)
                parts.append(text[offsets[0] : offsets[-1]])
                ends.append(offsets[1:] - offsets[0] + ends[-1][-1])
        text = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
        return text, np.concatenate(ends)
