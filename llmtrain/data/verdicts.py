"""Between the passes: what the scan found, the bad records in one list, the verdicts as tables.

`verdicts/<key>/` holds `train.arrow`, `held_out.arrow` and `dropped.arrow`, one row for each document in
the order of the input, and `summary.json` with the funnel of the first two passes, which comes last.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmtrain.data.config import DataConfig
from llmtrain.data.docs import TextBatch, documents_of
from llmtrain.data.document import SKIP_REASONS
from llmtrain.data.flow import Flow
from llmtrain.data.scan import unit_files
from llmtrain.data.sources.slices import Unit
from llmtrain.errors import DataError
from llmtrain.files import atomic_write

log = logging.getLogger(__name__)

SPLITS = ("train", "held_out")
PARTS = (*SPLITS, "dropped")
VERDICTS = pa.schema(
    [
        ("unit", pa.int32()),
        ("row", pa.int64()),
        ("id", pa.binary(16)),
        ("content", pa.binary(16)),
        ("source", pa.large_string()),
        ("path", pa.large_string()),
        ("record", pa.int64()),
        ("text_bytes", pa.int64()),
        ("reason", pa.string()),
        ("survivor", pa.binary(16)),
        ("cluster_size", pa.int32()),
    ]
)
"""`text_bytes` are those of the text that training reads; of a dropped document, those that the rules saw.
`survivor`: id of the document that stays for this one; null where there is none."""


@dataclass(frozen=True, kw_only=True)
class Scanned:
    key: str
    units: list[Unit]
    summaries: list[dict[str, Any]]
    last: tuple[int, int] | None = None
    """Unit and row of the last document that counts; None: all count."""
    last_slice: int = 0
    """The slice of that document."""
    input_hash: str = ""
    """Of the list of files that were read."""

    @property
    def sources(self) -> list[str]:
        """Every source's name, sorted."""
        return sorted({name for summary in self.summaries for name in summary["sources"]})

    def num_rows(self, unit: int) -> int | None:
        """Documents of the unit that count; None: all."""
        if self.last is None or unit < self.last[0]:
            return None
        return self.last[1] + 1 if unit == self.last[0] else 0

    def records_before(self) -> Iterator[list[int]]:
        """For each unit, for each of its slices: how many records of that file came before."""
        before: Counter[str] = Counter()
        for unit, summary in zip(self.units, self.summaries, strict=True):
            counts = []
            for piece, num_records in zip(unit.slices, summary["num_records"], strict=True):
                counts.append(before[piece.name])
                before[piece.name] += num_records
            yield counts


def cut_at(scanned: Scanned, out: Path, cap: int) -> Scanned:
    """Without the documents after the one with which the texts reach `cap` bytes: those were not drawn."""
    left = cap
    for unit, summary in zip(scanned.units, scanned.summaries, strict=True):
        if summary["text_bytes"] >= left:
            with pa.memory_map(str(unit_files(out, scanned.key, unit.number).signals)) as handle:
                table = pa.ipc.open_file(handle).read_all()
            row = int(np.searchsorted(np.cumsum(table.column("num_bytes").to_numpy()), left))
            return Scanned(
                key=scanned.key,
                units=scanned.units[: unit.number + 1],
                summaries=scanned.summaries[: unit.number + 1],
                last=(unit.number, row),
                last_slice=table.column("slice")[row].as_py(),
            )
        left -= summary["text_bytes"]
    return scanned


@dataclass
class BadRecords:
    """What the scan could not use: sums by source and reason, and the first one."""

    flow: Flow = field(default_factory=dict)
    first: dict[str, Any] | None = None
    num_documents: int = 0

    def add(self, source: str, reason: str, counts: dict[str, int]) -> None:
        entry = self.flow.setdefault(source, {"in": {}, "kept": {}, "dropped": {}})
        dropped = entry["dropped"].setdefault(reason, {})
        for name, count in counts.items():
            entry["in"][name] = entry["in"].get(name, 0) + count
            entry["kept"].setdefault(name, 0)
            dropped[name] = dropped.get(name, 0) + count


