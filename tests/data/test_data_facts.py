"""What a run writes for people: exact sums, the same whatever the cut into units."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.facts import (
    KEPT,
    NUM_DROPPED_SAMPLES,
    NUM_KEPT_SAMPLES,
    NUM_SOURCES_SHOWN,
    SNIPPET_CHARS,
    FactsBuilder,
    Measure,
    Scale,
    Threshold,
    put_totals,
    snippet,
    write_facts,
)

REASONS = ["too_short", "exact_duplicate", "near_duplicate"]
DUPLICATE_REASONS = ["exact_duplicate", "near_duplicate"]
MEASURES = [
    Measure(
        name="num_words",
        title="Words",
        unit="words",
        thresholds=(
            Threshold(
                reason="too_short", setting="rules.min_words", value=50, drops="below", source="Gopher A.1.1"
            ),
        ),
    ),
    Measure(name="duplicate_lines", title="Lines that were there before", scale=Scale.fraction),
]
DUPLICATE = np.dtype([("document", "<i8"), ("survivor", "<i8"), ("cluster_size", "<i4")])


def corpus(num_documents: int, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        "ids": draw.integers(0, 256, (num_documents, 16), dtype=np.uint8),
        "num_bytes": draw.integers(1, 10_000, num_documents),
        "reason": draw.integers(-1, len(REASONS), num_documents).astype(np.int8),
        "source": draw.choice(["web", "books", "code"], num_documents).tolist(),
        "values": {
            "num_words": draw.integers(0, 5000, num_documents).astype(np.float64),
            "duplicate_lines": draw.choice([0.0, 0.01, 0.3, 1.0, np.nan], num_documents),
        },
        "language": draw.choice(["en", "de"], num_documents).tolist(),
        "read_bytes": draw.integers(10_000, 20_000, num_documents),
        "left_bytes": draw.integers(0, 10_000, num_documents),
    }


def part_of(columns: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    part = {name: column[first:last] for name, column in columns.items() if name != "values"}
    return {**part, "values": {name: column[first:last] for name, column in columns["values"].items()}}


def duplicates_of(num_clusters: int) -> Any:
    """Cluster c has 2 + c % 40 documents: numbers that no other cluster has."""
    rows = [
        (100_000 * c + member, 100_000 * c, 2 + c % 40)
        for c in range(num_clusters)
        for member in range(1, 2 + c % 40)
    ]
    return np.array(rows, dtype=DUPLICATE)


def built(columns: dict[str, Any], cuts: list[int]) -> FactsBuilder:
    builder = FactsBuilder(REASONS, MEASURES, DUPLICATE_REASONS)
    for first, last in zip([0, *cuts], [*cuts, len(columns["ids"])], strict=True):
        builder.add_unit(first=first, **part_of(columns, first, last))
    return builder


def look_up(documents: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{number:032x}",
            "source": "web",
            "path": "f",
            "record": number + 1,
            "text": b"text " * (number % 200),
        }
        for number in documents.tolist()
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 5), st.booleans())
def test_any_cut_into_units_and_any_merge_give_the_same_facts(
    cuts: list[int], seed: int, backwards: bool
) -> None:
    columns = corpus(300, seed)
    whole = built(columns, [])
    whole.add_duplicates("near", duplicates_of(120))
    parts = []
    bounds = sorted(cuts)
    for first, last in zip([0, *bounds], [*bounds, 300], strict=True):
        parts.append(FactsBuilder(REASONS, MEASURES, DUPLICATE_REASONS))
        parts[-1].add_unit(first=first, **part_of(columns, first, last))
    duplicates = duplicates_of(120)
    for number, rows in enumerate(np.array_split(np.random.default_rng(seed).permutation(duplicates), 7)):
        parts[number % len(parts)].add_duplicates("near", rows)
    if backwards:
        parts.reverse()
    merged = pickle.loads(pickle.dumps(parts[0]))
    for part in parts[1:]:
        merged.merge(part)
    assert merged.result(look_up) == whole.result(look_up)


def test_rows_add_up_to_the_columns() -> None:
    columns = corpus(500)
    facts = built(columns, [100, 250]).result()
    for part, name in (("sources", "source"), ("languages", "language")):
        for row in facts[part]:
            mask = np.array(columns[name]) == row[name]
            assert row["documents"] == mask.sum()
            assert row["bytes"] == columns["num_bytes"][mask].sum()
            for size in ("read_bytes", "left_bytes") if part == "sources" else ():
                assert row[size] == columns[size][mask].sum()
            kept = mask & (columns["reason"] == KEPT)
            assert row["kept"] == {"documents": kept.sum(), "bytes": columns["num_bytes"][kept].sum()}
            for number, reason in enumerate(REASONS):
                dropped = mask & (columns["reason"] == number)
                assert row["dropped"][reason]["bytes"] == columns["num_bytes"][dropped].sum()
        assert sum(row["documents"] for row in facts[part]) == 500
    assert all(
        row["duplicates"]
        == row["dropped"]["exact_duplicate"]["documents"] + row["dropped"]["near_duplicate"]["documents"]
        for row in facts["sources"]
    )


def test_a_histogram_counts_every_document_once_and_on_its_side() -> None:
    columns = corpus(500)
    words, lines = built(columns, []).result()["histograms"]
    kept = columns["reason"] == KEPT
    for shown, name in ((words, "num_words"), (lines, "duplicate_lines")):
        assert len(shown["edges"]) == len(shown["kept"]) + 1 == len(shown["dropped"]) + 1
        for side, mask in (("kept", kept), ("dropped", ~kept)):
            outside = sum(
                shown.get(place, {side: 0})[side] for place in ("below_zero", "zero", "above", "undefined")
            )
            assert sum(shown[side]) + outside == mask.sum(), name
    assert lines["undefined"]["kept"] == (np.isnan(columns["values"]["duplicate_lines"]) & kept).sum()
    assert words["thresholds"][0]["setting"] == "rules.min_words"


@pytest.mark.parametrize(
    ("scale", "value", "place"),
    [
        (Scale.fraction, 0.0, "zero"),
        (Scale.fraction, 0.3, (0.29, 0.3)),
        (Scale.fraction, 0.07, (0.06, 0.07)),
        (Scale.fraction, 1e-9, (0.0, 0.01)),
        (Scale.fraction, 1.0, (0.99, 1.0)),
        (Scale.fraction, 1.5, "above"),
        (Scale.fraction, -0.1, "below_zero"),
        (Scale.fraction, float("nan"), "undefined"),
        (Scale.fraction, float("inf"), "above"),
        (Scale.amount, 0.0, "zero"),
        (Scale.amount, 100.0, (89.1251, 100.0)),
        (Scale.amount, 1e-7, (0.001, 0.00112202)),
        (Scale.amount, 1e13, "above"),
        (Scale.count, 0.0, "zero"),
        (Scale.count, 1.0, (0.5, 1.5)),
        (Scale.count, 20.0, (19.5, 20.5)),
        (Scale.count, 100.0, (89.5, 100.5)),
        (Scale.count, 101.0, (100.5, 112.5)),
    ],
)
def test_an_interval_holds_its_upper_edge(scale: Scale, value: float, place: Any) -> None:
    builder = FactsBuilder([], [Measure(name="m", title="M", scale=scale)])
    builder.add_unit(
        first=0,
        ids=np.zeros((1, 16), dtype=np.uint8),
        num_bytes=np.array([1]),
        reason=np.array([KEPT]),
        source=["s"],
        values={"m": np.array([value])},
    )
    [shown] = builder.result()["histograms"]
    if isinstance(place, str):
        assert shown[place] == {"kept": 1, "dropped": 0}
        assert shown["edges"] == shown["kept"] == []
    else:
        assert tuple(shown["edges"]) == pytest.approx(place)
        assert shown["kept"] == [1]


@pytest.mark.parametrize(
    ("scale", "drops", "bound", "values"),
    [
        (Scale.fraction, "below", 0.8, [0.0, 0.79, 0.7999, 0.8, 0.81]),
        (Scale.fraction, "above", 0.305, [0.3, 0.305, 0.3051, 0.31, 1.0]),
        (Scale.fraction, "above", 0.0, [0.0, 0.0001, 0.5]),
        (Scale.count, "below", 50, [1, 2, 48, 49, 50, 51, 999]),
        (Scale.count, "below", 2, [0, 1, 2, 3]),
        (Scale.count, "above", 100_000, [5, 99_999, 100_000, 100_001]),
        (Scale.count, "above", 0, [0, 1]),
        (Scale.amount, "below", 3.0, [1.5, 2.9, 3.0, 3.01]),
        (Scale.amount, "above", 10.0, [9.99, 10.0, 10.01]),
    ],
)
def test_no_bin_holds_both_sides_of_a_threshold(
    scale: Scale, drops: str, bound: float, values: list[float]
) -> None:
    threshold = Threshold(reason="r", setting="rules.r", value=bound, drops=drops)
    measure = Measure(name="m", title="M", scale=scale, thresholds=(threshold,))
    column = np.array(values, dtype=np.float64)
    is_dropped = column < bound if drops == "below" else column > bound
    builder = FactsBuilder(["r"], [measure])
    builder.add_unit(
        first=0,
        ids=np.zeros((len(column), 16), dtype=np.uint8),
        num_bytes=np.ones(len(column), dtype=np.int64),
        reason=np.where(is_dropped, 0, KEPT),
        source=["s"] * len(column),
        values={"m": column},
    )
    counts = builder.histograms["m"].counts
    assert not (counts[0] & counts[1]).any()
    edges = builder.histograms["m"].edges
    assert (np.diff(edges) > 0).all()


def test_clusters_are_counted_by_size() -> None:
    builder = FactsBuilder(REASONS)
    builder.add_duplicates("near", duplicates_of(80))
    facts = builder.result()["duplicates"]["near"]
    assert facts["largest"] == 41
    assert [(row["from"], row["to"]) for row in facts["sizes"]] == [
        (2, 2),
        (3, 4),
        (5, 9),
        (10, 29),
        (30, 41),
    ]
    assert [row["clusters"] for row in facts["sizes"]] == [2, 4, 10, 40, 24]
    assert sum(row["removed"] for row in facts["sizes"]) == len(duplicates_of(80))
    assert "examples" not in facts


def test_examples_show_the_survivor_and_what_fell_to_it() -> None:
    builder = FactsBuilder(REASONS)
    builder.add_duplicates("near", duplicates_of(80))
    examples = builder.result(look_up)["duplicates"]["near"]["examples"]
    assert [example["size"] for example in examples] == sorted(example["size"] for example in examples)
    for example in examples:
        survivor = example["survivor"]["record"] - 1
        assert survivor % 100_000 == 0
        removed = [member["record"] - 1 - survivor for member in example["removed"]]
        assert removed == list(range(1, min(example["size"], 4)))


def test_samples_are_a_few_of_each_reason_and_short() -> None:
    columns = corpus(500)
    facts = built(columns, [])
    samples = facts.result(look_up)["samples"]
    assert len(samples["kept"]) == NUM_KEPT_SAMPLES
    assert {reason: len(drawn) for reason, drawn in samples["dropped"].items()} == dict.fromkeys(
        REASONS, NUM_DROPPED_SAMPLES
    )
    for reason, drawn in samples["dropped"].items():
        for sample in drawn:
            assert columns["reason"][sample["record"] - 1] == REASONS.index(reason)
            assert len(sample["text"]) <= SNIPPET_CHARS + 1


def test_a_snippet_cuts_between_characters_and_says_that_it_cut() -> None:
    assert snippet("short") == "short"
    assert snippet("日本語" * 200, 5) == "日本語日本…"
    assert snippet(("日" * 999).encode(), 3) == "日日日…"
    assert snippet(None) is None


def test_many_sources_end_in_one_row_without_a_name() -> None:
    num_sources = NUM_SOURCES_SHOWN + 50
    builder = FactsBuilder(REASONS)
    builder.add_unit(
        first=0,
        ids=np.zeros((num_sources, 16), dtype=np.uint8),
        num_bytes=np.arange(num_sources),
        reason=np.full(num_sources, KEPT),
        source=[f"s{number}" for number in range(num_sources)],
        read_bytes=np.full(num_sources, 7),
    )
    rows = builder.result()["sources"]
    put_totals(rows, "tokens", {f"s{number}": 1 for number in range(num_sources)})
    assert len(rows) == NUM_SOURCES_SHOWN + 1
    assert (rows[-1]["source"], rows[-1]["num_names"], rows[-1]["documents"]) == (None, 50, 50)
    assert sum(row["bytes"] for row in rows) == np.arange(num_sources).sum()
    assert sum(row["tokens"] for row in rows) == num_sources
    assert rows[-1]["read_bytes"] == 50 * 7
    assert "left_bytes" not in rows[0]


def test_counts_of_a_part_add_up_at_every_depth() -> None:
    builder = FactsBuilder([])
    builder.add_counts("pii", {"email": 2, "ip": 0})
    builder.add_counts("pii", {"email": np.int64(3)})
    builder.add_counts("edits", {"javascript": {"lines": 1, "bytes": 10}})
    builder.add_counts("edits", {"javascript": {"lines": 2, "bytes": 5}, "policy": {"lines": 1, "bytes": 7}})
    facts = builder.result()
    assert facts["pii"] == {"email": 5, "ip": 0}
    assert facts["edits"] == {"javascript": {"lines": 3, "bytes": 15}, "policy": {"lines": 1, "bytes": 7}}


def test_parts_that_were_not_collected_are_absent() -> None:
    assert FactsBuilder([]).result(funnel=None, corpus="c") == {"facts_version": 1, "corpus": "c"}


def test_facts_are_a_json_file(tmp_path: Path) -> None:
    builder = built(corpus(100), [])
    builder.add_duplicates("exact", duplicates_of(5))
    facts = builder.result(look_up)
    path = write_facts(tmp_path, facts)
    assert path == tmp_path / "facts.json"
    assert json.loads(path.read_text()) == facts
