"""A plan as people read it on a terminal, and as `train` takes it."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmtrain.files import plain
from llmtrain.model.size import flops_per_token, num_params, num_params_by_part
from llmtrain.planner.config import DataWishConfig
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.layouts import describe
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.inference import over_training
from llmtrain.planner.loss.laws import TEXT_FACTOR, Band, band, find_law, loss_of
from llmtrain.planner.loss.other_data import DIFFERENT_DATA, other_answers
from llmtrain.planner.loss.repetition import CHEAP_EPOCHS, Repeated, repeated
from llmtrain.planner.loss.repetition import notes as repetition_notes
from llmtrain.planner.make import Planned
from llmtrain.planner.plan import FLOPS_CONVENTION, PlanFile
from llmtrain.planner.recipe import DEEPSEEK, STEP_LAW
from llmtrain.planner.shape import ASPECT_HIGH, ASPECT_LOW
from llmtrain.units import format_bytes, format_count, format_duration, format_flops

COLUMNS = 110
FAR_DECADES = 0.5
"""Assumed, not measured: past half a decade outside its runs a law is called an extrapolation in a note."""
MISSED_SIZE = 1.4
"""Assumed, not measured: past this factor between shape and law a note says so."""
CHECKS_PER_RUN = 10
"""Evaluations and checkpoints that the experiment asks for."""
BAR = 40
"""Characters of the longest bar."""
DEFAULT_SEQ_LEN = DataWishConfig().seq_len
LEAST_SHARE = 0.005
"""Parts below it are summed as "rest"."""


def plan_text(planned: Planned) -> str:
    """The whole report, for a terminal COLUMNS wide."""
    plan = planned.plan
    forecast = plan.forecast
    blocks = [
        [f"PLAN {plan.name}", *_pairs(_budget_facts(planned))],
        ["WHAT TO TRAIN", *_pairs(_target_facts(planned))],
        ["WHAT EVERY LAW WOULD TRAIN FOR THESE FLOPS", *_law_table(planned)],
        ["THE RECIPE", *_pairs(_recipe_facts(planned))],
        ["THE LAYOUT", *_layout_table(planned)],
        ["WHAT TO EXPECT (8 runs in 10 lie in the brackets)", *_pairs(_expectations(plan))],
        ["A STEP, BY PART", *_bars(forecast.time_parts, format_duration)],
        ["MEMORY OF THE FULLEST RANK, BY PART", *_bars(forecast.memory_parts, format_bytes)],
        *([["WHAT WOULD CHANGE IT", *_sensitivity(plan)]] if plan.sensitivity else []),
        ["SMALLER AND LONGER: THE SAME LOSS AT OTHER TOKENS A PARAMETER", *_over_training(planned)],
        ["MIXTURES AND LOW PRECISION", *_other_answers(planned)],
        ["KEEP IN MIND", *(line for note in notes(planned) for line in _wrapped("  - ", note))],
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def notes(planned: Planned) -> list[str]:
    """Everything about this plan that is weaker than its digits look."""
    plan, recipe, wish = planned.plan, planned.recipe, planned.target.law_optimum
    model, forecast = plan.choice.model, plan.forecast
    law = find_law(plan.law)
    found = list(planned.target.notes)
    found += [f"{law.name}: {trap}" for trap in law.traps]
    if wish.decades_outside > FAR_DECADES:
        found.append(
            f"{plan.law} is stretched {wish.decades_outside:.1f} powers of ten past the runs it was fitted "
            f"to ({_range_text(law.fitted.num_params)} parameters, {_range_text(law.fitted.num_tokens)} "
            "tokens): "
            f"take its optimum as a starting point, not a fact."
        )
    if not 1 / MISSED_SIZE <= planned.size_ratio <= MISSED_SIZE:
        embedding = num_params_by_part(model)["embedding"] / num_params(model)
        found.append(
            f"{format_count(planned.target.num_params)} parameters are wished; the nearest shape has "
            f"{planned.size_ratio:.1f} times as many, {embedding:.0%} of them in the embedding of "
            f"{model.vocab_size} tokens. A smaller vocabulary or a larger budget would bring them together."
        )
    if recipe.step_law_decades_outside > FAR_DECADES:
        found.append(
            f"the Step Law is stretched {recipe.step_law_decades_outside:.1f} powers of ten too: try two or "
            f"three learning rates (`llmtrain train -m ... optimizer.peak_lr=...`) before a run that matters."
        )
    extra = recipe.critical_batch.extra_tokens(plan.choice.global_batch_tokens)
    if extra > 0.2:
        found.append(
            f"the batch of {format_count(plan.choice.global_batch_tokens)} tokens is past the critical one "
            "of "
            f"{format_count(recipe.critical_batch.tokens)} (Zhang et al. 2024, arXiv:2410.21676): the same "
            "loss may "
            f"take {extra:.0%} more tokens."
        )
    if forecast.loss_decades_outside > FAR_DECADES:
        found.append(
            f"no law was fitted near this run: the nearest, {forecast.loss_law}, ends "
            f"{forecast.loss_decades_outside:.1f} powers of ten away. The loss interval is wide on purpose."
        )
    if forecast.peak_bytes.high > plan.cluster.gpu.mem_bytes:
        found.append(
            f"memory may not suffice: 1 run in 10 takes more than {format_bytes(forecast.peak_bytes.high)} "
            "of "
            f"{format_bytes(plan.cluster.gpu.mem_bytes)}, so far from the calibrated runs; try a step before "
            "you plan on it."
        )
    if plan.choice.seq_len == DEFAULT_SEQ_LEN and num_params(model) > 1e9:
        found.append(
            f"rows of data.seq_len={DEFAULT_SEQ_LEN} tokens and a vocabulary of {model.vocab_size} are this "
            "verb's "
            "defaults, made for small models: give yours."
        )
    found.append(f"times: {forecast.constants_from}.")
    if plan.calibration is None:
        found.append(
            "nothing of this cluster was measured: after a first short run, `llmtrain plan calibrate "
            "run=FOLDER`, and "
            "plan again with plan.calibration=calibration.json."
        )
    repeats = _repeats(planned)
    if repeats is not None:
        found += repetition_notes(repeats)
    elif plan.unique_tokens is None:
        found.append(
            f"the run reads {format_count(plan.choice.total_tokens)} tokens: have at least 1 / "
            f"{CHEAP_EPOCHS:g} of them "
            "unique (up to 4 epochs cost almost nothing, Muennighoff et al. 2023, arXiv:2305.16264), or give "
            "data.unique_tokens."
        )
    found.append(
        f"laws speak of their own text and tokenizer; the loss interval is widened by {TEXT_FACTOR:g} for "
        "yours."
    )
    unverified = plan.cluster.gpu.unverified
    if unverified:
        found.append(f"from memory, unverified, for {plan.cluster.gpu.name}: {', '.join(unverified)}.")
    return found


def experiment_yaml(plan: PlanFile, *, plan_path: Path) -> str:
    """What `llmtrain train` changes for this plan: a file for conf/experiment or any folder given to
    --config-dir."""
    choice, model, layout, cluster = plan.choice, plan.choice.model, plan.choice.layout, plan.cluster
    every = max(1, choice.num_steps // CHECKS_PER_RUN)
    lines = [
        "# @package _global_",
        *(f"# {line}" for line in textwrap.wrap(f"Written by `llmtrain plan`: {plan.budget_text}", COLUMNS)),
        f"# {num_params(model):,} parameters, {choice.num_steps} steps, law {plan.law}, "
        f"{cluster.num_nodes} x {cluster.name}: {describe(layout)}",
        "run:",
        f"  name: {json.dumps(plan.name)}",
        f"  plan: {json.dumps(str(plan_path))}",
        "model:",
        *(f"  {key}: {_yaml(value)}" for key, value in plain(model).items()),
        "data:",
        f"  seq_len: {choice.seq_len}",
        *([f"  max_epochs: {_max_epochs(plan):g}"] if plan.unique_tokens is not None else []),
        "train:",
        f"  total_tokens: {choice.total_tokens}",
        f"  global_batch_rows: {choice.global_batch_rows}",
        f"  micro_batch_rows: {choice.micro_batch_rows}",
        f"  precision: {plan.precision}",
        f"  recompute_every: {0 if layout.recompute == 'none' else 1}",
        *([f"  recompute: {layout.recompute}"] if layout.recompute != "none" else []),
        f"  eval_every_steps: {every}",
        f"  device_peak_tflops: {cluster.gpu.peak(plan.precision) / 1e12:.6g}",
        f"  device_peak_source: {json.dumps(cluster.gpu.source)}",
        "save:",
        f"  every_steps: {every}",
        "optimizer:",
        f"  peak_lr: {choice.peak_lr:g}",
        "schedule:",
        f"  kind: {choice.schedule}",
        f"  warmup_tokens: {choice.warmup_tokens}",
        *([f"  decay_tokens: {choice.decay_tokens}"] if choice.schedule == "wsd" else []),
        "parallel:",
        f"  world_size: {layout.world_size}",
        f"  pp_size: {layout.pp}",
        f"  pp_schedule: {layout.schedule}",
        f"  cp_size: {layout.cp}",
        f"  context: {_context(model.num_heads, layout)}",
        f"  tp_size: {layout.tp}",
        f"  sequence_parallel: {json.dumps(layout.sequence_parallel)}",
        f"  zero_stage: {layout.zero_stage}",
    ]
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    """A number, a word, a truth or null; a float with a dot, without which YAML 1.1 reads 1e-05 as a word."""
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")
    return json.dumps(value)


def _max_epochs(plan: PlanFile) -> float:
    """What `train` must allow: the readings, with a little room for what packing and held-out text take."""
    assert plan.unique_tokens is not None, "asked for only with a limit"
    return max(4.0, math.ceil(1.1 * plan.choice.total_tokens / plan.unique_tokens))


def _context(num_heads: int, layout: Layout) -> str:
    """Over heads where they divide, for that runs fused kernels; else a ring of positions."""
    return "heads" if num_heads // layout.tp % layout.cp == 0 else "sequence"


def _repeats(planned: Planned) -> Repeated | None:
    """Of the run as it will be, whose tokens are not quite the target's."""
    plan, unique = planned.plan, planned.plan.unique_tokens
    if unique is None or unique >= plan.choice.total_tokens:
        return None
    return repeated(
        loss_of(find_law(plan.law))[1],
        num_params=num_params(plan.choice.model),
        num_tokens=plan.choice.total_tokens,
        unique_tokens=unique,
    )


