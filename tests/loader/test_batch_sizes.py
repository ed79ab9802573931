"""Sizes of steps as a function of the position."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.loader.batch_sizes import BatchSizes

RAMP = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=4)


@given(RAMP, st.integers(1, 12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_sizes_are_those_of_walking_step_by_step(steps: list[tuple[int, int]], rows: int) -> None:
    ramp, until = [], 0
    for more, size in steps:
        until += more
        ramp.append((until, size))
    sizes = BatchSizes.of(ramp, rows)
    position = 0
    for step in range(60):
        expected = next((size for until, size in ramp if position < until), rows)
        assert sizes.rows_at(position) == expected
        assert sizes.walk(0, position) == (step, position)
        assert sizes.walk(0, position + 1) == (step + 1, position + expected)
        position += expected


@given(RAMP, st.integers(1, 12), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_walk_may_begin_anywhere(steps: list[tuple[int, int]], rows: int, begin: int, more: int) -> None:
    """As after a resume with other sizes, which need not begin where a step of theirs would."""
    sizes = BatchSizes.of(steps, rows)
    position, count = begin, 0
    while position < begin + more:
        position, count = position + sizes.rows_at(position), count + 1
    assert sizes.walk(begin, begin + more) == (count, position)


def test_a_stage_ends_with_a_whole_step() -> None:
    sizes = BatchSizes.of([(10, 4)], 8)
    assert [sizes.rows_at(position) for position in (0, 4, 8, 12, 20)] == [4, 4, 4, 8, 8]


@pytest.mark.parametrize("until", [3, 4])
def test_a_stage_that_is_over_before_it_begins_is_none(until: int) -> None:
    assert BatchSizes.of([(2, 4), (until, 2)], 8) == BatchSizes.of([(2, 4)], 8)
