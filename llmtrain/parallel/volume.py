"""Bytes that one rank hands to collectives in one optimizer step, by axis and kind. stdlib only.

A collective's bytes are those of the tensor that this rank brings: the whole of what it adds in an all-reduce
or a reduce-scatter, its own piece in an all-gather, all that it deals out in an all-to-all, and what it sends
point to point. They are not what crosses a wire: of b bytes a ring of n ranks sends 2 b (n - 1) / n from each
in an all-reduce, b (n - 1) / n in a reduce-scatter, b (n - 1) in an all-gather.

Left out are single numbers, of at most 8 bytes each and a few a step (sums of losses and targets, norms,
DeepSpeed's flags), and what is said once, before the first step or in it. The formulas are for training
without dropout, whose keys add 8 bytes a position in a pipeline, and for `recompute: full`.
tests/dist/test_volume.py holds every one of them against counted bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llmtrain.parallel.config import ContextKind

FP32, INT32, INT64 = 4, 4, 8
ZERO_ALIGNMENT = 2
"""Elements that the start of every rank's flat partition is a multiple of, at ZeRO 1 and 2
(nccl_start_alignment_factor of DeepSpeed 0.19.8)."""

Volume = dict[str, int]
"""Kind of collective -> bytes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the volume of a pipeline stage depends on. Counts of the model are those of the whole one, not of
    this rank's part."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_positions: int = 0
    """Rows of a table of learned positions, 0 without one."""
    has_biases: bool = False
    """GPT-2's family: biases on every matrix and norm."""
    tie_embeddings: bool = False
    vocab_size: int

    first_layer: int = 0
    num_layers: int
    """Blocks of this pipeline stage, of which `first_layer` is the first."""
    has_embedding: bool = True
    has_head: bool = True
    previous_is_here: bool = False
    next_is_here: bool = False
    """Whether the stage before or after this one is this rank's, too: nothing is sent."""
    ends_meet: bool = False
    """Whether the first and the last stage are one rank's: a tied embedding is then one weight."""
    weights: tuple[tuple[int, ...], ...]
    """Elements of each weight that this rank holds, in all its stages (of ZeRO-3's: before it is split), a
    tuple for each parameter group of the optimizer."""

    micro_batch_rows: int
    seq_len: int
    num_micro_batches: int
    """Of this rank, in a step."""
    element_bytes: int
    """4 in fp32, 2 in bf16."""
    recompute_every: int = 0

    tp_size: int = 1
    cp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    sequence_parallel: bool = False
    context: ContextKind = ContextKind.heads
    zero_stage: int = 1
    persistence_threshold: int = 100_000
    """stage3_param_persistence_threshold: weights of fewer elements stay whole at ZeRO-3. DeepSpeed's
    default."""
    max_reuse_distance: int = 1_000_000_000
    """stage3_max_reuse_distance: DeepSpeed's default."""

    @property
    def num_own_positions(self) -> int:
        """Of a row, after context parallelism has cut it."""
        return self.seq_len // self.cp_size

    @property
    def residual_bytes(self) -> int:
        """x_BSD of one micro batch at this rank's positions, whole over tp."""
        return self.micro_batch_rows * self.num_own_positions * self.d_model * self.element_bytes

    @property
    def num_recomputed(self) -> int:
        """Blocks here that are computed again: those whose number in the model recompute_every divides."""
        if not self.recompute_every:
            return 0
        end = self.first_layer + self.num_layers
        return -(-end // self.recompute_every) - -(-self.first_layer // self.recompute_every)


def bytes_per_step(*stages: Sizes) -> dict[str, Volume]:
    """By axis (tp, cp, pp, data); an axis of one rank, and a kind that sends nothing, is left out.

    Args:
        stages: those of this rank.
    """
    found = {
        "tp": _sum(map(tp_bytes, stages)),
        "cp": _sum(map(cp_bytes, stages)),
        "pp": _sum(map(pp_bytes, stages)),
        "data": data_bytes(stages[0]),
    }
    volumes = {axis: {kind: sent for kind, sent in sorted(v.items()) if sent} for axis, v in found.items()}
    return {axis: volume for axis, volume in volumes.items() if volume}


def _sum(volumes: Iterable[Volume]) -> Volume:
    total: Counter[str] = Counter()
    for volume in volumes:
        total.update(volume)
    return dict(total)


def tp_bytes(sizes: Sizes) -> Volume:
    """Tensor parallelism, parallel/tensor.py. With x = rows * S/cp * d_model * element_bytes, a micro batch:

    | border | forward | backward | computed again |
    |---|---|---|---|
    | enter, 2 a block, 1 at the head | - | all-reduce x | - |
    | leave, 2 a block, 1 at the embedding | all-reduce x | - | 1 a block |
    | under sequence parallelism: enter | all-gather x/tp | reduce-scatter x | 2 a block |
    | leave | reduce-scatter x | all-gather x/tp | 1 a block |
    | loss, at the head | all-gather 3 fp32 numbers a position | - | - |

    A block is computed again up to the last tensor that its backward pass needs, the input of its last
    matrix: the `leave` behind that is not repeated.

    Gradients of weights that several ranks hold, each using them for a part of the work, are summed at every
    micro batch: under sequence parallelism norms, biases added after `leave` and learned positions; with
    fewer key/value heads than ranks, wk and wv of the one head here.
    """
    if sizes.tp_size == 1:
        return {}
    x, micros, layers = sizes.residual_bytes, sizes.num_micro_batches, sizes.num_layers
    ends = sizes.has_embedding + sizes.has_head
    crossings = 4 * layers + ends + sizes.num_recomputed  # each all-reduces once: forward or backward
    loss = 3 * FP32 * sizes.micro_batch_rows * sizes.num_own_positions if sizes.has_head else 0
    summed = 0
    if sizes.sequence_parallel:
        summed += _num_elements_outside_regions(sizes)
    if sizes.num_kv_heads < sizes.tp_size:
        summed += layers * 2 * sizes.head_width * (sizes.d_model + sizes.has_biases)
    summed *= sizes.element_bytes
    if not sizes.sequence_parallel:
        return {"all_reduce": micros * (crossings * x + summed), "all_gather": micros * loss}
    gathers = 4 * layers + ends + 2 * sizes.num_recomputed
    return {
        "all_reduce": micros * summed,
        "all_gather": micros * (gathers * (x // sizes.tp_size) + loss),
        "reduce_scatter": micros * crossings * x,
    }


def _num_elements_outside_regions(sizes: Sizes) -> int:
    """Elements of the weights that every tp rank holds whole."""
    norm_vectors, added = (2, 2) if sizes.has_biases else (1, 0)  # `added`: biases of wo and w_down
    vectors = sizes.num_layers * (2 * norm_vectors + added) + sizes.has_head * norm_vectors
    return sizes.d_model * (vectors + sizes.has_embedding * sizes.num_positions)


def cp_bytes(sizes: Sizes) -> Volume:
    """Context parallelism, parallel/context.py. H and G are heads of this tp rank, s = S/cp.

    heads     all-to-all of q, k, v, rows * s * (H + 2 G r) * K elements, and of the result, rows * s * H * K,
              forward, backward, and where a block is computed again. r: how often a key/value head is sent so
              that each rank's H/cp query heads find theirs: H/G over its greatest common divisor with H/cp.
    sequence  keys and values, rows * 2 G * s * K elements, go to the next rank cp - 1 times, forward,
              backward and computed again. In the backward pass their fp32 gradients follow, cp times: home.
    """
    cp = sizes.cp_size
    if cp == 1:
        return {}
    heads, kv_heads = sizes.num_heads // sizes.tp_size, max(1, sizes.num_kv_heads // sizes.tp_size)
    element = sizes.element_bytes
    each_head = sizes.micro_batch_rows * sizes.num_own_positions * sizes.head_width
    passes = 2 * sizes.num_layers + sizes.num_recomputed
    if sizes.context is ContextKind.heads:
        served = heads // kv_heads
        repeats = served // math.gcd(served, heads // cp)
        there_and_back = each_head * element * (2 * heads + 2 * kv_heads * repeats)
        return {"all_to_all": sizes.num_micro_batches * passes * there_and_back}
    kv = each_head * 2 * kv_heads
    sent = passes * (cp - 1) * kv * element + sizes.num_layers * cp * kv * FP32
    return {"send": sizes.num_micro_batches * sent}


def pp_bytes(sizes: Sizes) -> Volume:
    """DeepSpeed's pipeline: a micro batch goes to the next stage with everything that the blocks need.

    forward   x_BSD (under sequence parallelism S/tp positions of it), positions and targets as int64 at this
              rank's S/cp positions, and segments as int32 of whole rows: from all but the last stage
    backward  the gradient of x_BSD: from all but the first
    a step    the fp32 gradient of a tied embedding is all-reduced between the first stage and the last

    Between two stages of one rank nothing is sent.
    """
    if sizes.pp_size == 1:
        return {}
    x = sizes.residual_bytes // (sizes.tp_size if sizes.sequence_parallel else 1)
    rows = sizes.micro_batch_rows
    told = 2 * INT64 * rows * sizes.num_own_positions + INT32 * rows * sizes.seq_len
    sends_on = not (sizes.has_head or sizes.next_is_here)
    sends_back = not (sizes.has_embedding or sizes.previous_is_here)
    sent = sends_on * (x + told) + sends_back * x
    has_copy = sizes.tie_embeddings and (sizes.has_embedding or sizes.has_head) and not sizes.ends_meet
    tied = sizes.vocab_size // sizes.tp_size * sizes.d_model * FP32 if has_copy else 0
    return {"send": sizes.num_micro_batches * sent, "all_reduce": tied}


def data_bytes(sizes: Sizes) -> Volume:
    """DeepSpeed 0.19.8's ZeRO over n = dp * cp ranks. N: elements of this rank's weights. Gradients travel in
    the weights' dtype, also where they are added up in fp32.

    | stage | gradients | weights |
    |---|---|---|
    | 0 | all-reduce N, once a step | - |
    | 1 | all-reduce N, once a step | all-gather this rank's partition of each group, once a step |
    | 2 | all-reduce N, every micro batch | as 1 |
    | 3 | reduce-scatter N, every micro batch | all-gather its piece of each, see below |

    Stages 1 and 2 all-reduce although a rank needs an n-th: that is what `reduce_scatter: true` does there,
    and the ranks keep their part. A partition is 1/n of a parameter group filled up to a multiple of 2 n; in
    bf16 at stage 1 that filling is reduced with it (DeepSpeed has another class there).

    At stage 3 a piece is the n-th part of a weight, rounded up. A weight below `persistence_threshold` stays
    whole, and its pieces are gathered once a step, after the update. A larger one is gathered in the forward
    pass, every micro batch, and kept for the backward pass if it comes again within `max_reuse_distance`
    elements: by default, in every model of fewer than 1e9 weights. Beyond that it would be gathered twice:
    assumed, not measured.
    """
    num_ranks = sizes.dp_size * sizes.cp_size
    if num_ranks == 1:
        return {}
    element, micros = sizes.element_bytes, sizes.num_micro_batches
    weights = [numel for group in sizes.weights for numel in group]
    if sizes.zero_stage == 3:
        pieces = {numel: -(-numel // num_ranks) for numel in weights}
        is_kept = {numel: numel < sizes.persistence_threshold for numel in weights}
        fetches = 1 if sum(weights) <= sizes.max_reuse_distance else 2
        gathered = sum(pieces[n] * (1 if is_kept[n] else fetches * micros) for n in weights)
        padded = num_ranks * sum(pieces[n] for n in weights)
        return {"all_gather": element * gathered, "reduce_scatter": element * micros * padded}
    multiple = ZERO_ALIGNMENT * num_ranks
    partitions = [-(-sum(group) // multiple) * ZERO_ALIGNMENT for group in sizes.weights]
    is_bf16_class = sizes.zero_stage == 1 and element != FP32
    reduced = num_ranks * sum(partitions) if is_bf16_class else sum(weights)
    return {
        "all_reduce": element * reduced * (micros if sizes.zero_stage == 2 else 1),
        "all_gather": element * sum(partitions) if sizes.zero_stage > 0 else 0,
    }
