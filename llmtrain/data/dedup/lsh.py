"""Pairs of documents that may be near-duplicates: those that share a band of their signatures.

Two stages. `write_bands`: the band keys of some documents as one file, sorted by (band, key). `link_keys`:
for a range of keys, over all files, the documents that have the same key are compared, by their signatures,
with the best of them. Those unlike it are compared with the best of the rest, and so on for a bounded number
of rounds, so a key shared by two groups yields both. The documents of a key that very many have (a licence, a
cookie notice) are compared with one of them only. What is compared is written with the number of places that
agree; nothing is decided here.

The best is the one that would survive, so pairs do not depend on the order of documents or units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.dedup.config import NearConfig
from llmtrain.data.dedup.minhash import band_keys, is_empty
from llmtrain.data.dedup.partition import (
    PartitionWriter,
    key_ranges,
    partition_bounds,
    record_type,
    stable_order,
    write_partitioned,
)
from llmtrain.data.dedup.units import (
    DedupUnit,
    Ints,
    Records,
    Table,
    best_first,
    gather_documents,
    gather_signatures,
    read_units,
    signature_table,
)
from llmtrain.data.dedup.verify import EDGE, EDGE_PARTITIONS, Bounds, unique_edges
from llmtrain.data.folder import write_done
from llmtrain.errors import DataError

BAND = np.dtype([("document", "<i8")])
BAND_RECORD_BYTES = record_type(BAND).itemsize
TASK_DOCUMENTS = 1 << 18
"""Documents that one band file covers, if their keys fit the memory of a task."""
TASK_RECORDS = 4 << 20
"""Records of bands that a linking task takes at least, if there are as many: tasks cost files."""


@dataclass(frozen=True)
class Memory:
    """How much of each thing a task holds, so that all of it fits `partition_bytes`."""

    documents_written: int
    """Documents whose band keys are held at once."""
    records: int
    """Band records sorted at once, about 64 bytes each."""
    documents: int
    """Signatures held at once to compare them."""
    edges: int
    """Pairs held at once, about 150 bytes each with the copies that sorting makes."""

    @staticmethod
    def of(cfg: NearConfig, partition_bytes: int) -> Memory:
        return Memory(
            documents_written=min(TASK_DOCUMENTS, max(1, partition_bytes // (8 * cfg.bands + 128))),
            records=max(cfg.max_key_documents, partition_bytes // 4 // 64),
            documents=max(cfg.max_key_documents, partition_bytes // 2 // (4 * cfg.num_permutations + 200)),
            edges=max(1, partition_bytes // 4 // 150),
        )


@dataclass(frozen=True)
class BandTask:
    """Documents first..end - 1, of one or several units."""

    units: Path
    first: int
    end: int
    cfg: NearConfig
    num_ranges: int
    """Partitions of a band."""
    path: Path
    done: Path
    key: str


def write_bands(task: BandTask) -> dict[str, Any]:
    """Write the band keys of the documents that are alive and have words; count documents by source."""
    keys: list[npt.NDArray[np.uint64]] = []
    documents: list[Ints] = []
    num_previous = num_empty = 0
    by_source: dict[int, int] = {}
    for unit in read_units(task.units):
        start, end = max(0, task.first - unit.first), min(unit.num_documents, task.end - unit.first)
        if start >= end:
            continue
        signatures = signature_table(unit, task.cfg.num_permutations)
        table = Table.open(unit.documents, unit.num_documents)
        for at, block in signatures.stretches(start, end):
            rows = table.read(at, at + len(block))
            if np.isnan(rows["rank"][rows["alive"]]).any():
                raise DataError(f"{unit.documents} has a rank that is not a number; give every document one")
            empty = is_empty(block)
            counted = rows["alive"] & ~rows["is_previous"]
            sources, counts = np.unique(rows["source"][counted], return_counts=True)
            for source, count in zip(sources.tolist(), counts.tolist(), strict=True):
                by_source[source] = by_source.get(source, 0) + count
            num_previous += int((rows["alive"] & rows["is_previous"]).sum())
            num_empty += int((rows["alive"] & empty).sum())
            chosen = np.flatnonzero(rows["alive"] & ~empty)
            keys.append(band_keys(block[chosen], task.cfg.bands, task.cfg.rows))
            documents.append(chosen + (unit.first + at))
    chosen = np.concatenate(documents)
    bounds = partition_bounds(task.num_ranges)
    with PartitionWriter(task.path, BAND, task.cfg.bands * task.num_ranges) as writer:
        for band in range(task.cfg.bands):
            band_key = np.concatenate([block[band] for block in keys])
            order = stable_order(band_key)
            records = np.empty(len(order), dtype=writer.dtype)
            records["key"], records["document"] = band_key[order], chosen[order]
            for part, block in enumerate(np.split(records, np.searchsorted(records["key"], bounds))):
                writer.append(band * task.num_ranges + part, block)
    summary = {
        "key": task.key,
        "num_documents": len(chosen),
        "num_previous": num_previous,
        "num_empty": num_empty,
        "by_source": sorted(by_source.items()),
    }
    write_done(task.done, summary, [task.path])
    return summary


@dataclass(frozen=True)
class LinkTask:
    """Partitions first..end - 1 of all band files."""

    units: Path
    bands: tuple[Path, ...]
    first: int
    end: int
    cfg: NearConfig
    partition_bytes: int
    folder: Path
    name: str
    done: Path
    key: str


@compiled
def _grown(values: Any) -> Any:
    larger = np.empty(2 * len(values), dtype=values.dtype)
    larger[: len(values)] = values
    return larger


@compiled
def _link(signatures: Any, members: Any, starts: Any, is_previous: Any, enough: int, max_rounds: int) -> Any:
    """Compare the members of each run with its first, those unlike it with the first of them, and so on.

    A member that agrees with a representative at `enough` places leaves the run. One that agrees at fewer may
    turn out alike when the texts are read, or not, so it stays for the next round. Two documents of earlier
    runs are not compared.

    Returns:
        left and right rows of `signatures`, at how many places they agree, and how many members were still
        in their run after the last round.
    """
    left = np.empty(1024, dtype=np.int64)
    right = np.empty(1024, dtype=np.int64)
    agreement = np.empty(1024, dtype=np.int64)
    num_pairs = 0
    num_left_over = 0
    waiting = np.empty(1024, dtype=np.int64)
    for run in range(len(starts) - 1):
        size = starts[run + 1] - starts[run]
        if size > len(waiting):
            waiting = np.empty(2 * size, dtype=np.int64)
        for at in range(size):
            waiting[at] = members[starts[run] + at]
        for _ in range(max_rounds):
            best = waiting[0]
            num_waiting = 0
            for at in range(1, size):
                other = waiting[at]
                if is_previous[best] and is_previous[other]:
                    waiting[num_waiting] = other
                    num_waiting += 1
                    continue
                equal = 0
                for place in range(signatures.shape[1]):
                    equal += signatures[best, place] == signatures[other, place]
                if num_pairs == len(left):
                    left, right, agreement = _grown(left), _grown(right), _grown(agreement)
                left[num_pairs], right[num_pairs], agreement[num_pairs] = best, other, equal
                num_pairs += 1
                if equal < enough:
                    waiting[num_waiting] = other
                    num_waiting += 1
            size = num_waiting
            if size < 2:
                break
        if size > 1:
            num_left_over += size
    return left[:num_pairs].copy(), right[:num_pairs].copy(), agreement[:num_pairs].copy(), num_left_over


class EdgeWriter:
    """Collects pairs; writes them, each once, as files of a bounded size."""

    def __init__(self, folder: Path, name: str, num_documents: int, max_edges: int) -> None:
        self.folder, self.name = folder, name
        self.spread = 2**64 // max(1, num_documents)  # keys over the whole range, in order of (low, high)
        self.spread_high = self.spread // max(1, num_documents)  # 0 from 2^32 documents on: order of low
        self.max_edges = max_edges
        self.paths: list[Path] = []
        self.num_edges = 0
        self._blocks: list[Records] = []
        self._held = 0

    def add(self, left: Ints, right: Ints, agreement: Ints, has_texts: npt.NDArray[np.bool_]) -> None:
        edges = np.empty(len(left), dtype=EDGE)
        edges["low"], edges["high"] = np.minimum(left, right), np.maximum(left, right)
        edges["agreement"], edges["has_texts"] = agreement, has_texts
        for at in range(0, len(edges), self.max_edges):
            block = edges[at : at + self.max_edges]
            if self._held + len(block) > self.max_edges:
                self.flush()
            self._blocks.append(block)
            self._held += len(block)

    def flush(self) -> None:
        if self._held == 0:
            return
        edges = unique_edges(np.concatenate(self._blocks))
        self._blocks, self._held = [], 0
        path = self.folder / f"{self.name}-{len(self.paths):04d}.part"
        keys = edges["low"].astype(np.uint64) * np.uint64(self.spread)
        keys += edges["high"].astype(np.uint64) * np.uint64(self.spread_high)
        write_partitioned(path, keys, edges, EDGE_PARTITIONS)
        self.paths.append(path)
        self.num_edges += len(edges)


def runs_of(keys: npt.NDArray[np.uint64], documents: Ints) -> tuple[Ints, Ints]:
    """Documents that share their key with another, key after key, and where each key's run starts (and the
    last one's ends)."""
    order = stable_order(keys)
    keys = keys[order]
    is_equal = keys[1:] == keys[:-1]
    shared = np.zeros(len(keys), dtype=np.bool_)
    shared[1:] |= is_equal
    shared[:-1] |= is_equal
    is_start = shared.copy()
    is_start[1:] &= ~is_equal
    starts = np.flatnonzero(is_start[shared])
    return documents[order[shared]], np.append(starts, shared.sum())