def collect_bad_records(out: Path, scanned: Scanned) -> BadRecords:
    """Write every bad record, with its number in its file, to `all.jsonl` in the quarantine, and count
    them."""
    bad = BadRecords()
    if any(summary["num_bad"] for summary in scanned.summaries):
        with atomic_write(out / "quarantine" / scanned.key / "all.jsonl", "w") as handle:
            for source, record in _bad_records(out, scanned):
                handle.write(json.dumps(record, ensure_ascii=False) + "\n")
                if record["reason"] not in SKIP_REASONS:
                    bad.first = bad.first or record
                bad.num_documents += 1
                bad.add(source, record["reason"], {"documents": 1, "bytes": record["num_bytes"]})
    return bad


def _bad_records(out: Path, scanned: Scanned) -> Iterator[tuple[str, dict[str, Any]]]:
    for unit, summary, before in zip(scanned.units, scanned.summaries, scanned.records_before(), strict=True):
        if not summary["num_bad"]:
            continue
        with open(unit_files(out, scanned.key, unit.number).quarantine, encoding="utf-8") as handle:
            for line in handle:
                record = json.loads(line)
                place = record.pop("slice")
                if scanned.last is None or (unit.number, place) <= (scanned.last[0], scanned.last_slice):
                    record["record"] += before[place]
                    yield unit.slices[place].source, record


def check_quarantine(
    cfg: DataConfig, folder: Path, funnel: dict[str, Any], first: dict[str, Any] | None
) -> None:
    """Stop when there is nothing to read, or when too many records are bad; warn of any.

    Args:
        folder: of the quarantine.
        first: the first bad record, where it is known.
    """
    counts = {name: drop["documents"] for name, drop in funnel["dropped"].items() if drop.get("documents")}
    num_skipped = sum(counts.pop(name, 0) for name in SKIP_REASONS)
    num_records = funnel["in"]["documents"] - num_skipped
    if num_records == 0:
        where = ", ".join(cfg.corpus.paths) or cfg.corpus.dataset or "this Python installation"
        skipped = f" ({num_skipped:,} records are no text)" if num_skipped else ""
        raise DataError(f"corpus {cfg.corpus.name} is empty: no document in {where}{skipped}")
    num_bad = sum(counts.values())
    if num_bad == 0:
        return
    share = num_bad / num_records
    listed = ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    what = f"{num_bad:,} of {num_records:,} records ({share:.2%}) are bad"
    listing = folder / "all.jsonl"
    if share > cfg.max_quarantine_share:
        place = f"; the first: {first['path']}, record {first['record']}: {first['detail']}" if first else ""
        raise DataError(
            f"{what}, more than max_quarantine_share={cfg.max_quarantine_share:.2%}: {listed}{place}. "
            f"All are listed in {listing}; mend them, or raise max_quarantine_share"
        )
    cut = [name for name in ("truncated_archive", "corrupt_archive", "unreadable_file") if name in counts]
    rest = f"; what follows a {' or '.join(cut)} in its file is lost and not counted" if cut else ""
    log.warning("%s and left out: %s. They are listed in %s%s", what, listed, listing, rest)


