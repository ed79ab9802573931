"""Any transformer as a graph of blocks, and what follows from it: exact parameter counts and FLOPs.

A graph is walked into its weights, each a matrix or a vector with its size, and counts are sums over them.
There is no formula for a family: what a family is, is which parts its blocks have (`FAMILIES`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.size import FLOPS_CONVENTIONS

PARTS = ("embedding", "attention", "mlp", "experts", "router", "norm", "head")


@dataclass(frozen=True)
class Weight:
    """A matrix or a vector of the model, and how often it occurs."""

    part: str
    """One of PARTS."""
    name: str
    rows: int
    """Inputs; a vector's length."""
    columns: int = 1
    """Outputs; 1: a vector."""
    copies: int = 1
    active: int = 1
    """Of the copies, those that one token meets: fewer than all only for routed experts."""

    @property
    def num_params(self) -> int:
        return self.rows * self.columns * self.copies

    @property
    def num_active_params(self) -> int:
        return self.rows * self.columns * self.active


@dataclass(frozen=True)
class Norm:
    """RMSNorm has a scale, LayerNorm a scale and a shift, OLMo's first (arXiv:2402.00838) neither."""

    has_scale: bool = True
    has_shift: bool = False

    @property
    def num_vectors(self) -> int:
        return self.has_scale + self.has_shift


RMS, LAYER, PLAIN = Norm(), Norm(has_shift=True), Norm(has_scale=False)


@dataclass(frozen=True, kw_only=True)
class Attention:
    num_heads: int
    num_kv_heads: int
    head_width: int
    """Of queries and keys; with latent attention both parts, without position and rotary."""
    value_width: int | None = None
    """None: head_width."""
    qkv_bias: bool = False
    out_bias: bool = False
    query_rank: int = 0
    """Width of latent queries; 0: queries come straight from the input."""
    kv_rank: int = 0
    """Width of latent keys and values (DeepSeek-V2, arXiv:2405.04434, section 2.1); 0: none."""
    rope_width: int = 0
    """Of latent attention: the rotary part of a key, which all heads share."""
    qk_norm: str = ""
    """Scales of RMSNorms of queries and keys: "head" (one head wide, Qwen 3), "all" (all heads wide, OLMo 2)
    or ""."""
    relative_matrix: bool = False
    """Transformer-XL's: keys of relative positions by a matrix of their own (arXiv:1901.02860, section
    3.3)."""
    is_causal: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; each "
                "key/value head serves a whole group of query heads"
            )
        if self.qk_norm not in ("", "head", "all"):
            raise ConfigError(f'qk_norm={self.qk_norm!r} must be "", "head" or "all"')

    @property
    def width_of_values(self) -> int:
        return self.head_width if self.value_width is None else self.value_width


@dataclass(frozen=True, kw_only=True)
class Mlp:
    width: int
    is_gated: bool
    has_biases: bool = False


@dataclass(frozen=True, kw_only=True)
class Moe:
    num_experts: int
    experts_per_token: int
    width: int
    """Of one expert."""
    shared_width: int = 0
    """Of all experts that every token meets, together."""
    is_gated: bool = True
    has_router_bias: bool = False
    """One number an expert, as DeepSeek-V3 balances its experts with."""

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} must be from 1 to num_experts={self.num_experts}"
            )


@dataclass(frozen=True, kw_only=True)
class Block:
    attention: Attention
    ffn: Mlp | Moe
    norm: Norm
    num_norms: int = 2
    """1: attention and feed-forward in parallel behind one norm; 3 with cross-attention; 4 with norms on
    both sides."""
    cross_attention: Attention | None = None


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks in order, in runs of equal ones."""

    blocks: tuple[tuple[int, Block], ...]
    """(how many, block)."""
    final_norm: Norm | None
    relative_buckets: int = 0
    """T5's attention bias: a number a head for each of that many distances, shared by all blocks
    (arXiv:1910.10683, section 2.1)."""

    @property
    def num_layers(self) -> int:
        return sum(count for count, _ in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    vocab_size: int
    positions: int = 0
    """Rows of a learned position embedding."""
    token_types: int = 0
    norm: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class Head:
    is_tied: bool
    has_bias: bool = False
    transform_norm: Norm | None = None
    """Of BERT's masked-word head: a d_model by d_model layer with bias and this norm before the logits."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model. Decoders and encoders have one stack, encoder-decoders two."""

    name: str
    d_model: int
    embedding: Embedding
    encoder: Stack | None = None
    decoder: Stack | None = None
    head: Head | None
    """None: no logits."""
    has_pooler: bool = False
    """BERT's layer on the first token."""

    def __post_init__(self) -> None:
        if self.encoder is None and self.decoder is None:
            raise ConfigError(
                f"the architecture {self.name!r} has no stack; give it an encoder, a decoder or both"
            )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(stack for stack in (self.encoder, self.decoder) if stack is not None)


