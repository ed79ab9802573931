"""The decoder: embedding, blocks, norm, head. No buffers: built on the meta device, it needs only weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.model.attention import KVCache, visible_after, visible_within_documents
from llmtrain.model.block import Block
from llmtrain.model.config import ModelConfig
from llmtrain.model.loss import linear_sum_cross_entropy
from llmtrain.model.norm import build_norm
from llmtrain.model.rope import rotation


class Transformer(nn.Module):
    """A decoder of either family."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.recompute_every = 0
        """Of so many blocks the first keeps its input alone, and computes the rest again in the backward pass
        (Chen et al. 2016, arXiv:1604.06174). 1: all of them; 0: none."""
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position_embedding = (
            None if cfg.max_positions is None else nn.Embedding(cfg.max_positions, cfg.d_model)
        )
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.final_norm = build_norm(cfg)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        targets_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits_BSV, or with targets the summed cross entropy.

        Args:
            tokens_BS: token ids.
            positions_BS: place of each token in its document, from 0; below cfg.max_positions.
            segments_BS: equal numbers mark the tokens of one document; None when every row is one document.
            targets_BS: the next token of each token, or -100 where there is none.
            cache: keys and values of the tokens before these; this call's are added to it.

        Returns:
            Logits in the weights' dtype; or the sum over all valid targets, in nats, as an fp32 scalar.
        """
        assert cache is None or segments_BS is None, "a cache holds one document a row: it takes no segments"
        x_BSD = self.embedding(tokens_BS)
        turn = None
        if self.position_embedding is not None:
            x_BSD = x_BSD + self.position_embedding(positions_BS)
        else:
            turn = rotation(
                positions_BS, width=self.cfg.width_per_head, theta=self.cfg.rope_theta, dtype=x_BSD.dtype
            )
        mask, is_causal = None, False
        if segments_BS is not None:
            mask = visible_within_documents(segments_BS)
        elif cache is not None and cache.length > 0:
            mask = visible_after(cache.length, tokens_BS.shape[1], tokens_BS.device)
        else:
            is_causal = True
        if mask is not None:
            # SDPA would make this of a boolean mask again in every block.
            mask = torch.zeros(mask.shape, dtype=x_BSD.dtype, device=mask.device).masked_fill_(
                ~mask, -torch.inf
            )
        for index, block in enumerate(self.blocks):
            if self.recompute_every and index % self.recompute_every == 0 and torch.is_grad_enabled():
                assert cache is None, "a cache is for generation, which has no backward pass"
                x_BSD = checkpoint(  # nothing in a block is random
                    block, x_BSD, turn, mask, is_causal, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BSD = block(x_BSD, turn, mask, is_causal, None if cache is None else cache.layers[index])
        x_BSD = self.final_norm(x_BSD)
        head_VD = self.embedding.weight if self.head is None else self.head.weight
        if targets_BS is None:
            return F.linear(x_BSD, head_VD)
        return linear_sum_cross_entropy(x_BSD.flatten(0, 1), head_VD, targets_BS.flatten())
