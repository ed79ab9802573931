"""Line charts of text, for a terminal: braille characters, which are 2 x 4 dots each, or plain ASCII.

A curve of any length is kept as a bounded number of buckets, so a run of a million steps costs no more than
one of a thousand, and a spike stays visible as the bucket's largest value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from llmtrain.tracking.charts import axis, number, smoothed, usable

MAX_BUCKETS = 1024
BRAILLE = 0x2800
DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Unicode's bit of each dot of a braille cell, by row and column (Unicode standard, block 2800)."""
ASCII_BY_ROWS = {0: " ", 1: "'", 2: "-", 4: ".", 8: "_"}
"""A cell's one dot row, from the top; several of them are a colon, four a bar."""
SMOOTHING_SHARE = 30
"""A noisy line is the mean over the last 1/30 of the columns, as the loss of the report is one of the
steps."""
MIN_PLOT_WIDTH, MIN_PLOT_HEIGHT = 8, 2


@dataclass(slots=True)
class Bucket:
    """Neighbouring values. `mean` is over `count`, the values that were finite."""

    first: int
    last: int
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    count: int = 0


@dataclass
class Curve:
    """Values by step, in at most `MAX_BUCKETS` buckets of equally many records."""

    buckets: list[Bucket] = field(default_factory=list)
    size: int = 1
    """Records of a full bucket."""
    num_in_last: int = 0

    def add(self, step: int, value: float | None) -> None:
        """Add the next value; None and what is not finite leave a gap."""
        if not self.buckets or self.num_in_last >= self.size:
            if len(self.buckets) >= MAX_BUCKETS:
                self._halve()
            self.buckets.append(Bucket(step, step))
            self.num_in_last = 0
        bucket = self.buckets[-1]
        bucket.last = step
        self.num_in_last += 1
        if value is None or not math.isfinite(value):
            return
        if bucket.count:  # as `_join` does it, without an object for each of a million values
            bucket.count += 1
            bucket.mean += (value - bucket.mean) / bucket.count
            bucket.low = min(bucket.low, value)
            bucket.high = max(bucket.high, value)
        else:
            bucket.mean, bucket.low, bucket.high, bucket.count = value, value, value, 1

    def forget_after(self, step: int) -> None:
        """Drop what lies past `step`: a resume went back there. A bucket that reaches across stays."""
        while self.buckets and self.buckets[-1].first > step:
            self.buckets.pop()
            self.num_in_last = self.size
        if self.buckets:
            self.buckets[-1].last = min(self.buckets[-1].last, step)

    @property
    def last_value(self) -> float | None:
        return next((bucket.mean for bucket in reversed(self.buckets) if bucket.count), None)

    def _halve(self) -> None:
        for first, second in zip(self.buckets[::2], self.buckets[1::2], strict=True):
            _join(first, second)
            first.last = second.last
        del self.buckets[1::2]
        self.size *= 2


