"""The shape of a LLaMA-style decoder. stdlib only: login nodes and the planner read it."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of a decoder with RoPE, RMSNorm, SwiGLU and grouped-query attention (LLaMA: Touvron et al. 2023,
    arXiv:2302.13971)."""

    vocab_size: int
    """Rows of the embedding. At least the tokenizer's vocabulary; more is padding that no target names."""
    num_layers: int
    d_model: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads. Equal to it: multi-head; 1: multi-query."""
    ffn_width: int
    """Columns of the gate and of the up projection."""
    head_width: int | None = None
    """Width of one head; null means d_model / num_heads."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's weights."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864)."""
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream get
    init_std / sqrt(2 * num_layers) (Radford et al. 2019, section 2.3)."""

    def __post_init__(self) -> None:
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
        if self.width_per_head % 2:
            raise ConfigError(
                f"a head's width must be even for RoPE, got {self.width_per_head}; change model.head_width"
            )

    @property
    def width_per_head(self) -> int:
        return self.d_model // self.num_heads if self.head_width is None else self.head_width
