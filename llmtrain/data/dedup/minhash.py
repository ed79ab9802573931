"""MinHash signatures of documents (Broder 1997), and what is computed from them.

A document is the set of its shingles: runs of words, lower-cased, symbols left out. For each permutation h a
signature holds the smallest h(shingle). Two signatures agree at a place with the probability that is the
Jaccard similarity of the sets, so the share of places where they agree estimates it, with a standard error of
sqrt(s (1 - s) / num_permutations).

A shingle is hashed to 64 bits, low and high half. h(shingle) = multiplier * low + (high xor addend) mod 2^32,
an odd multiplier and an addend for each permutation: one 32-bit product, which AVX2 computes eight at once.
Measured against true set similarity, the share of agreeing places and its variance are within 2 % of theory
(tests/data/dedup/test_data_minhash.py); two shingles are taken for one only where all 64 bits are equal.

The constants never change: signatures are kept, and compared with those of later runs. `VERSION` names them.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled

VERSION = 1
"""Of the words' hash, the shingles' hash and the permutations together."""

EMPTY = np.uint32(0xFFFFFFFF)
"""At every place of the signature of a document without words. Such documents are like no other."""

Signatures = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

_POLYNOMIAL = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SPLIT_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class HashedWords(Protocol):
    """What shingles need of the words of a batch (llmtrain/data/text/words.py)."""

    @property
    def kind(self) -> npt.NDArray[np.uint8]: ...
    @property
    def folded(self) -> Hashes: ...
    @property
    def offsets(self) -> Ints: ...


def permutations(num_permutations: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Odd multipliers and addends. Those of fewer permutations are the first ones of more.

    Drawn by splitmix64 (Steele, Lea and Flood 2014) from 0.
    """
    drawn = []
    for number in range(1, num_permutations + 1):
        bits = number * _SPLIT_MIX[0] % 2**64
        bits = (bits ^ (bits >> 30)) * _SPLIT_MIX[1] % 2**64
        bits = (bits ^ (bits >> 27)) * _SPLIT_MIX[2] % 2**64
        drawn.append(bits ^ (bits >> 31))
    multipliers = np.array([bits % 2**32 | 1 for bits in drawn], dtype=np.uint32)
    addends = np.array([bits >> 32 for bits in drawn], dtype=np.uint32)
    return multipliers, addends


@compiled
def _shingles(kind: Any, folded: Any, begin: int, end: int, shingle_words: int, words: Any, out: Any) -> int:
    """Hash the shingles of one document into `out`; return how many. A text with fewer words than a shingle
    is one shingle; one without words has none."""
    num_words = 0
    for at in range(begin, end):  # without a branch: where symbols are, is not to be guessed
        words[num_words] = folded[at]
        num_words += kind[at] & 1
    if num_words == 0:
        return 0
    # word_1 p^size + word_2 p^(size - 1) + ... + word_size p, rolled from one shingle to the next.
    size = min(shingle_words, num_words)
    rolled = np.uint64(0)
    power = np.uint64(1)
    for at in range(size - 1):
        rolled = (rolled + words[at]) * _POLYNOMIAL
        power *= _POLYNOMIAL
    leaving = np.uint64(0)
    for at in range(num_words - size + 1):
        rolled = (rolled - leaving + words[at + size - 1]) * _POLYNOMIAL
        leaving = words[at] * power * _POLYNOMIAL
        hashed = (rolled ^ (rolled >> np.uint64(32))) * _MIX
        out[at] = hashed ^ (hashed >> np.uint64(32))
    return num_words - size + 1


@compiled
def _signatures(
    kind: Any, folded: Any, offsets: Any, multipliers: Any, addends: Any, shingle_words: int
) -> Any:
    num_documents = len(offsets) - 1
    num_permutations = len(multipliers)
    signatures = np.empty((num_documents, num_permutations), dtype=np.uint32)
    words = np.empty(1024, dtype=np.uint64)
    shingles = np.empty(1024, dtype=np.uint64)
    for document in range(num_documents):
        begin, end = offsets[document], offsets[document + 1]
        if end - begin + 3 > len(words):
            words = np.empty(2 * (end - begin) + 3, dtype=np.uint64)
            shingles = np.empty(2 * (end - begin) + 3, dtype=np.uint64)
        row = signatures[document]
        for place in range(num_permutations):
            row[place] = EMPTY
        num_shingles = _shingles(kind, folded, begin, end, shingle_words, words, shingles)
        while num_shingles % 4 > 0:  # the loop below takes four; one twice changes no minimum
            shingles[num_shingles] = shingles[num_shingles - 1]
            num_shingles += 1
        # Four shingles a round, so that each minimum is loaded and stored a quarter as often. The loop over
        # the permutations becomes AVX2 code (vpmulld, vpxor, vpaddd, vpminud).
        for at in range(0, num_shingles, 4):
            low_0, high_0 = np.uint32(shingles[at]), np.uint32(shingles[at] >> np.uint64(32))
            low_1, high_1 = np.uint32(shingles[at + 1]), np.uint32(shingles[at + 1] >> np.uint64(32))
            low_2, high_2 = np.uint32(shingles[at + 2]), np.uint32(shingles[at + 2] >> np.uint64(32))
            low_3, high_3 = np.uint32(shingles[at + 3]), np.uint32(shingles[at + 3] >> np.uint64(32))
            for place in range(num_permutations):
                factor, addend, least = multipliers[place], addends[place], row[place]
                least = min(least, np.uint32(np.uint32(factor * low_0) + (high_0 ^ addend)))
                least = min(least, np.uint32(np.uint32(factor * low_1) + (high_1 ^ addend)))
                least = min(least, np.uint32(np.uint32(factor * low_2) + (high_2 ^ addend)))
                least = min(least, np.uint32(np.uint32(factor * low_3) + (high_3 ^ addend)))
                row[place] = least
    return signatures


