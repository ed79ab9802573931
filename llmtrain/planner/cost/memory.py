"""Bytes on the fullest rank, by component and by instant of a step, for columns of candidates. numpy only.

Activations are listed operation by operation, so that grouped heads, gated MLPs, experts and latent
attention need no formulas of their own. What a training program does in its own way is data, a
`MemoryProgram`: bytes a weight, what its attention, its loss and its recomputation keep, which buffers it
holds. No program is asked for by name; they are listed in memory_programs.py.

A pipeline's fullest rank may be the first (embedding, most micro batches in flight), one in the middle, or
the last (head and loss). All three are summed and the worst is taken, at the worst of five instants:

    forward    all micro batches in flight have gone through this rank's blocks
    loss       the logits of a micro batch beside them
    backward   the gradients of logits and head; or those inside the last block, computed again where it is
    reduction  gradients are reduced, without activations
    update     the optimizer's step

Not seen: workspaces inside kernels beyond `workspace_bytes`, and a router's unevenness beyond `expert_load`.
Lists of operations are checked against measured peaks in memory_rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from llmtrain.planner.cost import schedule
from llmtrain.planner.cost.candidates import (
    FULL,
    NO_RECOMPUTE,
    SELECTIVE,
    Candidates,
    attention_params,
    dense_mlp_params,
    expert_params,
    norm_params,
    shared_params,
)
from llmtrain.planner.interval import Interval

FP32 = 4.0
CHUNK_ROWS = 8192
"""Candidates at once: few enough for a processor's caches, a third faster than 60,000."""
GIB = 2.0**30
INSTANTS = ("forward", "loss", "backward", "reduction", "update")
PLACES = ("first", "middle", "last")
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "workspace")

ByStage = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
"""For ZeRO stage 0 to 3: (bytes a weight that each data-parallel rank holds, bytes that all of them
share)."""
FourStages = tuple[float, float, float, float]
NONE: ByStage = ((0.0, 0.0),) * 4


def split_from(zero_stage: int, num_bytes: float) -> ByStage:
    """`num_bytes` a weight, shared by data-parallel ranks from this ZeRO stage on."""
    whole, shared = (num_bytes, 0.0), (0.0, num_bytes)
    return (
        shared if zero_stage <= 0 else whole,
        shared if zero_stage <= 1 else whole,
        shared if zero_stage <= 2 else whole,
        shared if zero_stage <= 3 else whole,
    )


