"""Initial weights, each from its own random stream: the same on every layout, whichever ranks hold them.

Normal with `init_std`; the projections that write into the residual stream (wo, w_down) get
init_std / sqrt(2 L), since 2 L of them add up there (Radford et al. 2019, section 2.3). Norms start at 1,
biases at 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmtrain import rng
from llmtrain.model.config import ModelConfig
from llmtrain.model.transformer import Transformer


def initial_std(name: str, cfg: ModelConfig) -> float:
    """Standard deviation of the weight with this canonical name; 0 for norms and biases: constants."""
    if name.endswith(("norm.weight", ".bias")):
        return 0.0
    if name.endswith((".wo.weight", ".w_down.weight")):
        return cfg.init_std / math.sqrt(2 * cfg.num_layers)
    return cfg.init_std


def initial_weight(name: str, numel: int, cfg: ModelConfig, seed: int) -> NDArray[np.float32]:
    """The flattened initial weight with this canonical name. Equal in every layout."""
    std = initial_std(name, cfg)
    if std == 0.0:
        return np.full(numel, 0.0 if name.endswith(".bias") else 1.0, dtype=np.float32)
    values = rng.stream(seed, "init", name).standard_normal(numel, dtype=np.float32)
    values *= std
    return values


def init_weights(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` in place, after `to_empty` as well.

    A part of a model gets the values it has in the whole, when its parameters have their canonical names.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = initial_weight(name, parameter.numel(), cfg, seed)
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def build_transformer(
    cfg: ModelConfig, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A transformer with initial weights, made on `device` without a second copy."""
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    model.to_empty(device=device)
    init_weights(model, cfg, seed)
    return model
