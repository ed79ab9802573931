"""Pass 1: raw text to normalised documents and their signals. Where the time goes, and the only pass
that reads input.

A unit writes `docs/<key>/unit-N.arrow` (text), `signals/<key>/unit-N.arrow` (one row for each document),
its bad records to `quarantine/<key>/unit-N.jsonl`, and last `signals/<key>/unit-N.json`, which says that
it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from llmtrain.data.document import BadRecord, Document, utf8
from llmtrain.data.folder import read_done, write_done
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.data.sources.read import read_unit
from llmtrain.data.sources.slices import Slice, Unit
from llmtrain.data.text.kernels import SIGNALS
from llmtrain.data.text.signals import measure_batch
from llmtrain.files import atomic_write

SCAN_VERSION = 2
"""Part of the folder's key: raise it when the same input would give other documents or signals."""
BATCH_BYTES = 4 << 20

DOCS_SCHEMA = pa.schema([("text", pa.large_binary())])
SIGNALS_SCHEMA = pa.schema(
    [
        ("slice", pa.int32()),
        ("record", pa.int64()),
        ("id", pa.binary(16)),
        ("content", pa.binary(16)),
        ("source", pa.string()),
        ("raw_bytes", pa.int64()),
        ("num_bytes", pa.int64()),
        *((name, pa.int64()) for name in SIGNALS),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    unit: Unit
    corpus: CorpusConfig
    out: Path
    key: str


@dataclass(frozen=True, kw_only=True)
class UnitFiles:
    """Where a unit's output lies."""

    docs: Path
    signals: Path
    quarantine: Path
    done: Path


def unit_files(out: Path, key: str, number: int) -> UnitFiles:
    name = f"unit-{number:05d}"
    return UnitFiles(
        docs=out / "docs" / key / f"{name}.arrow",
        signals=out / "signals" / key / f"{name}.arrow",
        quarantine=out / "quarantine" / key / f"{name}.jsonl",
        done=out / "signals" / key / f"{name}.json",
    )


@dataclass(slots=True)
class _Pending:
    """A document that waits for its batch."""

    slice_number: int
    record: int
    document: Document


def document_id(name: str, position: int) -> bytes:
    """16 bytes that name a document: the hash of its file's name and its place there, whatever the work
    units."""
    return xxhash.xxh3_128_digest(f"{name}\x1f{position}".encode())


def scan_unit(task: ScanTask) -> dict[str, Any]:
    """Scan one unit unless that is done, and return its counts."""
    files = unit_files(task.out, task.key, task.unit.number)
    if (finished := read_done(files.done)) is not None:
        return finished
    bad: list[dict[str, Any]] = []
    num_records: list[int] = []
    batch_rows: list[int] = []
    num_text_bytes = 0
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        atomic_write(files.docs) as docs_file,
        atomic_write(files.signals) as signals_file,
        pa.ipc.new_file(docs_file, DOCS_SCHEMA, options=options) as docs_writer,
        pa.ipc.new_file(signals_file, SIGNALS_SCHEMA, options=options) as signals_writer,
    ):
        for batch in _batches(task, bad, num_records):
            docs, signals = _measured(task.unit.slices, batch, bad)
            docs_writer.write_batch(docs)
            signals_writer.write_batch(signals)
            batch_rows.append(docs.num_rows)
            num_text_bytes += signals.column("num_bytes").to_numpy().sum().item()
    if bad:
        bad.sort(key=lambda record: (record["slice"], record["record"]))
        with atomic_write(files.quarantine, "w") as handle:
            handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in bad)
    summary = {
        "num_records": num_records,
        "num_bad": len(bad),
        "batch_rows": batch_rows,
        "text_bytes": num_text_bytes,
    }
    write_done(files.done, summary, [files.docs, files.signals, *([files.quarantine] if bad else [])])
    return summary


def _batches(task: ScanTask, bad: list[dict[str, Any]], num_records: list[int]) -> Iterator[list[_Pending]]:
    """Collect good records into batches; note bad ones, and how many records each slice has."""
    batch: list[_Pending] = []
    num_bytes = 0
    for slice_number, (piece, records) in enumerate(read_unit(task.unit, task.corpus)):
        number = 0
        for number, record in enumerate(records, start=1):
            if isinstance(record, Document) and len(record.text) > task.corpus.max_document_bytes:
                detail = f"a text of {len(record.text):,} bytes"
                record = BadRecord("absurd_length", len(record.text), detail)
            if isinstance(record, Document):
                batch.append(_Pending(slice_number, number, record))
                num_bytes += len(record.text)
            elif record is not None:
                bad.append(_bad(slice_number, piece, number, record))
            if num_bytes >= BATCH_BYTES:
                yield batch
                batch, num_bytes = [], 0
        num_records.append(number)
    if batch:
        yield batch


def _bad(slice_number: int, piece: Slice, number: int, record: BadRecord) -> dict[str, Any]:
    return {
        "slice": slice_number,
        "path": piece.name,
        "record": number,
        "reason": record.reason,
        "num_bytes": record.num_bytes,
        "detail": utf8(record.detail[:500]),
    }


def _measured(
    slices: tuple[Slice, ...], batch: list[_Pending], bad: list[dict[str, Any]]
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Measure a batch; returns its rows of the docs and of the signals table."""
    measured = measure_batch([pending.document.text for pending in batch])
    for number, detail in measured.invalid.items():
        pending = batch[number]
        record = BadRecord("invalid_utf8", len(pending.document.text), detail)
        bad.append(_bad(pending.slice_number, slices[pending.slice_number], pending.record, record))
    good = [batch[number] for number in measured.kept]
    offsets, text = pa.py_buffer(measured.offsets), pa.py_buffer(measured.text)
    docs = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(good), [None, offsets, text])
    columns = [
        pa.array([pending.slice_number for pending in good], pa.int32()),
        pa.array([pending.record for pending in good], pa.int64()),
        pa.array(
            [document_id(slices[p.slice_number].name, p.document.position) for p in good], pa.binary(16)
        ),
        pa.array(measured.content, pa.binary(16)),
        pa.array([p.document.source or slices[p.slice_number].source for p in good], pa.string()),
        pa.array([len(pending.document.text) for pending in good], pa.int64()),
        pa.array(measured.offsets[1:] - measured.offsets[:-1], pa.int64()),
        *(pa.array(measured.signals[:, column]) for column in range(len(SIGNALS))),
    ]
    return pa.record_batch([docs], schema=DOCS_SCHEMA), pa.record_batch(columns, schema=SIGNALS_SCHEMA)