# -- the walk


def weights(arch: Architecture) -> tuple[Weight, ...]:
    """Every matrix and vector. Equal blocks are one entry with as many copies; a tied head is none."""
    return tuple(_walk(arch))


def _walk(arch: Architecture) -> Iterator[Weight]:
    d, embedding, head = arch.d_model, arch.embedding, arch.head
    yield Weight("embedding", "tokens", embedding.vocab_size, d)
    if embedding.positions:
        yield Weight("embedding", "positions", embedding.positions, d)
    if embedding.token_types:
        yield Weight("embedding", "token types", embedding.token_types, d)
    yield from _norms(embedding.norm, d, 1, "embedding norm")
    for stack in arch.stacks:
        for count, block in stack.blocks:
            yield from _block_weights(block, d, count)
        if stack.relative_buckets:
            heads = stack.blocks[0][1].attention.num_heads
            yield Weight("attention", "relative bias", stack.relative_buckets, heads)
        yield from _norms(stack.final_norm, d, 1, "final norm")
    if arch.has_pooler:
        yield from _linear("head", "pooler", d, d, has_bias=True)
    if head is not None:
        if head.transform_norm is not None:
            yield from _linear("head", "transform", d, d, has_bias=True)
            for _ in range(head.transform_norm.num_vectors):
                yield Weight("head", "transform norm", d)
        if not head.is_tied:
            yield Weight("head", "logits", d, embedding.vocab_size)
        if head.has_bias:
            yield Weight("head", "logits bias", embedding.vocab_size)


def _block_weights(block: Block, d: int, count: int) -> Iterator[Weight]:
    yield from _attention_weights(block.attention, d, count, "")
    if block.cross_attention is not None:
        yield from _attention_weights(block.cross_attention, d, count, "cross ")
    ffn = block.ffn
    if isinstance(ffn, Mlp):
        yield from _mlp("mlp", "", ffn.width, d, count, is_gated=ffn.is_gated, has_biases=ffn.has_biases)
    else:
        yield Weight("router", "router", d, ffn.num_experts, count, count)
        if ffn.has_router_bias:
            yield Weight("router", "router bias", ffn.num_experts, 1, count, count)
        copies, active = count * ffn.num_experts, count * ffn.experts_per_token
        for name, rows, columns in _mlp_matrices(ffn.width, d, ffn.is_gated):
            yield Weight("experts", f"expert {name}", rows, columns, copies, active)
        if ffn.shared_width:
            yield from _mlp(
                "mlp", "shared ", ffn.shared_width, d, count, is_gated=ffn.is_gated, has_biases=False
            )
    yield from _norms(block.norm, d, count * block.num_norms, "block norm")


