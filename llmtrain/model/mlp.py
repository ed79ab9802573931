"""Feed-forward layers: SwiGLU (Shazeer 2020, arXiv:2002.05202), and GELU (Hendrycks and Gimpel 2016,
arXiv:1606.08415)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.linear import InputSplitLinear
from llmtrain.model.seams import Seams


class MLP(nn.Module):
    """w_down(silu(w_gate x) * w_up x), or gpt2's w_down(gelu(w_up x))."""

    def __init__(self, cfg: ModelConfig, seams: Seams) -> None:
        super().__init__()
        self.enter = seams.enter
        gated = cfg.family is Family.llama
        self.w_gate = nn.Linear(cfg.d_model, cfg.ffn_width, bias=False) if gated else None
        self.w_up = nn.Linear(cfg.d_model, cfg.ffn_width, bias=cfg.has_biases)
        self.w_down = InputSplitLinear(cfg.ffn_width, cfg.d_model, bias=cfg.has_biases, leave=seams.leave)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.enter(x_BSD)
        up_BSF = self.w_up(x_BSD)
        if self.w_gate is None:
            hidden_BSF = F.gelu(up_BSF, approximate="tanh")  # as GPT-2 was trained
        else:
            hidden_BSF = F.silu(self.w_gate(x_BSD)) * up_BSF
        out_BSD: Tensor = self.w_down(hidden_BSF)
        return out_BSD
