"""Rows that a run passes over on purpose: their file, and the arithmetic of positions around them.

`skipped_rows.json` in the run folder lists windows of positions. It is whole and on the disk before a run
acts on it, and holds for all that the run does from then on. A step takes the next rows that are in no
window: its batch is always full, for any batch size, and what it reads is still a function of where it
begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain import files
from llmtrain.errors import DataError
from llmtrain.loader.batch_sizes import BatchSizes

SKIPPED_NAME = "skipped_rows.json"


@dataclass(frozen=True, kw_only=True)
class SkippedWindow:
    """Positions `first` to `last`, both included, and why they are passed over."""

    first: int
    last: int
    step: int
    """The step that spiked."""
    attempt: int
    reason: str

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise DataError(f"a window of rows {self.first} to {self.last}: need 0 <= first <= last")


def read_skipped(path: Path) -> list[SkippedWindow]:
    """The windows in the file; none if it is not there.

    Raises:
        DataError: it is there and cannot be read.
    """
    if not path.exists():
        return []
    try:
        return [SkippedWindow(**each) for each in files.read_json(path)["windows"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; restore it: without it the run would take rows that it has "
            "decided to pass over"
        ) from error


def write_skipped(path: Path, windows: Sequence[SkippedWindow]) -> None:
    """Replace the file; it is on the disk on return."""
    files.write_json(path, {"windows": [asdict(each) for each in windows]})


@dataclass(frozen=True)
class PassedOver:
    """Ranges of positions that no step takes."""

    ranges: tuple[tuple[int, int], ...] = ()
    """First and last of each, rising, with at least one position between two of them."""

    @classmethod
    def of(cls, ranges: Iterable[Sequence[int]]) -> PassedOver:
        """Of [first, last] in any order, which may overlap."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((first, last) for first, last in ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], last)
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    @classmethod
    def of_windows(cls, windows: Iterable[SkippedWindow]) -> PassedOver:
        return cls.of((each.first, each.last) for each in windows)

    def next_position(self, position: int) -> int:
        """The first from `position` on that is not passed over: where the step begins that would there."""
        for first, last in self.ranges:
            if first <= position <= last:
                return last + 1
        return position

    def spans(self, position: int, num_rows: int) -> list[tuple[int, int]]:
        """The first `num_rows` positions from `position` on that are not passed over, as [first, last]. The
        next step begins after the last of them."""
        found = []
        position = self.next_position(position)
        for first, last in self.ranges:
            if first < position:
                continue
            if num_rows <= first - position:
                break
            found.append((position, first - 1))
            num_rows -= first - position
            position = last + 1
        if num_rows:
            found.append((position, position + num_rows - 1))
        return found

    def positions(self, position: int, num_rows: int) -> npt.NDArray[np.int64]:
        """`spans`, one by one."""
        return np.concatenate([np.arange(a, b + 1) for a, b in self.spans(position, num_rows)])

    def positions_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Those from `first` to `last` that are not passed over; one at least."""
        return self.positions(first, last + 1 - first - self.num_between(first, last))

    def num_between(self, first: int, last: int) -> int:
        """How many positions from `first` to `last` are passed over."""
        return sum(max(0, min(b, last) + 1 - max(a, first)) for a, b in self.ranges)

    def step_spans(self, position: int, sizes: BatchSizes) -> list[tuple[int, int]]:
        """The rows of the step that a run takes when it stands at `position`, as [first, last]."""
        first = self.next_position(position)
        return self.spans(first, sizes.rows_at(first))
