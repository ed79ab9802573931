"""Clusters of near-duplicates: connected components of the accepted pairs, and which document of each stays.

Only documents that occur in a pair are nodes: they are marked in a bitmap over all documents, and the node of
a document is the number of marks before it. Pairs are streamed twice, once to join, once to check that the
answer is a fixed point; besides the bitmap, memory is about 30 bytes a node.

Similarity does not carry over a chain of pairs, so a component above `max_cluster` is taken apart: a document
leaves only if it was found to be like a survivor itself. First all members are compared with the best of
them. Then, in the order in which documents would survive, a document goes when an accepted pair joins it to
one that stays, else it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.dedup.config import NearConfig
from llmtrain.data.dedup.minhash import num_equal
from llmtrain.data.dedup.units import (
    DUPLICATE,
    DedupUnit,
    DocumentTexts,
    Ints,
    Records,
    RowWriter,
    Table,
    best_first,
    gather_documents,
    gather_signatures,
    read_units,
)
from llmtrain.data.dedup.verify import EDGE, Splitter, decide
from llmtrain.data.folder import write_done
from llmtrain.errors import DataError

Bits = npt.NDArray[np.uint64]

WINDOW_WORDS = 4096
"""Words of the bitmap looked at together: 262,144 documents."""
COMPARED_AT_ONCE = 1 << 16
"""Members of an oversize cluster whose signatures are held at once."""


@compiled
def _mark(bits: Any, documents: Any) -> None:
    for document in documents:
        bits[document >> 6] |= np.uint64(1) << np.uint64(document & 63)


@compiled
def _num_ones(word: Any) -> Any:
    """Bits set in 64 (Warren, Hacker's Delight, section 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _ones_before(bits: Any) -> Any:
    """For each word, and after the last, the number of bits set before it."""
    before = np.zeros(len(bits) + 1, dtype=np.int64)
    for word in range(len(bits)):
        before[word + 1] = before[word] + _num_ones(bits[word])
    return before


@compiled
def _nodes(bits: Any, before: Any, documents: Any) -> Any:
    """The node of each marked document."""
    nodes = np.empty(len(documents), dtype=np.int64)
    for at in range(len(documents)):
        word, bit = documents[at] >> 6, np.uint64(documents[at] & 63)
        nodes[at] = before[word] + _num_ones(bits[word] & ((np.uint64(1) << bit) - np.uint64(1)))
    return nodes


@compiled
def _marked(bits: Any, first_word: int, end_word: int) -> Any:
    """The marked documents of some words, ascending."""
    found = np.empty(64 * (end_word - first_word), dtype=np.int64)
    num = 0
    for word in range(first_word, end_word):
        for bit in range(64):
            if (bits[word] >> np.uint64(bit)) & np.uint64(1):
                found[num] = 64 * word + bit
                num += 1
    return found[:num].copy()


@compiled
def _join(parents: Any, left: Any, right: Any) -> int:
    """Join the trees of each pair, the larger root below the smaller; return how many pairs joined two."""
    num_joined = 0
    for pair in range(len(left)):
        one, other = left[pair], right[pair]
        while parents[one] != one:
            parents[one] = parents[parents[one]]
            one = parents[one]
        while parents[other] != other:
            parents[other] = parents[parents[other]]
            other = parents[other]
        if one != other:
            parents[max(one, other)] = min(one, other)
            num_joined += 1
    return num_joined


@compiled
def _number_components(parents: Any) -> int:
    """Replace each parent by the number of its component, in place; return how many there are. A parent comes
    before its child, so one pass is enough."""
    num_components = 0
    for node in range(len(parents)):
        if parents[node] == node:
            parents[node] = num_components
            num_components += 1
        else:
            parents[node] = parents[parents[node]]
    return num_components


@dataclass(frozen=True)
class Components:
    bits: Bits
    before: Ints
    component: Ints
    """Of each node."""
    num_components: int

    @property
    def num_nodes(self) -> int:
        return len(self.component)

    def windows(self) -> Iterator[tuple[int, Ints]]:
        """The documents that are nodes, ascending, in blocks, each with the node of its first."""
        for first in range(0, len(self.bits), WINDOW_WORDS):
            end = min(len(self.bits), first + WINDOW_WORDS)
            if self.before[end] > self.before[first]:
                yield int(self.before[first]), _marked(self.bits, first, end)


def pair_blocks(paths: Sequence[Path]) -> Iterator[tuple[Ints, Ints]]:
    """Low and high documents of all pairs, in blocks."""
    for path in paths:
        table = Table.open(path, None)
        for _, block in table.stretches(0, table.shape[0]):
            yield np.ascontiguousarray(block["low"]), np.ascontiguousarray(block["high"])


def connect(paths: Sequence[Path], num_documents: int) -> Components:
    """Connected components of the pairs in these files."""
    bits = np.zeros(-(-num_documents // 64), dtype=np.uint64)
    for low, high in pair_blocks(paths):
        _mark(bits, low)
        _mark(bits, high)
    before = _ones_before(bits)
    parents = np.arange(before[-1], dtype=np.int64)
    num_joined = 0
    for low, high in pair_blocks(paths):
        num_joined += _join(parents, _nodes(bits, before, low), _nodes(bits, before, high))
    num_components = _number_components(parents)
    components = Components(bits, before, parents, num_components)
    check_fixed_point(components, paths, num_joined)
    return components


def check_fixed_point(components: Components, paths: Sequence[Path], num_joined: int) -> None:
    """Raise unless no pair lies across two components, and every join made one component of two."""
    num_across = 0
    for low, high in pair_blocks(paths):
        ends = [_nodes(components.bits, components.before, side) for side in (low, high)]
        num_across += int((components.component[ends[0]] != components.component[ends[1]]).sum())
    expected = components.num_nodes - num_joined
    if num_across or components.num_components != expected:
        raise DataError(
            f"clusters of near-duplicates are not final: {num_across} pairs lie across two of them, and "
            f"{components.num_components} were found where {expected} were expected; this is a bug, or the "
            "pair files changed while they were read: delete the folder of near-duplicates and run again"
        )


@compiled
def _improve(
    component: Any,
    documents: Any,
    is_previous: Any,
    rank: Any,
    id_high: Any,
    id_low: Any,
    best: Any,
    best_previous: Any,
    best_rank: Any,
    best_high: Any,
    best_low: Any,
    sizes: Any,
) -> None:
    """Take documents into account for the best of their components. The order is that of `best_first`."""
    for at in range(len(documents)):
        number = component[at]
        sizes[number] += 1
        if best[number] >= 0:
            if is_previous[at] != best_previous[number]:
                if not is_previous[at]:
                    continue
            elif rank[at] != best_rank[number]:
                if rank[at] < best_rank[number]:
                    continue
            elif id_high[at] != best_high[number]:
                if id_high[at] > best_high[number]:
                    continue
            elif id_low[at] >= best_low[number]:
                continue
        best[number] = documents[at]
        best_previous[number] = is_previous[at]
        best_rank[number] = rank[at]
        best_high[number] = id_high[at]
        best_low[number] = id_low[at]


@dataclass(frozen=True)
class Survivors:
    """Of each component the best document and the number of members; of each node whether an earlier run
    kept it."""

    best: Ints
    sizes: Ints
    is_previous: npt.NDArray[np.bool_]


def find_survivors(components: Components, units: Sequence[DedupUnit]) -> Survivors:
    num = components.num_components
    best, sizes = np.full(num, -1, dtype=np.int64), np.zeros(num, dtype=np.int64)
    best_previous, best_rank = np.zeros(num, dtype=np.bool_), np.zeros(num, dtype=np.float64)
    best_high, best_low = np.zeros(num, dtype=np.uint64), np.zeros(num, dtype=np.uint64)
    is_previous = np.zeros(components.num_nodes, dtype=np.bool_)
    for first, documents in components.windows():
        rows = gather_documents(units, documents)
        nodes = slice(first, first + len(documents))
        is_previous[nodes] = rows["is_previous"]
        _improve(
            components.component[nodes],
            documents,
            is_previous[nodes],
            np.ascontiguousarray(rows["rank"]),
            np.ascontiguousarray(rows["id_high"]),
            np.ascontiguousarray(rows["id_low"]),
            best,
            best_previous,
            best_rank,
            best_high,
            best_low,
            sizes,
        )
    return Survivors(best, sizes, is_previous)


@compiled
def _greedy(earlier: Any, later: Any, is_previous: Any) -> Any:
    """Survivor of each position: itself, or the first position that survives and has a pair with it.

    Pairs are sorted by (later, earlier), so whether `earlier` survives is known when a pair is met.
    """
    survivor = np.arange(len(is_previous))
    for pair in range(len(earlier)):
        one, other = earlier[pair], later[pair]
        if survivor[one] == one and survivor[other] == other and not is_previous[other]:
            survivor[other] = one
    return survivor


@dataclass(frozen=True)
class Split:
    """Members of components above the bound (ascending), and the survivor of each, maybe itself."""

    documents: Ints
    survivor: Ints


def split_oversize(
    components: Components,
    survivors: Survivors,
    units: Sequence[DedupUnit],
    pairs: Sequence[Path],
    task: ClusterTask,
) -> Split:
    """Take components with more than `max_cluster` members apart."""
    is_oversize = survivors.sizes > task.cfg.max_cluster
    member_blocks, best_blocks, previous_blocks = [], [], []
    if is_oversize.any():
        for first, documents in components.windows():
            number = components.component[first : first + len(documents)]
            chosen = is_oversize[number]
            member_blocks.append(documents[chosen])
            best_blocks.append(survivors.best[number[chosen]])
            previous_blocks.append(survivors.is_previous[first : first + len(documents)][chosen])
    if not member_blocks:
        return Split(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    members, best = np.concatenate(member_blocks), np.concatenate(best_blocks)
    is_previous = np.concatenate(previous_blocks)
    survivor = members.copy()

    # Those like the best of their component go.
    to_compare = np.flatnonzero((members != best) & ~is_previous)
    with_texts = ~is_previous[np.searchsorted(members, best)]
    for at in range(0, len(to_compare), COMPARED_AT_ONCE):
        part = to_compare[at : at + COMPARED_AT_ONCE]
        edges = agreements(units, members[part], best[part], with_texts[part], task.cfg)
        is_like = decide(edges, task.texts, task.split, task.cfg).is_accepted
        survivor[part[is_like]] = best[part[is_like]]

    # Of the rest, those go that have an accepted pair with one that stays.
    left = np.flatnonzero((survivor == members) & (members != best))
    documents = members[left]
    rows = gather_documents(units, documents)
    order = best_first(rows)
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    earlier_blocks, later_blocks = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for low, high in pair_blocks(pairs):
        ends = [np.searchsorted(documents, side) for side in (low, high)]
        inside = (ends[0] < len(documents)) & (ends[1] < len(documents))
        ends = [end[inside] for end in ends]
        both = (documents[ends[0]] == low[inside]) & (documents[ends[1]] == high[inside])
        places = [position[end[both]] for end in ends]
        earlier_blocks.append(np.minimum(*places))
        later_blocks.append(np.maximum(*places))
    earlier, later = np.concatenate(earlier_blocks), np.concatenate(later_blocks)
    by_later = np.lexsort((earlier, later))
    found = _greedy(earlier[by_later], later[by_later], np.ascontiguousarray(rows["is_previous"][order]))
    survivor[left[order]] = documents[order[found]]
    return Split(members, survivor)


def agreements(
    units: Sequence[DedupUnit],
    documents: Ints,
    others: Ints,
    has_texts: npt.NDArray[np.bool_],
    cfg: NearConfig,
) -> Records:
    """Pairs as EDGE rows, from their signatures."""
    found, place = np.unique(np.concatenate([documents, others]), return_inverse=True)
    signatures = gather_signatures(units, found, cfg.num_permutations)
    edges = np.empty(len(documents), dtype=EDGE)
    edges["low"], edges["high"] = np.minimum(documents, others), np.maximum(documents, others)
    edges["agreement"] = num_equal(signatures, place[: len(documents)], place[len(documents) :])
    edges["has_texts"] = has_texts
    return edges


@dataclass(frozen=True)
class ClusterTask:
    units: Path
    pairs: tuple[Path, ...]
    cfg: NearConfig
    texts: DocumentTexts
    split: Splitter
    path: Path
    done: Path
    key: str


def cluster(task: ClusterTask) -> dict[str, Any]:
    """Write the documents that near-duplicates remove, sorted, as rows of DUPLICATE."""
    units = read_units(task.units)
    components = connect(task.pairs, units[-1].end if units else 0)
    survivors = find_survivors(components, units)
    split = split_oversize(components, survivors, units, task.pairs, task)
    split_survivors, split_sizes = np.unique(split.survivor, return_counts=True)
    usual_sizes = survivors.sizes[survivors.sizes <= task.cfg.max_cluster]
    sizes, counts = np.unique(np.concatenate([usual_sizes, split_sizes[split_sizes > 1]]), return_counts=True)
    removed: dict[int, int] = {}
    with RowWriter(task.path, DUPLICATE) as writer:
        for first, documents in components.windows():
            nodes = slice(first, first + len(documents))
            number = components.component[nodes]
            rows = np.empty(len(documents), dtype=DUPLICATE)
            rows["document"], rows["survivor"] = documents, survivors.best[number]
            rows["cluster_size"] = np.minimum(survivors.sizes[number], 2**31 - 1)
            is_split = survivors.sizes[number] > task.cfg.max_cluster
            at = np.searchsorted(split.documents, documents[is_split])
            rows["survivor"][is_split] = split.survivor[at]
            size_at = np.searchsorted(split_survivors, split.survivor[at])
            rows["cluster_size"][is_split] = np.minimum(split_sizes[size_at], 2**31 - 1)
            rows = rows[(rows["survivor"] != documents) & ~survivors.is_previous[nodes]]
            writer.append(rows)
            sources = gather_documents(units, np.ascontiguousarray(rows["document"]))["source"]
            for source, count in zip(*(part.tolist() for part in np.unique_counts(sources)), strict=True):
                removed[source] = removed.get(source, 0) + count
    is_oversize = survivors.sizes > task.cfg.max_cluster
    summary = {
        "key": task.key,
        "num_in_pairs": components.num_nodes,
        "num_clusters": int(counts.sum()),
        "num_duplicates": sum(removed.values()),
        "num_oversize_clusters": int(is_oversize.sum()),
        "num_oversize_documents": int(survivors.sizes[is_oversize].sum()),
        "num_released": int((split.survivor == split.documents).sum() - is_oversize.sum()),
        "largest_component": int(survivors.sizes.max(initial=0)),
        "cluster_sizes": [list(row) for row in zip(sizes.tolist(), counts.tolist(), strict=True)],
        "removed_by_source": [list(row) for row in sorted(removed.items())],
    }
    write_done(task.done, summary, [task.path])
    return summary
