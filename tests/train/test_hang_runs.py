"""`llmtrain train` when a rank stops or is killed in the middle: the autopsy, the ends of all ranks, and the
next start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from data_folder import train_arguments, wait_for

from llmtrain.errors import EXIT_FAILED
from llmtrain.tracking.beats import beat_path, read_beat
from llmtrain.tracking.metrics import read_lines, read_metrics
from llmtrain.tracking.run_events import told

if TYPE_CHECKING:
    from conftest import Launcher

LIMITS = ("train.process_group_timeout_s=90", "train.hang_timeout_s=10")
FOREVER = ("train.total_tokens=100000000", "data.max_epochs=1000000")


def saved_step(folder: Path) -> int:
    """Of the newest checkpoint; 0: none yet."""
    path = folder / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return max((line["step"] for line in lines if line["kind"] == "checkpoint"), default=0)


def autopsy(folder: Path) -> dict[str, Any]:
    (found,) = folder.glob("hangs/*.json")
    verdict: dict[str, Any] = json.loads(found.read_text())
    return verdict


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        pytest.param(signal.SIGSTOP, "is stopped (SIGSTOP or a debugger)", marks=pytest.mark.slow),
        (signal.SIGKILL, "is gone without a word"),
    ],
)
def test_a_rank_that_stops_or_dies_is_named_and_the_run_goes_on_at_the_next_start(
    launcher: Launcher, data: Path, tmp_path: Path, number: int, reason: str
) -> None:
    folder = tmp_path / "run"
    arguments = train_arguments(data, folder, "run.intent=fresh_or_resume", *LIMITS)
    run = launcher.start([*arguments, *FOREVER], num_ranks=2)
    wait_for(lambda: saved_step(folder) > 0)
    os.kill(run.processes[1].pid, number)
    assert run.wait(60) == EXIT_FAILED, run.text()
    verdict = autopsy(folder)
    (odd,) = verdict["odd"]
    assert (odd["rank"], odd["pid"]) == (1, run.processes[1].pid)
    assert odd["reason"].startswith(reason)
    assert odd["rows"][0] == (odd["step"] - 1) * 8
    event = [line for line in read_lines(folder / "metrics.jsonl") if line.get("what") == "hang"][-1]
    assert told(event).level == "bad"
    assert odd["reason"] in told(event).details
    (capsule,) = folder.glob("capsules/*")
    assert capsule.name == f"step-{odd['step']:08d}-attempt-1.tar.zst"
    saved = saved_step(folder)
    status, text = launcher.run([*arguments, f"train.total_tokens={(saved + 4) * 256}"], num_ranks=2)
    assert status == 0, text
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == saved + 4
    last = read_beat(beat_path(folder / "ranks", 1))
    assert last is not None
    assert last.end == "well"
    assert len(list(folder.glob("hangs/*.json"))) == 1, "the second start was taken for a hang"


def test_ranks_are_compared_at_every_tracking_interval(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    more = ["train.total_tokens=12800", "data.max_epochs=9", "tracking.log_every_steps=2"]
    arguments = train_arguments(data, tmp_path / "run", *LIMITS, *more, "train.micro_batch_rows=1")
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == 0, text
    records = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "ranks"]
    assert records
    wanted = {"slowest_rank", "slowest_host", "compute_s_max", "compute_s_median", "data_s_max"}
    assert wanted <= records[0].keys()
