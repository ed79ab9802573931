"""A plan as one HTML page for a person with a minute: a sentence, tiles, pictures, then tables.

The page asks nothing of any network and runs no script. Its numbers are the plan's own and the laws'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from llmtrain.model.size import num_params
from llmtrain.planner.cost.cluster import THIS_MACHINE
from llmtrain.planner.cost.layouts import describe
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.laws import (
    FLOPS_PER_PARAM_TOKEN,
    Band,
    Parametric,
    band,
    find_law,
    loss_of,
    optimal_params,
    parametric_loss,
)
from llmtrain.planner.loss.repetition import repeated
from llmtrain.planner.make import Planned
from llmtrain.planner.page_style import STYLE
from llmtrain.planner.page_tables import (
    card,
    changes,
    devices,
    duration,
    laws_table,
    listed,
    note,
    other_answers_table,
    over_training_table,
    pair,
    power_of_ten,
    reasons,
    recipe_table,
    rounded,
    runners_up,
    sources,
    span,
    step_text,
    usd_text,
    utilization,
)
from llmtrain.planner.pictures import (
    Curve,
    Part,
    Point,
    Spread,
    Trade,
    Valleys,
    Whole,
    at_both_widths,
    grouped,
    trade,
    valleys,
    whole,
)
from llmtrain.planner.plan import FLOPS_CONVENTION, PlanFile
from llmtrain.planner.report import notes
from llmtrain.units import format_bytes, format_count

BUDGETS = (0.1, 1 / 3, 1.0, 3.0, 10.0)
"""Of the plan's, those whose curves are drawn."""
LEAST_SAID = 1e-3
"""Parts of a whole below it are named without their number."""
CURVE_POINTS = 61
ARM = 0.5
"""How far curves are drawn above their lowest points, in parts of what lies between the lowest points."""
FAR_LIMIT = 4.0
"""A capacity so many times what is used would squeeze the picture: it is said in words."""
OFF_CURVE = 0.03
"""From such a share of the FLOPs on, it is said why the plan does not lie on its curve."""
OFF_FORECAST = 0.02
"""From such a share of the loss on, it is said why the curve does not give the forecast."""
SLOWEST = 2.5
"""Layouts that take so many times the chosen one's step are counted, not drawn."""

