"""Models that several topics measure."""

from __future__ import annotations

from llmtrain.model.config import ModelConfig

DEMO = ModelConfig(
    vocab_size=8192,
    num_layers=4,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    ffn_width=704,
    tie_embeddings=True,
)
"""conf/model/demo.yaml."""
MODEL_300M = ModelConfig(
    vocab_size=32_000, num_layers=18, d_model=1024, num_heads=16, num_kv_heads=16, ffn_width=2816
)
"""297 M parameters."""
TINYLLAMA_1B = ModelConfig(
    vocab_size=32_000, num_layers=22, d_model=2048, num_heads=32, num_kv_heads=4, ffn_width=5632
)
"""conf/model/tinyllama_1b.yaml."""
