"""The operations panel: where the time went adds up, and nothing that happened is hidden."""

from __future__ import annotations

import itertools
import re

import pytest

from llmtrain.tracking.metrics import MetricsFile, read_lines
from llmtrain.tracking.operations import (
    MAX_INCIDENTS,
    MAX_MARKS,
    operations_of,
    seconds_of,
    spans_of,
    stalls_of,
)
from llmtrain.tracking.report import render
from llmtrain.tracking.run_data import read_run
from llmtrain.tracking.run_list import goodput_of_lines


def write_attempt(folder, attempt, begin, end, *, at, what="start", ending=None, slow=(), save_wait_s=0.0):
    """Launched at `at`, 20 s until the first step begins; then steps of 2 s, of which 0.1 s is waiting for
    data; an evaluation of 3 s and a save of 5 s after the last. Returns the time of its last record."""
    with MetricsFile(folder / "metrics.jsonl", attempt=attempt) as metrics:
        metrics.write("event", begin, what=what, time=at + 15)
        now = at + 20
        for step in range(begin + 1, end + 1):
            wait_s = 9.0 if step in slow else 0.1
            step_s = 1.9 + wait_s
            now += step_s
            metrics.write(
                "step", step, loss=3.0, step_s=step_s, data_wait_s=wait_s, tokens=step * 8, time=now
            )
            if step == begin + 1:
                total = {"torch": 1.0, "total": now - at}
                metrics.write("event", step, what="first_step", start_up_s=total, time=now)
        now += 3
        metrics.write("eval", end, eval_loss=3.0, eval_s=3.0, time=now)
        now += save_wait_s + 1.0
        metrics.write("checkpoint", end, save_s=5.0, wait_s=save_wait_s, copy_s=1.0, time=now)
        if ending:
            metrics.write("event", end, time=now, **ending)
    return now


@pytest.fixture
def folder(tmp_path):
    """Ten steps and a kill; 100 s; from step 6 on again to step 20."""
    ended = write_attempt(tmp_path, 1, 0, 10, at=1e9)
    write_attempt(tmp_path, 2, 6, 20, at=ended + 100, what="resume", ending={"what": "finished"})
    return tmp_path


def parts_of(folder):
    run = read_run(folder)
    return seconds_of(run, spans_of(run))


def test_the_parts_are_what_was_recorded(folder):
    parts = parts_of(folder)
    assert parts["computing"] == pytest.approx(20 * 1.9)
    assert parts["data"] == pytest.approx(20 * 0.1)
    assert parts["undone"] == pytest.approx(4 * 2.0)
    assert parts["start_up"] == pytest.approx(2 * 20)
    assert parts["down"] == pytest.approx(100)
    assert parts["eval"] == pytest.approx(3)
    assert parts["save"] == pytest.approx(1)
    assert parts["other"] == pytest.approx(3 + 1), "the evaluation and the save that were undone"


def test_the_parts_add_up_to_all_time_from_the_first_launch_to_the_last_record(folder):
    lines = read_lines(folder / "metrics.jsonl")
    assert sum(parts_of(folder).values()) == pytest.approx(lines[-1]["time"] - 1e9)


def test_the_panel_and_the_list_of_runs_agree_about_goodput(folder):
    share = goodput_of_lines(read_lines(folder / "metrics.jsonl"))
    assert operations_of(read_run(folder)).goodput == f"{share:.1%}"


def test_the_sentence_names_what_cost_the_most(folder):
    shown = operations_of(read_run(folder))
    assert shown.sentence == (
        "40.0 s of 3:16 went into steps that stand; most of the rest: between attempts, 1:40 "
        "(queue, nodes, unrecorded ends); 1 restart."
    )
    assert shown.goodput_level == "warn"


def test_pieces_of_the_strip_fill_it_without_a_gap(folder):
    shares = operations_of(read_run(folder)).shares
    assert shares[0].begin == 0
    assert shares[-1].end == pytest.approx(1)
    for before, after in itertools.pairwise(shares):
        assert after.begin == before.end


def test_attempts_lie_on_the_timeline_where_they_were(folder):
    lanes = {lane.name: lane.marks for lane in operations_of(read_run(folder)).lanes}
    start, first, _, second = lanes["attempts"]
    wall_s = sum(parts_of(folder).values())
    assert (start.begin, start.style) == (0.0, "start")
    assert start.end == first.begin == pytest.approx(20 / wall_s)
    assert first.end == pytest.approx((20 + 20 + 3 + 1) / wall_s)
    assert (first.style, second.style) == ("ended-bad", "ended-good")
    assert second.end == pytest.approx(1.0)
    assert "attempt 1: steps 0 to 10" in first.label
    assert first.label.endswith("killed")
    assert len(lanes["evaluations"]) == len(lanes["saves"]) == 1, "those of the first attempt are undone"


def test_a_kill_is_an_incident_and_so_is_a_resume(folder):
    shown = operations_of(read_run(folder)).incidents
    assert [(each.title, each.attempt, each.step) for each in shown] == [
        ("killed", "1", "10"),
        ("resumed", "2", "6"),
        ("finished", "2", "20"),
    ]
    assert [each.level for each in shown] == ["bad", "info", "good"]


