"""What a rule is: a number made of signals, a bound from the settings, and where both were published."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Bound(StrEnum):
    """What the setting asks of the value. A value equal to the bound is kept."""

    at_least = "at least"
    at_most = "at most"
    one_of = "one of"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule. Its value is the sum of `counted`, over `over` less `less` where it is a ratio."""

    reason: str
    """What a document is dropped for."""
    setting: str
    """Field of RulesConfig; None there switches the rule off."""
    bound: Bound
    counted: tuple[str, ...]
    """Signals."""
    over: str | None = None
    """A ratio over 0 is 0 over 1."""
    less: str | None = None
    source: str
    """Paper and table, or repository at a commit."""

    @property
    def signals(self) -> tuple[str, ...]:
        """Every signal that the value is made of."""
        return (*self.counted, *(name for name in (self.over, self.less) if name is not None))

    @property
    def formula(self) -> str:
        """The value in words of signals."""
        counted = " + ".join(self.counted)
        if self.over is None:
            return counted
        divisor = self.over if self.less is None else f"({self.over} - {self.less})"
        return f"{f'({counted})' if len(self.counted) > 1 else counted} / {divisor}"