def _attention_weights(a: Attention, d: int, count: int, prefix: str) -> Iterator[Weight]:
    queries, values = a.num_heads * a.head_width, a.num_heads * a.width_of_values

    def linear(name: str, rows: int, columns: int, has_bias: bool) -> Iterator[Weight]:
        return _linear("attention", prefix + name, rows, columns, count, has_bias=has_bias)

    if a.query_rank:
        yield from linear("latent query", d, a.query_rank, has_bias=a.qkv_bias)
        yield from _norms(RMS, a.query_rank, count, prefix + "latent query norm")
    yield from linear("query", a.query_rank or d, queries, has_bias=a.qkv_bias and not a.query_rank)
    if a.kv_rank:
        yield from linear("latent key and value", d, a.kv_rank + a.rope_width, has_bias=a.qkv_bias)
        yield from _norms(RMS, a.kv_rank, count, prefix + "latent key and value norm")
        unshared = a.head_width - a.rope_width + a.width_of_values
        yield from linear("key and value", a.kv_rank, a.num_heads * unshared, has_bias=False)
    else:
        yield from linear("key", d, a.num_kv_heads * a.head_width, has_bias=a.qkv_bias)
        yield from linear("value", d, a.num_kv_heads * a.width_of_values, has_bias=a.qkv_bias)
    if a.qk_norm:
        for name, heads in (("query norm", a.num_heads), ("key norm", a.num_kv_heads)):
            yield from _norms(RMS, a.head_width * (heads if a.qk_norm == "all" else 1), count, prefix + name)
    if a.relative_matrix:
        yield from linear("relative positions", d, queries, has_bias=False)
    yield from linear("out", values, d, has_bias=a.out_bias)


def _mlp(
    part: str, prefix: str, width: int, d: int, count: int, *, is_gated: bool, has_biases: bool
) -> Iterator[Weight]:
    for name, rows, columns in _mlp_matrices(width, d, is_gated):
        yield from _linear(part, prefix + name, rows, columns, count, has_bias=has_biases)


def _mlp_matrices(width: int, d: int, is_gated: bool) -> list[tuple[str, int, int]]:
    gate = [("gate", d, width)] if is_gated else []
    return [*gate, ("up", d, width), ("down", width, d)]


def _linear(
    part: str, name: str, rows: int, columns: int, count: int = 1, *, has_bias: bool
) -> Iterator[Weight]:
    yield Weight(part, name, rows, columns, count, count)
    if has_bias:
        yield Weight(part, f"{name} bias", columns, 1, count, count)


def _norms(norm: Norm | None, width: int, count: int, name: str) -> Iterator[Weight]:
    if norm is not None and norm.has_scale:
        yield Weight("norm", f"{name} scale", width, 1, count, count)
    if norm is not None and norm.has_shift:
        yield Weight("norm", f"{name} shift", width, 1, count, count)


# -- counts


def num_params(arch: Architecture) -> int:
    """All parameters that are stored; a tied matrix once."""
    return sum(weight.num_params for weight in weights(arch))


def num_active_params(arch: Architecture) -> int:
    """Those that one token meets: of routed experts, experts_per_token. Embedding and head are counted."""
    return sum(weight.num_active_params for weight in weights(arch))


def num_non_embedding_params(arch: Architecture) -> int:
    """Without embeddings (of tokens, positions, types) and head: N of Kaplan et al. 2020
    (arXiv:2001.08361)."""
    return sum(weight.num_params for weight in weights(arch) if weight.part not in ("embedding", "head"))


def num_multiplied_params(arch: Architecture) -> int:
    """Weights that a token is multiplied with: active ones without embeddings, and the head, tied or not.

    N of `flops_per_token`. A pooler, which sees one token a row, is left out.
    """
    inside = sum(
        w.num_active_params
        for w in weights(arch)
        if w.part != "embedding" and not w.name.startswith("pooler")
    )
    tied = arch.head is not None and arch.head.is_tied
    return inside + (arch.embedding.vocab_size * arch.d_model if tied else 0)


def params_by_part(arch: Architecture) -> dict[str, int]:
    """Parameters of each of PARTS, all of them named; the values add up to `num_params`."""
    found = dict.fromkeys(PARTS, 0)
    for weight in weights(arch):
        found[weight.part] += weight.num_params
    return found


# -- FLOPs


