"""Quantities as people type them: "7B" parameters, "300B" tokens, "1.5e21" FLOPs, "80GiB", "14d".

Each is asked for as one kind of quantity. A unit of another kind is refused, and never read as something near
it: "7GB" is no number of tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmtrain.errors import ConfigError

_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_FLOPS = {
    "": 1.0,
    "FLOP": 1.0,
    "FLOPs": 1.0,
    "GFLOP": 1e9,
    "GFLOPs": 1e9,
    "TFLOP": 1e12,
    "TFLOPs": 1e12,
    "PFLOP": 1e15,
    "PFLOPs": 1e15,
    "EFLOP": 1e18,
    "EFLOPs": 1e18,
    "ZFLOP": 1e21,
    "ZFLOPs": 1e21,
    "PF-day": 8.64e19,
    "PF-days": 8.64e19,
}
_BYTES = {"": 1.0, "bytes": 1.0}
_BYTES |= {f"{prefix}B": 1000.0**power for power, prefix in enumerate(("k", "M", "G", "T", "P"), start=1)}
_BYTES |= {f"{prefix}iB": 1024.0**power for power, prefix in enumerate(("K", "M", "G", "T", "P"), start=1)}
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "hours": 3600.0, "d": 86400.0, "days": 86400.0}
_SECONDS |= {"day": 86400.0, "hour": 3600.0, "w": 604800.0, "weeks": 604800.0, "week": 604800.0}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of quantity."""

    name: str
    units: dict[str, float]
    """Unit as typed, in base units."""
    nouns: tuple[str, ...]
    """Words that may follow: "300B tokens"."""
    example: str


PARAMS = Kind(name="a number of parameters", units=_COUNTS, nouns=("params", "parameters"), example="7B")
TOKENS = Kind(name="a number of tokens", units=_COUNTS, nouns=("tokens", "tok"), example="300B")
FLOPS = Kind(name="a number of FLOPs", units=_FLOPS, nouns=(), example="1.5e21")
BYTES = Kind(name="a size in bytes", units=_BYTES, nouns=(), example="80GiB")
DURATION = Kind(name="a duration", units=_SECONDS, nouns=(), example="14d")
HOURS = Kind(
    name="a number of device-hours",
    units=_COUNTS | {"h": 1.0, "hours": 1.0, "kh": 1e3, "Mh": 1e6},
    nouns=("gpu-hours", "device-hours", "gpuh"),
    example="20k",
)
MONEY = Kind(name="an amount of money", units=_COUNTS | {"$": 1.0}, nouns=("usd", "dollars"), example="50k")
LOSS = Kind(
    name="a loss in nats per token",
    units={"": 1.0, "nats": 1.0, "nat": 1.0, "bits": math.log(2), "bit": math.log(2)},
    nouns=("per token", "/token"),
    example="2.85",
)
KINDS = (PARAMS, TOKENS, FLOPS, BYTES, DURATION, HOURS, MONEY, LOSS)

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_PART = re.compile(rf"\s*({_NUMBER})(?![\d,.])\s*([A-Za-z$][A-Za-z-]*)?")


def parse_quantity(text: str | float, kind: Kind, *, name: str, may_be_zero: bool = False) -> float:
    """Return `text` in base units (counts, FLOPs, bytes, seconds, hours, dollars, nats).

    Durations may have parts: "1d 12h". ConfigError, with `name` as the user typed it, for anything else:
    another kind's unit, no number, a number that is not above 0.
    """
    if isinstance(text, int | float):
        return _checked(float(text), text, name=name, kind=kind, may_be_zero=may_be_zero)
    rest = text.strip()
    if kind is MONEY:
        rest = rest.removeprefix("$")
    for noun in kind.nouns:
        if rest.lower().endswith(noun):
            rest = rest[: -len(noun)].rstrip()
            break
    total, at, seen = 0.0, 0, 0
    while at < len(rest):
        match = _PART.match(rest, at)
        if match is None:
            raise ConfigError(f"{name}={text}: {_why(rest[at:], kind)}")
        unit = match.group(2) or ""
        if unit not in kind.units:
            raise ConfigError(f"{name}={text}: {_why(unit, kind)}")
        total += float(match.group(1).replace("_", "").replace(",", "")) * kind.units[unit]
        at, seen = match.end(), seen + 1
    if seen == 0:
        raise ConfigError(f"{name}={text!r} is empty; give {kind.name}, as in {kind.example}")
    if seen > 1 and kind is not DURATION:
        raise ConfigError(f"{name}={text}: {seen} numbers; give one, as in {kind.example}")
    return _checked(total, text, name=name, kind=kind, may_be_zero=may_be_zero)


def _checked(value: float, text: str | float, *, name: str, kind: Kind, may_be_zero: bool) -> float:
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        least = "at least 0" if may_be_zero else "above 0"
        raise ConfigError(f"{name}={text} must be {kind.name} {least}, as in {kind.example}")
    return value


def _why(given: str, kind: Kind) -> str:
    """What is wrong with a unit, in words."""
    as_in = f"give {kind.name}, as in {kind.example}"
    word = given.split()[0]
    if word[0].isdigit() or word[0] in "+-.,":
        return f"{word!r} is no number (thousands are grouped as in 1,000 or 1_000); {as_in}"
    spelled = next((known for known in kind.units if known and known.lower() == word.lower()), None)
    if spelled is not None and spelled != word:
        return f"{word!r} is spelled {spelled!r}; {as_in}"
    for other in KINDS:
        if other is not kind and (word in other.nouns or (word in other.units and word not in kind.units)):
            why = f"{word!r} belongs to {other.name}, not to {kind.name}"
            if other is BYTES and kind is TOKENS:
                why += " (how many tokens a text gives depends on the tokenizer: `llmtrain data` counts them)"
            return f"{why}; {as_in}"
    return f"{word!r} is not a unit of {kind.name}; {as_in}"
