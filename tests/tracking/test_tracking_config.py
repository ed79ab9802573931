"""Settings of tracking, and what W&B's mode resolves to."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from llmtrain.errors import ConfigError
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.wandb import chosen_mode

KEY = {"WANDB_API_KEY": "0" * 40}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_every_steps": 0}, "tracking.log_every_steps=0 must be at least 1"),
        ({"wandb_init_timeout_s": 0.0}, "tracking.wandb_init_timeout_s=0.0 must be above 0 seconds"),
        ({"wandb_finish_timeout_s": -1.0}, "tracking.wandb_finish_timeout_s=-1.0 must be above 0 seconds"),
        ({"wandb_project": ""}, "tracking.wandb_project is empty; name a project, or set tracking.wandb=off"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrackingConfig(**settings)


def test_off_works_quoted_in_yaml_and_the_message_for_unquoted_names_it():
    schema = OmegaConf.structured(TrackingConfig)
    config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create("wandb: 'off'")))
    assert config.wandb is WandbMode.off
    with pytest.raises(ValidationError, match=r"Invalid value 'False', expected one of \[off, "):
        OmegaConf.merge(schema, OmegaConf.create("wandb: off"))


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", KEY, "online"),
        ("auto", {**KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {**KEY, "WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("online", {}, "offline"),
        ("online", KEY, "online"),
        ("offline", KEY, "offline"),
        ("off", KEY, "off"),
    ],
)
def test_wandb_is_offline_unless_a_key_is_set(mode, environment, expected):
    assert chosen_mode(WandbMode[mode], environment) is WandbMode[expected]
