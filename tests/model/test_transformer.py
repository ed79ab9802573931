"""Documents in a row are apart, positions restart, and weights may come after a build on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.model.config import ModelConfig
from llmtrain.model.init import build_transformer, init_weights
from llmtrain.model.loss import NO_TARGET, sum_cross_entropy
from llmtrain.model.recompute import selective
from llmtrain.model.transformer import Transformer

SHAPES = {
    "grouped, tied": {"num_kv_heads": 2, "tie_embeddings": True},
    "multi-head, untied": {"num_kv_heads": 4, "tie_embeddings": False},
    "multi-query, wide heads": {"num_kv_heads": 1, "head_width": 24},
    "gpt2, tied": {"family": "gpt2", "max_positions": 64, "num_kv_heads": 4, "tie_embeddings": True},
    "gpt2, grouped, untied, odd heads": {"family": "gpt2", "max_positions": 64, "head_width": 15},
}


def config(**changes: object) -> ModelConfig:
    shape = {
        "vocab_size": 96,
        "num_layers": 3,
        "d_model": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_width": 80,
    }
    return ModelConfig(**{**shape, "init_std": 0.2, **changes})  # large weights: an error is seen


def packed_row(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and segments of one row with documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.cat([torch.full((length,), at) for at, length in enumerate(lengths)])[None].int()
    return tokens, positions, segments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_changed_token_leaves_other_documents_logits_bit_equal(shape: dict, dtype: torch.dtype) -> None:
    model = build_transformer(config(**shape), seed=0, dtype=dtype)
    tokens, positions, segments = packed_row([13, 9, 20])
    before = model(tokens, positions, segments)
    for changed in (0, 12, 15, 41):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 96
        after = model(other, positions, segments)
        reached = (segments == segments[0, changed]) & (torch.arange(42)[None] >= changed)
        assert torch.equal(before[~reached], after[~reached])
        assert not torch.isclose(before[reached].float(), after[reached].float()).all(dim=-1).any()


def test_a_document_has_the_same_logits_alone_and_in_a_row() -> None:
    model = build_transformer(config(), seed=0)
    tokens, positions, segments = packed_row([13, 9, 20])
    packed = model(tokens, positions, segments)
    start = 0
    for length in (13, 9, 20):
        alone = model(tokens[:, start : start + length], torch.arange(length)[None])
        torch.testing.assert_close(packed[:, start : start + length], alone, atol=1e-5, rtol=1e-5)
        start += length


def test_segments_of_one_document_equal_no_segments() -> None:
    model = build_transformer(config(), seed=0)
    tokens, positions, segments = packed_row([40])
    torch.testing.assert_close(
        model(tokens, positions, segments), model(tokens, positions), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_in_the_forward_equals_loss_of_the_logits_with_its_gradients(shape: dict) -> None:
    model = build_transformer(config(**shape), seed=0)
    tokens, positions, segments = packed_row([13, 9, 20])
    targets = tokens.roll(-1, dims=1)
    targets[0, [12, 21, 41]] = NO_TARGET
    loss = model(tokens, positions, segments, targets_BS=targets)
    loss.backward()
    fused = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    reference = sum_cross_entropy(model(tokens, positions, segments), targets)
    reference.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(fused[name], weight.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("every", [1, 2])
def test_computing_blocks_again_changes_no_bit_and_keeps_less(shape: dict, every: int) -> None:
    model = build_transformer(config(**shape, num_layers=4), seed=0)
    tokens, positions, segments = packed_row([13, 9, 20])

    def gradients(recompute_every: int) -> tuple[dict[str, Tensor], int]:
        """Of every weight; and how many blocks kept what is inside them."""
        model.recompute_every = recompute_every
        model.zero_grad()
        inside: set[int] = set()

        def kept(tensor: Tensor) -> Tensor:
            if tensor.shape[-1] == 80:  # the width of the feed-forward layer, which no input has
                inside.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            loss = model(tokens, positions, segments, targets_BS=tokens)
        loss.backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return {**found, "loss": loss.detach()}, len(inside)

    plain, kept_plain = gradients(0)
    again, kept_again = gradients(every)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    assert kept_again <= kept_plain * (1 - 1 / every)
    with torch.no_grad():
        assert torch.equal(model(tokens, positions, segments, targets_BS=tokens), plain["loss"])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_selective_recomputation_changes_no_bit_and_repeats_no_product(shape: dict) -> None:
    model = build_transformer(config(**shape), seed=0)
    tokens, positions, segments = packed_row([13, 9, 20])

    def measured(every: int, contexts: Callable[[], Any]) -> tuple[dict[str, Tensor], int, int]:
        """Gradients, FLOPs, and bytes kept by autograd itself between the passes."""
        model.recompute_every, model.recompute_contexts = every, contexts
        model.zero_grad()
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with FlopCounterMode(display=False) as flops:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(tokens, positions, segments, targets_BS=tokens)
            loss.backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return grads, flops.get_total_flops(), sum(kept.values())

    plain, plain_flops, plain_bytes = measured(0, noop_context_fn)
    _, full_flops, _ = measured(1, noop_context_fn)
    chosen, chosen_flops, chosen_bytes = measured(1, selective)
    for name, value in plain.items():
        assert torch.equal(value, chosen[name]), name
    assert plain_flops == chosen_flops < full_flops
    assert chosen_bytes < plain_bytes


def test_parameter_names_are_the_canonical_ones() -> None:
    names = {name for name, _ in Transformer(config(num_layers=1)).named_parameters()}
    assert names == {
        "embedding.weight",
        "blocks.0.attention_norm.weight",
        *(f"blocks.0.attention.{each}.weight" for each in ("wq", "wk", "wv", "wo")),
        "blocks.0.mlp_norm.weight",
        *(f"blocks.0.mlp.{each}.weight" for each in ("w_gate", "w_up", "w_down")),
        "final_norm.weight",
        "head.weight",
    }
    gpt2 = {
        name
        for name, _ in Transformer(config(num_layers=1, family="gpt2", max_positions=9)).named_parameters()
    }
    biased = (names - {"blocks.0.mlp.w_gate.weight"}) | {"position_embedding.weight"}
    without = {"embedding.weight", "position_embedding.weight", "head.weight"}
    assert gpt2 == biased | {name.replace(".weight", ".bias") for name in biased - without}
    tied = {name for name, _ in Transformer(config(num_layers=1, tie_embeddings=True)).named_parameters()}
    assert tied == names - {"head.weight"}


def test_a_model_built_on_meta_needs_only_its_weights() -> None:
    cfg = config()
    direct = Transformer(cfg)
    init_weights(direct, cfg, seed=3)
    with torch.device("meta"):
        late = Transformer(cfg)
    assert not list(late.buffers())
    late.to_empty(device="cpu")
    for weight in late.parameters():
        weight.data.fill_(torch.nan)
    init_weights(late, cfg, seed=3)
    tokens, positions, segments = packed_row([13, 9])
    assert torch.equal(direct(tokens, positions, segments), late(tokens, positions, segments))
