"""Dropout (Srivastava et al. 2014) whose mask is a function of what it falls on: the row's place in the run,
the token's in the row, the site in the model, the feature. So it is the same in every layout, after every
restart, and when a block is computed again; no generator has a state to keep.

It falls where GPT-2's does: on the embedding, and on what attention and feed-forward layer add to the
residual stream; not on attention's probabilities, which fused kernels do not show.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain import rng

_GOLDEN = 0x9E3779B97F4A7C15
_SITE = 0xD1B54A32D192ED03
_FEATURE = 0x8CB92BA72F3D8DD7


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def token_keys(seed: int, places_B: NDArray[np.int64], num_positions: int) -> Tensor:
    """Keys of the tokens of rows at these places of the run, int64 [B, S]."""
    with np.errstate(over="ignore"):
        rows_B = rng.mix(
            places_B.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(rng.key(seed, "dropout"))
        )
        columns_S = np.arange(num_positions, dtype=np.uint64) * np.uint64(_GOLDEN)
        return torch.from_numpy(rng.mix(rows_B[:, None] + columns_S[None]).view(np.int64))


def at_site(keys_BS: Tensor, site: int) -> Tensor:
    """Other keys for another place in the model."""
    return keys_BS + _signed(site * _SITE % (1 << 64))


def drop(x_BSD: Tensor, keys_BS: Tensor | None, rate: float) -> Tensor:
    """Zero each element with probability `rate` and scale the others by 1 / (1 - rate). None: unchanged."""
    if keys_BS is None:
        return x_BSD
    features_D = torch.arange(x_BSD.shape[-1], device=x_BSD.device) * _signed(_FEATURE)
    word = keys_BS[..., None] + features_D
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # rng.mix, in signed words
        word = (word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    kept = ((word >> 40) & 0xFFFFFF) >= round(rate * (1 << 24))
    return torch.where(kept, x_BSD / (1.0 - rate), 0.0)
