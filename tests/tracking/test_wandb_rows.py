"""Rows of W&B's history: names, axes, what was undone, goodput, alerts."""

from __future__ import annotations

import pytest

from llmtrain.tracking.metrics import MetricsFile, read_lines
from llmtrain.tracking.operations import seconds_of, spans_of
from llmtrain.tracking.run_data import read_run
from llmtrain.tracking.wandb_rows import ALERTS, MAX_TITLE, Rows, values_of


def step(number, *, attempt=1, **fields):
    own = {"kind": "step", "step": number, "attempt": attempt, "time": 100.0 + number}
    return {**own, "tokens": number * 10, "loss": 1 / number, "step_s": 0.5, **fields}


def event(what, number, *, attempt=1, at=100.0, **fields):
    return {"kind": "event", "what": what, "step": number, "attempt": attempt, "time": at, **fields}


def rows_of(*records):
    rows = Rows(run_name="demo")
    return [rows.take(record) for record in records]


def test_names_are_a_group_and_a_field_and_only_finite_numbers_are_told():
    record = {"kind": "eval", "step": 5, "attempt": 2, "time": 1.0, "eval_loss": 2.5, "eval_s": None}
    assert values_of(record | {"why": "text", "on": True}) == {"eval/loss": 2.5}
    assert values_of(step(2)) == {"train/loss": 0.5, "train/step_s": 0.5}
    ranks = {"kind": "ranks", "step": 5, "attempt": 1, "time": 1.0, "slowest_rank": 3}
    assert values_of(ranks) == {"ranks/slowest_rank": 3}


def test_every_row_has_its_place_in_the_file_and_all_three_axes():
    records = [
        event("start", 0),
        step(1),
        event("wandb", 1, text="offline"),
        {"kind": "eval", "step": 1, "attempt": 1, "time": 102.0, "eval_loss": 2.5},
        step(2),
        {"kind": "checkpoint", "step": 1, "attempt": 1, "time": 103.0, "save_s": 1.0},
    ]
    rows = rows_of(*records)
    assert [row.number for row in rows] == [0, 1, 2, 3, 4, 5]
    axes = [tuple(row.fields.get(name) for name in ("step", "tokens", "attempt")) for row in rows]
    assert axes == [(0, 0, 1), (1, 10, 1), (None, None, None), (1, 10, 1), (2, 20, 1), (1, 10, 1)]
    assert rows[5].fields["_timestamp"] == 103.0


def test_a_row_without_known_tokens_has_none_rather_than_wrong_ones():
    (row,) = rows_of(event("resume", 7, attempt=3))
    assert "tokens" not in row.fields


def test_an_attempt_that_goes_back_says_from_where_to_where():
    rows = rows_of(event("start", 0), step(1), step(2), step(3), event("resume", 1, attempt=2), step(2))
    told = [row.fields for row in rows if "run/went_back_from" in row.fields]
    assert told == [rows[4].fields]
    assert (told[0]["run/went_back_from"], told[0]["run/went_back_to"]) == (3, 1)
    assert (told[0]["step"], told[0]["tokens"], told[0]["attempt"]) == (1, 10, 2)


def test_a_resume_where_the_run_stood_marks_nothing():
    rows = rows_of(event("start", 0), step(1), event("resume", 1, attempt=2), step(2, attempt=2))
    assert not any("run/went_back_from" in row.fields for row in rows)


def test_going_back_inside_an_attempt_is_marked_at_its_first_step():
    rows = rows_of(step(1), step(2), step(3), event("rolled_back", 3), step(2), step(3))
    marked = [row.number for row in rows if "run/went_back_from" in row.fields]
    assert marked == [4]
    assert rows[4].fields["run/went_back_to"] == 1


def test_events_are_counted_over_all_attempts():
    rows = rows_of(event("start", 0), event("spike", 3), event("spike", 4), event("spike", 2, attempt=2))
    assert [row.fields.get("events/spike") for row in rows] == [None, 1, 2, 3]


def test_goodput_is_that_of_the_report(tmp_path):
    """Over a restart that undoes steps."""
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 0, what="start", time=1000.0)
        for number in range(1, 6):
            metrics.write("step", number, step_s=1.5, tokens=number, loss=1.0, time=1000.0 + 2 * number)
            if number == 1:
                metrics.write("event", 1, what="first_step", start_up_s={"total": 30.0}, time=1002.0)
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=2) as metrics:
        metrics.write("event", 3, what="resume", time=1100.0)
        for number in range(4, 9):
            metrics.write("step", number, step_s=1.5, tokens=number, loss=1.0, time=1100.0 + 2 * number)
    rows = rows_of(*read_lines(tmp_path / "metrics.jsonl"))
    assert ["run/goodput" in row.fields for row in rows[:4]] == [False, False, False, True], (
        "once it is known"
    )
    last = rows[-1]
    run = read_run(tmp_path)
    parts = seconds_of(run, spans_of(run))
    assert last.fields["run/goodput"] == pytest.approx(
        (parts["computing"] + parts["data"]) / sum(parts.values())
    )
    assert last.fields["run/goodput"] == pytest.approx(8 * 1.5 / (1116 - 972))


@pytest.mark.parametrize(("what", "level"), ALERTS.items())
def test_people_are_told_of_what_needs_them(what, level):
    (row,) = rows_of(event(what, 12, error="no room", rows=[3, 4]))
    assert row.alert.level == level
    assert row.alert.title.startswith("demo: ")
    assert row.alert.text.startswith("step 12, attempt 1")


def test_an_alert_says_why():
    (row,) = rows_of(event("failed", 12, error="RuntimeError: rank 3: no room"))
    assert row.alert.text == "step 12, attempt 1: RuntimeError: rank 3: no room"
    assert row.alert.title == "demo: failed"


def test_routine_alerts_nobody():
    assert all(row.alert is None for row in rows_of(event("start", 0), step(1), event("finished", 1)))


def test_a_title_fits_however_long_the_runs_name():
    row = Rows(run_name="x" * 200).take(event("spike", 1))
    assert len(row.alert.title) == MAX_TITLE
