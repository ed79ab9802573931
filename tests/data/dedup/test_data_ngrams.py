"""Overlap of n-grams over files against sets in memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.config import NgramConfig
from llmtrain.data.dedup.ngrams import OVERLAP, NgramWriter, ngram_hashes, ngram_overlap
from llmtrain.data.dedup.units import DOCUMENT, best_first
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.engines.engine import Inline, make_engine
from llmtrain.errors import ConfigError, DataError

Documents = list[list[int]]


def segments(documents: Documents) -> tuple[Any, Any, Any]:
    """Words as the kernel takes them: their hashes, of which 0 is a symbol; whether each counts; offsets."""
    words = np.array([word for document in documents for word in document], dtype=np.uint64)
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    return words, words != 0, offsets


def ngrams_of(document: list[int], num_words: int) -> list[tuple[int, ...]]:
    words = [word for word in document if word]
    return [tuple(words[at : at + num_words]) for at in range(len(words) - num_words + 1)]


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=6), st.integers(1, 6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_hashes_are_equal_when_the_words_are(documents: Documents, num_words: int) -> None:
    hashes, counts = ngram_hashes(*segments(documents), NgramConfig(num_words=num_words))
    expected = [ngrams_of(document, num_words) for document in documents]
    assert counts.tolist() == [len(ngrams) for ngrams in expected]
    pairs = set(zip(itertools.chain(*expected), hashes.tolist(), strict=True))
    assert len(pairs) == len({ngram for ngram, _ in pairs}) == len({hashed for _, hashed in pairs})


def test_a_sample_holds_the_same_ngrams_of_every_document() -> None:
    draw = np.random.default_rng(0)
    document = draw.integers(1, 2**40, 20_000).tolist()
    documents = [document, [7, *document[5000:15_000]], document[:3]]
    whole, counts = ngram_hashes(*segments(documents), NgramConfig(num_words=5))
    some, some_counts = ngram_hashes(*segments(documents), NgramConfig(num_words=5, keep_one_in=7))
    assert some.tolist() == [hashed for hashed in whole.tolist() if hashed % 7 == 0]
    assert abs(some_counts[0] * 7 / counts[0] - 1) < 0.08  # 4 standard errors
    assert some_counts[2] == 0


def write_units(
    folder: Path, rows: Any, documents: Documents, cuts: list[int], num_words: int, cut_units: Any, first: int
) -> Any:
    paths = []
    cfg = NgramConfig(num_words=num_words)
    for number, (start, end) in enumerate(itertools.pairwise([0, *sorted(cuts), len(documents)])):
        paths.append(folder / f"ngrams-{number}.npy")
        middle = (start + end) // 2
        with NgramWriter(paths[-1]) as writer:
            for at, to in ((start, middle), (middle, end)):
                writer.append(*ngram_hashes(*segments(documents[at:to]), cfg))
    return cut_units(folder, rows, cuts, first=first, ngrams=paths)


def expected_overlaps(rows: Any, documents: Documents, num_words: int) -> list[tuple[int, int, int]]:
    place = np.empty(len(rows), dtype=np.int64)
    place[best_first(rows)] = np.arange(len(rows))
    owners: dict[tuple[int, ...], int] = {}
    sets = [set(ngrams_of(document, num_words)) for document in documents]
    for at in np.flatnonzero(rows["alive"]).tolist():
        for ngram in sets[at]:
            owners[ngram] = min(owners.get(ngram, 2**62), int(place[at]))
    return [
        (at, len(sets[at]), sum(owners[ngram] != place[at] for ngram in sets[at]))
        for at in np.flatnonzero(rows["alive"] & ~rows["is_previous"]).tolist()
        if sets[at]
    ]


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=25),
    st.integers(1, 5),
    st.lists(st.integers(0, 25), max_size=3),
    st.sampled_from([512, 2048, 8192, 1 << 31]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_overlap_is_the_share_of_different_ngrams_that_better_documents_have(
    new_folder: Any, made_up_documents: Any, cut_units: Any, small_tasks: Any,
    documents: Documents, num_words: int, cuts: list[int], partition_bytes: int,
) -> None:  # fmt: skip
    first = 2**33
    rows = made_up_documents(len(documents), len(documents))
    cuts = [cut for cut in cuts if cut <= len(documents)]
    cfg = small_tasks(partition_bytes)
    cfg.ngrams.max_share = 0.5
    with new_folder() as name:
        units = write_units(Path(name), rows, documents, cuts, num_words, cut_units, first)
        result = ngram_overlap(units, cfg, Inline(), Path(name) / "out")
        found = np.concatenate([np.load(path) for path in result.overlaps])
        dropped = np.load(result.dropped)
    expected = expected_overlaps(rows, documents, num_words)
    assert found.dtype == dropped.dtype == OVERLAP
    assert found.tolist() == [(first + at, num, lost) for at, num, lost in expected]
    assert dropped.tolist() == [row for row in found.tolist() if row[2] / row[1] > 0.5]
    assert (result.num_documents, result.num_dropped) == (len(expected), len(dropped))
    assert sum(result.histogram) == len(expected)
    assert result.histogram[-1] == sum(lost / num >= 0.95 for _, num, lost in expected)


def test_workers_change_nothing(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    draw = np.random.default_rng(4)
    documents = [draw.integers(1, 9, count).tolist() for count in draw.integers(0, 60, 150)]
    units = write_units(tmp_path, made_up_documents(150, 4), documents, [30, 80], 3, cut_units, 0)
    engine = make_engine(EngineConfig(kind=EngineKind.local, workers=2))
    cfg = small_tasks(8192)
    inline = ngram_overlap(units, cfg, Inline(), tmp_path / "inline")
    spread = ngram_overlap(units, cfg, engine, tmp_path / "spread")
    for ours, theirs in zip(
        [*inline.overlaps, inline.dropped], [*spread.overlaps, spread.dropped], strict=True
    ):
        assert ours.read_bytes() == theirs.read_bytes()
    assert inline.histogram == spread.histogram
    assert inline.num_dropped > 0
    assert not list(tmp_path.rglob("work-*"))
    assert ngram_overlap(units, small_tasks(1 << 20), Inline(), tmp_path / "spread") == spread


def test_of_equal_documents_all_but_the_best_are_dropped(
    tmp_path: Path, cut_units: Any, small_tasks: Any
) -> None:
    rows = np.zeros(200, dtype=DOCUMENT)
    rows["alive"] = True
    rows["id_low"] = np.arange(200)[::-1]
    documents = [list(range(1, 60))] * 199 + [list(range(1, 12))]
    units = write_units(tmp_path, rows, documents, [100], 13, cut_units, 0)
    cfg = small_tasks(1 << 16)
    cfg.ngrams.max_share = 1
    result = ngram_overlap(units, cfg, Inline(), tmp_path / "one")
    assert result.num_dropped == 0
    assert result.histogram == [1, *[0] * 18, 198]
    cfg.ngrams.max_share = 0.8
    dropped = np.load(ngram_overlap(units, cfg, Inline(), tmp_path / "two").dropped)
    assert dropped.tolist() == [(at, 47, 47) for at in range(198)]


def test_units_without_ngrams_dead_ones_and_none_at_all_drop_nothing(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    cfg = small_tasks(1 << 20)
    assert ngram_overlap([], cfg, Inline(), tmp_path / "none").num_dropped == 0
    rows = made_up_documents(6, 1)
    rows["alive"] = False
    units = write_units(tmp_path, rows, [[1] * 9] * 6, [0, 2], 3, cut_units, 0)
    assert ngram_overlap(units, cfg, Inline(), tmp_path / "dead").num_documents == 0
    units = cut_units(tmp_path, made_up_documents(6, 1), [0, 2])
    assert ngram_overlap(units, cfg, Inline(), tmp_path / "without").num_documents == 0


def test_ngrams_of_other_documents_are_refused(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    units = write_units(tmp_path, made_up_documents(4, 1), [[1, 2, 3]] * 4, [], 2, cut_units, 0)
    with NgramWriter(tmp_path / "ngrams-0.npy") as writer:
        writer.append(*ngram_hashes(*segments([[1, 2, 3]] * 5), NgramConfig(num_words=2)))
    with pytest.raises(
        DataError, match=r"ngrams-0.npy has 11 n-grams, but its documents should have 8: it is"
    ):
        ngram_overlap(units, small_tasks(1 << 20), Inline(), tmp_path / "out")


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def stopped() -> None:
        with NgramWriter(tmp_path / "ngrams.npy") as writer:
            writer.append(*ngram_hashes(*segments([[1, 2, 3]]), NgramConfig(num_words=2)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_settings_of_ngrams_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"dedup.ngrams.num_words=0 must be at least 1"):
        NgramConfig(num_words=0)
    with pytest.raises(ConfigError, match=r"dedup.ngrams.max_share=-0.1 must lie in 0..1"):
        NgramConfig(max_share=-0.1)
    with pytest.raises(ConfigError, match=r"dedup.ngrams.keep_one_in=0 must be at least 1; 1 keeps all"):
        NgramConfig(keep_one_in=0)