def _join(bucket: Bucket, more: Bucket) -> None:
    if not more.count:
        return
    if not bucket.count:
        bucket.mean, bucket.low, bucket.high, bucket.count = more.mean, more.low, more.high, more.count
        return
    count = bucket.count + more.count
    bucket.mean += (more.mean - bucket.mean) * more.count / count
    bucket.low, bucket.high = min(bucket.low, more.low), max(bucket.high, more.high)
    bucket.count = count


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve and the style, of rich, that it is drawn in."""

    curve: Curve
    style: str
    is_noisy: bool = True
    """Whether the line is a mean over the last columns, before a band from the smallest to the largest
    value."""


def chart(
    lines: Sequence[Line],
    *,
    width: int,
    height: int,
    format_y: Callable[[float], str] = number,
    log_y: bool = False,
    from_zero: bool = False,
    y_high: float | None = None,
    plain: bool = False,
) -> Text:
    """`height` rows of at most `width` columns: values at the left, steps below.

    Args:
        y_high: Values above it are left out; None shows all.
        plain: ASCII only, for terminals without braille.

    Where there is nothing to draw, or no room to draw in, the text says so.
    """
    drawn = [bucket for line in lines for bucket in line.curve.buckets if bucket.count]
    spans = [value for bucket in drawn for value in (bucket.low, bucket.high)]
    values = [value for value in spans if usable(value, log=log_y)]
    if not values:
        return Text("no values yet", style="dim")
    largest = max(values) if y_high is None else max(min(max(values), y_high), min(values))
    low, high, ticks = axis(min(values), largest, log=log_y, from_zero=from_zero)
    margin = max(len(format_y(tick)) for tick in ticks) + 2
    columns, rows = width - margin, height - 1
    if columns < MIN_PLOT_WIDTH or rows < MIN_PLOT_HEIGHT:
        last = next((line.curve.last_value for line in lines if line.curve.last_value is not None), None)
        return Text(format_y(last) if last is not None else "", no_wrap=True)

    first, final = min(bucket.first for bucket in drawn), max(bucket.last for bucket in drawn)
    canvas = Canvas(columns, rows)

    def at_y(value: float) -> float:
        if log_y:
            return math.log(value / low) / math.log(high / low) * (4 * rows - 1)
        return (value - low) / (high - low) * (4 * rows - 1)

    def usable_at(value: float) -> bool:
        return usable(value, log=log_y) and value <= high

    for line in lines:
        points = by_column(line.curve, first, final, 2 * columns)
        means: list[float | None] = [bucket.mean if bucket.count else None for _, bucket in points]
        if line.is_noisy and not plain:
            for column, bucket in points:
                if bucket.count and usable_at(bucket.low):
                    top = at_y(min(bucket.high, high))
                    canvas.vertical(column, at_y(bucket.low), top, f"{line.style} dim")
        if line.is_noisy:
            means = smoothed(means, max(1, 2 * columns // SMOOTHING_SHARE))
        before: tuple[int, float] | None = None
        for (column, bucket), mean in zip(points, means, strict=True):
            if not bucket.count or mean is None or not usable_at(mean):
                before = None
                continue
            here = (column, at_y(mean))
            canvas.line(before or here, here, line.style)
            before = here

    labels = {rows - 1 - int(at_y(tick) // 4): format_y(tick) for tick in ticks if low <= tick <= high}
    text = Text(no_wrap=True, end="")
    for row in range(rows):
        bar = "|" if plain else "┤" if row in labels else "│"
        text.append(f"{labels.get(row, ''):>{margin - 2}} {bar}", style="dim")
        text.append_text(canvas.row(row, plain=plain))
        text.append("\n")
    begin, end = f"{first:,}", f"step {final:,}"
    gap = max(1, columns - len(begin) - len(end))
    text.append(f"{'':{margin}}{begin}{'':{gap}}{end}", style="dim")
    return text


def by_column(curve: Curve, first: int, final: int, columns: int) -> list[tuple[int, Bucket]]:
    """Buckets joined where they fall into the same column of dots, from left to right."""
    found: dict[int, Bucket] = {}
    width = max(1, final - first)
    for bucket in curve.buckets:
        middle = (bucket.first + bucket.last) / 2
        column = min(columns - 1, max(0, int((middle - first) / width * (columns - 1))))
        if column not in found:
            found[column] = Bucket(bucket.first, bucket.last)
        _join(found[column], bucket)
    return sorted(found.items())


class Canvas:
    """Dots, four rows and two columns to a character. What is drawn later covers what was there before."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._bits = [[0] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]

    def dot(self, x: int, y: int, style: str) -> None:
        """Set a dot; (0, 0) is at the lower left. One outside is left out."""
        if not (0 <= x < 2 * self.columns and 0 <= y < 4 * self.rows):
            return
        down = 4 * self.rows - 1 - y
        row, column = down // 4, x // 2
        if self._styles[row][column] != style:
            self._bits[row][column], self._styles[row][column] = 0, style
        self._bits[row][column] |= DOT_BITS[down % 4][x % 2]

    def line(self, begin: tuple[int, float], end: tuple[int, float], style: str) -> None:
        """Dots from `begin` to `end`, without a hole in either direction."""
        steps = max(abs(end[0] - begin[0]), math.ceil(abs(end[1] - begin[1])), 1)
        for at in range(steps + 1):
            share = at / steps
            self.dot(
                round(begin[0] + share * (end[0] - begin[0])),
                round(begin[1] + share * (end[1] - begin[1])),
                style,
            )

    def vertical(self, x: int, low: float, high: float, style: str) -> None:
        for y in range(round(low), round(high) + 1):
            self.dot(x, y, style)

    def row(self, row: int, *, plain: bool = False) -> Text:
        """One row of characters."""
        text = Text(no_wrap=True)
        cells = zip(self._bits[row], self._styles[row], strict=True)
        for style, group in itertools.groupby(cells, key=lambda cell: cell[1]):
            drawn = [_ascii(bits) if plain else chr(BRAILLE + bits) if bits else " " for bits, _ in group]
            text.append("".join(drawn), style=style)
        return text


def _ascii(bits: int) -> str:
    rows = sum(1 << row for row, (left, right) in enumerate(DOT_BITS) if bits & (left | right))
    return ASCII_BY_ROWS.get(rows, "|" if rows == 0b1111 else ":")
