"""How many rows each step takes: a function of how many were taken before. stdlib only."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Rows a step, constant or rising in stages.

    A stage ends with the first step that reaches its bound, so every step has a whole size and begins where
    the one before it ended, whatever launched it.
    """

    starts: tuple[int, ...]
    """Position in rows at which each stage begins."""
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, ramp: Sequence[tuple[int, int]], rows: int) -> BatchSizes:
        """
        Args:
            ramp: (position up to which, rows a step), the positions rising.
            rows: a step's after that.
        """
        starts, sizes, at = [], [], 0
        for until, size in ramp:
            if until > at:
                starts.append(at)
                sizes.append(size)
                at += -(-(until - at) // size) * size
        return cls((*starts, at), (*sizes, rows))

    def rows_at(self, position: int) -> int:
        """Rows of the step that begins at `position`."""
        return self.sizes[bisect.bisect_right(self.starts, position) - 1]

    def steps_before(self, position: int) -> int:
        """Steps that begin before `position`."""
        steps = 0
        for start, end, size in zip(self.starts, (*self.starts[1:], None), self.sizes, strict=True):
            if position <= start:
                break
            steps += -(-((position if end is None else min(position, end)) - start) // size)
        return steps

    def position_of(self, step: int) -> int:
        """Position at which step number `step`, counted from 0, begins."""
        for start, end, size in zip(self.starts, (*self.starts[1:], None), self.sizes, strict=True):
            in_stage = None if end is None else (end - start) // size
            if in_stage is None or step < in_stage:
                return start + step * size
            step -= in_stage
        raise AssertionError("the last stage has no end")
