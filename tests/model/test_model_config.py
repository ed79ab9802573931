"""Messages of shapes that cannot be built."""

from __future__ import annotations

import pytest

from llmtrain.errors import ConfigError
from llmtrain.model.config import ModelConfig

SHAPE = {"vocab_size": 64, "num_layers": 1, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 96}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        ({"d_model": 66}, "model.d_model=66 is not a multiple of model.num_heads=4; change one of them"),
        (
            {"num_kv_heads": 3},
            "model.num_heads=4 is not a multiple of model.num_kv_heads=3; each key/value head",
        ),
        ({"family": "gpt2"}, "model.max_positions=None with model.family=gpt2: gpt2 needs at least 1"),
        ({"family": "gpt2", "max_positions": 0}, "model.max_positions=0 with model.family=gpt2"),
        ({"max_positions": 8}, r"model.max_positions=8 with model.family=llama: .* llama has none \(null\)"),
        ({"head_width": 15}, "a head's width must be even for RoPE, got 15; change model.head_width"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**SHAPE, **changes})
