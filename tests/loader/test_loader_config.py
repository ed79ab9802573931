"""What of a run's data cannot be right is refused with its value, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.errors import ConfigError
from llmtrain.loader.config import LoaderConfig, LocalityConfig, SourceConfig, StageConfig

A, B = SourceConfig(folder="a", weight=1.0), SourceConfig(folder="b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": None}, "give data.folder or data.sources, one of them: folder=None, sources=[]"),
        ({"sources": {"a": A}}, "give data.folder or data.sources, one of them: folder=x, sources=['a']"),
        ({"seq_len": 1}, "data.seq_len=1 must be at least 2"),
        ({"max_epochs": 0.0}, "data.max_epochs=0.0 must be above 0"),
        ({"block_rows": 0}, "data.block_rows=0 must be at least 1"),
        ({"prefetch_steps": -1}, "data.prefetch_steps=-1 at least 0"),
        ({"stages": [StageConfig(from_tokens=0, weights={"a": 1})]}, "there are none; name data.sources"),
        ({"folder": None, "sources": {"a": A, "b": B}}, "or none of them: a=1.0, b=None"),
    ],
)
def test_loader_config_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoaderConfig(**({"folder": "x", "seq_len": 32} | settings))
    assert message in str(error.value)


def test_parts_of_it_do_too() -> None:
    with pytest.raises(ConfigError, match="max_epochs=0 of source a must be above 0, or null"):
        SourceConfig(folder="a", max_epochs=0)
    with pytest.raises(ConfigError, match="group_rows=0 and window_groups=64 must be at least 1"):
        LocalityConfig(group_rows=0)