def flat(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """A column in one piece."""
    column = table.column(name)
    if isinstance(column, pa.ChunkedArray):
        return (
            column.chunk(0)
            if column.num_chunks == 1
            else pa.concat_arrays(column.chunks)
            if column.num_chunks
            else pa.array([], column.type)
        )
    return column


def digests(table: pa.Table | pa.RecordBatch, name: str) -> npt.NDArray[np.uint8]:
    """A binary(16) column as [n, 16]."""
    column = flat(table, name)
    raw = np.frombuffer(column.buffers()[1], dtype=np.uint8) if len(column) else np.zeros(0, dtype=np.uint8)
    return raw.reshape(-1, 16)[column.offset : column.offset + len(column)]


class DocumentsDigest:
    """Takes in, in order, everything about the documents of a split that the output shows."""

    COLUMNS = ("id", "content", "text_bytes", "source", "path", "record")

    def __init__(self) -> None:
        self._hashers = {name: xxhash.xxh3_128() for name in self.COLUMNS}
        self._num_rows = 0

    def update(self, part: pa.RecordBatch) -> None:
        self._num_rows += part.num_rows
        for name, hasher in self._hashers.items():
            column = part.column(name)
            if name in ("id", "content"):
                hasher.update(digests(part, name).tobytes())
            elif pa.types.is_integer(column.type):
                hasher.update(column.to_numpy().astype("<i8").tobytes())
            else:
                hasher.update("".join(f"{value}\x1f" for value in column.to_pylist()).encode())

    def value(self) -> list[Any]:
        return [self._num_rows, *(hasher.hexdigest() for hasher in self._hashers.values())]


def join_parts(folder: Path, parts: Iterable[Path]) -> list[Any]:
    """Copy the batches of each unit's file, one for each of PARTS, into the tables. Returns the digest of the
    splits; one unit is in memory at a time."""
    digest = {name: DocumentsDigest() for name in SPLITS}
    with ExitStack() as stack:
        writers = {}
        for name in PARTS:
            handle = stack.enter_context(atomic_write(folder / f"{name}.arrow"))
            writers[name] = stack.enter_context(pa.ipc.new_file(handle, VERDICTS))
        for path in parts:
            with pa.memory_map(str(path)) as handle:
                reader = pa.ipc.open_file(handle)
                for number, name in enumerate(PARTS):
                    batch = reader.get_batch(number)
                    if batch.num_rows:
                        writers[name].write_batch(batch)
                    if name in digest:
                        digest[name].update(batch)
    return [[name, *value.value()] for name, value in digest.items()]


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdict tables of a run, and the documents that they keep. Picklable; opens files when asked."""

    out: Path
    scan_key: str
    folder: Path
    has_cuts: bool
    """Whether lines are to be left out of the texts."""

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """The rows of one of PARTS, a unit of the scan at a time."""
        with pa.memory_map(str(self.folder / f"{name}.arrow")) as handle:
            reader = pa.ipc.open_file(handle)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def rows(self, name: str, first: int, last: int) -> pa.Table:
        """Rows first..last - 1 of one of PARTS."""
        with pa.memory_map(str(self.folder / f"{name}.arrow")) as handle:
            return pa.ipc.open_file(handle).read_all().slice(first, last - first)

    def documents(self, rows: pa.Table) -> Iterator[tuple[pa.Table, TextBatch, pa.RecordBatch]]:
        """The documents of some rows, in order: rows, texts as training reads them, columns of the docs
        file."""
        return documents_of(rows, self.out, self.scan_key, self.folder / "cuts" if self.has_cuts else None)

    def languages(self, rows: pa.Table) -> pa.Array:
        """What the scan found these documents to be written in; nulls where it did not look."""
        unit_numbers, unit_rows = (rows.column(name).to_numpy() for name in ("unit", "row"))
        starts = np.flatnonzero(np.diff(unit_numbers, prepend=-1))
        found = []
        for start, stop in itertools.pairwise([*starts.tolist(), len(unit_numbers)]):
            files = unit_files(self.out, self.scan_key, int(unit_numbers[start]))
            with pa.memory_map(str(files.signals)) as handle:
                table = pa.ipc.open_file(handle).read_all()
                if "language" not in table.column_names:
                    return pa.nulls(len(unit_rows), pa.string())
                found += flat(table, "language").take(pa.array(unit_rows[start:stop])).to_pylist()
        return pa.array(found, pa.string())

    def runs(self, name: str, run_bytes: int) -> list[tuple[int, int]]:
        """Rows first..last - 1 of each run of documents, cut where their text passes a multiple of
        `run_bytes`: a function of the documents alone."""
        starts, filled, num_rows, previous = [], 0, 0, -1
        for batch in self.batches(name):
            text_bytes = batch.column("text_bytes").to_numpy()
            run_of = (filled + np.cumsum(text_bytes) - text_bytes) // run_bytes
            starts += (num_rows + np.flatnonzero(np.diff(run_of, prepend=previous))).tolist()
            previous = int(run_of[-1]) if len(run_of) else previous
            filled += int(text_bytes.sum())
            num_rows += batch.num_rows
        return list(itertools.pairwise([*starts, num_rows]))
