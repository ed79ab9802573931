"""Which compared pairs are near-duplicates, decided before anything is clustered.

Sharing a band is weak evidence: among candidates of 14 x 8 bands over word 5-grams, 11 to 16 % were below a
true similarity of 0.7 (measured on technical text), and clusters made of such edges have wiped out whole
sources (marin#6854, mended by verification in marin#7591 and #8114). Here a pair is accepted when its
signatures agree clearly more often than the threshold, rejected when clearly less often, and decided by the
sets of shingles of the two texts in between. Texts of earlier runs are not there: the signatures decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.dedup.config import NearConfig, Similarity
from llmtrain.data.dedup.minhash import HashedWords, shingle_sets, similarities
from llmtrain.data.dedup.partition import key_ranges
from llmtrain.data.dedup.units import DocumentTexts, Ints, Records, RowWriter
from llmtrain.data.folder import write_done

Splitter = Callable[[npt.NDArray[np.uint8], Ints], HashedWords]
"""Splits texts into words exactly as the signatures' were split. At the top of a module, so it pickles."""

EDGE = np.dtype([("low", "<i8"), ("high", "<i8"), ("agreement", "<u2"), ("has_texts", "?")])
"""A compared pair, low < high, and at how many places of their signatures they agree. `has_texts`: neither is
of an earlier run."""

EDGE_PARTITIONS = 1024
"""Ranges of edge files by their lower document. Readers take as many of them at once as fit their memory."""

PAIR = np.dtype([("low", "<i8"), ("high", "<i8"), ("agreement", "<u2"), ("similarity", "<f4")])
"""An accepted pair. `similarity`: of the texts, not a number where the signatures decided."""

BATCH_DOCUMENTS = 2048
"""Texts read at once."""


@dataclass(frozen=True)
class Bounds:
    """Numbers of agreeing places that decide a pair."""

    accept: int
    """At least as many: a duplicate, whatever the texts."""
    reject: int
    """Fewer: none. In between the texts decide."""
    even: int
    """Decides where there are no texts: at least as many is a duplicate."""

    @staticmethod
    def of(cfg: NearConfig) -> Bounds:
        places, tiny = cfg.num_permutations, 1e-9  # so that a bound that is a whole number stays it
        low = (cfg.threshold - cfg.margin) * places
        # Containment is at least the Jaccard similarity that signatures estimate, but they do not bound it.
        is_bounded = cfg.similarity is Similarity.jaccard
        return Bounds(
            accept=int(np.ceil((cfg.threshold + cfg.margin) * places - tiny)),
            reject=max(0, int(np.ceil(low - tiny))) if is_bounded else 0,
            even=int(np.ceil(cfg.threshold * places - tiny)),
        )


def unique_edges(edges: Records) -> Records:
    """Each pair once, sorted. Equal pairs have equal numbers: they are functions of the two signatures."""
    low, high = np.ascontiguousarray(edges["low"]), np.ascontiguousarray(edges["high"])
    order = np.lexsort((high, low))
    low, high = low[order], high[order]
    is_new = np.ones(len(order), dtype=np.bool_)
    is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return edges[order[is_new]]


def text_similarities(
    left: Ints, right: Ints, texts: DocumentTexts, split: Splitter, cfg: NearConfig
) -> npt.NDArray[np.float64]:
    """Exact similarity of the shingle sets of pairs of documents, read in batches."""
    result = np.empty(len(left), dtype=np.float64)
    step = BATCH_DOCUMENTS // 2
    for at in range(0, len(left), step):
        part = slice(at, at + step)
        documents, place = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        text, offsets = texts.texts(documents)
        sets, set_offsets = shingle_sets(split(text, offsets), cfg.shingle_words)
        num = len(left[part])
        result[part] = similarities(
            sets,
            set_offsets,
            place[:num],
            place[num:],
            is_containment=cfg.similarity is Similarity.containment,
        )
    return result


