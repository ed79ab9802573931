"""A plan: what to train for a budget, on which layout, what to expect of it, and the file that a run is later
held against."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError, DataError
from llmtrain.files import plain, read_json, write_json
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
from llmtrain.planner.cost.cluster import THIS_MACHINE, Cluster, Gpu
from llmtrain.planner.cost.costs import find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.layouts import Ranked, describe, search, sensitivity
from llmtrain.planner.cost.legality import Limits
from llmtrain.planner.cost.memory import MemoryProgram
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.laws import Law, forecast_loss
from llmtrain.planner.loss.repetition import repetition_factor
from llmtrain.planner.prediction import Prediction, predict
from llmtrain.planner.recipe import Recipe, choose_recipe, step_law
from llmtrain.planner.shape import choose_shape
from llmtrain.planner.target import Target, Wishes, choose_target, resolve_law
from llmtrain.units import format_flops

FORMAT_VERSION = 2
FLOPS_CONVENTION = "palm"
"""The count of FLOPs in a budget: PaLM's (arXiv:2204.02311, appendix B)."""
SECONDS_PER_HOUR = 3600.0
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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the plan trains."""

    model: ModelConfig
    layout: Layout
    total_tokens: int
    num_steps: int
    peak_lr: float
    schedule: str
    warmup_tokens: int
    decay_tokens: int
    """Of wsd; under cosine all after the warm-up."""

    @property
    def seq_len(self) -> int:
        return self.layout.seq_len

    @property
    def global_batch_rows(self) -> int:
        return self.layout.global_batch_rows

    @property
    def micro_batch_rows(self) -> int:
        return self.layout.micro_batch_rows

    @property
    def global_batch_tokens(self) -> int:
        return self.layout.global_batch_tokens


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect of a run: 8 runs in 10 lie inside each interval."""

    step_s: Interval
    tokens_per_s: Interval
    """Of all ranks, while steps are done."""
    train_s: Interval
    """All steps, nothing else."""
    total_s: Interval
    """train_s / goodput: with restarts, lost steps, checkpoints."""
    gpu_hours: Interval
    usd: Interval | None
    """None without a price."""
    goodput: float
    loss: Interval
    """Nats per token at the end, on held-out text, repeats counted; `forecast_loss` says what the ends
    are."""
    loss_law: str
    loss_decades_outside: float
    """How far outside that law's runs this one lies, in powers of ten."""
    peak_bytes: Interval
    """On the fullest rank's device."""
    mfu: Mapping[str, Interval]
    """Useful FLOPs over peak in each of model/size.FLOPS_CONVENTIONS."""
    time_parts: Mapping[str, float]
    """Seconds of a step."""
    memory_parts: Mapping[str, float]
    """Bytes at the fullest instant."""
    memory_instants: Mapping[str, float]
    """Bytes allocated at each instant."""
    constants_from: str
    """Where the constants of time come from, and how far this question lies from there."""