def batches_of(starts: Ints, max_members: int) -> Iterator[tuple[int, int]]:
    """Runs first..end - 1 that together have at most `max_members` members, or are one run."""
    first = 0
    while first < len(starts) - 1:
        end = int(np.searchsorted(starts, starts[first] + max_members, side="right")) - 1
        end = max(end, first + 1)
        yield first, end
        first = end


def link_keys(task: LinkTask) -> dict[str, Any]:
    """Compare documents with equal keys, and write the pairs with their agreement."""
    cfg = task.cfg
    units = read_units(task.units)
    memory = Memory.of(cfg, task.partition_bytes)
    edges = EdgeWriter(task.folder, task.name, units[-1].end, memory.edges)
    counts = {"num_keys": 0, "num_boilerplate_keys": 0, "num_boilerplate_members": 0, "num_left_over": 0}

    def link_boilerplate(blocks: Callable[[], Iterator[Ints]]) -> None:
        counts["num_boilerplate_keys"] += 1
        best: Records | None = None
        for block in blocks():
            documents = np.sort(block)
            rows = gather_documents(units, documents)
            first = best_first(rows)[:1]
            candidate = _with_number(documents[first], rows[first])
            best = candidate if best is None else np.concatenate([best, candidate])
            best = best[best_first(best)[:1]]
            counts["num_boilerplate_members"] += len(documents)
        assert best is not None, "a key has members"
        for block in blocks():
            documents = np.sort(block[block != best["number"][0]])
            with_best = np.sort(np.append(documents, best["number"][0]))
            _compare(units, cfg, with_best, np.array([0, len(with_best)]), edges, max_rounds=1)

    for number in range(task.first, task.end):
        for keys in key_ranges(task.bands, number, memory.records):
            if keys.num_records > memory.records:

                def read_blocks(keys: Any = keys) -> Iterator[Ints]:
                    return (block["document"] for block in keys.blocks(memory.documents - 1))

                counts["num_keys"] += 1
                link_boilerplate(read_blocks)
                continue
            records = keys.read()
            documents, starts = runs_of(
                np.ascontiguousarray(records["key"]), np.ascontiguousarray(records["document"])
            )
            del records
            counts["num_keys"] += len(starts) - 1
            sizes = np.diff(starts)
            for run in np.flatnonzero(sizes > cfg.max_key_documents).tolist():
                members = documents[starts[run] : starts[run + 1]]

                def cut_blocks(members: Ints = members) -> Iterator[Ints]:
                    step = memory.documents - 1
                    return (members[at : at + step] for at in range(0, len(members), step))

                link_boilerplate(cut_blocks)
            usual = sizes <= cfg.max_key_documents
            documents = documents[np.repeat(usual, sizes)]
            starts = np.append(0, np.cumsum(sizes[usual]))
            for first, end in batches_of(starts, memory.documents):
                counts["num_left_over"] += _compare(
                    units,
                    cfg,
                    documents[starts[first] : starts[end]],
                    starts[first : end + 1] - starts[first],
                    edges,
                    max_rounds=cfg.max_rounds,
                )
    edges.flush()
    summary = {
        "key": task.key,
        "edges": [path.name for path in edges.paths],
        "num_compared": edges.num_edges,
        **counts,
    }
    write_done(task.done, summary, edges.paths)
    return summary