@dataclass(frozen=True)
class Decided:
    is_accepted: npt.NDArray[np.bool_]
    similarity: npt.NDArray[np.float64]
    """Of the texts; not a number where they were not read."""
    num_by_text: int
    num_without_text: int
    """Pairs near the threshold of which one is of an earlier run."""


def decide(edges: Records, texts: DocumentTexts, split: Splitter, cfg: NearConfig) -> Decided:
    """Accept or reject pairs (fields of EDGE)."""
    bounds = Bounds.of(cfg)
    agreement, has_texts = edges["agreement"].astype(np.int64), edges["has_texts"]
    is_accepted = agreement >= bounds.accept
    is_near = (agreement >= bounds.reject) & ~is_accepted
    is_accepted |= is_near & ~has_texts & (agreement >= bounds.even)
    similarity = np.full(len(edges), np.nan)
    by_text = np.flatnonzero(is_near & has_texts)
    low, high = np.ascontiguousarray(edges["low"][by_text]), np.ascontiguousarray(edges["high"][by_text])
    similarity[by_text] = text_similarities(low, high, texts, split, cfg)
    is_accepted[by_text] = similarity[by_text] >= cfg.threshold
    return Decided(is_accepted, similarity, len(by_text), int((is_near & ~has_texts).sum()))


@dataclass(frozen=True)
class VerifyTask:
    """Partitions first..end - 1 of all edge files."""

    edges: tuple[Path, ...]
    first: int
    end: int
    max_edges: int
    cfg: NearConfig
    texts: DocumentTexts
    split: Splitter
    path: Path
    done: Path
    key: str


def verify_edges(task: VerifyTask) -> dict[str, Any]:
    """Write the pairs that are near-duplicates, each once, sorted; count, and sample both kinds."""
    counts = {"num_candidates": 0, "num_accepted": 0, "num_by_text": 0, "num_without_text": 0}
    accepted_sample: list[list[Any]] = []
    rejected_sample: list[list[Any]] = []
    with RowWriter(task.path, PAIR) as writer:
        for keys in key_ranges(task.edges, task.first, task.max_edges, num_partitions=task.end - task.first):
            edges = unique_edges(keys.read())
            decided = decide(edges, task.texts, task.split, task.cfg)
            counts["num_candidates"] += len(edges)
            counts["num_accepted"] += int(decided.is_accepted.sum())
            counts["num_by_text"] += decided.num_by_text
            counts["num_without_text"] += decided.num_without_text
            pairs = np.empty(len(edges), dtype=PAIR)
            for name in ("low", "high", "agreement"):
                pairs[name] = edges[name]
            pairs["similarity"] = decided.similarity
            writer.append(pairs[decided.is_accepted])
            num = task.cfg.sample_pairs
            accepted_sample = sample_of(accepted_sample, pairs[decided.is_accepted], num)
            rejected_sample = sample_of(rejected_sample, pairs[~decided.is_accepted], num)
    summary = {"key": task.key, **counts, "accepted": accepted_sample, "rejected": rejected_sample}
    write_done(task.done, summary, [task.path])
    return summary


def sample_of(sample: list[list[Any]], pairs: Records, num: int) -> list[list[Any]]:
    """The `num` pairs with the smallest hash, of a sample and more pairs: a fixed draw, however they come.

    A row: hash, low, high, agreement, similarity or None.
    """
    hashed = pairs["low"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashed = (hashed ^ (hashed >> np.uint64(29)) ^ pairs["high"].astype(np.uint64)) * np.uint64(
        0xD6E8FEB86659FD93
    )
    hashed ^= hashed >> np.uint64(32)
    chosen = np.argsort(hashed, kind="stable")[:num]
    rows = [
        [int(hashed[at]), *pairs[at].tolist()[:3], float(pairs["similarity"][at])] for at in chosen.tolist()
    ]
    for row in rows:
        row[4] = None if row[4] != row[4] else row[4]
    return merge_samples([sample, rows], num)


def merge_samples(samples: Sequence[list[list[Any]]], num: int) -> list[list[Any]]:
    return sorted((row for sample in samples for row in sample), key=lambda row: row[:3])[:num]
