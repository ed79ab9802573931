"""`llmtrain data explain` and `llmtrain data trace` as a user types them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest

from llmtrain.cli import data_explain, data_trace
from llmtrain.cli.data_trace import TraceRoot, trace
from llmtrain.cli.report import ReportRoot, report
from llmtrain.data.config import StopAfter
from llmtrain.data.content.config import ContentConfig, PiiConfig
from llmtrain.data.dedup.config import DedupConfig, LineConfig, NearConfig, NgramConfig, Survivor
from llmtrain.data.explain import Cluster, ExplainConfig, Explanation, Relative, explain, verdict_tables
from llmtrain.data.filters.config import EditsConfig, RulesConfig
from llmtrain.data.pipeline import run


@pytest.fixture
def folder(write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]) -> Path:
    cfg = jsonl_config(write_jsonl([*texts[:40], texts[0], "too short"]))
    run(cfg, quiet=True)
    return Path(cfg.out)


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    return forked.verb("data", *words)


def test_a_trace_leads_to_an_explanation(folder: Path) -> None:
    done = typed("trace", f"folder={folder}", "token=10", "length=3", "format=json")
    assert done.returncode == 0, done.stderr
    [traced] = json.loads(done.stdout)
    done = typed("explain", f"folder={folder}", f"id='{traced['document_id'][:10]}'", "format=json")
    assert done.returncode == 0, done.stderr
    explained = json.loads(done.stdout)
    assert (explained["id"], explained["record"]) == (traced["document_id"], traced["record"])
    assert traced["text"] in explained["text"]


def test_a_mistake_is_one_line_and_exit_status_2(folder: Path) -> None:
    for words, message in (
        (("trace", f"folder={folder}"), "error: nothing to trace: give token=POSITION"),
        (("explain", f"folder={folder}", "id=nothing"), "error: id='nothing' must be 1 to 32 hex digits"),
        (
            ("explain", f"folder={folder}"),
            "error: no value for id; give it on the command line, as in id=VALUE",
        ),
    ):
        done = typed(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_traced_token_is_shown_in_its_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [traced] = trace(TraceRoot(folder=str(folder), token=40, length=4))
    data_trace.show(TraceRoot(folder=str(folder), token=40, length=4))
    shown = capsys.readouterr().out
    assert f"texts.jsonl, record {traced.record}" in shown
    assert f"bytes      {traced.byte_start} to {traced.byte_end} of {traced.text_bytes:,}" in shown
    assert f"{traced.before}{traced.text}{traced.after}" in shown


def test_a_row_shows_two_lines_for_each_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    length = 600
    runs = trace(TraceRoot(folder=str(folder), token=0, length=length))
    data_trace.show(TraceRoot(folder=str(folder), token=0, length=length))
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2 * len(runs) > 2
    assert all(traced.document_id in shown for traced in runs)


def test_a_token_of_a_tokenizer_that_loses_text_says_so(folder: Path) -> None:
    [traced] = trace(TraceRoot(folder=str(folder), token=0))
    lines = [line.plain for line in data_trace.details(replace(traced, is_exact=False, text=""))]
    assert any("does not give back the text" in line for line in lines)
    assert "<end of document>" in lines[-1]


def test_an_explanation_says_why_at_its_head(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = verdict_tables(next((folder / "verdicts").iterdir()))
    rows = [row for _, table in tables for row in table.to_pylist() if row["record"] in (3, 42)]
    for row in rows:
        data_explain.show(ExplainConfig(folder=str(folder), id=row["id"].hex()))
        shown = capsys.readouterr().out
        assert row["id"].hex() in shown
        assert "more are off" in shown
        expected = (
            "dropped as too short: num_words = 2, rules.min_words asks at least 50"
            if row["record"] == 42
            else "kept, "
        )
        assert expected in shown


def test_clusters_edits_and_masks_are_told() -> None:
    others = [Relative(id=f"{n:032x}", verdict="dropped", path="f", record=n) for n in range(2, 5)]
    found = Explanation(
        id=f"{1:032x}", content=None, source="s", path="p", record=1, text_bytes=5, verdict="train",
        reason=None, signals={"a": 1, "b": 0.123456, "c": None}, rules=[],
        clusters=[
            Cluster(kind="near", size=9, survivor=others[0], others=others[1:]),
            Cluster(kind="exact", size=2, others=[], survivor=Relative(
                id="ef", verdict="dropped", path="g", record=7, reason="near_duplicate")),
            Cluster(kind="exact", size=2, others=[], survivor=Relative(
                id="cd", verdict="of an earlier run", path="", record=None)),
        ],
        evaluation_items=[{"set": "quiz", "id": "12", "ngrams": 3, "of": 8}],
        edits={"javascript": {"lines": 2, "bytes": 1000}}, pii={"api_key": 3}, text="long",
    )  # fmt: skip
    lines = "\n".join(line.plain for line in data_explain.rest(found))
    assert "near duplicates: 9 documents in the cluster; of them stays 0000" in lines
    assert "and 5 more" in lines
    assert "cut out   javascript 2 lines, 1,000 bytes" in lines
    assert "masked    api key 3" in lines
    assert "of them stays ef (g, record 7), which was dropped later as near duplicate" in lines
    assert "of them stays cd (of an earlier run)" in lines
    assert "evaluation 3 n-grams of 8 of item 12 of quiz" in lines
    assert lines.endswith("long…")
    assert [data_explain.shown(value) for value in (1234, 0.5, 1e6, None, "en", True)] == [
        "1,234", "0.5", "1,000,000", "–", "en", "True",
    ]  # fmt: skip


def test_language_and_metadata_stand_at_the_head_and_masks_are_told_once() -> None:
    found = Explanation(
        id=f"{1:032x}", content=None, source="s", path="p", record=1, text_bytes=5, verdict="train",
        reason=None, signals={"language": "en", "language_score": 0.987654, "num_pii_email": 2, "a": 1},
        rules=[], pii={"email": 2}, metadata={"crawl": "x", "tag": "y"},
    )  # fmt: skip
    lines = [line.plain for line in data_explain.head(found)]
    assert "metadata  crawl x, tag y" in lines
    assert "language  en, score 0.9877" in lines
    names = [cell for column in data_explain.signals_table(found).columns for cell in column.cells]
    assert not any("num_pii" in str(name) for name in names)


def test_a_trace_and_an_explanation_show_the_text_that_deduplication_left(
    write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]
) -> None:
    lines = texts[1].split("\n")
    documents = [*texts[:40], texts[0] + " and the end", "\n".join([*lines[:3], texts[50]])]
    cfg = jsonl_config(
        write_jsonl(documents),
        dedup=DedupConfig(
            survivor=Survivor.longest,
            near=NearConfig(enabled=True),
            lines=LineConfig(enabled=True, min_chars=5),
            ngrams=NgramConfig(enabled=True),
        ),
    )
    run(cfg, quiet=True)
    found = trace(TraceRoot(folder=cfg.out, token=0, length=1 << 20))
    explained = [
        explain(ExplainConfig(folder=cfg.out, id=one.document_id, text_chars=10**6)) for one in found
    ]
    assert [one.text for one in found] == [one.text for one in explained]
    assert [one.text_bytes for one in found] == [one.text_bytes for one in explained]
    assert any("repeated_lines" in (one.edits or {}) for one in explained)


@pytest.mark.parametrize("stop_after", StopAfter)
def test_every_run_has_a_page_that_shows_what_it_did(
    stop_after: StopAfter,
    write_jsonl: Callable[..., Path],
    jsonl_config: Callable[..., Any],
    texts: list[str],
) -> None:
    lines = texts[1].split("\n")
    documents: list[Any] = [
        *texts[:40],
        texts[0] + " and the end",
        "\n".join([*lines[:3], texts[50]]),
        "a few words",
    ]
    documents += [f"{texts[51]} Write to jane.doe@mail.com now.", {"no": "text"}]
    cfg = jsonl_config(
        write_jsonl(documents),
        edits=EditsConfig(min_words_per_line=2),
        content=ContentConfig(pii=PiiConfig(email="<EMAIL>")),
        dedup=DedupConfig(near=NearConfig(enabled=True), lines=LineConfig(enabled=True, min_chars=5)),
        stop_after=stop_after,
        max_quarantine_share=0.5,
    )
    run(cfg, quiet=True)
    report(ReportRoot(folder=cfg.out))
    page = (Path(cfg.out) / "report.html").read_text(encoding="utf-8")
    explained = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    for key in json.loads((Path(cfg.out) / "facts.json").read_text()):
        assert f"`{key}`" in explained, f"docs/report.md does not explain {key} of facts.json"
    for shown in ("few words", "near duplicate", "too short", "missing field", "duplicate lines", "email"):
        assert shown in page, shown
    for shown in ("documents compared by signatures", "near: 1 pair accepted", "signatures agree in"):
        assert shown in page, shown
    assert ("tokens to train on" in page) == (stop_after is StopAfter.pack)
    assert ("Parquet files" in page) == (stop_after is StopAfter.documents)


def test_a_run_without_rules_says_that_all_are_off(
    write_jsonl: Callable[..., Path],
    jsonl_config: Callable[..., Any],
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = jsonl_config(write_jsonl(texts[:5]), rules=RulesConfig(), stop_after=StopAfter.decide)
    run(cfg, quiet=True)
    facts = json.loads((Path(cfg.out) / "facts.json").read_text())
    data_explain.show(ExplainConfig(folder=cfg.out, id=facts["samples"]["kept"][0]["id"]))
    shown = capsys.readouterr().out
    assert "rules are off." in shown
    assert "Rules, in their order" not in shown
