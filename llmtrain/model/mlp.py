"""SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.config import ModelConfig


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.w_gate = nn.Linear(cfg.d_model, cfg.ffn_width, bias=False)
        self.w_up = nn.Linear(cfg.d_model, cfg.ffn_width, bias=False)
        self.w_down = nn.Linear(cfg.ffn_width, cfg.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.w_down(F.silu(self.w_gate(x_BSD)) * self.w_up(x_BSD))
        return out_BSD
