"""What a shape costs: parameters, FLOPs, bytes of training state. For the planner and the trainer alike.

A multiply-add is two FLOPs. Only matrix products count: activations and softmax are left out, as they are in
every published MFU. N below is the weights that a token is multiplied with: all but the input embeddings,
with the head, and with norms and biases (under 0.1% of N, kept because the papers keep them). Tied weights
count once as parameters, and once, as the head, in N.
"""

from __future__ import annotations

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.model.config import Family, ModelConfig

FLOPS_CONVENTIONS = ("palm", "causal", "fused")


def num_params_by_part(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of each part, over all layers; the values add up to `num_params`. A tied head is 0."""
    width_q = cfg.num_heads * cfg.width_per_head
    width_kv = cfg.num_kv_heads * cfg.width_per_head
    num_matrices = 3 if cfg.family is Family.llama else 2
    attention_biases = width_q + 2 * width_kv + cfg.d_model if cfg.has_biases else 0
    mlp_biases = cfg.ffn_width + cfg.d_model if cfg.has_biases else 0
    norm_vectors = 2 if cfg.has_biases else 1
    return {
        "embedding": (cfg.vocab_size + (cfg.max_positions or 0)) * cfg.d_model,
        "attention": cfg.num_layers * (cfg.d_model * 2 * (width_q + width_kv) + attention_biases),
        "mlp": cfg.num_layers * (num_matrices * cfg.d_model * cfg.ffn_width + mlp_biases),
        "norm": norm_vectors * (2 * cfg.num_layers + 1) * cfg.d_model,
        "head": 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model,
    }


def num_params(cfg: ModelConfig) -> int:
    """All parameters that are stored and trained."""
    return sum(num_params_by_part(cfg).values())


def num_non_embedding_params(cfg: ModelConfig) -> int:
    """Parameters without input embedding and head: N of Kaplan et al. 2020 (arXiv:2001.08361)."""
    parts = num_params_by_part(cfg)
    return parts["attention"] + parts["mlp"] + parts["norm"]


def num_multiplied_params(cfg: ModelConfig) -> int:
    """Weights that every token is multiplied with: blocks, norms and head. N of `flops_per_token`."""
    return num_non_embedding_params(cfg) + cfg.vocab_size * cfg.d_model


def flops_per_token(cfg: ModelConfig, seq_len: int, *, convention: str = "palm") -> int:
    """FLOPs of forward and backward for one token of a row of `seq_len` tokens.

    palm     6 N + 12 L H K S: every query meets every key (Chowdhery et al. 2022, arXiv:2204.02311, appendix
             B). Most published MFUs are of this kind. `torch.utils.flop_counter` counts this when attention
             runs unfused (SDPBackend.MATH).
    causal   6 N + 6 L H K S: only the half of the scores that a causal mask leaves.
    fused    6 N + 14 L H K S: every query meets every key, and once more in the backward pass of fused
             attention, which keeps no scores. `torch.utils.flop_counter` counts this on CUDA. It is the
             hardware's work: good for HFU, too much for MFU.
    """
    if convention not in FLOPS_CONVENTIONS:
        raise ConfigError(unknown_name("FLOPs convention", convention, FLOPS_CONVENTIONS))
    attention_products = {"palm": 12, "causal": 6, "fused": 14}[convention]
    attention = attention_products * cfg.num_layers * cfg.num_heads * cfg.width_per_head * seq_len
    return 6 * num_multiplied_params(cfg) + attention


def block_costs(cfg: ModelConfig, *, seq_len: int) -> list[float]:
    """Work of each block in parts of one block's, with the head's added to the last: what pipeline stages
    are cut by. FLOPs of matrix products, causal attention; the embedding looks up and costs nothing."""
    parts = num_params_by_part(cfg)
    products = (parts["attention"] + parts["mlp"]) / cfg.num_layers
    block = products + cfg.num_heads * cfg.width_per_head * seq_len
    return [1.0] * (cfg.num_layers - 1) + [1.0 + cfg.vocab_size * cfg.d_model / block]


STATE_BYTES_PER_PARAM = {"fp32": (4, 4, 8), "bf16": (2, 2, 12)}
"""(weight, gradient, optimizer) bytes a parameter under AdamW: two fp32 moments, and with bf16 weights an
fp32 master copy beside them (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1: 2 + 2 + 12)."""


def training_state_bytes(
    cfg: ModelConfig, *, precision: str, zero_stage: int, dp_size: int
) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state on one rank, without buffers or activations.

    ZeRO 1 divides the optimizer state by `dp_size`, 2 the gradients too, 3 the weights too (ZeRO, figure 1).
    """
    if precision not in STATE_BYTES_PER_PARAM:
        raise ConfigError(unknown_name("precision", precision, STATE_BYTES_PER_PARAM))
    if not 0 <= zero_stage <= 3:
        raise ConfigError(f"zero_stage={zero_stage} must be 0, 1, 2 or 3")
    if dp_size < 1:
        raise ConfigError(f"dp_size={dp_size} must be at least 1")
    weight, gradient, optimizer = STATE_BYTES_PER_PARAM[precision]
    count = num_params(cfg)
    return {
        "weights": count * weight / (dp_size if zero_stage >= 3 else 1),
        "gradients": count * gradient / (dp_size if zero_stage >= 2 else 1),
        "optimizer": count * optimizer / (dp_size if zero_stage >= 1 else 1),
    }