def test_an_event_that_nobody_planned_for_is_shown_with_what_it_carries(folder):
    with MetricsFile(folder / "metrics.jsonl", attempt=2) as metrics:
        metrics.write("event", 20, what="new_here", z=9.25, rows=[3, 4], text="<b>&", time=1e9 + 196)
    run = read_run(folder)
    last = operations_of(run).incidents[-1]
    assert (last.title, last.level) == ("new here", "warn")
    assert last.details == "z=9.25 · rows=[3, 4] · text=<b>&"
    page = render(run)
    assert "text=&lt;b&gt;&amp;" in page
    assert "text=<b>" not in page


def test_stalls_say_whether_they_waited_for_data_or_a_save(tmp_path):
    write_attempt(tmp_path, 1, 0, 30, at=1e9, slow=(12,), save_wait_s=14.0)
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("step", 31, loss=3.0, step_s=8.0, data_wait_s=0.1, time=1e9 + 200)
    found = stalls_of(read_run(tmp_path))
    assert [(stall.record["step"], stall.seconds, stall.why) for stall in found] == [
        (30, 15.0, "waited for a save"),
        (12, pytest.approx(10.9), "waited 9.0 s for data"),
        (31, 8.0, "step of 8.0 s, not for data"),
    ]
    shown = operations_of(read_run(tmp_path))
    assert shown.stalls_note == "3, 33.9 s together; the longest:"
    assert [mark.label for lane in shown.lanes if lane.name == "stalls" for mark in lane.marks]


def test_a_run_without_stalls_says_so(folder):
    assert operations_of(read_run(folder)).stalls_note == (
        "No step took 3 times the median, and no save held training up for one."
    )


def test_one_stall_is_counted_as_one(tmp_path):
    write_attempt(tmp_path, 1, 0, 30, at=1e9, slow=(12,))
    assert operations_of(read_run(tmp_path)).stalls_note == "One, 10.9 s."


@pytest.mark.parametrize(
    ("ending", "style"),
    [
        ({"what": "finished"}, "ended-good"),
        ({"what": "stopped", "signal": "SIGUSR1"}, "ended-warn"),
        ({"what": "failed", "error": "x"}, "ended-bad"),
        (None, "ended-open"),
    ],
)
def test_an_attempt_has_the_colour_of_its_end(tmp_path, ending, style):
    write_attempt(tmp_path, 1, 0, 5, at=1e9, ending=ending)
    (lane,) = [lane for lane in operations_of(read_run(tmp_path)).lanes if lane.name == "attempts"]
    assert lane.marks[-1].style == style


def test_a_clock_that_went_back_between_attempts_makes_no_negative_time(tmp_path):
    write_attempt(tmp_path, 1, 0, 10, at=1e9)
    write_attempt(tmp_path, 2, 10, 20, at=1e9 - 500, what="resume")
    run = read_run(tmp_path)
    parts = seconds_of(run, spans_of(run))
    assert min(parts.values()) >= 0
    assert parts["down"] == 0
    for lane in operations_of(run).lanes:
        assert all(0 <= mark.begin <= mark.end <= 1 for mark in lane.marks)


def test_a_run_killed_before_its_first_step_is_all_start_up(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 0, what="start", time=1e9)
        metrics.write("event", 0, what="wandb", text="offline", time=1e9 + 30)
    shown = operations_of(read_run(tmp_path))
    assert shown.goodput == "0.0%"
    assert [(share.label, share.percent) for share in shown.shares] == [("start-up", "100.0%")]


def test_records_without_a_time_leave_the_panel_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "attempt": 1, "loss": 2.0}\n')
    run = read_run(tmp_path)
    assert operations_of(run) is None
    assert "No record of this run has a time." in render(run)


def test_a_long_run_has_a_picture_of_bounded_size(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        for step in range(1, 3001):
            metrics.write("step", step, loss=3.0, step_s=1.0, time=1e9 + step)
            metrics.write("checkpoint", step, save_s=0.1, wait_s=0.0, copy_s=0.0, time=1e9 + step)
            metrics.write("event", step, what="spike", z=9.0, time=1e9 + step)
    shown = operations_of(read_run(tmp_path))
    assert all(len(lane.marks) <= MAX_MARKS + 1 for lane in shown.lanes)
    assert len(shown.incidents) == MAX_INCIDENTS
    assert shown.num_more_incidents == 3000 - MAX_INCIDENTS
    counts = [
        1 + int((re.findall(r"and (\d+) more", mark.label) or ["0"])[0])
        for lane in shown.lanes
        if lane.name == "saves"
        for mark in lane.marks
    ]
    assert sum(counts) == 3000


@pytest.mark.parametrize(
    ("seconds", "ticks"),
    [
        (10, ["0", "2 s", "4 s", "6 s", "8 s"]),
        (900, ["0", "5 min", "10 min"]),
        (4 * 3600 + 100, ["0", "1 h", "2 h", "3 h"]),
        (20 * 86400, ["0", "7 d", "14 d"]),
        (2000 * 86400, ["0", "500 d", "1e+03 d", "1.5e+03 d"]),
    ],
)
def test_ticks_are_round_times(tmp_path, seconds, ticks):
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 0, what="start", time=1e9)
        metrics.write("step", 1, step_s=1.0, time=1e9 + seconds)
    shown = operations_of(read_run(tmp_path)).ticks
    assert [text for _, text in shown] == ticks
    assert all(0 <= place < 1 for place, _ in shown)


def test_the_page_holds_the_panel(folder):
    page = render(read_run(folder))
    for words in ("<h2>Operations</h2>", "Timeline", "between attempts", "Incidents", "killed"):
        assert words in page
