from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from near_corpus import (
    StoredTexts,
    edited,
    families,
    rows_of,
    signatures_of,
    small_config,
    split_fixed,
    text_of,
    write_tables,
)

from llmtrain.data.dedup import near as near_module
from llmtrain.data.dedup.config import DedupConfig, Similarity
from llmtrain.data.dedup.near import NearResult, near_duplicates
from llmtrain.data.engines.engine import Engine, Inline
from llmtrain.data.engines.local import Local
from llmtrain.errors import DataError


def run(
    folder: Path,
    documents: Sequence[bytes],
    cfg: DedupConfig,
    *,
    rows: npt.NDArray[np.void] | None = None,
    cuts: Sequence[int] = (),
    engine: Engine | None = None,
    texts: StoredTexts | None = None,
    source_names: Sequence[str] = (),
) -> NearResult:
    rows = rows_of(len(documents)) if rows is None else rows
    units = write_tables(folder / "tables", rows, signatures_of(documents, cfg.near), cuts)
    return near_duplicates(
        units,
        cfg,
        texts or StoredTexts(list(documents)),
        engine or Inline(),
        folder / "near",
        split=split_fixed,
        source_names=source_names,
    )


def removed(result: NearResult) -> dict[int, int]:
    rows = np.load(result.duplicates)
    return dict(zip(rows["document"].tolist(), rows["survivor"].tolist(), strict=True))


def shingles(document: bytes, size: int = 3) -> set[bytes]:
    return {document[at : at + 8 * size] for at in range(0, len(document) - 8 * size + 8, 8)}


def jaccard(one: bytes, other: bytes) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def corpus() -> list[bytes]:
    """Chains and stars, and one original with 30 copies, so that some band keys are long runs."""
    draw = np.random.default_rng(0)
    documents = families(60, draw)
    boilerplate = draw.integers(0, 2**30, 60)
    for _ in range(30):
        documents.append(text_of(edited(boilerplate, int(draw.integers(0, 7)), draw).tolist()))
    return documents


@pytest.fixture(scope="module")
def rows(corpus: list[bytes]) -> npt.NDArray[np.void]:
    draw = np.random.default_rng(1)
    num = len(corpus)
    return rows_of(
        num,
        alive=draw.random(num) < 0.95,
        is_previous=draw.random(num) < 0.1,
        rank=draw.integers(0, 3, num),
        id_high=draw.integers(0, 2, num),
        id_low=draw.permutation(num),
        source=draw.integers(0, 3, num),
    )


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[bytes], rows: npt.NDArray[np.void]
) -> NearResult:
    return run(tmp_path_factory.mktemp("whole"), corpus, small_config(near={"max_cluster": 5}), rows=rows)


def test_the_corpus_of_these_tests_meets_every_branch(whole: NearResult) -> None:
    for name in (
        "num_previous",
        "num_boilerplate_keys",
        "num_by_text",
        "num_without_text",
        "num_oversize_clusters",
        "num_duplicates",
    ):
        assert whole.counts[name] > 0, name
    assert 0 < whole.counts["num_accepted"] < whole.counts["num_candidates"]


@pytest.mark.parametrize(
    ("cuts", "partition_bytes"),
    [
        ((1,), 2 << 30),
        ((100, 100, 200), 1 << 20),
        ((7, 50, 51, 250), 20_000),
        (tuple(range(0, 300, 9)), 8192),
    ],
)
def test_units_and_memory_do_not_change_a_byte(
    tmp_path: Path,
    corpus: list[bytes],
    rows: npt.NDArray[np.void],
    whole: NearResult,
    cuts: tuple[int, ...],
    partition_bytes: int,
) -> None:
    cfg = small_config(near={"max_cluster": 5}, partition_bytes=partition_bytes)
    result = run(tmp_path, corpus, cfg, rows=rows, cuts=cuts)
    assert result.duplicates.read_bytes() == whole.duplicates.read_bytes()
    assert result.sources == whole.sources
    assert result.cluster_sizes == whole.cluster_sizes
    assert result.accepted == whole.accepted
    assert result.rejected == whole.rejected


