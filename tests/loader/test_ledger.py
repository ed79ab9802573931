"""What a ledger proves, and what contradicts it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import inspect_ledger
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import DataError
from llmtrain.loader.ledger import (
    LEDGER_NAME,
    Attempt,
    Ledger,
    LedgerWriter,
    Step,
    contradictions,
    hash_rows,
    read_ledger,
)
from llmtrain.loader.skipped import PassedOver

TOKENS = np.random.default_rng(0).integers(0, 50_000, (400, 16))


def attempt(number: int, *, step: int = 0, position: int = 0, **changes: Any) -> Attempt:
    values = {
        "attempt": number, "step": step, "position": position, "world_size": 2, "micro_batch_rows": 2,
        "seq_len": 16, "seed": 0, "starts": [0, 12], "sizes": [4, 8], "data_hash": "d",
    }  # fmt: skip
    return Attempt(**(values | changes))


def do_steps(path: Path, start: Attempt, count: int) -> None:
    writer = LedgerWriter(path, start)
    position, step = start.position, start.step
    for _ in range(count):
        size = start.batch_sizes.rows_at(position)
        step += 1
        writer.step(
            step,
            first=position,
            last=position + size - 1,
            tokens_hash=hash_rows(position, TOKENS[position : position + size]),
        )
        position += size
    writer.sync()
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five steps, then a restart after the second that does six."""
    path = tmp_path / LEDGER_NAME
    do_steps(path, attempt(1), 5)
    do_steps(path, attempt(2, step=2, position=8, world_size=3), 6)
    return path


def test_hashes_of_parts_add_up_and_see_every_token_and_place() -> None:
    whole = hash_rows(7, TOKENS[:6])
    parts = [hash_rows(7 + first, TOKENS[first : first + 2]) for first in (0, 2, 4)]
    assert sum(parts) % 2**64 == whole
    assert hash_rows(8, TOKENS[:6]) != whole
    assert hash_rows(7, TOKENS[[1, 0, 2, 3, 4, 5]]) != whole
    changed = TOKENS[:6].copy()
    changed[3, 9] += 1
    assert hash_rows(7, changed) != whole


