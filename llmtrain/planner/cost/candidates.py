"""Candidates as columns: one row is one model on one layout of one cluster. numpy only.

A model is seen as the matrices of its blocks, so that grouped heads, gated MLPs, experts and latent attention
need no formulas of their own. Layers of two kinds, dense and with experts, may be mixed; a stage is taken to
hold its even share of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

NO_RECOMPUTE, SELECTIVE, FULL = range(3)
"""Nothing is computed again; attention's scores, or with fused attention what the kernel recomputes anyway;
whole blocks from their inputs."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All columns are float64 of one length. Counts are of the whole model unless a rank's is said."""

    # the model
    num_layers: np.ndarray
    d_model: np.ndarray
    num_heads: np.ndarray
    num_kv_heads: np.ndarray
    head_width: np.ndarray
    """Of queries and keys."""
    value_width: np.ndarray
    ffn_width: np.ndarray
    is_gated: np.ndarray
    vocab_size: np.ndarray
    is_tied: np.ndarray
    has_biases: np.ndarray
    position_rows: np.ndarray
    """Rows of a learned position embedding; 0 with rotary or no positions."""
    seq_len: np.ndarray
    num_moe_layers: np.ndarray
    num_experts: np.ndarray
    experts_per_token: np.ndarray
    expert_width: np.ndarray
    shared_width: np.ndarray
    query_rank: np.ndarray
    """Width of latent queries (DeepSeek-V2, arXiv:2405.04434); 0: queries come straight from the input."""
    kv_rank: np.ndarray
    """Width of latent keys and values; 0: no latent attention."""
    rope_width: np.ndarray
    """Of latent attention: the part of a key that all heads share."""
    # the layout
    pp: np.ndarray
    vpp: np.ndarray
    dp: np.ndarray
    cp: np.ndarray
    tp: np.ndarray
    ep: np.ndarray
    """Experts lie over ep of the dp * cp ranks."""
    zero_stage: np.ndarray
    micro_batch: np.ndarray
    grad_accum: np.ndarray
    recompute: np.ndarray
    sequence_parallel: np.ndarray
    schedule: np.ndarray
    # the cluster
    peak_flops: np.ndarray
    mem_bytes_s: np.ndarray
    num_multiprocessors: np.ndarray
    gpus_per_node: np.ndarray
    link_bytes_s: np.ndarray
    """NVLink's, a direction, as printed."""
    node_bytes_s: np.ndarray
    """All network cards of a node, a direction, as printed."""

    def __len__(self) -> int:
        return len(self.d_model)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Of a micro batch, on one context-parallel rank."""
        found: np.ndarray = self.micro_batch * self.seq_len / self.cp
        return found

    @cached_property
    def layers_per_rank(self) -> np.ndarray:
        """Of the fullest rank of a pipeline."""
        chunk = np.ceil(self.num_layers / (self.pp * self.vpp))
        found: np.ndarray = np.minimum(chunk * self.vpp, self.num_layers)
        return found

    def rows(self, which: np.ndarray | slice) -> Candidates:
        """Those of a mask, of row numbers or of a slice."""
        return Candidates(**{each.name: getattr(self, each.name)[which] for each in fields(self)})


DEFAULTS: Mapping[str, float] = {
    "is_gated": 0, "is_tied": 0, "has_biases": 0, "position_rows": 0,
    "num_moe_layers": 0, "num_experts": 0, "experts_per_token": 0, "expert_width": 0, "shared_width": 0,
    "query_rank": 0, "kv_rank": 0, "rope_width": 0,
    "pp": 1, "vpp": 1, "dp": 1, "cp": 1, "tp": 1, "ep": 1, "zero_stage": 1, "grad_accum": 1,
    "recompute": NO_RECOMPUTE, "sequence_parallel": 0, "schedule": 0,
}  # fmt: skip


def candidates(**columns: Any) -> Candidates:
    """Columns from numbers and arrays of one length; what is left out is plain: dense, untied, one rank.

    Raises:
        TypeError: A column is unknown or one without a plain value is missing.
    """
    given = {**DEFAULTS, **columns}
    given.setdefault("value_width", given["head_width"])
    length = max(np.size(value) for value in given.values())
    arrays = {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype=np.float64), (length,)))
        for name, value in given.items()
    }
    return Candidates(**arrays)


def stacked(many: list[Candidates]) -> Candidates:
    return Candidates(
        **{each.name: np.concatenate([getattr(c, each.name) for c in many]) for each in fields(Candidates)}
    )


# -- parameters of one layer


def attention_matrices(c: Candidates) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """(outputs, inputs, whether tensor-parallel ranks share it) of each matrix; 0 outputs where it is
    absent."""
    is_latent = c.kv_rank > 0
    queries = c.num_heads * c.head_width
    plain_q = np.where(c.query_rank > 0, 0.0, queries)
    fused = plain_q + np.where(is_latent, 0.0, c.num_kv_heads * (c.head_width + c.value_width))
    unshared = c.head_width - c.rope_width
    return [
        (fused, c.d_model, True),
        (c.query_rank, c.d_model, False),
        (np.where(c.query_rank > 0, queries, 0.0), c.query_rank, True),
        (np.where(is_latent, c.kv_rank + c.rope_width, 0.0), c.d_model, False),
        (np.where(is_latent, c.num_heads * (unshared + c.value_width), 0.0), c.kv_rank, True),
        (c.d_model, c.num_heads * c.value_width, True),
    ]


def attention_params(c: Candidates) -> np.ndarray:
    total = sum((n * k for n, k, _ in attention_matrices(c)), start=np.zeros(len(c)))
    biases = c.has_biases * (c.num_heads * c.head_width + 2 * c.num_kv_heads * c.head_width + c.d_model)
    found: np.ndarray = total + biases + c.query_rank + c.kv_rank  # latent vectors have a norm each
    return found


def norm_params(c: Candidates) -> np.ndarray:
    """Of a layer: two norms, each with a bias where there are biases."""
    found: np.ndarray = 2 * c.d_model * (1 + c.has_biases)
    return found


def dense_mlp_params(c: Candidates) -> np.ndarray:
    found: np.ndarray = (2 + c.is_gated) * c.d_model * c.ffn_width + c.has_biases * (c.ffn_width + c.d_model)
    return found


def expert_params(c: Candidates) -> np.ndarray:
    """All routed experts of a layer."""
    found: np.ndarray = c.num_experts * (2 + c.is_gated) * c.d_model * c.expert_width
    return found


def shared_params(c: Candidates) -> np.ndarray:
    """Router and shared experts of a layer with experts."""
    found: np.ndarray = c.num_experts * c.d_model + (2 + c.is_gated) * c.d_model * c.shared_width
    return found


def embedding_params(c: Candidates) -> np.ndarray:
    found: np.ndarray = (c.vocab_size + c.position_rows) * c.d_model
    return found


def num_params(c: Candidates) -> np.ndarray:
    """All of the model's."""
    dense = c.num_layers - c.num_moe_layers
    blocks = c.num_layers * (attention_params(c) + norm_params(c)) + dense * dense_mlp_params(c)
    blocks = blocks + c.num_moe_layers * (expert_params(c) + shared_params(c))
    ends = embedding_params(c) + (1 - c.is_tied) * c.vocab_size * c.d_model + c.d_model * (1 + c.has_biases)
    found: np.ndarray = blocks + ends
    return found
