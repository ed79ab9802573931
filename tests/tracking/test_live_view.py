"""What `llmtrain watch` draws, from records alone."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmtrain.tracking.live_view import RunView

CONFIG = {"train": {"total_tokens": 8000, "global_batch_rows": 10}, "data": {"seq_len": 8}}


def step(number, *, attempt=1, **fields):
    values = {
        "loss": 9 / number,
        "grad_norm": 1.0,
        "tokens_per_s": 1e4,
        "mem_gib": 2.0,
        "position": number * 10,
    }
    record = {"kind": "step", "step": number, "attempt": attempt, "time": 1000.0 + number}
    return {**record, **values, **fields}


def event(what, number, *, attempt=1, **fields):
    return {
        "kind": "event",
        "what": what,
        "step": number,
        "attempt": attempt,
        "time": 1000.0 + number,
        **fields,
    }


def view(*records):
    made = RunView("demo", CONFIG)
    made.feed(records)
    return made


def screen(made, *, width=120, height=40, silent_s=0.0, plain=False):
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=False)
    console.print(made.render(width=width, height=height, silent_s=silent_s, silent_after_s=300, plain=plain))
    return out.getvalue()


def test_the_head_says_step_state_and_figures():
    made = view(event("start", 0), *(step(number, mfu=0.314) for number in range(1, 51)))
    text = screen(made, silent_s=3)
    assert "demo · step 50 of 100 (50%) · running" in text
    assert "loss 0.1800 · 10k tokens/s · MFU 31.4% · 50.0 s left" in text
    assert "last record 3.0 s ago · Ctrl-C leaves; the run goes on" in text


def test_every_curve_has_its_unit_and_one_without_values_is_left_out():
    made = view(*(step(number) for number in range(1, 51)))
    text = screen(made)
    for title in (
        "loss  nats per token",
        "throughput  tokens per second",
        "gradient norm  L2 before clipping, log scale",
        "memory  GiB, peak of rank 0",
    ):
        assert title in text
    assert "MFU" not in text


@pytest.mark.parametrize(("width", "height"), [(200, 60), (120, 40), (100, 30), (80, 24), (40, 12), (20, 8)])
def test_the_picture_fits_the_terminal(width, height):
    events = [event("wandb", number, text="x" * 300) for number in range(30)]
    made = view(*(step(number, mfu=0.3) for number in range(1, 500)), *events)
    rows = screen(made, width=width, height=height).rstrip("\n").split("\n")
    assert len(rows) <= height
    assert max(map(len, rows)) <= width
    assert "loss  " in "".join(rows)


def test_events_evaluations_and_saves_are_shown_the_latest_last():
    made = view(
        step(1),
        {"kind": "eval", "step": 1, "attempt": 1, "time": 1001.5, "eval_loss": 4.5},
        {
            "kind": "checkpoint",
            "step": 1,
            "attempt": 1,
            "time": 1002,
            "save_s": 1.0,
            "wait_s": 0.0,
            "copy_s": 0.2,
        },
        event("spike", 2, z=8.5),
    )
    text = screen(made)
    places = [
        text.index(words) for words in ("evaluated: held-out loss 4.5", "checkpoint saved", "spike: z=8.5")
    ]
    assert places == sorted(places)
    assert "held-out 4.5000" in text


def test_a_resume_takes_back_what_it_undid():
    made = view(*(step(number) for number in range(1, 51)), event("resume", 30, attempt=2))
    assert made.step == 30
    assert made.curves["loss"].buckets[-1].last == 30
    assert "step 30 of 100 (30%) · starting" in screen(made)
    made.feed([step(31, attempt=2)])
    assert "running" in screen(made)
    assert "attempt 2" in screen(made)


def test_an_attempt_without_a_resume_event_begins_before_its_first_step():
    made = view(*(step(number) for number in range(1, 51)), step(41, attempt=2))
    assert made.curves["loss"].buckets[-1].last == 41
    assert len(made.curves["loss"].buckets) == 41


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (event("finished", 3), "· finished"),
        (event("stopped", 3, signal="SIGTERM"), "· stopped: by SIGTERM"),
        (event("failed", 3, error="DataError: gone"), "· failed: DataError: gone"),
    ],
)
def test_how_a_run_ended_is_said(ending, words):
    made = view(step(1), step(2), step(3), ending)
    assert words in screen(made, silent_s=1e6)
    assert made.seconds_left() is None


def test_silence_is_said_with_its_length():
    made = view(step(1), step(2))
    assert "silent for 10:00: hung, killed, or slow" in screen(made, silent_s=600)
    assert "silent" not in screen(made, silent_s=299)


def test_a_run_that_recorded_nothing_is_waited_for():
    text = screen(view())
    assert "waiting for the first record" in text
    assert "no values yet" in text
    assert "last record" not in text


def test_a_loss_that_is_not_finite_is_said():
    assert "loss not finite" in screen(view(step(1), step(2, loss=None)))


def test_without_a_config_there_is_no_length():
    made = RunView("demo", {})
    made.feed([step(1), step(2)])
    assert "demo · step 2 · running" in screen(made)


def test_plain_is_ascii():
    made = view(*(step(number) for number in range(1, 51)))
    assert screen(made, plain=True).isascii()


def test_records_of_odd_content_do_no_harm():
    made = view(
        step(1, loss="high", tokens_per_s=True, time="now"),
        {"kind": "eval", "step": 1, "attempt": 1},
        {"kind": "plan", "step": 1, "attempt": 1},
        {"kind": "event", "step": 1, "attempt": 1},
        {"kind": "whatever", "step": 1, "attempt": 1},
    )
    assert "loss not finite" in screen(made)
    assert "--:--:--" in screen(made)