# -- blocks of the page


def _budget_facts(planned: Planned) -> list[tuple[str, str]]:
    plan, cluster = planned.plan, planned.plan.cluster
    gpu = cluster.gpu
    price = cluster.price_usd_per_gpu_hour
    network = f", {cluster.node_bytes_s * 8 / 1e9:,.0f} Gb/s a node" if cluster.num_nodes > 1 else ""
    dated = f", {cluster.price_date}" if cluster.price_date else ""
    return [
        ("budget", plan.budget_text),
        (
            "cluster",
            f"{cluster.num_nodes} x {cluster.name}: {cluster.num_gpus} x {gpu.name}, "
            f"{format_flops(gpu.peak(plan.precision))} in {plan.precision} ({gpu.source}), "
            f"{format_bytes(gpu.mem_bytes)}{network}",
        ),
        (
            "price",
            "none known; give cluster.price_usd_per_gpu_hour"
            if price is None
            else f"${price:g} a GPU-hour ({cluster.price_source or 'given'}{dated})",
        ),
    ]


def _target_facts(planned: Planned) -> list[tuple[str, str]]:
    plan, target = planned.plan, planned.target
    choice, model = plan.choice, plan.choice.model
    parts = num_params_by_part(model)
    total = num_params(model)
    embedding = parts["embedding"] + parts["head"]
    real, six = flops_per_token(model, choice.seq_len, convention=FLOPS_CONVENTION), 6 * total
    facts = [
        ("why", target.reason),
        (
            "parameters",
            f"{total:,} = {format_count(total)}, of which embedding and head {format_count(embedding)} "
            f"({embedding / total:.0%}); {planned.size_ratio:.2f} x what is wished",
        ),
        (
            "tokens",
            f"{choice.total_tokens:,} = {choice.num_steps:,} steps x {choice.global_batch_rows:,} rows x "
            f"{choice.seq_len:,}; {choice.total_tokens / total:.3g} a parameter",
        ),
        (
            "model",
            f"{model.num_layers} layers x {model.d_model} wide, {model.num_heads} heads of "
            f"{model.width_per_head}, {model.num_kv_heads} key/value heads, ffn {model.ffn_width}, "
            f"{'tied' if model.tie_embeddings else 'separate'} embeddings, vocabulary {model.vocab_size}; "
            f"width / layers {model.d_model / model.num_layers:.0f} (published models: {ASPECT_LOW:.0f} to "
            f"{ASPECT_HIGH:.0f})",
        ),
        (
            "FLOPs/token",
            f"{real:.4g} with attention and head ({FLOPS_CONVENTION}), {real / six:.2f} x the laws' 6N",
        ),
    ]
    if target.served is not None:
        served = target.served
        facts.append(
            (
                "serving",
                f"at {served.best.loss:.3f} nats: {format_count(served.best.num_params)} on "
                f"{format_count(served.best.num_tokens)} instead of "
                f"{format_count(served.optimum.num_params)} on "
                f"{format_count(served.optimum.num_tokens)} saves {served.saved:.0%} of training and serving "
                "(Sardana et al. 2023, arXiv:2401.00448)",
            )
        )
    return facts


