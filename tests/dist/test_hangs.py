"""A rank of two stands still, leaves something out, or is gone: the others say so, with the reason, within
twice the time-out, and nobody is left alive. The engine, the collectives and the signals are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from ranks import REPOSITORY

from llmtrain.errors import EXIT_FAILED
from llmtrain.tracking.black_box import box_path
from llmtrain.tracking.metrics import read_lines

WORKER = Path(__file__).with_name("hang_worker.py")
VICTIM, FAULT_STEP, ROWS = 1, 4, 8
TIMEOUT_S, GIVE_UP_S = 10.0, 120.0
"""Of the watchdog, and of collectives: nothing may wait for those."""
OTHER_ENGINES = {"pipeline": {"pp_size": 2}, "accelerate": {"engine": "accelerate", "zero_stage": 0}}
FAULTS = ("sleeps", "skips", "raises", "is stopped", "is killed", "is stuck")
REASONS = {
    "sleeps": "is at step 4, micro-step 2, forward since",
    "skips": "called all_reduce of 5 elements in step 5, agree as collective",
    "raises": "left with an error: ValueError: the planted 7",
    "is stopped": "is stopped (SIGSTOP or a debugger)",
    "is killed": "is gone without a word",
    "is stuck": "runs no Python any more",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All cases, side by side; the folder with one run for each, and how their ranks ended."""
    folder = tmp_path_factory.mktemp("hangs")
    plan = {
        "folder": str(folder),
        "timeout_s": TIMEOUT_S,
        "limit_s": GIVE_UP_S,
        "victim": VICTIM,
        "fault_step": FAULT_STEP,
        "rows": ROWS,
        "cases": {fault: {"fault": fault} for fault in FAULTS}
        | {"works": {"fault": None}, "is slow": {"fault": "is slow"}}
        | {"alone": {"fault": "sleeps", "num_ranks": 1}}
        | {"rank 0": {"fault": "is stopped", "victim": 0}}
        | {engine: {"fault": "sleeps", "layout": layout} for engine, layout in OTHER_ENGINES.items()},
    }
    done = forked.script(WORKER, json.dumps(plan))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def autopsy(folder: Path) -> dict[str, Any]:
    (found,) = folder.glob("hangs/*.json")
    verdict: dict[str, Any] = json.loads(found.read_text())
    return verdict


