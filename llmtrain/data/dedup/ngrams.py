"""Documents made of word n-grams that better documents have: dropped when too many are.

DCLM's BFF (Li et al. 2024, arXiv:2406.11794, appendix on deduplication; dclm@77e7bf5 dedup/bff/src/main.rs)
asks a Bloom filter which n-grams were seen before, in the order in which documents come, and drops what is
above a share. Here it is exact, up to 64-bit hashes, and there is no order: each n-gram belongs to the best
document that has it (dedup/standing.py), and a document's overlap is the share of its different n-grams that
belong to others. Two more differences: n-grams run across line ends, as in BFF's document mode, and no
paragraph is cut (dedup/lines.py does that). It is one round: an n-gram whose owner is dropped stays owned,
where BFF lets the next document have it.

Disk: 8 bytes for each word from the scan, 16 for each word of a living document in the shuffle, and up to 12
for each one lost. A terabyte of text has about 1.7e11 words: 1.4, 2.7 and at most 2 TB. DCLM's Bloom filter
at a false positive rate of 0.01 takes 0.2 TB of memory for it. `keep_one_in` divides all of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.dedup.arrays import open_array, remove_work
from llmtrain.data.dedup.config import DedupConfig, NgramConfig
from llmtrain.data.dedup.owners import RECORD, Run, SettleTask, read_lost, run_file, settle, write_run
from llmtrain.data.dedup.partition import num_partitions_for, stable_order
from llmtrain.data.dedup.standing import document_rows, read_standings, standings
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, RowWriter
from llmtrain.data.engines.engine import Engine
from llmtrain.data.folder import read_done, write_done
from llmtrain.errors import DataError

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

NGRAM_TASK_BYTES = 64
"""Memory an n-gram in a task: its hash, document and order, and what is written of it."""
OVERLAP = np.dtype([("document", "<i8"), ("num_ngrams", "<u4"), ("num_owned_elsewhere", "<u4")])
"""Of a living document: its different n-grams, and how many of them better documents have."""
HISTOGRAM_BINS = 20

_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX2 = np.uint64(0xBF58476D1CE4E5B9)
_MIX3 = np.uint64(0x94D049BB133111EB)


@compiled
def _mixed(value: Any) -> Any:
    """splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX2
    value = (value ^ (value >> np.uint64(27))) * _MIX3
    return value ^ (value >> np.uint64(31))


@compiled
def _hash_ngrams(words: Any, is_word: Any, offsets: Any, num_words: int, keep_one_in: Any) -> Any:
    num_documents = len(offsets) - 1
    hashes = np.empty(offsets[num_documents] - offsets[0], dtype=np.uint64)
    counts = np.zeros(num_documents, dtype=np.uint64)
    window = np.zeros(num_words, dtype=np.uint64)
    leaving = np.uint64(1)  # _MIX ** num_words: the weight of the word that leaves the window
    for _ in range(num_words):
        leaving *= _MIX
    filled = 0
    for document in range(num_documents):
        first = filled
        rolled = np.uint64(0)
        num_seen = 0
        slot = 0
        for at in range(offsets[document], offsets[document + 1]):
            if not is_word[at]:
                continue
            word = _mixed(words[at])
            rolled = rolled * _MIX + word
            if num_seen >= num_words:
                rolled -= window[slot] * leaving
            window[slot] = word
            slot = slot + 1 if slot + 1 < num_words else 0
            num_seen += 1
            if num_seen >= num_words:
                hashed = _mixed(rolled)
                if keep_one_in == 1 or hashed % keep_one_in == 0:
                    hashes[filled] = hashed
                    filled += 1
        counts[document] = filled - first
    return hashes[:filled].copy(), counts


def ngram_hashes(
    words: Hashes, is_word: npt.NDArray[np.bool_], offsets: Ints, cfg: NgramConfig
) -> tuple[Hashes, Hashes]:
    """The n-grams of a batch, document after document, as often as they occur; and how many each document
    has.

    Args:
        words: a hash of each segment, lower-cased: `Words.folded`.
        is_word: whether it counts; others are skipped.
        offsets: segments of document d are offsets[d]:offsets[d + 1].
    """
    result: tuple[Hashes, Hashes] = _hash_ngrams(
        words, is_word, offsets, cfg.num_words, np.uint64(cfg.keep_one_in)
    )
    return result


class NgramWriter:
    """Writes the n-grams of a unit batch by batch: an .npy of uint64, all hashes and then the counts of all
    documents."""

    def __init__(self, path: Path) -> None:
        self._rows = RowWriter(path, np.dtype("<u8"))
        self._counts: list[Hashes] = []

    def __enter__(self) -> NgramWriter:
        self._rows.__enter__()
        return self

    def append(self, hashes: Hashes, counts: Hashes) -> None:
        """Add what `ngram_hashes` returned."""
        self._rows.append(hashes)
        self._counts.append(counts)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # Any: passed on as they come
        with ExitStack() as stack:
            stack.push(self._rows)
            if error is not None:
                raise error
            for counts in self._counts:
                self._rows.append(counts)