def test_a_run_with_restarts_is_one_chain(path: Path) -> None:
    ledger = read_ledger(path)
    assert list(contradictions(ledger)) == []
    chain = ledger.surviving()
    assert [step.step for step in chain] == list(range(1, 9))
    assert [step.attempt for step in chain] == [1, 1, 2, 2, 2, 2, 2, 2]
    rows = [row for step in chain for row in range(step.first, step.last + 1)]
    assert rows == list(range(52))
    assert ledger.last_of(3)[1].world_size == 3
    with pytest.raises(DataError, match="step 9 is not in the ledger; steps there: 1 to 8"):
        ledger.last_of(9)


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_line_that_a_kill_tore_is_counted_and_harms_nothing(path: Path, cut: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    ledger = read_ledger(path)
    assert ledger.num_torn == (1 if 1 < cut < content[::-1].index(b"\n", 1) else ledger.num_torn)
    assert list(contradictions(ledger)) == []
    done = ledger.surviving()[-1]
    do_steps(path, attempt(3, step=done.step, position=done.last + 1), 3)
    again = read_ledger(path)
    assert list(contradictions(again)) == []
    assert [step.step for step in again.surviving()] == list(range(1, done.step + 4))


def test_what_does_not_fit_is_named(path: Path) -> None:
    ledger = read_ledger(path)

    def told(attempts: list[Attempt] | None = None, **changed: Any) -> str:
        steps = list(ledger.steps)
        if changed:
            at = changed.pop("at")
            steps[at] = replace(steps[at], **changed)
        return "; ".join(contradictions(Ledger(attempts or ledger.attempts, steps)))

    first, second = ledger.attempts
    assert "step 4 of attempt 1 took rows 13 to 19; next was step 4 with rows 12 to 19" in told(
        at=3, first=13
    )
    assert "step 9 of attempt 2 took rows 44 to 51; next was step 8" in told(at=10, step=9)
    assert "step 3 was done by attempts 1 and 2 on rows 8 to 11, with other tokens: 00 and" in told(
        at=2, hash="00"
    )
    late = replace(second, position=9)
    assert "attempt 2 starts at row 9, but step 2 ended with row 7" in told([first, late])
    ahead = replace(second, step=7, position=44)
    assert "attempt 2 starts after step 7, which the run had not come to" in told([first, ahead])
    other = replace(second, data_hash="e")
    assert "attempt 2 has another data_hash than the one before: e, not d" in told([first, other])
    assert told([first, replace(other, accepted_change=True)]) == ""
    assert list(contradictions(Ledger())) == ["there is no attempt in it"]


def test_a_ledger_that_cannot_be_read_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ledger.jsonl does not exist: the run has done no step yet"):
        read_ledger(tmp_path / "no" / LEDGER_NAME)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(DataError, match="line 2 cannot be read, and no restart follows it"):
        read_ledger(path)


def test_a_chain_that_fell_back_cannot_be_joined_further_on(tmp_path: Path) -> None:
    """Attempt 1 came to step 6, attempt 2 went back to 2 and came to 3; a third cannot begin after 6."""
    path = tmp_path / LEDGER_NAME
    do_steps(path, attempt(1), 6)
    do_steps(path, attempt(2, step=2, position=8), 1)
    do_steps(path, attempt(3, step=6, position=36), 1)
    assert list(contradictions(read_ledger(path))) == [
        "attempt 3 starts after step 6, which the run had not come to"
    ]


def test_two_torn_lines_in_a_row_are_read_over(path: Path) -> None:
    whole = read_ledger(path)
    with open(path, "ab") as handle:
        handle.write(b'{"kind": "step", "att\n{"kind": "attem')
    ledger = read_ledger(path)
    assert ledger.num_torn == 2
    assert ledger.steps == whole.steps


def test_a_disk_that_refuses_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LedgerWriter(tmp_path / LEDGER_NAME, attempt(1))

    class Full:
        def write(self, _text: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with writer._handle:
        monkeypatch.setattr(writer, "_handle", Full())
        writer.step(1, first=0, last=3, tokens_hash=1)
        assert "No space left on device; make room, and resume" in str(writer.failure)
        writer.step(2, first=4, last=7, tokens_hash=1)
    assert read_ledger(tmp_path / LEDGER_NAME).steps == []


def test_a_step_whose_attempt_is_missing_is_named(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"kind": "attempt", "attempt": 2' not in line))
    with pytest.raises(DataError, match="line 7: a step of attempt 2, whose own line is not there"):
        read_ledger(path)


# -- rows that were passed over, and updates that were withheld


def go_on(writer: LedgerWriter, start: Attempt, count: int, *, withheld: Collection[int] = ()) -> int:
    """Do steps from where `start` says; return the position after them."""
    position, step = start.position, start.step
    for _ in range(count):
        spans = start.passed_over.step_spans(position, start.batch_sizes)
        rows = np.concatenate([np.arange(first, last + 1) for first, last in spans])
        step += 1
        writer.step(
            step,
            first=int(rows[0]),
            last=int(rows[-1]),
            tokens_hash=hash_rows(rows, TOKENS[rows]),
            withheld=step in withheld,
        )
        position = int(rows[-1]) + 1
    return position


@pytest.fixture
def rolled_back(tmp_path: Path) -> Path:
    """Step 5, rows 20 to 27, spikes; the run goes back to step 3 and passes over them, does four steps, of
    which it withholds the sixth, and resumes on other ranks with a smaller batch that a window cuts."""
    path = tmp_path / LEDGER_NAME
    start = attempt(1)
    writer = LedgerWriter(path, start)
    go_on(writer, start, 5)
    window = PassedOver.of([(20, 27)])
    writer.roll_back(step=3, position=12, skipped=window)
    again = replace(start, part=1, step=3, position=12, skipped=[[20, 27]])
    position = go_on(writer, again, 4, withheld={6})
    writer.close()
    assert position == 52
    more = attempt(2, step=7, position=52, world_size=3, sizes=[6, 6], skipped=[[20, 27], [55, 60], [64, 64]])
    writer = LedgerWriter(path, more)
    go_on(writer, more, 3)
    writer.close()
    return path


def test_a_rollback_with_a_window_is_one_chain(rolled_back: Path) -> None:
    ledger = read_ledger(rolled_back)
    assert list(contradictions(ledger)) == []
    chain = ledger.surviving()
    assert [(step.step, step.first, step.last) for step in chain] == [
        (1, 0, 3),
        (2, 4, 7),
        (3, 8, 11),
        (4, 12, 19),
        (5, 28, 35),
        (6, 36, 43),
        (7, 44, 51),
        (8, 52, 63),
        (9, 65, 70),
        (10, 71, 76),
    ]
    assert [step.step for step in chain if step.withheld] == [6]
    assert ledger.skipped_rows() == 8 + 6 + 1
    taken = [row for step in chain for row in ledger.positions_of(step).tolist()]
    passed = [*range(20, 28), *range(55, 61), 64]
    assert taken == [row for row in range(77) if row not in passed]
    assert ledger.positions_of(ledger.steps[4]).tolist() == passed[:8], "the step that spiked"
    assert [each.name for each in ledger.attempts] == [
        "attempt 1",
        "attempt 1, after rollback 1",
        "attempt 2",
    ]


def test_a_step_is_found_by_its_number_its_rows_or_its_attempt(rolled_back: Path) -> None:
    ledger = read_ledger(rolled_back)

    def first(step: int | None = None, **asked: int) -> tuple[int, int, int]:
        found, start = ledger.last_of(step, **asked)
        assert (start.attempt, start.part) == (found.attempt, found.part)
        return found.step, found.first, found.part

    assert first(5) == (5, 28, 1), "as it stands now"
    assert first(5, position=20) == first(position=27) == (5, 20, 0), "as it spiked"
    assert first(position=12) == (4, 12, 1), "done again on the same rows"
    assert first(8, attempt=2) == first(position=61) == (8, 52, 0)
    with pytest.raises(DataError, match="position 57 is not in the ledger; steps there: 1 to 10"):
        ledger.last_of(position=57)
    with pytest.raises(DataError, match="step 8, attempt 1 is not in the ledger"):
        ledger.last_of(8, attempt=1)


@pytest.mark.parametrize("cut", range(1, 700, 13))
def test_a_ledger_with_a_rollback_can_be_cut_anywhere(rolled_back: Path, cut: int) -> None:
    content = rolled_back.read_bytes()
    rolled_back.write_bytes(content[:-cut])
    assert list(contradictions(read_ledger(rolled_back))) == []


def test_rows_that_are_missing_without_a_window_or_taken_in_spite_of_one_are_named(rolled_back: Path) -> None:
    ledger = read_ledger(rolled_back)

    def told(attempts: list[Attempt], steps: list[Step] | None = None) -> str:
        return "; ".join(contradictions(Ledger(attempts, steps or ledger.steps)))

    first, again, second = ledger.attempts
    assert (
        "step 5 of attempt 1, after rollback 1 took rows 28 to 35; next was step 5 with rows 20 to 27"
        in told([first, replace(again, skipped=[]), second])
    )
    assert "attempt 2 takes rows 20 to 27 again, which the run had passed over" in told(
        [first, again, replace(second, skipped=[[55, 60], [64, 64]])]
    )
    assert "step 8 of attempt 2 took rows 52 to 63; next was step 8 with rows 52 to 57" in told(
        [first, again, replace(second, skipped=[[20, 27], [64, 64]])]
    )
    steps = [replace(each, hash="00") if each.step == 4 and each.part == 1 else each for each in ledger.steps]
    assert "step 4 was done by attempts 1 and 1 on rows 12 to 19, with other tokens" in told(
        ledger.attempts, steps
    )
    assert "attempt 2 starts at row 54, but step 7 ended with row 51" in told(
        [first, again, replace(second, position=54)]
    )


def test_an_attempt_may_begin_behind_a_window_that_comes_next(tmp_path: Path) -> None:
    """A checkpoint is saved where the next step begins."""
    path = tmp_path / LEDGER_NAME
    start = attempt(1, skipped=[[4, 7]])
    writer = LedgerWriter(path, start)
    assert go_on(writer, start, 1) == 4
    writer.close()
    later = attempt(2, step=1, position=8, skipped=[[4, 7]])
    writer = LedgerWriter(path, later)
    assert go_on(writer, later, 1) == 12
    writer.close()
    ledger = read_ledger(path)
    assert list(contradictions(ledger)) == []
    assert ledger.skipped_rows() == 4


def test_a_ledger_from_before_there_were_rollbacks_is_read(path: Path) -> None:
    old = {"part", "skipped", "withheld"}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k not in old}) + "\n" for line in lines)
    )
    ledger = read_ledger(path)
    assert list(contradictions(ledger)) == []
    assert ledger.skipped_rows() == 0


