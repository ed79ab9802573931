"""A number with how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """mid lies in [low, high]; what the ends mean is said where the interval is made."""

    low: float
    mid: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Times a factor above 0."""
        return Interval(low=self.low * factor, mid=self.mid * factor, high=self.high * factor)


def decades_between(more: float, less: float) -> float:
    """Powers of ten between two sizes; one decade from none to some."""
    if more <= less:
        return 0.0
    return math.log10(more / less) if less > 0 else 1.0
