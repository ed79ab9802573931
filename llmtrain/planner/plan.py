"""A plan: what to train for a budget, what to expect of it, and the file that a run is later held against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError, DataError
from llmtrain.files import plain, read_json, write_json
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import flops_per_token, num_non_embedding_params, num_params, training_state_bytes
from llmtrain.planner.config import BudgetConfig, HardwareConfig
from llmtrain.planner.hardware import Hardware, resolve_hardware
from llmtrain.planner.laws import Interval, Optimum, find_law, forecast_loss, optimum
from llmtrain.planner.recipe import Recipe, choose_recipe
from llmtrain.planner.search import choose_shape

FORMAT_VERSION = 1
FLOPS_CONVENTION = "palm"
"""The count behind every utilization of conf/hardware: PaLM's MFU (arXiv:2204.02311, appendix B)."""
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the plan trains."""

    model: ModelConfig
    seq_len: int
    total_tokens: int
    global_batch_rows: int
    micro_batch_rows: int
    num_steps: int
    warmup_tokens: int
    peak_lr: float

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_rows * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What to expect of a run. Time and rate: low to high is what 8 runs in 10 should hit, if the
    utilization's source is right."""

    step_s: Interval
    total_s: Interval
    tokens_per_s: Interval
    loss: Interval
    """Nats per token at the end, on held-out text; `forecast_loss` says what the ends are."""
    loss_law: str
    loss_decades_outside: float
    """How far outside that law's runs this one lies, in powers of ten."""
    state_gib: float
    """Weights, gradients and optimizer state on one device without ZeRO; activations come on top."""


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """`<name>.plan.json`."""

    name: str
    budget_flops: float
    """Training FLOPs, in `FLOPS_CONVENTION`, that the budget buys at utilization.mid."""
    budget_text: str
    """The sum behind budget_flops."""
    law: str
    hardware: Hardware
    choice: Choice
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what its printed form explains and its file does not need."""

    plan: PlanFile
    law_optimum: Optimum
    size_ratio: float
    """Parameters of the chosen shape over those the law asks for."""
    recipe: Recipe


def make_plan(
    *,
    name: str,
    law: str,
    budget: BudgetConfig,
    hardware: HardwareConfig,
    vocab_size: int,
    seq_len: int,
) -> Planned:
    """Choose a shape, tokens and a recipe for the budget.

    The law gives the parameters. The tokens are what the budget leaves for the chosen shape, counted with its
    real FLOPs (attention and head included), so that the time comes out right even where the law's 6ND does
    not.
    """
    chosen_law = find_law(law)
    device = resolve_hardware(hardware)
    flops, text = budget_flops(budget, device)
    wish = optimum(chosen_law, flops)
    shape = choose_shape(wish.num_params, vocab_size=vocab_size)
    num_tokens = flops / flops_per_token(shape.model, seq_len, convention=FLOPS_CONVENTION)
    recipe = choose_recipe(
        num_params=num_params(shape.model),
        num_non_embedding_params=num_non_embedding_params(shape.model),
        num_tokens=num_tokens,
        flops=flops,
        seq_len=seq_len,
        num_ranks=device.num_devices * device.ranks_per_device,
    )
    if num_tokens < recipe.global_batch_rows * seq_len / 2:
        raise ConfigError(
            f"the budget of {flops:.3g} FLOPs buys {num_tokens:,.0f} tokens, less than half of one batch of "
            f"{recipe.global_batch_rows} rows of data.seq_len={seq_len}; raise the budget, or lower "
            "data.seq_len or "
            f"model.vocab_size={vocab_size}"
        )
    choice = Choice(
        model=shape.model,
        seq_len=seq_len,
        total_tokens=recipe.total_tokens,
        global_batch_rows=recipe.global_batch_rows,
        micro_batch_rows=recipe.micro_batch_rows,
        num_steps=recipe.num_steps,
        warmup_tokens=recipe.warmup_tokens,
        peak_lr=recipe.peak_lr,
    )
    plan = PlanFile(
        name=name,
        budget_flops=flops,
        budget_text=text,
        law=law,
        hardware=device,
        choice=choice,
        prediction=predict_on(
            device,
            shape.model,
            seq_len=seq_len,
            num_tokens=recipe.total_tokens,
            global_batch_tokens=choice.global_batch_tokens,
            num_devices=device.num_devices,
        ),
    )
    return Planned(plan=plan, law_optimum=wish, size_ratio=shape.size_ratio, recipe=recipe)


def budget_flops(budget: BudgetConfig, hardware: Hardware) -> tuple[float, str]:
    """Return the FLOPs that the budget buys at the middle utilization, and the sum as text."""
    if budget.flops is not None:
        return budget.flops, f"{budget.flops:.3g} FLOPs, given"
    if budget.device_hours is not None:
        hours, text = budget.device_hours, f"{budget.device_hours:g} device-hours"
    else:
        assert budget.wall_hours is not None, "BudgetConfig holds exactly one budget"
        hours = budget.wall_hours * hardware.num_devices
        text = f"{budget.wall_hours:g} h x {hardware.num_devices} devices"
    flops = hours * SECONDS_PER_HOUR * hardware.peak_flops * hardware.utilization.mid
    return flops, (
        f"{text} x 3600 s x {hardware.peak_flops / 1e12:.4g} TFLOP/s x {hardware.utilization.mid:g} "
        "utilization "
        f"= {flops:.3g} FLOPs"
    )


def predict(
    plan: PlanFile,
    model: ModelConfig,
    *,
    seq_len: int,
    num_tokens: int,
    global_batch_tokens: int,
    num_devices: int,
) -> Prediction:
    """Return what the plan's hardware and laws say about any run, of the plan's own shape or another."""
    return predict_on(
        plan.hardware,
        model,
        seq_len=seq_len,
        num_tokens=num_tokens,
        global_batch_tokens=global_batch_tokens,
        num_devices=num_devices,
    )


def predict_on(
    hardware: Hardware,
    model: ModelConfig,
    *,
    seq_len: int,
    num_tokens: int,
    global_batch_tokens: int,
    num_devices: int,
) -> Prediction:
    """The arithmetic of `predict`: FLOPs over what `num_devices` devices really do."""
    per_token = flops_per_token(model, seq_len, convention=FLOPS_CONVENTION)
    rate = hardware.peak_flops * num_devices / per_token
    tokens_per_s = Interval(
        low=rate * hardware.utilization.low,
        mid=rate * hardware.utilization.mid,
        high=rate * hardware.utilization.high,
    )
    forecast = forecast_loss(
        num_params=num_params(model),
        num_non_embedding_params=num_non_embedding_params(model),
        num_tokens=num_tokens,
        vocab_size=model.vocab_size,
    )
    state = training_state_bytes(model, precision=hardware.precision, zero_stage=0, dp_size=1)
    return Prediction(
        step_s=_time(global_batch_tokens, tokens_per_s),
        total_s=_time(num_tokens, tokens_per_s),
        tokens_per_s=tokens_per_s,
        loss=forecast.loss,
        loss_law=forecast.law,
        loss_decades_outside=forecast.decades_outside,
        state_gib=sum(state.values()) / 2**30,
    )


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
        del content["format_version"]
        choice, prediction = content.pop("choice"), content.pop("prediction")
        hardware = content.pop("hardware")
        model = choice.pop("model")
        return PlanFile(
            hardware=Hardware(utilization=Interval(**hardware.pop("utilization")), **hardware),
            choice=Choice(model=ModelConfig(**model), **choice),
            prediction=Prediction(**{key: _interval_or_value(value) for key, value in prediction.items()}),
            **content,
        )
    except (TypeError, KeyError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path} does not hold a whole plan: {error}; write it anew with `llmtrain plan`"
        ) from error


def _interval_or_value(value: Any) -> Any:
    """JSON holds no types: an object inside a prediction is an interval."""
    return Interval(**value) if isinstance(value, dict) else value


def _time(num_tokens: float, tokens_per_s: Interval) -> Interval:
    """Seconds for `num_tokens`; the fastest rate makes the low end."""
    return Interval(
        low=num_tokens / tokens_per_s.high,
        mid=num_tokens / tokens_per_s.mid,
        high=num_tokens / tokens_per_s.low,
    )
