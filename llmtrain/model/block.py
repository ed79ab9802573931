"""One layer of the decoder: norm, attention, add; norm, feed-forward, add."""

from __future__ import annotations

from torch import Tensor, nn

from llmtrain.model.attention import Attention, LayerCache
from llmtrain.model.config import ModelConfig
from llmtrain.model.dropout import at_site, drop
from llmtrain.model.mlp import MLP
from llmtrain.model.norm import build_norm
from llmtrain.model.rope import Rotation
from llmtrain.model.seams import Seams


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, seams: Seams) -> None:
        super().__init__()
        self.attention_norm = build_norm(cfg)
        self.attention = Attention(cfg, seams)
        self.mlp_norm = build_norm(cfg)
        self.mlp = MLP(cfg, seams)

    def forward(
        self,
        x_BSD: Tensor,
        turn: Rotation | None,
        mask: Tensor | None,
        is_causal: bool,
        cache: LayerCache | None = None,
        keys_BS: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """`keys_BS` and `dropout` as in `dropout.drop`; None drops nothing."""
        added_BSD = self.attention(self.attention_norm(x_BSD), turn, mask, is_causal, cache)
        x_BSD = x_BSD + drop(added_BSD, keys_BS, dropout)
        added_BSD = self.mlp(self.mlp_norm(x_BSD))
        return x_BSD + drop(added_BSD, None if keys_BS is None else at_site(keys_BS, 1), dropout)
