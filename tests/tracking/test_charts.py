"""Charts: round ticks, honest buckets, labels that do not touch."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.tracking.charts import Chart, Mark, Series, axis, bucketed, nice_step, number, smoothed, svg


def texts(picture, style):
    return [
        (float(node.get("x")), float(node.get("y")), node.text)
        for node in ElementTree.fromstring(picture).iter("text")
        if style in node.get("class").split()
    ]


def one_line(ys, **settings):
    return Chart(series=[Series(xs=range(1, len(ys) + 1), ys=ys, style="train")], y_unit="nats", **settings)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
@settings(max_examples=200, derandomize=True)
def test_ticks_are_round_and_hold_all_values(low, span, from_zero):
    high = low + span
    begin, end, ticks = axis(low, high, from_zero=from_zero)
    slack = 1e-9 * max(abs(low), abs(high), 1)
    assert begin - slack <= low <= high <= end + slack
    assert 2 <= len(ticks) <= 9
    assert not from_zero or begin <= 0 <= end


@pytest.mark.parametrize(("low", "high"), [(0.3, 5.0), (1e-6, 1e6), (2.0, 2.0), (0.9, 1.1)])
def test_a_log_axis_holds_all_values_and_few_ticks(low, high):
    begin, end, ticks = axis(low, high, log=True)
    assert 0 < begin <= low <= high <= end
    assert 2 <= len(ticks) <= 14


def test_steps_are_one_two_or_five():
    assert [nice_step(rough) for rough in (0.9, 1.0, 1.1, 2.1, 5.1, 0.03)] == [1.0, 1.0, 2.0, 5.0, 10.0, 0.05]


def test_numbers_are_short():
    values = [0, 0.25, 3, 1500, 2e6, 3e-4, 9.83e6, 1e9]
    assert [number(value) for value in values] == ["0", "0.25", "3", "1.5k", "2M", "3e-4", "9.83M", "1B"]


def test_buckets_keep_the_extremes_of_every_value():
    ys = [math.sin(step) for step in range(1000)]
    ys[377] = 50.0
    points = bucketed(Series(xs=range(1000), ys=ys, style="train"), 100)
    assert len(points) == 100
    assert max(high for _, _, _, high in points) == 50.0
    assert math.fsum(mean * 10 for _, mean, _, _ in points) == pytest.approx(math.fsum(ys))


def test_a_missing_value_is_a_gap_in_the_line():
    picture = svg(one_line([1.0, 2.0, None, 3.0, 4.0]))
    (path,) = re.findall(r'class="line train" d="([^"]*)"', picture)
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_nothing_to_draw_is_an_empty_string():
    assert svg(one_line([None, float("nan")])) == ""
    assert svg(one_line([])) == ""
    assert svg(one_line([0.0, -1.0], log_y=True)) == ""


@pytest.mark.parametrize("settings", [{}, {"log_y": True}, {"from_zero": True}, {"y_high": 1.5}])
@pytest.mark.parametrize("ys", [[1.0], [1.0, 1.0], [5.0, 1.0, 3.0], [1e-9, 1e9]])
def test_every_picture_is_well_formed_and_inside_its_frame(ys, settings):
    picture = svg(one_line(ys, **settings))
    for x, y, _ in texts(picture, "tick"):
        assert 0 <= x <= 400
        assert 0 <= y <= 210
    assert "nan" not in picture
    assert [words for _, _, words in texts(picture, "unit")] == ["nats", "step"]


def test_labels_at_line_ends_do_not_touch_even_when_lines_end_together():
    series = [Series(xs=[1, 2], ys=[1.0, 2.0], style=f"s{n}", label=f"line {n}") for n in range(5)]
    heights = sorted(y for _, y, _ in texts(svg(Chart(series=series, y_unit="nats", right=80)), "end"))
    assert len(heights) == 5
    assert all(after - before >= 14.9 for before, after in itertools.pairwise(heights))


def test_marks_too_close_to_name_both_keep_their_lines():
    marks = [Mark(x=x, label="resumed") for x in (50, 51, 90)]
    picture = svg(one_line([float(y) for y in range(100)], marks=marks))
    assert picture.count('class="mark"') == 3
    assert len(texts(picture, "mark-label")) == 2


def test_what_is_cut_off_above_is_named():
    picture = svg(one_line([9.0, 5.0, 2.0, 1.0, 1.0], y_high=2.0))
    assert [words for _, _, words in texts(picture, "mark-label")] == ["\u2191 from 9"]
    assert "from" not in svg(one_line([2.0, 1.0], y_high=2.0))


def test_labels_are_escaped():
    series = [Series(xs=[1, 2], ys=[1.0, 2.0], style="train", label="<script>")]
    assert "<script>" not in svg(Chart(series=series, y_unit="a < b"))


def test_smoothing_looks_back_only_and_skips_gaps():
    assert smoothed([1.0] * 30 + [None], 3)[-1] == 1.0
    calm = smoothed([1.0] * 50 + [9.0] * 50, 5)
    assert calm[49] == 1.0
    assert calm[99] == 9.0
    assert smoothed([None], 3) == [None]
