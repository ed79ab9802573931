"""The ledger: which rows each step took, and a hash of their tokens, line by line as the run goes.

`ledger.jsonl` in the run folder has a line when a process group starts or resumes (an attempt), with where it
starts and all that decides which row is where, and a line after every step. The hash of a step is a sum over
its rows, so it is the same for any number of ranks and any micro batch, and ranks' parts just add up. Read
as a whole, the lines prove that a run with all its restarts took every row of its order once, but those that
it passed over on purpose. A rollback begins another part of the attempt, with a line like an attempt's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.errors import DataError, DiskError
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.skipped import PassedOver

LEDGER_NAME = "ledger.jsonl"
MASK_64 = 2**64 - 1
ATTEMPT_BEGINS = b'{"kind": "attempt"'

Int64 = npt.NDArray[np.int64]


def hash_rows(positions: int | Int64, tokens: Int64) -> int:
    """Sum modulo 2^64 of xxh3_64 of each row: its position (u64) and its tokens (u32), little endian.

    Args:
        positions: of these rows, or of the first, if the others follow it.
        tokens: [rows, seq_len].
    """
    total = 0
    at = np.asarray(positions, dtype=np.int64)
    if at.ndim == 0:
        at = at + np.arange(len(tokens))
    for position, row in zip(at.tolist(), tokens.astype("<u4"), strict=True):
        digest = xxhash.xxh3_64(position.to_bytes(8, "little"))
        digest.update(row.data)
        total += digest.intdigest()
    return total & MASK_64


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A start of the run's processes, or where they began again after a rollback."""

    attempt: int
    step: int
    """Steps done before."""
    position: int
    """Rows consumed before."""
    world_size: int
    micro_batch_rows: int
    seq_len: int
    seed: int
    starts: list[int]
    """BatchSizes.starts."""
    sizes: list[int]
    data_hash: str
    """Of all that decides rows and their order but the seed."""
    accepted_change: bool = False
    """Whether the user said that other data than before is meant."""
    dp_size: int | None = None
    """Ranks that read other rows than each other; None: of an older version, which did not note it."""
    part: int = 0
    """Rollbacks of this attempt before."""
    skipped: list[list[int]] = field(default_factory=list)
    """Positions that are passed over from here on, as [first, last]."""

    @property
    def batch_sizes(self) -> BatchSizes:
        return BatchSizes(tuple(self.starts), tuple(self.sizes))

    @property
    def passed_over(self) -> PassedOver:
        return PassedOver.of(self.skipped)

    @property
    def name(self) -> str:
        after = f", after rollback {self.part}" if self.part else ""
        return f"attempt {self.attempt}{after}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was done."""

    attempt: int
    step: int
    """From 1."""
    first: int
    """Position of its first row."""
    last: int
    """Of its last row."""
    hash: str
    """Of their tokens, 16 hex digits."""
    part: int = 0
    """Of the attempt."""
    withheld: bool = False
    """Whether the rows were read and nothing was updated."""


