"""Settings that cannot be right are refused with their value and a way out."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.errors import ConfigError
from llmtrain.train.config import (
    Intent,
    OptimizerConfig,
    RampConfig,
    RunConfig,
    ScheduleConfig,
    ScheduleKind,
    TrainConfig,
)

TRAIN: dict[str, Any] = {"total_tokens": 100, "global_batch_rows": 4, "micro_batch_rows": 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"total_tokens": 0}, "train.total_tokens=0 must be at least 1"),
        ({"micro_batch_rows": 3}, "train.global_batch_rows=4 is not a multiple of train.micro_batch_rows=3"),
        ({"eval_every_steps": -1}, "train.eval_every_steps=-1 and train.grad_clip=1.0 must be finite"),
        ({"grad_clip": float("nan")}, "train.grad_clip=nan must be finite and not negative"),
        ({"eval_rows": 0}, "train.eval_rows=0 must be at least 1, or null for all"),
        ({"recompute_every": -1}, "train.recompute_every=-1 must be 0"),
        ({"process_group_timeout_s": 0.0}, "need train.process_group_timeout_s=0.0 above 0"),
        ({"device_peak_tflops": 1.0}, "give both, or neither"),
        (
            {"batch_ramp": [RampConfig(until_tokens=9, rows=2), RampConfig(until_tokens=9, rows=4)]},
            "until_tokens=[9, 9] must rise, from 1 on",
        ),
        ({"batch_ramp": [RampConfig(until_tokens=0, rows=2)]}, "until_tokens=[0] must rise, from 1 on"),
        ({"batch_ramp": [RampConfig(until_tokens=9, rows=3)]}, "rows=3 is not a positive multiple of"),
    ],
)
def test_train_config_says_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        TrainConfig(**(TRAIN | changed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peak_lr": 0.0}, "need finite optimizer.peak_lr > 0"),
        ({"peak_lr": float("inf")}, "need finite optimizer.peak_lr > 0"),
        ({"peak_lr": 1.0, "beta2": 1.0}, r"optimizer.beta2=1.0 must be in \[0, 1\)"),
    ],
)
def test_optimizer_config_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


def test_schedule_config_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="wsd needs decay_tokens, and the other kinds have none"):
        ScheduleConfig(decay_tokens=5)
    with pytest.raises(ConfigError, match=r"warmup_tokens=0 with schedule.kind=inverse_sqrt"):
        ScheduleConfig(kind=ScheduleKind.inverse_sqrt)
    with pytest.raises(ConfigError, match=r"0 <=.*schedule.floor_ratio <= 1"):
        ScheduleConfig(floor_ratio=2.0)


def test_init_from_belongs_to_a_warm_start() -> None:
    with pytest.raises(ConfigError, match="warm_start needs init_from, and nothing else takes it"):
        RunConfig(name="a", folder="b", init_from="c")
    RunConfig(name="a", folder="b", init_from="c", intent=Intent.warm_start)