def _law_table(planned: Planned) -> list[str]:
    plan = planned.plan
    found: Band = band(planned.target.flops)
    rows: list[tuple[str, ...]] = [("law", "parameters", "80%", "tokens", "a parameter", "outside its runs")]
    for row in found.rows:
        best = row.optimum
        mark = " *" if best.law == plan.law else "" if row.votes else " -"
        rows.append(
            (
                best.law + mark,
                format_count(best.num_params),
                _span(row.num_params.low, row.num_params.high),
                format_count(best.num_tokens),
                f"{best.tokens_per_param:.3g}",
                f"{best.decades_outside:.1f} decades" if best.decades_outside else "inside",
            )
        )
    rows.append(
        (
            "all that vote",
            format_count(found.num_params.mid),
            _span(found.num_params.low, found.num_params.high),
            format_count(found.num_tokens.mid),
            f"{found.tokens_per_param.low:.3g}..{found.tokens_per_param.high:.3g}",
            "",
        )
    )
    return [
        *_columns(rows),
        *_wrapped("  * ", f"chosen: {find_law(plan.law).source}"),
        *_wrapped("  - ", "shown, and left out of the band: known to be wrong about the optimum"),
    ]


def _recipe_facts(planned: Planned) -> list[tuple[str, str]]:
    choice, recipe = planned.plan.choice, planned.recipe
    lengths = recipe.wsd if choice.schedule == "wsd" else recipe.cosine
    after = (
        f"constant over {lengths.stable_tokens:,}, then down over {lengths.decay_tokens:,}"
        if choice.schedule == "wsd"
        else f"then cosine over {lengths.decay_tokens:,} to a tenth of the peak"
    )
    critical = recipe.critical_batch
    return [
        (
            "batch",
            f"{choice.global_batch_tokens:,} tokens = {choice.global_batch_rows:,} rows  "
            f"[Step Law {format_count(recipe.step_law.batch_tokens)}, DeepSeek "
            f"{format_count(recipe.deepseek.batch_tokens)}; critical {format_count(critical.tokens)}"
            f"{_outside(critical.decades_outside)}]",
        ),
        (
            "peak lr",
            f"{choice.peak_lr:.3g}: {recipe.peak_lr_reason}  "
            f"[Step Law {recipe.step_law.peak_lr:.3g}, DeepSeek {recipe.deepseek.peak_lr:.3g}]",
        ),
        ("schedule", f"warm-up over {choice.warmup_tokens:,} tokens, {after}"),
        ("sources", f"{STEP_LAW}; {DEEPSEEK}"),
    ]