@dataclass(frozen=True, kw_only=True)
class NgramResult:
    overlaps: list[Path]
    """One .npy of OVERLAP a unit, in their order: its living documents that are new and have n-grams."""
    dropped: Path
    """.npy of OVERLAP, sorted by document: those to drop as `ngram_overlap`."""
    num_documents: int
    num_dropped: int
    histogram: list[int]
    """Documents by overlap, in equal bins from 0 to 1; an overlap of 1 is in the last."""


def ngram_overlap(
    units: Sequence[DedupUnit],
    cfg: DedupConfig,
    engine: Engine,
    folder: Path,
    standing: Sequence[Path] | None = None,
) -> NgramResult:
    """Find living documents of whose n-grams more than `max_share` belong to better ones. What an earlier
    run kept is never listed.

    Args:
        folder: of this stage alone, and of these documents and settings; `partition_bytes` may change.
        standing: what `standings` returned; None: it is found in the folder.

    Raises:
        DataError: the n-grams of a unit are not those of its documents.
    """
    overlaps = [folder / f"unit-{number:06d}.npy" for number in range(len(units))]
    dropped, done = folder / "dropped.npy", folder / "done.json"
    if (finished := read_done(done)) is not None:
        return NgramResult(overlaps=overlaps, dropped=dropped, **finished)
    if standing is None:
        standing = standings(units, cfg, engine, folder / "standing")
    max_ngrams = max(1, cfg.partition_bytes // NGRAM_TASK_BYTES)
    max_rows = document_rows(cfg.partition_bytes)
    num_ngrams = sum(_num_ngrams(unit) for unit in units)
    num_partitions = num_partitions_for(num_ngrams * RECORD.itemsize, cfg.partition_bytes)
    work = folder / f"work-{max_ngrams}-{num_partitions}"
    tasks = []
    num_runs = 0
    for unit, path, overlap in zip(units, standing, overlaps, strict=True):
        runs = tuple(
            Run(num_runs + number, *run) for number, run in enumerate(_cut(unit, max_ngrams, max_rows))
        )
        num_runs += len(runs)
        tasks.append(_UnitTask(unit, path, runs, work, num_partitions, overlap, cfg.ngrams.max_share))
    for _ in engine.map(_spread, tasks):
        pass
    partitions = [SettleTask(work, num_runs, n, by_standing=True) for n in range(num_partitions)]
    for _ in engine.map(settle, partitions):
        pass
    histogram: Ints = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    with RowWriter(dropped, OVERLAP) as writer:
        for task, of_unit in zip(tasks, engine.map(_write_overlap, tasks), strict=True):
            histogram += of_unit
            for block in _dropped_of(task.overlap, task.max_share):
                writer.append(block)
    summary: dict[str, Any] = {
        "num_documents": int(histogram.sum()),
        "num_dropped": writer.num_rows,
        "histogram": histogram.tolist(),
    }
    write_done(done, summary, [*overlaps, dropped])
    remove_work(folder)
    return NgramResult(overlaps=overlaps, dropped=dropped, **summary)


@dataclass(frozen=True)
class _UnitTask:
    unit: DedupUnit
    standing: Path
    runs: tuple[Run, ...]
    work: Path
    num_partitions: int
    overlap: Path
    max_share: float


def _num_ngrams(unit: DedupUnit) -> int:
    if unit.ngrams is None:
        return 0
    return open_array(unit.ngrams, np.dtype("<u8")).shape[0] - unit.num_documents


def _cut(unit: DedupUnit, max_ngrams: int, max_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Whole documents with at most `max_ngrams` n-grams, or one document."""
    if unit.ngrams is None:
        return
    table = open_array(unit.ngrams, np.dtype("<u8"))
    num_ngrams = table.shape[0] - unit.num_documents
    start = 0
    for at, counts in table.stretches(max(0, num_ngrams), table.shape[0]):
        ends = start + np.cumsum(counts.astype(np.int64))
        row = 0
        while row < len(counts):
            end_row = int(np.searchsorted(ends, start + max_ngrams, side="right"))
            end_row = min(max(end_row, row + 1), row + max_rows)
            first = at - num_ngrams
            yield first + row, first + end_row, start, int(ends[end_row - 1])
            row, start = end_row, int(ends[end_row - 1])
    if start != num_ngrams:
        raise DataError(
            f"{unit.ngrams} has {num_ngrams} n-grams, but its documents should have {start}: it is not that "
            f"of the {unit.num_documents} documents of unit {unit.number}; scan again"
        )


def _read_rows(task: _UnitTask, run: Run) -> tuple[npt.NDArray[np.void], Hashes, Ints]:
    """The documents of a run, their standing, and how many n-grams each has."""
    assert task.unit.ngrams is not None, "a run has n-grams"
    rows = open_array(task.unit.documents, DOCUMENT).read(run.first_row, run.end_row)
    standing = read_standings(task.standing, run.first_row, run.end_row)
    table = open_array(task.unit.ngrams, np.dtype("<u8"))
    first = table.shape[0] - task.unit.num_documents
    counts = table.read(first + run.first_row, first + run.end_row).astype(np.int64)
    return rows, standing, counts


@compiled
def _count_owned(
    hashes: Any, documents: Any, order: Any, standing: Any, totals: Any, losses: Any, owned: Any, best: Any
) -> int:
    """Count each document's different n-grams, and those that another document of the run has and is better.

    `order` sorts by hash, equal ones by document. `owned` and `best` get the different hashes, ascending, and
    the best standing of each; returns how many.
    """
    num_owned = 0
    first = 0
    while first < len(order):
        hashed = hashes[order[first]]
        leader = standing[documents[order[first]]]
        last = first + 1
        while last < len(order) and hashes[order[last]] == hashed:
            leader = min(leader, standing[documents[order[last]]])
            last += 1
        before = -1
        for at in range(first, last):
            document = documents[order[at]]
            if document != before:
                totals[document] += 1
                losses[document] += standing[document] != leader
                before = document
        owned[num_owned] = hashed
        best[num_owned] = leader
        num_owned += 1
        first = last
    return num_owned


def _counts_file(work: Path, run: int) -> Path:
    return work / f"counts-{run:06d}.npy"


def _spread(task: _UnitTask) -> None:
    """Write the different n-grams of each run of a unit with the best document that has each, and what is
    known of the overlaps so far."""
    for run in task.runs:
        path, counts_path = run_file(task.work, run.number), _counts_file(task.work, run.number)
        if read_done(path.with_suffix(".json")) is not None:
            continue
        rows, standing, counts = _read_rows(task, run)
        assert task.unit.ngrams is not None, "a run has n-grams"
        hashes: Hashes = open_array(task.unit.ngrams, np.dtype("<u8")).read(run.start, run.end)
        documents = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        alive = np.ascontiguousarray(rows["alive"])
        if not alive.all():
            is_alive = alive[documents]
            hashes, documents = hashes[is_alive], documents[is_alive]
        totals = np.zeros((2, len(rows)), dtype=np.uint32)
        owned, best = np.empty_like(hashes), np.empty_like(hashes)
        order = stable_order(hashes)
        num_owned = _count_owned(hashes, documents, order, standing, totals[0], totals[1], owned, best)
        write_run(path, owned[:num_owned], best[:num_owned], task.num_partitions)
        with RowWriter(counts_path, totals.dtype) as writer:
            writer.append(totals.ravel())
        write_done(path.with_suffix(".json"), {}, [path, counts_path])


def _write_overlap(task: _UnitTask) -> list[int]:
    """Write the overlap of each living document of a unit that is new; returns their histogram."""
    done = task.overlap.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        known: list[int] = finished["histogram"]
        return known
    histogram: Ints = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    with RowWriter(task.overlap, OVERLAP) as writer:
        for run in task.runs:
            rows, standing, _ = _read_rows(task, run)
            table = open_array(_counts_file(task.work, run.number), np.dtype(np.uint32))
            totals, losses = table.read(0, table.shape[0]).reshape(2, len(rows))
            lost = read_lost(task.work, task.num_partitions, run.number)
            order = np.argsort(standing)
            places = order[np.searchsorted(standing, lost["key"], sorter=order)]
            np.add.at(losses, places, lost["num_lost"])
            shown = np.flatnonzero((totals > 0) & ~rows["is_previous"])
            overlap = np.empty(len(shown), dtype=OVERLAP)
            overlap["document"] = task.unit.first + run.first_row + shown
            overlap["num_ngrams"], overlap["num_owned_elsewhere"] = totals[shown], losses[shown]
            shares = overlap["num_owned_elsewhere"] / overlap["num_ngrams"]
            histogram += np.histogram(shares, bins=HISTOGRAM_BINS, range=(0, 1))[0]
            writer.append(overlap)
    write_done(done, {"histogram": histogram.tolist()}, [task.overlap])
    return [int(count) for count in histogram]


def _dropped_of(path: Path, max_share: float) -> Iterator[npt.NDArray[np.void]]:
    """Those of a unit above the share."""
    table = open_array(path, OVERLAP)
    for _, block in table.stretches(0, table.shape[0]):
        yield block[block["num_owned_elsewhere"] > max_share * block["num_ngrams"]]
