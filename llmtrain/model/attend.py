"""Softmax attention, and who sees whom: a token the earlier tokens of its own document, and itself.

J stands for the positions of the keys: S of this call, or those of a cache as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_within_documents(segments_BS: Tensor) -> Tensor:
    """Boolean [B, 1, S, S]: query i sees key j when j <= i and both are of one segment."""
    num_positions = segments_BS.shape[1]
    same = segments_BS[:, :, None] == segments_BS[:, None, :]
    causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=segments_BS.device).tril_()
    return same.logical_and_(causal)[:, None]


def visible_after(num_past: int, num_new: int, device: torch.device) -> Tensor | None:
    """Boolean [S, J] for `num_new` queries that follow `num_past` cached keys; None when they see all."""
    if num_new == 1:
        return None
    everything = torch.ones(num_new, num_past + num_new, dtype=torch.bool, device=device)
    return everything.tril_(diagonal=num_past)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True and -inf elsewhere. SDPA would make this of a boolean mask again in every block."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf)


def document_mask(segments_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, S, S]."""
    return additive(visible_within_documents(segments_BS), dtype)


def attend(q_BHSK: Tensor, k_BGJK: Tensor, v_BGJK: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v, each key/value head serving H/G consecutive query heads."""
    return F.scaled_dot_product_attention(
        q_BHSK,
        k_BGJK,
        v_BGJK,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BHSK.shape[1] != k_BGJK.shape[1],
    )
