"""The decoder: embedding, blocks, norm, head. No buffers: built on the meta device, it needs only weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from llmtrain.model.attend import additive, visible_after
from llmtrain.model.attention import KVCache
from llmtrain.model.block import Block
from llmtrain.model.config import ModelConfig
from llmtrain.model.dropout import at_site, drop
from llmtrain.model.norm import build_norm
from llmtrain.model.rope import rotation
from llmtrain.model.seams import Seams


@dataclass(frozen=True)
class Span:
    """The blocks [first, last) of a model, with the embedding before the first and the head after the
    last: a pipeline stage."""

    first: int
    last: int
    num_layers: int

    @property
    def has_embedding(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        return self.last == self.num_layers


class Transformer(nn.Module):
    """A decoder of either family, or some spans of one. Weights have their canonical names in both."""

    def __init__(self, cfg: ModelConfig, *, seams: Seams | None = None, spans: Sequence[Span] = ()) -> None:
        """
        Args:
            cfg: what this rank holds: `partition.local_config` under tensor parallelism.
            seams: what is said between ranks; None in one process.
            spans: in order; none is all of it.
        """
        super().__init__()
        self.cfg = cfg
        self.seams = seams = seams or Seams()
        self.spans = spans = tuple(spans) or (Span(0, cfg.num_layers, cfg.num_layers),)
        self.recompute_every = 0
        """Of so many blocks the first keeps its input alone, and computes the rest again in the backward pass
        (Chen et al. 2016, arXiv:1604.06174). 1: all of them; 0: none."""
        self.recompute_contexts: Callable[[], Any] = noop_context_fn
        """`recompute.selective` keeps matrix products in those blocks, too."""
        self.dropout = 0.0
        """Where `forward` is given keys."""
        self.embedding = self.position_embedding = self.final_norm = self.head = None
        if spans[0].has_embedding or (spans[-1].has_head and cfg.tie_embeddings):
            self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        if spans[0].has_embedding and cfg.max_positions is not None:
            self.position_embedding = nn.Embedding(cfg.max_positions, cfg.d_model)
        indices = [at for span in spans for at in range(span.first, span.last)]
        self.blocks = nn.ModuleDict({str(at): Block(cfg, seams) for at in indices})
        if spans[-1].has_head:
            self.final_norm = build_norm(cfg)
            if not cfg.tie_embeddings:
                self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        targets_BS: Tensor | None = None,
        keys_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits_BSV, or with targets the summed cross entropy. For a whole model.

        Args:
            tokens_BS: token ids.
            positions_BS: place of each token in its document, from 0; below cfg.max_positions.
            segments_BS: equal numbers mark the tokens of one document; None when every row is one document.
                Of whole rows, also where `seams` have cut the others along S.
            targets_BS: the next token of each token, or -100 where there is none.
            keys_BS: of dropout (`dropout.token_keys`); without effect in evaluation.
            cache: keys and values of the tokens before these; this call's are added to it.

        Returns:
            Logits in the weights' dtype; or the sum over all valid targets, in nats, as an fp32 scalar.
        """
        x_BSD = self.embed(tokens_BS, positions_BS, keys_BS)
        x_BSD = self.run_blocks(x_BSD, positions_BS, segments_BS, keys_BS, cache)
        return self.read_out(x_BSD, targets_BS)

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor, keys_BS: Tensor | None = None) -> Tensor:
        assert self.embedding is not None, "the first span has it"
        x_BSD = self.seams.embed(tokens_BS, self.embedding.weight)
        if self.position_embedding is not None:
            x_BSD = x_BSD + self.position_embedding(self.seams.own_positions(positions_BS))
        return drop(x_BSD, self._own(keys_BS), self.dropout)

    def _own(self, keys_BS: Tensor | None) -> Tensor | None:
        drops = keys_BS is not None and self.dropout > 0 and self.training
        return self.seams.own_positions(keys_BS) if drops and keys_BS is not None else None

    def run_blocks(
        self,
        x_BSD: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None,
        keys_BS: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        span: Span | None = None,
    ) -> Tensor:
        """One of `spans`; None is the first."""
        assert cache is None or segments_BS is None, "a cache holds one document a row: it takes no segments"
        cfg, dtype = self.cfg, x_BSD.dtype
        turn = None
        if cfg.max_positions is None:
            turn = rotation(positions_BS, width=cfg.width_per_head, theta=cfg.rope_theta, dtype=dtype)
        mask = None
        if segments_BS is not None:
            mask = self.seams.mask(segments_BS, dtype)
        elif cache is not None and cache.length > 0:
            visible = visible_after(cache.length, positions_BS.shape[1], positions_BS.device)
            mask = None if visible is None else additive(visible, dtype)
        is_causal = segments_BS is None and (cache is None or cache.length == 0)
        keys_BS = self._own(keys_BS)
        span = span or self.spans[0]
        for index in range(span.first, span.last):
            block = self.blocks[str(index)]
            dropping = (None if keys_BS is None else at_site(keys_BS, 2 * index + 2), self.dropout)
            if self.recompute_every and index % self.recompute_every == 0 and torch.is_grad_enabled():
                assert cache is None, "a cache is for generation, which has no backward pass"
                x_BSD = checkpoint(
                    block,
                    *(x_BSD, turn, mask, is_causal, None, *dropping),
                    use_reentrant=False,
                    preserve_rng_state=False,  # what is random in a block has no state
                    context_fn=self.recompute_contexts,
                )
            else:
                layer_cache = None if cache is None else cache.layers[index]
                x_BSD = block(x_BSD, turn, mask, is_causal, layer_cache, *dropping)
        return x_BSD

    def read_out(self, x_BSD: Tensor, targets_BS: Tensor | None) -> Tensor:
        assert self.final_norm is not None, "the last span has it"
        x_BSD = self.seams.enter(self.final_norm(x_BSD))
        head = self.head or self.embedding
        assert head is not None, "the last span has it"
        if targets_BS is None:
            return F.linear(x_BSD, head.weight)
        return self.seams.loss(x_BSD.flatten(0, 1), head.weight, targets_BS.flatten())
