"""Near-duplicates of made-up signatures in a process of its own: near_memory.py FOLDER DOCUMENTS BYTES.

Prints, as JSON, the peak of resident memory before and after, seconds, and the counts. Two documents in five
belong to clusters of some nine; one in a hundred shares the first band with all of its kind.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from near_corpus import split_fixed, text_of

from llmtrain.compiled import compiled
from llmtrain.data.dedup.config import DedupConfig, NearConfig
from llmtrain.data.dedup.near import near_duplicates
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, RowWriter
from llmtrain.data.engines.engine import Inline

BANDS, ROWS = 14, 2
"""Two rows are 64 bits, so chance makes no keys equal; all 14 bands are there at a quarter of the bytes."""
PLACES = BANDS * ROWS
UNIT_DOCUMENTS, BLOCK = 1_000_000, 50_000


@compiled
def _mix(value):
    value = np.uint64(value) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def cluster_of(document, num_documents):
    """The cluster of a document, or -1."""
    drawn = _mix(document)
    return np.int64(drawn >> np.uint64(20)) % (num_documents // 22) if drawn % np.uint64(5) < 2 else -1


@compiled
def signatures_from(first, end, num_documents, places):
    result = np.empty((end - first, places), dtype=np.uint32)
    for document in range(first, end):
        cluster = cluster_of(document, num_documents)
        for place in range(places):
            own = _mix(document * 64 + place + (1 << 40))
            shared = _mix(cluster * 64 + place + (1 << 50))
            is_own = cluster < 0 or own % np.uint64(100) < 4
            result[document - first, place] = (own if is_own else shared) >> np.uint64(32)
        if _mix(document + (1 << 45)) % np.uint64(100) == 0:
            result[document - first, :2] = 7
    return result


class ClusterTexts:
    """The text of a document is the number of its cluster."""

    def __init__(self, num_documents: int) -> None:
        self.num_documents = num_documents

    def texts(self, documents: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        clusters = [cluster_of(document, self.num_documents) for document in documents.tolist()]
        numbers = [
            document if cluster < 0 else 2**31 + cluster
            for document, cluster in zip(documents.tolist(), clusters, strict=True)
        ]
        return np.frombuffer(text_of(numbers), dtype=np.uint8), np.arange(0, 8 * len(numbers) + 1, 8)


def write_units(folder: Path, num_documents: int) -> list[DedupUnit]:
    units = []
    for number, first in enumerate(range(0, num_documents, UNIT_DOCUMENTS)):
        end = min(num_documents, first + UNIT_DOCUMENTS)
        unit = DedupUnit(
            number,
            first,
            end - first,
            folder / f"documents-{number}.npy",
            folder / f"signatures-{number}.npy",
        )
        assert unit.signatures is not None
        with (
            RowWriter(unit.documents, DOCUMENT) as documents,
            RowWriter(unit.signatures, np.dtype("<u4"), (PLACES,)) as signatures,
        ):
            for at in range(first, end, BLOCK):
                block = np.arange(at, min(end, at + BLOCK))
                rows = np.zeros(len(block), dtype=DOCUMENT)
                rows["alive"], rows["id_low"] = True, block
                documents.append(rows)
                signatures.append(signatures_from(at, at + len(block), num_documents, PLACES))
        units.append(unit)
    return units


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    folder, num_documents, partition_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    units = write_units(folder / "units", num_documents)
    before = peak_bytes()
    near = NearConfig(
        enabled=True, num_permutations=PLACES, bands=BANDS, rows=ROWS, margin_standard_errors=0.5
    )
    cfg = DedupConfig(near=near, partition_bytes=partition_bytes)
    start = time.perf_counter()
    result = near_duplicates(
        units, cfg, ClusterTexts(num_documents), Inline(), folder / "near", split=split_fixed
    )
    figures = {"before": before, "peak": peak_bytes(), "seconds": time.perf_counter() - start}
    print(json.dumps(figures | result.counts))


if __name__ == "__main__":
    main()
