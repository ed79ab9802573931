"""Pictures as SVG text, made by hand: no network, no script, no fonts of their own, colours from the page's
style sheet.

Numbers come in the unit of their axis. What is drawn is named where it lies, not in a legend; names that
would touch are moved apart. Every picture is drawn for a number of pixels, once wide and once narrow, so that
its letters keep their size on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from llmtrain.planner.interval import Interval

NARROW = 318
"""Pixels inside a card on a telephone of 390."""
CHARACTER = 7.0
"""Mean width of a character of the page's 12 px font, on the wide side."""
BOLDER = 1.12
"""Width of a bold character over a plain one."""
LINE = 15.0
"""Height of a line of text."""
LEAST_SHARE = 0.02
"""Parts below it are drawn as one."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


def at_both_widths(draw: Callable[[int], str], *, wide: int) -> str:
    """The picture twice; the style sheet shows one of the two."""
    return (
        f'<div class="on-wide" style="max-width:{wide}px">{draw(wide)}</div>'
        f'<div class="on-narrow">{draw(NARROW)}</div>'
    )


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def rect(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    hint = f"<title>{escape(title)}</title>" if title else ""
    size = f'width="{max(width, 0.0):.2f}" height="{height:.1f}"'
    return f'<rect class="{style}" x="{x:.2f}" y="{y:.1f}" {size}>{hint}</rect>'


def dot(x: float, y: float, radius: float, style: str, title: str = "") -> str:
    hint = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{hint}</circle>'


def polyline(points: Sequence[tuple[float, float]], style: str) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def width_of(words: str, *, is_bold: bool = False) -> float:
    return len(words) * CHARACTER * (BOLDER if is_bold else 1.0)


# -- axes


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from `low` to `high` on pixels from `begin` to `end`, which may run downwards."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Pixels; values outside lie outside."""
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, most: int) -> list[float]:
        """Round numbers inside, at most `most` of them and at least one."""
        if self.is_log:
            return _log_ticks(self.low, self.high, most)
        step = _round_step((self.high - self.low) / most)
        while len(found := _multiples(step, self.low, self.high)) > most:
            step = _round_step(1.01 * step)
        return found or [self.low]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [
            digit * 10.0**power
            for power in powers
            for digit in digits
            if low * (1 - 1e-9) <= digit * 10.0**power <= high * (1 + 1e-9)
        ]
        if 1 < len(found) <= most:
            return found
    if len(found) > most:
        return found[:: math.ceil(len(found) / most)]
    linear = Axis(low=low, high=high, begin=0.0, end=1.0)
    return linear.ticks(most)


