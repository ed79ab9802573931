"""Line charts as SVG text, made by hand: no network, no fonts of their own, colours from the page's style
sheet.

A chart names its units, labels its lines at their ends instead of in a legend, and leaves a gap where a value
is missing. Many points are drawn as the mean of a bucket with a band from its smallest to its largest value,
so a spike stays visible at any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

MAX_DOTS = 100
LABEL_GAP = 15.0
CHARACTER_WIDTH = 6.6
"""Of the page's 12 px font, on the wide side; enough to keep labels apart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `style` is a class of the style sheet; None in `ys` is a gap."""

    xs: Sequence[float]
    ys: Sequence[float | None]
    style: str
    label: str = ""
    """Written at the line's end; empty for a line that needs no name."""
    has_points: bool = False
    """Whether each value gets a dot."""
    has_band: bool = False
    """Whether buckets show their smallest and largest value."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line at `x`, where something happened."""

    x: float
    label: str


@dataclass(kw_only=True)
class Chart:
    """What one chart shows."""

    series: Sequence[Series]
    y_unit: str
    x_unit: str = "step"
    width: int = 400
    height: int = 210
    log_y: bool = False
    from_zero: bool = False
    """Whether the value axis begins at 0, for values whose size matters more than their change."""
    marks: Sequence[Mark] = field(default_factory=list)
    format_y: Callable[[float], str] | None = None
    second_x: Callable[[float], str] | None = None
    """A second name for each step on the axis, such as the tokens seen by then."""
    second_x_unit: str = ""
    y_high: float | None = None
    """Values above it are cut off, and the first one is named; None shows all."""
    max_points: int = 400
    """More are put into buckets."""
    right: int = 16
    """Room for the labels at the lines' ends, in pixels."""


