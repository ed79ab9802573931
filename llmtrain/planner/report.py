"""A plan as people read it, and as `train` takes it."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from llmtrain.model.size import flops_per_token, num_params, num_params_by_part
from llmtrain.planner.laws import (
    TEXT_FACTOR,
    Interval,
    Optimum,
    Parametric,
    all_optima,
    find_law,
    optimum_interval,
    parametric_loss,
)
from llmtrain.planner.plan import FLOPS_CONVENTION, PlanFile, Planned
from llmtrain.planner.recipe import DEEPSEEK, STEP_LAW
from llmtrain.planner.search import ASPECT_HIGH, ASPECT_LOW
from llmtrain.units import format_count, format_duration, format_flops

COLUMNS = 110
SIZE_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
FAR_DECADES = 0.5
"""Assumed, not measured: past half a decade outside its runs a law is called an extrapolation in a note."""
MISSED_SIZE = 1.4
"""Assumed, not measured: past this factor between shape and law a note says so."""
CHECKS_PER_RUN = 10
"""Evaluations and checkpoints that the experiment asks for."""


def plan_text(planned: Planned) -> str:
    """The whole report, for a terminal COLUMNS wide."""
    plan = planned.plan
    blocks = [
        [f"PLAN {plan.name}", *_pairs(_budget_facts(planned))],
        ["WHAT THE LAWS WOULD TRAIN", *_law_table(plan)],
        *([lines] if (lines := _size_table(planned)) else []),
        ["THE SHAPE", *_pairs(_shape_facts(planned))],
        ["THE RECIPE", *_pairs(_recipe_facts(planned))],
        ["WHAT TO EXPECT", *_pairs(_expectations(planned))],
        ["KEEP IN MIND", *(line for note in notes(planned) for line in _wrapped("  - ", note))],
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def notes(planned: Planned) -> list[str]:
    """Everything about this plan that is weaker than its digits look."""
    plan, recipe, wish = planned.plan, planned.recipe, planned.law_optimum
    model, expected = plan.choice.model, plan.prediction
    found = []
    if wish.decades_outside > FAR_DECADES:
        fitted = find_law(plan.law).fitted
        found.append(
            f"{plan.law} is stretched {wish.decades_outside:.1f} powers of ten past the runs it was fitted "
            f"to ({_range_text(fitted.num_params)} parameters, {_range_text(fitted.num_tokens)} tokens): "
            f"take its optimum as a starting point, not a fact."
        )
    if not 1 / MISSED_SIZE <= planned.size_ratio <= MISSED_SIZE:
        embedding = num_params_by_part(model)["embedding"] / num_params(model)
        found.append(
            f"the law asks for {format_count(wish.num_params)} parameters; the nearest shape has "
            f"{planned.size_ratio:.1f} times as many, {embedding:.0%} of them in the embedding of "
            f"{model.vocab_size} tokens. A smaller vocabulary or a larger budget would bring them together."
        )
    if recipe.step_law_decades_outside > FAR_DECADES:
        found.append(
            f"the Step Law is stretched {recipe.step_law_decades_outside:.1f} powers of ten too: try two or "
            f"three learning rates (`llmtrain train -m ... optimizer.peak_lr=...`) before a run that matters."
        )
    if expected.loss_decades_outside > FAR_DECADES:
        found.append(
            f"no law was fitted near this run: the nearest, {expected.loss_law}, ends "
            f"{expected.loss_decades_outside:.1f} powers of ten away. The loss interval is wide on purpose."
        )
    if "assumed" in plan.hardware.utilization_source:
        found.append(
            "the utilization is at least partly assumed: run a few steps, read mfu in metrics.jsonl, and "
            "plan again with hardware.utilization_mid=..."
        )
    mem_gib = plan.hardware.mem_gib
    if mem_gib is not None and expected.state_gib > mem_gib:
        found.append(
            f"the training state is {expected.state_gib:.0f} GiB and a device has {mem_gib:.0f}: it must be "
            f"split over ranks (parallel.zero_stage)."
        )
    found.append(
        f"the run reads {format_count(plan.choice.total_tokens)} tokens: have at least a quarter of them "
        f"unique (up to 4 epochs cost almost nothing, Muennighoff et al. 2023, arXiv:2305.16264)."
    )
    found.append(
        f"laws speak of their own text and tokenizer; the loss interval is widened by {TEXT_FACTOR:g} for "
        "yours."
    )
    return found


def experiment_yaml(plan: PlanFile, *, plan_path: Path) -> str:
    """What `llmtrain train` changes for this plan: a file for conf/experiment or any folder given to
    --config-dir."""
    choice, model, hardware = plan.choice, plan.choice.model, plan.hardware
    every = max(1, choice.num_steps // CHECKS_PER_RUN)
    rank_peak = hardware.peak_flops / hardware.ranks_per_device
    shared = (
        f"; this is one rank's share, {hardware.ranks_per_device} share a device"
        if hardware.ranks_per_device > 1
        else ""
    )
    lines = [
        "# @package _global_",
        f"# Written by `llmtrain plan`: {plan.budget_text}",
        f"# {num_params(model):,} parameters, {choice.num_steps} steps, law {plan.law}, {hardware.name}.",
        "run:",
        f"  name: {json.dumps(plan.name)}",
        f"  plan: {json.dumps(str(plan_path))}",
        "model:",
        f"  vocab_size: {model.vocab_size}",
        f"  num_layers: {model.num_layers}",
        f"  d_model: {model.d_model}",
        f"  num_heads: {model.num_heads}",
        f"  num_kv_heads: {model.num_kv_heads}",
        f"  ffn_width: {model.ffn_width}",
        f"  tie_embeddings: {json.dumps(model.tie_embeddings)}",
        "data:",
        f"  seq_len: {choice.seq_len}",
        "train:",
        f"  total_tokens: {choice.total_tokens}",
        f"  global_batch_rows: {choice.global_batch_rows}",
        f"  micro_batch_rows: {choice.micro_batch_rows}",
        f"  precision: {hardware.precision}",
        f"  eval_every_steps: {every}",
        f"  device_peak_tflops: {rank_peak / 1e12:.6g}",
        f"  device_peak_source: {json.dumps(hardware.peak_source + shared)}",
        "save:",
        f"  every_steps: {every}",
        "optimizer:",
        f"  peak_lr: {choice.peak_lr:g}",
        "schedule:",
        "  kind: cosine",
        f"  warmup_tokens: {choice.warmup_tokens}",
    ]
    return "\n".join(lines) + "\n"


def _budget_facts(planned: Planned) -> list[tuple[str, str]]:
    plan, hardware = planned.plan, planned.plan.hardware
    use = hardware.utilization
    return [
        ("budget", plan.budget_text),
        (
            "hardware",
            f"{hardware.num_devices} x {hardware.name}, {format_flops(hardware.peak_flops)} in "
            f"{hardware.precision}",
        ),
        ("peak from", hardware.peak_source),
        ("utilization", f"{use.low:g} .. {use.mid:g} .. {use.high:g} ({hardware.utilization_source})"),
    ]


def _law_table(plan: PlanFile) -> list[str]:
    optima = all_optima(plan.budget_flops)
    rows: list[tuple[str, ...]] = [("law", "parameters", "tokens", "tokens/param", "outside its runs")]
    rows += [_law_row(each, chosen=each.law == plan.law) for each in optima]
    sizes, ratios = [each.num_params for each in optima], [each.tokens_per_param for each in optima]
    params, tokens = optimum_interval(plan.budget_flops)
    rows.append(
        (
            "besiroglu2024, 80% of refits",
            _span(params.low, params.high),
            _span(tokens.low, tokens.high),
            f"{tokens.low / params.high:.3g}..{tokens.high / params.low:.3g}",
            "",
        )
    )
    rows.append(
        (
            "all laws",
            _span(min(sizes), max(sizes)),
            _span(min(each.num_tokens for each in optima), max(each.num_tokens for each in optima)),
            f"{min(ratios):.3g}..{max(ratios):.3g}",
            "",
        )
    )
    spread = math.sqrt(max(ratios) / min(ratios))
    return [
        *_columns(rows),
        *_wrapped(
            "  ",
            '"20 tokens per parameter" is one of these rows, not a law of nature: here they agree to a '
            f"factor {spread:.1f} either way.",
        ),
        *_wrapped("  * ", f"chosen: {find_law(plan.law).source}"),
    ]


def _law_row(each: Optimum, *, chosen: bool) -> tuple[str, ...]:
    outside = f"{each.decades_outside:.1f} decades" if each.decades_outside else "inside"
    return (
        f"{each.law}{' *' if chosen else ''}",
        format_count(each.num_params),
        format_count(each.num_tokens),
        f"{each.tokens_per_param:.3g}",
        outside,
    )


def _size_table(planned: Planned) -> list[str]:
    """How little the law's own loss minds another size, where it is inside the range it can speak about."""
    wish = planned.law_optimum
    form = find_law(planned.plan.law).form
    if wish.decades_outside > FAR_DECADES or not isinstance(form, Parametric):
        return []
    rows = [("size", "parameters", "tokens", f"loss by {wish.law}")]
    for step in SIZE_STEPS:
        num_params_here, num_tokens = wish.num_params * step, wish.num_tokens / step
        loss = parametric_loss(form, num_params_here, num_tokens)
        rows.append((f"{step:g} x", format_count(num_params_here), format_count(num_tokens), f"{loss:.3f}"))
    return ["OTHER SIZES FOR THE SAME BUDGET", *_columns(rows)]


