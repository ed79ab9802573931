"""Exact duplicates: equal 128-bit hashes of normalised text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Halves = npt.NDArray[np.uint64]


def halves(digests: npt.NDArray[np.uint8]) -> tuple[Halves, Halves]:
    """High and low 64 bits of digests [n, 16]; their order is the order of the bytes."""
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
    return words[:, 0], words[:, 1]


def survivors(
    content: npt.NDArray[np.uint8], ids: npt.NDArray[np.uint8], alive: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Of the documents that are alive, keep the one with the smallest id of each content.

    The answer depends on the set of documents, not on their order, and applying it twice changes nothing.

    Args:
        content: digests of the texts, [n, 16].
        ids: of the documents, [n, 16], all different.
    """
    candidates = np.flatnonzero(alive)
    content_high, content_low = halves(content[candidates])
    id_high, id_low = halves(ids[candidates])
    order = np.lexsort((id_low, id_high, content_low, content_high))
    high, low = content_high[order], content_low[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    kept = np.zeros(len(alive), dtype=np.bool_)
    kept[candidates[order[is_first]]] = True
    return kept
