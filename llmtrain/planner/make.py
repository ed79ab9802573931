"""Makes a plan: parameters and tokens, a shape, a recipe and a layout, for what the budget buys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.errors import ConfigError
from llmtrain.files import plain
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import flops_per_token, num_non_embedding_params, num_params
from llmtrain.planner import units
from llmtrain.planner.calibrate import Calibration, read_calibration
from llmtrain.planner.config import (
    BudgetConfig,
    ChoiceConfig,
    DataWishConfig,
    InferenceConfig,
    ModelWishConfig,
)
from llmtrain.planner.cost import layouts
from llmtrain.planner.cost.architecture import from_model_config
from llmtrain.planner.cost.cluster import THIS_MACHINE, Cluster
from llmtrain.planner.cost.layouts import Ranked, describe, search, sensitivity
from llmtrain.planner.cost.legality import Limits
from llmtrain.planner.cost.programs import generation_of
from llmtrain.planner.forecast import SECONDS_PER_HOUR, forecast_of, memory_program_of, predicted
from llmtrain.planner.loss.laws import Law
from llmtrain.planner.loss.repetition import MOST_EPOCHS
from llmtrain.planner.plan import FLOPS_CONVENTION, Change, Choice, PlanFile, RunnerUp
from llmtrain.planner.recipe import Recipe, choose_recipe, step_law
from llmtrain.planner.shape import choose_shape
from llmtrain.planner.target import Target, Wishes, choose_target, resolve_law
from llmtrain.units import format_count, format_flops

FIRST_UTILIZATION = 0.35
"""Where the search for what hours buy begins; the layout's own replaces it."""
MAX_ROUNDS = 8
VOCAB_MULTIPLE, VOCAB_FROM = 128, 4096
"""Rows of an embedding divide among tp ranks, and tensor cores want sides that are multiples of 8; below
VOCAB_FROM padding would be a large part of it."""
LEAST_BATCHES = 4
BATCH_SLACK = 1.5
"""By how much a batch may be moved so that more layouts divide it. Assumed, not measured: laws for the best
batch differ by more."""
NUM_RUNNERS_UP = 5
SMALLEST_RATIO = 0.5
"""Of a shape's parameters over those wished."""
MOST_READINGS = 1000.0
"""Of unique tokens. Assumed: past it a plan is a mistake; past MOST_EPOCHS it is a guess."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what its pages explain and its file does not need."""

    plan: PlanFile
    target: Target
    size_ratio: float
    """Parameters of the chosen shape over those wished."""
    recipe: Recipe
    ranked: Ranked


