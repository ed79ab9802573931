"""Why a document stayed or went, looked up in what the run wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.config import StopAfter
from llmtrain.data.content.config import (
    ContentConfig,
    DecontaminationConfig,
    EvaluationConfig,
    PiiConfig,
)
from llmtrain.data.dedup.config import DedupConfig, LineConfig, NearConfig, Survivor
from llmtrain.data.document import normalize
from llmtrain.data.explain import (
    NUM_OTHERS_SHOWN,
    ExplainConfig,
    Explanation,
    Match,
    as_json,
    explain,
    explanation,
    find_document,
    matching_rows,
    read_row,
    related,
    rule_verdicts,
    rules_of,
    verdict_tables,
)
from llmtrain.data.filters.config import EditsConfig, RulesConfig
from llmtrain.data.pipeline import run
from llmtrain.data.shards import ShardReader
from llmtrain.errors import ConfigError, DataError


def table_of(ids: list[str], content: list[str] | None = None) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([bytes.fromhex(digest) for digest in ids], pa.binary(16)),
            "content": pa.array([bytes.fromhex(digest) for digest in content or ids], pa.binary(16)),
            "path": ["f.jsonl"] * len(ids),
            "record": list(range(1, len(ids) + 1)),
        }
    )


def hex_ids(num: int, begin: str = "") -> list[str]:
    draw = np.random.default_rng(len(begin))
    return [begin + draw.bytes(16).hex()[len(begin) :] for _ in range(num)]


@pytest.fixture
def folder(write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]) -> Path:
    """40 texts, then a copy of the first and one that is too short."""
    cfg = jsonl_config(write_jsonl([*texts[:40], texts[0], "too short"]))
    run(cfg, quiet=True)
    return Path(cfg.out)


def id_of_record(folder: Path, record: int) -> str:
    for _, table in verdict_tables(next((folder / "verdicts").iterdir())):
        for row in table.to_pylist():
            if row["record"] == record:
                return str(row["id"].hex())
    raise AssertionError(record)


def test_a_kept_document_shows_its_signals_rules_and_text(folder: Path, texts: list[str]) -> None:
    wanted = id_of_record(folder, 5)
    found = explain(ExplainConfig(folder=str(folder), id=wanted[:12]))
    assert (found.id, found.record, found.reason) == (wanted, 5, None)
    assert found.verdict in ("train", "held_out")
    assert found.path.endswith("texts.jsonl")
    text = normalize(texts[4])
    assert (found.text, found.text_is_whole) == (text[:2000], len(text) <= 2000)
    assert found.text_bytes == len(text.encode())
    assert found.signals["num_chars"] == len(text)
    assert {"id", "content", "source", "slice", "record"}.isdisjoint(found.signals)
    verdicts = {rule.reason: rule for rule in found.rules}
    assert verdicts["too_short"].verdict == "keeps"
    assert verdicts["too_short"].value == found.signals["num_words"]
    assert not any(rule.verdict == "drops" for rule in found.rules)
    assert not found.clusters


def test_a_dropped_document_shows_the_rule_that_dropped_it(folder: Path) -> None:
    found = explain(ExplainConfig(folder=str(folder), id=id_of_record(folder, 42)))
    assert (found.verdict, found.reason) == ("dropped", "too_short")
    [rule] = [rule for rule in found.rules if rule.is_reason]
    assert (rule.reason, rule.setting, rule.bound, rule.value, rule.verdict) == (
        "too_short",
        "rules.min_words",
        50,
        2.0,
        "drops",
    )
    assert "Rae et al. 2021" in rule.source


def test_equal_texts_are_a_cluster_with_the_one_that_stayed(folder: Path) -> None:
    pair = [explain(ExplainConfig(folder=str(folder), id=id_of_record(folder, n))) for n in (1, 41)]
    [dropped] = [found for found in pair if found.verdict == "dropped"]
    [stayed] = [found for found in pair if found.verdict != "dropped"]
    for found in pair:
        [cluster] = found.clusters
        assert (cluster.kind, cluster.size, cluster.survivor.id) == ("exact", 2, stayed.id)
    assert "duplicate" in str(dropped.reason)
    assert [other.id for other in stayed.clusters[0].others] == [dropped.id]


def test_an_explanation_is_json(folder: Path) -> None:
    found = as_json(explain(ExplainConfig(folder=str(folder), id=id_of_record(folder, 1))))
    assert json.loads(json.dumps(found)) == found


def test_the_id_of_a_shards_lineage_leads_here(folder: Path) -> None:
    shard = next((folder / "shards").rglob("train-00000.bin"))
    lineage = ShardReader(shard.with_suffix("")).lineage(3)
    found = explain(ExplainConfig(folder=str(folder), id=lineage.document_id, text_chars=0))
    assert (found.path, found.record, found.text) == (lineage.path, lineage.record, None)


def test_every_prefix_finds_what_a_plain_search_finds() -> None:
    ids = sorted(hex_ids(500) + hex_ids(20, "abc") + hex_ids(20, "ab0"))
    table = pa.concat_tables([table_of(ids[:100]), table_of(ids[:1]).slice(1), table_of(ids)[50:].slice(50)])
    assert table.num_rows == 540
    for prefix in ("a", "ab", "abc", "ab0", ids[300], ids[301][:31], "0", "f", ids[7][:6]):
        expected = [row for row, digest in enumerate(ids) if digest.startswith(prefix)]
        assert matching_rows(prefix, table) == expected, prefix


def test_a_prefix_of_several_lists_them() -> None:
    ids = hex_ids(14, "abcd")
    with pytest.raises(
        DataError, match=r"14 documents have an id that begins with abcd: abcd.*; and 4 more"
    ) as error:
        find_document("abcd", [("train", table_of(ids[:9])), ("dropped", table_of(ids[9:]))])
    assert all(digest in str(error.value) for digest in ids[:10])
    assert "f.jsonl, record 1" in str(error.value)
    found = find_document(ids[11], [("train", table_of(ids[:9])), ("dropped", table_of(ids[9:]))])
    assert (found.verdict, found.row["id"], found.row["record"]) == ("dropped", ids[11], 3)


def test_an_id_that_is_not_there_says_where_ids_stand() -> None:
    with pytest.raises(DataError, match=r"no document with id ffff among 3\. Ids stand in the report"):
        find_document("ffff", [("train", table_of(hex_ids(3, "00")))])


@pytest.mark.parametrize("value", ["", "xyz", "12345678901234567890123456789012f", "12 34"])
def test_an_id_must_be_hex(value: str) -> None:
    with pytest.raises(ConfigError, match="must be 1 to 32 hex digits, as the report shows them"):
        ExplainConfig(folder="x", id=value)


def test_an_id_may_be_in_capitals() -> None:
    assert ExplainConfig(folder="x", id="0xABC").id == "abc"


def test_less_than_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_chars=-1 must be 0 or more"):
        ExplainConfig(folder="x", id="a", text_chars=-1)


def test_rules_that_are_off_or_not_measured_say_so() -> None:
    cfg = RulesConfig(min_words=None, max_words=100, languages=["en"], min_language_score=0.5)
    verdicts = {
        rule.reason: rule.verdict
        for rule in rule_verdicts({"num_words": 500, "language": "de"}, cfg, "wrong_language")
    }
    assert verdicts["too_short"] == "off"
    assert verdicts["too_long"] == "drops"
    assert verdicts["wrong_language"] == "drops"
    assert verdicts["low_language_score"] == "not measured"


def test_a_value_at_its_bound_is_kept() -> None:
    cfg = RulesConfig(min_words=50, max_words=50)
    found = {rule.reason: rule.verdict for rule in rule_verdicts({"num_words": 50}, cfg, None)}
    assert (found["too_short"], found["too_long"]) == ("keeps", "keeps")


def test_rules_of_another_version_are_read_as_far_as_known() -> None:
    assert rules_of({"min_words": 7, "a_rule_of_tomorrow": 3}).min_words == 7


def test_edits_and_masks_are_passed_on() -> None:
    row = {"id": "ab", "source": "s", "path": "p", "record": 1, "text_bytes": 3, "reason": ""}
    found = explanation(
        Match(verdict="train", row=row),
        {},
        RulesConfig(),
        edits={"javascript": {"lines": 1}},
        pii={"email": 2},
    )
    assert (found.reason, found.edits, found.pii) == (None, {"javascript": {"lines": 1}}, {"email": 2})


@pytest.fixture
def edited(write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]) -> Path:
    """Records 1 to 40; 41 is the first without its end; 42 has lines of the second, and an address; 43 and 44
    are 41 again; 45 has nothing but lines of the third. The longest stays."""
    lines = texts[1].split("\n")[:3]
    mixed = "\n".join([*lines, texts[50], "Write to jane.doe@mail.com if you like it."])
    documents = [
        {"text": text, "url": f"http://a.example/{n}", "tag": n} for n, text in enumerate(texts[:40])
    ]
    near = texts[0][:-12]
    documents += [{"text": near}, {"text": mixed}, {"text": near}, {"text": near}]
    documents += [{"text": "\n".join(texts[2].split("\n")[-4:])}]
    cfg = jsonl_config(
        write_jsonl(documents),
        corpus={"url_field": "url", "metadata_fields": ["tag"]},
        rules=RulesConfig(),
        content=ContentConfig(pii=PiiConfig(email="<EMAIL>")),
        edits=EditsConfig(min_words_per_line=2),
        dedup=DedupConfig(
            survivor=Survivor.longest,
            near=NearConfig(enabled=True),
            lines=LineConfig(enabled=True, min_chars=5),
        ),
        stop_after=StopAfter.documents,
    )
    run(cfg, quiet=True)
    return Path(cfg.out)


def explained(folder: Path, record: int, **settings: Any) -> Explanation:
    return explain(ExplainConfig(folder=str(folder), id=id_of_record(folder, record), **settings))


def test_similar_texts_are_a_cluster_from_either_side(edited: Path) -> None:
    found = {record: explained(edited, record) for record in (1, 41, 43, 44)}
    [similar] = [one for one in found.values() if one.reason == "near_duplicate"]
    [stayed] = [one for one in found.values() if one.reason is None]
    for one in (similar, stayed):
        near = next(cluster for cluster in one.clusters if cluster.kind == "near")
        assert (near.size, near.survivor.id) == (2, stayed.id)
    assert [c.others[0].id for c in stayed.clusters if c.kind == "near"] == [similar.id]


def test_a_document_stands_for_copies_though_it_is_dropped_itself(edited: Path) -> None:
    """Of the three copies one stayed, and went afterwards, as it resembles the first."""
    copies = [explained(edited, record) for record in (41, 43, 44)]
    [stayed] = [one for one in copies if one.reason != "duplicate"]
    for one in copies:
        exact = next(cluster for cluster in one.clusters if cluster.kind == "exact")
        assert (exact.size, exact.survivor.id, exact.survivor.reason) == (3, stayed.id, stayed.reason)
        others = {other.id for other in exact.others}
        assert others == {each.id for each in copies} - {one.id, stayed.id}
        assert all(cluster.survivor.id != one.id or one is stayed for cluster in one.clusters)
    assert stayed.reason == "near_duplicate"
    assert [cluster.kind for cluster in stayed.clusters] == ["near", "exact"]


def test_lines_that_deduplication_cut_are_counted(edited: Path, texts: list[str]) -> None:
    pair = [explained(edited, record, text_chars=10_000) for record in (2, 42)]
    cut = [one for one in pair if "repeated_lines" in (one.edits or {})]
    assert cut, "the two share lines"
    for one in cut:
        lost = (one.edits or {})["repeated_lines"]
        assert lost["lines"] > 0
        assert lost["bytes"] == one.signals["num_bytes"] - one.text_bytes  # type: ignore[operator]
        assert one.text is not None
        assert len(one.text.encode()) == one.text_bytes


def test_a_text_that_lost_all_its_lines_is_shown_as_the_rules_saw_it(edited: Path) -> None:
    dropped = explained(edited, 45, text_chars=10_000)
    assert dropped.reason == "mostly_duplicate_lines"
    assert dropped.text is not None
    assert len(dropped.text.encode()) == dropped.signals["num_bytes"]
    assert (dropped.edits or {})["repeated_lines"]["bytes"] == dropped.signals["num_bytes"]


def test_what_was_cut_and_masked_is_told_and_the_text_is_the_one_that_training_reads(edited: Path) -> None:
    found = explain(ExplainConfig(folder=str(edited), id=id_of_record(edited, 42), text_chars=10_000))
    assert found.pii == {"email": 1}
    assert "few_words" in (found.edits or {})
    assert found.text is not None
    assert "<EMAIL>" in found.text
    assert len(found.text.encode()) == found.text_bytes
    [path] = (edited / "documents").rglob("train-*.parquet")
    written = {row["id"]: row["text"] for row in pq.read_table(path).select(["id", "text"]).to_pylist()}
    assert found.verdict == "held_out" or written[found.id] == found.text


def test_the_address_and_metadata_of_a_page_are_shown(edited: Path) -> None:
    assert explained(edited, 7).url == "http://a.example/6"
    assert explained(edited, 7).metadata == {"tag": "6"}
    assert (explained(edited, 42).url, explained(edited, 42).metadata) == (None, None)


@pytest.mark.parametrize("stop_after", StopAfter)
def test_the_evaluation_items_in_a_document_are_named_however_far_the_run_went(
    stop_after: StopAfter,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    jsonl_config: Callable[..., Any],
    texts: list[str],
) -> None:
    item = " ".join(texts[5].split()[10:40])
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": item}) + "\n")
    evaluation = EvaluationConfig(path=str(questions), fields=["question"], name="quiz")
    cfg = jsonl_config(
        write_jsonl(texts[:30]),
        content=ContentConfig(decontamination=DecontaminationConfig(sets=[evaluation])),
        rules=RulesConfig(max_contaminated_ngrams=0),
        stop_after=stop_after,
    )
    run(cfg, quiet=True)
    found = explained(Path(cfg.out), 6)
    assert found.reason == "contaminated"
    [named] = found.evaluation_items
    assert (named["set"], named["id"]) == ("quiz", "0")
    assert 0 < named["ngrams"] <= named["of"]
    other = explained(Path(cfg.out), 7)
    assert (other.reason, other.evaluation_items) == (None, [])


def test_a_large_cluster_names_a_few() -> None:
    ids = hex_ids(500)
    table = table_of(ids[1:]).append_column(
        "survivor", pa.array([bytes.fromhex(ids[0])] * 499, pa.binary(16))
    )
    table = table.append_column("reason", pa.array(["duplicate"] * 499))
    table = table.append_column("cluster_size", pa.array([500] * 499, pa.int32()))
    [cluster] = related(Match(verdict="dropped", row=table.slice(7, 1).to_pylist()[0] | {
        "id": ids[8], "survivor": ids[0]}), [("dropped", table)])  # fmt: skip
    assert (cluster.size, len(cluster.others)) == (500, NUM_OTHERS_SHOWN)
    assert (cluster.survivor.id, cluster.survivor.verdict) == (ids[0], "of an earlier run")


def test_a_folder_whose_last_run_left_no_facts_is_refused(folder: Path) -> None:
    wanted = id_of_record(folder, 1)
    (folder / "facts.json").write_text("{}")
    with pytest.raises(DataError, match=r"facts.json is missing or does not say which folders"):
        explain(ExplainConfig(folder=str(folder), id=wanted))


def test_files_that_are_gone_or_cut_are_told(folder: Path) -> None:
    wanted = id_of_record(folder, 1)
    [docs] = (folder / "docs").rglob("unit-00000.arrow")
    with pytest.raises(DataError, match=r"has no row 1,000; delete it, and run `llmtrain data` again"):
        read_row(docs, 1000)
    docs.unlink()
    with pytest.raises(DataError, match=r"unit-00000.arrow is missing; run `llmtrain data` again"):
        explain(ExplainConfig(folder=str(folder), id=wanted))
    next((folder / "verdicts").rglob("dropped.arrow")).unlink()
    with pytest.raises(DataError, match=r"dropped.arrow is missing; run `llmtrain data` again"):
        explain(ExplainConfig(folder=str(folder), id=wanted))