def test_workers_do_not_change_a_byte(
    tmp_path: Path, corpus: list[bytes], rows: npt.NDArray[np.void], whole: NearResult
) -> None:
    cfg = small_config(near={"max_cluster": 5}, partition_bytes=20_000)
    with Local(2, max_worker_deaths=0) as engine:
        result = run(tmp_path, corpus, cfg, rows=rows, cuts=(150,), engine=engine)
    assert result.duplicates.read_bytes() == whole.duplicates.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_documents_does_not_matter(
    tmp_path: Path, corpus: list[bytes], rows: npt.NDArray[np.void], whole: NearResult, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(corpus))
    cfg = small_config(near={"max_cluster": 5}, partition_bytes=[1 << 20, 16_384][seed % 2])
    result = run(tmp_path, [corpus[at] for at in order], cfg, rows=rows[order], cuts=(40 + seed,))
    ours = np.load(result.duplicates)
    back = {
        (order[document], order[survivor], size)
        for document, survivor, size in zip(*(ours[name].tolist() for name in ours.dtype.names), strict=True)
    }
    assert back == {tuple(row) for row in np.load(whole.duplicates).tolist()}


def test_clusters_are_the_components_of_accepted_pairs_and_the_best_stays(
    tmp_path: Path, corpus: list[bytes], rows: npt.NDArray[np.void]
) -> None:
    result = run(tmp_path, corpus, small_config(), rows=rows)
    members: dict[int, set[int]] = {}
    for path in sorted((tmp_path / "near" / "pairs").glob("*.npy")):
        for low, high, agreement, similarity in np.load(path).tolist():
            assert agreement / 32 >= 0.7 if np.isnan(similarity) else similarity >= 0.7
            if not np.isnan(similarity):
                assert similarity == pytest.approx(jaccard(corpus[low], corpus[high]), abs=1e-6)
            both = members.get(low, {low}) | members.get(high, {high})
            members.update(dict.fromkeys(both, both))
    expected = {}
    for document, cluster in members.items():
        key = {
            number: (not rows["is_previous"][number], -rows["rank"][number], *rows[number].tolist()[3:5])
            for number in cluster
        }
        best = min(cluster, key=key.__getitem__)
        if document != best and not rows["is_previous"][document]:
            expected[document] = (best, len(cluster))
    found = np.load(result.duplicates)
    assert {row[0]: row[1:] for row in found.tolist()} == expected
    assert found["document"].tolist() == sorted(expected)
    assert sum(size * count for size, count in result.cluster_sizes) == len(members)


def test_what_stays_is_never_removed_and_dead_documents_take_no_part(
    whole: NearResult, rows: npt.NDArray[np.void]
) -> None:
    gone = removed(whole)
    assert not set(gone) & set(gone.values())
    assert rows["alive"][list(gone)].all()
    assert rows["alive"][list(gone.values())].all()
    assert not rows["is_previous"][list(gone)].any()


def test_removing_the_duplicates_of_what_is_left_removes_no_copy_of_a_survivor(
    tmp_path: Path, corpus: list[bytes]
) -> None:
    """Taking components apart can leave documents that are like a removed one, never like a survivor that
    they were compared with."""
    cfg = small_config()
    gone = removed(run(tmp_path / "first", corpus, cfg))
    left = [document for number, document in enumerate(corpus) if number not in gone]
    again = removed(run(tmp_path / "second", left, cfg))
    assert len(again) <= len(gone) // 50


def planted(num_pairs: int) -> tuple[list[bytes], npt.NDArray[np.float64]]:
    """Document 2 i + 1 is an edited copy of document 2 i; and their true similarity."""
    draw = np.random.default_rng(7)
    documents, similarity = [], []
    for _ in range(num_pairs):
        words = draw.permutation(2**20)[:200] if num_pairs < 100 else draw.integers(0, 2**31, 200)
        documents.append(text_of(words.tolist()))
        documents.append(text_of(edited(words, int(draw.integers(1, 16)), draw).tolist()))
        a, b = shingles(documents[-2], 5), shingles(documents[-1], 5)
        similarity.append(len(a & b) / len(a | b))
    return documents, np.array(similarity)


@pytest.fixture(scope="module")
def planted_pairs() -> tuple[list[bytes], npt.NDArray[np.float64]]:
    return planted(4000)


