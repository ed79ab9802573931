"""Charts of characters: every dot where its value is, nothing lost, nothing outside."""

from __future__ import annotations

import math
import random

import pytest

from llmtrain.tracking.terminal_charts import (
    BRAILLE,
    DOT_BITS,
    MAX_BUCKETS,
    Canvas,
    Curve,
    Line,
    chart,
)


def curve(values, *, begin=1):
    made = Curve()
    for step, value in enumerate(values, start=begin):
        made.add(step, value)
    return made


def drawn(*curves, **options):
    """Rows of text, without what is at their right."""
    lines = [Line(curve=each, style="blue", is_noisy=False) for each in curves]
    settings = {"width": 40, "height": 9, **options}
    return [row.rstrip() for row in chart(lines, **settings).plain.split("\n")]


def dots(rows):
    """(x, y) of every dot of a chart's plot, (0, 0) at its lower left."""
    plot = [row.partition("┤")[2] or row.partition("│")[2] for row in rows[:-1]]
    return {
        (2 * column + right, 4 * (len(plot) - 1 - row) + 3 - down)
        for row, text in enumerate(plot)
        for column, character in enumerate(text)
        if character != " "
        for down in range(4)
        for right in range(2)
        if ord(character) - BRAILLE & DOT_BITS[down][right]
    }


def test_the_bits_are_unicodes_braille_dots():
    """Dots 1 to 8 of the standard are at (row, column) as listed, and dot n is bit n - 1."""
    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    assert [DOT_BITS[row][column] for row, column in places] == [1 << bit for bit in range(8)]


def test_a_canvas_shows_exactly_the_dots_that_were_set():
    canvas = Canvas(3, 2)
    for x, y in ((0, 0), (5, 7), (2, 4)):
        canvas.dot(x, y, "red")
    for x, y in ((-1, 0), (6, 0), (0, -1), (0, 8)):
        canvas.dot(x, y, "red")
    assert [canvas.row(row).plain for row in (0, 1)] == [" ⡀⠈", "⡀  "]


def test_what_is_drawn_later_covers_what_was_there():
    canvas = Canvas(1, 1)
    canvas.vertical(0, 0, 3, "dim")
    canvas.dot(1, 0, "blue")
    assert canvas.row(0).plain == chr(BRAILLE + DOT_BITS[3][1])


@pytest.mark.parametrize(
    ("begin", "end"), [((0, 0.0), (9, 15.0)), ((0, 15.0), (2, 0.0)), ((3, 3.0), (3, 3.0))]
)
def test_a_line_has_no_hole(begin, end):
    canvas = Canvas(5, 4)
    canvas.line(begin, end, "x")
    rows = [f"┤{canvas.row(row).plain}" for row in range(4)]
    found = sorted(dots([*rows, ""]))
    assert found[0][0] == begin[0]
    assert found[-1][0] == end[0]
    assert {x for x, _ in found} == set(range(begin[0], end[0] + 1))
    span = sorted((int(begin[1]), int(end[1])))
    assert {y for _, y in found} == set(range(span[0], span[1] + 1))


def test_a_straight_curve_is_a_diagonal_from_corner_to_corner():
    rows = drawn(curve([step / 100 for step in range(101)]), width=43, height=9)
    found = dots(rows)
    width, height = 2 * (43 - 5), 4 * 8
    assert {(0, 0), (width - 1, height - 1)} <= found
    assert all(abs(y / (height - 1) - x / (width - 1)) < 0.06 for x, y in found)