def svg(chart: Chart) -> str:
    """The chart, or an empty string when there is no value to draw."""
    drawn = [bucketed(series, chart.max_points) for series in chart.series]
    values = [
        value
        for line in drawn
        for _, *ys in line
        for value in ys
        if value is not None and usable(value, log=chart.log_y)
    ]
    xs = [x for line in drawn for x, *_ in line]
    if not values:
        return ""
    largest = max(values) if chart.y_high is None else min(max(values), chart.y_high)
    low, high, ticks = axis(min(values), largest, log=chart.log_y, from_zero=chart.from_zero)
    format_y = chart.format_y or number
    left = 14 + max(len(format_y(tick)) for tick in ticks) * CHARACTER_WIDTH
    top, bottom = 24.0, 24.0 if chart.second_x is None else 40.0
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (chart.width - left - chart.right)

    def at_y(y: float) -> float:
        share = (
            (math.log10(y) - math.log10(low)) / (math.log10(high) - math.log10(low))
            if chart.log_y
            else (y - low) / (high - low)
        )
        return top + (1 - share) * (chart.height - top - bottom)

    floor = chart.height - bottom
    parts = [
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(chart.y_unit)}">'
    ]
    parts.append(text(4, 12, chart.y_unit, "unit"))
    for tick in ticks:
        y = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{left:.1f}" x2="{chart.width - chart.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(text(left - 7, y + 4, format_y(tick), "tick", anchor="end"))
    parts += x_axis(chart, x_low, x_high, at_x, floor)
    parts += mark_lines(chart, at_x, top, floor)
    # A nested svg is its own window: what leaves it is cut off.
    parts.append(f'<svg x="0" y="{top - 2:.1f}" width="{chart.width}" height="{floor - top + 6:.1f}" ')
    parts.append(f'viewBox="0 {top - 2:.1f} {chart.width} {floor - top + 6:.1f}" class="window">')
    for series, line in zip(chart.series, drawn, strict=True):
        parts += path_of(series, line, at_x, at_y, chart.log_y)
    parts.append("</svg>")
    if max(values) > high:
        inside = min((x for line in drawn for x, y, *_ in line if y is not None and y <= high), default=x_low)
        parts.append(text(at_x(inside) + 10, top + 14, f"\u2191 from {max(values):.3g}", "mark-label"))
    parts += end_labels(chart, drawn, at_x, at_y, top, floor)
    parts.append("</svg>")
    return "".join(parts)


Point = tuple[float, float | None, float | None, float | None]
"""x, then mean, smallest and largest value there."""


def bucketed(series: Series, max_points: int) -> list[Point]:
    """At most `max_points` points; each is the mean, minimum and maximum of equally many neighbours."""
    count = len(series.xs)
    size = max(1, math.ceil(count / max_points))
    points: list[Point] = []
    for begin in range(0, count, size):
        chunk = series.ys[begin : begin + size]
        present = [y for y in chunk if y is not None and math.isfinite(y)]
        x = series.xs[begin + len(chunk) // 2] if size > 1 else series.xs[begin]
        if present:
            points.append((x, sum(present) / len(present), min(present), max(present)))
        else:
            points.append((x, None, None, None))
    return points


def smoothed(ys: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` values, or of the last tenth while that is less; later values never show."""
    result: list[float | None] = []
    sums, counts = [0.0], [0]
    for end, y in enumerate(ys, start=1):
        is_there = y is not None and math.isfinite(y)
        sums.append(sums[-1] + (y if y is not None and is_there else 0.0))
        counts.append(counts[-1] + is_there)
        begin = max(0, end - min(window, 1 + end // 10))
        count = counts[end] - counts[begin]
        result.append((sums[end] - sums[begin]) / count if count else None)
    return result


def axis(
    low: float, high: float, *, log: bool = False, from_zero: bool = False
) -> tuple[float, float, list[float]]:
    """Ends of a value axis and its ticks: round numbers, three to seven of them."""
    if log:
        return log_axis(low, high)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = (0.0 if from_zero and low >= 0 else low - pad), high + pad
    step = nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    candidates = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for digit in (1, 2, 5)
    ]
    first = max(index for index, value in enumerate(candidates) if value <= low * (1 + 1e-9))
    last = next(
        (index for index, value in enumerate(candidates) if value >= high * (1 - 1e-9)), len(candidates) - 1
    )
    last = max(last, first + 1)
    ticks = candidates[first : last + 1]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1.0")]
    return candidates[first], candidates[last], ticks


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not under `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))


def number(value: float) -> str:
    """A tick: 0, 0.25, 3, 1.5k, 2M, 3e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return f"{value / scale:.4g}{suffix}"
    if size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def usable(value: float, *, log: bool) -> bool:
    """Whether the axis has a place for it."""
    return math.isfinite(value) and (value > 0 or not log)


def x_axis(chart: Chart, low: float, high: float, at_x: Callable[[float], float], floor: float) -> list[str]:
    step = max(1.0, nice_step((high - low) / (chart.width / 95)))
    parts = [
        f'<line class="axis" x1="{at_x(low):.1f}" x2="{at_x(high):.1f}" y1="{floor:.1f}" y2="{floor:.1f}"/>'
    ]
    tick = math.ceil(low / step) * step
    room = at_x(high) - (len(chart.x_unit) + 2) * CHARACTER_WIDTH  # the axis' name stands at its right end
    while tick <= high:
        x = at_x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor:.1f}" y2="{floor + 4:.1f}"/>')
        label = number(tick)
        if x + len(label) * CHARACTER_WIDTH / 2 < room:
            parts.append(text(x, floor + 17, label, "tick", anchor="middle"))
            second = chart.second_x(tick) if chart.second_x else ""
            second_room = at_x(high) - (len(chart.second_x_unit) + 2) * CHARACTER_WIDTH
            if second and x + len(second) * CHARACTER_WIDTH / 2 < second_room:
                parts.append(text(x, floor + 32, second, "tick faint", anchor="middle"))
        tick += step
    parts.append(text(at_x(high), floor + 17, chart.x_unit, "unit", anchor="end"))
    if chart.second_x:
        parts.append(text(at_x(high), floor + 32, chart.second_x_unit, "unit", anchor="end"))
    return parts


def mark_lines(chart: Chart, at_x: Callable[[float], float], top: float, floor: float) -> list[str]:
    """A dashed line for each mark; a label only where it does not touch the one before."""
    parts = []
    free_from = (len(chart.y_unit) + 2) * CHARACTER_WIDTH
    for mark in sorted(chart.marks, key=lambda mark: mark.x):
        x = at_x(mark.x)
        begin_y = top - 14 if mark.label else top - 3  # a line without a name stays clear of the unit
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{begin_y:.1f}" y2="{floor:.1f}"/>')
        width = len(mark.label) * CHARACTER_WIDTH
        begin = min(x + 5, chart.width - width)
        if mark.label and begin >= free_from:
            parts.append(text(begin, top - 6, mark.label, "mark-label"))
            free_from = begin + width + 8
    return parts


def path_of(
    series: Series,
    line: Sequence[Point],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    log: bool,
) -> list[str]:
    parts = []
    commands: list[str] = []
    pen_is_down = False
    for x, mean, _, _ in line:
        if mean is None or not usable(mean, log=log):
            pen_is_down = False
            continue
        commands.append(f"{'L' if pen_is_down else 'M'}{at_x(x):.1f} {at_y(mean):.1f}")
        pen_is_down = True
    if series.has_band and len(series.xs) > len(line):
        inside = [
            (x, lo, hi) for x, _, lo, hi in line if lo is not None and hi is not None and usable(lo, log=log)
        ]
        edge = [f"{at_x(x):.1f},{at_y(hi):.1f}" for x, _, hi in inside]
        edge += [f"{at_x(x):.1f},{at_y(lo):.1f}" for x, lo, _ in reversed(inside)]
        parts.append(f'<polygon class="band {series.style}" points="{" ".join(edge)}"/>')
    parts.append(f'<path class="line {series.style}" d="{"".join(commands)}"/>')
    lone = len(commands) == 1
    if (series.has_points and len(line) <= MAX_DOTS) or lone:
        parts += [
            f'<circle class="dot {series.style}" cx="{at_x(x):.1f}" cy="{at_y(mean):.1f}" r="3.2">'
            f"<title>{escape(f'{number(x)}: {mean:.5g}')}</title></circle>"
            for x, mean, _, _ in line
            if mean is not None and usable(mean, log=log)
        ]
    return parts


def end_labels(
    chart: Chart,
    drawn: Sequence[Sequence[Point]],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    top: float,
    floor: float,
) -> list[str]:
    """The name of each line beside its last value, moved apart where they would touch."""
    wanted = []
    for series, line in zip(chart.series, drawn, strict=True):
        last = next(
            ((x, y) for x, y, _, _ in reversed(line) if y is not None and usable(y, log=chart.log_y)), None
        )
        if series.label and last is not None:
            wanted.append((at_y(last[1]), at_x(last[0]), series))
    wanted.sort(key=lambda label: label[0])
    placed: list[float] = []
    for y, _, _ in wanted:
        placed.append(max(y, placed[-1] + LABEL_GAP) if placed else max(y, top))
    for index in reversed(range(len(placed))):  # push back up what fell below the axis
        limit = floor if index == len(placed) - 1 else placed[index + 1] - LABEL_GAP
        placed[index] = min(placed[index], limit)
    return [
        text(chart.width - chart.right + 7, y + 4, series.label, f"end {series.style}")
        for y, (_, _, series) in zip(placed, wanted, strict=True)
    ]