def told(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_odd_rank_is_named_with_its_reason_in_time(ends: tuple[Path, dict[str, Any]], fault: str) -> None:
    folder, end = ends[0] / fault, ends[1][fault]
    verdict = autopsy(folder)
    (odd,) = verdict["odd"]
    assert odd["rank"] == VICTIM, told(folder)
    assert odd["reason"].startswith(REASONS[fault])
    assert "did not end" not in end["statuses"].values(), told(folder)
    assert 0 not in end["statuses"].values(), "a launcher would take that for the end of the run"
    assert end["last_s"] < 2 * TIMEOUT_S, told(folder)
    event = next(line for line in read_lines(folder / "metrics.jsonl") if line.get("what") == "hang")
    assert event["ranks"] == [VICTIM]
    assert odd["reason"] in event["error"]
    assert f"process {odd['pid']}" in told(folder)


def test_what_the_rank_was_at_is_told_to_the_last_instruction(ends: tuple[Path, dict[str, Any]]) -> None:
    for fault in ("sleeps", "raises", "is stopped", "is killed", "is stuck"):
        (odd,) = autopsy(ends[0] / fault)["odd"]
        assert (odd["step"], odd["micro_step"], odd["phase"]) == (FAULT_STEP, 2, "forward"), fault
        assert odd["rows"] == [(FAULT_STEP - 1) * ROWS, FAULT_STEP * ROWS - 1]


def test_the_others_say_what_they_wait_for(ends: tuple[Path, dict[str, Any]]) -> None:
    for fault in ("sleeps", "is stopped", "is stuck"):
        (wait,) = autopsy(ends[0] / fault)["waits"]
        assert wait.startswith("rank 0: in all_reduce of ")
        assert wait.endswith("where rank 1 did not come")


def test_the_stack_of_the_rank_ends_where_it_stands(ends: tuple[Path, dict[str, Any]]) -> None:
    for fault, line in (
        ("sleeps", "in sleep: time.sleep(FOREVER_S)"),
        ("raises", "in fail: raise ValueError"),
    ):
        (odd,) = autopsy(ends[0] / fault)["odd"]
        assert line in odd["stack"][-1]
    (text,) = (ends[0] / "is stuck").glob("hangs/*.txt")
    assert "in hold_interpreter" in text.read_text(), "it holds the interpreter, and is seen all the same"


def test_a_collective_left_out_is_the_first_difference(ends: tuple[Path, dict[str, Any]]) -> None:
    calls = autopsy(ends[0] / "skips")["difference"]["calls"]
    assert calls == {
        f"all_reduce of 2 elements in step {FAULT_STEP}, update": [0],
        f"all_reduce of 5 elements in step {FAULT_STEP + 1}, agree": [VICTIM],
    }


def test_a_pipeline_stage_that_sleeps_is_waited_for_by_its_neighbour(
    ends: tuple[Path, dict[str, Any]],
) -> None:
    verdict = autopsy(ends[0] / "pipeline")
    assert [odd["rank"] for odd in verdict["odd"]] == [VICTIM]
    assert "micro-step 1, forward since" in verdict["odd"][0]["reason"]
    assert verdict["waits"][0].startswith("rank 0: in ")
    assert verdict["waits"][0].endswith("with rank 1, where rank 1 did not come")
    assert ends[1]["pipeline"]["last_s"] < 2 * TIMEOUT_S


def test_what_ddp_waits_for_is_not_seen_and_the_rank_is_named_all_the_same(
    ends: tuple[Path, dict[str, Any]],
) -> None:
    verdict = autopsy(ends[0] / "accelerate")
    (odd,) = verdict["odd"]
    assert odd["rank"] == VICTIM
    assert "micro-step 2, forward since" in odd["reason"]
    assert "where others are at step 4, micro-step 2, backward" in odd["reason"]
    assert ends[1]["accelerate"]["last_s"] < 2 * TIMEOUT_S


def test_where_rank_0_is_stopped_the_next_one_judges(ends: tuple[Path, dict[str, Any]]) -> None:
    (odd,) = autopsy(ends[0] / "rank 0")["odd"]
    assert (odd["rank"], odd["reason"]) == (0, "is stopped (SIGSTOP or a debugger)")
    assert ends[1]["rank 0"]["statuses"] == {"0": -9, "1": EXIT_FAILED}
    assert ends[1]["rank 0"]["last_s"] < 2 * TIMEOUT_S


def test_one_process_that_stands_still_ends_with_its_stack(ends: tuple[Path, dict[str, Any]]) -> None:
    (odd,) = autopsy(ends[0] / "alone")["odd"]
    assert odd["reason"].startswith(f"stands still at step {FAULT_STEP}, micro-step 2, forward since")
    assert "time.sleep(FOREVER_S)" in odd["stack"][-1]
    assert ends[1]["alone"]["statuses"] == {"0": EXIT_FAILED}
    assert ends[1]["alone"]["last_s"] < 2 * TIMEOUT_S


def test_the_flight_recorder_is_dumped(ends: tuple[Path, dict[str, Any]]) -> None:
    record = ends[0] / "sleeps" / "hangs" / "flight-1" / "rank_0"
    assert b"gloo:all_reduce" in record.read_bytes()


def test_a_run_that_works_is_left_alone_and_leaves_no_box(ends: tuple[Path, dict[str, Any]]) -> None:
    folder = ends[0] / "works"
    assert ends[1]["works"]["statuses"] == {"0": 0, "1": 0}, told(folder)
    assert not (folder / "hangs").exists()
    for fault in (*FAULTS, "works"):
        for rank in (0, 1):
            assert not box_path(ends[0] / fault / "ranks", rank).exists(), (fault, rank)


def test_a_rank_that_is_stopped_or_stuck_is_killed_by_those_that_leave(
    ends: tuple[Path, dict[str, Any]],
) -> None:
    for fault in ("is stopped", "is stuck"):
        assert ends[1][fault]["statuses"] == {"0": EXIT_FAILED, "1": -9}


def test_a_slow_rank_is_called_a_straggler(ends: tuple[Path, dict[str, Any]]) -> None:
    folder = ends[0] / "is slow"
    assert ends[1]["is slow"]["statuses"] == {"0": 0, "1": 0}, told(folder)
    found = json.loads((folder / "stragglers.json").read_text())
    assert [each["rank"] for each in found["stragglers"]] == [VICTIM]
    assert found["stragglers"][0]["phase"] == "forward"
    assert all(record["slowest_rank"] == VICTIM for record in found["records"])
    for record in found["records"]:
        assert record["slower"] > 0.15
        assert record["compute_s_max"] > 2 * 0.3, "two micro batches"
        assert record["compute_s_max"] > record["compute_s_median"]
    assert f"rank {VICTIM} on " in told(folder)
