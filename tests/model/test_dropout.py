"""Dropout's mask: independent bits of the right share, a function of where they fall and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtrain.model.config import ModelConfig
from llmtrain.model.dropout import at_site, drop, token_keys
from llmtrain.model.init import build_transformer


def dropped(keys: torch.Tensor, rate: float, width: int = 64) -> torch.Tensor:
    return drop(torch.ones(*keys.shape, width), keys, rate) == 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_share_is_the_rate_along_every_direction(rate: float) -> None:
    gone = dropped(token_keys(3, np.arange(40), 50), rate).double()
    assert gone.mean().item() == pytest.approx(rate, abs=5 * (rate / gone.numel()) ** 0.5)
    for dims in ((0, 1), (0, 2), (1, 2)):  # of a feature, a position, a row
        means = gone.mean(dims)
        spread = (rate * (1 - rate) * len(means) / gone.numel()) ** 0.5
        assert ((means - rate).abs() < 5 * spread).all()
        assert means.std().item() == pytest.approx(spread, rel=0.5)


def test_neighbours_sites_seeds_and_rows_are_uncorrelated() -> None:
    keys = token_keys(3, np.arange(40), 50)
    gone = dropped(keys, 0.5).double() - 0.5
    others = {
        "features": (gone[..., 1:], gone[..., :-1]),
        "positions": (gone[:, 1:], gone[:, :-1]),
        "rows": (gone[1:], gone[:-1]),
        "sites": (gone, dropped(at_site(keys, 1), 0.5).double() - 0.5),
        "seeds": (gone, dropped(token_keys(4, np.arange(40), 50), 0.5).double() - 0.5),
    }
    for name, (one, other) in others.items():
        correlation = 4 * (one * other).mean().item()
        assert abs(correlation) < 5 / one.numel() ** 0.5, name


def test_what_is_kept_is_scaled_and_gradients_follow_the_mask() -> None:
    keys = token_keys(0, np.arange(3), 8)
    x = torch.randn(3, 8, 16, requires_grad=True)
    out = drop(x, keys, 0.25)
    out.sum().backward()
    gone = dropped(keys, 0.25, 16)
    assert torch.equal(out[~gone], x[~gone] / 0.75)
    assert not out[gone].any()
    assert torch.equal(x.grad, torch.where(gone, 0.0, 1 / 0.75))


def test_a_rows_mask_depends_on_its_place_alone() -> None:
    together = token_keys(5, np.array([7, 10**12]), 6)
    assert torch.equal(together[1:], token_keys(5, np.array([10**12]), 6))
    assert not torch.equal(together[0], together[1])


def test_a_model_drops_in_training_alone() -> None:
    shape = {"vocab_size": 96, "num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2}
    model = build_transformer(ModelConfig(**shape, ffn_width=80, init_std=0.2), seed=0)
    tokens = torch.arange(22)[None]
    positions, segments = tokens % 13, (tokens >= 13).int()
    keys = token_keys(0, np.arange(1), 22)
    whole = model(tokens, positions, segments)
    assert torch.equal(whole, model(tokens, positions, segments, keys_BS=keys)), "the rate is 0"
    model.dropout = 0.2
    thinned = model(tokens, positions, segments, keys_BS=keys)
    assert not torch.isclose(whole, thinned).all(dim=-1).any()
    assert torch.equal(thinned, model(tokens, positions, segments, keys_BS=keys))
    assert torch.equal(whole, model.eval()(tokens, positions, segments, keys_BS=keys))
