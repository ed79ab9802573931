"""Which source each position of a run reads, and which of its rows, as arithmetic on the position.

A stage begins at a row and gives every source a share. Among the first x rows of a stage source k has C_k(x),
found by dealing with one source after the other: of the rows that are left it gets its share of the weight
that is left, rounded. These counts add up to x, never fall as x grows, and stay within a row or two of the
shares asked for. A block is `block_rows` positions: who comes next inside it is drawn by a permutation keyed
by the block. So any position costs the same, O(sources), and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain import rng
from llmtrain.errors import ConfigError, unknown_name
from llmtrain.files import hash_json
from llmtrain.loader.order import Locality, permute, rows_at

Int64 = npt.NDArray[np.int64]

MAX_POSITION = 2**60
"""No run gets there."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mixture."""

    name: str
    num_rows: int
    hash: str
    """Of what decides the content of its rows."""
    max_rows: int | None = None
    """Most rows that a run takes from it, repeats counted; None: no bound."""


@dataclass(frozen=True)
class _Part:
    """A run of positions over which weights do not change: a stage, or what is left of it when a source ran
    dry."""

    first: int
    """Position at which it begins."""
    weights: tuple[Fraction, ...]
    before: tuple[int, ...]
    """Rows that earlier parts took from each source."""


