"""The small runs that a fit of L(N, D) needs: sizes times tokens per parameter, each with a whole schedule.

What a fit can tell depends on how far the runs spread, in N, and in D beside N: runs of one tokens-per-
parameter ratio leave A/N^alpha and B/D^beta mixed up. OLMo's ladder (Bhagia et al. 2024, arXiv:2412.04403)
is 4 sizes x 4 ratios, and cost about 1% of the 7B and 13B runs that it foretold.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain import rng
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import plain
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import flops_per_token, num_non_embedding_params, num_params
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.envelope import Runs, extrapolation, fit_envelope, loss_interval
from llmtrain.planner.loss.laws import DEFAULT_LAW, FLOPS_PER_PARAM_TOKEN, LAWS, Parametric, parametric_loss
from llmtrain.planner.recipe import Recipe, choose_recipe
from llmtrain.planner.shape import choose_shape

PRECISIONS = ("bf16", "fp32")
SECONDS_PER_HOUR = 3600.0
CHECKS_PER_RUN = 10
"""Evaluations that each run makes; the last one, at its end, is the fit's loss."""
FLOPS_CONVENTION = "palm"
"""The count of Devices.utilization (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
RUN_NOISE = 3e-3
"""Noise of log loss that the ladder's reach is judged with: that of OLMo's ladder about its fit is 0.46%, of
reruns 0.03%. Assumed."""
JUDGING_RESAMPLES = 50


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What each run of the ladder has."""

    name: str
    num_devices: int
    """One rank each: batches divide among them."""
    peak_flops: float
    """FLOP/s of one device."""
    peak_source: str
    utilization: Interval
    """Useful FLOPs, by FLOPS_CONVENTION, over the peak."""
    precision: str
    """One of PRECISIONS."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One run."""

    name: str
    model: ModelConfig
    seq_len: int
    recipe: Recipe
    flops: float
    """By FLOPS_CONVENTION: attention and head included."""

    @property
    def num_params(self) -> int:
        return num_params(self.model)

    @property
    def num_tokens(self) -> int:
        return self.recipe.total_tokens

    @property
    def tokens_per_param(self) -> float:
        return self.num_tokens / self.num_params


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the ladder could tell about a larger run, if a published law were the truth."""

    num_params: float
    num_tokens: float
    true_loss: float
    loss: Interval
    flops_beyond: float
    share_of_cost: float
    """The ladder's FLOPs over that run's."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    name: str
    devices: Devices
    rungs: list[Rung]
    """Cheapest first."""

    @property
    def flops(self) -> float:
        return sum(rung.flops for rung in self.rungs)

    @property
    def device_hours(self) -> Interval:
        """Of all runs, one after another."""
        return self._hours(self.flops)

    def seconds(self, rung: Rung) -> Interval:
        """Of one run."""
        hours = self._hours(rung.flops)
        each = SECONDS_PER_HOUR / self.devices.num_devices
        return Interval(low=hours.low * each, mid=hours.mid * each, high=hours.high * each)

    def _hours(self, flops: float) -> Interval:
        at_peak, use = flops / self.devices.peak_flops / SECONDS_PER_HOUR, self.devices.utilization
        return Interval(low=at_peak / use.high, mid=at_peak / use.mid, high=at_peak / use.low)


def make_ladder(
    *,
    name: str,
    sizes: Sequence[float],
    ratios: Sequence[float],
    vocab_size: int,
    seq_len: int,
    devices: Devices,
    budget_flops: float | None = None,
) -> Ladder:
    """Return the runs.

    Args:
        budget_flops: sizes are multiplied by one factor until the ladder costs about this by 6ND; None: as
            given.

    Raises:
        ConfigError: two sizes give one shape, or a fit could not tell N from D with these runs.
    """
    if budget_flops is not None:
        cost = sum(FLOPS_PER_PARAM_TOKEN * size**2 * ratio for size in sizes for ratio in ratios)
        sizes = [size * math.sqrt(budget_flops / cost) for size in sizes]
    _check_shapes_differ(sizes, vocab_size=vocab_size)
    rungs = [
        _rung(name, size, ratio, vocab_size=vocab_size, seq_len=seq_len, num_ranks=devices.num_devices)
        for size in sizes
        for ratio in ratios
    ]
    ladder = Ladder(name=name, devices=devices, rungs=sorted(rungs, key=lambda rung: rung.flops))
    try:
        _as_runs(ladder, np.ones(len(rungs)))
    except DataError as error:
        raise ConfigError(
            f"sizes={_listed(sizes)} x tokens_per_param={_listed(ratios)} is no ladder: {error}"
        ) from error
    return ladder


def judge(ladder: Ladder, *, num_params: float, num_tokens: float, seed: int = 0) -> Reach:
    """Fit made-up losses of the ladder's runs, DEFAULT_LAW's with RUN_NOISE, and foretell a larger run."""
    form = LAWS[DEFAULT_LAW].form
    assert isinstance(form, Parametric), "the default law gives a loss"
    true = np.array([parametric_loss(form, rung.num_params, rung.num_tokens) for rung in ladder.rungs])
    noise = rng.stream(seed, "planner", "ladder").normal(0.0, RUN_NOISE, len(true))
    runs = _as_runs(ladder, true * np.exp(noise))
    envelope = fit_envelope(runs, num_resamples=JUDGING_RESAMPLES, seed=seed)
    return Reach(
        num_params=num_params,
        num_tokens=num_tokens,
        true_loss=parametric_loss(form, num_params, num_tokens),
        loss=loss_interval(envelope, num_params, num_tokens),
        flops_beyond=extrapolation(runs, num_params, num_tokens).flops,
        share_of_cost=ladder.flops / (FLOPS_PER_PARAM_TOKEN * num_params * num_tokens),
    )


