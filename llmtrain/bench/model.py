"""The model alone: forward and backward beside Hugging Face's LlamaForCausalLM, and the share of the GEMM
peak.

Both have one shape and one set of tokens, and take turns, so that a machine whose speed drifts slows both;
figures are medians. The rival sees each row as one document (its fused causal attention); ours is measured
like that, and with the documents of a row kept apart, as in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmtrain.bench.peak import CPU_SIZES, CUDA_SIZES, best_flops
from llmtrain.bench.shapes import DEMO, TINYLLAMA_1B
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.model.config import ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.model.size import flops_per_token

PEAK_SECONDS = 0.5


def run(config: BenchConfig) -> list[Row]:
    config.only_options("rows", "seq_len")
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    cfg = TINYLLAMA_1B if on_cuda else DEMO
    num_rows, seq_len = config.option("rows", 4), config.option("seq_len", 2048 if on_cuda else 512)
    tokens_BS = torch.randint(
        0, cfg.vocab_size, (num_rows, seq_len), generator=torch.Generator().manual_seed(config.seed)
    ).to(device)
    measured = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours = _our_step(cfg, tokens_BS, dtype, num_documents=1)
        packed = _our_step(cfg, tokens_BS, dtype, num_documents=3)
        theirs = _their_step(cfg, tokens_BS, dtype)
        ours_s, packed_s, theirs_s = take_turns(
            [ours, packed, theirs], rounds=config.scaled(15, least=3), device=device
        )
        sizes = CUDA_SIZES if on_cuda else CPU_SIZES
        peak, _ = best_flops(dtype, device=device, sizes=sizes, seconds=PEAK_SECONDS * config.scale)
        num_tokens = num_rows * seq_len
        achieved = num_tokens * flops_per_token(cfg, seq_len, convention="causal") / packed_s
        for what, spent_s in (("one document a row", ours_s), ("3 documents a row", packed_s)):
            measured.append(
                Row(
                    name=f"{name} forward and backward, {what}, rival: Hugging Face Llama",
                    value=num_tokens / spent_s,
                    unit="tokens/s",
                    rival=num_tokens / theirs_s,
                )
            )
        measured.append(
            Row(
                name=f"{name} model FLOPs a second, causal convention, limit: best matrix product",
                value=achieved / 1e9,
                unit="GFLOP/s",
                limit=peak / 1e9,
            )
        )
    return measured


def take_turns(steps: list[Callable[[], None]], *, rounds: int, device: torch.device) -> list[float]:
    """Median seconds of each step, run one after another `rounds` times, after one round to warm up."""
    spent: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, seconds in zip(steps, spent, strict=True):
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in spent]


def _our_step(
    cfg: ModelConfig, tokens_BS: Tensor, dtype: torch.dtype, *, num_documents: int
) -> Callable[[], None]:
    model = build_transformer(cfg, seed=0, device=tokens_BS.device, dtype=dtype)
    seq_len = tokens_BS.shape[1]
    places = torch.arange(seq_len, device=tokens_BS.device).expand_as(tokens_BS)
    length = -(-seq_len // num_documents)
    segments_BS = None if num_documents == 1 else places // length
    targets_BS = _targets(tokens_BS)

    def step() -> None:
        loss = model(tokens_BS, places % length, segments_BS, targets_BS=targets_BS)
        (loss / tokens_BS.numel()).backward()
        model.zero_grad(set_to_none=True)

    return step


def _their_step(cfg: ModelConfig, tokens_BS: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    shape = LlamaConfig(
        vocab_size=cfg.vocab_size,
        num_hidden_layers=cfg.num_layers,
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        intermediate_size=cfg.ffn_width,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(shape).to(tokens_BS.device, dtype)

    def step() -> None:
        model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _targets(tokens_BS: Tensor) -> Tensor:
    """The next token of each; none for the last, as the rival counts."""
    targets_BS = tokens_BS.roll(-1, dims=1)
    targets_BS[:, -1] = -100
    return targets_BS