class Mixture:
    """The order of rows over several sources: global row = rows of the sources before + row in its own."""

    def __init__(
        self,
        sources: Sequence[Source],
        stages: Sequence[tuple[int, Mapping[str, float]]],
        *,
        seed: int,
        block_rows: int,
        redistribute: bool = False,
        locality: Locality | None = None,
    ) -> None:
        """
        Args:
            stages: position at which each begins, the first at 0, and weights by name; a source that is not
                named has none. No weights at all: proportional to rows.
            redistribute: what a source of too few rows has no more of goes to the others, by their weights.
                Without it `check` tells.

        Raises:
            ConfigError: a name that is no source, weights that are negative or all 0, stages out of order.
        """
        self.sources = tuple(sources)
        self.seed = seed
        self.block_rows = block_rows
        self.locality = locality
        self._offsets = np.concatenate([[0], np.cumsum([source.num_rows for source in self.sources])])
        names = [source.name for source in self.sources]
        firsts = [first for first, _ in stages]
        if not stages or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ConfigError(
                f"stages of a mixture begin at rows {firsts}: the first must be 0, each after the other"
            )
        self._parts: list[_Part] = []
        taken = (0,) * len(names)
        for number, (first, weights) in enumerate(stages):
            last = stages[number + 1][0] if number + 1 < len(stages) else None
            taken = self._add_stage(first, last, _fractions(weights, self.sources), taken, redistribute)
        several = len(self.sources) > 1
        self.hash = hash_json(
            {
                "sources": [
                    [source.hash, source.num_rows, source.max_rows if redistribute else None]
                    for source in self.sources
                ],
                "stages": [
                    [first, [str(share) for share in _shares(_fractions(weights, self.sources))]]
                    for first, weights in stages
                    if several
                ],
                "block_rows": block_rows if several else None,
                "locality": None if locality is None else [locality.group_rows, locality.window_groups],
            }
        )
        """Of all that decides the order but the seed."""

    @property
    def num_rows(self) -> int:
        """Of all sources."""
        return int(self._offsets[-1])

    def rows_at(self, positions: npt.NDArray[np.integer[Any]]) -> Int64:
        """The global row of each position, in the shape of `positions`."""
        source, index = self.locate(positions)
        rows = np.empty(source.shape, dtype=np.int64)
        for number in np.unique(source).tolist():
            chosen = source == number
            own = self.sources[number]
            rows[chosen] = self._offsets[number] + rows_at(
                index[chosen],
                num_rows=own.num_rows,
                seed=self.seed,
                pack_hash=own.hash,
                locality=self.locality,
            )
        return rows

    def locate(self, positions: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """Of each position: its source, and how many rows of that source come before it in the run."""
        at = np.asarray(positions, dtype=np.int64)
        if len(self.sources) == 1:
            return np.zeros(at.shape, dtype=np.int64), at.copy()
        source, index = np.empty(at.shape, dtype=np.int64), np.empty(at.shape, dtype=np.int64)
        firsts = np.array([part.first for part in self._parts])
        part_of = np.searchsorted(firsts, at, side="right") - 1
        block_of = (at - firsts[part_of]) // self.block_rows
        for part_number, block in np.unique(
            np.stack([part_of, block_of], axis=-1).reshape(-1, 2), axis=0
        ).tolist():
            chosen = (part_of == part_number) & (block_of == block)
            source[chosen], index[chosen] = self._in_block(part_number, block, at[chosen])
        return source, index

    def rows_by_source(self, num_positions: int) -> dict[str, int]:
        """How many of the first positions each source gets."""
        part = self._part_at(max(0, num_positions - 1))
        counts = _counts(part.weights, num_positions - part.first)
        return {
            source.name: before + count
            for source, before, count in zip(self.sources, part.before, counts, strict=True)
        }

    def asked_at(self, position: int) -> dict[str, float]:
        """Share of the rows from `position` on that each source is to have, until weights change."""
        weights = _shares(self._part_at(position).weights)
        return {source.name: float(share) for source, share in zip(self.sources, weights, strict=True)}

    def taken(self, position: int, passed_over: Iterable[tuple[int, int]] = ()) -> dict[str, int]:
        """Rows of each source that a run which stands at `position` has taken.

        Args:
            passed_over: [first, last] of positions that it did not take.
        """
        part = self._part_at(max(0, position - 1))
        begin = position - (position - part.first) % self.block_rows  # up to here counts are exact
        counts = self.rows_by_source(begin)
        ranges = [(begin, position, 1)]
        ranges += [(first, min(last + 1, max(first, position)), -1) for first, last in passed_over]
        for first, end, sign in ranges:
            owners, _ = self.locate(np.arange(first, end))
            for name, count in zip(
                self.names, np.bincount(owners, minlength=len(self.sources)).tolist(), strict=True
            ):
                counts[name] += sign * count
        return counts

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def _in_block(self, part_number: int, block: int, positions: Int64) -> tuple[Int64, Int64]:
        part = self._parts[part_number]
        begin = block * self.block_rows
        end = begin + self.block_rows
        if part_number + 1 < len(self._parts):
            end = min(end, self._parts[part_number + 1].first - part.first)
        before, after = _counts(part.weights, begin), _counts(part.weights, end)
        key = rng.key(self.seed, "mixture", part.first, block)
        places = (positions - part.first - begin).astype(np.uint64)
        slots = permute(places, num_rows=end - begin, key=key).astype(np.int64)
        edges = np.concatenate([[0], np.cumsum([b - a for a, b in zip(before, after, strict=True)])])
        source = np.searchsorted(edges, slots, side="right") - 1
        earlier = np.array(part.before) + np.array(before)
        return source, earlier[source] + slots - edges[source]

    def _part_at(self, position: int) -> _Part:
        return [part for part in self._parts if part.first <= position][-1]

    def _add_stage(
        self,
        first: int,
        last: int | None,
        weights: tuple[Fraction, ...],
        taken: tuple[int, ...],
        redistribute: bool,
    ) -> tuple[int, ...]:
        """Add the parts of a stage, cut where a source runs dry. Returns what was taken up to its end."""
        while True:
            if redistribute:
                weights = tuple(
                    Fraction(0) if source.max_rows is not None and before >= source.max_rows else weight
                    for source, weight, before in zip(self.sources, weights, taken, strict=True)
                )
                if not sum(weights):  # everything has run dry: `check` says so, should a run get there
                    weights = tuple(Fraction(source.num_rows) for source in self.sources)
                    redistribute = False
            self._parts.append(_Part(first, weights, taken))
            dry = self._first_dry(first, weights, taken) if redistribute else None
            if dry is None or (last is not None and dry >= last):
                if last is None:
                    return taken
                counts = _counts(weights, last - first)
                return tuple(a + b for a, b in zip(taken, counts, strict=True))
            taken = tuple(a + b for a, b in zip(taken, _counts(weights, dry - first), strict=True))
            first = dry

    def _first_dry(self, first: int, weights: tuple[Fraction, ...], taken: tuple[int, ...]) -> int | None:
        """The position at which the first source has given all it may, found by halving."""
        ends = []
        for number, source in enumerate(self.sources):
            if source.max_rows is None or not weights[number]:
                continue
            left = source.max_rows - taken[number]
            low, high = 0, 1
            while high < MAX_POSITION and _counts(weights, high)[number] < left:
                high *= 2
            if high >= MAX_POSITION:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _counts(weights, middle)[number] < left else (low, middle)
            ends.append(first + high)
        return min(ends, default=None)

    def check(self, num_positions: int) -> list[str]:
        """What does not hold for a run of so many rows, a sentence a source."""
        problems = []
        given = self.rows_by_source(num_positions)
        for source in self.sources:
            rows = given[source.name]
            if source.max_rows is not None and rows > source.max_rows:
                problems.append(
                    f"source {source.name} would give {rows:,} rows, {rows / source.num_rows:.2f} epochs of "
                    f"its {source.num_rows:,}, and its max_epochs allows {source.max_rows:,}; lower "
                    f"its weight or train.total_tokens, raise data.sources.{source.name}.max_epochs, or set "
                    "data.on_exhausted=redistribute"
                )
        return problems


def _fractions(weights: Mapping[str, float], sources: Sequence[Source]) -> tuple[Fraction, ...]:
    names = [source.name for source in sources]
    for name in weights:
        if name not in names:
            raise ConfigError(unknown_name("source of a mixture", name, names))
    if not weights:
        return tuple(Fraction(source.num_rows) for source in sources)
    if min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise ConfigError(f"weights of a mixture must not be negative, nor all of them 0: {dict(weights)}")
    return tuple(Fraction(weights.get(name, 0)) for name in names)


def _shares(weights: Sequence[Fraction]) -> list[Fraction]:
    """The same weights with the sum 1."""
    whole = sum(weights, Fraction(0))
    return [weight / whole for weight in weights]


def _counts(weights: Sequence[Fraction], num_rows: int) -> list[int]:
    """How many of the first rows of a part each source gets; exact, in Python's integers."""
    counts, left, weight_left = [], num_rows, sum(weights, Fraction(0))
    for weight in weights:
        share = weight / weight_left if weight_left else Fraction(0)
        count = (2 * left * share.numerator + share.denominator) // (2 * share.denominator)
        counts.append(count)
        left -= count
        weight_left -= weight
    return counts
