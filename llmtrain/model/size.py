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


ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4


def activation_bytes(
    cfg: ModelConfig,
    *,
    micro_batch_rows: int,
    seq_len: int,
    precision: str,
    recompute_every: int = 0,
    tp_size: int = 1,
) -> int:
    """Bytes that one micro batch keeps between forward and backward, with the fused loss's gradients.

    Without what was there before: weights, token ids, positions, segments, targets. Elements a token, each of
    the precision's width (e bytes) where nothing else is said; q = H K and kv = G K; on a tp rank q, kv, F, H
    and V are its parts:

    | a block keeps | llama | gpt2 |
    |---|---|---|
    | its input, which is the first norm's | D | D |
    | statistics of both norms | 2 fp32 | 4 (fp32 on CUDA) |
    | both norms' outputs, inputs of wq and w_up | 2 D | 2 D |
    | queries (turned), keys (turned), values | q + 2 kv | q + 2 kv |
    | attention's output, input of wo; log-sum-exp | q, and H fp32 | q, and H fp32 |
    | input of the second norm | D | D |
    | up; GELU's or the gate product's output, input of w_down | 2 F | 2 F |
    | gate and silu(gate) | 2 F | - |

    Once: the mask, B S^2 elements; llama's cosines and sines, K elements a token; the last norm's input, D,
    with its statistics; the loss's gradients, D elements a token and D V in fp32. Of a block that is computed
    again its input alone. Attention is fused; recomputation is `recompute: full`; nothing is dropped; one
    context-parallel rank, no sequence parallelism. Under tensor parallelism the vocabulary-parallel embedding
    keeps 9 bytes a token more (a row number, a flag).
    """
    element = _element_bytes(precision)
    tokens = micro_batch_rows * seq_len
    num_recomputed = -(-cfg.num_layers // recompute_every) if recompute_every else 0
    a_block = _block_activation_bytes(cfg, tokens=tokens, element=element, tp_size=tp_size)
    blocks = (cfg.num_layers - num_recomputed) * a_block + num_recomputed * tokens * cfg.d_model * element
    turns = tokens * cfg.width_per_head * element if cfg.family is Family.llama else 0
    mask = micro_batch_rows * seq_len**2 * element
    last_norm = tokens * (cfg.d_model * element + _norm_statistics_bytes(cfg, element))
    loss = tokens * cfg.d_model * element + cfg.vocab_size // tp_size * cfg.d_model * FP32_BYTES
    embedding = 9 * tokens if tp_size > 1 else 0
    return blocks + turns + mask + last_norm + loss + embedding


def _block_activation_bytes(cfg: ModelConfig, *, tokens: int, element: int, tp_size: int) -> int:
    num_heads, num_kv_heads = cfg.num_heads // tp_size, max(1, cfg.num_kv_heads // tp_size)
    num_of_ffn = 4 if cfg.family is Family.llama else 2
    elements = (
        4 * cfg.d_model
        + 2 * (num_heads + num_kv_heads) * cfg.width_per_head
        + num_of_ffn * cfg.ffn_width // tp_size
    )
    statistics = 2 * _norm_statistics_bytes(cfg, element) + num_heads * FP32_BYTES
    return tokens * (elements * element + statistics)


def _norm_statistics_bytes(cfg: ModelConfig, element: int) -> int:
    """A token's: the inverse root mean square in fp32; LayerNorm's mean and inverse deviation."""
    return FP32_BYTES if cfg.family is Family.llama else 2 * element


def _element_bytes(precision: str) -> int:
    if precision not in ELEMENT_BYTES:
        raise ConfigError(unknown_name("precision", precision, ELEMENT_BYTES))
    return ELEMENT_BYTES[precision]


LOGITS_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""fp32 logits of one chunk: the budgets of model/loss.py, held equal by a test."""
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""zero_optimization.reduce_bucket_size: DeepSpeed's default."""


def peak_bytes(
    cfg: ModelConfig,
    *,
    micro_batch_rows: int,
    seq_len: int,
    precision: str,
    zero_stage: int = 1,
    dp_size: int = 1,
    recompute_every: int = 0,
    reduce_bucket_elements: int = REDUCE_BUCKET_ELEMENTS,
    device: str = "cpu",
) -> dict[str, int]:
    """The most bytes of tensors at once, at each of the moments of a step that can be the fullest.

    For one tp rank and pipeline stage, AdamW, two micro batches a step or more, ZeRO 0 (fp32) or 1, under
    DeepSpeed 0.19.8. Of N weights there stay through the step, in bytes a weight:

    | | fp32, ZeRO-0 | fp32, ZeRO-1 | bf16, ZeRO-1 |
    |---|---|---|---|
    | weights | 4 | 4 | 2 |
    | fp32 masters | - | 4 / dp | 4 / dp |
    | two moments | 8 | 8 / dp | 8 / dp |
    | gradients in the weights' dtype, from the first micro batch on | 4 | 4 | 2 |
    | fp32 gradients | - | - | 4 |
    | the bucket, from the first backward pass on | - | 4 a bucket element | - |

    and come and go

    loss              activations; the last norm's output; of a chunk of positions its logits (in the weights'
                      dtype, in fp32 if that is another, and their log-softmax) and its part of that output;
                      in bf16 a chunk's gradient of the head, and that in fp32
    loss_backward     activations, and the loss's gradients once more, scaled
    block_backward    activations without the loss's, the last block's computed again where it is; the
                      gradient of its output, and those that its gate (or GELU) takes and gives
    reduction         without the bucket: all gradients once more, flat: 4 bytes a weight at ZeRO-0; in bf16
                      6, a copy in bf16 beside the one in fp32; even on one rank
    update            at ZeRO-1 in fp32: 4 / dp, the gradients of this rank's partition, flat

    Workspace inside kernels is not seen.
    """
    element = _element_bytes(precision)
    if zero_stage not in (0, 1) or (zero_stage == 0 and precision != "fp32"):
        raise ConfigError(
            f"zero_stage={zero_stage} in {precision}: the peak is known for zero_stage=1, and for 0 in fp32"
        )
    count, tokens, d_model = num_params(cfg), micro_batch_rows * seq_len, cfg.d_model
    is_wide = precision == "fp32"
    partition = -(-count // dp_size) if zero_stage else count
    masters = partition * FP32_BYTES if zero_stage else 0
    wide_gradients = 0 if is_wide else count * FP32_BYTES
    resident = 2 * count * element + masters + partition * 2 * FP32_BYTES + wide_gradients
    bucket = reduce_bucket_elements * element if zero_stage and is_wide else 0

    activations = activation_bytes(
        cfg,
        micro_batch_rows=micro_batch_rows,
        seq_len=seq_len,
        precision=precision,
        recompute_every=recompute_every,
    )
    x, head = tokens * d_model, cfg.vocab_size * d_model
    rows = min(tokens, max(128, LOGITS_BYTES[device] // (FP32_BYTES * cfg.vocab_size)))
    logits = rows * cfg.vocab_size * (2 * FP32_BYTES if is_wide else element + 2 * FP32_BYTES)
    loss = logits + (x + rows * d_model) * element + (0 if is_wide else head * (element + FP32_BYTES))
    loss_backward = x * element + head * FP32_BYTES
    if not is_wide:
        loss_backward += head * element

    is_last_recomputed = bool(recompute_every) and (cfg.num_layers - 1) % recompute_every == 0
    a_block = _block_activation_bytes(cfg, tokens=tokens, element=element, tp_size=1)
    again = a_block - x * element if is_last_recomputed else 0
    after_loss = activations - (2 * x * element + tokens * _norm_statistics_bytes(cfg, element))
    after_loss -= head * FP32_BYTES
    ffn_gradients = tokens * cfg.ffn_width * (2 if cfg.family is Family.llama else 1)
    block_backward = after_loss + again + (x + ffn_gradients) * element
    flat = {"fp32": FP32_BYTES, "bf16": FP32_BYTES + element}[precision]
    return {
        "loss": resident + bucket + activations + loss,
        "loss_backward": resident + bucket + activations + loss_backward,
        "block_backward": resident + bucket + block_backward,
        "reduction": resident + (0 if is_wide and zero_stage else count * flat),
        "update": resident + (partition * FP32_BYTES if is_wide and zero_stage else 0),
    }
