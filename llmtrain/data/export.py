"""Kept documents as Parquet: what `stop_after=documents` ends with, for teams that tokenize elsewhere.

A unit is a file: a run of documents of one split, cut where their text passes a multiple of
`documents.file_bytes`, so files do not depend on the work units of the scan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmtrain.data.folder import read_done, write_done
from llmtrain.data.verdicts import Verdicts, flat
from llmtrain.files import atomic_write, hash_file

EXPORT_VERSION = 1
"""Part of the folder's key: raise it when the same documents would give other files."""
ROW_GROUP_BYTES = 32 << 20
NOT_DICTIONARIES = ("id", "text", "url", "record", "metadata")


@dataclass(frozen=True, kw_only=True)
class DocumentsFile:
    """One Parquet file of kept documents."""

    path: str
    """Relative to the data folder."""
    split: str
    num_documents: int
    text_bytes: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ExportTask:
    verdicts: Verdicts
    path: str
    """Relative to the data folder."""
    split: str
    zstd_level: int
    first: int
    """First row of the split's table."""
    last: int
    """Row to stop at, excluded."""


def export_documents(task: ExportTask) -> dict[str, Any]:
    """Write one file unless that is done. Returns its entry."""
    target = task.verdicts.out / task.path
    done = target.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        return finished
    num_documents = text_bytes = 0
    rows = task.verdicts.rows(task.split, task.first, task.last)
    with ExitStack() as stack:
        stream = stack.enter_context(atomic_write(target))
        writer = None
        for batches in _row_groups(task.verdicts, rows):
            batch = batches[0]
            if writer is None:
                dictionaries = [name for name in batch.schema.names if name not in NOT_DICTIONARIES]
                writer = stack.enter_context(
                    pq.ParquetWriter(
                        stream, batch.schema, compression="zstd", compression_level=task.zstd_level,
                        use_dictionary=dictionaries, write_statistics=dictionaries,
                    )
                )  # fmt: skip
            group = pa.Table.from_batches(batches)
            writer.write_table(group)
            num_documents += group.num_rows
            text_bytes += pc.sum(pc.binary_length(group.column("text"))).as_py()
    entry = DocumentsFile(
        path=task.path,
        split=task.split,
        num_documents=num_documents,
        text_bytes=text_bytes,
        num_bytes=target.stat().st_size,
        sha256=hash_file(target),
    )
    summary = {"file": asdict(entry)}
    write_done(done, summary, [target])
    return summary


def _row_groups(verdicts: Verdicts, rows: pa.Table) -> Iterator[list[pa.RecordBatch]]:
    """The documents of some rows in batches that come to about ROW_GROUP_BYTES of text."""
    group, num_bytes = [], 0
    for part, (text, offsets), columns in verdicts.documents(rows):
        group.append(_batch(part, text, offsets, columns))
        num_bytes += int(offsets[-1] - offsets[0])
        if num_bytes >= ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _batch(
    rows: pa.Table, text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], documents: pa.RecordBatch
) -> pa.RecordBatch:
    """One row a document."""
    texts = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))
    columns = {
        "id": pa.array([digest.hex() for digest in rows.column("id").to_pylist()], pa.string()),
        "text": texts,
        "source": flat(rows, "source"),
        "path": flat(rows, "path"),
        "record": flat(rows, "record"),
        "url": documents.column("url"),
        "metadata": documents.column("metadata"),
    }
    return pa.record_batch(columns)
