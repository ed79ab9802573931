"""The attention layer with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245), and the cache of
generation.

A row holds several documents, and a token sees the earlier tokens of its own one only. The mask that says so
is built once per forward and shared by all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.model.config import ModelConfig
from llmtrain.model.linear import InputSplitLinear
from llmtrain.model.rope import Rotation, rotate
from llmtrain.model.seams import Seams


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


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, seams: Seams) -> None:
        super().__init__()
        self.seams = seams
        self.head_width = cfg.width_per_head
        width_q, width_kv = cfg.num_heads * self.head_width, cfg.num_kv_heads * self.head_width
        self.wq = nn.Linear(cfg.d_model, width_q, bias=cfg.has_biases)
        self.wk = nn.Linear(cfg.d_model, width_kv, bias=cfg.has_biases)
        self.wv = nn.Linear(cfg.d_model, width_kv, bias=cfg.has_biases)
        self.wo = InputSplitLinear(width_q, cfg.d_model, bias=cfg.has_biases, leave=seams.leave)

    def forward(
        self,
        x_BSD: Tensor,
        turn: Rotation | None,
        mask: Tensor | None,
        is_causal: bool,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BSD = self.seams.enter(x_BSD)
        q_BSHK = self.wq(x_BSD).unflatten(-1, (-1, self.head_width))
        k_BSGK = self.wk(x_BSD).unflatten(-1, (-1, self.head_width))
        if turn is not None:
            q_BSHK, k_BSGK = rotate(q_BSHK, turn), rotate(k_BSGK, turn)
        v_BSGK = self.wv(x_BSD).unflatten(-1, (-1, self.head_width))
        k_BGJK, v_BGJK = k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
        if cache is not None:
            k_BGJK, v_BGJK = cache.append(k_BGJK, v_BGJK)
        out_BHSK = self.seams.attend(q_BSHK.transpose(1, 2), k_BGJK, v_BGJK, mask, is_causal)
        out_BSD: Tensor = self.wo(out_BHSK.transpose(1, 2).flatten(2))
        return out_BSD
