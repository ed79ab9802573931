"""Read back the normalised texts that the scan wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

TextBatch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def read_texts(path: Path, batch_rows: list[int], rows: npt.NDArray[np.int64]) -> Iterator[TextBatch]:
    """Yield the texts of `rows` (ascending) of one unit: bytes back to back, and where each begins and ends.

    Only the batches that hold one of the rows are read.
    """
    batch_starts = np.concatenate([[0], np.cumsum(batch_rows)])
    with pa.memory_map(str(path)) as handle:
        reader = pa.ipc.open_file(handle)
        for number in range(len(batch_rows)):
            first, last = np.searchsorted(rows, batch_starts[number : number + 2])
            if first < last:
                column = reader.get_batch(number).column("text")
                if last - first < len(column):
                    column = column.take(pa.array(rows[first:last] - batch_starts[number]))
                _, offsets, text = column.buffers()
                yield (
                    np.frombuffer(text, dtype=np.uint8),
                    np.frombuffer(offsets, dtype=np.int64)[: last - first + 1],
                )
