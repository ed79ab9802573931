"""The tables of a plan's page, and its numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from llmtrain.model.size import FLOPS_CONVENTIONS, flops_per_token, num_params, num_params_by_part
from llmtrain.planner.cost.cluster import THIS_MACHINE
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.layouts import describe
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.inference import over_training
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN, LAWS, Band, Parametric, find_law
from llmtrain.planner.loss.other_data import DIFFERENT_DATA, other_answers
from llmtrain.planner.loss.repetition import notes as repetition_notes
from llmtrain.planner.make import Planned
from llmtrain.planner.plan import FLOPS_CONVENTION, PlanFile
from llmtrain.planner.recipe import DEEPSEEK, STEP_LAW, Lengths
from llmtrain.units import format_bytes, format_count, format_duration, format_flops

CONVENTION_NAMES = {
    "palm": "PaLM's: every key counts",
    "causal": "causal: keys before the query",
    "fused": "the hardware's, under fused attention",
}
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


# -- numbers


def duration(seconds: float) -> str:
    """The two largest units: '5 d 3 h', '7 h 12 min', '3 min 20 s', '9.4 s', '412 ms'."""
    if not math.isfinite(seconds) or seconds < MINUTE - 0.5:
        return format_duration(seconds)
    for large, small, names in ((DAY, HOUR, "d h"), (HOUR, MINUTE, "h min"), (MINUTE, 1.0, "min s")):
        if seconds >= large - 0.5 * small:
            whole, rest = divmod(round(seconds / small), round(large / small))
            first, second = names.split()
            return f"{whole:,} {first} {rest} {second}" if rest and whole < 100 else f"{whole:,} {first}"
    raise AssertionError("a minute or more is one of the three")


def step_text(seconds: float) -> str:
    """Three digits: a step's rivals are near."""
    if seconds >= 10 * MINUTE:
        return duration(seconds)
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1e3 * seconds, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def rounded(value: float) -> str:
    """Three significant digits: 26.6M; 15,700; 3.27."""
    if value >= 1e6:
        return format_count(value)
    return f"{float(f'{value:.3g}'):,.10g}"