@dataclass(frozen=True, kw_only=True)
class RunnerUp:
    """A layout that lost."""

    layout: Layout
    step_s: Interval
    peak_bytes: Interval
    why: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the plan becomes when something else does."""

    change: str
    total_ratio: float | None
    """Time for as many tokens over the plan's; None where no layout fits."""
    layout: str
    """The best one then; "the same", or why there is none."""


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """`<name>.plan.json`."""

    name: str
    budget_flops: float
    """Training FLOPs of the run in FLOPS_CONVENTION."""
    budget_text: str
    """The sum behind it."""
    law: str
    cluster: Cluster
    precision: str
    program: str
    calibration: Mapping[str, Any] | None
    """As `llmtrain plan calibrate` wrote it."""
    unique_tokens: float | None
    choice: Choice
    forecast: Forecast
    runners_up: tuple[RunnerUp, ...]
    sensitivity: tuple[Change, ...]


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

    def settle(self, flops: float | None) -> _Settled:
        """`flops`: the budget, in FLOPS_CONVENTION."""
        wishes = self.wishes
        target = choose_target(
            self.law,
            Wishes(
                flops=flops,
                num_params=wishes.num_params,
                num_tokens=wishes.num_tokens,
                unique_tokens=wishes.unique_tokens,
                inference_tokens=wishes.inference_tokens,
            ),
        )
        shape = choose_shape(target.num_params, vocab_size=self.vocab_size)
        num_tokens = target.num_tokens
        if (
            flops is not None and wishes.num_tokens is None
        ):  # what the budget buys, with attention and head counted
            num_tokens = flops / flops_per_token(shape.model, self.seq_len, convention=FLOPS_CONVENTION)
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
            raise ConfigError(
                f"the budget buys {num_tokens:,.0f} tokens, less than half of one batch of "
                f"{recipe.global_batch_rows} rows of data.seq_len={self.seq_len}; raise the budget, or lower "
                f"data.seq_len or model.vocab_size={self.vocab_size}"
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
            memory_program=_memory_program(self.cluster, self.program, self.precision, self.calibration),
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
        precision=choice.precision or ("fp32" if cluster.name == THIS_MACHINE else "bf16"),
        program=choice.program,
        calibration=_calibration(choice),
        batch_tokens=(
            None
            if batch is None
            else units.parse_quantity(batch, units.TOKENS, name="plan.global_batch_tokens")
        ),
    )
    settled, text = _spend(question, budget)
    chosen = _choice(settled, choice.schedule)
    forecast = forecast_of(
        _predicted(chosen.model, chosen.layout, cluster, question.program, question.calibration),
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


def _calibration(choice: ChoiceConfig) -> Calibration | None:
    if choice.calibration is None:
        return None
    found = read_calibration(Path(choice.calibration))
    if found.program != choice.program:
        raise ConfigError(
            f"plan.calibration={choice.calibration} is of {found.program}, and plan.program="
            f"{choice.program}; "
            "calibrate on runs of that program, or leave one of the two out"
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
        if not price:
            raise ConfigError(
                f"budget.usd={budget.usd} needs a price; give cluster.price_usd_per_gpu_hour, in dollars"
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


def forecast_of(
    prediction: Prediction,
    model: ModelConfig,
    *,
    cluster: Cluster,
    total_tokens: float,
    global_batch_tokens: int,
    unique_tokens: float | None,
) -> Forecast:
    """A step's prediction, over a whole run."""
    from_laws = forecast_loss(
        num_params=num_params(model),
        num_non_embedding_params=num_non_embedding_params(model),
        num_tokens=total_tokens,
        vocab_size=model.vocab_size,
    )
    repeats = 1.0
    if unique_tokens is not None and unique_tokens < total_tokens:
        repeats = repetition_factor(
            num_params=num_params(model), num_tokens=total_tokens, unique_tokens=unique_tokens
        )
    train_s = prediction.step_s.scaled(total_tokens / global_batch_tokens)
    total_s = train_s.scaled(1 / cluster.goodput)
    gpu_hours = total_s.scaled(cluster.num_gpus / SECONDS_PER_HOUR)
    price = cluster.price_usd_per_gpu_hour
    return Forecast(
        step_s=prediction.step_s,
        tokens_per_s=prediction.tokens_per_s,
        train_s=train_s,
        total_s=total_s,
        gpu_hours=gpu_hours,
        usd=None if price is None else gpu_hours.scaled(price),
        goodput=cluster.goodput,
        loss=from_laws.loss.scaled(repeats),
        loss_law=from_laws.law,
        loss_decades_outside=from_laws.decades_outside,
        peak_bytes=prediction.peak_bytes,
        mfu=prediction.mfu,
        time_parts=prediction.time,
        memory_parts=prediction.memory,
        memory_instants=prediction.instants,
        constants_from=(
            prediction.source
            if prediction.distance.decades is None
            else f"{prediction.source}; this run: {prediction.distance.text}"
        ),
    )


def forecast_run(plan: PlanFile, model: ModelConfig, layout: Layout, *, total_tokens: float) -> Forecast:
    """What the plan's cluster, program and laws say about any run, of the plan's own shape and layout or
    another.

    Raises:
        ConfigError: The layout is for another number of ranks than the plan's cluster has.
    """
    if layout.world_size != plan.cluster.num_gpus:
        raise ConfigError(
            f"the run has {layout.world_size} ranks and the plan's cluster {plan.cluster.num_gpus} GPUs; "
            "plan again with "
            "cluster.nodes and cluster.gpus_per_node as the run has them"
        )
    calibration = None if plan.calibration is None else Calibration.from_json(plan.calibration)
    prediction = _predicted(model, layout, plan.cluster, plan.program, calibration)
    return forecast_of(
        prediction,
        model,
        cluster=plan.cluster,
        total_tokens=total_tokens,
        global_batch_tokens=layout.global_batch_tokens,
        unique_tokens=plan.unique_tokens,
    )


def _predicted(
    model: ModelConfig, layout: Layout, cluster: Cluster, program: str, calibration: Calibration | None
) -> Prediction:
    if calibration is None:
        return predict(model, layout, cluster, program=program)
    decades = calibration.distance(from_model_config(model), layout, cluster).decades
    return predict(
        model,
        layout,
        cluster,
        program=program,
        constants=calibration.calibrated(decades=decades),
        memory_program=_memory_program(cluster, program, layout.precision, calibration, decades=decades),
    )


def _memory_program(
    cluster: Cluster, program: str, precision: str, calibration: Calibration | None, *, decades: float = 0.0
) -> MemoryProgram | None:
    if calibration is None:
        return None
    shipped = find_costs(program, gpu_name=cluster.gpu.name, precision=precision).memory_program
    return calibration.memory_program(shipped, decades=decades)


# -- the file


def write_plan(path: Path, plan: PlanFile) -> None:
    write_json(path, {"format_version": FORMAT_VERSION, **plain(plan)})


def read_plan(path: Path) -> PlanFile:
    """Read a plan file. DataError when it is missing, damaged or of another version."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise DataError(f"no plan at {path}; `llmtrain plan` writes one and prints where") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a plan: {error}; write it anew with `llmtrain plan`") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version={version} and this llmtrain reads {FORMAT_VERSION}; "
            f"write it anew with `llmtrain plan`"
        )
    try:
        return _from_json(content)
    except (TypeError, KeyError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path} does not hold a whole plan: {error}; write it anew with `llmtrain plan`"
        ) from error


def _from_json(content: dict[str, Any]) -> PlanFile:
    choice, cluster = content["choice"], content["cluster"]
    gpu = cluster["gpu"]
    forecast = {key: _interval_or_value(value) for key, value in content["forecast"].items()}
    forecast["mfu"] = {key: Interval(**value) for key, value in forecast["mfu"].items()}
    whole = {each.name: content[each.name] for each in fields(PlanFile)}
    return PlanFile(
        **{
            **whole,
            "cluster": Cluster(**{**cluster, "gpu": Gpu(**{**gpu, "unverified": tuple(gpu["unverified"])})}),
            "choice": Choice(
                **{**choice, "model": ModelConfig(**choice["model"]), "layout": Layout(**choice["layout"])}
            ),
            "forecast": Forecast(**forecast),
            "runners_up": tuple(
                RunnerUp(**{key: _runner_up(key, value) for key, value in each.items()})
                for each in content["runners_up"]
            ),
            "sensitivity": tuple(Change(**each) for each in content["sensitivity"]),
        }
    )


def _interval_or_value(value: Any) -> Any:
    """JSON holds no types."""
    return Interval(**value) if isinstance(value, dict) and set(value) == {"low", "mid", "high"} else value


def _runner_up(key: str, value: Any) -> Any:
    return Layout(**value) if key == "layout" else _interval_or_value(value)
