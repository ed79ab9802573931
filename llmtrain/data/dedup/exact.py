"""Exact duplicates: equal 128-bit hashes of normalised text.

The hash is xxh3-128 (Yann Collet, xxHash 0.8): of n different texts about n^2 / 2^129 pairs share one, 1e-18
for 2.5e10 documents. Documents are shuffled by the hash's high bits, so a task sees all copies of a text and
no more than its share of the corpus.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.dedup.arrays import Chunk, merge_by_document, open_array, remove_work
from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.partition import (
    COPIES,
    KeyRange,
    key_ranges,
    num_partitions_for,
    record_type,
    write_partitioned,
)
from llmtrain.data.dedup.standing import Piece, cut_into_pieces, document_rows, read_standings, standings
from llmtrain.data.dedup.units import DOCUMENT, DUPLICATE, DedupUnit, RowWriter
from llmtrain.data.engines.engine import Engine
from llmtrain.data.folder import read_done, write_done

Records = npt.NDArray[np.void]

_COPY = np.dtype([("content_low", "<u8"), ("standing", "<u8"), ("document", "<i8"), ("is_previous", "?")])
"""What is shuffled by `content_high`."""

Halves = npt.NDArray[np.uint64]


def halves(digests: npt.NDArray[np.uint8]) -> tuple[Halves, Halves]:
    """High and low 64 bits of digests [n, 16]; their order is the order of the bytes."""
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return words[:, 0], words[:, 1]


def exact_duplicates(
    units: Sequence[DedupUnit],
    cfg: DedupConfig,
    engine: Engine,
    folder: Path,
    standing: Sequence[Path] | None = None,
) -> Path:
    """Find documents whose text another, better one has too.

    Of the documents that are alive the best of each text stays (dedup/standing.py). What an earlier run kept
    is never listed, but counts in `cluster_size`.

    Args:
        folder: of this stage alone, and of these documents and settings; `partition_bytes` may change.
        standing: what `standings` returned; None: it is found in the folder.

    Returns:
        an .npy of DUPLICATE, sorted by document.
    """
    path, done = folder / "duplicates.npy", folder / "done.json"
    if read_done(done) is not None:
        return path
    if standing is None:
        standing = standings(units, cfg, engine, folder / "standing")
    max_rows = document_rows(cfg.partition_bytes)
    record_bytes = record_type(_COPY).itemsize
    num_bytes = sum(unit.num_documents for unit in units) * record_bytes
    num_partitions = num_partitions_for(num_bytes, cfg.partition_bytes)
    max_records = max(1, cfg.partition_bytes // (COPIES * record_bytes))
    work = folder / f"work-{max_rows}-{num_partitions}"
    pieces = cut_into_pieces(units, max_rows)
    spread = [_SpreadTask(units[p.unit], p, standing[p.unit], work, num_partitions) for p in pieces]
    for _ in engine.map(_spread, spread):
        pass
    tasks = [_GroupTask(work, len(pieces), n, max_records) for n in range(num_partitions)]
    chunks = [
        Chunk(open_array(_found(work, number), DUPLICATE), start, end)
        for number, offsets in enumerate(engine.map(_group, tasks))
        for start, end in itertools.pairwise(offsets)
    ]
    ranges = [(units[p.unit].first + p.start, units[p.unit].first + p.end) for p in pieces]
    with RowWriter(path, DUPLICATE) as writer:
        merge_by_document(chunks, sorted(ranges), writer)
    write_done(done, {"num_duplicates": writer.num_rows}, [path])
    remove_work(folder)
    return path


@dataclass(frozen=True)
class _SpreadTask:
    unit: DedupUnit
    piece: Piece
    standing: Path
    work: Path
    num_partitions: int


@dataclass(frozen=True)
class _GroupTask:
    work: Path
    num_pieces: int
    number: int
    max_records: int


def _spread_file(work: Path, piece: int) -> Path:
    return work / f"piece-{piece:06d}.bin"


def _found(work: Path, partition: int) -> Path:
    return work / f"duplicates-{partition:05d}.npy"


def _spread(task: _SpreadTask) -> None:
    """Write the living documents of a piece, sorted by content."""
    path = _spread_file(task.work, task.piece.number)
    if read_done(path.with_suffix(".json")) is not None:
        return
    start, end = task.piece.start, task.piece.end
    rows = open_array(task.unit.documents, DOCUMENT).read(start, end)
    alive = np.flatnonzero(rows["alive"])
    copies = np.empty(len(alive), dtype=_COPY)
    copies["content_low"] = rows["content_low"][alive]
    copies["standing"] = read_standings(task.standing, start, end)[alive]
    copies["document"] = task.unit.first + start + alive
    copies["is_previous"] = rows["is_previous"][alive]
    write_partitioned(path, rows["content_high"][alive], copies, task.num_partitions)
    write_done(path.with_suffix(".json"), {}, [path])


def _group(task: _GroupTask) -> list[int]:
    """Write the duplicates of one partition; returns where each part that is sorted by document begins, and
    where the last ends."""
    path = _found(task.work, task.number)
    done = path.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        offsets: list[int] = finished["offsets"]
        return offsets
    offsets = [0]
    paths = [_spread_file(task.work, number) for number in range(task.num_pieces)]
    with RowWriter(path, DUPLICATE) as writer:
        for keys in key_ranges(paths, task.number, task.max_records):
            if keys.num_records <= task.max_records:
                found = iter([_duplicates(keys.read())])
            else:
                found = _duplicates_of_one_key(keys, task.max_records)
            for duplicates in found:
                writer.append(duplicates[np.argsort(duplicates["document"])])
                offsets.append(writer.num_rows)
    write_done(done, {"offsets": offsets}, [path])
    return offsets


@compiled
def _find_best(keys: Any, lows: Any, standings: Any, order: Any, best: Any, sizes: Any) -> None:
    """For each document, the best one of its text and how many there are. `order` brings equal texts
    together."""
    first = 0
    while first < len(order):
        leader = order[first]
        key, low = keys[leader], lows[leader]
        last = first + 1
        while last < len(order) and keys[order[last]] == key and lows[order[last]] == low:
            if standings[order[last]] < standings[leader]:
                leader = order[last]
            last += 1
        for at in range(first, last):
            best[order[at]] = leader
            sizes[order[at]] = last - first
        first = last


def _duplicates(records: Records) -> Records:
    """All copies but the best of each text, in any order."""
    keys, lows, ranks = (np.ascontiguousarray(records[name]) for name in ("key", "content_low", "standing"))
    order = np.argsort(keys)
    differs = lows[order[1:]] != lows[order[:-1]]
    if (differs & (keys[order[1:]] == keys[order[:-1]])).any():  # two texts of one key: by chance never
        order = np.lexsort((lows, keys))
    best = np.empty(len(records), dtype=np.int64)
    sizes = np.empty(len(records), dtype=np.int32)
    _find_best(keys, lows, ranks, order, best, sizes)
    copies = np.flatnonzero((best != np.arange(len(records))) & ~records["is_previous"])
    duplicates = np.empty(len(copies), dtype=DUPLICATE)
    duplicates["document"] = records["document"][copies]
    duplicates["survivor"] = records["document"][best[copies]]
    duplicates["cluster_size"] = sizes[copies]
    return duplicates


def _duplicates_of_one_key(keys: KeyRange, max_records: int) -> Iterator[Records]:
    """The same where more copies of a text exist than a task may hold: read once for the best, and again."""
    best: dict[int, tuple[int, int, int]] = {}  # content_low -> standing and number of the best, copies
    for block in keys.blocks(max_records):
        for content_low in np.unique(block["content_low"]).tolist():
            of_text = block[block["content_low"] == content_low]
            first = int(np.argmin(of_text["standing"]))
            standing, document = int(of_text["standing"][first]), int(of_text["document"][first])
            before = best.get(content_low, (standing, document, 0))
            best[content_low] = (*min(before[:2], (standing, document)), before[2] + len(of_text))
    for block in keys.blocks(max_records):
        for content_low, (standing, document, size) in best.items():
            copies = block[(block["content_low"] == content_low) & (block["standing"] != standing)]
            duplicates = np.empty(len(copies), dtype=DUPLICATE)
            duplicates["document"] = copies["document"]
            duplicates["survivor"] = document
            duplicates["cluster_size"] = size
            yield duplicates[~copies["is_previous"]]
