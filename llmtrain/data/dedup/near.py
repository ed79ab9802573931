"""Near-duplicates of a corpus, from signatures to the list of documents to remove.

Stages, each a list of tasks over named files: bands -> edges -> pairs -> clusters. A task leaves a done-file,
and a run that was killed takes up where it stopped. The folder belongs to one input: give another one when
documents, what is alive of them, or their ranks change. Changed settings are noticed.

The list is the same for any division into units and tasks, any number of workers, any `partition_bytes`, and
any order of the documents. Of a cluster stays a document of an earlier run, or else the one with the highest
rank, or else the one with the smallest id.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from llmtrain.data.dedup.clusters import ClusterTask, agreements, cluster
from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.lsh import (
    BAND_RECORD_BYTES,
    TASK_RECORDS,
    BandTask,
    LinkTask,
    Memory,
    link_keys,
    write_bands,
)
from llmtrain.data.dedup.minhash import VERSION
from llmtrain.data.dedup.partition import PartitionFile, num_partitions_for
from llmtrain.data.dedup.units import (
    DedupUnit,
    DocumentTexts,
    Ints,
    Table,
    check_units,
    gather_documents,
    write_units,
)
from llmtrain.data.dedup.verify import EDGE_PARTITIONS, Splitter, VerifyTask, merge_samples, verify_edges
from llmtrain.data.engines.engine import Engine
from llmtrain.data.folder import read_done, write_done
from llmtrain.data.text.words import split_words
from llmtrain.errors import DataError
from llmtrain.files import hash_json, plain

log = logging.getLogger(__name__)

SHOWN_PAIRS = 3
"""Pairs in the message of the removal alarm."""


class Task(Protocol):
    @property
    def done(self) -> Path: ...
    @property
    def key(self) -> str: ...


Work = TypeVar("Work", bound=Task)


@dataclass(frozen=True)
class Pair:
    """Two documents that were compared."""

    document: int
    other: int
    document_id: str
    """32 hex digits."""
    other_id: str
    agreement: float
    """Share of the signatures' places that agree."""
    similarity: float | None
    """Of the texts; None where the signatures decided."""


@dataclass(frozen=True)
class SourceRemoval:
    source: int
    num_documents: int
    """That reached this stage; those of earlier runs are not counted."""
    num_removed: int


@dataclass(frozen=True)
class NearResult:
    duplicates: Path
    """.npy of DUPLICATE, sorted by document."""
    counts: dict[str, int]
    accepted: tuple[Pair, ...]
    """A sample."""
    rejected: tuple[Pair, ...]
    cluster_sizes: tuple[tuple[int, int], ...]
    """Size and number of clusters of that size, survivors counted, ascending."""
    sources: tuple[SourceRemoval, ...]


def near_duplicates(
    units: Sequence[DedupUnit],
    cfg: DedupConfig,
    texts: DocumentTexts,
    engine: Engine,
    folder: Path,
    *,
    split: Splitter = split_words,
    source_names: Sequence[str] = (),
) -> NearResult:
    """Find the near-duplicates among the documents that are alive.

    Args:
        units: all documents, in order and without gaps; those of earlier runs among them.
        texts: read only for pairs near the threshold, never of earlier runs.
        folder: for this stage alone.
        split: splits texts into words as the signatures' were.
        source_names: by the `source` of a document, for messages.

    Raises:
        DataError: a source lost more than `max_source_removal` of its documents.
    """
    check_units(units)
    near = cfg.near
    log.info(
        "near-duplicates: %d bands x %d rows find pairs from a similarity of about %.2f on (half of them at "
        "%.2f); kept as duplicates: %s >= %.2f",
        near.bands,
        near.rows,
        near.band_threshold,
        (1 - 0.5 ** (1 / near.bands)) ** (1 / near.rows),
        near.similarity.name,
        near.threshold,
    )
    key = hash_json(
        [plain(near), cfg.partition_bytes, VERSION, [(unit.first, unit.num_documents) for unit in units]]
    )
    done, duplicates = folder / "near.json", folder / "duplicates.npy"
    summary = finished(done, key)
    if summary is None:
        summary = _run(units, cfg, texts, engine, folder, split, key, duplicates)
        write_done(done, summary, [duplicates])
    for part in ("bands", "edges"):  # 16 bytes a band and document: gone once the answer is there
        shutil.rmtree(folder / part, ignore_errors=True)
    samples = {name: _pairs(units, summary[name], near.num_permutations) for name in ("accepted", "rejected")}
    sources = tuple(SourceRemoval(*row) for row in summary["sources"])
    check_removal(sources, units, cfg, duplicates, source_names)
    return NearResult(
        duplicates,
        summary["counts"],
        samples["accepted"],
        samples["rejected"],
        tuple((size, count) for size, count in summary["cluster_sizes"]),
        sources,
    )


