"""What a tensor-parallel rank holds: parts tile every weight, each element has one first holder, and shapes
are those of the local model."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrain.model.config import ModelConfig
from llmtrain.model.partition import count_of, local_config, part_of, unit_of
from llmtrain.model.transformer import Transformer

SHAPE = {"vocab_size": 96, "num_layers": 2, "d_model": 64, "num_heads": 8, "ffn_width": 80}
MODELS = {
    "llama": {"num_kv_heads": 4},
    "llama, fewer key/value heads than ranks": {"num_kv_heads": 2, "head_width": 12},
    "llama, one key/value head": {"num_kv_heads": 1, "tie_embeddings": True},
    "gpt2": {"family": "gpt2", "max_positions": 32, "num_kv_heads": 8, "tie_embeddings": True},
}


def shapes_of(cfg: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(cfg).named_parameters()}


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parts_tile_every_weight_and_fit_the_local_model(model: dict, tp_size: int) -> None:
    cfg = ModelConfig(**SHAPE, **model)
    whole, local = shapes_of(cfg), shapes_of(local_config(cfg, tp_size=tp_size))
    assert whole.keys() == local.keys()
    for name, shape in whole.items():
        parts = [part_of(name, cfg, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
        ranges = [part.range_of(math.prod(shape)) for part in parts]
        assert {last - first for first, last in ranges} == {math.prod(local[name])}, name
        first_holders = sorted(span for span, part in zip(ranges, parts, strict=True) if part.copy == 0)
        assert [first for first, _ in first_holders] == [0, *(last for _, last in first_holders[:-1])], name
        assert first_holders[-1][1] == math.prod(shape), name


def test_a_rank_holds_the_key_value_head_that_its_query_heads_use() -> None:
    cfg = ModelConfig(**SHAPE, num_kv_heads=2)
    for rank in range(4):
        query = part_of("blocks.0.attention.wq.weight", cfg, tp_rank=rank, tp_size=4)
        key = part_of("blocks.0.attention.wk.weight", cfg, tp_rank=rank, tp_size=4)
        own = range(query.index * 2, query.index * 2 + 2)  # 8 heads on 4 ranks
        assert {head // (cfg.num_heads // cfg.num_kv_heads) for head in own} == {key.index}
        assert key.num_copies == 2


def test_a_weight_that_the_table_does_not_name_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"blocks.0.gate.weight is not in model/partition.py"):
        unit_of("blocks.0.gate.weight")
    cfg = ModelConfig(**SHAPE, num_kv_heads=4)
    assert count_of(unit_of("blocks.1.attention.wk.weight"), cfg) == 4