def _layout_table(planned: Planned) -> list[str]:
    plan, capacity = planned.plan, planned.plan.cluster.gpu.mem_bytes
    forecast = plan.forecast
    lines = _pairs(
        [
            ("chosen", describe(plan.choice.layout)),
            (
                "searched",
                f"{planned.ranked.num_legal:,} legal layouts for {plan.program}, of which "
                f"{planned.ranked.num_fitting:,} fit {format_bytes(capacity)} with their memory's 90% point",
            ),
        ]
    )
    shown = [("*", forecast.step_s.mid, forecast.peak_bytes.mid, describe(plan.choice.layout), "")]
    shown += [
        (str(rank), each.step_s.mid, each.peak_bytes.mid, describe(each.layout), each.why)
        for rank, each in enumerate(plan.runners_up, start=1)
    ]
    for mark, step_s, num_bytes, layout, why in shown:
        head = f"  {mark}  {format_duration(step_s):>8}  {_of(num_bytes, capacity):>16}  "
        lines += _wrapped(head, layout)
        lines += _wrapped(" " * (len(head) + 2), why) if why else []
    return lines


def _expectations(plan: PlanFile) -> list[tuple[str, str]]:
    expected, capacity = plan.forecast, plan.cluster.gpu.mem_bytes
    names = {"palm": "every key", "causal": "the causal half", "fused": "as kernels count"}
    mfu = ", ".join(f"{value.mid:.1%} {name} ({names[name]})" for name, value in expected.mfu.items())
    usd = expected.usd
    return [
        ("step", _interval(expected.step_s, format_duration)),
        ("tokens/s", _interval(expected.tokens_per_s, format_count)),
        ("MFU", mfu),
        (
            "whole run",
            f"{_interval(expected.total_s, format_duration)}, with a goodput of {expected.goodput:.0%}; "
            "steps alone "
            f"{format_duration(expected.train_s.mid)}",
        ),
        ("GPU-hours", _interval(expected.gpu_hours, format_count)),
        ("cost", "no price given" if usd is None else _interval(usd, lambda value: f"${value:,.0f}")),
        (
            "memory",
            f"{_interval(expected.peak_bytes, format_bytes)} of {format_bytes(capacity)}",
        ),
        (
            "loss",
            f"{_interval(expected.loss, lambda value: f'{value:.2f}')} nats/token; middle {expected.loss_law}"
            f"{_outside(expected.loss_decades_outside)}",
        ),
    ]