def test_planted_duplicates_are_found_and_others_are_not(
    tmp_path: Path, planted_pairs: tuple[list[bytes], npt.NDArray[np.float64]]
) -> None:
    """Recall of at least 0.95 from a similarity of 0.85 on, precision of at least 0.99 at the threshold, and
    the bands' curve times the threshold in between."""
    documents, similarity = planted_pairs
    cfg = DedupConfig()
    result = run(tmp_path, documents, cfg, cuts=(3001,))
    found = np.zeros(len(similarity), dtype=np.bool_)
    for document, survivor in removed(result).items():
        assert document // 2 == survivor // 2, "documents of different pairs share nothing"
        found[document // 2] = True
    assert found[similarity >= 0.85].mean() >= 0.95
    assert (similarity[found] >= cfg.near.threshold).mean() >= 0.99
    is_like = similarity >= cfg.near.threshold
    expected = np.array([cfg.near.candidate_probability(value) for value in similarity[is_like]])
    assert found[is_like].mean() == pytest.approx(expected.mean(), abs=0.02)
    assert 0 < result.counts["num_by_text"] < len(similarity)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9, 1.0])
def test_verification_is_precise_at_other_thresholds(
    tmp_path: Path, planted_pairs: tuple[list[bytes], npt.NDArray[np.float64]], threshold: float
) -> None:
    documents, similarity = planted_pairs[0][:3000], planted_pairs[1][:1500]
    cfg = DedupConfig()
    cfg.near.threshold = threshold
    result = run(tmp_path, documents, cfg)
    values = similarity[[document // 2 for document in removed(result)]]
    assert (values >= threshold).mean() >= 0.99 if threshold < 1 else len(values) == 0


def test_containment_finds_an_excerpt_that_jaccard_does_not(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    words = draw.integers(0, 2**31, 600)
    documents = [text_of(words.tolist()), text_of(words[:360].tolist())]
    loose = {"bands": 32, "rows": 1}
    assert not removed(run(tmp_path / "jaccard", documents, small_config(near=loose)))
    loose["similarity"] = Similarity.containment
    assert removed(run(tmp_path / "containment", documents, small_config(near=loose))) == {1: 0}


def test_documents_without_words_are_no_duplicates(tmp_path: Path) -> None:
    result = run(tmp_path, [b"", b"", text_of([1, 2, 3, 4])], small_config())
    assert removed(result) == {}
    assert result.counts["num_empty"] == 2


def test_no_documents_and_empty_units_are_fine(tmp_path: Path) -> None:
    assert removed(run(tmp_path / "none", [], small_config())) == {}
    documents = [text_of(range(50)), text_of(range(50))]
    result = run(tmp_path / "some", documents, small_config(), cuts=(0, 0, 1, 1, 2))
    assert removed(result) == {1: 0}


def test_the_survivor_is_of_an_earlier_run_then_of_the_highest_rank_then_of_the_smallest_id(
    tmp_path: Path,
) -> None:
    documents = [text_of(range(50))] * 4
    rows = rows_of(4, rank=[1, 2, 2, 2], id_high=[0, 9, 0, 0], id_low=[0, 0, 8, 7])
    assert removed(run(tmp_path / "a", documents, small_config(), rows=rows)) == {0: 3, 1: 3, 2: 3}
    rows["is_previous"] = [True, False, False, False]
    assert removed(run(tmp_path / "b", documents, small_config(), rows=rows)) == {1: 0, 2: 0, 3: 0}


def test_a_key_shared_by_two_groups_yields_both(tmp_path: Path) -> None:
    """All documents begin alike, so one band holds them all; only each half is alike in the rest."""
    draw = np.random.default_rng(5)
    signed = draw.integers(0, 2**32, (2, 32)).astype(np.uint32).repeat(3, axis=0)
    signed[:, :4] = 7
    units = write_tables(tmp_path, rows_of(6), signed)
    result = near_duplicates(
        units, small_config(), StoredTexts([None] * 6), Inline(), tmp_path / "near", split=split_fixed
    )
    assert removed(result) == {1: 0, 2: 0, 4: 3, 5: 3}
    assert result.counts["num_candidates"] == 3 + 2 + 2


def test_a_boilerplate_key_links_only_what_is_like_its_best(tmp_path: Path) -> None:
    draw = np.random.default_rng(6)
    signed = draw.integers(0, 2**32, (50, 32)).astype(np.uint32)
    signed[20:40] = signed[20]
    signed[:, :4] = 7  # one key for all 50, above max_key_documents
    units = write_tables(tmp_path, rows_of(50), signed, cuts=(10, 30))
    cfg = small_config(near={"max_key_documents": 40})
    result = near_duplicates(
        units, cfg, StoredTexts([None] * 50), Inline(), tmp_path / "near", split=split_fixed
    )
    assert result.counts["num_boilerplate_keys"] == 1
    assert result.counts["num_boilerplate_members"] == 50
    assert result.counts["num_left_over"] == 0
    assert removed(result) == dict.fromkeys(range(21, 40), 20)  # through their other bands
    assert result.counts["num_candidates"] == 49 + 19


def test_a_long_chain_is_not_one_cluster(tmp_path: Path) -> None:
    """Each document shares 90 % with the next, the ends nothing. In one cluster all but one would go."""
    draw = np.random.default_rng(8)
    words = draw.integers(0, 2**31, 60 + 40 * 3)
    documents = [text_of(words[3 * at : 3 * at + 60].tolist()) for at in range(40)]
    wanted = {"num_permutations": 112, "bands": 28, "rows": 4}
    chained = removed(run(tmp_path / "chained", documents, small_config(near=wanted)))
    assert len(chained) == 39
    wanted["max_cluster"] = 39
    result = run(tmp_path / "split", documents, small_config(near=wanted))
    gone = removed(result)
    assert len(gone) < 36
    for document, survivor in gone.items():
        assert jaccard(documents[document], documents[survivor]) >= 0.7
    assert result.counts["num_oversize_clusters"] == 1
    assert result.counts["num_oversize_documents"] == 40
    assert result.counts["num_released"] == 39 - len(gone)
    assert result.counts["largest_component"] == 40
    assert max(size for size, _ in result.cluster_sizes) < 10
    sizes = np.load(result.duplicates)["cluster_size"]
    assert sizes.max() == max(size for size, _ in result.cluster_sizes)


def test_max_cluster_of_1_wants_every_removed_document_like_its_survivor(
    tmp_path: Path, corpus: list[bytes]
) -> None:
    gone = removed(run(tmp_path, corpus, small_config(near={"max_cluster": 1, "margin_standard_errors": 9})))
    assert len(gone) > 50
    for document, survivor in gone.items():
        assert jaccard(corpus[document], corpus[survivor]) >= 0.7


def test_texts_of_earlier_runs_are_never_read(tmp_path: Path, corpus: list[bytes]) -> None:
    rows = rows_of(len(corpus), is_previous=np.arange(len(corpus)) % 2 == 0)
    texts = StoredTexts(
        [None if old else text for old, text in zip(rows["is_previous"], corpus, strict=True)]
    )
    result = run(tmp_path, corpus, small_config(near={"max_cluster": 5}), rows=rows, texts=texts)
    assert texts.num_read
    assert result.counts["num_without_text"] > 0
    assert set(removed(result)) <= set(range(1, len(corpus), 2))


def test_documents_of_earlier_runs_are_not_compared_with_each_other(tmp_path: Path) -> None:
    rows = rows_of(4, is_previous=[True, True, True, False])
    result = run(tmp_path, [text_of(range(50))] * 4, small_config(), rows=rows)
    assert removed(result) == {3: 0}
    assert result.counts["num_candidates"] == 1


class Dying(Inline):
    """Fails before the task with a number, as a kill would: what was done stays done."""

    def __init__(self, survive: int) -> None:
        self.left = survive
        self.num_run = 0

    def map(self, function: Callable[[Any], Any], units: Sequence[Any]) -> Iterator[Any]:
        for unit in units:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.num_run += 1
            yield function(unit)


def test_a_run_that_was_cut_short_anywhere_goes_on_where_it_stopped(
    tmp_path: Path, corpus: list[bytes], rows: npt.NDArray[np.void], whole: NearResult
) -> None:
    cfg = small_config(near={"max_cluster": 5}, partition_bytes=1 << 17)
    all_at_once = Dying(-1)
    run(tmp_path / "once", corpus, cfg, rows=rows, engine=all_at_once)
    assert all_at_once.num_run > 5
    num_run = 0
    for survive in (1,) * all_at_once.num_run:
        engine = Dying(survive)
        with contextlib.suppress(KeyboardInterrupt):
            run(tmp_path / "cut", corpus, cfg, rows=rows, engine=engine)
        num_run += engine.num_run
    result = run(tmp_path / "cut", corpus, cfg, rows=rows, engine=Dying(0))
    assert num_run == all_at_once.num_run
    assert result.duplicates.read_bytes() == whole.duplicates.read_bytes()
    assert result.counts == whole.counts
    assert not (tmp_path / "cut" / "near" / "bands").exists()


def test_changed_settings_are_noticed(tmp_path: Path, corpus: list[bytes]) -> None:
    loose = run(tmp_path, corpus, small_config(near={"threshold": 0.5})).counts
    strict = run(tmp_path, corpus, small_config(near={"threshold": 0.9})).counts
    assert strict["num_duplicates"] < loose["num_duplicates"]


def test_a_source_that_loses_too_much_stops_the_run_with_pairs_and_what_to_change(tmp_path: Path) -> None:
    documents = [text_of(range(at, at + 50)) for at in range(0, 1000, 100)] + [text_of(range(50))] * 10
    rows = rows_of(20, source=[0] * 10 + [1] * 10)
    cfg = small_config(max_source_removal=0.8, min_source_documents=10)
    with pytest.raises(DataError) as caught:
        run(tmp_path, documents, cfg, rows=rows, source_names=["books", "web"])
    message = str(caught.value)
    assert "near-duplicates remove 10 of 10 documents (100.0%) of source 'web'" in message
    assert "above dedup.max_source_removal=0.8" in message
    assert f"{10:032x} for {0:032x} (signatures agree in 100%)" in message
    assert "raise dedup.near.threshold=0.7" in message
    for allowed in (
        {"max_source_removal": 1.0},
        {"max_source_removal": None},
        {"min_source_documents": 11},
    ):
        limits = {"max_source_removal": 0.8, "min_source_documents": 10} | allowed
        result = run(tmp_path, documents, small_config(**limits), rows=rows)
    assert [(source.num_documents, source.num_removed) for source in result.sources] == [(10, 0), (10, 10)]


def test_the_samples_say_what_was_compared(whole: NearResult, corpus: list[bytes]) -> None:
    assert whole.accepted
    assert whole.rejected
    for pair in (*whole.accepted, *whole.rejected):
        assert pair.document < pair.other
        assert len(pair.document_id) == 32
        if pair.similarity is not None:
            assert pair.similarity == pytest.approx(
                jaccard(corpus[pair.document], corpus[pair.other]), abs=1e-6
            )


def test_units_with_gaps_are_refused(tmp_path: Path, corpus: list[bytes]) -> None:
    cfg = small_config()
    units = write_tables(tmp_path, rows_of(len(corpus)), signatures_of(corpus, cfg.near), (9,))
    with pytest.raises(DataError, match="starts at document 9, but the units before it end at 0"):
        near_duplicates(units[1:], cfg, StoredTexts([]), Inline(), tmp_path / "near", split=split_fixed)


def test_a_rank_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a rank that is not a number"):
        run(tmp_path, [text_of(range(9))] * 2, small_config(), rows=rows_of(2, rank=[0, np.nan]))


def test_signatures_of_another_length_or_none_are_refused(tmp_path: Path) -> None:
    cfg = small_config()
    (unit,) = write_tables(tmp_path, rows_of(3), np.zeros((3, 16), dtype=np.uint32))
    with pytest.raises(DataError, match=r"not uint32 signatures of dedup\.near\.num_permutations=32"):
        near_duplicates([unit], cfg, StoredTexts([]), Inline(), tmp_path / "near", split=split_fixed)
    without = type(unit)(unit.number, unit.first, unit.num_documents, unit.documents)
    with pytest.raises(DataError, match=r"unit 0 has no signatures; scan again with dedup\.near\.enabled"):
        near_duplicates([without], cfg, StoredTexts([]), Inline(), tmp_path / "none", split=split_fixed)


def test_the_log_says_where_the_bands_begin_to_find_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger=near_module.__name__):
        run(tmp_path, [text_of(range(9))], DedupConfig())
    assert "14 bands x 8 rows find pairs from a similarity of about 0.72 on" in caplog.text
