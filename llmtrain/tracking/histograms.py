"""Histograms of documents as SVG text: kept ones above a line, dropped ones below it, thresholds drawn in.

Heights are logarithms of counts, one scale for both sides, so that a handful of dropped documents is seen
beside a million kept ones. What is exactly 0 stands apart at the left: a logarithmic axis has no place for
it, and on a linear one it would be taken for its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.tracking.charts import CHARACTER_WIDTH, nice_step, number, text

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 34.0, 36.0
ZERO_WIDTH, ZERO_GAP = 9.0, 7.0
MIN_TICK_GAP = 15.0
LAST_LINEAR_COUNT = 30
"""Whole numbers to here get a linear axis."""


@dataclass(frozen=True)
class _Axis:
    """Values to pixels, in one direction."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, here = math.log10(low), math.log10(high), math.log10(here)
        return self.begin + (here - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if not self.is_log:
            step = nice_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first >= 2:
            return [10.0**power for power in range(first, last + 1)]
        digits = (1, 2, 5)
        powers = range(first - 1, last + 1)
        found = [digit * 10.0**power for power in powers for digit in digits]
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]


def histogram_svg(histogram: Mapping[str, Any]) -> str:
    """One entry of `histograms` of facts.json as a chart, or an empty string when it holds no document."""
    edges, kept, dropped = histogram["edges"], histogram["kept"], histogram["dropped"]
    apart = {name: histogram.get(name) for name in ("zero", "above")}
    most_kept = max([0, *kept, *(side["kept"] for side in apart.values() if side)])
    most_dropped = max([0, *dropped, *(side["dropped"] for side in apart.values() if side)])
    if not most_kept and not most_dropped:
        return ""
    floor = HEIGHT - BOTTOM
    tallest = [math.log10(1 + most) for most in (most_kept, most_dropped)]
    per_decade = (floor - TOP) / sum(tallest)
    middle = TOP + tallest[0] * per_decade

    def height(count: int) -> float:
        return math.log10(1 + count) * per_decade

    axis = _x_axis(histogram, has_zero=apart["zero"] is not None, has_above=apart["above"] is not None)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_label(histogram)}">']
    parts += _dropped_sides(histogram, axis, floor)
    parts += _y_ticks(most_kept, most_dropped, middle, height)
    bars = [
        (axis.at(low), axis.at(high), *counts)
        for low, high, *counts in zip(edges[:-1], edges[1:], kept, dropped, strict=True)
    ]
    if side := apart["zero"]:
        bars.append((LEFT, LEFT + ZERO_WIDTH, side["kept"], side["dropped"]))
        parts.append(text(LEFT + ZERO_WIDTH / 2, floor + 16, "0", "tick", anchor="middle"))
    if side := apart["above"]:
        end = WIDTH - RIGHT
        bars.append((end - ZERO_WIDTH, end, side["kept"], side["dropped"]))
        parts.append(text(end, floor + 16, f">{number(axis.high)}", "tick", anchor="end"))
    for begin, end, num_kept, num_dropped in bars:
        width = max(end - begin - 0.5, 1.0)
        for style, count, top in (
            ("kept", num_kept, middle - height(num_kept)),
            ("dropped", num_dropped, middle),
        ):
            if count:
                parts.append(
                    f'<rect class="bar-{style}" x="{begin:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{height(count):.1f}"/>'
                )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
    parts += _x_ticks(axis, floor, has_zero=apart["zero"] is not None, has_above=apart["above"] is not None)
    parts.append(text(WIDTH - RIGHT, HEIGHT - 3, histogram.get("unit") or "", "unit", anchor="end"))
    parts += _thresholds(histogram, axis, floor)
    parts.append("</svg>")
    return "".join(parts)


def _label(histogram: Mapping[str, Any]) -> str:
    return "".join(letter for letter in str(histogram["title"]) if letter not in '<>&"')


