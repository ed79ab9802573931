"""Events as people read them: every kind has its words, and an unknown one shows all it carries."""

from __future__ import annotations

import pytest

from llmtrain.tracking.run_events import printable, told


def event(what, **fields):
    return {"kind": "event", "what": what, "step": 7, "attempt": 1, "time": 1.0, **fields}


@pytest.mark.parametrize(
    ("record", "level", "line"),
    [
        (event("start", position=0, world_size=2), "info", "started: position=0 · world_size=2"),
        (event("resume", source="runs/x/step-4"), "info", "resumed: from runs/x/step-4"),
        (event("resume"), "info", "resumed"),
        (
            event("first_step", start_up_s={"torch": 2.0, "total": 21.5}),
            "info",
            "first step done: 21.5 s after the launch",
        ),
        (event("first_step", start_up_s=3), "info", "first step done"),
        (
            event("replayed", first_step=5, num_steps=3, max_loss_difference=0.0),
            "good",
            "steps done again: 3 from 5 on, losses equal to the last bit",
        ),
        (
            event("replayed", first_step=5, num_steps=3, max_loss_difference=1e-6),
            "good",
            "steps done again: 3 from 5 on, losses different by at most 1e-06",
        ),
        (
            event("snapshot", save_s=2.0, wait_s=0.1, copy_s=0.4),
            "info",
            "snapshot in memory: in 2.0 s, training waited 500 ms",
        ),
        (event("wandb", text="offline"), "info", "W&B: offline"),
        (event("stopped", signal="SIGUSR1"), "warn", "stopped: by SIGUSR1"),
        (event("stopped"), "warn", "stopped: by a signal"),
        (event("failed", error="DataError: no\nrow"), "bad", "failed: DataError: no row"),
        (event("failed"), "bad", "failed: no reason recorded"),
        (event("diverged", loss=None, lr=0.00123456), "bad", "diverged: loss=None · lr=0.001235"),
        (event("finished"), "good", "finished"),
        (event("overflow", loss_scale=1024.0), "warn", "fp16 overflow, step skipped: loss_scale=1024"),
        (event("new_here", to_step=3, rows=[1, 9]), "warn", "new here: to_step=3 · rows=[1, 9]"),
        (event("rolled_back", reason="loss=9"), "warn", "went back: after step 7: loss=9"),
        (event("spike", action="skip", reason="loss=9"), "warn", "spike: skip: loss=9"),
        ({"kind": "event", "step": 1, "attempt": 1}, "warn", "an event without a name"),
        ({"kind": "eval", "step": 1, "eval_loss": 2.5}, "info", "evaluated: held-out loss 2.5000"),
        ({"kind": "eval", "step": 1, "eval_loss": None}, "info", "evaluated: held-out loss not finite"),
        ({"kind": "checkpoint", "step": 1}, "info", "checkpoint saved"),
        (
            {"kind": "checkpoint", "step": 1, "save_s": 65, "wait_s": None, "copy_s": 1.5},
            "info",
            "checkpoint saved: in 1:05, training waited 1.5 s",
        ),
    ],
)
def test_every_record_has_its_words(record, level, line):
    assert (told(record).level, told(record).line) == (level, line)


def test_an_error_of_a_page_is_cut():
    assert len(told(event("failed", error="x" * 10_000)).details) == 300


def test_text_of_a_run_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\nc\x07\u202ed") == "a?[2Jb c??d"
    assert "\x1b" not in told(event("x\x1b[31m", note="\x1b]0;title\x07")).line


def test_a_plan_record_is_routine():
    record = {"kind": "plan", "step": 5, "attempt": 1, "time": 1.0, "step_s_over_plan": 1.25}
    assert told(record).level == "info"
    assert told(record).line == "held against the plan: a step takes 1.25 of the plan's"
    assert told({"kind": "plan", "step": 0, "attempt": 1, "time": 1.0}).line == "held against the plan"