def _shape_facts(planned: Planned) -> list[tuple[str, str]]:
    choice, model = planned.plan.choice, planned.plan.choice.model
    parts = num_params_by_part(model)
    total = num_params(model)
    embedding = parts["embedding"] + parts["head"]
    real, six = flops_per_token(model, choice.seq_len, convention=FLOPS_CONVENTION), 6 * total
    return [
        (
            "parameters",
            f"{total:,} = {format_count(total)}, of which embedding and head {format_count(embedding)} "
            f"({embedding / total:.0%}); {planned.size_ratio:.2f} x what the law asks for",
        ),
        (
            "model",
            f"{model.num_layers} layers x {model.d_model} wide, {model.num_heads} heads of "
            f"{model.width_per_head}, "
            f"{model.num_kv_heads} key/value heads, ffn {model.ffn_width}, "
            f"{'tied' if model.tie_embeddings else 'separate'} embeddings, vocabulary {model.vocab_size}",
        ),
        (
            "aspect",
            f"d_model / num_layers = {model.d_model / model.num_layers:.0f} (published models: "
            f"{ASPECT_LOW:.0f} to "
            f"{ASPECT_HIGH:.0f})",
        ),
        (
            "FLOPs/token",
            f"{real:.4g} with attention and head ({FLOPS_CONVENTION}), {real / six:.2f} x the laws' 6N",
        ),
    ]


