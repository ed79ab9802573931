"""Text one token at a time: a cache of keys and values, and temperature, top-k and top-p on the logits.

The choice is made in float64 on the CPU from a named random stream: the same seed and logits give the same
token on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain import rng
from llmtrain.errors import ConfigError
from llmtrain.model.attention import KVCache
from llmtrain.model.transformer import Transformer

PREFILL_AT_ONCE = 512
"""Prompt tokens a forward: bounds the memory of a long prompt's logits."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How the next token is chosen. The cuts apply in this order: temperature, top_k, top_p."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    """Divides the logits. 0 takes the most probable token each time (greedy): the rest does nothing."""
    top_k: int | None = None
    """Only the k most probable tokens are candidates; null: all."""
    top_p: float = 1.0
    """Only the fewest tokens whose probabilities reach p are candidates (Holtzman et al. 2020,
    arXiv:1904.09751); 1: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1; null switches it off")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1; 1 switches it off")


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    cfg: SamplingConfig,
    *,
    eos_id: int,
    start_id: int | None = None,
    stream_name: str | int = 0,
) -> Iterator[int]:
    """Yield up to cfg.max_new_tokens token ids that follow the prompt; EOS ends it and is not yielded.

    Args:
        start_id: Stands for an empty prompt; None: eos_id.
        stream_name: Another name gives another sample for the same seed.

    Raises:
        ConfigError: A prompt id outside the model's vocabulary; more tokens than it has positions for.
    """
    vocab_size, max_positions = model.cfg.vocab_size, model.cfg.max_positions
    if max_positions is not None and max(1, len(prompt_ids)) + cfg.max_new_tokens > max_positions:
        raise ConfigError(
            f"{len(prompt_ids)} tokens of prompt and max_new_tokens={cfg.max_new_tokens} are more than the "
            f"model's {max_positions} positions; shorten one of them"
        )
    ids = [int(token) for token in prompt_ids] or [eos_id if start_id is None else start_id]
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"prompt token {token} is outside the model's vocabulary of {vocab_size}; "
                f"the prompt was encoded by another tokenizer"
            )
    return _generate(model, ids, cfg, eos_id, rng.stream(cfg.seed, "sample", stream_name))


def _generate(
    model: Transformer, ids: list[int], cfg: SamplingConfig, eos_id: int, random: np.random.Generator
) -> Iterator[int]:
    weight = model
    cache = KVCache(
        model.cfg,
        batch_size=1,
        max_len=len(ids) + cfg.max_new_tokens - 1,
        device=weight.device,
        dtype=weight.dtype,
    )
    for _ in range(cfg.max_new_tokens):
        token = choose(next_logits(model, ids, cache), cfg, random)
        if token == eos_id:
            return
        yield token
        ids = [token]


@torch.no_grad()
def next_logits(model: Transformer, ids: Sequence[int], cache: KVCache) -> NDArray[np.float64]:
    """Feed `ids` after what the cache holds; return the logits of the token that follows, float64 [V]."""
    device = model.device
    for start in range(0, len(ids), PREFILL_AT_ONCE):
        part = torch.tensor([list(ids[start : start + PREFILL_AT_ONCE])], device=device)
        positions_BS = torch.arange(cache.length, cache.length + part.shape[1], device=device)[None]
        logits_BSV = model(part, positions_BS, cache=cache)
    logits: NDArray[np.float64] = logits_BSV[0, -1].to("cpu", torch.float64).numpy()
    return logits


def choose(logits: NDArray[np.float64], cfg: SamplingConfig, random: np.random.Generator) -> int:
    """Draw one token id. Candidates are ordered by logit, then by id, so ties are always cut alike."""
    if cfg.temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / cfg.temperature
    num = min(cfg.top_k or len(scaled), len(scaled))
    candidates = np.argsort(-scaled, kind="stable")[:num]
    sums = np.exp(scaled[candidates]).cumsum()
    if cfg.top_p < 1:
        sums = sums[: int(np.searchsorted(sums, cfg.top_p * sums[-1])) + 1]
    place = np.searchsorted(sums, random.random() * sums[-1], side="right")
    return int(candidates[min(int(place), len(sums) - 1)])