TIME_UNITS = (("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
BYTE_UNITS = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
TIME_NAMES = {
    "products": ("matrix products", "useful"),
    "attention": ("attention", "useful-2"),
    "elementwise": ("memory-bound", "side"),
    "launches": ("launches", "side-2"),
    "recompute": ("recompute", "side"),
    "loss": ("head and loss", "side-2"),
    "tp": ("tp exchange", "wire"),
    "cp": ("cp exchange", "wire-2"),
    "ep": ("ep exchange", "wire"),
    "pp": ("pp sends", "wire-2"),
    "dp": ("dp, exposed", "wire"),
    "bubble": ("bubble", "idle"),
    "optimizer": ("optimizer", "side"),
    "other": ("other", "rest"),
}
"""Part of a step -> its name and its class in the style sheet."""
MEMORY_NAMES = {
    "weights": ("weights", "useful"),
    "gradients": ("gradients", "useful-2"),
    "optimizer": ("optimizer", "useful"),
    "activations": ("activations", "wire"),
    "loss": ("logits and loss", "wire-2"),
    "buffers": ("buffers", "side"),
    "workspace": ("workspace", "side-2"),
}


def plan_page(planned: Planned, *, commands: Sequence[str] = ()) -> str:
    """The page, whole.

    Args:
        commands: shell lines that train the plan, shown as they are.
    """
    plan = planned.plan
    found = band(planned.target.flops)
    body = [
        f"<h1>{escape(plan.name)}</h1>",
        f'<p class="verdict">{escape(verdict(plan))}</p>',
        _tiles(plan, found),
        card("Size against tokens", _sizes(planned, found), "wide"),
        pair(
            card("A step, by part", _step(plan)), card("Memory of the fullest rank, by part", _memory(plan))
        ),
        pair(
            card("Layouts", _layouts(planned)),
            card("The chosen layout, and why others lost", runners_up(plan)),
        ),
        pair(card("Why this", reasons(planned)), card("What would change the answer", changes(plan))),
        pair(card("Recipe", recipe_table(planned)), card("Utilization", utilization(plan))),
        card("What every law would train for these FLOPs", laws_table(planned, found), "wide"),
        card(
            "Smaller and longer, bigger and shorter",
            over_training_table(*loss_of(find_law(plan.law)), planned.target.flops),
            "wide",
        ),
        card(
            "Mixtures of experts and low precision",
            other_answers_table(planned.target.num_params, planned.target.num_tokens),
            "wide",
        ),
        card("Keep in mind", listed(notes(planned)), "wide"),
        card("Where numbers come from", listed(sources(planned)), "wide"),
    ]
    if commands:
        body.append(card("Train it", f"<pre>{escape(chr(10).join(commands))}</pre>", "wide"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(plan.name)}: plan</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}"
        "<footer>Written by llmtrain plan. Intervals: 8 runs in 10 lie inside.</footer>"
        "</main></body></html>\n"
    )


def verdict(plan: PlanFile) -> str:
    """The plan in a sentence."""
    forecast = plan.forecast
    total = forecast.total_s
    money = f", {usd_text(forecast.usd.mid)}" if forecast.usd is not None else ""
    return (
        f"{format_count(num_params(plan.choice.model))} parameters on "
        f"{format_count(plan.choice.total_tokens)} tokens: {duration(total.mid)} on {devices(plan)} "
        f"({span(total, duration)}){money}, ends near {forecast.loss.mid:.2f} nats a token."
    )


# -- tiles


def _tiles(plan: PlanFile, found: Band) -> str:
    forecast, capacity = plan.forecast, plan.cluster.gpu.mem_bytes
    mfu = forecast.mfu[FLOPS_CONVENTION]
    hours = "device-hours" if plan.cluster.gpu.name == THIS_MACHINE else "GPU-hours"
    usd, size = forecast.usd, num_params(plan.choice.model)
    tokens = plan.choice.total_tokens
    tiles = [
        ("parameters", format_count(size), "", f"laws: {span(found.num_params, format_count)}"),
        (
            "tokens",
            format_count(tokens),
            f"{tokens / size:.3g} a parameter",
            f"laws: {span(found.num_tokens, format_count)}",
        ),
        ("time", duration(forecast.total_s.mid), "", span(forecast.total_s, duration)),
        (hours, rounded(forecast.gpu_hours.mid), "", span(forecast.gpu_hours, rounded)),
        (
            "cost",
            "no price" if usd is None else usd_text(usd.mid),
            "",
            "give cluster.price_usd_per_gpu_hour" if usd is None else span(usd, usd_text),
        ),
        ("MFU", f"{mfu.mid:.1%}", f"{FLOPS_CONVENTION} count", span(mfu, lambda share: f"{share:.1%}")),
        (
            "peak memory",
            format_bytes(forecast.peak_bytes.mid),
            f"of {format_bytes(capacity)}",
            span(forecast.peak_bytes, format_bytes),
        ),
        (
            "loss at the end",
            f"{forecast.loss.mid:.2f}",
            "nats a token",
            span(forecast.loss, lambda v: f"{v:.2f}"),
        ),
    ]
    cells = "".join(
        f'<div class="card tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)} '
        f'<small>{escape(unit)}</small></div><div class="note">{escape(note)}</div></div>'
        for name, value, unit, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


# -- size against tokens


def iso_flops(planned: Planned, found: Band) -> Valleys:
    """Loss against parameters along budgets around the plan's, and the laws' optima at its own."""
    plan, flops = planned.plan, planned.target.flops
    _, form = loss_of(find_law(plan.law))
    size, tokens = float(num_params(plan.choice.model)), float(plan.choice.total_tokens)
    unique = plan.unique_tokens if plan.unique_tokens is not None and plan.unique_tokens < tokens else None
    lowest = {share: float(optimal_params(form, share * flops)) for share in BUDGETS}
    losses = {share: _along(form, share * flops)(best) for share, best in lowest.items()}
    reached = _along(form, FLOPS_PER_PARAM_TOKEN * size * tokens, unique)(size)
    arm = max(ARM * (losses[BUDGETS[0]] - losses[BUDGETS[-1]]), 1.15 * (reached - losses[1.0]))
    curves = []
    for share in BUDGETS:
        xs, ys = _arms(_along(form, share * flops), lowest[share], losses[share] + arm)
        style = "this" if share == 1.0 else "around"
        label, low_label = power_of_ten(share * flops), format_count(lowest[share])
        curves.append(Curve(label=label, xs=xs, ys=ys, style=style, low_label=low_label))
    if unique is not None:
        xs, ys = _arms(_along(form, flops, unique), planned.target.num_params, losses[1.0] + arm)
        label = f"{format_count(unique)} unique"
        curves.append(Curve(label=label, xs=xs, ys=ys, style="limited", is_named_left=True))
    rows = sorted(found.rows, key=lambda row: row.optimum.num_params)
    return Valleys(
        title="Loss against parameters for five budgets, and each law's optimum",
        x_unit="parameters",
        y_unit="nats a token; one curve a budget, FLOPs",
        curves=curves,
        choice=(size, reached),
        choice_label=f"{format_count(size)} parameters, {format_count(tokens)} tokens",
        band=found.num_params,
        band_label=f"laws that vote, 80%: {span(found.num_params, format_count)}",
        spreads=[
            Spread(
                label=row.optimum.law + ("" if row.votes else ", no vote"),
                interval=row.num_params,
                style="this" if row.optimum.law == plan.law else "voting" if row.votes else "silent",
            )
            for row in rows
        ],
        spreads_label="each law's optimum for the plan's budget, 80%",
    )


def _along(form: Parametric, flops: float, unique_tokens: float | None = None) -> Callable[[float], float]:
    """Loss against parameters for a budget."""

    def loss(size: float) -> float:
        tokens = flops / FLOPS_PER_PARAM_TOKEN / size
        if unique_tokens is None:
            return parametric_loss(form, size, tokens)
        return repeated(form, num_params=size, num_tokens=tokens, unique_tokens=unique_tokens).loss

    return loss


def _arms(loss: Callable[[float], float], best: float, top: float) -> tuple[list[float], list[float]]:
    """Sizes about `best` at which `loss` is up to `top`, evenly spaced in logarithms, and their losses."""

    def end(direction: int) -> float:
        inside, outside = math.log(best), math.log(best) + direction * math.log(1e4)
        for _ in range(40):
            middle = 0.5 * (inside + outside)
            inside, outside = (middle, outside) if loss(math.exp(middle)) <= top else (inside, middle)
        return inside

    low, high = end(-1), end(1)
    xs = [math.exp(low + (high - low) * at / (CURVE_POINTS - 1)) for at in range(CURVE_POINTS)]
    return xs, [loss(x) for x in xs]


def _sizes(planned: Planned, found: Band) -> str:
    plan = planned.plan
    name, _ = loss_of(find_law(plan.law))
    chart = iso_flops(planned, found)
    said = [f"Curves: {name}" + ("." if name == plan.law else f", because {plan.law} has no loss.")]
    spent = FLOPS_PER_PARAM_TOKEN * num_params(plan.choice.model) * plan.choice.total_tokens
    if abs(spent / planned.target.flops - 1) > OFF_CURVE:
        said.append(
            f"Six FLOPs a parameter and token of the plan are {power_of_ten(spent)}, not its curve's "
            f"{power_of_ten(planned.target.flops)}: attention, head and rounded sizes set it a little off."
        )
    if plan.unique_tokens is not None and plan.unique_tokens < plan.choice.total_tokens:
        said.append(
            f"Dashed: the same budget on {format_count(plan.unique_tokens)} unique tokens, read "
            f"{plan.choice.total_tokens / plan.unique_tokens:.1f} times."
        )
    if abs(chart.choice[1] / plan.forecast.loss.mid - 1) > OFF_FORECAST:
        nothing = math.log(plan.choice.model.vocab_size)
        beyond = (
            f", more than a model that knows nothing has ({nothing:.2f})" if chart.choice[1] > nothing else ""
        )
        said.append(
            f"These curves give the plan {chart.choice[1]:.2f} nats{beyond}; the forecast of "
            f"{plan.forecast.loss.mid:.2f} is {plan.forecast.loss_law}'s, whose runs lie nearest."
        )
    said.append("A law without a vote is known to be wrong about the optimum.")
    return at_both_widths(lambda width: valleys(chart, width), wide=1150) + note(" ".join(said))


# -- time and memory


def step_parts(plan: PlanFile) -> list[Part]:
    """Seconds of a step; they add up to the step."""
    return _named(plan.forecast.time_parts, TIME_NAMES)


def memory_parts(plan: PlanFile) -> list[Part]:
    """Bytes at the fullest instant and what the allocator and the driver take beside them: the peak."""
    parts = _named(plan.forecast.memory_parts, MEMORY_NAMES)
    beside = plan.forecast.peak_bytes.mid - sum(part.value for part in parts)
    if beside > 0:
        parts.append(Part(name="allocator, driver", value=beside, style="rest"))
    return parts


def _named(values: Mapping[str, float], names: Mapping[str, tuple[str, str]]) -> list[Part]:
    """A part without a name here keeps its own."""
    found = []
    for key, value in values.items():
        name, style = names.get(key, (key.replace("_", " "), "rest"))
        found.append(Part(name=name, value=value, style=style))
    return found


def _step(plan: PlanFile) -> str:
    interval = plan.forecast.step_s
    unit, size = _unit(interval.high, TIME_UNITS)
    parts = _scaled(step_parts(plan), size)
    chart = Whole(
        title="Seconds of a step by part",
        unit=f"{unit} a step",
        parts=parts,
        interval=_over(interval, size),
        show=lambda value: f"{value:.3g} {unit}",
    )
    groups = (
        ("useful", "matrices"),
        ("side", "other work"),
        ("wire", "communication that nothing hides"),
        ("idle", "waiting and other"),
    )
    keys = "".join(
        f'<span class="group"><i class="key {style}"></i>{words}</span> ' for style, words in groups
    )
    small = _smaller(parts, chart.show)
    return (
        at_both_widths(lambda width: whole(chart, width), wide=556)
        + f'<p class="note">{keys}</p>'
        + note(small)
    )


def _memory(plan: PlanFile) -> str:
    forecast, capacity = plan.forecast, plan.cluster.gpu.mem_bytes
    interval = forecast.peak_bytes
    unit, size = _unit(interval.high, BYTE_UNITS)
    fullest = max(forecast.memory_instants, key=lambda instant: forecast.memory_instants[instant])
    is_far = capacity > FAR_LIMIT * interval.high
    parts = _scaled(memory_parts(plan), size)
    chart = Whole(
        title="Peak memory by part",
        unit=unit,
        parts=parts,
        interval=_over(interval, size),
        show=lambda value: f"{value:.3g} {unit}",
        limit=None if is_far else capacity / size,
        limit_label=f"the GPU has {format_bytes(capacity)}",
        others=[
            Part(name=name, value=value / size, style="fullest" if name == fullest else "instant")
            for name, value in forecast.memory_instants.items()
        ],
        others_label="allocated at each instant of a step",
    )
    said = [_smaller(parts, chart.show)]
    if is_far:
        said.append(f"The device has {format_bytes(capacity)}, {capacity / interval.mid:.0f} times as much.")
    return at_both_widths(lambda width: whole(chart, width), wide=556) + note(" ".join(said))


def _smaller(parts: Sequence[Part], show: Callable[[float], str]) -> str:
    """What the pictures put together."""
    least = LEAST_SAID * sum(part.value for part in parts)
    small = sorted((part for part in grouped(parts)[1] if part.value > 0), key=lambda part: -part.value)
    said = [f"{part.name} {show(part.value)}" for part in small if part.value >= least]
    unsaid = [part.name for part in small if part.value < least]
    return "".join(
        [
            f"Smaller: {', '.join(said)}. " if said else "",
            f"Under {LEAST_SAID:.1%}: {', '.join(unsaid)}." if unsaid else "",
        ]
    )


def _unit(largest: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    return next((each for each in units if largest >= each[1]), units[-1])


def _over(interval: Interval, size: float) -> Interval:
    return Interval(low=interval.low / size, mid=interval.mid / size, high=interval.high / size)


def _scaled(parts: Iterable[Part], size: float) -> list[Part]:
    return [Part(name=part.name, value=part.value / size, style=part.style) for part in parts]


# -- layouts


Cost = tuple[float, float, str]
"""Seconds of a step, peak bytes, and the layout in words."""


def layout_trade(planned: Planned) -> tuple[Trade | None, int]:
    """Step time against peak memory of layouts that fit; no picture of one alone. And how many that the
    search kept are not drawn, for they take far more."""
    plan, ranked = planned.plan, planned.ranked
    capacity, forecast = plan.cluster.gpu.mem_bytes, plan.forecast
    chosen: Cost = (forecast.step_s.mid, forecast.peak_bytes.mid, describe(plan.choice.layout))
    rivals: list[Cost] = [
        (each.step_s.mid, each.peak_bytes.mid, describe(each.layout)) for each in plan.runners_up
    ]
    highest = max(each[1] for each in (chosen, *rivals))
    is_far = capacity > FAR_LIMIT * highest
    kept: set[Cost] = {
        (each.step_s.mid, each.peak_bytes.mid, describe(each.layout))
        for each in (*ranked.ranking, *ranked.runners_up, *ranked.variants, *ranked.pareto)
        if each.peak_bytes.high <= capacity
    }

    def is_near(each: Cost) -> bool:
        return each[0] <= SLOWEST * chosen[0] and (not is_far or each[1] <= SLOWEST * highest)

    near = sorted(each for each in kept if is_near(each) and each[2] != chosen[2])
    if not near:
        return None, len(kept) - 1
    front = sorted((*near, chosen))
    front = [each for at, each in enumerate(front) if all(each[1] < other[1] for other in front[:at])]
    time_unit, second = _unit(chosen[0], TIME_UNITS)
    byte_unit, byte = _unit(highest, BYTE_UNITS)

    def point(at: Cost, style: str, label: str) -> Point:
        title = f"{at[2]}: {step_text(at[0])}, {format_bytes(at[1])}"
        return Point(x=at[0] / second, y=at[1] / byte, style=style, label=label, title=title)

    named = {each[2]: str(rank) for rank, each in enumerate(rivals, start=1)}
    points = [point(each, "kept", "") for each in near if each[2] not in named]
    points += [point(each, "rival", named[each[2]]) for each in near if each[2] in named]
    points.append(point(chosen, "chosen", "chosen"))
    picture = Trade(
        title="Step time against peak memory of layouts that fit",
        x_unit=f"step, {time_unit}",
        y_unit=f"peak memory, {byte_unit}",
        points=points,
        front=[(x / second, y / byte) for x, y, _ in front],
        limit=None if is_far else capacity / byte,
        limit_label=f"the GPU has {format_bytes(capacity)}",
    )
    return picture, len(kept) - len(near) - 1


def _layouts(planned: Planned) -> str:
    plan, ranked = planned.plan, planned.ranked
    chart, num_hidden = layout_trade(planned)
    said = (
        f"{ranked.num_legal:,} layouts are legal for {plan.program}; {ranked.num_fitting:,} of them fit even "
        "at the high end of their memory's interval. "
    )
    if chart is None:
        return note(said)
    said += "The line: layouts that no other beats in both. Numbers: the table. Grey: others near the best. "
    if num_hidden > 0:
        said += f"{num_hidden} more that the search kept take too long or too much for this picture. "
    if chart.limit is None:
        said += f"The device has {format_bytes(plan.cluster.gpu.mem_bytes)}, far above. "
    return at_both_widths(lambda width: trade(chart, width), wide=556) + note(said)