@dataclass(frozen=True, kw_only=True)
class MemoryProgram:
    """What a training program keeps: read off its code, save for what says "fitted"."""

    source: str
    element_bytes: float = 2.0
    """Of activations, and of weights in products."""
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    """Those that the program has."""

    # bytes a weight
    weights: ByStage
    gradients: ByStage
    masters: ByStage
    moments: ByStage
    frees_gradients: bool = False
    """Whether there are none between steps, so that with one micro batch the loss comes before them."""

    # activations
    is_fused_attention: bool = True
    """Else probabilities are kept, S numbers a head and token; under dropout their mask and what it leaves,
    too."""
    hidden_dropout: bool = False
    """A mask of one byte an element after attention, MLP and embedding."""
    attention_dropout: bool = False
    keeps_raw_queries: bool = False
    """Queries and keys also before a norm of their own (Henry et al. 2020, arXiv:2010.04245)."""
    gated_kept: float = 3.0
    """Of ffn_width, tensors that a gated MLP keeps: gate, up and their product; 4 where silu(gate) is one
    more."""
    norm_statistics: tuple[float, float] = (4.0, 8.0)
    """Bytes a token and norm: RMSNorm's, LayerNorm's."""
    keeps_gathered: bool = False
    """Under sequence parallelism: norms' outputs are kept gathered, and not gathered again backward."""
    keeps_sent_output: bool = False
    """Under context parallelism: attention's output is kept before and after the exchange."""
    repeats_keys: bool = False
    """Under context parallelism: each rank attends with some heads to all positions, and gets the key/value
    head of each, at least one."""
    expert_load: float = 1.0
    """Tokens of the rank whose experts get most, in parts of an even share; 1 where a capacity caps them.
    Fitted."""
    mask_bytes: float = 0.0
    """A pair of positions of a row, once a micro batch: an additive mask."""
    keeps_rotations: bool = False
    """Cosines and sines, a head's width a token, once a micro batch."""
    selective_keeps: frozenset[str] | None = None
    """Selective recomputation keeps these of a block's tensors: queries, keys, values, out (of attention),
    project, up, gate, down (products), and its input; None: all but "scores" (Korthikanti et al. 2022,
    arXiv:2205.05198, section 5)."""

    # head and loss
    logit_loss: float
    """Bytes a logit at the loss."""
    logit_backward: float
    """Bytes a logit while its gradient is made."""
    logit_loss_shared: float | None = None
    """Bytes a logit at the loss where tp ranks share the vocabulary, if others."""
    loss_chunk_bytes: float = 0.0
    """fp32 logits at once; 0: those of the whole micro batch. In chunks, the gradients of the head and of its
    input are made with the loss, and kept."""
    head_gradient: float = 0.0
    """Bytes a weight of the head while its gradient is made, beside `gradients`."""

    # buffers
    kept_weight_gradients: float = 0.0
    """Bytes a weight of a block, for good: empty gradients handed to autograd, one of each shape, while the
    product adds to the fp32 gradients by itself."""
    gathered_blocks: float = 0.0
    """At ZeRO 3: the largest of block, embedding and head is whole, and so many blocks less one besides."""
    gathered_weights: float = 0.0
    """At ZeRO 3: weights that stay whole when they are that few."""
    reduced_block: float = 0.0
    """At ZeRO 3: bytes a weight of the block whose gradients are on their way."""
    bucket: FourStages = (0.0, 0.0, 0.0, 0.0)
    """By ZeRO stage: bytes of a bucket that gradients are reduced in, from the first backward pass to the
    update, but not at the reduction itself."""
    counts_written_pages: bool = False
    """Whether a bucket counts only up to the weights that go through it: a page of a CPU's memory that nobody
    wrote takes none."""
    filling_bucket: FourStages = (0.0, 0.0, 0.0, 0.0)
    """By ZeRO stage: bytes of a bucket that is there in the backward pass and the reduction alone."""
    pipe_buffers: tuple[float, float, float] = (2.0, 2.0, 2.0)
    """Micro batches between two blocks, sent or received, that a pipeline's first rank, one in the middle and
    the last hold beside what blocks keep."""
    keeps_outputs: bool = False
    """Whether a pipeline's rank keeps what it has sent of each micro batch in flight."""
    reduction: ByStage = NONE
    """Bytes a weight that the reduction adds."""
    update: ByStage = NONE
    """Bytes a weight that the optimizer's step adds."""

    # around
    workspace_bytes: float = 0.0
    """In the allocator: libraries' workspaces. Fitted."""
    expert_workspace_bytes: float = 0.0
    """More of them for the grouped products of experts."""
    slack: float = 0.0
    """Reserved over allocated bytes, less 1. Fitted."""
    context_bytes: float = 0.0
    """On the device, outside the allocator: CUDA's context, NCCL's buffers."""
    spread: tuple[float, float] = (1.0, 1.0)
    """Measured over predicted bytes: 8 in 10 left-out rows lie between. Fitted."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank, float64 columns. The seven COMPONENTS add up to `allocated`."""

    weights: np.ndarray
    gradients: np.ndarray
    optimizer: np.ndarray
    """Masters and moments."""
    activations: np.ndarray
    loss: np.ndarray
    """Logits, their gradients, and gradients of the head and of its input beside `gradients`."""
    buffers: np.ndarray
    """Gathered weights, buckets, gradients in passing, what a pipeline sends and receives."""
    workspace: np.ndarray
    context: np.ndarray
    """Outside the allocator: beside the seven."""
    allocated: np.ndarray
    reserved: np.ndarray
    """allocated and the allocator's slack."""
    device: np.ndarray
    """reserved and context: what must fit."""
    low: np.ndarray
    """Of `device`, as `high`: an 80% interval."""
    high: np.ndarray
    at: Mapping[str, np.ndarray]
    """Instant -> allocated bytes of the fullest rank then."""
    on: Mapping[str, np.ndarray]
    """Place in the pipeline -> allocated bytes there at its fullest instant; 0 where there is no such
    rank."""
    instant: np.ndarray
    """Number in INSTANTS of the fullest one."""
    place: np.ndarray
    """Number in PLACES of the fullest rank."""

    def interval(self, row: int) -> Interval:
        """Of `device`; 8 in 10 measured peaks lie inside."""
        return Interval(low=float(self.low[row]), mid=float(self.device[row]), high=float(self.high[row]))