def _multiples(step: float, low: float, high: float) -> list[float]:
    return [
        number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _round_step(rough: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, not under `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * (1 - 1e-9))


def number(value: float) -> str:
    """A tick: 0, 0.25, 30, 300M, 2B, 3T."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.99999:
            return f"{value / scale:.6g}{suffix}"
    return f"{value:.6g}"


FRAME = 8.0
"""Pixels that every picture has right of its axis, at least."""


def _x_axis(axis: Axis, y: float, unit: str, *, grid_to: float) -> Iterator[str]:
    """Line, ticks with faint lines up to `grid_to`, and the unit under them."""
    yield line(axis.begin, y, axis.end, y, "axis")
    for tick in axis.ticks(max(3, int((axis.end - axis.begin) / 55))):
        x = axis.at(tick)
        yield line(x, grid_to, x, y, "grid")
        yield line(x, y, x, y + 4, "axis")
        words = number(tick)  # the last one stays inside the frame
        middle = min(x, axis.end + FRAME - width_of(words) / 2)
        yield text(middle, y + 17, words, "tick", "middle")
    yield text(axis.end, y + 32, unit, "unit", "end")


def _y_axis(axis: Axis, left: float, right: float, unit: str) -> Iterator[str]:
    for tick in axis.ticks(max(3, int((axis.begin - axis.end) / 45))):
        y = axis.at(tick)
        yield line(left, y, right, y, "grid")
        yield text(left - 6, y + 4, number(tick), "tick", "end")
    yield text(2, 12, unit, "unit")


# -- curves above the intervals that they are held against


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line that has a lowest point."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    low_label: str = ""
    """Written under its lowest point; empty: the point is not marked."""
    is_named_left: bool = False


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A named interval of x."""

    label: str
    interval: Interval
    style: str


@dataclass(frozen=True, kw_only=True)
class Valleys:
    """Curves over a logarithmic x, one marked point, a shaded interval of x, and named intervals below."""

    title: str
    x_unit: str
    y_unit: str
    curves: Sequence[Curve]
    """Cut at the same height above each one's lowest point."""
    choice: tuple[float, float]
    choice_label: str
    band: Interval
    band_label: str
    spreads: Sequence[Spread]
    spreads_label: str


def valleys(chart: Valleys, width: int) -> str:
    is_narrow = width < 500
    height = 250.0 if is_narrow else 330.0
    xs = [x for curve in chart.curves for x in curve.xs] + [chart.choice[0], chart.band.low, chart.band.high]
    xs += [end for row in chart.spreads for end in (row.interval.low, row.interval.high)]
    ys = [y for curve in chart.curves for y in curve.ys] + [chart.choice[1]]
    pad = 0.04 * (max(ys) - min(ys))
    y_axis = Axis(
        low=min(ys) - pad - (0 if is_narrow else 2 * pad), high=max(ys) + pad, begin=height - 34, end=40.0
    )
    left = 12 + max(width_of(number(tick)) for tick in y_axis.ticks(8))
    right = width - 8 - max(width_of(curve.label) for curve in chart.curves)
    x_axis = Axis(low=min(xs), high=max(xs), begin=left, end=right, is_log=True)
    floor = y_axis.begin
    row_height = 27.0 if is_narrow else 17.0
    strip = height + 26
    end = strip + row_height * len(chart.spreads) + 6

    parts = [
        rect(x_axis.at(chart.band.low), y_axis.end, _span(x_axis, chart.band), floor - y_axis.end, "band"),
        rect(x_axis.at(chart.band.low), strip - 4, _span(x_axis, chart.band), end - strip + 4, "band"),
        *_y_axis(y_axis, left, width - 2, chart.y_unit),
        *_x_axis(x_axis, floor, chart.x_unit, grid_to=y_axis.end),
    ]
    x, y = x_axis.at(chart.choice[0]), y_axis.at(chart.choice[1])
    parts += [line(x, y_axis.end - 6, x, floor, "mark"), line(x, strip - 4, x, end, "mark")]
    for curve in chart.curves:
        parts.append(polyline(_points(curve, x_axis, y_axis), f"curve {curve.style}"))
    for curve in chart.curves:
        parts += _curve_names(curve, x_axis, y_axis, has_low_label=not is_narrow)
    parts.append(dot(x, y, 6, "choice", chart.choice_label))
    parts.append(_within(x, y_axis.end - 11, chart.choice_label, "choice-label", width))
    parts.append(text(2, height + 12, chart.spreads_label, "unit"))
    for row, spread in enumerate(chart.spreads):
        parts += _spread(spread, x_axis, strip + row_height * (row + 1) - 5, width, is_narrow=is_narrow)
    parts.append(_within(x_axis.at(chart.band.mid), end + 13, chart.band_label, "band-label", width))
    return svg(width, end + 18, chart.title, parts)


def _span(axis: Axis, interval: Interval) -> float:
    return axis.at(interval.high) - axis.at(interval.low)


def _within(x: float, y: float, words: str, style: str, width: float) -> str:
    """Centred on x, or as near as the picture's edges allow."""
    half = width_of(words, is_bold=True) / 2
    return text(min(max(x, half + 2), width - half - 2), y, words, style, "middle")


def _curve_names(curve: Curve, x_axis: Axis, y_axis: Axis, *, has_low_label: bool) -> Iterator[str]:
    points = _points(curve, x_axis, y_axis)
    if curve.is_named_left:
        x = max(points[0][0] - 5, x_axis.begin + width_of(curve.label))
        yield text(x, points[0][1] + 4, curve.label, f"curve-label {curve.style}", "end")
    else:
        yield text(points[-1][0] + 5, points[-1][1] + 4, curve.label, f"curve-label {curve.style}")
    if curve.low_label:
        x, y = max(points, key=lambda point: point[1])
        yield dot(x, y, 3.2, f"low {curve.style}", curve.low_label)
        if has_low_label:
            yield text(x, y + 15, curve.low_label, "tick halo", "middle")


def _points(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[tuple[float, float]]:
    return [(x_axis.at(x), y_axis.at(y)) for x, y in zip(curve.xs, curve.ys, strict=True)]


def _spread(spread: Spread, axis: Axis, y: float, width: float, *, is_narrow: bool) -> Iterator[str]:
    low, mid, high = (
        axis.at(value) for value in (spread.interval.low, spread.interval.mid, spread.interval.high)
    )
    at_y = y if is_narrow else y - 1
    yield line(low, at_y, high, at_y, f"whisker {spread.style}")
    yield line(mid, at_y - 5, mid, at_y + 5, f"whisker-mid {spread.style}")
    if is_narrow:
        yield _within(mid, y - 8, spread.label, f"spread halo {spread.style}", width)
    elif high + 8 + width_of(spread.label) <= width:
        yield text(high + 8, y + 3, spread.label, f"spread {spread.style}")
    else:
        yield text(low - 8, y + 3, spread.label, f"spread {spread.style}", "end")


# -- a whole and its parts


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    value: float
    style: str


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Parts that add up, how far their sum may be off, and other amounts on the same scale."""

    title: str
    unit: str
    parts: Sequence[Part]
    interval: Interval
    """Of the whole; mid is the parts' sum."""
    show: Callable[[float], str]
    limit: float | None = None
    limit_label: str = ""
    others: Sequence[Part] = ()
    """Each from zero."""
    others_label: str = ""


def grouped(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Parts of at least LEAST_SHARE of the whole, and the smaller ones; one small part stands for itself."""
    least = LEAST_SHARE * sum(part.value for part in parts)
    small = [part for part in parts if part.value < least]
    if sum(part.value > 0 for part in small) == 1:
        least = max(part.value for part in small)
    return [part for part in parts if part.value >= least], [part for part in parts if part.value < least]


def whole(chart: Whole, width: int) -> str:
    """One bar of all parts with the interval as a whisker, then each part in its own row under its place in
    the bar; the others below. Small parts are one."""
    large, small = grouped(chart.parts)
    rest = sum(part.value for part in small)
    rows = large + ([Part(name="smaller", value=rest, style="rest")] if rest > 0 else [])
    total = sum(part.value for part in rows)
    is_narrow = width < 450
    values = [_amount(part.value, total, chart.show) for part in rows]
    names = [part.name for part in (*rows, *chart.others)]
    left = 6.0 if is_narrow else 10 + max(width_of(name) for name in names)
    right = width - 8 if is_narrow else width - 12 - max(width_of(value) for value in values)
    top = max(total, chart.interval.high, chart.limit or 0.0, *(part.value for part in chart.others), 1e-300)
    axis = Axis(low=0.0, high=top * 1.01, begin=left, end=right)
    row_height, thick = (31.0, 9.0) if is_narrow else (21.0, 13.0)
    y = 34.0 if chart.limit is not None else 18.0
    parts = []
    start = y + 17
    whisker_y = y + 5
    low, mid, high = (
        axis.at(value) for value in (chart.interval.low, chart.interval.mid, chart.interval.high)
    )
    parts += [
        line(low, whisker_y, high, whisker_y, "whisker ink"),
        line(low, whisker_y - 4, low, whisker_y + 4, "whisker-mid ink"),
        line(high, whisker_y - 4, high, whisker_y + 4, "whisker-mid ink"),
        dot(mid, whisker_y, 3.5, "ink"),
        _within(mid, y - 6, _interval_text(chart), "strong halo", width),
    ]
    begin = 0.0
    for part in rows:
        x, wide = axis.at(begin), axis.at(begin + part.value) - axis.at(begin)
        parts.append(rect(x, start, wide, 26, f"part {part.style}", f"{part.name}: {chart.show(part.value)}"))
        if wide >= width_of(part.name) + 8:
            parts.append(text(x + wide / 2, start + 17, part.name, "inside", "middle"))
        begin += part.value
    y = start + 26 + 8
    begin = 0.0
    for part, value in zip(rows, values, strict=True):
        bar = (axis.at(begin), axis.at(begin + part.value) - axis.at(begin))
        parts += _row(part, value, bar, (y, row_height, thick), width, is_narrow=is_narrow)
        begin += part.value
        y += row_height
    if chart.others:
        y += 20
        parts.append(text(6 if is_narrow else 2, y, chart.others_label, "unit"))
        y += 6
        for part in chart.others:
            bar = (axis.at(0.0), axis.at(part.value) - axis.at(0.0))
            parts += _row(
                part, chart.show(part.value), bar, (y, row_height, thick), width, is_narrow=is_narrow
            )
            y += row_height
    y += 6
    frame = list(_x_axis(axis, y, chart.unit, grid_to=start))
    if chart.limit is not None:
        x = axis.at(chart.limit)
        frame.append(line(x, 16, x, y, "limit"))
        frame.append(text(min(x + 4, width - 2), 11, chart.limit_label, "limit-label", "end"))
    return svg(width, y + 38, chart.title, [*frame, *parts])


def _interval_text(chart: Whole) -> str:
    low, mid, high = (
        chart.show(value) for value in (chart.interval.low, chart.interval.mid, chart.interval.high)
    )
    return f"{mid} ({low} to {high})"


def _amount(value: float, total: float, show: Callable[[float], str]) -> str:
    return f"{show(value)} · {value / total:.0%}" if total > 0 else show(value)


def _row(
    part: Part,
    value: str,
    bar: tuple[float, float],
    place: tuple[float, float, float],
    width: float,
    *,
    is_narrow: bool,
) -> Iterator[str]:
    """`bar`: its left edge and width; `place`: the row's top, its height and the bar's."""
    y, height, thick = place
    baseline = y + (11 if is_narrow else height / 2 + 4)
    bar_y = y + height - thick - (4 if is_narrow else (height - thick) / 2)
    strong = " strong" if "fullest" in part.style else ""
    yield rect(bar[0], bar_y, max(bar[1], 1.0), thick, f"part row {part.style}", f"{part.name}: {value}")
    yield text(6 if is_narrow else 2, baseline, part.name, f"name halo{strong}")
    if is_narrow:
        yield text(14 + width_of(part.name, is_bold=True), baseline, value, f"amount halo{strong}")
    else:
        yield text(width - 2, baseline, value, f"amount halo{strong}", "end")


# -- points that trade one thing for another


@dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    y: float
    style: str
    """A class of the style sheet: chosen, rival, front or beyond."""
    label: str = ""
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Trade:
    title: str
    x_unit: str
    y_unit: str
    points: Sequence[Point]
    """The later ones are drawn over the earlier ones, and named before them."""
    front: Sequence[tuple[float, float]]
    """What nothing beats in both, in order of x."""
    limit: float | None
    """None: too far above to be drawn."""
    limit_label: str


def trade(chart: Trade, width: int) -> str:
    """Points with names, each where it touches no other; the front as steps; a line for y to stay under."""
    height = 300.0 if width < 450 else 400.0
    xs = [point.x for point in chart.points]
    ys = [point.y for point in chart.points]
    spread = (max(xs) - min(xs)) or 0.1 * max(xs)
    low = max(0.0, min(xs) - 0.08 * spread)
    y_axis = Axis(low=0.0, high=1.08 * max(*ys, chart.limit or 0.0), begin=height - 36, end=24.0)
    left = 12 + max(width_of(number(tick)) for tick in y_axis.ticks(6))
    x_axis = Axis(low=low, high=max(xs) + 0.08 * spread, begin=left, end=width - 8.0)
    parts = [
        *_y_axis(y_axis, left, x_axis.end, chart.y_unit),
        *_x_axis(x_axis, y_axis.begin, chart.x_unit, grid_to=y_axis.end),
    ]
    placed = [_around(x_axis.at(point.x), y_axis.at(point.y), 6.0) for point in chart.points]
    if chart.limit is not None:
        limit_y = y_axis.at(chart.limit)
        parts += [
            rect(left, y_axis.end, x_axis.end - left, limit_y - y_axis.end, "over"),
            line(left, limit_y, x_axis.end, limit_y, "limit"),
            text(x_axis.end, limit_y - 4, chart.limit_label, "limit-label halo", "end"),
        ]
        placed.append((x_axis.end - width_of(chart.limit_label), limit_y - 16, x_axis.end, limit_y + 2))
    if chart.front:
        parts.append(polyline(list(_steps(chart.front, x_axis, y_axis)), "front"))
    window = (left, y_axis.end, x_axis.end, y_axis.begin - 2)
    for point in chart.points:
        radius = 7 if point.style == "chosen" else 5
        parts.append(dot(x_axis.at(point.x), y_axis.at(point.y), radius, f"point {point.style}", point.title))
    for point in reversed(chart.points):
        if not point.label:
            continue
        x, y = x_axis.at(point.x), y_axis.at(point.y)
        box, is_far = _free_place(x, y, point.label, placed, window)
        placed.append(box)
        if is_far:
            parts.append(line(x, y, min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]), "leader"))
        middle = (box[0] + box[2]) / 2
        parts.append(text(middle, box[3] - 4, point.label, f"point-label halo {point.style}", "middle"))
    return svg(width, height, chart.title, parts)


def _steps(front: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> Iterator[tuple[float, float]]:
    """Down only where the next point is: between two points there is nothing."""
    before = None
    for x, y in front:
        if before is not None:
            yield x_axis.at(x), before
        before = y_axis.at(y)
        yield x_axis.at(x), before


def _around(x: float, y: float, reach: float) -> Box:
    return (x - reach, y - reach, x + reach, y + reach)


def _free_place(x: float, y: float, words: str, taken: Sequence[Box], bounds: Box) -> tuple[Box, bool]:
    """The nearest place for a name that touches nothing, and whether it needs a line to its point."""
    half, high = width_of(words, is_bold=True) / 2 + 1, LINE
    nearest = _around(x, y, 0.0)
    for reach in (14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0, 100.0):
        for turn in range(16):
            angle = -math.pi / 2 + (turn + 1) // 2 * (-1) ** turn * math.pi / 8
            cx = x + (reach + half - 6) * math.cos(angle)
            cy = y + reach * math.sin(angle)
            box = (cx - half, cy - high / 2, cx + half, cy + high / 2)
            if _inside(box, bounds) and not any(_touch(box, other) for other in taken):
                return box, reach > 14
            if nearest[0] == nearest[2] and _inside(box, bounds):
                nearest = box
    return nearest, True


def _inside(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