def flops_per_token(arch: Architecture, seq_len: int, convention: str = "palm") -> int:
    """FLOPs of forward and backward for one token of a row of `seq_len` tokens.

    A multiply-add is two FLOPs. N is `num_multiplied_params`; H heads of widths K (queries, keys) and K'
    (values):

    palm     6 N + 6 L H (K + K') S: every query meets every key (Chowdhery et al. 2022, arXiv:2204.02311,
             appendix B)
    causal   the same with half of the scores where a causal mask hides half: not in encoders and not in
             cross-attention
    fused    6 N + (8 K + 6 K') L H S: scores computed once more in the backward pass of fused attention; the
             hardware's work

    With K = K' these are 12, 6 and 14 L H K S, as in llmtrain/model/size.py. Of an encoder-decoder the figure
    is of one input token and one target token together, in rows of `seq_len` on both sides.

    Raises:
        ConfigError: An unknown convention, or a `seq_len` below 1.
    """
    if convention not in FLOPS_CONVENTIONS:
        raise ConfigError(unknown_name("FLOPs convention", convention, FLOPS_CONVENTIONS))
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len} must be at least 1")
    attention = 0
    for count, each in _attentions(arch):
        widths = 6 * (each.head_width + each.width_of_values)
        if convention == "causal" and each.is_causal:
            widths //= 2
        elif convention == "fused":
            widths += 2 * each.head_width
        attention += count * each.num_heads * widths * seq_len
    return 6 * num_multiplied_params(arch) + attention


def hoffmann_flops_per_token(arch: Architecture, seq_len: int, *, with_ends: bool) -> float:
    """FLOPs of forward and backward for one token by appendix F of Hoffmann et al. 2022 (arXiv:2203.15556).

    Products of attention and feed-forward, scores and values over all keys, 3 H S of the softmax, backward
    twice the forward. Neither biases and norms nor matrices of relative positions are in that list. With
    `with_ends`, the logits and the embedding as a product with one-hot rows, as the appendix lists them; its
    table A4 leaves both out.
    """
    skipped = ("relative positions", "relative bias")
    inside = sum(
        weight.num_active_params
        for weight in weights(arch)
        if weight.part in ("attention", "mlp", "experts")
        and weight.columns > 1
        and weight.name not in skipped
    )
    scores = sum(
        count * each.num_heads * (2 * (each.head_width + each.width_of_values) + 3) * seq_len
        for count, each in _attentions(arch)
    )
    ends = 4 * arch.embedding.vocab_size * arch.d_model if with_ends else 0
    return 3.0 * (2 * inside + scores + ends)


def _attentions(arch: Architecture) -> Iterator[tuple[int, Attention]]:
    for stack in arch.stacks:
        for count, block in stack.blocks:
            yield count, block.attention
            if block.cross_attention is not None:
                yield count, block.cross_attention


# -- from and to other descriptions


def from_model_config(cfg: ModelConfig, name: str = "model") -> Architecture:
    """The graph of what llmtrain trains."""
    has_biases, norm = cfg.has_biases, LAYER if cfg.has_biases else RMS
    attention = Attention(
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_width=cfg.width_per_head,
        qkv_bias=has_biases,
        out_bias=has_biases,
    )
    mlp = Mlp(width=cfg.ffn_width, is_gated=cfg.family is Family.llama, has_biases=has_biases)
    blocks = ((cfg.num_layers, Block(attention=attention, ffn=mlp, norm=norm)),)
    return Architecture(
        name=name,
        d_model=cfg.d_model,
        embedding=Embedding(vocab_size=cfg.vocab_size, positions=cfg.max_positions or 0),
        decoder=Stack(blocks=blocks, final_norm=norm),
        head=Head(is_tied=cfg.tie_embeddings),
    )


