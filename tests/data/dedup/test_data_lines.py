"""Line deduplication over files against a dictionary in memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.config import LineConfig, LineUnit
from llmtrain.data.dedup.line_text import LINE_DTYPE, line_hashes, remove_spans, spans_of_rows
from llmtrain.data.dedup.lines import line_duplicates, read_removals
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, best_first
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.engines.engine import Inline, make_engine
from llmtrain.errors import ConfigError, DataError


def made_up_lines(num_documents: int, seed: int, num_different: int, most: int = 6) -> Any:
    """Lines of documents, in order, with `row` counted over all documents."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, most, num_documents)
    lines = np.zeros(int(counts.sum()), dtype=LINE_DTYPE)
    lines["hash"] = draw.integers(0, num_different, len(lines)).astype(np.uint64) * np.uint64(2**64 // 97)
    lines["row"] = np.repeat(np.arange(num_documents), counts)
    lines["start"] = np.arange(len(lines)) * 10
    lines["end"] = lines["start"] + 5
    return lines


def expected_removals(rows: Any, lines: Any) -> list[tuple[int, int, int]]:
    place = np.empty(len(rows), dtype=np.int64)
    place[best_first(rows)] = np.arange(len(rows))
    alive = [line for line in lines.tolist() if rows["alive"][line[1]]]
    keepers: dict[int, tuple[int, int]] = {}
    for hashed, row, start, _ in alive:
        keepers[hashed] = min(keepers.get(hashed, (2**62, 0)), (int(place[row]), start))
    return [
        (row, start, end)
        for hashed, row, start, end in alive
        if keepers[hashed] != (place[row], start) and not rows["is_previous"][row]
    ]


def write_lines(folder: Path, lines: Any, bounds: list[int]) -> list[Path]:
    paths = []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = lines[(lines["row"] >= first) & (lines["row"] < last)].copy()
        part["row"] -= first
        paths.append(folder / f"lines-{number}.npy")
        np.save(paths[-1], part)
    return paths


def removed_by(units: list[DedupUnit], cfg: Any, folder: Path, first: int = 0) -> list[tuple[int, int, int]]:
    """What is removed, with rows counted over all documents."""
    result = line_duplicates(units, cfg, Inline(), folder)
    found: list[tuple[int, int, int]] = []
    for unit, removal in zip(units, result.removals, strict=True):
        spans = read_removals(removal)
        spans["row"] += unit.first - first
        found += spans.tolist()
    assert result.num_removed == len(found)
    assert result.removed_bytes == sum(end - start for _, start, end in found)
    return found


@given(
    st.integers(0, 30),
    st.integers(1, 40),
    st.lists(st.integers(0, 30), max_size=3),
    st.sampled_from([512, 1024, 8192, 1 << 31]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_first_copy_in_the_best_document_stays_whatever_the_units_and_partitions(
    new_folder: Any, made_up_documents: Any, cut_units: Any, small_tasks: Any,
    count: int, num_different: int, cuts: list[int], partition_bytes: int,
) -> None:  # fmt: skip
    rows = made_up_documents(count, count)
    lines = made_up_lines(count, count, num_different)
    cuts = sorted(cut for cut in cuts if cut <= count)
    with new_folder() as name:
        paths = write_lines(Path(name), lines, [0, *cuts, count])
        units = cut_units(Path(name), rows, cuts, first=2**33, lines=paths)
        found = removed_by(units, small_tasks(partition_bytes), Path(name) / "lines", first=2**33)
    assert found == expected_removals(rows, lines)


def test_workers_change_nothing(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    rows, lines = made_up_documents(200, 5), made_up_lines(200, 5, 90)
    paths = write_lines(tmp_path, lines, [0, 40, 100, 170, 200])
    units = cut_units(tmp_path, rows, [40, 100, 170], lines=paths)
    engine = make_engine(EngineConfig(kind=EngineKind.local, workers=2))
    inline = line_duplicates(units, small_tasks(8192), Inline(), tmp_path / "inline")
    spread = line_duplicates(units, small_tasks(8192), engine, tmp_path / "spread")
    assert [path.read_bytes() for path in inline.removals] == [path.read_bytes() for path in spread.removals]
    assert (inline.num_lines, inline.num_removed) == (spread.num_lines, spread.num_removed)
    assert not list(tmp_path.rglob("work-*"))
    again = line_duplicates(units, small_tasks(8192), Inline(), tmp_path / "spread")
    assert again == spread


def test_copies_go_from_texts_and_short_lines_stay(
    tmp_path: Path, cut_units: Any, small_tasks: Any, batch_of: Any
) -> None:
    texts = [
        "Accept all cookies to go on\n\nA first text.\n}\n",
        "Something of its own.\n  ACCEPT all cookies to go on \n}\nA last line.",
        "A text of an earlier run, with its line",
        "A text of an earlier run, with its line\n}\nand more of it",
        "Accept all cookies to go on\nSomething of its own.",
    ]
    rows = np.zeros(len(texts), dtype=DOCUMENT)
    rows["alive"] = True
    rows["id_low"] = [1, 0, 9, 3, 4]
    rows["is_previous"] = [0, 0, 1, 0, 0]
    text, offsets = batch_of(texts)
    cfg = LineConfig(min_chars=5)
    np.save(tmp_path / "lines.npy", line_hashes(text, offsets, cfg))
    (unit,) = cut_units(tmp_path, rows, [], lines=[tmp_path / "lines.npy"])
    result = line_duplicates([unit], small_tasks(1 << 20), Inline(), tmp_path / "out")
    spans = read_removals(result.removals[0])
    cut, ends = remove_spans(text, offsets, spans_of_rows(spans, np.arange(len(texts))))
    raw = cut.tobytes()
    assert [raw[a:b].decode() for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)] == [
        "A first text.\n}",
        texts[1],
        texts[2],
        "}\nand more of it",
        "",
    ]
    assert (result.num_lines, result.num_removed, result.removed_bytes) == (9, 4, 114)


def test_all_lines_of_all_documents_may_be_equal(tmp_path: Path, cut_units: Any, small_tasks: Any) -> None:
    rows = np.zeros(1000, dtype=DOCUMENT)
    rows["alive"] = True
    rows["id_low"] = np.arange(1000)[::-1]
    lines = np.zeros(1_000_000, dtype=LINE_DTYPE)
    lines["hash"] = 2**64 - 1
    lines["row"] = np.repeat(np.arange(1000), 1000)
    lines["start"] = np.tile(np.arange(1000), 1000) * 8
    lines["end"] = lines["start"] + 7
    paths = write_lines(tmp_path, lines, [0, 300, 1000])
    units = cut_units(tmp_path, rows, [300], lines=paths)
    result = line_duplicates(units, small_tasks(1 << 22), Inline(), tmp_path / "lines")
    first, second = (read_removals(path) for path in result.removals)
    kept = set(range(700_000)) - set((second["row"] * 1000 + second["start"] // 8).tolist())
    assert (len(first), len(second)) == (300_000, 699_999)
    assert kept == {699_000}  # the first line of the document with the smallest id


def test_units_without_lines_dead_ones_and_none_at_all_lose_nothing(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    cfg = small_tasks(1 << 20)
    assert line_duplicates([], cfg, Inline(), tmp_path / "none").removals == []
    rows, lines = made_up_documents(30, 3), made_up_lines(30, 3, 4)
    rows["alive"] = False
    units = cut_units(tmp_path, rows, [0, 10], lines=write_lines(tmp_path, lines, [0, 0, 10, 30]))
    assert removed_by(units, cfg, tmp_path / "dead") == []
    units = cut_units(tmp_path, made_up_documents(30, 3), [0, 10])
    assert removed_by(units, cfg, tmp_path / "without") == []


def test_lines_of_other_documents_are_refused(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    lines = made_up_lines(30, 3, 4)
    np.save(tmp_path / "lines.npy", lines)
    units = cut_units(tmp_path, made_up_documents(20, 3), [], lines=[tmp_path / "lines.npy"])
    with pytest.raises(
        DataError, match=r"lines.npy has a line of document 2\d, but unit 0 has 20.*scan again"
    ):
        line_duplicates(units, small_tasks(1 << 20), Inline(), tmp_path / "out")


def test_settings_of_lines_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"dedup.lines.min_chars=0 must be at least 1"):
        LineConfig(min_chars=0)
    with pytest.raises(ConfigError, match=r"dedup.lines.max_removed_share=1.5 must lie in 0..1, or be null"):
        LineConfig(max_removed_share=1.5)
    assert LineConfig(unit=LineUnit.paragraph).unit is LineUnit.paragraph
