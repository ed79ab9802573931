"""What a ledger proves, and what contradicts it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.loader.ledger import (
    LEDGER_NAME,
    Attempt,
    Ledger,
    LedgerWriter,
    contradictions,
    hash_rows,
    read_ledger,
)

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
