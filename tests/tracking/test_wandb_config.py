"""Settings of W&B: tags that it takes, and the group of a sweep's jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.tracking.config import TrackingConfig, sweep_group


@pytest.mark.parametrize("tag", ["", "x" * 65])
def test_a_tag_that_wandb_would_refuse_is_refused_here(tag):
    with pytest.raises(ConfigError, match="W&B takes tags of 1 to 64 characters"):
        TrackingConfig(wandb_tags=["fine", tag])


def test_jobs_of_an_array_or_a_sweep_share_a_group_and_others_have_none():
    sweep = Path("/home/me/multirun/2026-11-29/14-05-00")
    assert sweep_group(array_job="4711", sweep_folder=None) == "array-4711"
    assert sweep_group(array_job="4711", sweep_folder=sweep / "3") == "array-4711"
    assert sweep_group(array_job=None, sweep_folder=sweep / "3") == "2026-11-29/14-05-00"
    assert sweep_group(array_job=None, sweep_folder=None) is None
    assert sweep_group(array_job="", sweep_folder=None) is None
