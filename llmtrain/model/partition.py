"""Which weights tensor parallelism splits, and by what: a table, and arithmetic on it. stdlib only.

Every split is along the first dimension (model/linear.py), so a rank's part is a range of the flattened
tensor. Where there are fewer key/value heads than ranks, neighbouring ranks hold the same head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from llmtrain.model.config import ModelConfig


class Unit(Enum):
    """What a weight's first dimension counts, and is split by."""

    vocab = "vocabulary rows"
    heads = "query heads"
    kv_heads = "key/value heads"
    ffn = "feed-forward columns"
    whole = "not split"


SPLIT_BY: dict[str, Unit] = {
    r"embedding\.weight": Unit.vocab,
    r"head\.weight": Unit.vocab,
    r"blocks\.\d+\.attention\.wq\.(weight|bias)": Unit.heads,
    r"blocks\.\d+\.attention\.w[kv]\.(weight|bias)": Unit.kv_heads,
    r"blocks\.\d+\.attention\.wo\.weight": Unit.heads,
    r"blocks\.\d+\.mlp\.w_(gate|up)\.(weight|bias)": Unit.ffn,
    r"blocks\.\d+\.mlp\.w_down\.weight": Unit.ffn,
    r"position_embedding\.weight": Unit.whole,
    r"blocks\.\d+\.(attention|mlp)_norm\.(weight|bias)": Unit.whole,
    r"final_norm\.(weight|bias)": Unit.whole,
    r"blocks\.\d+\.(attention\.wo|mlp\.w_down)\.bias": Unit.whole,
}
"""Canonical name -> what it is split by. A weight that no row names is an error, never "whole"."""


@dataclass(frozen=True)
class Part:
    """What one tensor-parallel rank holds of a weight."""

    index: int
    """Of the parts the weight is cut into; all parts are of one size."""
    num_parts: int
    copy: int
    """Among the ranks that hold this part, from 0: the first answers for it."""
    num_copies: int

    def range_of(self, numel: int) -> tuple[int, int]:
        """Half-open range of the flattened whole weight, which has `numel` elements."""
        size = numel // self.num_parts
        return self.index * size, (self.index + 1) * size


def unit_of(name: str) -> Unit:
    """What the weight with this canonical name is split by."""
    for pattern, unit in SPLIT_BY.items():
        if re.fullmatch(pattern, name):
            return unit
    raise KeyError(f"{name} is not in model/partition.py: say there whether it is split, and by what")


def count_of(unit: Unit, cfg: ModelConfig) -> int:
    """How many there are in the whole model."""
    return {
        Unit.vocab: cfg.vocab_size,
        Unit.heads: cfg.num_heads,
        Unit.kv_heads: cfg.num_kv_heads,
        Unit.ffn: cfg.ffn_width,
        Unit.whole: 1,
    }[unit]


def part_of(name: str, cfg: ModelConfig, *, tp_rank: int, tp_size: int) -> Part:
    """What `tp_rank` holds of the weight with this canonical name."""
    unit = unit_of(name)
    num_parts = 1 if unit is Unit.whole else tp_size
    if unit is Unit.kv_heads:
        num_parts = min(cfg.num_kv_heads, tp_size)
    num_copies = tp_size // num_parts
    return Part(tp_rank // num_copies, num_parts, tp_rank % num_copies, num_copies)


def local_config(cfg: ModelConfig, *, tp_size: int) -> ModelConfig:
    """The shape of what one tensor-parallel rank holds. Sizes must divide: parallel/compatibility.py."""
    if tp_size == 1:
        return cfg
    return replace(
        cfg,
        vocab_size=cfg.vocab_size // tp_size,
        num_heads=cfg.num_heads // tp_size,
        num_kv_heads=max(1, cfg.num_kv_heads // tp_size),
        ffn_width=cfg.ffn_width // tp_size,
        head_width=cfg.width_per_head,
    )