def test_ticks_stand_where_their_values_are():
    rows = drawn(curve([0.0, 1.0] * 30), width=40, height=9)
    labels = {row.split("┤")[0].strip(): at for at, row in enumerate(rows) if "┤" in row}
    assert labels["1"] == 0
    assert labels["0"] == 7
    assert rows[-1].split() == ["1", "step", "60"]


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    rows = drawn(curve([10.0**power for power in range(5)]), log_y=True, width=44, height=9)
    rises = dict(sorted(dots(rows)))
    first, last = min(rises), max(rises)
    middle = rises[(first + last) // 2]
    assert abs(middle - (rises[first] + rises[last]) / 2) <= 1


def test_a_value_that_is_missing_is_a_gap():
    columns = {x for x, _ in dots(drawn(curve([1.0] * 20 + [None] * 20 + [1.0] * 20), width=43))}
    last = max(columns)
    assert columns & set(range(last // 3, 2 * last // 3)) <= {last // 3}
    assert set(range(last // 3 - 1)) <= columns
    assert set(range(2 * last // 3 + 2, last)) <= columns


def test_values_that_are_not_finite_are_gaps_and_never_axes():
    rows = drawn(curve([1.0, math.inf, math.nan, 2.0]))
    assert "inf" not in "".join(rows)
    assert "nan" not in "".join(rows)


def test_one_value_and_equal_values_are_drawn():
    assert dots(drawn(curve([2.5])))
    assert dots(drawn(curve([2.5] * 50)))


def test_nothing_to_draw_is_said():
    assert drawn(Curve()) == ["no values yet"]
    assert drawn(curve([None, math.nan])) == ["no values yet"]
    assert drawn(curve([-1.0]), log_y=True) == ["no values yet"]


def test_where_there_is_no_room_the_last_value_stands():
    assert drawn(curve([3.0, 2.5]), width=10, height=9) == ["2.5"]
    assert drawn(curve([3.0, 2.5]), width=40, height=2) == ["2.5"]


def test_a_chart_never_leaves_its_size():
    random.seed(0)
    for _ in range(60):
        width, height = random.randint(1, 90), random.randint(1, 20)
        values = [random.choice([None, random.gauss(0, 10.0 ** random.randint(-6, 9))]) for _ in range(40)]
        rows = drawn(curve(values), width=width, height=height)
        assert len(rows) <= height
        if len(rows) > 1:
            assert max(map(len, rows)) <= width


def test_values_above_a_given_height_are_left_out():
    rows = drawn(curve([100.0] + [1.0 + step / 100 for step in range(99)]), y_high=2.0)
    assert not any(row.split("┤")[0].strip() == "100" for row in rows)
    assert dots(rows)


def test_a_noisy_curve_shows_a_spike_of_a_single_step():
    values = [1.0] * 10_000
    values[5_000] = 10.0
    rows = chart([Line(curve=curve(values), style="blue")], width=60, height=12).plain.split("\n")
    assert rows[0].split("┤")[1].strip(), "the spike reaches the top of the picture"


def test_ascii_is_all_there_is_where_braille_is_not():
    lines = [Line(curve=curve([1 + math.sin(step / 9) for step in range(99)]), style="blue")]
    text = chart(lines, width=50, height=10, plain=True).plain
    assert text.isascii()
    assert set(text) & set("-_.':|")


def test_a_curve_of_any_length_is_kept_small_and_right():
    random.seed(1)
    values = [random.random() for _ in range(100_000)]
    values[77_777] = 50.0
    made = curve(values)
    assert len(made.buckets) <= MAX_BUCKETS
    assert sum(bucket.count for bucket in made.buckets) == len(values)
    mean = sum(bucket.mean * bucket.count for bucket in made.buckets) / len(values)
    assert mean == pytest.approx(sum(values) / len(values))
    (high,) = [bucket for bucket in made.buckets if bucket.high == 50.0]
    assert high.first <= 77_778 <= high.last
    assert [bucket.first for bucket in made.buckets[1:]] == [bucket.last + 1 for bucket in made.buckets[:-1]]


def test_steps_that_were_undone_are_forgotten():
    made = curve([1.0] * 100)
    made.forget_after(60)
    assert made.buckets[-1].last == 60
    for step in range(61, 80):
        made.add(step, 2.0)
    assert [bucket.mean for bucket in made.buckets] == [1.0] * 60 + [2.0] * 19
    made.forget_after(0)
    assert made.buckets == []
    assert made.last_value is None