def memory(
    c: Candidates,
    program: MemoryProgram,
    *,
    layers: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Memory:
    """Bytes on the fullest rank of each candidate.

    Args:
        layers: blocks on the first rank of a pipeline, on each in the middle and on the last, where they are
            known to be uneven. None: `c.layers_per_rank` on all.
    """
    if len(c) > CHUNK_ROWS:
        return _in_chunks(c, program, layers)
    shared = _Shared(c, program)
    counts = layers or (c.layers_per_rank,) * 3
    parts = [shared.parts(place, num_layers) for place, num_layers in enumerate(counts)]
    totals = np.stack([sum(each.values(), start=np.zeros((len(INSTANTS), len(c)))) for each in parts])
    exists = np.stack([np.ones(len(c)), c.pp > 2, c.pp > 1])
    peaks = totals.max(axis=1) * exists
    rows, place = np.arange(len(c)), peaks.argmax(axis=0)
    at = totals[place, :, rows].T
    instant = at.argmax(axis=0)
    columns = {name: np.stack([each[name] for each in parts])[place, instant, rows] for name in COMPONENTS}
    allocated = at[instant, rows]
    reserved = allocated * (1 + program.slack)
    context = np.full(len(c), program.context_bytes)
    low, high = program.spread
    return Memory(
        **columns,
        context=context,
        allocated=allocated,
        reserved=reserved,
        device=reserved + context,
        low=(reserved + context) * low if program.counts_written_pages else reserved * low + context,
        high=(reserved + context) * high if program.counts_written_pages else reserved * high + context,
        at=dict(zip(INSTANTS, at, strict=True)),
        on=dict(zip(PLACES, peaks, strict=True)),
        instant=instant,
        place=place,
    )


def _in_chunks(
    c: Candidates, program: MemoryProgram, layers: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> Memory:
    found = []
    for start in range(0, len(c), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        own = None if layers is None else (layers[0][rows], layers[1][rows], layers[2][rows])
        columns = {each.name: getattr(c, each.name)[rows] for each in fields(c)}
        found.append(memory(replace(c, **columns), program, layers=own))

    def joined(name: str) -> Any:
        parts = [getattr(each, name) for each in found]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return Memory(**{each.name: joined(each.name) for each in fields(Memory)})


# -- what a block keeps of a micro batch, in bytes a token of this rank


def kept_by_attention(c: Candidates, p: MemoryProgram) -> dict[str, np.ndarray]:
    """Of attention with its norm, operation by operation.

    Latent attention keeps both latents before and after their norms; queries and keys are put together from
    two parts each, and kept as attention takes them.
    """
    e, parts = p.element_bytes, _sequence_parts(c)
    is_latent = c.kv_rank > 0
    heads = c.num_heads / c.tp
    kv_heads = np.where(is_latent, heads, np.maximum(1.0, c.num_kv_heads / c.tp))
    if p.repeats_keys:
        kv_heads = np.maximum(kv_heads, np.where(c.cp > 1, c.cp, 1.0))
    queries, keys = e * heads * c.head_width, e * kv_heads * c.head_width
    out = e * heads * c.value_width * np.where((c.cp > 1) & p.keeps_sent_output, 2.0, 1.0)
    rope = np.where(is_latent, c.rope_width, 0.0)
    fused = float(p.is_fused_attention)
    dropped = (e + 1) * p.attention_dropout
    return {
        "input": e * c.d_model / parts,
        "norm": _norm_output(c, p) + _statistics(c, p) / parts,
        "latents": e * (2 * c.query_rank + 2 * c.kv_rank + rope),
        "queries": queries,
        "keys": keys,
        "values": e * kv_heads * c.value_width,
        "raw": (queries + keys) * p.keeps_raw_queries,
        "scores": (1 - fused) * heads * c.seq_len * (e + dropped),
        "out": out + fused * FP32 * heads,
        "mask": c.d_model / parts * p.hidden_dropout,
    }


def kept_by_mlp(c: Candidates, p: MemoryProgram) -> dict[str, np.ndarray]:
    """Of a dense MLP with its norm."""
    e, parts = p.element_bytes, _sequence_parts(c)
    tensors = np.where(c.is_gated > 0, p.gated_kept, 2.0)
    return {
        "input": e * c.d_model / parts,
        "norm": _norm_output(c, p) + _statistics(c, p) / parts,
        "ffn": e * tensors * c.ffn_width / c.tp,
        "mask": c.d_model / parts * p.hidden_dropout,
    }


def kept_by_experts(c: Candidates, p: MemoryProgram) -> dict[str, np.ndarray]:
    """Of experts with their norm and router. Their outputs are not kept: the router's weights are applied to
    what goes into an expert's last matrix."""
    e, parts = p.element_bytes, _sequence_parts(c)
    tensors = np.where(c.is_gated > 0, p.gated_kept, 2.0)
    load = c.experts_per_token * p.expert_load
    return {
        "input": e * c.d_model / parts,
        "norm": e * c.d_model / parts + _statistics(c, p) / parts,
        "router": 2 * FP32 * c.num_experts / parts,
        "routed": e * load * c.d_model,
        "experts": e * load * tensors * c.expert_width / c.tp,
        "shared": e * tensors * c.shared_width / c.tp,
        "mask": c.d_model / parts * p.hidden_dropout,
    }


def _selected(c: Candidates, p: MemoryProgram, names: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """(Attention with its input, MLP) of a block whose named tensors are kept, and the rest computed again.
    Layers with experts keep all of those: assumed, not measured."""
    e, attention = p.element_bytes, kept_by_attention(c, p)
    ffn = e * c.ffn_width / c.tp
    whole = {name: attention[name] for name in ("queries", "keys", "values", "out")}
    whole |= {"project": e * c.d_model}
    inner = {"up": ffn, "gate": ffn * (c.is_gated > 0), "down": e * c.d_model}
    of_attention: np.ndarray = sum((whole[name] for name in sorted(names & set(whole))), attention["input"])
    of_mlp: np.ndarray = sum((inner[name] for name in sorted(names & set(inner))), np.zeros(len(c)))
    return of_attention, of_mlp


def _norm_output(c: Candidates, p: MemoryProgram) -> np.ndarray:
    found: np.ndarray = p.element_bytes * c.d_model / (1.0 if p.keeps_gathered else _sequence_parts(c))
    return found


def _statistics(c: Candidates, p: MemoryProgram) -> np.ndarray:
    found: np.ndarray = np.where(c.has_biases > 0, p.norm_statistics[1], p.norm_statistics[0])
    return found


def _sequence_parts(c: Candidates) -> np.ndarray:
    """Over how many ranks the positions between matrices are spread."""
    found: np.ndarray = np.where(c.sequence_parallel > 0, c.tp, 1.0)
    return found


# -- a rank


class _Shared:
    """What all ranks of a pipeline have in common."""

    def __init__(self, c: Candidates, program: MemoryProgram) -> None:
        self.c, self.p = c, program
        self.data_ranks = c.dp * c.cp
        self.expert_data_ranks = np.maximum(1.0, self.data_ranks / c.ep)
        # weights that a rank holds of one block, of each kind
        router = c.num_experts * c.d_model
        self.attention = attention_params_of_rank(c) + norm_params(c)
        self.mlp = dense_mlp_params(c) / c.tp
        self.router_and_shared = router + (shared_params(c) - router) / c.tp
        self.experts = expert_params(c) / (c.tp * c.ep)
        self.vocabulary = c.vocab_size * c.d_model / c.tp
        self._activations()
        self._states()

    def _states(self) -> None:
        """Bytes a weight on this rank."""
        c, p = self.c, self.p
        zero_stage = c.zero_stage.astype(int)
        self.per_weight, self.per_expert_weight = {}, {}
        for name in ("weights", "gradients", "masters", "moments", "reduction", "update"):
            table: ByStage = getattr(p, name)
            whole, divided = (np.array([row[at] for row in table])[zero_stage] for at in (0, 1))
            self.per_weight[name] = whole + divided / self.data_ranks
            self.per_expert_weight[name] = whole + divided / self.expert_data_ranks

    def _activations(self) -> None:
        c, p = self.c, self.p
        has_experts = c.num_moe_layers > 0
        zero = np.zeros(len(c))
        attention = kept_by_attention(c, p)
        fixed = sum(attention.values(), start=zero)
        dense = fixed + sum(kept_by_mlp(c, p).values(), start=zero)
        routed = fixed + sum(kept_by_experts(c, p).values(), start=zero)
        if p.selective_keeps is None:
            selected, selected_routed = dense - attention["scores"], routed - attention["scores"]
        else:
            of_attention, of_mlp = _selected(c, p, p.selective_keeps)
            selected, selected_routed = of_attention + of_mlp, routed - fixed + of_attention
        modes = [c.recompute == mode for mode in (NO_RECOMPUTE, SELECTIVE, FULL)]
        kept = np.select(modes, [dense, selected, attention["input"]])
        kept_routed = np.select(modes, [routed, selected_routed, attention["input"]])
        self.dense_bytes, self.routed_bytes = c.tokens * kept, c.tokens * kept_routed
        again = c.tokens * np.maximum(dense - kept, np.where(has_experts, routed - kept_routed, 0.0))

        parts = _sequence_parts(c)
        self.x_bytes = p.element_bytes * c.tokens * c.d_model / parts
        self.whole_x_bytes = p.element_bytes * c.tokens * c.d_model
        self.gathered_x = np.where(parts > 1, self.whole_x_bytes, 0.0)
        routed_ffn = np.where(has_experts, c.experts_per_token * c.expert_width, 0.0)
        ffn = np.maximum(c.ffn_width, routed_ffn) / c.tp * np.where(c.is_gated > 0, 2.0, 1.0)
        inside = p.element_bytes * c.tokens * ffn
        self.in_block = again + self.x_bytes + inside + 2 * self.gathered_x * (not p.keeps_gathered)

    def parts(self, place: int, num_layers: np.ndarray) -> dict[str, np.ndarray]:
        """Component -> bytes, instants by candidates, on a pipeline's first, middle or last rank."""
        c, p = self.c, self.p
        # DualPipeV's first rank has the model's last stage, too.
        has_embedding = np.full(len(c), float(place == 0))
        ends_first = (c.pp == 1) | (c.schedule == schedule.DUAL_PIPE_V)
        has_head = np.where(ends_first, place == 0, place == 2).astype(float)
        rank = (np.zeros(len(c)), np.minimum(1.0, c.pp - 1), c.pp - 1)[place]
        num_routed = _layers_with_experts(c, place, num_layers)
        num_dense = num_layers - num_routed

        ties = (c.is_tied > 0) & (has_embedding > 0)
        vocabularies = has_embedding + np.where(ties, 0.0, has_head)
        common = num_layers * self.attention + num_dense * self.mlp + num_routed * self.router_and_shared
        common = common + vocabularies * self.vocabulary + has_embedding * c.position_rows * c.d_model
        common = common + has_head * c.d_model * (1 + c.has_biases)
        experts = num_routed * self.experts

        def states(name: str) -> np.ndarray:
            found: np.ndarray = common * self.per_weight[name] + experts * self.per_expert_weight[name]
            return found

        held = schedule.held_micro_batches(
            c.schedule, pp=c.pp, vpp=c.vpp, num_micro_batches=c.grad_accum, rank=rank
        )
        in_flight = held * self._kept(num_dense, num_routed, has_embedding)
        loss, loss_backward, loss_kept = self._loss(has_head)
        last_norm = has_head * (self.x_bytes + c.tokens * _statistics(c, p) / _sequence_parts(c))
        at_head = in_flight + last_norm
        in_block = in_flight + self.in_block * (num_layers > 0)

        weights, gradients = states("weights"), states("gradients")
        before = gradients * (0.0 if p.frees_gradients else 1.0)
        before = np.where(c.grad_accum > 1, gradients, before)
        workspace = p.workspace_bytes + p.expert_workspace_bytes * (num_routed > 0)
        buffers, on_the_way = self._buffers(place, held, num_dense, num_routed, common + experts)
        most = p.element_bytes * (common + experts) if p.counts_written_pages else np.inf
        bucket = buffers + np.minimum(_of_stage(p.bucket, c), most)
        on_the_way = on_the_way + np.minimum(_of_stage(p.filling_bucket, c), most)
        zero = np.zeros(len(c))
        # One column an instant, with two of `backward`: at the head, and inside a block.
        moving = {
            "gradients": [before, before, before, gradients, gradients, gradients],
            "activations": [at_head, at_head, at_head, in_block, zero, zero],
            "loss": [zero, loss + loss_kept, loss_backward + loss_kept, zero, zero, zero],
            "buffers": [
                bucket,
                bucket,
                bucket,
                bucket + on_the_way,
                buffers + on_the_way + states("reduction"),
                buffers + states("update"),
            ],
        }
        at_head_more, in_block_more = (
            sum((columns[at] for columns in moving.values()), start=zero) for at in (2, 3)
        )
        is_at_head = at_head_more > in_block_more
        parts = {
            name: np.stack([*columns[:2], np.where(is_at_head, columns[2], columns[3]), *columns[4:]])
            for name, columns in moving.items()
        }
        steady = {
            "weights": weights,
            "optimizer": states("masters") + states("moments"),
            "workspace": workspace,
        }
        return parts | {name: np.broadcast_to(each, (len(INSTANTS), len(c))) for name, each in steady.items()}

    def _kept(self, num_dense: np.ndarray, num_routed: np.ndarray, has_embedding: np.ndarray) -> np.ndarray:
        """Of one micro batch through all of this rank's blocks."""
        c, p = self.c, self.p
        rotations = p.element_bytes * c.tokens * c.head_width * p.keeps_rotations * (c.position_rows == 0)
        masks = p.mask_bytes * c.micro_batch * c.seq_len**2
        dropped = c.tokens * c.d_model / _sequence_parts(c) * p.hidden_dropout
        lookup = 9.0 * c.tokens * (c.tp > 1)  # a row number and a flag, of the part of the vocabulary here
        blocks = num_dense * self.dense_bytes + num_routed * self.routed_bytes
        found: np.ndarray = blocks + rotations + masks + has_embedding * (dropped + lookup)
        return found

    def _loss(self, has_head: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Beyond the last norm's input: (at the loss, while gradients are made, at both)."""
        c, p = self.c, self.p
        e, vocab = p.element_bytes, c.vocab_size / c.tp
        x = self.whole_x_bytes
        shared = p.logit_loss if p.logit_loss_shared is None else p.logit_loss_shared
        at_loss = np.where(c.tp > 1, shared, p.logit_loss)
        if not p.loss_chunk_bytes:
            logits = c.tokens * vocab
            products = logits * e + self.vocabulary * p.head_gradient + x + self.gathered_x
            backward = np.maximum(logits * p.logit_backward, products)
            return (
                has_head * (logits * at_loss + self.gathered_x),
                has_head * backward,
                has_head * self.x_bytes,
            )
        rows = np.minimum(c.tokens, np.maximum(128, np.floor(p.loss_chunk_bytes / (FP32 * vocab))))
        kept = x + self.vocabulary * FP32
        loss = rows * (vocab * at_loss + e * c.d_model) + x + self.vocabulary * p.head_gradient
        scaled = kept + self.vocabulary * (e if p.head_gradient else 0.0)
        return has_head * loss, has_head * scaled, has_head * kept

    def _buffers(
        self,
        place: int,
        held: np.ndarray,
        num_dense: np.ndarray,
        num_routed: np.ndarray,
        all_weights: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Through the step, while gradients are made)."""
        c, p = self.c, self.p
        dense = (self.attention + self.mlp) * (num_dense > 0)
        routed = (self.attention + self.router_and_shared + self.experts) * (num_routed > 0)
        block = np.maximum(dense, routed)
        largest = np.maximum(block, self.vocabulary)
        gathered = np.where(p.gathered_blocks > 0, largest + (p.gathered_blocks - 1) * block, 0.0)
        gathered = np.minimum(np.maximum(gathered, p.gathered_weights), all_weights)
        one_expert = self.experts / np.maximum(1.0, c.num_experts / c.ep)
        shapes = np.maximum(dense, self.attention) + (self.router_and_shared + one_expert) * (num_routed > 0)
        is_sharded = c.zero_stage >= 3
        _, middle, last = p.pipe_buffers
        outputs = held * p.keeps_outputs
        of_two_stages = last + outputs if place == 0 else 2 * (middle + outputs)
        of_one = p.pipe_buffers[place] + outputs * (place < 2)
        count = np.where(c.schedule == schedule.DUAL_PIPE_V, of_two_stages, of_one)
        sends = count * self.x_bytes * (c.pp > 1)
        through = is_sharded * gathered * p.element_bytes + p.kept_weight_gradients * shapes + sends
        return through, is_sharded * p.reduced_block * largest


def _of_stage(by_stage: FourStages, c: Candidates) -> np.ndarray:
    found: np.ndarray = np.array(by_stage)[c.zero_stage.astype(int)]
    return found


def attention_params_of_rank(c: Candidates) -> np.ndarray:
    """Of one block on a tp rank: the matrices that make latents lie whole on each, and so does a key/value
    head where there are fewer than ranks."""
    is_latent = c.kv_rank > 0
    whole = np.where(c.query_rank > 0, c.query_rank * (c.d_model + 1), 0.0)
    whole = whole + np.where(is_latent, (c.kv_rank + c.rope_width) * c.d_model + c.kv_rank, 0.0)
    repeated = np.maximum(1.0, c.num_kv_heads / c.tp) - c.num_kv_heads / c.tp
    repeated = np.where(is_latent, 0.0, repeated * (c.head_width + c.value_width) * c.d_model)
    found: np.ndarray = whole + (attention_params(c) - whole) / c.tp + repeated
    return found


def _layers_with_experts(c: Candidates, place: int, num_layers: np.ndarray) -> np.ndarray:
    """Of a rank's blocks. Few dense ones, under a third, come first, as in DeepSeek-V2 and -V3; more are
    taken to be mixed evenly."""
    num_dense = c.num_layers - c.num_moe_layers
    behind_dense = num_layers - np.minimum(num_dense * (place == 0), num_layers)
    mixed = num_layers * c.num_moe_layers / c.num_layers
    found: np.ndarray = np.where(
        num_dense < c.num_layers / 3, np.minimum(behind_dense, c.num_moe_layers), mixed
    )
    return found