def _x_axis(histogram: Mapping[str, Any], *, has_zero: bool, has_above: bool) -> _Axis:
    """The values that occur and the thresholds, on one axis."""
    values = [*histogram["edges"], *(_place(bound, histogram) for bound in histogram["thresholds"])] or [1.0]
    is_log = histogram["scale"] == "amount" or (
        histogram["scale"] == "count" and max(values) > LAST_LINEAR_COUNT
    )
    values = [value for value in values if value > 0 or not is_log] or [1.0]
    low, high = min(values), max(values)
    if is_log:
        low, high = low / 1.2, high * 1.2
    elif histogram["scale"] == "count":
        low, high = min(0.5, low), high + 0.5
    else:
        low, high = min(0.0, low), max(high * 1.08, 0.05)
        high = 1.0 if has_above else min(high, 1.0) if max(values) <= 1 else high
    begin = LEFT + (ZERO_WIDTH + ZERO_GAP if has_zero else 0)
    end = WIDTH - RIGHT - (ZERO_WIDTH + ZERO_GAP if has_above else 0)
    return _Axis(low=low, high=high, begin=begin, end=end, is_log=is_log)


def _place(bound: Mapping[str, Any], histogram: Mapping[str, Any]) -> float:
    """Where a threshold's line stands: between the last value that it drops and the first that it keeps."""
    value = float(bound["value"])
    if histogram["scale"] != "count":
        return value
    return math.ceil(value) - 0.5 if bound["drops"] == "below" else math.floor(value) + 0.5


def _dropped_sides(histogram: Mapping[str, Any], axis: _Axis, floor: float) -> list[str]:
    """A tint where a threshold drops."""
    parts = []
    for bound in histogram["thresholds"]:
        x = axis.at(_place(bound, histogram))
        begin, end = (LEFT, x) if bound["drops"] == "below" else (x, WIDTH - RIGHT)
        parts.append(
            f'<rect class="side" x="{begin:.1f}" y="{TOP}" width="{max(end - begin, 0):.1f}" '
            f'height="{floor - TOP:.1f}"/>'
        )
    return parts


def _y_ticks(most_kept: int, most_dropped: int, middle: float, height: Callable[[int], float]) -> list[str]:
    """Powers of ten on both sides, as far apart as their labels need."""
    parts = []
    for most, direction in ((most_kept, -1), (most_dropped, 1)):
        last = 0.0
        for power in range(len(str(most))):
            count = 10**power
            if count > most:
                break
            offset = height(count)
            if offset - last < MIN_TICK_GAP:
                continue
            last = offset
            y = middle + direction * offset
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(LEFT - 6, y + 4, number(count), "tick", anchor="end"))
    parts.append(text(LEFT - 6, middle + 4, "0", "tick", anchor="end"))
    return parts


def _x_ticks(axis: _Axis, floor: float, *, has_zero: bool, has_above: bool) -> list[str]:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor:.1f}" y2="{floor:.1f}"/>']
    free_from = LEFT + ZERO_WIDTH / 2 + CHARACTER_WIDTH + 3 if has_zero else LEFT - 8
    limit = axis.end - 20 if has_above else WIDTH - RIGHT + 6
    for tick in axis.ticks():
        if tick == 0 and has_zero:
            continue  # what is exactly 0 has its own bar
        x, label = axis.at(tick), number(tick)
        half = len(label) * CHARACTER_WIDTH / 2
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor:.1f}" y2="{floor + 4:.1f}"/>')
        if x - half >= free_from and x + half <= limit:
            parts.append(text(x, floor + 16, label, "tick", anchor="middle"))
            free_from = x + half + 6
    return parts


def _thresholds(histogram: Mapping[str, Any], axis: _Axis, floor: float) -> list[str]:
    """A line for each, named in the space above; two of them take a row each."""
    parts, bounds = [], histogram["thresholds"]
    for row, bound in enumerate(sorted(bounds, key=lambda bound: bound["value"])[:2]):
        x = axis.at(_place(bound, histogram))
        words = f"{'at least' if bound['drops'] == 'below' else 'at most'} {number(bound['value'])}"
        width = len(words) * CHARACTER_WIDTH
        y = 12.0 + 14.0 * (row if len(bounds) > 1 else 1)
        parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9:.1f}" y2="{floor:.1f}"/>')
        fits = x + 5 + width <= WIDTH
        parts.append(text(x + 5 if fits else x - 5, y, words, "bound-label", "start" if fits else "end"))
    return parts
