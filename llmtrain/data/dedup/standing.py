"""One number for each document that says which of two is better: 0 for the best of the corpus, and so on.

Better is what an earlier run kept, then what has the higher rank, then what has the smaller 128-bit id: the
order of `units.best_first` over all documents, alive or not. A record of a shuffle then carries 8 bytes
instead of 33, and whoever has the smallest number is the owner. The order is found by an external sort:
sorted runs, ranges between sampled splitters (DeWitt, Naughton and Schneider 1991), and a way back to the
units, each step within `partition_bytes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain.data.dedup.arrays import open_array, remove_work
from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.partition import PartitionFile, PartitionWriter, num_partitions_for, record_type
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, RowWriter, Table
from llmtrain.data.engines.engine import Engine
from llmtrain.data.folder import read_done, write_done

STANDING = np.dtype("<u8")
_KEY = np.dtype([("is_new", "u1"), ("order", "<u8"), ("id_high", "<u8"), ("id_low", "<u8"), ("row", "<u4")])
"""What documents are sorted by, ascending, and the row of each in its piece."""
_PLACE = np.dtype([("standing", "<u8")])
_SAMPLES = 64
"""Samples for each range: the largest is then at most 1 + 1/64 times the mean, and a run's step more."""


@dataclass(frozen=True)
class Piece:
    """Rows start..end - 1 of a unit: what a task takes at once."""

    number: int
    unit: int
    """Position in the list of units."""
    start: int
    end: int


def cut_into_pieces(units: Sequence[DedupUnit], max_rows: int) -> list[Piece]:
    """The documents of all units in pieces of at most `max_rows`. A unit without documents has none."""
    spans = (
        (number, at, min(at + max_rows, unit.num_documents))
        for number, unit in enumerate(units)
        for at in range(0, unit.num_documents, max_rows)
    )
    return [Piece(number, *span) for number, span in enumerate(spans)]