def finished(done: Path, key: str) -> dict[str, Any] | None:
    """The summary of a task that was done with the same settings."""
    summary = read_done(done)
    return summary if summary is not None and summary.get("key") == key else None


def run_tasks(
    engine: Engine, function: Callable[[Work], dict[str, Any]], tasks: Sequence[Work]
) -> list[dict[str, Any]]:
    """The summaries of all tasks, in order; only those that are not done are worked on."""
    summaries = [finished(task.done, task.key) for task in tasks]
    missing = [at for at, summary in enumerate(summaries) if summary is None]
    if missing:
        for at, summary in zip(missing, engine.map(function, [tasks[at] for at in missing]), strict=True):
            summaries[at] = summary
    return [summary for summary in summaries if summary is not None]


def _sum(summaries: Iterable[dict[str, Any]], name: str) -> int:
    return sum(summary[name] for summary in summaries)


def _run(
    units: Sequence[DedupUnit],
    cfg: DedupConfig,
    texts: DocumentTexts,
    engine: Engine,
    folder: Path,
    split: Splitter,
    key: str,
    duplicates: Path,
) -> dict[str, Any]:
    near = cfg.near
    num_documents = units[-1].end if units else 0
    memory = Memory.of(near, cfg.partition_bytes)
    unit_list = folder / f"units-{key[:16]}.json"
    if not unit_list.exists():
        write_units(unit_list, units)

    num_ranges = num_partitions_for(num_documents * BAND_RECORD_BYTES, cfg.partition_bytes // 4)
    step = memory.documents_written
    banded = run_tasks(
        engine,
        write_bands,
        [
            BandTask(
                units=unit_list,
                first=first,
                end=min(num_documents, first + step),
                cfg=near,
                num_ranges=num_ranges,
                path=folder / "bands" / f"{number:06d}.part",
                done=folder / "bands" / f"{number:06d}.json",
                key=key,
            )
            for number, first in enumerate(range(0, num_documents, step))
        ],
    )
    bands = tuple(folder / "bands" / f"{number:06d}.part" for number in range(len(banded)))
    per_partition = max(1, _sum(banded, "num_documents") // num_ranges)
    step = max(1, min(near.bands * num_ranges, TASK_RECORDS // per_partition))
    linked = run_tasks(
        engine,
        link_keys,
        [
            LinkTask(
                units=unit_list,
                bands=bands,
                first=first,
                end=min(near.bands * num_ranges, first + step),
                cfg=near,
                partition_bytes=cfg.partition_bytes,
                folder=folder / "edges",
                name=f"{first:06d}",
                done=folder / "edges" / f"{first:06d}.json",
                key=key,
            )
            for first in range(0, near.bands * num_ranges if bands else 0, step)
        ],
    )
    edges = tuple(folder / "edges" / name for summary in linked for name in summary["edges"])
    ranges = _edge_ranges(edges, memory.edges)
    verified = run_tasks(
        engine,
        verify_edges,
        [
            VerifyTask(
                edges=edges,
                first=first,
                end=end,
                max_edges=memory.edges,
                cfg=near,
                texts=texts,
                split=split,
                path=folder / "pairs" / f"{first:06d}.npy",
                done=folder / "pairs" / f"{first:06d}.json",
                key=key,
            )
            for first, end in ranges
        ],
    )
    pairs = tuple(folder / "pairs" / f"{first:06d}.npy" for first, _ in ranges)
    task = ClusterTask(
        units=unit_list,
        pairs=pairs,
        cfg=near,
        texts=texts,
        split=split,
        path=duplicates,
        done=folder / "clusters.json",
        key=key,
    )
    (clusters,) = run_tasks(engine, cluster, [task])

    documents_of: dict[int, int] = {}
    for summary in banded:
        for source, count in summary["by_source"]:
            documents_of[source] = documents_of.get(source, 0) + count
    removed_of = dict(clusters["removed_by_source"])
    counts = {
        **{name: _sum(banded, name) for name in ("num_documents", "num_previous", "num_empty")},
        **{
            name: _sum(linked, name)
            for name in (
                "num_keys",
                "num_boilerplate_keys",
                "num_boilerplate_members",
                "num_left_over",
            )
        },
        **{
            name: _sum(verified, name)
            for name in ("num_candidates", "num_accepted", "num_by_text", "num_without_text")
        },
        **{
            name: clusters[name]
            for name in (
                "num_in_pairs",
                "num_clusters",
                "num_duplicates",
                "num_oversize_clusters",
                "num_oversize_documents",
                "num_released",
                "largest_component",
            )
        },
    }
    return {
        "key": key,
        "counts": counts,
        "accepted": merge_samples([summary["accepted"] for summary in verified], near.sample_pairs),
        "rejected": merge_samples([summary["rejected"] for summary in verified], near.sample_pairs),
        "cluster_sizes": clusters["cluster_sizes"],
        "sources": [
            [source, count, removed_of.get(source, 0)] for source, count in sorted(documents_of.items())
        ],
    }


def _edge_ranges(edges: Sequence[Path], max_edges: int) -> list[tuple[int, int]]:
    """Stretches of the edge partitions with about `max_edges` pairs each, or one partition with more."""
    sizes = np.zeros(EDGE_PARTITIONS, dtype=np.int64)
    for path in edges:
        sizes += np.diff(PartitionFile.open(path).offsets)
    ranges, first, held = [], 0, 0
    for partition, size in enumerate(sizes.tolist()):
        if held and held + size > max_edges:
            ranges.append((first, partition))
            first, held = partition, 0
        held += size
    if held:
        ranges.append((first, EDGE_PARTITIONS))
    return ranges


def _pairs(
    units: Sequence[DedupUnit], sample: Sequence[Sequence[Any]], num_permutations: int
) -> tuple[Pair, ...]:
    documents = np.unique([number for row in sample for number in row[1:3]]).astype(np.int64)
    ids = dict(zip(documents.tolist(), _ids(units, documents), strict=True))
    return tuple(
        Pair(low, high, ids[low], ids[high], agreement / num_permutations, similarity)
        for _, low, high, agreement, similarity in sample
    )


def _ids(units: Sequence[DedupUnit], documents: Ints) -> list[str]:
    """Ids of documents, ascending, as 32 hex digits."""
    rows = gather_documents(units, documents)
    return [
        f"{high:016x}{low:016x}"
        for high, low in zip(rows["id_high"].tolist(), rows["id_low"].tolist(), strict=True)
    ]


def check_removal(
    sources: Sequence[SourceRemoval],
    units: Sequence[DedupUnit],
    cfg: DedupConfig,
    duplicates: Path,
    source_names: Sequence[str],
) -> None:
    """Raise when a source lost too much, with some of its pairs."""
    if cfg.max_source_removal is None:
        return
    for source in sources:
        rate = source.num_removed / max(1, source.num_documents)
        if source.num_documents < cfg.min_source_documents or rate <= cfg.max_source_removal:
            continue
        name = source_names[source.source] if 0 <= source.source < len(source_names) else str(source.source)
        shown = "; ".join(_removed_pairs(units, cfg, duplicates, source.source))
        raise DataError(
            f"near-duplicates remove {source.num_removed} of {source.num_documents} documents ({rate:.1%}) "
            f"of source {name!r}, above dedup.max_source_removal={cfg.max_source_removal}. Removed, and what "
            f"stays for them: {shown}. If these are copies, raise dedup.max_source_removal (null: no bound); "
            f"if not, raise dedup.near.threshold={cfg.near.threshold} or lower "
            f"dedup.near.max_cluster={cfg.near.max_cluster}"
        )


def _removed_pairs(units: Sequence[DedupUnit], cfg: DedupConfig, duplicates: Path, source: int) -> list[str]:
    """The first removed documents of a source, each with its survivor and how far their signatures agree."""
    table = Table.open(duplicates, None)
    found: list[tuple[int, int]] = []
    for _, block in table.stretches(0, table.shape[0]):
        rows = gather_documents(units, np.ascontiguousarray(block["document"]))
        chosen = block[rows["source"] == source][: SHOWN_PAIRS - len(found)]
        found += zip(chosen["document"].tolist(), chosen["survivor"].tolist(), strict=True)
        if len(found) == SHOWN_PAIRS:
            break
    shown = []
    for document, survivor in found:
        one, other = np.array([document]), np.array([survivor])
        (row,) = agreements(units, one, other, np.array([False]), cfg.near)
        agreement = int(row["agreement"]) / cfg.near.num_permutations
        (document_id,), (survivor_id,) = _ids(units, one), _ids(units, other)
        shown.append(f"{document_id} for {survivor_id} (signatures agree in {agreement:.0%})")
    return shown
