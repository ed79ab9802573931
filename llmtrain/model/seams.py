"""Where a model that is spread over ranks has to talk. In one process nothing happens there.

The model calls these and knows no ranks; `parallel/` has the functions that talk, `train/assemble.py` puts
them here. A "region" is what lies between a matrix split by its outputs and one split by its inputs:
attention, the feed-forward layer, the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.model.attend import attend, document_mask
from llmtrain.model.loss import linear_sum_cross_entropy


def unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Seams:
    embed: Callable[[Tensor, Tensor], Tensor] = F.embedding
    """(tokens_BS, weight_VD) -> x_BSD, or this rank's part of its positions."""
    own_positions: Callable[[Tensor], Tensor] = unchanged
    """positions_BS -> those of the x_BSD that `embed` returns."""
    enter: Callable[[Tensor], Tensor] = unchanged
    """x_BSD of a region's input, all its positions."""
    leave: Callable[[Tensor], Tensor] = unchanged
    """The sum over ranks of what their parts of a region give."""
    mask: Callable[[Tensor, torch.dtype], Tensor] = document_mask
    """(segments_BS of whole rows, dtype) -> the additive mask that `attend` takes."""
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor] = attend
    """(q_BHSK, k_BGSK, v_BGSK, mask, is_causal) -> out_BHSK."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_sum_cross_entropy
    """(x_TD, head_VD, targets_T) -> Σ cross entropy over all of the vocabulary."""
