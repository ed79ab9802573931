"""Rows that are passed over: the arithmetic around them, and their file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.batches import Batches
from llmtrain.loader.dataset import Rows
from llmtrain.loader.ledger import hash_rows
from llmtrain.loader.mixture import Mixture, Source
from llmtrain.loader.skipped import (
    SKIPPED_NAME,
    PassedOver,
    SkippedWindow,
    read_skipped,
    write_skipped,
)

RANGES = [(16, 23), (40, 41), (42, 47), (100, 100)]


def window(first: int, last: int) -> SkippedWindow:
    return SkippedWindow(first=first, last=last, step=3, attempt=1, reason="loss=nan")


def taken(passed: PassedOver, start: int, num_rows: int, until: int) -> list[list[int]]:
    """The rows of every step from `start` on."""
    steps, position = [], start
    while position < until:
        steps.append(passed.positions(position, num_rows).tolist())
        position = steps[-1][-1] + 1
    return steps


@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 16, 50])
@pytest.mark.parametrize("start", [0, 5, 16, 20, 47, 100])
def test_steps_of_any_size_are_full_and_take_every_other_row_once(num_rows: int, start: int) -> None:
    passed = PassedOver.of(RANGES)
    steps = taken(passed, start, num_rows, 150)
    assert [len(step) for step in steps] == [num_rows] * len(steps)
    rows = [row for step in steps for row in step]
    inside = {row for first, last in RANGES for row in range(first, last + 1)}
    assert rows == [row for row in range(start, rows[-1] + 1) if row not in inside]


def test_a_window_that_is_a_step_leaves_the_other_steps_as_they_were() -> None:
    before = taken(PassedOver(), 0, 8, 80)
    after = taken(PassedOver.of([(16, 23), (40, 47)]), 0, 8, 80)
    assert after == [step for step in before if step[0] not in (16, 40)]


def test_spans_are_positions_in_whole_ranges() -> None:
    passed = PassedOver.of(RANGES)
    assert passed.ranges == ((16, 23), (40, 47), (100, 100))
    assert passed.spans(12, 8) == [(12, 15), (24, 27)]
    assert passed.spans(16, 8) == passed.spans(20, 8) == [(24, 31)]
    assert passed.spans(36, 60) == [(36, 39), (48, 99), (101, 104)]
    assert passed.spans(36, 4) == [(36, 39)]
    for start in range(0, 110, 7):
        for end in range(start, 120, 5):
            rows = [row for row in range(start, end + 1) if passed.next_position(row) == row]
            if rows:
                assert passed.positions_between(start, end).tolist() == rows
            assert passed.num_between(start, end) == end + 1 - start - len(rows)


@pytest.mark.parametrize("position", [0, 15, 16, 20, 23, 24, 40, 41, 100, 101])
def test_the_next_position_is_the_first_that_is_in_no_window(position: int) -> None:
    passed = PassedOver.of(RANGES)
    expected = position
    while any(first <= expected <= last for first, last in RANGES):
        expected += 1
    assert passed.next_position(position) == expected


def test_windows_in_any_order_and_over_each_other_are_joined() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        ranges = [sorted(random.integers(0, 60, 2).tolist()) for _ in range(int(random.integers(1, 8)))]
        passed = PassedOver.of(ranges)
        inside = {row for first, last in ranges for row in range(first, last + 1)}
        assert {row for first, last in passed.ranges for row in range(first, last + 1)} == inside
        assert all(last + 1 < first for (_, last), (first, _) in pairwise(passed.ranges))


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / SKIPPED_NAME
    assert read_skipped(path) == []
    windows = [window(16, 23), window(3, 3)]
    write_skipped(path, windows)
    assert read_skipped(path) == windows
    assert PassedOver.of_windows(windows).ranges == ((3, 3), (16, 23))
    assert json.loads(path.read_text())["windows"][0]["reason"] == "loss=nan"


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"windows": [{"first": 3}]}', '{"windows": [{"first": 4']
)
def test_a_damaged_file_is_no_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / SKIPPED_NAME
    path.write_text(content)
    with pytest.raises(DataError, match=r"skipped_rows.json cannot be read: .* restore it"):
        read_skipped(path)


def test_a_window_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="a window of rows 9 to 8: need 0 <= first <= last"):
        window(9, 8)


def test_a_step_has_the_size_of_where_it_begins_behind_a_window() -> None:
    sizes = BatchSizes((0, 16), (4, 8))
    passed = PassedOver.of([(12, 17), (20, 21)])
    assert passed.step_spans(8, sizes) == [(8, 11)]
    assert passed.step_spans(12, sizes) == passed.step_spans(18, sizes) == [(18, 19), (22, 27)]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_batches_of_any_layout_take_the_same_other_rows(
    corpus: Any, dp_size: int, micro: int, prefetch_steps: int
) -> None:
    """One window is a step, one lies across two; what was read ahead before they were known is not taken."""
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)
    order = Mixture(
        [Source(name="data", num_rows=rows.num_rows, hash=rows.hash)], [(0, {})], seed=5, block_rows=64
    )
    ranks = [
        Batches(
            rows,
            order=order,
            sizes=BatchSizes.of([], 12),
            micro_batch_rows=micro,
            dp_rank=rank,
            dp_size=dp_size,
            prefetch_steps=prefetch_steps,
        )
        for rank in range(dp_size)
    ]
    passed = PassedOver.of([(12, 23), (29, 40)])
    for rank in ranks:
        rank.step(0)
        rank.pass_over(passed)
    found, position, total = [], 0, 0
    for _ in range(3):
        for rank in ranks:
            step = rank.step(position)
            total += step.tokens_hash
            for batch in step.micro_batches:
                assert batch.places is not None
                found += batch.places.tolist()
                assert batch.rows.tolist() == order.rows_at(batch.places).tolist()
        position = ranks[0].span(position)[1] + 1
    for rank in ranks:
        rank.close()
    expected = np.array([row for row in range(60) if passed.next_position(row) == row][:36])
    assert found == expected.tolist()
    assert total % 2**64 == hash_rows(expected, rows.read_many(order.rows_at(expected)).tokens)