def power_of_ten(value: float) -> str:
    """Three significant digits: 3.33e20, 7.06e-4."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def usd_text(value: float) -> str:
    return f"${rounded(value)}" if value >= 100 else f"${value:.2f}"


def span(interval: Interval, show: Callable[[float], str]) -> str:
    return f"{show(interval.low)} to {show(interval.high)}"


def devices(plan: PlanFile) -> str:
    cluster = plan.cluster
    if cluster.gpu.name == THIS_MACHINE:
        return "this machine" if cluster.num_gpus == 1 else f"{cluster.num_gpus} ranks of this machine"
    return f"{cluster.num_gpus:,} x {cluster.gpu.name}"


# -- pieces of HTML


def card(title: str, content: str, style: str = "") -> str:
    return f'<section class="card {style}"><h2>{escape(title)}</h2>{content}</section>'


def pair(left: str, right: str) -> str:
    return f'<div class="halves">{left}{right}</div>'


def note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>' if words else ""


def listed(items: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, words: frozenset[int] = frozenset({0})
) -> str:
    """Columns in `words` hold text and may wrap; the others hold numbers, flush right. A first cell that
    begins with "*" makes its row stand out. What follows a line break in a cell is small."""

    def cell(at: int, content: str, kind: str) -> str:
        style = "" if at in words else ' class="right"'
        first, _, more = content.partition("\n")
        small = f"<small>{escape(more)}</small>" if more else ""
        return f"<{kind}{style}>{escape(first)}{small}</{kind}>"

    top = "".join(cell(at, content, "th") for at, content in enumerate(head))
    lines = []
    for row in rows:
        is_strong = row[0].startswith("*")
        cells = "".join(cell(at, content.removeprefix("*"), "td") for at, content in enumerate(row))
        style = ' class="strong"' if is_strong else ""
        lines.append(f"<tr{style}>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in rows) + "</dl>"
    )


# -- the tables


def runners_up(plan: PlanFile) -> str:
    forecast = plan.forecast

    def row(rank: str, layout: Layout, step_s: Interval, peak_bytes: Interval, why: str) -> list[str]:
        lost = f"\n{why}" if why else ""
        return [rank, describe(layout) + lost, step_text(step_s.mid), format_bytes(peak_bytes.mid)]

    rows = [row("*\u2713", plan.choice.layout, forecast.step_s, forecast.peak_bytes, "")]
    rows += [
        row(str(rank), each.layout, each.step_s, each.peak_bytes, each.why)
        for rank, each in enumerate(plan.runners_up, start=1)
    ]
    return table(["", "layout, and why it lost", "step", "peak"], rows, words=frozenset({0, 1}))


def changes(plan: PlanFile) -> str:
    if not plan.sensitivity:
        return note("Nothing was varied.")
    rows = [[each.change, _ratio(each.total_ratio), each.layout] for each in plan.sensitivity]
    return table(["change", "time of the run", "best layout then"], rows, words=frozenset({0, 2}))


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "none fits"
    return f"{ratio - 1:+.1%}" if abs(ratio - 1) >= 5e-4 else "no change"


def reasons(planned: Planned) -> str:
    plan, target, model = planned.plan, planned.target, planned.plan.choice.model
    parts, total = num_params_by_part(model), num_params(model)
    embedding = parts["embedding"] + parts["head"]
    real = flops_per_token(model, plan.choice.seq_len, convention=FLOPS_CONVENTION)
    rows = [
        ("budget", plan.budget_text),
        ("size", target.reason if plan.law in target.reason else f"{target.reason} ({plan.law})"),
        (
            "shape",
            f"{model.num_layers} layers x {model.d_model} wide, {model.num_heads} heads of "
            f"{model.width_per_head}, {model.num_kv_heads} key/value heads, ffn {model.ffn_width}, "
            f"vocabulary {model.vocab_size:,}, "
            f"{'tied' if model.tie_embeddings else 'separate'} embeddings",
        ),
        (
            "parameters",
            f"{total:,}, of which embedding and head {embedding / total:.0%}; "
            f"{planned.size_ratio:.2f} x what is wished",
        ),
        (
            "FLOPs",
            f"{real:.4g} a token with attention and head ({FLOPS_CONVENTION}): "
            f"{real / total:.2f} a parameter, where laws count {FLOPS_PER_PARAM_TOKEN:g}",
        ),
    ]
    if target.served is not None:
        served = target.served
        rows.append(
            (
                "serving",
                f"at {served.best.loss:.3f} nats: {format_count(served.best.num_params)} on "
                f"{format_count(served.best.num_tokens)} instead of "
                f"{format_count(served.optimum.num_params)} on "
                f"{format_count(served.optimum.num_tokens)} saves {served.saved:.0%} of training and serving",
            )
        )
    if target.repeated is not None:
        rows.append(("repeats", "; ".join(repetition_notes(target.repeated))))
    rows.append(("layout", describe(plan.choice.layout)))
    rows.append(("goodput", f"{plan.cluster.goodput:.0%} of the hours are steps that count"))
    return pairs(rows)


def recipe_table(planned: Planned) -> str:
    recipe, choice = planned.recipe, planned.plan.choice
    ours, theirs, critical = recipe.step_law, recipe.deepseek, recipe.critical_batch
    rows = [
        [
            "batch, tokens",
            format_count(choice.global_batch_tokens),
            format_count(ours.batch_tokens),
            format_count(theirs.batch_tokens),
        ],
        [
            "peak learning rate",
            *(power_of_ten(value) for value in (choice.peak_lr, ours.peak_lr, theirs.peak_lr)),
        ],
        [
            "outside its runs",
            "",
            _decades(recipe.step_law_decades_outside),
            _decades(recipe.deepseek_decades_outside),
        ],
    ]
    facts = [
        ("rate", recipe.peak_lr_reason),
        (
            "critical batch",
            f"{format_count(critical.tokens)} tokens ({_decades(critical.decades_outside)}); this one costs "
            f"{critical.extra_tokens(choice.global_batch_tokens):.1%} more tokens for the same loss",
        ),
        (
            "batch",
            f"{choice.global_batch_rows:,} rows x {choice.seq_len:,}, {choice.num_steps:,} steps",
        ),
        ("*wsd" if choice.schedule == "wsd" else "wsd", _lengths(recipe.wsd)),
        ("*cosine" if choice.schedule != "wsd" else "cosine", _lengths(recipe.cosine)),
    ]
    facts = [(f"{name[1:]}, chosen" if name.startswith("*") else name, words) for name, words in facts]
    return table(["", "this plan", "Step Law", "DeepSeek"], rows) + pairs(facts)


def _lengths(lengths: Lengths) -> str:
    stable = f"{format_count(lengths.stable_tokens)} constant, " if lengths.stable_tokens else ""
    down = "down over" if lengths.kind == "wsd" else "half a cosine over"
    return (
        f"{format_count(lengths.warmup_tokens)} warm-up, {stable}{down} "
        f"{format_count(lengths.decay_tokens)} tokens"
    )


def utilization(plan: PlanFile) -> str:
    peak = plan.cluster.gpu.peak(plan.precision)
    rows = []
    for convention in FLOPS_CONVENTIONS:
        share = plan.forecast.mfu[convention]
        mark = "*" if convention == FLOPS_CONVENTION else ""
        rows.append(
            [
                mark + CONVENTION_NAMES.get(convention, convention),
                f"{share.mid:.1%}",
                span(share, lambda value: f"{value:.1%}"),
            ]
        )
    rate = plan.forecast.tokens_per_s
    facts = [
        ("peak", f"{format_flops(peak)} in {plan.precision} a device"),
        ("tokens/s", f"{format_count(rate.mid)} ({span(rate, format_count)}), all devices"),
        (
            "step",
            f"{step_text(plan.forecast.step_s.mid)} ({span(plan.forecast.step_s, step_text)})",
        ),
        (
            "steps alone",
            f"{duration(plan.forecast.train_s.mid)}; with goodput {duration(plan.forecast.total_s.mid)}",
        ),
        ("constants", plan.forecast.constants_from),
    ]
    return table(["useful FLOPs over peak", "MFU", "80%"], rows) + pairs(facts)


def laws_table(planned: Planned, found: Band) -> str:
    plan = planned.plan
    rows = []
    for row in sorted(found.rows, key=lambda each: each.optimum.num_params):
        best, law = row.optimum, LAWS[row.optimum.law]
        rows.append(
            [
                ("*" if best.law == plan.law else "") + best.law + ("" if row.votes else " (no vote)"),
                format_count(best.num_params),
                span(row.num_params, format_count),
                format_count(best.num_tokens),
                f"{best.tokens_per_param:.3g}",
                _decades(best.decades_outside),
                f"{law.text}; {law.counted}",
            ]
        )
    rows.append(
        [
            "*all that vote",
            format_count(found.num_params.mid),
            span(found.num_params, format_count),
            format_count(found.num_tokens.mid),
            f"{found.tokens_per_param.mid:.3g}",
            "",
            "each family of runs has one vote",
        ]
    )
    head = ["law", "parameters", "80%", "tokens", "a parameter", "outside its runs", "text; what N counts"]
    traps = [f"{law.name}: {trap}" for law in LAWS.values() for trap in law.traps]
    return (
        table(head, rows, words=frozenset({0, 6}))
        + f"<details><summary>What each law gets wrong, or its readers ({len(traps)})</summary>"
        + f"{listed(traps)}</details>"
    )


def over_training_table(name: str, form: Parametric, flops: float) -> str:
    rows = [
        [
            f"{each.tokens_per_param:g}",
            format_count(each.num_params),
            format_count(each.num_tokens),
            f"{each.extra_training:+.0%}",
            f"{-each.saved_inference:+.0%}",
            f"{each.loss_of_same_flops:.3f}",
            f"{each.penalty:+.1%}",
            "overrated by the law" if each.is_over_valued else "",
        ]
        for each in over_training(form, flops=flops)
    ]
    head = [
        "tokens a parameter",
        "parameters",
        "tokens",
        "training FLOPs",
        "FLOPs of a served token",
        "same FLOPs: loss",
        "same FLOPs: over the best",
        "",
    ]
    words = (
        f"By {name}, for {flops:.3g} FLOPs. Parameters to served token: the model that reaches the optimum's "
        "loss at this ratio. Same FLOPs: the budget spent at this ratio instead."
    )
    return table(head, rows, words=frozenset({7})) + note(words)


def other_answers_table(num_params: float, num_tokens: float) -> str:
    rows = [[each.change, each.answer, each.source] for each in other_answers(num_params, num_tokens)]
    return table(["instead", "by its law", "source"], rows, words=frozenset({1, 2})) + note(DIFFERENT_DATA)


def sources(planned: Planned) -> list[str]:
    plan, cluster = planned.plan, planned.plan.cluster
    found = [
        f"size against tokens: {find_law(plan.law).source}",
        f"loss: {plan.forecast.loss_law}, {find_law(plan.forecast.loss_law).source}",
        f"batch and rate: {STEP_LAW}; {DEEPSEEK}",
        f"device {cluster.gpu.name}: {cluster.gpu.source}",
        f"cluster {cluster.name}: {cluster.source}",
        f"step time: {plan.forecast.constants_from}",
    ]
    if cluster.price_usd_per_gpu_hour is not None:
        dated = f", {cluster.price_date}" if cluster.price_date else ""
        source = cluster.price_source or "as given"
        found.append(f"price: ${cluster.price_usd_per_gpu_hour:g} a GPU-hour, {source}{dated}")
    if planned.target.served is not None:
        found.append("serving: Sardana et al. 2023, arXiv:2401.00448")
    if planned.target.repeated is not None:
        found.append("repeats: Muennighoff et al. 2023, arXiv:2305.16264")
    return found


def _decades(decades: float) -> str:
    return f"{decades:.1f} decades" if decades >= 0.05 else "inside"
