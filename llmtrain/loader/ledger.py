"""The ledger: which rows each step took, and a hash of their tokens, line by line as the run goes.

`ledger.jsonl` in the run folder has a line when a process group starts or resumes (an attempt), with where it
starts and all that decides which row is where, and a line after every step. The hash of a step is a sum over
its rows, so it is the same for any number of ranks and any micro batch, and ranks' parts just add up. Read
as a whole, the lines prove that a run with all its restarts took every row of its order once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.errors import DataError, DiskError
from llmtrain.loader.batch_sizes import BatchSizes

LEDGER_NAME = "ledger.jsonl"
MASK_64 = 2**64 - 1
ATTEMPT_BEGINS = b'{"kind": "attempt"'

Int64 = npt.NDArray[np.int64]


def hash_rows(first: int, tokens: Int64) -> int:
    """Sum modulo 2^64 of xxh3_64 of each row: its position (u64) and its tokens (u32), little endian.

    Args:
        first: position of the first of these rows; the others follow.
        tokens: [rows, seq_len].
    """
    total = 0
    for number, row in enumerate(tokens.astype("<u4")):
        digest = xxhash.xxh3_64((first + number).to_bytes(8, "little"))
        digest.update(row.data)
        total += digest.intdigest()
    return total & MASK_64


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A start of the run's processes."""

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

    @property
    def batch_sizes(self) -> BatchSizes:
        return BatchSizes(tuple(self.starts), tuple(self.sizes))


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


class LedgerWriter:
    """Append to a run's ledger. A torn last line, which a kill can leave, is ended first.

    A disk that refuses is kept in `failure`: a rank that left in the middle of a step would leave the others
    waiting, so the loop asks before the next one.
    """

    def __init__(self, path: Path, attempt: Attempt) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed in close()
        self.path = path
        self.attempt = attempt.attempt
        self.failure: DiskError | None = None
        end = self._handle.seek(0, os.SEEK_END)
        self._handle.seek(max(0, end - 1))
        torn = self._handle.read(1) not in (b"", b"\n")
        self._write({"kind": "attempt", **asdict(attempt)}, before=b"\n" if torn else b"")

    def step(self, step: int, *, first: int, last: int, tokens_hash: int) -> None:
        """Note a step that is done."""
        entry = Step(attempt=self.attempt, step=step, first=first, last=last, hash=f"{tokens_hash:016x}")
        self._write({"kind": "step", **asdict(entry)})

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
        """Every attempt with the steps that it did."""
        steps: dict[int, list[Step]] = {attempt.attempt: [] for attempt in self.attempts}
        for step in self.steps:
            steps[step.attempt].append(step)
        return [(attempt, steps[attempt.attempt]) for attempt in self.attempts]

    def surviving(self) -> list[Step]:
        """The steps of the run as it is now: of a step done twice the last."""
        kept: dict[int, Step] = {}
        for attempt, steps in self.by_attempt():
            if steps:
                kept = {number: old for number, old in kept.items() if number <= attempt.step}
                kept |= {step.step: step for step in steps}
        return [kept[number] for number in sorted(kept)]

    def last_of(self, step: int) -> tuple[Step, Attempt]:
        """The step as it was done last, and the attempt that did it."""
        for entry in reversed(self.steps):
            if entry.step == step:
                return entry, next(each for each in self.attempts if each.attempt == entry.attempt)
        known = [entry.step for entry in self.steps]
        told = f"{min(known)} to {max(known)}" if known else "none"
        raise DataError(f"step {step} is not in the ledger; steps there: {told}")


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
        ledger.steps.append(Step(**value))
        if all(ledger.steps[-1].attempt != attempt.attempt for attempt in reversed(ledger.attempts)):
            raise DataError(
                f"{path}, line {number}: a step of attempt {ledger.steps[-1].attempt}, whose own line is not "
                "there; restore the file"
            )
    return ledger


def contradictions(ledger: Ledger) -> Iterator[str]:
    """What in a ledger does not fit together, a sentence each. Nothing: every row of the order was taken
    once, up to the last step.
    """
    if not ledger.attempts:
        yield "there is no attempt in it"
        return
    chain: dict[int, Step] = {}
    """The run as it is after each attempt."""
    done: dict[int, Step] = {}
    """Whatever was done, whether it stands or not."""
    last: Attempt | None = None
    for attempt, steps in ledger.by_attempt():
        who = f"attempt {attempt.attempt}"
        before = chain.get(attempt.step)
        if attempt.step != 0 and before is None:
            yield f"{who} starts after step {attempt.step}, which the run had not come to"
        elif before is not None and before.last + 1 != attempt.position:
            yield (
                f"{who} starts at row {attempt.position:,}, but step {attempt.step} ended with row "
                f"{before.last:,}"
            )
        elif attempt.step == 0 and attempt.position != 0:
            yield f"{who} starts at row {attempt.position:,} without a step before it"
        chain = {number: step for number, step in chain.items() if number <= attempt.step}
        if last is not None and not attempt.accepted_change:
            for name in ("seq_len", "seed", "data_hash"):
                old, new = getattr(last, name), getattr(attempt, name)
                if old != new:
                    yield f"{who} has another {name} than the one before: {new}, not {old}"
        last = attempt
        position, number = attempt.position, attempt.step
        for step in steps:
            end = position + attempt.batch_sizes.rows_at(position) - 1
            if (step.step, step.first, step.last) != (number + 1, position, end):
                yield (
                    f"step {step.step} of {who} took rows {step.first:,} to {step.last:,}; next was step "
                    f"{number + 1} with rows {position:,} to {end:,}"
                )
            old_step = done.get(step.step)
            is_again = old_step is not None and (old_step.first, old_step.last) == (step.first, step.last)
            if (
                old_step is not None
                and is_again
                and old_step.hash != step.hash
                and not attempt.accepted_change
            ):
                yield (
                    f"step {step.step} was done by attempts {old_step.attempt} and {step.attempt} on rows "
                    f"{step.first:,} to {step.last:,}, with other tokens: {old_step.hash} and {step.hash}"
                )
            chain[step.step] = done[step.step] = step
            position, number = step.last + 1, step.step
