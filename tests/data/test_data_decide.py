from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmtrain.data.config import HeldOutConfig
from llmtrain.data.decide import (
    KEPT,
    OUTCOME,
    REASONS,
    JudgeTask,
    draw_held_out,
    judge_unit,
    load_state,
    outcome_file,
    save_state,
    split_order,
)
from llmtrain.data.dedup.config import Survivor
from llmtrain.data.dedup.units import DOCUMENT
from llmtrain.data.filters.chain import RULES
from llmtrain.data.filters.config import RulesConfig
from llmtrain.errors import DataError


def write_state(path: Path, contents: list[int], num_bytes: int = 1000) -> Path:
    """A unit of living documents whose texts have these hashes."""
    documents = np.zeros(len(contents), dtype=DOCUMENT)
    outcomes = np.zeros(len(contents), dtype=OUTCOME)
    documents["alive"], outcomes["reason"], outcomes["survivor"] = True, KEPT, -1
    documents["content_low"], outcomes["num_bytes"] = contents, num_bytes
    save_state(path, documents, outcomes)
    return path


def held_out_of(folder: Path, contents: list[int], cfg: HeldOutConfig, *, num_units: int = 1) -> list[bool]:
    """Which documents are held out, however they are cut into units."""
    cuts = np.array_split(np.array(contents, dtype=np.uint64), num_units)
    folder.mkdir(exist_ok=True)
    paths = [write_state(folder / f"{at}.npy", part.tolist()) for at, part in enumerate(cuts)]
    cut = draw_held_out(paths, cfg)
    assert cut is not None
    return (split_order(np.array(contents, dtype=np.uint64), cfg.seed, "held_out") <= np.uint64(cut)).tolist()


def hashes(count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 2**64, size=count, dtype=np.uint64).tolist()


def test_the_held_out_split_follows_the_text_not_the_order(tmp_path: Path) -> None:
    contents, cfg = hashes(2000), HeldOutConfig(fraction=0.1)
    drawn = held_out_of(tmp_path / "a", contents, cfg)
    assert 140 < sum(drawn) < 260  # 200 expected, 4.5 standard deviations
    assert held_out_of(tmp_path / "b", contents[::-1], cfg)[::-1] == drawn
    assert held_out_of(tmp_path / "c", contents, cfg, num_units=7) == drawn
    assert held_out_of(tmp_path / "d", contents, HeldOutConfig(fraction=0.1, seed=1)) != drawn


def test_equal_texts_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    texts = hashes(6)
    contents = [texts[number // 5] for number in range(30)]
    for max_bytes in range(500, 30_000, 500):
        cfg = HeldOutConfig(fraction=0.9, max_bytes=max_bytes)
        by_text = np.array(held_out_of(tmp_path, contents, cfg, num_units=4)).reshape(6, 5)
        assert (by_text == by_text[:, :1]).all()
        assert 0 < by_text.sum() <= max(max_bytes // 1000, 5)


def test_one_text_alone_cannot_be_split(tmp_path: Path) -> None:
    assert draw_held_out([write_state(tmp_path / "0.npy", [7, 7, 7])], HeldOutConfig()) is None
    assert draw_held_out([write_state(tmp_path / "0.npy", [])], HeldOutConfig()) is None


def test_the_held_out_split_has_a_bound_and_never_less_than_one_document(tmp_path: Path) -> None:
    contents = hashes(2000)
    for count, cfg, expected in [
        (2000, HeldOutConfig(fraction=0.5, max_bytes=3500), 3),
        (2000, HeldOutConfig(fraction=0.5, max_bytes=1), 1),
        (2, HeldOutConfig(fraction=1e-9), 1),
        (2, HeldOutConfig(fraction=0.999), 1),
    ]:
        assert sum(held_out_of(tmp_path, contents[:count], cfg, num_units=3)) == expected


def test_a_dropped_document_is_never_held_out(tmp_path: Path) -> None:
    path = write_state(tmp_path / "0.npy", [1, 2, 3])
    documents, outcomes = load_state(path)
    documents["alive"][:2] = False
    save_state(path, documents, outcomes)
    assert draw_held_out([path], HeldOutConfig(fraction=0.999)) is None


def write_signals(path: Path, **columns: list[float]) -> Path:
    """Signals of three documents of two sources."""
    needed = {name for rule in RULES for name in rule.signals if name != "language"}
    values = {name: [0, 0, 0] for name in needed} | {
        "edited_num_segments": [9, 9, 9],
        "raw_bytes": [12, 12, 12],
        "clean_bytes": [11, 11, 11],
        "num_bytes": [10, 10, 10],
        **columns,
    }
    ids = [bytes([number] * 16) for number in range(3)]
    table = pa.table(
        {
            "id": pa.array(ids, pa.binary(16)),
            "content": pa.array(ids, pa.binary(16)),
            "source": ["b", "a", "b"],
        }
        | {name: pa.array(column) for name, column in values.items()}
    )
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    return path


def judge(tmp_path: Path, rules: RulesConfig, **columns: list[float]) -> tuple[list[str], dict[str, object]]:
    task = JudgeTask(
        signals=write_signals(tmp_path / "signals.arrow", **columns),
        num_rows=None,
        rules=rules,
        survivor=Survivor.smallest_id,
        sources={"a": 0, "b": 1},
        target=tmp_path / "judged" / "unit.npy",
    )
    summary = judge_unit(task)
    reasons = np.load(outcome_file(task.target))["reason"].tolist()
    return ["" if number == KEPT else REASONS[number] for number in reasons], summary["flow"]


def test_a_document_is_dropped_for_one_reason_the_first(tmp_path: Path) -> None:
    rules = RulesConfig(min_words=50, min_distinct_stop_words=2)
    reasons, _ = judge(tmp_path, rules, num_words=[50, 49, 50], num_distinct_stop_words=[2, 0, 1])
    assert reasons == ["", "too_short", "few_distinct_stop_words"]


def test_a_document_without_words_is_empty_even_without_rules(tmp_path: Path) -> None:
    assert judge(tmp_path, RulesConfig(), edited_num_segments=[1, 0, 1])[0] == ["", "empty", ""]


def test_what_the_scan_removed_is_counted_by_reason_and_source(tmp_path: Path) -> None:
    _, flow = judge(tmp_path, RulesConfig(), removed_few_words_bytes=[1, 0, 0], num_bytes=[9, 11, 13])
    zero = {"bytes": 0, "documents": 0}
    assert flow["a"] == {
        "in": {"bytes": 12, "documents": 1},
        "kept": {"bytes": 11, "documents": 1},
        "dropped": {
            "normalised_away": {"bytes": 1, "documents": 0},
            "few_words": zero,
            "private_data_masked": zero,
        },
    }
    assert flow["b"]["dropped"]["few_words"] == {"bytes": 1, "documents": 0}
    assert flow["b"]["dropped"]["private_data_masked"] == {
        "bytes": -1,
        "documents": 0,
    }  # a placeholder is longer


def test_a_survivor_by_quality_needs_a_quality(tmp_path: Path) -> None:
    task = JudgeTask(
        signals=write_signals(tmp_path / "signals.arrow"), num_rows=None, rules=RulesConfig(),
        survivor=Survivor.quality, sources={"a": 0, "b": 1}, target=tmp_path / "unit.npy",
    )  # fmt: skip
    table = pa.ipc.open_file(task.signals.read_bytes()).read_all().drop_columns(["quality"])
    with pa.OSFile(str(task.signals), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"dedup.survivor=quality needs .* content.quality.model"):
        judge_unit(task)
