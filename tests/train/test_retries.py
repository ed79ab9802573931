"""The same failure at the same step, again and again."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.train.retries import SILENT, Failure, SameFailureError, check_retries, endings

Record = dict[str, Any]


def attempt(number: int, steps: range, *ending: Record) -> list[Record]:
    common = {"attempt": number}
    begin = {"kind": "event", "what": "resume", "step": steps.start - 1, **common}
    middle = [{"kind": "step", "step": step, **common} for step in steps]
    return [begin, *middle, *({"kind": "event", "step": steps.stop - 1, **common, **each} for each in ending)]


def failed(text: str) -> Record:
    return {"what": "failed", "error": text}


def test_endings_say_where_and_why_each_attempt_ended() -> None:
    records = [
        *attempt(1, range(1, 6), {"what": "diverged"}, failed("DivergedError: loss=nan")),
        *attempt(2, range(4, 7)),
        *attempt(3, range(4, 4)),
        *attempt(4, range(4, 9), {"what": "stopped", "signal": "SIGTERM"}),
    ]
    assert endings(records) == [Failure(5, "DivergedError: loss=nan"), Failure(6, SILENT), None, None]


def test_three_failures_alike_are_the_last() -> None:
    records: list[Record] = []
    for number in range(1, 4):
        check_retries(records, max_same_failures=3)
        records += attempt(
            number, range(1, 6), failed(f"RankFailedError: rank 1: process {1000 + number} died")
        )
    with pytest.raises(SameFailureError, match=r"last 3 attempts ended alike after step 5: .*died.*"):
        check_retries(records, max_same_failures=3)
    check_retries(records, max_same_failures=4)
    check_retries(records, max_same_failures=0)


def test_a_run_that_is_killed_at_one_step_three_times_is_not_started_again() -> None:
    records = [record for number in (1, 2, 3) for record in attempt(number, range(3, 6))]
    with pytest.raises(SameFailureError, match=r"step 5: it ended without a word.*run.max_same_failures=4"):
        check_retries(records, max_same_failures=3)


@pytest.mark.parametrize(
    "last",
    [
        attempt(3, range(1, 7), failed("DataError: x")),  # it came further
        attempt(3, range(1, 6), failed("DiskError: x")),  # another failure
        attempt(3, range(1, 6), {"what": "stopped", "signal": "SIGTERM"}),
        attempt(3, range(1, 1)),  # ended before it did anything: it may have been preempted
    ],
)
def test_other_endings_begin_to_count_anew(last: list[Record]) -> None:
    same = [r for number in (1, 2) for r in attempt(number, range(1, 6), failed("DataError: x"))]
    check_retries([*same, *last], max_same_failures=3)
