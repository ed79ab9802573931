from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from near_corpus import FixedWords, split_fixed, text_of

from llmtrain.data.dedup.config import NearConfig
from llmtrain.data.dedup.minhash import (
    EMPTY,
    band_keys,
    is_empty,
    num_equal,
    permutations,
    shingle_sets,
    signatures,
    similarities,
)

NUM_WORDS, SHINGLE = 300, 5
FIRST_MULTIPLIERS = [2065550767, 2713282037, 2148091215]
FIRST_ADDENDS = [3793791033, 1853398634, 113532184]
FIRST_SIGNATURE = [[548418240, 641489141, 620532159]]
FIRST_KEY = [[5092311602033073411]]


def words_of(documents: Sequence[Sequence[int]]) -> FixedWords:
    texts = [text_of(words) for words in documents]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return split_fixed(np.frombuffer(b"".join(texts), dtype=np.uint8), offsets)


def planted_pairs(num_pairs: int, seed: int) -> tuple[FixedWords, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of documents, and their true Jaccard similarity: the second has 1 to 29 words replaced.

    All words differ, so a shingle is a position; those without a replaced word are shared.
    """
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 2**62, (num_pairs, NUM_WORDS)).astype(np.uint64)
    num_edits = draw.integers(1, 30, num_pairs)
    is_edited = np.argsort(draw.random((num_pairs, NUM_WORDS)), axis=1) < num_edits[:, None]
    second = np.where(is_edited, draw.integers(2**62, 2**63, first.shape).astype(np.uint64), first)
    num_shingles = NUM_WORDS - SHINGLE + 1
    is_touched = np.lib.stride_tricks.sliding_window_view(is_edited, SHINGLE, axis=1).any(axis=2)
    num_shared = (~is_touched).sum(axis=1)
    similarity = num_shared / (2 * num_shingles - num_shared)
    folded = np.concatenate([first.ravel(), second.ravel()])
    words = FixedWords(
        np.ones(len(folded), dtype=np.uint8), folded, np.arange(0, len(folded) + 1, NUM_WORDS, dtype=np.int64)
    )
    return words, np.arange(num_pairs), np.arange(num_pairs, 2 * num_pairs), similarity


def test_signatures_are_the_least_hashes_of_the_shingles() -> None:
    draw = np.random.default_rng(0)
    words = words_of([draw.integers(0, 40, num).tolist() for num in (0, 1, 3, 5, 6, 7, 8, 9, 300)])
    kind = draw.integers(0, 4, len(words.kind)).astype(np.uint8)
    words = words._replace(kind=kind)
    multipliers, addends = permutations(19)
    sets, offsets = shingle_sets(words, 3)
    signed = signatures(words, 19, 3)
    for document in range(9):
        shingles = sets[offsets[document] : offsets[document + 1]]
        low, high = shingles.astype(np.uint32), (shingles >> np.uint64(32)).astype(np.uint32)
        hashes = multipliers * low[:, None] + (high[:, None] ^ addends)
        least = hashes.min(axis=0) if len(hashes) else np.full(19, EMPTY)
        assert signed[document].tolist() == least.tolist()


def test_only_words_make_shingles() -> None:
    words = words_of([[1, 2, 3, 4, 5, 6]])
    with_symbols = words_of([[1, 77, 2, 3, 77, 4, 5, 6, 77]])
    kind = np.array([3, 2, 1, 1, 0, 1, 1, 1, 0], dtype=np.uint8)
    assert (signatures(words, 8, 5) == signatures(with_symbols._replace(kind=kind), 8, 5)).all()


def test_a_document_shorter_than_a_shingle_is_one_shingle() -> None:
    words = words_of([[1, 2], [1, 2], [2, 1], [1, 2, 3]])
    sets, offsets = shingle_sets(words, 5)
    assert np.diff(offsets).tolist() == [1, 1, 1, 1]
    assert len(set(sets.tolist())) == 3


def test_a_document_without_words_has_the_empty_signature_and_is_like_nothing() -> None:
    words = words_of([[], [1, 2, 3], []])
    signed = signatures(words, 8, 5)
    assert is_empty(signed).tolist() == [True, False, True]
    sets, offsets = shingle_sets(words, 5)
    both = similarities(sets, offsets, np.array([0, 0]), np.array([1, 2]), is_containment=False)
    assert both.tolist() == [0, 0]


def test_a_shingle_that_occurs_twice_counts_once() -> None:
    sets, offsets = shingle_sets(words_of([[1, 2, 1, 2, 1, 2], [1, 2, 1, 2]]), 2)
    assert np.diff(offsets).tolist() == [2, 2]
    assert similarities(sets, offsets, np.array([0]), np.array([1]), is_containment=False).tolist() == [1]


def test_similarities_are_those_of_python_sets() -> None:
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 12, int(draw.integers(1, 60))).tolist() for _ in range(40)]
    sets, offsets = shingle_sets(words_of(documents), 2)
    left, right = np.divmod(np.arange(40 * 40), 40)
    as_sets = [{tuple(words[at : at + 2]) for at in range(max(1, len(words) - 1))} for words in documents]
    for is_containment in (False, True):
        ours = similarities(sets, offsets, left, right, is_containment=is_containment)
        for at, (one, other) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
            shared = len(as_sets[one] & as_sets[other])
            whole = (
                min(len(as_sets[one]), len(as_sets[other]))
                if is_containment
                else len(as_sets[one] | as_sets[other])
            )
            assert ours[at] == pytest.approx(shared / whole, abs=1e-12)


def test_the_permutations_never_change() -> None:
    """Signatures are kept and compared with those of later runs: a change needs another VERSION."""
    multipliers, addends = permutations(3)
    assert multipliers.tolist() == FIRST_MULTIPLIERS
    assert addends.tolist() == FIRST_ADDENDS
    assert (permutations(200)[0][:3] == multipliers).all()
    assert signatures(words_of([[1, 2, 3, 4, 5, 6, 7]]), 3, 5).tolist() == FIRST_SIGNATURE
    assert band_keys(signatures(words_of([[1, 2, 3, 4, 5, 6, 7]]), 3, 5), 1, 3).tolist() == FIRST_KEY


def test_agreement_of_signatures_has_the_mean_and_the_variance_of_independent_permutations() -> None:
    words, first, second, similarity = planted_pairs(20_000, 3)
    agreement = num_equal(signatures(words, 112, SHINGLE), first, second) / 112
    error = (agreement - similarity) / np.sqrt(similarity * (1 - similarity) / 112)
    assert abs(error.mean()) < 0.03  # standard error 0.007
    assert abs(error.var() - 1) < 0.05  # 0.01


def test_pairs_share_a_band_as_often_as_theory_says() -> None:
    cfg = NearConfig()
    words, first, second, similarity = planted_pairs(60_000, 4)
    keys = band_keys(signatures(words, cfg.num_permutations, SHINGLE), cfg.bands, cfg.rows)
    shares = (keys[:, first] == keys[:, second]).any(axis=0)
    expected = 1 - (1 - similarity**cfg.rows) ** cfg.bands
    bins = np.floor(similarity * 20).astype(np.int64)
    enough = [number for number in np.unique(bins) if (bins == number).sum() >= 2800]
    assert min(enough) <= 9  # from a similarity of 0.45, or less,
    assert max(enough) == 18  # to 0.95
    for number in enough:  # 0.02 is 2.5 standard errors and more
        of_bin = bins == number
        assert shares[of_bin].mean() == pytest.approx(expected[of_bin].mean(), abs=0.02), number / 20


def test_unlike_documents_share_no_band() -> None:
    words, _, _, _ = planted_pairs(20_000, 5)
    keys = band_keys(signatures(words, 112, SHINGLE)[:20_000], 14, 8)
    assert all(len(np.unique(band)) == 20_000 for band in keys)