def signatures(words: HashedWords, num_permutations: int, shingle_words: int) -> Signatures:
    """Signatures of a batch: uint32 [num_documents, num_permutations]."""
    multipliers, addends = permutations(num_permutations)
    result: Signatures = _signatures(
        words.kind, words.folded, words.offsets, multipliers, addends, shingle_words
    )
    return result


@compiled
def _shingle_sets(kind: Any, folded: Any, offsets: Any, shingle_words: int) -> Any:
    num_documents = len(offsets) - 1
    sets = np.empty(len(kind), dtype=np.uint64)  # a document has at most as many shingles as words
    set_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    words = np.empty(len(kind), dtype=np.uint64)
    filled = 0
    for document in range(num_documents):
        num = _shingles(
            kind, folded, offsets[document], offsets[document + 1], shingle_words, words, sets[filled:]
        )
        found = sets[filled : filled + num]
        found.sort()
        end = filled
        for at in range(num):
            if at == 0 or sets[filled + at] != sets[end - 1]:
                sets[end] = sets[filled + at]
                end += 1
        filled = end
        set_offsets[document + 1] = filled
    return sets[:filled].copy(), set_offsets


def shingle_sets(words: HashedWords, shingle_words: int) -> tuple[Hashes, Ints]:
    """The set of shingle hashes of each document, sorted, and where each set starts."""
    sets, offsets = _shingle_sets(words.kind, words.folded, words.offsets, shingle_words)
    return sets, offsets


@compiled
def _similarities(sets: Any, offsets: Any, left: Any, right: Any, is_containment: bool) -> Any:
    result = np.zeros(len(left), dtype=np.float64)
    for pair in range(len(left)):
        at, end = offsets[left[pair]], offsets[left[pair] + 1]
        other, other_end = offsets[right[pair]], offsets[right[pair] + 1]
        num, num_other = end - at, other_end - other
        num_shared = 0
        while at < end and other < other_end:
            if sets[at] < sets[other]:
                at += 1
            elif sets[at] > sets[other]:
                other += 1
            else:
                num_shared += 1
                at += 1
                other += 1
        whole = min(num, num_other) if is_containment else num + num_other - num_shared
        if whole > 0:
            result[pair] = num_shared / whole
    return result


def similarities(
    sets: Hashes, offsets: Ints, left: Ints, right: Ints, *, is_containment: bool
) -> npt.NDArray[np.float64]:
    """Jaccard similarity, or containment, of pairs of sets; 0 where a set is empty."""
    result: npt.NDArray[np.float64] = _similarities(sets, offsets, left, right, is_containment)
    return result


@compiled
def _band_keys(signatures: Any, bands: int, rows: int) -> Any:
    keys = np.empty((bands, len(signatures)), dtype=np.uint64)
    for document in range(len(signatures)):
        for band in range(bands):
            hashed = np.uint64(rows)
            for place in range(band * rows, (band + 1) * rows):
                hashed = (hashed ^ np.uint64(signatures[document, place])) * _POLYNOMIAL
                hashed ^= hashed >> np.uint64(29)
            hashed *= _MIX
            keys[band, document] = hashed ^ (hashed >> np.uint64(32))
    return keys


def band_keys(signatures: Signatures, bands: int, rows: int) -> Hashes:
    """Hashes of the bands: uint64 [bands, num_documents]. Band b takes `rows` places from b * rows on."""
    keys: Hashes = _band_keys(signatures, bands, rows)
    return keys


def is_empty(signatures: Signatures) -> npt.NDArray[np.bool_]:
    """Whether each signature is that of a document without words."""
    empty: npt.NDArray[np.bool_] = (signatures[:, 0] == EMPTY) & (signatures == EMPTY).all(axis=1)
    return empty


@compiled
def _num_equal(signatures: Any, left: Any, right: Any) -> Any:
    counts = np.zeros(len(left), dtype=np.int64)
    for pair in range(len(left)):
        for place in range(signatures.shape[1]):
            counts[pair] += signatures[left[pair], place] == signatures[right[pair], place]
    return counts


def num_equal(signatures: Signatures, left: Ints, right: Ints) -> Ints:
    """At how many places each pair of rows of `signatures` agrees."""
    counts: Ints = _num_equal(signatures, left, right)
    return counts
