"""Tables of any length, and lists that are too long for memory, merged by document."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.dedup.units import RowWriter, Table
from llmtrain.errors import DataError


def open_array(path: Path, dtype: np.dtype[Any]) -> Table:
    """A table of any length.

    Raises:
        DataError: it cannot be read, is cut, or its rows are of another type.
    """
    try:
        with open(path, "rb") as handle:
            np.lib.format.read_magic(handle)
            shape, _, found = np.lib.format.read_array_header_1_0(handle)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a table ({error}); delete it and run again") from error
    if found != dtype or len(shape) != 1:
        raise DataError(
            f"{path} holds {found} of shape {shape}, not rows of {dtype}: it is of another version or stage; "
            "delete it and run again"
        )
    return Table.open(path, shape[0])


@dataclass(frozen=True)
class Chunk:
    """Rows start..end - 1 of a table, sorted by `document`."""

    table: Table
    start: int
    end: int

    def first_at_least(self, document: int) -> int:
        """The first row of it with at least this document, or `end`."""
        low, high = self.start, self.end
        while low < high:
            middle = (low + high) // 2
            if int(self.table.read(middle, middle + 1)["document"][0]) < document:
                low = middle + 1
            else:
                high = middle
        return low


def merge_by_document(chunks: Sequence[Chunk], ranges: Sequence[tuple[int, int]], out: RowWriter) -> None:
    """Append the rows of all chunks in order of `document`, of which no two are equal.

    Args:
        ranges: of documents, ascending, that hold all of them. Memory is that of the rows of one range.
    """
    cursors = [chunk.start for chunk in chunks]
    for _, last in ranges:
        parts = [np.empty(0, dtype=out.dtype)]
        for number, chunk in enumerate(chunks):
            if cursors[number] < chunk.end:
                end = Chunk(chunk.table, cursors[number], chunk.end).first_at_least(last)
                parts.append(chunk.table.read(cursors[number], end))
                cursors[number] = end
        rows = np.concatenate(parts)
        out.append(rows[np.argsort(rows["document"], kind="stable")])
    assert all(cursor == chunk.end for cursor, chunk in zip(cursors, chunks, strict=True)), "ranges hold all"


def remove_work(folder: Path) -> None:
    """Delete what a stage wrote for itself, in `work-*` below its folder, with those of other settings."""
    for work in folder.glob("work-*"):
        shutil.rmtree(work, ignore_errors=True)