def columns(arch: Architecture) -> dict[str, float]:
    """The model as keywords of `candidates()`.

    Columns know matrices, biases all or none, and one or two kinds of feed-forward. Vectors of other kinds
    (scales of queries and keys, a router's bias, an embedding's norm) are lost: under 1 in 1,000 parameters.

    Raises:
        ConfigError: Two stacks, blocks with different attention, or more than one kind of dense or expert
        block.
    """
    if len(arch.stacks) != 1:
        raise ConfigError(
            f"{arch.name} has an encoder and a decoder; step time and memory are known for one stack of "
            "blocks, parameters and FLOPs for both"
        )
    (stack,) = arch.stacks
    attentions = {block.attention for _, block in stack.blocks}
    dense = [(count, block.ffn) for count, block in stack.blocks if isinstance(block.ffn, Mlp)]
    sparse = [(count, block.ffn) for count, block in stack.blocks if isinstance(block.ffn, Moe)]
    if len(attentions) > 1 or len({ffn for _, ffn in dense}) > 1 or len({ffn for _, ffn in sparse}) > 1:
        raise ConfigError(
            f"{arch.name} has blocks of more kinds than dense and with experts; step time and memory "
            "take one attention, one dense feed-forward and one kind of experts"
        )
    (attention,) = attentions
    mlp = dense[0][1] if dense else None
    moe = sparse[0][1] if sparse else None
    gates = {ffn.is_gated for ffn in (mlp, moe) if ffn is not None}
    if len(gates) > 1:
        raise ConfigError(
            f"{arch.name} has gated and plain feed-forwards; step time and memory take one kind"
        )
    found = {
        "num_layers": stack.num_layers,
        "d_model": arch.d_model,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_width": attention.head_width,
        "value_width": attention.width_of_values,
        "ffn_width": mlp.width if mlp is not None else 0,
        "is_gated": gates.pop(),
        "vocab_size": arch.embedding.vocab_size,
        "is_tied": arch.head is None or arch.head.is_tied,
        "has_biases": attention.out_bias and attention.qkv_bias,
        "position_rows": arch.embedding.positions + arch.embedding.token_types,
        "query_rank": attention.query_rank,
        "kv_rank": attention.kv_rank,
        "rope_width": attention.rope_width,
    }
    if moe is not None:
        found |= {
            "num_moe_layers": sum(count for count, _ in sparse),
            "num_experts": moe.num_experts,
            "experts_per_token": moe.experts_per_token,
            "expert_width": moe.width,
            "shared_width": moe.shared_width,
        }
    return {name: float(value) for name, value in found.items()}


# -- families and published models

Shape = Mapping[str, int]
"""A row of tables/cost/models.csv: sizes by column, 0 where a cell is empty."""


def _ffn(shape: Shape, *, is_gated: bool, has_biases: bool = False) -> Mlp:
    return Mlp(width=shape["ffn_width"], is_gated=is_gated, has_biases=has_biases)


def _decoder(
    shape: Shape,
    *,
    norm: Norm,
    is_gated: bool,
    has_biases: bool = False,
    qkv_bias: bool = False,
    qk_norm: str = "",
    num_norms: int = 2,
    embedding_norm: Norm | None = None,
    has_router_bias: bool = False,
    relative_matrix: bool = False,
) -> Architecture:
    """One stack of causal blocks; with experts, in all blocks but the first `num_dense_layers`."""
    attention = Attention(
        num_heads=shape["num_heads"],
        num_kv_heads=shape["num_kv_heads"] or shape["num_heads"],
        head_width=shape["head_width"] or shape["d_model"] // shape["num_heads"],
        value_width=shape["value_width"] or None,
        qkv_bias=has_biases or qkv_bias,
        out_bias=has_biases,
        query_rank=shape["query_rank"],
        kv_rank=shape["kv_rank"],
        rope_width=shape["rope_width"],
        qk_norm=qk_norm,
        relative_matrix=relative_matrix,
    )

    def block(ffn: Mlp | Moe) -> Block:
        return Block(attention=attention, ffn=ffn, norm=norm, num_norms=num_norms)

    num_dense = shape["num_dense_layers"] if shape["num_experts"] else shape["num_layers"]
    blocks: list[tuple[int, Block]] = []
    if num_dense:
        blocks.append((num_dense, block(_ffn(shape, is_gated=is_gated, has_biases=has_biases))))
    if shape["num_experts"]:
        moe = Moe(
            num_experts=shape["num_experts"],
            experts_per_token=shape["experts_per_token"],
            width=shape["expert_width"],
            shared_width=shape["shared_width"],
            is_gated=is_gated,
            has_router_bias=has_router_bias,
        )
        blocks.append((shape["num_layers"] - num_dense, block(moe)))
    return Architecture(
        name="",
        d_model=shape["d_model"],
        embedding=Embedding(
            vocab_size=shape["vocab_size"], positions=shape["positions"], norm=embedding_norm
        ),
        decoder=Stack(blocks=tuple(blocks), final_norm=norm),
        head=Head(is_tied=bool(shape["is_tied"])),
    )