@dataclass(frozen=True, kw_only=True)
class _Settled:
    """One pass: a target, and everything that follows from it."""

    target: Target
    shape: ModelConfig
    size_ratio: float
    recipe: Recipe
    ranked: Ranked


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What stays the same while a budget in hours is turned into FLOPs."""

    law: Law
    wishes: Wishes
    vocab_size: int
    seq_len: int
    cluster: Cluster
    precision: str
    program: str
    calibration: Calibration | None
    batch_tokens: float | None

    def settle(self, flops: float | None, *, num_tokens: float | None = None) -> _Settled:
        """
        Args:
            flops: the budget, in FLOPS_CONVENTION.
            num_tokens: in place of what `flops` buy.
        """
        wishes = replace(self.wishes, flops=flops)
        target = choose_target(self.law, wishes)
        shape = choose_shape(target.num_params, vocab_size=self.vocab_size)
        if shape.size_ratio < SMALLEST_RATIO:
            raise ConfigError(
                f"{format_count(target.num_params)} parameters are wished, and the largest shape there is "
                "has "
                f"{format_count(num_params(shape.model))}; lower the budget or model.params"
            )
        if wishes.num_params is not None and wishes.num_tokens is None and flops is None:
            target = choose_target(self.law, replace(wishes, num_params=num_params(shape.model)))
        if num_tokens is None and flops is not None and wishes.num_tokens is None:
            # what the budget buys, with attention and head counted
            num_tokens = flops / flops_per_token(shape.model, self.seq_len, convention=FLOPS_CONVENTION)
        num_tokens = num_tokens or target.num_tokens
        _check_epochs(num_tokens, wishes.unique_tokens)
        wished = self.batch_tokens
        if wished is None:
            non_embedding = num_non_embedding_params(shape.model)
            wished = step_law(num_non_embedding_params=non_embedding, num_tokens=num_tokens).batch_tokens
        rows = wished / self.seq_len
        multiple = batch_multiple(rows, world_size=self.cluster.num_gpus)
        recipe = choose_recipe(
            num_params=num_params(shape.model),
            num_non_embedding_params=num_non_embedding_params(shape.model),
            num_tokens=num_tokens,
            flops=target.flops,
            seq_len=self.seq_len,
            batch_rows=rounded_rows(rows, multiple),
        )
        if num_tokens < recipe.global_batch_rows * self.seq_len / 2:
            mend = "data.seq_len" if self.batch_tokens is None else "plan.global_batch_tokens"
            raise ConfigError(
                f"the budget buys {num_tokens:,.0f} tokens, less than half of one batch of "
                f"{recipe.global_batch_rows:,} rows of data.seq_len={self.seq_len}; raise the budget, or "
                "lower "
                f"{mend} or model.vocab_size={self.vocab_size}"
            )
        ranked = search(
            from_model_config(shape.model),
            self.cluster,
            seq_len=self.seq_len,
            global_batch_rows=recipe.global_batch_rows,
            program=self.program,
            precision=self.precision,
            limits=Limits(max_tp=self.cluster.gpus_per_node),  # nobody sends a tp rank's sums over a network
            calibrated=None if self.calibration is None else self.calibration.calibrated(),
            memory_program=memory_program_of(self.cluster, self.program, self.precision, self.calibration),
        )
        return _Settled(
            target=target, shape=shape.model, size_ratio=shape.size_ratio, recipe=recipe, ranked=ranked
        )


def make_plan(
    *,
    name: str,
    budget: BudgetConfig,
    model: ModelWishConfig,
    data: DataWishConfig,
    inference: InferenceConfig,
    choice: ChoiceConfig,
    cluster: Cluster,
    unique_tokens: float | None = None,
) -> Planned:
    """Choose parameters and tokens, a shape, a recipe and a layout.

    Args:
        unique_tokens: of the text there is; None: `data.unique_tokens`, or no limit.

    Raises:
        ConfigError: wishes that contradict each other, a budget without what prices it, a model for which no
        layout fits.
    """
    law = resolve_law(choice.law)
    if unique_tokens is None and data.unique_tokens is not None:
        unique_tokens = units.parse_quantity(data.unique_tokens, units.TOKENS, name="data.unique_tokens")
    batch = choice.global_batch_tokens
    precision = choice.precision or _usual_precision(cluster)
    question = _Question(
        law=law,
        wishes=Wishes(
            num_params=model.num_params,
            num_tokens=budget.num_tokens,
            unique_tokens=unique_tokens,
            inference_tokens=inference.num_tokens,
        ),
        vocab_size=padded_vocab(model.vocab_size),
        seq_len=data.seq_len,
        cluster=cluster,
        precision=precision,
        program=choice.program,
        calibration=_calibration(choice, cluster, precision),
        batch_tokens=(
            None
            if batch is None
            else units.parse_quantity(batch, units.TOKENS, name="plan.global_batch_tokens")
        ),
    )
    settled, text = _spend(question, budget)
    chosen = _choice(settled, choice.schedule)
    forecast = forecast_of(
        predicted(chosen.model, chosen.layout, cluster, question.program, question.calibration),
        chosen.model,
        cluster=cluster,
        total_tokens=chosen.total_tokens,
        global_batch_tokens=chosen.global_batch_tokens,
        unique_tokens=unique_tokens,
    )
    plan = PlanFile(
        name=name,
        budget_flops=chosen.total_tokens
        * flops_per_token(chosen.model, data.seq_len, convention=FLOPS_CONVENTION),
        budget_text=text,
        law=law.name,
        cluster=cluster,
        precision=question.precision,
        program=choice.program,
        calibration=None if question.calibration is None else plain(question.calibration),
        unique_tokens=unique_tokens,
        choice=chosen,
        forecast=forecast,
        runners_up=tuple(
            RunnerUp(layout=each.layout, step_s=each.step_s, peak_bytes=each.peak_bytes, why=each.reason)
            for each in settled.ranked.runners_up[:NUM_RUNNERS_UP]
        ),
        sensitivity=tuple(_change(each) for each in sensitivity(settled.ranked)),
    )
    return Planned(
        plan=plan,
        target=settled.target,
        size_ratio=settled.size_ratio,
        recipe=settled.recipe,
        ranked=settled.ranked,
    )


def _usual_precision(cluster: Cluster) -> str:
    if cluster.name == THIS_MACHINE:
        return "fp32"
    return "bf16" if "bf16" in cluster.gpu.peak_flops else "fp16"


def _check_epochs(num_tokens: float, unique_tokens: float | None) -> None:
    if unique_tokens is not None and num_tokens > MOST_READINGS * unique_tokens:
        raise ConfigError(
            f"{format_count(num_tokens)} tokens are {num_tokens / unique_tokens:,.0f} readings of "
            f"{format_count(unique_tokens)} unique ones, and past {MOST_EPOCHS:g} nothing was measured "
            "(Muennighoff et "
            "al. 2023, arXiv:2305.16264); lower the budget, or have more text (data.unique_tokens, "
            "data.folder)"
        )


def _calibration(choice: ChoiceConfig, cluster: Cluster, precision: str) -> Calibration | None:
    if choice.calibration is None:
        return None
    found = read_calibration(Path(choice.calibration))
    if found.program != choice.program:
        raise ConfigError(
            f"plan.calibration={choice.calibration} is of {found.program}, and plan.program="
            f"{choice.program}; "
            "calibrate on runs of that program, or leave one of the two out"
        )
    ours, theirs = generation_of(cluster.gpu.name), generation_of(found.gpu)
    if ours != theirs or precision != found.precision:
        raise ConfigError(
            f"plan.calibration={choice.calibration} is of runs in {found.precision} on {found.gpu}, and the "
            "plan is in "
            f"{precision} on {cluster.gpu.name}: constants of one say nothing about the other; calibrate on "
            "runs of "
            "this cluster, or leave plan.calibration out"
        )
    return found


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer's vocabulary."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if vocab_size >= VOCAB_FROM else vocab_size


def batch_multiple(rows: float, *, world_size: int) -> int:
    """What the rows of a batch should be a multiple of, so that many layouts divide it: the number of ranks,
    or the largest part of it by a power of two, or what is left when the odd part is dropped too, for which
    rounding moves `rows` by BATCH_SLACK at most."""
    odd = world_size
    while odd % 2 == 0:
        odd //= 2
    powers: list[int] = [2**power for power in range(world_size.bit_length(), -1, -1)]
    of_ranks = [odd * power for power in powers if world_size % (odd * power) == 0]
    multiple = next(
        (
            each
            for each in (*of_ranks, *powers)
            if 1 / BATCH_SLACK <= rounded_rows(rows, each) / rows <= BATCH_SLACK
        ),
        1,
    )
    while rows / (2 * multiple) >= LEAST_BATCHES:  # rounding further moves it by an eighth at most
        multiple *= 2
    return multiple


def rounded_rows(rows: float, multiple: int) -> int:
    """The multiple that is nearest by its ratio."""
    below = max(1, math.floor(rows / multiple))
    return multiple * (below if rows / (below * multiple) <= (below + 1) * multiple / rows else below + 1)


def _spend(question: _Question, budget: BudgetConfig) -> tuple[_Settled, str]:
    """Settle on what the budget buys, and the sum as text.

    Hours buy as many FLOPs as the best layout of the model that they buy does: found by turns.
    """
    given = budget.compute
    if given is None:
        return question.settle(None), "no compute budget: parameters or tokens decide"
    kind, value = given
    if kind == "flops":
        return question.settle(value), f"{value:.4g} FLOPs, given"
    cluster = question.cluster
    text = ""
    if kind == "usd":
        price = cluster.price_usd_per_gpu_hour
        if price is None or price <= 0:
            raise ConfigError(
                f"budget.usd={budget.usd} needs a price; give cluster.price_usd_per_gpu_hour, in dollars "
                "above 0"
            )
        dated = f", {cluster.price_date}" if cluster.price_date else ""
        text = f"${value:,.0f} at ${price:g} a GPU-hour ({cluster.price_source or 'given'}{dated}) = "
        value /= price
    hours = value / SECONDS_PER_HOUR * cluster.num_gpus if kind == "days" else value
    seconds = hours * SECONDS_PER_HOUR / cluster.num_gpus * cluster.goodput
    peak = cluster.gpu.peak(question.precision) * cluster.num_gpus
    flops = peak * FIRST_UTILIZATION * seconds
    settled = question.settle(flops)
    for _ in range(MAX_ROUNDS):
        rate = settled.recipe.global_batch_rows * question.seq_len / settled.ranked.best.step_s.mid
        bought = (
            rate * seconds * flops_per_token(settled.shape, question.seq_len, convention=FLOPS_CONVENTION)
        )
        if abs(bought / flops - 1) < 1e-3:
            break
        flops = bought
        settled = question.settle(flops)
    else:  # two shapes or layouts take turns: the last one gets as many tokens as its own speed gives
        rate = settled.recipe.global_batch_rows * question.seq_len / settled.ranked.best.step_s.mid
        settled = question.settle(flops, num_tokens=rate * seconds)
        flops = rate * seconds * flops_per_token(settled.shape, question.seq_len, convention=FLOPS_CONVENTION)
    utilization = flops / (peak * seconds)
    text += (
        f"{_hours(hours)} GPU-hours = {_hours(hours / cluster.num_gpus)} h on {cluster.num_gpus} GPUs, of "
        "which "
        f"{cluster.goodput:.0%} count (goodput), x {format_flops(peak)} x {utilization:.1%} utilization = "
        f"{flops:.3g} FLOPs"
    )
    return settled, text


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 1000 else f"{hours:.4g}"


def _choice(settled: _Settled, schedule: str) -> Choice:
    recipe = settled.recipe
    lengths = recipe.wsd if schedule == "wsd" else recipe.cosine
    return Choice(
        model=settled.shape,
        layout=settled.ranked.best.layout,
        total_tokens=recipe.total_tokens,
        num_steps=recipe.num_steps,
        peak_lr=recipe.peak_lr,
        schedule=schedule,
        warmup_tokens=recipe.warmup_tokens,
        decay_tokens=lengths.decay_tokens,
    )


def _change(found: layouts.Change) -> Change:
    if found.best is None or found.time_ratio is None:
        return Change(change=found.name, total_ratio=None, layout=found.note)
    layout = "the same" if found.is_same_layout else describe(found.best.layout)
    return Change(
        change=found.name,
        total_ratio=found.time_ratio,
        layout=f"{layout} ({found.note})" if found.note else layout,
    )
