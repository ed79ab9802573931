"""Pass 1: raw text to the documents that training reads and their signals. Where the time goes, and the only
pass that reads input.

A unit writes, each under the folder's key:
    docs/unit-N.arrow          text, and where asked for URL and metadata
    signals/unit-N.arrow       one row a document
    signatures/unit-N.npy      MinHash signatures [documents, permutations]      if dedup.near
    lines/unit-N.npy           hashes of lines                                   if dedup.lines
    ngrams/unit-N.npy          hashes of n-grams                                 if dedup.ngrams
    matches/unit-N.npy         which evaluation items' n-grams it holds          if content.decontamination
    quarantine/unit-N.jsonl    bad records
and last signals/unit-N.json, which says that it is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmtrain.data.dedup.ngrams import NgramWriter
from llmtrain.data.dedup.units import RowWriter
from llmtrain.data.document import BadRecord, Document, utf8
from llmtrain.data.folder import read_done, write_done
from llmtrain.data.signals import Measured, SignalsConfig, measure_batch, tools_for
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.data.sources.read import read_unit
from llmtrain.data.sources.slices import Slice, Unit
from llmtrain.files import atomic_write

SCAN_VERSION = 3
"""Part of the folder's key: raise it when the same input would give other documents or signals."""
BATCH_BYTES = 4 << 20
"""Of raw text: what is measured at once."""
DOCS_BATCH_BYTES = 256 << 10
"""Of text: what is compressed, and read back, at once."""
DOCS_SCHEMA = pa.schema(
    [
        ("text", pa.large_binary()),
        ("url", pa.string()),
        ("metadata", pa.map_(pa.string(), pa.string())),
    ]
)
COMPRESSION = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    unit: Unit
    corpus: CorpusConfig
    signals: SignalsConfig
    out: Path
    key: str


@dataclass(frozen=True, kw_only=True)
class UnitFiles:
    """Where a unit's output lies."""

    docs: Path
    signals: Path
    signatures: Path
    lines: Path
    ngrams: Path
    matches: Path
    quarantine: Path
    done: Path


def unit_files(out: Path, key: str, number: int) -> UnitFiles:
    name = f"unit-{number:05d}"
    return UnitFiles(
        docs=out / "docs" / key / f"{name}.arrow",
        signals=out / "signals" / key / f"{name}.arrow",
        signatures=out / "signatures" / key / f"{name}.npy",
        lines=out / "lines" / key / f"{name}.npy",
        ngrams=out / "ngrams" / key / f"{name}.npy",
        matches=out / "matches" / key / f"{name}.npy",
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
    tools = tools_for(task.signals)
    reading = _Reading(task)
    with ExitStack() as stack:
        writers = _Writers(files, stack)
        for batch in reading.batches():
            texts = [pending.document.text for pending in batch]
            measured = measure_batch(texts, [pending.document.url for pending in batch], tools)
            reading.note_invalid(batch, measured.invalid)
            writers.write(task.unit.slices, [batch[number] for number in measured.kept], measured)
        if not writers.batch_rows:  # every unit has its files
            writers.write(task.unit.slices, [], measure_batch([], [], tools))
    reading.write_quarantine(files.quarantine)
    summary = {
        "num_records": reading.num_records,
        "num_bad": len(reading.bad),
        "digests": reading.digests,
        "sources": sorted(writers.sources),
        "batch_rows": writers.batch_rows,
        "text_bytes": writers.num_text_bytes,
    }
    write_done(files.done, summary, [*writers.paths, *([files.quarantine] if reading.bad else [])])
    return summary


class _Reading:
    """A unit's records: good ones in batches, bad ones noted, all numbered."""

    def __init__(self, task: ScanTask) -> None:
        self._task = task
        self.bad: list[dict[str, Any]] = []
        self.num_records: list[int] = []
        """Of each slice."""
        self.digests: list[str | None] = []

    def batches(self) -> Iterator[list[_Pending]]:
        corpus = self._task.corpus
        batch: list[_Pending] = []
        num_bytes = 0
        for slice_number, (_, records) in enumerate(read_unit(self._task.unit, corpus)):
            number = 0
            for number, record in enumerate(records, start=1):
                if isinstance(record, Document) and len(record.text) > corpus.max_document_bytes:
                    detail = f"a text of {len(record.text):,} bytes"
                    record = BadRecord("absurd_length", len(record.text), detail)
                if isinstance(record, Document):
                    batch.append(_Pending(slice_number, number, record))
                    num_bytes += len(record.text)
                elif record is not None:
                    self._note(slice_number, number, record)
                if num_bytes >= BATCH_BYTES:
                    yield batch
                    batch, num_bytes = [], 0
            self.num_records.append(number)
            self.digests.append(records.digest)
        if batch:
            yield batch

    def note_invalid(self, batch: list[_Pending], invalid: dict[int, str]) -> None:
        for number, detail in invalid.items():
            pending = batch[number]
            record = BadRecord("invalid_utf8", len(pending.document.text), detail)
            self._note(pending.slice_number, pending.record, record)

    def write_quarantine(self, path: Path) -> None:
        if self.bad:
            self.bad.sort(key=lambda record: (record["slice"], record["record"]))
            with atomic_write(path, "w") as handle:
                handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.bad)

    def _note(self, slice_number: int, number: int, record: BadRecord) -> None:
        self.bad.append(
            {
                "slice": slice_number,
                "path": self._task.unit.slices[slice_number].name,
                "record": number,
                "reason": record.reason,
                "num_bytes": record.num_bytes,
                "detail": utf8(record.detail[:500]),
            }
        )


