"""Counts of parameters and FLOPs against the built module, torch's flop counter, and published figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from llmtrain.errors import ConfigError
from llmtrain.model import loss, size
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.model.partition import local_config
from llmtrain.model.transformer import Transformer

SHAPES = [
    ModelConfig(vocab_size=300, num_layers=3, d_model=96, num_heads=4, num_kv_heads=2, ffn_width=200),
    ModelConfig(
        vocab_size=512,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=4,
        ffn_width=96,
        tie_embeddings=True,
    ),
    ModelConfig(
        family=Family.gpt2,
        max_positions=64,
        vocab_size=256,
        num_layers=2,
        d_model=112,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=448,
        tie_embeddings=True,
    ),
    ModelConfig(
        vocab_size=64, num_layers=1, d_model=128, num_heads=4, num_kv_heads=1, ffn_width=64, head_width=48
    ),
]
LLAMA3_8B = ModelConfig(
    vocab_size=128_256, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, ffn_width=14_336
)


@pytest.mark.parametrize("cfg", SHAPES, ids=lambda cfg: f"{cfg.d_model}")
def test_parameters_equal_the_built_module(cfg: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(cfg)
    assert size.num_params(cfg) == sum(weight.numel() for weight in model.parameters())
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norm": 0, "head": 0}
    for name, weight in model.named_parameters():
        part = "norm" if "norm" in name else next(part for part in parts if part in name)
        parts[part] += weight.numel()
    assert size.num_params_by_part(cfg) == parts
    assert size.num_non_embedding_params(cfg) == parts["attention"] + parts["mlp"] + parts["norm"]


@pytest.mark.parametrize("cfg", SHAPES, ids=lambda cfg: f"{cfg.d_model}")
def test_palm_flops_equal_torchs_counter_of_unfused_attention(cfg: ModelConfig) -> None:
    seq_len = 48
    model = build_transformer(cfg, seed=0)
    tokens = torch.randint(0, cfg.vocab_size, (2, seq_len))
    positions = torch.arange(seq_len).expand(2, -1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, positions, targets_BS=tokens).backward()
    counted = counter.get_total_flops() / (2 * seq_len)
    assert size.flops_per_token(cfg, seq_len, convention="palm") == pytest.approx(counted, rel=0.01)


def test_fused_flops_equal_torchs_formula_of_flash_attention() -> None:
    cfg, seq_len = SHAPES[0], 128
    q_shape = (1, cfg.num_heads, seq_len, cfg.width_per_head)
    forward = sdpa_flop_count(q_shape, q_shape, q_shape)
    backward = sdpa_backward_flop_count(q_shape, q_shape, q_shape, q_shape)
    attention = cfg.num_layers * (forward + backward) / seq_len
    expected = 6 * size.num_multiplied_params(cfg) + attention
    assert size.flops_per_token(cfg, seq_len, convention="fused") == expected


def test_causal_attention_costs_half_of_the_full_one() -> None:
    matrices = 6 * size.num_multiplied_params(LLAMA3_8B)
    full = size.flops_per_token(LLAMA3_8B, 8192, convention="palm") - matrices
    assert size.flops_per_token(LLAMA3_8B, 8192, convention="causal") - matrices == full / 2


def test_zero_divides_what_its_stage_says() -> None:
    count = size.num_params(LLAMA3_8B)
    per_rank = {
        stage: sum(
            size.training_state_bytes(LLAMA3_8B, precision="bf16", zero_stage=stage, dp_size=64).values()
        )
        / count
        for stage in range(4)
    }
    # ZeRO (arXiv:1910.02054), figure 1: 120, 31.4, 16.6 and 1.9 GB for 7.5e9 parameters on 64 ranks
    gigabytes = {stage: 7.5 * per_param for stage, per_param in per_rank.items()}
    assert gigabytes == pytest.approx({0: 120, 1: 31.4, 2: 16.6, 3: 1.9}, rel=0.02)
    fp32 = size.training_state_bytes(LLAMA3_8B, precision="fp32", zero_stage=0, dp_size=1)
    assert sum(fp32.values()) == 16 * count


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown FLOPs convention 'plam'; did you mean 'palm'\?"):
        size.flops_per_token(LLAMA3_8B, 8, convention="plam")
    with pytest.raises(ConfigError, match=r"unknown precision 'bf15'; did you mean 'bf16'\?"):
        size.training_state_bytes(LLAMA3_8B, precision="bf15", zero_stage=0, dp_size=1)
    with pytest.raises(ConfigError, match="zero_stage=4 must be 0, 1, 2 or 3"):
        size.training_state_bytes(LLAMA3_8B, precision="bf16", zero_stage=4, dp_size=1)
    with pytest.raises(ConfigError, match="dp_size=0 must be at least 1"):
        size.training_state_bytes(LLAMA3_8B, precision="bf16", zero_stage=0, dp_size=0)


def kept_bytes(cfg: ModelConfig, *, dtype: torch.dtype, rows: int, seq_len: int, recompute_every: int) -> int:
    """What autograd keeps of one forward: every storage once, without weights and the batch's own tensors."""
    model = build_transformer(cfg, seed=0).to(dtype)
    model.recompute_every = recompute_every
    tokens = torch.randint(0, cfg.vocab_size, (rows, seq_len))
    positions = torch.arange(seq_len).repeat(rows, 1)
    segments = torch.zeros(rows, seq_len, dtype=torch.int32)
    there = [*model.parameters(), tokens, positions, segments]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, positions, segments, tokens)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute_every", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cfg", SHAPES, ids=lambda cfg: f"{cfg.d_model}")