def document_rows(partition_bytes: int) -> int:
    """Documents that a task may take at once: 33 bytes a row, four copies, and room for their order."""
    return max(1, min(partition_bytes // 256, 1 << 31))


def standings(units: Sequence[DedupUnit], cfg: DedupConfig, engine: Engine, folder: Path) -> list[Path]:
    """Write the standing of every document, one .npy of STANDING [num_documents] a unit, and return the paths
    in the order of the units."""
    paths = [folder / f"unit-{number:06d}.npy" for number in range(len(units))]
    done = folder / "done.json"
    if read_done(done) is not None:
        return paths
    max_rows = document_rows(cfg.partition_bytes)
    pieces = cut_into_pieces(units, max_rows)
    num_documents = sum(unit.num_documents for unit in units)
    num_ranges = num_partitions_for(num_documents * _KEY.itemsize, cfg.partition_bytes)
    work = folder / f"work-{max_rows}-{num_ranges}"
    for _ in engine.map(_sort_piece, [_SortTask(units[p.unit], p, work) for p in pieces]):
        pass
    splitters = _splitters(work, pieces, num_documents, num_ranges)
    bounds = list(itertools.pairwise([None, *splitters, None]))
    tasks = [_RangeTask(work, len(pieces), n, low, high) for n, (low, high) in enumerate(bounds)]
    for _ in engine.map(_number_range, tasks):
        pass
    by_unit: list[list[Piece]] = [[] for _ in units]
    for piece in pieces:
        by_unit[piece.unit].append(piece)
    back = [
        _BackTask(work, len(bounds), tuple(mine), path) for mine, path in zip(by_unit, paths, strict=True)
    ]
    for _ in engine.map(_write_unit, back):
        pass
    write_done(done, {"num_documents": num_documents}, paths)
    remove_work(folder)
    return paths


@dataclass(frozen=True)
class _SortTask:
    unit: DedupUnit
    piece: Piece
    work: Path


@dataclass(frozen=True)
class _RangeTask:
    work: Path
    num_pieces: int
    number: int
    low: tuple[int, ...] | None
    high: tuple[int, ...] | None


@dataclass(frozen=True)
class _BackTask:
    work: Path
    num_ranges: int
    pieces: tuple[Piece, ...]
    path: Path


def _run(work: Path, piece: int) -> Path:
    return work / f"run-{piece:06d}.npy"


def _range(work: Path, number: int) -> Path:
    return work / f"range-{number:05d}.bin"


def _descending(rank: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Integers in the order of -rank, as sorting floats has it: NaN comes last, and 0.0 equals -0.0."""
    bits = (0.0 - rank).view(np.uint64)
    is_negative = bits >> np.uint64(63) == 1
    order = np.where(is_negative, ~bits, bits | np.uint64(1 << 63))
    order[np.isnan(rank)] = np.uint64(2**64 - 1)
    return order


def _best_first(keys: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """The order of the keys. By id first, with a fast sort; then, keeping that, by what weighs more."""
    id_high, id_low = np.ascontiguousarray(keys["id_high"]), np.ascontiguousarray(keys["id_low"])
    order: npt.NDArray[np.int64] = np.argsort(id_high)
    if (id_high[order[1:]] == id_high[order[:-1]]).any():  # by chance never; three times as slow
        order = np.lexsort((id_low, id_high))
    for name in ("order", "is_new"):
        column = np.ascontiguousarray(keys[name])
        if len(column) and column.min() < column.max():
            order = order[np.argsort(column[order], kind="stable")]
    return order


def _sort_piece(task: _SortTask) -> None:
    path = _run(task.work, task.piece.number)
    if read_done(path.with_suffix(".json")) is not None:
        return
    rows = open_array(task.unit.documents, DOCUMENT).read(task.piece.start, task.piece.end)
    keys = np.empty(len(rows), dtype=_KEY)
    keys["is_new"] = ~rows["is_previous"]
    keys["order"] = _descending(rows["rank"])
    keys["id_high"], keys["id_low"] = rows["id_high"], rows["id_low"]
    keys["row"] = np.arange(len(rows))
    with RowWriter(path, _KEY) as writer:
        writer.append(keys[_best_first(keys)])
    write_done(path.with_suffix(".json"), {}, [path])


def _splitters(
    work: Path, pieces: Sequence[Piece], num_documents: int, num_ranges: int
) -> list[tuple[int, ...]]:
    """Keys that cut the documents into ranges of about equal size."""
    if num_ranges == 1:
        return []
    step = max(1, num_documents // (num_ranges * _SAMPLES))
    parts = []
    for piece in pieces:
        rows = np.arange(step // 2, piece.end - piece.start, step)
        part = np.empty(len(rows), dtype=_KEY)
        open_array(_run(work, piece.number), _KEY).take(rows, part)
        parts.append(part)
    sample = np.concatenate(parts)
    sample = sample[_best_first(sample)]
    if len(sample) == 0:
        return []
    cuts = np.linspace(0, len(sample), num_ranges + 1)[1:-1].astype(np.int64).tolist()
    return sorted({tuple(sample[cut].item()[:4]) for cut in cuts})


def _first_at_least(table: Table, key: tuple[int, ...] | None, default: int) -> int:
    if key is None:
        return default
    low, high = 0, table.shape[0]
    while low < high:
        middle = (low + high) // 2
        if table.read(middle, middle + 1)[0].item()[:4] < key:
            low = middle + 1
        else:
            high = middle
    return low


def _number_range(task: _RangeTask) -> None:
    path = _range(task.work, task.number)
    if read_done(path.with_suffix(".json")) is not None:
        return
    num_before = 0
    parts = [np.empty(0, dtype=_KEY)]
    for number in range(task.num_pieces):
        run = open_array(_run(task.work, number), _KEY)
        start = _first_at_least(run, task.low, 0)
        parts.append(run.read(start, _first_at_least(run, task.high, run.shape[0])))
        num_before += start
    ends = np.cumsum([len(part) for part in parts])
    keys = np.concatenate(parts)
    del parts
    standing = np.empty(len(keys), dtype=np.uint64)
    standing[_best_first(keys)] = np.arange(num_before, num_before + len(keys), dtype=np.uint64)
    records = np.empty(len(keys), dtype=record_type(_PLACE))
    records["key"] = keys["row"]  # not in order: they are read back whole
    records["standing"] = standing
    with PartitionWriter(path, _PLACE, task.num_pieces) as writer:
        for number, (first, last) in enumerate(itertools.pairwise(ends.tolist())):
            writer.append(number, records[first:last])
    write_done(path.with_suffix(".json"), {}, [path])


def _write_unit(task: _BackTask) -> None:
    done = task.path.with_suffix(".json")
    if read_done(done) is not None:
        return
    ranges = [PartitionFile.open(_range(task.work, number)) for number in range(task.num_ranges)]
    with RowWriter(task.path, STANDING) as writer:
        for piece in task.pieces:
            standing = np.empty(piece.end - piece.start, dtype=STANDING)
            num_found = 0
            for file in ranges:
                records = file.read(int(file.offsets[piece.number]), int(file.offsets[piece.number + 1]))
                standing[records["key"]] = records["standing"]
                num_found += len(records)
            assert num_found == len(standing), "every document has one standing"
            writer.append(standing)
    write_done(done, {}, [task.path])


def read_standings(path: Path, start: int, end: int) -> npt.NDArray[np.uint64]:
    """The standings of rows start..end - 1 of a unit."""
    found: npt.NDArray[np.uint64] = open_array(path, STANDING).read(start, end)
    return found