class LedgerWriter:
    """Append to a run's ledger. A torn last line, which a kill can leave, is ended first.

    A disk that refuses is kept in `failure`: a rank that left in the middle of a step would leave the others
    waiting, so the loop asks before the next one.
    """

    def __init__(self, path: Path, attempt: Attempt) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed in close()
        self.path = path
        self._attempt = attempt
        self.failure: DiskError | None = None
        end = self._handle.seek(0, os.SEEK_END)
        self._handle.seek(max(0, end - 1))
        torn = self._handle.read(1) not in (b"", b"\n")
        self._write({"kind": "attempt", **asdict(attempt)}, before=b"\n" if torn else b"")

    def step(self, step: int, *, first: int, last: int, tokens_hash: int, withheld: bool = False) -> None:
        """Note a step that is done."""
        entry = Step(
            attempt=self._attempt.attempt,
            part=self._attempt.part,
            step=step,
            first=first,
            last=last,
            hash=f"{tokens_hash:016x}",
            withheld=withheld,
        )
        self._write({"kind": "step", **asdict(entry)})

    def roll_back(self, *, step: int, position: int, skipped: PassedOver) -> None:
        """Note that the run goes on after `step` again, at row `position`, and what it passes over; on the
        disk on return."""
        ranges = [[first, last] for first, last in skipped.ranges]
        self._attempt = replace(
            self._attempt, part=self._attempt.part + 1, step=step, position=position, skipped=ranges
        )
        self._write({"kind": "attempt", **asdict(self._attempt)})
        self.sync()

    def sync(self) -> None:
        """Make the lines durable, before a checkpoint says that their steps were done."""
        try:
            os.fsync(self._handle.fileno())
        except OSError as error:
            self._keep(error)

    def close(self) -> None:
        self._handle.close()

    def _write(self, line: dict[str, Any], before: bytes = b"") -> None:
        if self.failure is not None:
            return
        text = before + json.dumps(line).encode() + b"\n"
        try:
            written = self._handle.write(text)
            while written < len(text):
                written += self._handle.write(text[written:])
        except OSError as error:
            self._keep(error)

    def _keep(self, error: OSError) -> None:
        self.failure = self.failure or DiskError(
            f"{self.path} cannot be written: {error.strerror}; make room, and resume from the last checkpoint"
        )


@dataclass
class Ledger:
    """A ledger as it was read."""

    attempts: list[Attempt] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    """In the order of the file: steps that were done twice are there twice."""
    num_torn: int = 0
    """Lines that a kill cut off."""

    def by_attempt(self) -> list[tuple[Attempt, list[Step]]]:
        """Every attempt, and every part of one, with the steps that it did."""
        steps: dict[tuple[int, int], list[Step]] = {(each.attempt, each.part): [] for each in self.attempts}
        for step in self.steps:
            steps[step.attempt, step.part].append(step)
        return [(each, steps[each.attempt, each.part]) for each in self.attempts]

    def surviving(self) -> list[Step]:
        """The steps of the run as it is now: of a step done twice the last."""
        kept: dict[int, Step] = {}
        for attempt, steps in self.by_attempt():
            if steps or attempt.part:
                kept = {number: old for number, old in kept.items() if number <= attempt.step}
                kept |= {step.step: step for step in steps}
        return [kept[number] for number in sorted(kept)]

    def skipped_rows(self) -> int:
        """How many rows the run as it is now has passed over."""
        starts = {(each.attempt, each.part): each for each in self.attempts}
        total, position = 0, 0
        for step in self.surviving():
            total += starts[step.attempt, step.part].passed_over.num_between(position, step.last)
            position = step.last + 1
        return total

    def positions_of(self, step: Step) -> Int64:
        """Every row that the step took."""
        start = next(each for each in self.attempts if (each.attempt, each.part) == (step.attempt, step.part))
        return start.passed_over.positions_between(step.first, step.last)

    def last_of(
        self, step: int | None = None, *, position: int | None = None, attempt: int | None = None
    ) -> tuple[Step, Attempt]:
        """The step as it was done last, and the attempt that did it.

        Args:
            step: its number; None: any.
            position: of a row that it took; None: any. After a rollback two steps of one number have other
                rows.
            attempt: that did it; None: any.
        """
        starts = {(each.attempt, each.part): each for each in self.attempts}
        for entry in reversed(self.steps):
            start = starts[entry.attempt, entry.part]
            has_row = position is None or (
                entry.first <= position <= entry.last
                and start.passed_over.next_position(position) == position
            )
            if step in (None, entry.step) and attempt in (None, entry.attempt) and has_row:
                return entry, start
        asked = {"step": step, "position": position, "attempt": attempt}
        told = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        known = [entry.step for entry in self.steps]
        there = f"{min(known)} to {max(known)}" if known else "none"
        raise DataError(f"{told} is not in the ledger; steps there: {there}")


