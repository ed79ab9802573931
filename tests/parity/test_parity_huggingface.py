"""Logits, loss and gradients equal Hugging Face's LlamaForCausalLM and GPT2LMHeadModel with the same weights,
in fp32 to 1e-5."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.model.loss import NO_TARGET
from llmtrain.model.size import num_params
from llmtrain.model.transformer import Transformer

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


def huggingface_config(cfg: ModelConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=cfg.vocab_size,
        num_hidden_layers=cfg.num_layers,
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        intermediate_size=cfg.ffn_width,
        head_dim=cfg.width_per_head,
        tie_word_embeddings=cfg.tie_embeddings,
        rope_theta=cfg.rope_theta,
        rms_norm_eps=cfg.norm_eps,
        attn_implementation="eager",
    )


def huggingface_name(name: str) -> str:
    """Name of the same weight in LlamaForCausalLM."""
    for ours, theirs in (
        (r"^embedding\.", "model.embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^final_norm\.", "model.norm."),
        (r"^blocks\.", "model.layers."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.mlp_norm\.", ".post_attention_layernorm."),
        (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
        (r"\.mlp\.w_(\w+)\.", r".mlp.\1_proj."),
    ):
        name = re.sub(ours, theirs, name)
    return name


def as_theirs(name: str, value: torch.Tensor) -> torch.Tensor:
    """wo and w_down are [in, out] here, [out, in] in LlamaForCausalLM."""
    return value.T if name.endswith((".wo.weight", ".w_down.weight")) else value


def gpt2_config(cfg: ModelConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.max_positions,
        n_embd=cfg.d_model,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_inner=cfg.ffn_width,
        layer_norm_epsilon=cfg.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="eager",
    )


def gpt2_weights(model: GPT2LMHeadModel, of: str = "data") -> dict[str, torch.Tensor]:
    """Their weights, or gradients (`of="grad"`), by our names. They keep matrices as [in, out], and q,
    k, v in one."""
    found = {}
    for name, weight in model.named_parameters():
        value = getattr(weight, of)
        for theirs, ours in (
            (r"^transformer\.wte\.", "embedding."),
            (r"^transformer\.wpe\.", "position_embedding."),
            (r"^transformer\.ln_f\.", "final_norm."),
            (r"^lm_head\.", "head."),
            (r"^transformer\.h\.", "blocks."),
            (r"\.ln_1\.", ".attention_norm."),
            (r"\.ln_2\.", ".mlp_norm."),
            (r"\.attn\.c_proj\.", ".attention.wo."),
            (r"\.mlp\.c_fc\.", ".mlp.w_up."),
            (r"\.mlp\.c_proj\.", ".mlp.w_down."),
        ):
            name = re.sub(theirs, ours, name)
        if value.ndim == 2 and name.endswith((".attn.c_attn.weight", ".w_up.weight")):
            value = value.T  # wo and w_down are [in, out] here, too
        if ".attn.c_attn." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".attn.c_attn.", f".attention.w{letter}.")] = part
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_gpt2s_logits_and_gradients_equal_hugging_faces(tie_embeddings: bool) -> None:
    cfg = ModelConfig(
        family=Family.gpt2,
        vocab_size=160,
        max_positions=80,
        num_layers=3,
        d_model=96,
        num_heads=6,
        num_kv_heads=6,
        ffn_width=200,
        tie_embeddings=tie_embeddings,
        init_std=0.1,
    )
    ours = build_transformer(cfg, seed=0)
    theirs = GPT2LMHeadModel(gpt2_config(cfg)).eval()
    generator = torch.Generator().manual_seed(1)
    their_weights = gpt2_weights(theirs)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
            their_weights.pop(name).copy_(weight)
    assert not their_weights, f"weights that only they have: {list(their_weights)}"
    tokens = torch.randint(0, cfg.vocab_size, (2, 70), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(70).expand(2, -1)
    expected = theirs(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours(tokens, positions), expected, atol=1e-5, rtol=1e-5)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = NO_TARGET
    loss = ours(tokens, positions, targets_BS=targets) / int((targets != NO_TARGET).sum())
    their_loss = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    their_loss.backward()
    their_grads = gpt2_weights(theirs, of="grad")
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(
            weight.grad, their_grads[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def both(cfg: ModelConfig) -> tuple[Transformer, LlamaForCausalLM]:
    """Our model and theirs with the same weights, norms included, large enough for attention to be peaked."""
    ours = build_transformer(cfg, seed=0)
    theirs = LlamaForCausalLM(huggingface_config(cfg)).eval()
    their_weights = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
            their_weights.pop(huggingface_name(name)).copy_(as_theirs(name, weight))
    assert not their_weights, f"weights that only they have: {list(their_weights)}"
    return ours, theirs


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6], ids=["multi-query", "grouped", "multi-head"])
def test_logits_and_gradients_equal_hugging_faces(num_kv_heads: int, tie_embeddings: bool) -> None:
    cfg = ModelConfig(
        vocab_size=160,
        num_layers=3,
        d_model=96,
        num_heads=6,
        num_kv_heads=num_kv_heads,
        ffn_width=128,
        tie_embeddings=tie_embeddings,
        rope_theta=500.0,
        init_std=0.1,
    )
    ours, theirs = both(cfg)
    tokens = torch.randint(0, cfg.vocab_size, (2, 70), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(70).expand(2, -1)
    expected = theirs(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours(tokens, positions), expected, atol=1e-5, rtol=1e-5)

    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = NO_TARGET
    num_targets = int((targets != NO_TARGET).sum())
    loss = ours(tokens, positions, targets_BS=targets) / num_targets
    their_loss = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    their_loss.backward()
    their_weights = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        their_grad = their_weights[huggingface_name(name)].grad
        torch.testing.assert_close(
            as_theirs(name, weight.grad),
            their_grad,
            atol=1e-5,
            rtol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_packed_documents_equal_hugging_faces_one_by_one() -> None:
    cfg = ModelConfig(
        vocab_size=160, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, ffn_width=96, init_std=0.1
    )
    ours, theirs = both(cfg)
    lengths = [11, 30, 1, 22]
    tokens = torch.randint(0, cfg.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    logits = ours(tokens, positions, segments)
    alone = [theirs(input_ids=part, use_cache=False).logits for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_every_named_shape_has_as_many_parameters_as_hugging_faces_and_as_its_comment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cfg = ModelConfig(**yaml.safe_load(text))
    with torch.device("meta"):
        theirs = (
            GPT2LMHeadModel(gpt2_config(cfg))
            if cfg.family is Family.gpt2
            else LlamaForCausalLM(huggingface_config(cfg))
        )
    assert num_params(cfg) == theirs.num_parameters()
    stated = re.search(r"([\d,]+) parameters", text)
    assert stated is not None, "the comment says how many parameters there are"
    assert int(stated[1].replace(",", "")) == num_params(cfg)
