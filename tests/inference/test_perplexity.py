"""Sums of losses add up over any cut into batches, and every byte of the text is paid for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmtrain.errors import DataError
from llmtrain.inference.perplexity import bits_per_byte, held_out_loss, perplexity
from llmtrain.loader.batches import Batch
from llmtrain.model.config import ModelConfig
from llmtrain.model.init import build_transformer

CFG = ModelConfig(vocab_size=50, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, ffn_width=48)


def batch(tokens_BS: torch.Tensor, num_masked: int) -> Batch:
    targets_BS = tokens_BS.roll(-1, dims=1)
    targets_BS[:, -1] = -100
    targets_BS[0, :num_masked] = -100
    return Batch(
        tokens_BS=tokens_BS,
        targets_BS=targets_BS,
        positions_BS=torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape),
        segments_BS=torch.zeros_like(tokens_BS, dtype=torch.int32),
        num_valid=int((targets_BS != -100).sum()),
        rows=np.arange(len(tokens_BS)),
    )


def test_the_sum_over_batches_is_that_of_each_target() -> None:
    model = build_transformer(CFG, seed=0)
    generator = torch.Generator().manual_seed(0)
    batches = [batch(torch.randint(0, 50, (2, 12), generator=generator), masked) for masked in (0, 5)]
    total, num_targets = held_out_loss(model, batches)
    expected = 0.0
    for each in batches:
        with torch.no_grad():
            log_probs = model(each.tokens_BS, each.positions_BS).double().log_softmax(-1)
        for row in range(2):
            for at in range(12):
                target = int(each.targets_BS[row, at])
                expected -= 0.0 if target == -100 else float(log_probs[row, at, target])
    assert num_targets == 2 * 2 * 11 - 5
    assert total == pytest.approx(expected, rel=1e-5)


def test_evaluation_keeps_no_graph() -> None:
    model = build_transformer(CFG, seed=0)
    held_out_loss(model, [batch(torch.zeros(1, 4, dtype=torch.long), 0)])
    assert all(weight.grad is None for weight in model.parameters())


def test_a_uniform_model_pays_log2_of_the_vocabulary_for_every_token_first_ones_too() -> None:
    """3 documents of 5 tokens and 20 bytes in all: 12 targets and 3 first tokens, each log2(256) = 8 bits."""
    bits = bits_per_byte(12 * math.log(256), num_documents=3, vocab_size=256, text_bytes=20)
    assert bits == pytest.approx(15 * 8 / 20)


def test_perplexity_is_exp_of_the_mean() -> None:
    assert perplexity(20.0, 10) == pytest.approx(math.exp(2))
    assert perplexity(1e6, 1) == math.inf


def test_a_split_without_text_is_an_error() -> None:
    with pytest.raises(
        DataError, match="the held-out rows have no targets; run `llmtrain data` with a larger"
    ):
        perplexity(0.0, 0)
    with pytest.raises(DataError, match="the held-out split has no text; run `llmtrain data` with a larger"):
        bits_per_byte(0.0, num_documents=0, vocab_size=50, text_bytes=0)