class _Writers:
    """A unit's files, a batch at a time. They appear when the stack is left without an error."""

    def __init__(self, files: UnitFiles, stack: ExitStack) -> None:
        self.batch_rows: list[int] = []
        self.num_text_bytes = 0
        self.sources: set[str] = set()
        self._files = files
        self._stack = stack
        self._writers: dict[Path, Any] = {}

    @property
    def paths(self) -> list[Path]:
        return list(self._writers)

    def write(self, slices: Sequence[Slice], good: list[_Pending], measured: Measured) -> None:
        first = sum(self.batch_rows)
        docs = _docs_batch(good, measured)
        for start, end in _cuts(measured.offsets):
            self._table(self._files.docs, docs.slice(start, end - start))
            self.batch_rows.append(end - start)
        signals = _signals_batch(slices, good, measured)
        self._table(self._files.signals, signals)
        self.sources.update(signals.column("source").unique().to_pylist())
        if measured.signatures is not None:
            self._array(self._files.signatures, measured.signatures)
        if measured.lines is not None:
            measured.lines["row"] += first
            self._array(self._files.lines, measured.lines)
        if measured.ngrams is not None:
            self._open(self._files.ngrams, NgramWriter, self._files.ngrams).append(*measured.ngrams)
        if measured.matches is not None:
            measured.matches["document"] += first
            self._array(self._files.matches, measured.matches)
        self.num_text_bytes += len(measured.text)

    def _table(self, path: Path, batch: pa.RecordBatch) -> None:
        if path not in self._writers:
            stream = self._stack.enter_context(atomic_write(path))
            self._open(path, pa.ipc.new_file, stream, batch.schema, options=COMPRESSION)
        self._writers[path].write_batch(batch)

    def _array(self, path: Path, rows: npt.NDArray[Any]) -> None:
        self._open(path, RowWriter, path, rows.dtype, rows.shape[1:]).append(rows)

    def _open(
        self, path: Path, kind: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:  # Any: writers
        if path not in self._writers:
            self._writers[path] = self._stack.enter_context(kind(*arguments, **options))
        return self._writers[path]


def _cuts(offsets: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of documents of about DOCS_BATCH_BYTES of text, for reading some of them without all."""
    starts = np.flatnonzero(np.diff(offsets[:-1] // DOCS_BATCH_BYTES, prepend=-1))
    return pairwise([*starts.tolist(), len(offsets) - 1])


def _docs_batch(good: list[_Pending], measured: Measured) -> pa.RecordBatch:
    offsets, text = pa.py_buffer(measured.offsets), pa.py_buffer(measured.text)
    texts = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(good), [None, offsets, text])
    urls = pa.array([pending.document.url for pending in good], pa.string())
    metadata = [pending.document.metadata for pending in good]
    pairs = pa.array(
        [None if m is None else list(m.items()) for m in metadata], DOCS_SCHEMA.field("metadata").type
    )
    return pa.record_batch([texts, urls, pairs], schema=DOCS_SCHEMA)


def _signals_batch(slices: Sequence[Slice], good: list[_Pending], measured: Measured) -> pa.RecordBatch:
    columns = {
        "slice": pa.array([pending.slice_number for pending in good], pa.int32()),
        "record": pa.array([pending.record for pending in good], pa.int64()),
        "id": pa.array(
            [document_id(slices[p.slice_number].name, p.document.position) for p in good], pa.binary(16)
        ),
        "content": pa.array(measured.content, pa.binary(16)),
        "source": pa.array([p.document.source or slices[p.slice_number].source for p in good], pa.string()),
        "raw_bytes": pa.array([len(pending.document.text) for pending in good], pa.int64()),
    }
    if measured.languages is not None:
        columns["language"] = pa.array(measured.languages, pa.string())
    columns |= {name: pa.array(values) for name, values in measured.columns.items()}
    return pa.record_batch(columns)
