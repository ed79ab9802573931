"""From a number of parameters to a shape that people really train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_params, num_params_by_part

ASPECT_LOW, ASPECT_HIGH = 40.0, 130.0
"""d_model / num_layers: 40 to 109 in the 50 models of Hoffmann et al. 2022 (arXiv:2203.15556, table A9), 128,
102 and 130 in Llama 3's 8B, 70B and 405B (arXiv:2407.21783, table 3). Below 44M parameters neither has a
model: the same bounds are assumed, not measured."""
ASPECT_AT_512, ASPECT_SLOPE = 64.0, 0.23
"""The preferred aspect is 64 at d_model 512 and grows as d_model^0.23: through the first and the last row of
table A9."""
ASPECT_WEIGHT = 0.15
"""Assumed, not measured: how many natural logs of missed size one natural log of aspect is worth. Loss is
flat in shape (Kaplan et al. 2020, arXiv:2001.08361, figure 5: a few percent; aspect may vary 40-fold), so
size goes first."""
LEAST_LAYERS = 2
WIDTHS = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 4096, 256), *range(4096, 32769, 1024))
LARGE_WIDTH = 1024
GQA_FROM_WIDTH, GQA_KV_HEADS = 4096, 8
"""Llama 3 has 8 key/value heads from 8B (d_model 4096) up (arXiv:2407.21783, table 3)."""
TIE_ABOVE_SHARE = 0.2
"""Assumed, not measured: share the embedding with the head when a second copy would be over a fifth of all
weights."""
FFN_RATIO = 8 / 3
"""SwiGLU of the cost of a 4 d_model two-matrix MLP (Shazeer 2020, arXiv:2002.05202, section 2)."""
FFN_MULTIPLE, FFN_MULTIPLE_LARGE = 64, 256
"""The larger one from d_model 1024 on, so that 8 tensor-parallel ranks get multiples of 32."""
HEADS_DIVIDE, LAYERS_DIVIDE, LAYERS_DIVIDE_HUGE = 8, 4, 16
HUGE_WIDTH = 8192
"""Numbers of ranks among which heads and layers should divide, from d_model 1024 on: tp inside a node, and
pipeline stages; more of these from HUGE_WIDTH on, where models do not fit without a deep pipeline."""
DIVIDES_WEIGHT = 0.04
"""Assumed, not measured: how many natural logs of missed size a factor of two of either is worth."""
HEAD_WIDTH_SMALL, HEAD_WIDTH, HEAD_WIDTH_LARGE = 32, 64, 128
"""64 up to d_model 1024 and 128 above, as in table A9. Below d_model 256, 32: assumed, so that there are two
heads."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape and how well it fits the wish."""

    model: ModelConfig
    size_ratio: float
    """Its parameters over the wished number."""


def choose_shape(target_params: float, *, vocab_size: int) -> Shape:
    """Return the realistic shape nearest to `target_params` parameters, embeddings included.

    When even the smallest one has more, it is the smallest: `size_ratio` tells.
    """

    def cost(model: ModelConfig) -> float:
        missed = abs(math.log(num_params(model) / target_params))
        aspect = abs(math.log(_aspect(model) / preferred_aspect(model.d_model)))
        return missed + ASPECT_WEIGHT * aspect + DIVIDES_WEIGHT * _undivided(model)

    best = min(candidates(vocab_size=vocab_size), key=cost)
    return Shape(model=best, size_ratio=num_params(best) / target_params)


def candidates(*, vocab_size: int) -> Iterator[ModelConfig]:
    """Yield every shape the rules above allow, narrow ones first."""
    for d_model in WIDTHS:
        least = max(LEAST_LAYERS, math.ceil(d_model / ASPECT_HIGH))
        most = max(LEAST_LAYERS, math.floor(d_model / ASPECT_LOW))
        for num_layers in range(least, most + 1):
            yield shape_of(d_model=d_model, num_layers=num_layers, vocab_size=vocab_size)


def shape_of(*, d_model: int, num_layers: int, vocab_size: int) -> ModelConfig:
    """Fill in heads, ffn and embeddings by the rules above."""
    head_width = HEAD_WIDTH_SMALL if d_model < 256 else HEAD_WIDTH if d_model <= 1024 else HEAD_WIDTH_LARGE
    num_heads = d_model // head_width
    num_kv_heads = GQA_KV_HEADS if d_model >= GQA_FROM_WIDTH and num_heads % GQA_KV_HEADS == 0 else num_heads

    ffn_multiple = FFN_MULTIPLE if d_model < LARGE_WIDTH else FFN_MULTIPLE_LARGE

    def shape(*, tie_embeddings: bool) -> ModelConfig:
        return ModelConfig(
            vocab_size=vocab_size,
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_width=math.ceil(FFN_RATIO * d_model / ffn_multiple) * ffn_multiple,
            tie_embeddings=tie_embeddings,
        )

    untied = shape(tie_embeddings=False)
    head_share = num_params_by_part(untied)["head"] / num_params(untied)
    return shape(tie_embeddings=True) if head_share > TIE_ABOVE_SHARE else untied


def preferred_aspect(d_model: int) -> float:
    wished: float = ASPECT_AT_512 * (d_model / 512) ** ASPECT_SLOPE
    return min(max(wished, ASPECT_LOW), ASPECT_HIGH)


def _aspect(model: ModelConfig) -> float:
    return model.d_model / model.num_layers


def _undivided(model: ModelConfig) -> float:
    """Factors of two that heads and layers lack."""
    if model.d_model < LARGE_WIDTH:
        return 0.0
    heads = HEADS_DIVIDE / math.gcd(model.num_heads, HEADS_DIVIDE)
    wanted = LAYERS_DIVIDE if model.d_model < HUGE_WIDTH else LAYERS_DIVIDE_HUGE
    return math.log2(heads * wanted / math.gcd(model.num_layers, wanted))
