"""The shape of a decoder. stdlib only: login nodes and the planner read it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmtrain.errors import ConfigError


class Family(Enum):
    """How a decoder is built. Both take grouped key/value heads, heads of any width, and tied embeddings or
    not."""

    llama = "llama"
    """RoPE, RMSNorm, SwiGLU, no biases (Touvron et al. 2023, arXiv:2302.13971)."""
    gpt2 = "gpt2"
    """Learned positions, LayerNorm, GELU, biases (Radford et al. 2019). As published: tied embeddings,
    num_kv_heads = num_heads, ffn_width = 4 * d_model."""


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of a decoder."""

    family: Family = Family.llama
    vocab_size: int
    """Rows of the embedding. At least the tokenizer's vocabulary; more is padding that no target names."""
    num_layers: int
    d_model: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads. Equal to it: multi-head; 1: multi-query."""
    ffn_width: int
    """Columns of the up projection, and of llama's gate."""
    head_width: int | None = None
    """Width of one head; null means d_model / num_heads."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's weights."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864). No effect on gpt2."""
    max_positions: int | None = None
    """Rows of gpt2's position embedding: the longest document, in tokens. llama has none."""
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream get
    init_std / sqrt(2 * num_layers) (Radford et al. 2019, section 2.3)."""

    def __post_init__(self) -> None:
        self.family = Family(self.family)  # a name, as files have it, will do
        most = self.max_positions
        if (most is None or most < 1) if self.family is Family.gpt2 else most is not None:
            raise ConfigError(
                f"model.max_positions={most} with model.family={self.family.name}: gpt2 needs "
                "at least 1, llama has none (null)"
            )
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.head_width is None and self.d_model % self.num_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} is not a multiple of model.num_heads={self.num_heads}; "
                f"change one of them or set model.head_width"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}; "
                f"each key/value head serves a whole group of query heads"
            )
        if self.family is Family.llama and self.width_per_head % 2:
            raise ConfigError(
                f"a head's width must be even for RoPE, got {self.width_per_head}; change model.head_width"
            )

    @property
    def width_per_head(self) -> int:
        return self.d_model // self.num_heads if self.head_width is None else self.head_width

    @property
    def has_biases(self) -> bool:
        """Of its projections and norms."""
        return self.family is Family.gpt2
