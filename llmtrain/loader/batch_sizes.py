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

    def walk(self, position: int, until: int) -> tuple[int, int]:
        """(steps from `position` on until `until` is reached, where the last of them ends)."""
        steps = 0
        while position < until:
            stage = bisect.bisect_right(self.starts, position) - 1
            end = min([until, *self.starts[stage + 1 : stage + 2]])
            more = -(-(end - position) // self.sizes[stage])
            steps += more
            position += more * self.sizes[stage]
        return steps, position