def read_ledger(path: Path) -> Ledger:
    """Read a run's ledger.

    Raises:
        DataError: there is none, or a line that is no torn one cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: the run has done no step yet, or this is no run folder")
    ledger = Ledger()
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except ValueError:
            following = next((later for later in lines[number:] if later), ATTEMPT_BEGINS)
            if following[: len(ATTEMPT_BEGINS)] == ATTEMPT_BEGINS[: len(following)]:  # which may be torn, too
                ledger.num_torn += 1
                continue
            raise DataError(
                f"{path}, line {number} cannot be read, and no restart follows it: {line[:80]!r}"
            ) from None
        kind = value.pop("kind")
        if kind == "attempt":
            ledger.attempts.append(Attempt(**value))
            continue
        step = Step(**value)
        ledger.steps.append(step)
        begun = ((each.attempt, each.part) for each in reversed(ledger.attempts))
        if (step.attempt, step.part) not in begun:
            part = f", part {step.part}" if step.part else ""
            raise DataError(
                f"{path}, line {number}: a step of attempt {step.attempt}{part}, whose own line is not "
                "there; restore the file"
            )
    return ledger


def contradictions(ledger: Ledger) -> Iterator[str]:
    """What in a ledger does not fit together, a sentence each. Nothing: every row of the order was taken
    once, up to the last step, or passed over as the ledger says.
    """
    if not ledger.attempts:
        yield "there is no attempt in it"
        return
    chain: dict[int, Step] = {}
    """The run as it is after each attempt."""
    done: dict[int, tuple[Step, list[tuple[int, int]]]] = {}
    """Whatever was done, whether it stands or not, and its rows."""
    last: Attempt | None = None
    for attempt, steps in ledger.by_attempt():
        who, passed_over = attempt.name, attempt.passed_over
        before = chain.get(attempt.step)
        if attempt.step != 0 and before is None:
            yield f"{who} starts after step {attempt.step}, which the run had not come to"
        elif before is not None and not _follows(passed_over, before.last + 1, attempt.position):
            yield (
                f"{who} starts at row {attempt.position:,}, but step {attempt.step} ended with row "
                f"{before.last:,}"
            )
        elif attempt.step == 0 and not _follows(passed_over, 0, attempt.position):
            yield f"{who} starts at row {attempt.position:,} without a step before it"
        chain = {number: step for number, step in chain.items() if number <= attempt.step}
        if last is not None:
            if not attempt.accepted_change:
                for name in ("seq_len", "seed", "data_hash"):
                    old, new = getattr(last, name), getattr(attempt, name)
                    if old != new:
                        yield f"{who} has another {name} than the one before: {new}, not {old}"
            for begin, end in last.passed_over.ranges:
                if passed_over.num_between(begin, end) < end + 1 - begin:
                    yield f"{who} takes rows {begin:,} to {end:,} again, which the run had passed over"
        last = attempt
        position, number = attempt.position, attempt.step
        for step in steps:
            spans = passed_over.step_spans(position, attempt.batch_sizes)
            first, end = spans[0][0], spans[-1][1]
            if (step.step, step.first, step.last) != (number + 1, first, end):
                yield (
                    f"step {step.step} of {who} took rows {step.first:,} to {step.last:,}; next was step "
                    f"{number + 1} with rows {first:,} to {end:,}"
                )
            old_step, old_spans = done.get(step.step, (None, None))
            if (
                old_step is not None
                and old_spans == spans
                and old_step.hash != step.hash
                and not attempt.accepted_change
            ):
                yield (
                    f"step {step.step} was done by attempts {old_step.attempt} and {step.attempt} on rows "
                    f"{step.first:,} to {step.last:,}, with other tokens: {old_step.hash} and {step.hash}"
                )
            chain[step.step], done[step.step] = step, (step, spans)
            position, number = step.last + 1, step.step


def _follows(passed_over: PassedOver, position: int, start: int) -> bool:
    """Whether a run that stands at `position` may go on at `start`: there, or after rows that it passes
    over."""
    return start == position or start == passed_over.next_position(position)
