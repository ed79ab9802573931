"""Who owns a hash: of all documents that have it, the best (dedup/standing.py). For lines and for n-grams.

A run holds the different hashes of some documents, each with the standing of the best of them. Runs are
shuffled by hash; a partition finds the best of all runs and tells each of the others what it lost. Records
take 16 bytes, and there is one for each run and hash, so no hash can crowd a partition.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.dedup.partition import PartitionFile, PartitionWriter, partition_bounds, record_type
from llmtrain.data.folder import read_done, write_done

Hashes = npt.NDArray[np.uint64]
Standings = npt.NDArray[np.uint64]
Records = npt.NDArray[np.void]

OWNED = np.dtype([("standing", "<u8")])
RECORD = record_type(OWNED)
LOST = np.dtype([("num_lost", "<u4")])


@dataclass(frozen=True)
class Run:
    """What a task takes at once of a unit: lines or n-grams start..end - 1, those of documents
    first_row..end_row - 1."""

    number: int
    first_row: int
    end_row: int
    start: int
    end: int


def write_run(path: Path, hashes: Hashes, standings: Standings, num_partitions: int) -> None:
    """Write the hashes of a run, ascending and all different, with the best standing that has each."""
    records = np.empty(len(hashes), dtype=RECORD)
    records["key"], records["standing"] = hashes, standings
    cuts = np.searchsorted(hashes, partition_bounds(num_partitions))
    with PartitionWriter(path, OWNED, num_partitions) as writer:
        for partition, block in enumerate(np.split(records, cuts)):
            writer.append(partition, block)


@compiled
def _mark_lost(hashes: Any, standings: Any, order: Any, is_lost: Any) -> None:
    first = 0
    while first < len(order):
        hashed = hashes[order[first]]
        best = standings[order[first]]
        last = first + 1
        while last < len(order) and hashes[order[last]] == hashed:
            best = min(best, standings[order[last]])
            last += 1
        for at in range(first, last):
            is_lost[order[at]] = standings[order[at]] != best
        first = last


@dataclass(frozen=True)
class SettleTask:
    """Find the owners of one partition's hashes, and write what each run lost to `path`: partition r of it is
    that of run r. By hash when `by_standing` is false: the hashes themselves, ascending; else the standings
    of documents and how many hashes each lost."""

    work: Path
    num_runs: int
    number: int
    by_standing: bool


def run_file(work: Path, run: int) -> Path:
    return work / f"run-{run:06d}.bin"


def lost_file(work: Path, partition: int) -> Path:
    return work / f"lost-{partition:05d}.bin"


def settle(task: SettleTask) -> None:
    path = lost_file(task.work, task.number)
    if read_done(path.with_suffix(".json")) is not None:
        return
    files = [PartitionFile.open(run_file(task.work, run)) for run in range(task.num_runs)]
    spans = [(int(file.offsets[task.number]), int(file.offsets[task.number + 1])) for file in files]
    ends = np.cumsum([0, *(end - start for start, end in spans)])
    hashes = np.empty(int(ends[-1]), dtype=np.uint64)
    standings = np.empty(int(ends[-1]), dtype=np.uint64)
    for file, (start, end), at in zip(files, spans, ends[:-1].tolist(), strict=True):
        records = file.read(start, end)
        hashes[at : at + len(records)] = records["key"]
        standings[at : at + len(records)] = records["standing"]
    is_lost = np.empty(len(hashes), dtype=np.bool_)
    _mark_lost(hashes, standings, np.argsort(hashes), is_lost)
    with PartitionWriter(path, LOST, task.num_runs) as writer:
        for run, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
            mask = is_lost[start:end]
            keys = (standings if task.by_standing else hashes)[start:end][mask]
            counts: npt.NDArray[np.int64] = np.ones(len(keys), dtype=np.int64)
            if task.by_standing:
                keys, counts = np.unique(keys, return_counts=True)
            lost = np.empty(len(keys), dtype=record_type(LOST))
            lost["key"], lost["num_lost"] = keys, counts
            writer.append(run, lost)
    write_done(path.with_suffix(".json"), {}, [path])


def read_lost(work: Path, num_partitions: int, run: int) -> Records:
    """What a run lost, partition after partition: fields `key` and `num_lost`."""
    parts = [np.empty(0, dtype=record_type(LOST))]
    for number in range(num_partitions):
        file = PartitionFile.open(lost_file(work, number))
        parts.append(file.read(int(file.offsets[run]), int(file.offsets[run + 1])))
    return np.concatenate(parts)