def test_activations_equal_what_autograd_keeps(
    cfg: ModelConfig, precision: str, recompute_every: int
) -> None:
    rows, seq_len = 2, 40
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    kept = kept_bytes(cfg, dtype=dtype, rows=rows, seq_len=seq_len, recompute_every=recompute_every)
    is_all_recomputed = recompute_every == 1 or (recompute_every == 2 and cfg.num_layers == 1)
    if is_all_recomputed and cfg.family is Family.llama:
        # A block that is computed again holds cosines and sines as its arguments, out of the hooks' sight.
        kept += rows * seq_len * cfg.width_per_head * dtype.itemsize
    expected = size.activation_bytes(
        cfg,
        micro_batch_rows=rows,
        seq_len=seq_len,
        precision=precision,
        recompute_every=recompute_every,
    )
    assert expected == kept


def test_a_tensor_parallel_rank_keeps_its_part_of_a_region() -> None:
    """Without the embedding's 9 bytes a token: the one process that stands for the rank has none."""
    cfg = SHAPES[0]
    part = local_config(cfg, tp_size=2)
    kept = kept_bytes(part, dtype=torch.float32, rows=2, seq_len=40, recompute_every=0)
    expected = size.activation_bytes(cfg, micro_batch_rows=2, seq_len=40, precision="fp32", tp_size=2)
    assert expected - 9 * 2 * 40 == kept


def test_the_peak_is_the_state_and_the_fullest_moment() -> None:
    cfg = SHAPES[0]
    count = size.num_params(cfg)
    sizes = {"micro_batch_rows": 1, "seq_len": 8, "precision": "bf16"}
    alone = size.peak_bytes(cfg, **sizes)
    # 2 + 4 + 8 of state, 2 + 4 of gradients, 4 + 2 of their flat copies
    assert max(alone.values()) == alone["reduction"] == 26 * count
    assert size.peak_bytes(cfg, **sizes, dp_size=2)["reduction"] == (26 - 12 / 2) * count
    kept = size.activation_bytes(cfg, **sizes)
    assert alone["loss"] > 20 * count + kept
    fp32 = size.peak_bytes(cfg, micro_batch_rows=1, seq_len=8, precision="fp32", reduce_bucket_elements=10)
    assert fp32["update"] == 24 * count
    assert fp32["reduction"] == 20 * count
    more = size.peak_bytes(cfg, micro_batch_rows=1, seq_len=8, precision="fp32", reduce_bucket_elements=11)
    assert more["loss"] - fp32["loss"] == 4


def test_chunks_of_logits_are_those_of_the_loss() -> None:
    assert size.LOGITS_BYTES == {"cpu": loss.CACHED_LOGITS_BYTES, "cuda": loss.CUDA_LOGITS_BYTES}


def test_peaks_that_are_not_known_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"zero_stage=2 in fp32: the peak is known for zero_stage=1, and for 0"
    ):
        size.peak_bytes(SHAPES[0], micro_batch_rows=1, seq_len=8, precision="fp32", zero_stage=2)
    with pytest.raises(ConfigError, match="zero_stage=0 in bf16"):
        size.peak_bytes(SHAPES[0], micro_batch_rows=1, seq_len=8, precision="bf16", zero_stage=0)
    with pytest.raises(ConfigError, match=r"unknown precision 'bf15'; did you mean 'bf16'\?"):
        size.activation_bytes(SHAPES[0], micro_batch_rows=1, seq_len=8, precision="bf15")


def test_sizes_load_without_torch() -> None:
    code = "import sys, llmtrain.model.size; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