def _sensitivity(plan: PlanFile) -> list[str]:
    lines = []
    for each in plan.sensitivity:
        ratio = "does not work" if each.total_ratio is None else f"{each.total_ratio - 1:+.1%} time"
        lines += _wrapped(f"  {each.change:<18}  {ratio:<13}  ", each.layout)
    return lines


def _over_training(planned: Planned) -> list[str]:
    by, form = loss_of(find_law(planned.plan.law))
    rows: list[tuple[str, ...]] = [
        ("tokens/param", "parameters", "tokens", "training FLOPs", "a served token", "loss of the same FLOPs")
    ]
    for each in over_training(form, flops=planned.target.flops):
        rows.append(
            (
                f"{each.tokens_per_param:g}",
                format_count(each.num_params),
                format_count(each.num_tokens),
                f"{each.extra_training:+.0%}",
                f"{-each.saved_inference:+.0%}",
                f"{each.loss_of_same_flops:.3f}",
            )
        )
    return [*_columns(rows), *_wrapped("  ", f"by {by}; at ordinary ratios laws know, past 1000 they guess")]


def _other_answers(planned: Planned) -> list[str]:
    lines = [
        line
        for each in other_answers(planned.target.num_params, planned.target.num_tokens)
        for line in _wrapped("  ", f"{each.change}: {each.answer}")
    ]
    return [*lines, *_wrapped("  ", DIFFERENT_DATA)]


# -- shapes of text


def _bars(parts: Mapping[str, float], show: Callable[[float], str]) -> list[str]:
    total = sum(parts.values())
    shown = {name: value for name, value in parts.items() if value >= LEAST_SHARE * total}
    rest = total - sum(shown.values())
    if rest > 0:
        shown["rest"] = rest
    longest = max(shown.values(), default=1.0)
    rows = [
        (
            name.replace("_", " "),
            show(value),
            f"{value / total:.1%}",
            "#" * max(1, round(BAR * value / longest)),
        )
        for name, value in sorted(shown.items(), key=lambda item: -item[1])
    ]
    return _columns(rows, last_left=True) if rows else ["  nothing"]


def _outside(decades: float) -> str:
    return f", {decades:.1f} decades outside its runs" if decades else ""


def _of(num_bytes: float, capacity: float) -> str:
    return f"{format_bytes(num_bytes)} ({num_bytes / capacity:.0%})"


def _interval(interval: Interval, show: Callable[[float], str]) -> str:
    return f"{show(interval.mid)}  [{show(interval.low)} to {show(interval.high)}]"


def _span(low: float, high: float) -> str:
    return f"{format_count(low)}..{format_count(high)}"


def _range_text(bounds: tuple[float, float]) -> str:
    return f"{format_count(bounds[0])} to {format_count(bounds[1])}"


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [line for name, text in pairs for line in _wrapped(f"  {name:<12}  ", text)]


def _wrapped(head: str, text: str) -> list[str]:
    """`text` after `head`, further lines indented to match."""
    return textwrap.wrap(
        text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def _columns(rows: Sequence[tuple[str, ...]], *, left: int = 1, last_left: bool = False) -> list[str]:
    """`left` columns flush left, the others right, the last one left too if it says so."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        (
            "  "
            + "  ".join(
                cell.ljust(width) if at < left or (last_left and at == last) else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]