# -- llmtrain inspect ledger


def test_rows_that_were_passed_over_and_withheld_steps_are_counted_apart(
    rolled_back: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_ledger.show(inspect_ledger.InspectLedgerConfig(run=str(rolled_back.parent)))
    text = capsys.readouterr().out
    assert (
        "steps 1 to 10 took rows 0 to 76, each once, but 15 that were passed over; 2 steps were undone by "
        "restarts and rollbacks" in text
    )
    assert "passed over on purpose (skipped_rows.json says why): rows 20 to 27, 55 to 60, 64 to 64" in text
    assert "1 steps read their rows and updated nothing: 6" in text
    assert " 1.1 " in text
    cfg = inspect_ledger.InspectLedgerConfig(run=str(rolled_back.parent), format=OutputFormat.json)
    inspect_ledger.show(cfg)
    told = json.loads(capsys.readouterr().out)
    assert (told["num_steps"], told["num_rows"], told["num_skipped_rows"]) == (10, 62, 15)
    assert (told["withheld_steps"], told["problems"]) == ([6], [])


def test_a_run_that_passed_nothing_over_says_nothing_of_it(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_ledger.show(inspect_ledger.InspectLedgerConfig(run=str(path.parent)))
    text = capsys.readouterr().out
    assert "steps 1 to 8 took rows 0 to 51, each once; 3 steps were undone" in text
    assert "passed over" not in text
    assert "updated nothing" not in text
