"""What the steps of a run tell for the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.config import StopAfter
from llmtrain.data.dedup.config import DedupConfig, LineConfig
from llmtrain.data.dedup.near import NearResult, Pair
from llmtrain.data.facts import SNIPPET_CHARS
from llmtrain.data.filters.config import EditsConfig
from llmtrain.data.pipeline import run
from llmtrain.data.run_facts import NUM_PAIRS_SHOWN, near_facts
from llmtrain.files import read_json


def pair(number: int, agreement: float, similarity: float | None) -> Pair:
    other = number + 1000
    return Pair(number, other, f"{number:032x}", f"{other:032x}", agreement, similarity)


def near_result(accepted: list[Pair], rejected: list[Pair]) -> NearResult:
    counts = {"num_candidates": 20, "num_accepted": 12}
    return NearResult(Path("d.npy"), counts, tuple(accepted), tuple(rejected), (), ())


def test_pairs_nearest_to_the_threshold_come_first_and_have_texts() -> None:
    asked: list[list[int]] = []

    def look_up(documents: Any) -> list[dict[str, Any]]:
        asked.append(documents.tolist())
        return [
            {"id": f"{number:032x}", "source": "s", "path": "p", "record": number, "text": b"x" * 1000}
            for number in documents.tolist()
        ]

    accepted = [pair(n, 0.7 + n / 100, None) for n in range(20, 0, -1)]
    rejected = [pair(30, 0.9, 0.5), pair(31, 0.1, 0.69)]
    facts = near_facts(near_result(accepted, rejected), look_up)
    assert facts["counts"]["num_candidates"] == 20
    assert [entry["document"] for entry in facts["accepted"]] == list(range(1, 21))
    assert [entry["document"] for entry in facts["rejected"]] == [31, 30]
    assert ["documents" in entry for entry in facts["accepted"]] == [n < NUM_PAIRS_SHOWN for n in range(20)]
    first, second = facts["rejected"][0]["documents"]
    assert (first["record"], second["record"]) == (31, 1031)
    assert len(first["text"]) == SNIPPET_CHARS + 1
    [numbers] = asked
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 2 * (NUM_PAIRS_SHOWN + 2)


def test_no_pairs_ask_for_no_documents() -> None:
    def look_up(documents: Any) -> list[dict[str, Any]]:
        raise AssertionError(documents)

    assert near_facts(near_result([], []), look_up)["accepted"] == []


def test_each_sources_bytes_are_those_of_the_funnel(
    write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]
) -> None:
    """Read, as the rules saw them after the line edits, and what is left after lines were cut."""
    shared = "\n".join(texts[0].split("\n")[:4])
    documents = [{"text": f"{text}\n{shared}", "from": "ab"[n % 2]} for n, text in enumerate(texts[:30])]
    cfg = jsonl_config(
        write_jsonl([*documents, {"text": "too short", "from": "a"}]),
        corpus={"source_field": "from"},
        edits=EditsConfig(min_words_per_line=2),
        dedup=DedupConfig(lines=LineConfig(enabled=True, min_chars=5)),
        stop_after=StopAfter.decide,
    )
    report = run(cfg, quiet=True)
    rows = {row["source"]: row for row in read_json(report.out / "facts.json")["sources"]}
    scan, decide = report.funnel[:2]
    assert set(rows) == set(scan["sources"]) == {"a", "b"}
    for name, row in rows.items():
        assert row["read_bytes"] == scan["sources"][name]["in"]["bytes"]
        assert row["bytes"] == decide["sources"][name]["in"]["bytes"]
        assert row["left_bytes"] == decide["sources"][name]["kept"]["bytes"]
        assert row["read_bytes"] > row["bytes"] > row["left_bytes"]
    assert np.sum([row["left_bytes"] for row in rows.values()]) == decide["kept"]["bytes"]
