"""One record reaches every reader, and a resume is held against what was done before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.metrics import read_lines
from llmtrain.tracking.recorder import RunRecorder


def recorder(folder: Path, *, attempt: int, start_step: int) -> RunRecorder:
    return RunRecorder(
        TrackingConfig(wandb=WandbMode.off),
        metrics=folder / "metrics.jsonl",
        attempt=attempt,
        start_step=start_step,
        total_steps=9,
        run_name="test",
        run_config={},
    )


def record_steps(folder: Path, losses: dict[int, float], *, attempt: int) -> None:
    first = min(losses)
    with recorder(folder, attempt=attempt, start_step=first - 1) as told:
        told.event("start" if attempt == 1 else "resume", first - 1)
        for step, loss in losses.items():
            told.step(step, loss=loss, lr=0.1, tokens_per_s=1.0, step_s=1.0)


@pytest.mark.parametrize(("again", "difference"), [(2.5, 0.0), (2.75, 0.25)])
def test_a_resume_tells_whether_replayed_losses_agree(
    tmp_path: Path, again: float, difference: float
) -> None:
    record_steps(tmp_path, {1: 3.0, 2: 2.5, 3: 2.0}, attempt=1)
    record_steps(tmp_path, {2: again, 3: 2.0, 4: 1.5}, attempt=2)
    verdicts = [line for line in read_lines(tmp_path / "metrics.jsonl") if line.get("what") == "replayed"]
    assert len(verdicts) == 1
    assert (verdicts[0]["first_step"], verdicts[0]["num_steps"]) == (2, 2)
    assert verdicts[0]["max_loss_difference"] == difference


def test_a_run_that_fails_says_why_in_its_metrics(tmp_path: Path) -> None:
    def fail() -> None:
        with recorder(tmp_path, attempt=1, start_step=0) as told:
            told.step(1, loss=1.0)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    last = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert (last["what"], last["error"], last["step"]) == ("failed", "ValueError: boom", 1)