def _llama(shape: Shape) -> Architecture:
    """Touvron et al. 2023 (arXiv:2302.13971); with experts, Mixtral (arXiv:2401.04088)."""
    return _decoder(shape, norm=RMS, is_gated=True)


def _gpt2(shape: Shape) -> Architecture:
    """Radford et al. 2019. Without position rows also GPT-NeoX (arXiv:2204.06745): parallel blocks, two
    norms."""
    return _decoder(shape, norm=LAYER, is_gated=False, has_biases=True)


def _bloom(shape: Shape) -> Architecture:
    """GPT-2's blocks, ALiBi, a norm behind the embedding (arXiv:2211.05100, section 3.2)."""
    return _decoder(shape, norm=LAYER, is_gated=False, has_biases=True, embedding_norm=LAYER)


def _olmo2(shape: Shape) -> Architecture:
    """LLaMA with norms over all queries and keys (arXiv:2501.00656, section 3.2)."""
    return _decoder(shape, norm=RMS, is_gated=True, qk_norm="all")


def _qwen2(shape: Shape) -> Architecture:
    """LLaMA with biases on queries, keys and values (arXiv:2407.10671, section 2.2)."""
    return _decoder(shape, norm=RMS, is_gated=True, qkv_bias=True)


def _qwen3(shape: Shape) -> Architecture:
    """LLaMA with norms of each query and key head (arXiv:2505.09388, section 2)."""
    return _decoder(shape, norm=RMS, is_gated=True, qk_norm="head")


def _gemma2(shape: Shape) -> Architecture:
    """Norms before and behind attention and feed-forward (arXiv:2408.00118, section 2)."""
    return _decoder(shape, norm=RMS, is_gated=True, num_norms=4)


def _palm(shape: Shape) -> Architecture:
    """Parallel blocks behind one norm without shift, no biases (arXiv:2204.02311, section 2)."""
    return _decoder(shape, norm=RMS, is_gated=True, num_norms=1)


def _gopher(shape: Shape) -> Architecture:
    """Gopher and Chinchilla: RMSNorm, relative positions as in Transformer-XL, 32,000 words
    (arXiv:2112.11446, section 2.1; arXiv:2203.15556, section 4.1). The matrix of relative positions is what
    the 50 sizes of arXiv:2203.15556, table A9, need: without it they are up to 8% too low. Which linear
    layers have biases is not published; biases of queries, keys, values, the feed-forward and the logits, as
    here, give all 50 as printed."""
    found = _decoder(shape, norm=RMS, is_gated=False, has_biases=True, relative_matrix=True)
    assert found.decoder is not None
    ((count, block),) = found.decoder.blocks
    attention = replace(block.attention, out_bias=False)
    stack = Stack(blocks=((count, replace(block, attention=attention)),), final_norm=RMS)
    return replace(found, decoder=stack, head=Head(is_tied=True, has_bias=True))


def _deepseek_v2(shape: Shape) -> Architecture:
    """Latent attention, shared experts (arXiv:2405.04434, section 2)."""
    return _decoder(shape, norm=RMS, is_gated=True)


def _deepseek_v3(shape: Shape) -> Architecture:
    """As V2, with a bias an expert that balances them (arXiv:2412.19437, section 2.1); without the module
    that predicts a second token."""
    return _decoder(shape, norm=RMS, is_gated=True, has_router_bias=True)