def _with_number(numbers: Ints, rows: Records) -> Records:
    fields = [("number", "<i8"), ("is_previous", "?"), ("rank", "<f8"), ("id_high", "<u8"), ("id_low", "<u8")]
    named = np.empty(len(rows), dtype=fields)
    named["number"] = numbers
    for name, _ in fields[1:]:
        named[name] = rows[name]
    return named


def _compare(
    units: Sequence[DedupUnit],
    cfg: NearConfig,
    documents: Ints,
    starts: Ints,
    edges: EdgeWriter,
    *,
    max_rounds: int,
) -> int:
    """Compare the documents of each run starts[r]..starts[r + 1] - 1; return how many stayed over."""
    found, place = np.unique(documents, return_inverse=True)
    rows = gather_documents(units, found)
    order = best_first(rows)
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    run = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    ranked = np.sort((run << 32) | position[place])  # best first in each run
    members = order[ranked & 0xFFFFFFFF]
    is_previous = np.ascontiguousarray(rows["is_previous"])
    signatures = gather_signatures(units, found, cfg.num_permutations)
    left, right, agreement, num_left_over = _link(
        signatures, members, starts, is_previous, Bounds.of(cfg).accept, max_rounds
    )
    has_texts = ~(is_previous[left] | is_previous[right])
    edges.add(found[left], found[right], agreement, has_texts)
    return int(num_left_over)
