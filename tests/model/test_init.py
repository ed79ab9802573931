"""Initial weights: their spread, and that each depends on nothing but the seed and its name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmtrain.model.block import Block
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.init import build_transformer, init_weights, initial_weight
from llmtrain.model.seams import Seams

CFG = ModelConfig(
    vocab_size=400, num_layers=8, d_model=192, num_heads=6, num_kv_heads=3, ffn_width=320, init_std=0.03
)


def test_projections_into_the_residual_stream_are_scaled_by_depth() -> None:
    for name, weight in build_transformer(CFG, seed=1).named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        expected = 0.03 / math.sqrt(16) if name.endswith(("wo.weight", "w_down.weight")) else 0.03
        std_error = 1 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=5 * std_error), name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name


def test_gpt2s_norms_start_at_one_and_its_biases_at_zero() -> None:
    cfg = replace(CFG, family=Family.gpt2, max_positions=300)
    seen = 0
    for name, weight in build_transformer(cfg, seed=1).named_parameters():
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif name.endswith("norm.weight"):
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() > 0.005, name
            continue
        seen += 1
    assert seen == 8 * (2 * 2 + 6) + 2


def test_a_weight_depends_on_seed_and_name_only() -> None:
    name = "blocks.5.mlp.w_up.weight"
    deep = dict(build_transformer(CFG, seed=1).named_parameters())[name]
    alone = initial_weight(name, deep.numel(), CFG, 1)
    assert torch.equal(deep, torch.from_numpy(alone).view(deep.shape))
    assert not torch.equal(deep, dict(build_transformer(CFG, seed=2).named_parameters())[name])
    others = [
        weight for other, weight in build_transformer(CFG, seed=1).named_parameters() if "w_up" in other
    ]
    assert len({weight[0, 0].item() for weight in others}) == CFG.num_layers


def test_a_part_of_a_model_gets_the_values_it_has_in_the_whole() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleDict({str(index): Block(CFG, Seams()) for index in (4, 5)})

    half = Half()
    init_weights(half, CFG, seed=1)
    whole = dict(build_transformer(CFG, seed=1).named_parameters())
    for name, weight in half.named_parameters():
        assert torch.equal(weight, whole[name]), name