def _t5(shape: Shape) -> Architecture:
    """Raffel et al. 2020 (arXiv:1910.10683): 32 buckets of relative positions, no biases, `num_layers` on
    each side."""

    def attention(is_causal: bool) -> Attention:
        heads = shape["num_heads"]
        return Attention(
            num_heads=heads, num_kv_heads=heads, head_width=shape["head_width"], is_causal=is_causal
        )

    def stack(block: Block) -> Stack:
        return Stack(blocks=((shape["num_layers"], block),), final_norm=RMS, relative_buckets=32)

    ffn = _ffn(shape, is_gated=False)
    encoder = Block(attention=attention(is_causal=False), ffn=ffn, norm=RMS)
    decoder = Block(
        attention=attention(is_causal=True),
        ffn=ffn,
        norm=RMS,
        num_norms=3,
        cross_attention=attention(is_causal=False),
    )
    return Architecture(
        name="",
        d_model=shape["d_model"],
        embedding=Embedding(vocab_size=shape["vocab_size"]),
        encoder=stack(encoder),
        decoder=stack(decoder),
        head=Head(is_tied=bool(shape["is_tied"])),
    )


def _bert(shape: Shape) -> Architecture:
    """Devlin et al. 2019 (arXiv:1810.04805) with its pooler and without the head of the masked words."""
    heads = shape["num_heads"]
    attention = Attention(
        num_heads=heads,
        num_kv_heads=heads,
        head_width=shape["d_model"] // heads,
        qkv_bias=True,
        out_bias=True,
        is_causal=False,
    )
    block = Block(attention=attention, ffn=_ffn(shape, is_gated=False, has_biases=True), norm=LAYER)
    return Architecture(
        name="",
        d_model=shape["d_model"],
        embedding=Embedding(
            vocab_size=shape["vocab_size"], positions=shape["positions"], token_types=2, norm=LAYER
        ),
        encoder=Stack(blocks=((shape["num_layers"], block),), final_norm=None),
        head=None,
        has_pooler=True,
    )


def _bert_mlm(shape: Shape) -> Architecture:
    """What BERT is trained as: the head of the masked words, no pooler."""
    head = Head(is_tied=True, has_bias=True, transform_norm=LAYER)
    return replace(_bert(shape), head=head, has_pooler=False)


FAMILIES: Mapping[str, Callable[[Shape], Architecture]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "olmo2": _olmo2,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "palm": _palm,
    "gopher": _gopher,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "t5": _t5,
    "bert": _bert,
    "bert_mlm": _bert_mlm,
}

SIZES = (
    "num_layers", "d_model", "num_heads", "num_kv_heads", "head_width", "ffn_width", "vocab_size",
    "positions", "is_tied", "num_experts", "experts_per_token", "expert_width", "shared_width",
    "num_dense_layers", "value_width", "query_rank", "kv_rank", "rope_width",
)  # fmt: skip
MODELS_TABLE = Path(__file__).parents[1] / "tables" / "cost" / "models.csv"


def build(family: str, name: str = "model", **sizes: int) -> Architecture:
    """A model of one of FAMILIES from its sizes; those left out are 0.

    num_kv_heads 0: as many as heads. head_width 0: d_model / num_heads.

    Raises:
        ConfigError: An unknown family or size, or d_model, num_layers, num_heads or vocab_size below 1.
    """
    if family not in FAMILIES:
        raise ConfigError(unknown_name("family of models", family, FAMILIES))
    for given in sizes:
        if given not in SIZES:
            raise ConfigError(unknown_name("size of a model", given, SIZES))
    shape = dict.fromkeys(SIZES, 0) | sizes
    for needed in ("num_layers", "d_model", "num_heads", "vocab_size"):
        if shape[needed] < 1:
            raise ConfigError(f"{name}: {needed}={shape[needed]} must be at least 1")
    return replace(FAMILIES[family](shape), name=name)


def model_names() -> list[str]:
    """Names of tables/cost/models.csv."""
    return list(_model_rows())


def find_model(name: str) -> Architecture:
    """A published model by its name in tables/cost/models.csv.

    Raises:
        ConfigError: An unknown name; the message lists the known ones, the nearest first.
    """
    rows = _model_rows()
    if name not in rows:
        raise ConfigError(
            f"{unknown_name('model', name, rows)}. For another one give its sizes, or add a row to "
            "llmtrain/planner/tables/cost/models.csv"
        )
    row = rows[name]
    return build(row["family"], name, **{size: int(row[size] or 0) for size in SIZES})


def _model_rows() -> dict[str, dict[str, str]]:
    lines = MODELS_TABLE.read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}
