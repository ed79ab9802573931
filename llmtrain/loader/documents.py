"""Which documents are in rows of a run: enough to find them, and no text. `llmtrain data trace` has that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.config import Packing
from llmtrain.data.manifest import lineage_file, shard_files
from llmtrain.data.pack import open_plan
from llmtrain.data.shards import ShardIndex
from llmtrain.loader.open import OpenData

MAX_DOCUMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class RowDocument:
    """A document, or a piece of one, in a row."""

    position: int
    """Of the row in the run."""
    data: str
    """Name of the source in data.sources."""
    row: int
    """Its number in that source's pack."""
    num_tokens: int
    shard: str
    document: int
    """Its number in the shard."""
    id: str | None
    """None, as what follows, where the shard came without a table of its documents."""
    source: str | None
    path: str | None
    record: int | None
    """1-based number of the record in its file."""


def documents_of(
    data: OpenData,
    positions: Sequence[int] | npt.NDArray[np.int64],
    *,
    packing: Packing,
    max_documents: int = MAX_DOCUMENTS,
) -> list[dict[str, Any]]:
    """`RowDocument`s as plain JSON, in the order of positions and, in a row, of its tokens.

    No more than `max_documents`: of every row the first few, and where there are more rows, of the first rows
    one each.

    Raises:
        DataError: a pack or an index that is missing or damaged.
    """
    at = np.asarray(positions, dtype=np.int64)[:max_documents]
    if not len(at):
        return []
    per_row = max(1, max_documents // len(at))
    seq_len = data.train.seq_len
    found: list[tuple[int, str, int, int, str, int]] = []
    rows = data.order.rows_at(at).tolist()
    indexes: dict[str, ShardIndex] = {}
    for position, global_row in zip(at.tolist(), rows, strict=True):
        name, row = data.train.place(global_row)
        folder, manifest = data.folders[name], data.manifests[name]
        shards = manifest.split_shards("train")
        plan = open_plan(folder, manifest, manifest.pack("train", seq_len, packing.name))
        spans, _ = plan.spans(np.array([row]))
        for number, start, length, _ in spans.T[:per_row].tolist():
            shard = shards.path(number)
            key = f"{name}/{shard}"
            if key not in indexes:
                indexes[key] = ShardIndex(shard_files(folder / shard)[1])
            found.append((position, name, row, length, shard, indexes[key].document_at(start)))
    lineage = _lineage(data, {(name, shard, document) for _, name, _, _, shard, document in found})
    return [
        asdict(
            RowDocument(
                position=position,
                data=name,
                row=row,
                num_tokens=length,
                shard=shard,
                document=document,
                **lineage[name, shard, document],
            )
        )
        for position, name, row, length, shard, document in found
    ]


def _lineage(
    data: OpenData, documents: set[tuple[str, str, int]]
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Where each (data source, shard, document) came from; one shard's table at a time is in memory."""
    import pyarrow.parquet as pq  # noqa: PLC0415  40 MB that a run without spikes does not need

    columns = ["id", "source", "path", "record"]
    by_shard: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, shard, document in sorted(documents):
        by_shard[name, shard].append(document)
    told: dict[tuple[str, str, int], dict[str, Any]] = {}
    for (name, shard), numbers in by_shard.items():
        path = lineage_file(data.folders[name] / shard)
        lines: list[dict[str, Any]] = [dict.fromkeys(columns) for _ in numbers]
        if path.is_file():
            lines = pq.read_table(path, columns=columns).take(numbers).to_pylist()
        told |= {(name, shard, number): line for number, line in zip(numbers, lines, strict=True)}
    return told