def _recipe_facts(planned: Planned) -> list[tuple[str, str]]:
    choice, recipe = planned.plan.choice, planned.recipe
    return [
        (
            "tokens",
            f"{choice.total_tokens:,} = {choice.num_steps} steps x {choice.global_batch_rows} rows x "
            f"{choice.seq_len}; "
            f"{choice.total_tokens / num_params(choice.model):.3g} a parameter",
        ),
        (
            "batch",
            f"{choice.global_batch_tokens:,} tokens, micro batch {choice.micro_batch_rows} rows a rank  "
            f"[Step Law {format_count(recipe.step_law.batch_tokens)}, DeepSeek "
            f"{format_count(recipe.deepseek.batch_tokens)}]",
        ),
        (
            "peak lr",
            f"{choice.peak_lr:.3g}: {recipe.peak_lr_reason}  "
            f"[Step Law {recipe.step_law.peak_lr:.3g}, DeepSeek {recipe.deepseek.peak_lr:.3g}]",
        ),
        (
            "schedule",
            f"warm-up over {choice.warmup_tokens:,} tokens, then cosine to a tenth of the peak",
        ),
        ("sources", f"{STEP_LAW}; {DEEPSEEK}"),
    ]


def _expectations(planned: Planned) -> list[tuple[str, str]]:
    expected = planned.plan.prediction
    return [
        ("step", _interval(expected.step_s, format_duration)),
        ("whole run", _interval(expected.total_s, format_duration)),
        ("tokens/s", _interval(expected.tokens_per_s, format_count)),
        (
            "loss",
            f"{_interval(expected.loss, lambda value: f'{value:.2f}')} nats/token; middle "
            f"{expected.loss_law}, "
            f"{expected.loss_decades_outside:.1f} decades outside its runs",
        ),
        (
            "state",
            f"{expected.state_gib:.3g} GiB of weights, gradients and optimizer state without ZeRO; "
            "activations on top",
        ),
    ]


def _interval(interval: Interval, show: Callable[[float], str]) -> str:
    return f"{show(interval.mid)}  ({show(interval.low)} to {show(interval.high)})"


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


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