def sweep_command(ladder: Ladder, *, out: Path) -> str:
    """The one command that trains all runs, each into runs/<ladder>/<run>."""
    experiments = ",".join(rung.name for rung in ladder.rungs)
    return (
        f"${{LAUNCH:-llmtrain train}} -m --config-dir {shlex.quote(str(out))} \\\n"
        f"  +experiment={experiments} \\\n"
        f"  hydra.sweep.dir=runs/{ladder.name} 'hydra.sweep.subdir=${{run.name}}' \"$@\""
    )


def sweep_script(ladder: Ladder, *, out: Path) -> str:
    hours = ladder.device_hours
    return "\n".join(
        [
            "#!/bin/sh",
            f"# Written by `llmtrain plan ladder`: {len(ladder.rungs)} runs, {ladder.flops:.3g} FLOPs,",
            f"# {hours.mid:.3g} device-hours ({hours.low:.3g} to {hours.high:.3g}) on "
            f"{ladder.devices.num_devices} x {ladder.devices.name}.",
            f"# Settings go on: sh {ladder.name}.sh data.folder=data/mine",
            "# One process by default; one a device: LAUNCH=launch/single_node.sh sh ...",
            "set -e",
            sweep_command(ladder, out=out),
            f"llmtrain plan fit runs=runs/{ladder.name}",
            "",
        ]
    )


def experiment_yaml(rung: Rung, devices: Devices) -> str:
    """What `llmtrain train` changes for this run: a file for the folder `experiment` of its --config-dir."""
    model, recipe = rung.model, rung.recipe
    every = max(1, recipe.num_steps // CHECKS_PER_RUN)
    lines = [
        "# @package _global_",
        f"# Written by `llmtrain plan ladder`: {rung.num_params:,} parameters, {recipe.num_steps} steps,",
        f"# {rung.tokens_per_param:.3g} tokens a parameter.",
        "run:",
        f"  name: {json.dumps(rung.name)}",
        "model:",
        f"  vocab_size: {model.vocab_size}",
        f"  num_layers: {model.num_layers}",
        f"  d_model: {model.d_model}",
        f"  num_heads: {model.num_heads}",
        f"  num_kv_heads: {model.num_kv_heads}",
        f"  ffn_width: {model.ffn_width}",
        f"  tie_embeddings: {json.dumps(model.tie_embeddings)}",
        "data:",
        f"  seq_len: {rung.seq_len}",
        "train:",
        f"  total_tokens: {recipe.total_tokens}",
        f"  global_batch_rows: {recipe.global_batch_rows}",
        f"  micro_batch_rows: {recipe.micro_batch_rows}",
        f"  precision: {devices.precision}",
        f"  eval_every_steps: {every}",
        f"  device_peak_tflops: {devices.peak_flops / 1e12:.6g}",
        f"  device_peak_source: {json.dumps(devices.peak_source)}",
        "save:",
        f"  every_steps: {recipe.num_steps}",
        "optimizer:",
        f"  peak_lr: {recipe.peak_lr:g}",
        "schedule:",
        "  kind: cosine",
        f"  warmup_tokens: {recipe.warmup_tokens}",
    ]
    return "\n".join(lines) + "\n"


def ladder_json(ladder: Ladder) -> str:
    rows = [
        {
            "name": rung.name,
            "num_params": rung.num_params,
            "num_tokens": rung.num_tokens,
            "flops": rung.flops,
            "seconds": plain(ladder.seconds(rung)),
        }
        for rung in ladder.rungs
    ]
    whole = {
        "name": ladder.name,
        "devices": plain(ladder.devices),
        "flops": ladder.flops,
        "device_hours": plain(ladder.device_hours),
        "runs": rows,
    }
    return json.dumps(whole, indent=1) + "\n"


def _check_shapes_differ(sizes: Sequence[float], *, vocab_size: int) -> None:
    asked: dict[str, float] = {}  # by what the runs' names will say
    for size in sizes:
        count = _short(num_params(choose_shape(size, vocab_size=vocab_size).model))
        if count in asked:
            raise ConfigError(
                f"sizes {asked[count]:.3g} and {size:.3g} both give a shape of {count} parameters with "
                f"model.vocab_size={vocab_size}; spread sizes further"
            )
        asked[count] = size


def _rung(name: str, size: float, ratio: float, *, vocab_size: int, seq_len: int, num_ranks: int) -> Rung:
    model = choose_shape(size, vocab_size=vocab_size).model
    count = num_params(model)
    per_token = flops_per_token(model, seq_len, convention=FLOPS_CONVENTION)
    recipe = choose_recipe(
        num_params=count,
        num_non_embedding_params=num_non_embedding_params(model),
        num_tokens=ratio * count,
        flops=per_token * ratio * count,
        seq_len=seq_len,
        num_ranks=num_ranks,
    )
    return Rung(
        name=f"{name}_{_short(count)}_{ratio:g}x",
        model=model,
        seq_len=seq_len,
        recipe=recipe,
        flops=float(per_token * recipe.total_tokens),
    )


def _as_runs(ladder: Ladder, loss: np.ndarray) -> Runs:
    return Runs(
        names=tuple(rung.name for rung in ladder.rungs),
        num_params=np.array([rung.num_params for rung in ladder.rungs], dtype=float),
        num_tokens=np.array([rung.num_tokens for rung in ladder.rungs], dtype=float),
        loss=loss,
    )


def _short(count: float) -> str:
    """14_983_680 -> 15m: for a file name."""
    for scale, mark in ((1e9, "b"), (1e6, "m"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g}{mark}"
    return str(int(count))


def _listed(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.3g}" for value in values) + "]"
