"""Causal attention inside documents, with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

A row holds several documents, and a token sees the earlier tokens of its own one only. A boolean mask says
who sees whom; it is built once per forward and shared by all blocks. J stands for the positions of the keys:
S of this call, or those of the cache as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.config import ModelConfig
from llmtrain.model.rope import Rotation, rotate


@dataclass
class LayerCache:
    """One block's keys and values: room for `max_len` positions, the first `length` of them filled."""

    keys_BGJK: Tensor
    values_BGJK: Tensor
    length: int = 0

    def append(self, keys_BGSK: Tensor, values_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions; return all keys and values so far, without a copy."""
        end = self.length + keys_BGSK.shape[2]
        assert end <= self.keys_BGJK.shape[2], (
            f"cache has room for {self.keys_BGJK.shape[2]} positions, {end} needed"
        )
        self.keys_BGJK[:, :, self.length : end] = keys_BGSK
        self.values_BGJK[:, :, self.length : end] = values_BGSK
        self.length = end
        return self.keys_BGJK[:, :, :end], self.values_BGJK[:, :, :end]


class KVCache:
    """Keys and values of every block, allocated once for `max_len` positions.

    The tokens of each call are taken to follow those of the calls before, all of one document.
    """

    def __init__(
        self, cfg: ModelConfig, *, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, cfg.num_kv_heads, max_len, cfg.width_per_head)
        self.layers = [
            LayerCache(
                torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)
            )
            for _ in range(cfg.num_layers)
        ]

    @property
    def length(self) -> int:
        """Positions filled."""
        return self.layers[0].length

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys_BGJK.nbytes + layer.values_BGJK.nbytes for layer in self.layers)


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


def attend(q_BHSK: Tensor, k_BGJK: Tensor, v_BGJK: Tensor, *, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, each key/value head serving H/G consecutive query heads."""
    return F.scaled_dot_product_attention(
        q_BHSK,
        k_BGJK,
        v_BGJK,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BHSK.shape[1] != k_BGJK.shape[1],
    )


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_width = cfg.width_per_head
        width_q, width_kv = cfg.num_heads * self.head_width, cfg.num_kv_heads * self.head_width
        self.wq = nn.Linear(cfg.d_model, width_q, bias=cfg.has_biases)
        self.wk = nn.Linear(cfg.d_model, width_kv, bias=cfg.has_biases)
        self.wv = nn.Linear(cfg.d_model, width_kv, bias=cfg.has_biases)
        self.wo = nn.Linear(width_q, cfg.d_model, bias=cfg.has_biases)

    def forward(
        self,
        x_BSD: Tensor,
        turn: Rotation | None,
        mask: Tensor | None,
        is_causal: bool,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q_BSHK = self.wq(x_BSD).unflatten(-1, (-1, self.head_width))
        k_BSGK = self.wk(x_BSD).unflatten(-1, (-1, self.head_width))
        if turn is not None:
            q_BSHK, k_BSGK = rotate(q_BSHK, turn), rotate(k_BSGK, turn)
        v_BSGK = self.wv(x_BSD).unflatten(-1, (-1, self.head_width))
        k_BGJK, v_BGJK = k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
        if cache is not None:
            k_BGJK, v_BGJK = cache.append(k_BGJK, v_BGJK)
        out_BHSK = attend(q_BSHK.transpose(1, 2), k_BGJK, v_BGJK, mask=mask, is_causal=is_causal)
        out_BSD: Tensor = self.wo(out_BHSK.transpose(1, 2).flatten(2))
        return out_BSD
