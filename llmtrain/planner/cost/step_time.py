"""Seconds of a step, by component, for columns of candidates.

A block's pass is matrix products, attention, operations that memory bounds, and collectives. The host
launches kernels at its own pace: a pass takes as long as the slower of the two. Few constants, each of one
cause:

| part | seconds |
|---|---|
| products | FLOPs / (peak * gemm_efficiency) * (1 + k_half / depth) * (1 + SMs / (2 * tiles)): a tile's |
| | pipeline fills and drains, and half of the last wave of tiles idles |
| attention | FLOPs / (peak * attention_efficiency) when fused, else products and passes over the scores |
| elementwise | bytes of a list of operations / (memory bandwidth * memory_efficiency) |
| launches | launch_s a forward pass of a block, 1.5 times that backward, where longer than the kernels |
| collectives | collectives.py, with the links' and the network's efficiency, and what hides them |
| all of it | times slowdown on many nodes: what no single cost explains (stragglers, clocks, data) |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmtrain.planner.cost import collectives, schedule
from llmtrain.planner.cost.candidates import (
    FULL,
    SELECTIVE,
    Candidates,
    attention_matrices,
    attention_params,
    dense_mlp_params,
    embedding_params,
    expert_params,
    norm_params,
    shared_params,
)

TILE = 128
"""Rows and columns of an output tile: CUTLASS's common choice on tensor cores."""
GEMM_DEPTH = 55.0
"""k at which a product runs at half its speed, on an A100: filling and draining a tile's pipeline takes its
time whatever the tile's speed, so the k of another GPU is larger by its peak a multiprocessor. Assumed:
vTrain's rows fit as well with anything from 0 to 120."""
A100_FLOPS_PER_MULTIPROCESSOR = 312e12 / 108
MISALIGNED = 0.45
"""Speed of products with a side that is no multiple of 8 (tensor cores want 16 bytes; NVIDIA, "Matrix
multiplication background user's guide"). Assumed: no row that is fitted has one."""
SEQUENCE_PARALLEL_COST = 1.25
"""Of a gather and a scatter over an all-reduce of the same bytes (arXiv:2205.05198, section 6.1, names it):
the 0.44 ms by which a forward pass of table 4 gains less than its elementwise operations, over 1.7 ms."""
LOSS_LAUNCHES = 2.4
"""Launches of embedding, last norm, head and loss, in parts of a block's: vTrain's rows fit best with 2 to
4."""
OPTIMIZER_BYTES = 30.0
"""Read and written a weight by Adam in mixed precision: gradient, master and both moments read, the latter
three written, and a 16-bit copy: 16 + 12 + 2. Half or twice of it fits vTrain's rows as well."""


@dataclass(frozen=True, kw_only=True)
class Software:
    """What a training program does: as its code says, or where that leaves a number open, as its rows say. No
    fold of calibration.py chooses these again."""

    is_fused_attention: bool = True
    attention_backward: float = 2.5
    """Backward over forward seconds of fused attention: five products for two (FlashAttention-2,
    arXiv:2307.08691, section 3.1.2). Triton's first kernel: 3.5, which llm-foundry's rows fit best."""
    element_bytes: float = 2.0
    """Of activations and weights, in memory and on the wire."""
    checkpoint_stops_early: bool = False
    """Whether a block's last product is not computed again: its output is nobody's saved input (torch 2.1,
    torch.utils.checkpoint.set_checkpoint_early_stop). With it llm-foundry's rows are 1.8% off in the mean on
    H100, without 2.0%."""
    balances_context: bool = True
    """Whether context-parallel ranks get an early and a late piece of each row. Else the last one attends to
    all keys while others wait: 2 - 1 / cp times the mean."""
    selective_products: float = 0.0
    """Of what selective recomputation runs again: the share of a block's products (torchtitan keeps every
    other one: 1/2), ..."""
    selective_attention: bool = True
    """... attention (Megatron-LM recomputes that alone, arXiv:2205.05198), ..."""
    selective_elementwise: bool = False
    """... and all that lies between products."""
    elementwise_passes: float = 1.0
    """Of the bytes below, how many times they are moved: under 1 where a compiler fuses operations with each
    other, over 1 where a norm or a rotation is a chain of fp32 operations."""
    loss_bytes: float = 30.0
    """Moved a logit by the loss, forward and backward; about 10 when it is one kernel."""
    grad_bytes: float = 2.0
    """Of a gradient on the wire."""
    all_reduces: bool = False
    """Whether gradients are all-reduced at ZeRO 1 and 2, too, and not reduce-scattered."""
    dp_overlap: float = 0.0
    """Share of a step's computation behind which gradients (ZeRO 3: weights, too) are sent."""
    tp_overlap: float = 0.0
    """Share of tensor-parallel collectives hidden behind products."""
    overlaps_tp_backward: bool = False
    """Whether the collectives of a backward pass run beside the products for gradients of weights
    (Megatron-LM since 2021, LinearWithGradAccumulationAndAsyncAllreduce)."""
    context: str = "gather"
    """What context-parallel ranks exchange: keys and values of all of them (gather; a ring moves as many
    bytes), or heads, where cp divides a tensor-parallel rank's, for whole rows (heads: all-to-all,
    arXiv:2309.14509), else gather."""
    overlaps_experts: bool = False
    """Whether under DualPipe tokens travel to experts and back behind another micro batch's computation
    (arXiv:2412.19437, section 3.2.1)."""
    sends_once_a_node: bool = False
    """Whether a token goes to a node once, for all its experts there (DeepEP, arXiv:2412.19437, section
    3.2.2)."""
    splits_sends: bool = False
    """Whether a stage's ranks send a part each of what all of them hold (arXiv:2104.04473, section 4.1;
    DeepSpeed's PartitionedTensor)."""
    overlaps_sends: bool = False
    """Whether sends of an interleaved pipeline run beside its computation (Megatron-LM, overlap_p2p_comm)."""
    product_speed: float = 1.0
    """Products at fp8 run at up to 2 of the 16-bit peak."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Of one family: a GPU with a program. Fitted by planner/cost/calibration.py."""

    gemm_efficiency: float = 0.9
    attention_efficiency: float = 0.6
    expert_efficiency: float = 1.0
    """Of experts' products, over that of dense ones: uneven and grouped, with permutations around them."""
    memory_efficiency: float = 0.75
    launch_s: float = 3e-4
    link_efficiency: float = collectives.LINK_EFFICIENCY
    node_efficiency: float = 0.7
    contention: float = 0.3
    """Seconds lost a second of communication that runs beside computation: both want the same multiprocessors
    and memory."""
    slowdown: float = 1.0
    """Of runs on more than one node."""
    fixed_s: float = 2e-3
    """A step: what does not grow with anything."""
    gradient_bytes: float = 0.0
    """Moved a weight of a rank by what handles gradients beside the optimizer: into buckets, norm, clipping,
    flat copies and back; once a step, from ZeRO 2 on in every micro batch."""
    call_s: float = collectives.CALL_S
    """Start of a collective."""
    is_synchronous: bool = False
    """Whether a kernel's launch and its run take turns, as on a CPU; else launches run ahead."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on its slowest rank; the parts add up to `total`."""

    products: np.ndarray
    attention: np.ndarray
    elementwise: np.ndarray
    launches: np.ndarray
    recompute: np.ndarray
    loss: np.ndarray
    """Head and loss."""
    tp: np.ndarray
    cp: np.ndarray
    ep: np.ndarray
    pp: np.ndarray
    dp: np.ndarray
    """Exposed."""
    bubble: np.ndarray
    optimizer: np.ndarray
    other: np.ndarray
    """Slowdown and fixed seconds."""

    @property
    def total(self) -> np.ndarray:
        found: np.ndarray = sum(
            (getattr(self, name) for name in self.__dataclass_fields__), start=np.zeros_like(self.products)
        )
        return found


def step_time(c: Candidates, software: Software, k: Constants) -> StepTime:
    links = collectives.Links(
        gpus_per_node=c.gpus_per_node,
        link_bytes_s=c.link_bytes_s * k.link_efficiency,
        node_bytes_s=c.node_bytes_s * k.node_efficiency,
        call_s=k.call_s,
    )
    products, products_backward = _block_products(c, software, k)
    attention, attention_backward = _attention(c, software, k)
    elementwise = _elementwise_bytes(c, software) / (c.mem_bytes_s * k.memory_efficiency)
    loss = _loss_s(c, software, k)
    tp, cp, ep = _tp_s(c, links, software), _cp_s(c, links, software), _ep_s(c, links, software, k)
    tp_backward = _exposed(tp, products_backward / 2, k.contention) if software.overlaps_tp_backward else tp

    # one block, one micro batch
    gpu_forward = products + attention + elementwise
    if software.overlaps_experts:
        is_dual = (c.schedule == schedule.DUAL_PIPE_V) & (c.pp > 1)
        ep = np.where(is_dual, _exposed(ep, gpu_forward, k.contention), ep)
    gpu_backward = products_backward + attention_backward + 1.5 * elementwise
    launch_forward = _launch_s(gpu_forward, k.launch_s, k)
    launch_backward = _launch_s(gpu_backward, 1.5 * k.launch_s, k)
    is_full, is_selective = c.recompute == FULL, c.recompute == SELECTIVE
    full = gpu_forward + launch_forward
    if software.checkpoint_stops_early:
        full = full - _last_product_s(c, software, k)
    selective = software.selective_products * products
    if software.selective_attention:
        selective = selective + attention
    if software.selective_elementwise:
        selective = selective + elementwise
    again = is_full * full + is_selective * selective
    tp_block = (1 + is_full) * tp + tp_backward
    other_block = (2 + is_full) * (cp + ep)
    forward_block = gpu_forward + launch_forward + tp + cp + ep
    backward_block = gpu_backward + launch_backward + again + tp_block - tp + other_block - cp - ep

    num_layers, m = c.layers_per_rank, c.grad_accum
    passes = m * num_layers  # of a step, through one block of the fullest rank
    bubble = schedule.bubble_s(
        c.schedule,
        pp=c.pp,
        vpp=c.vpp,
        forward=num_layers * forward_block,
        backward=num_layers * backward_block,
        weight=num_layers * products_backward / 2,
    )
    block = gpu_forward + launch_forward + gpu_backward + launch_backward + again
    window = num_layers * (block + tp_block) + loss
    reductions = np.where(c.zero_stage >= 2, m, np.where(c.zero_stage == 1, 1.0, 0.0))
    state_bytes = OPTIMIZER_BYTES * _owned_params(c) + k.gradient_bytes * reductions * rank_params(c)
    parts = {
        "products": passes * (products + products_backward),
        "attention": passes * (attention + attention_backward),
        "elementwise": passes * 2.5 * elementwise,
        "launches": passes * (launch_forward + launch_backward),
        "recompute": passes * again,
        "loss": m * loss,
        "tp": passes * tp_block,
        "cp": passes * (2 + is_full) * cp,
        "ep": passes * (2 + is_full) * ep,
        "bubble": bubble,
    }
    on_many_nodes = c.pp * c.dp * c.cp * c.tp > c.gpus_per_node
    slower = on_many_nodes * (k.slowdown - 1) * sum(parts.values())
    return StepTime(
        **parts,
        pp=_pp_s(c, links, software),
        dp=_dp_s(c, links, software, k, window=window),
        optimizer=state_bytes / c.mem_bytes_s,
        other=slower + k.fixed_s,
    )


def _launch_s(gpu: np.ndarray, host: float, k: Constants) -> np.ndarray:
    """What a pass of `gpu` seconds takes longer because its kernels are launched in `host` seconds: in all
    nearly the larger of the two, for kernels of different lengths blur the edge. The power 4 is assumed."""
    if k.is_synchronous:
        return np.full_like(gpu, host)
    squared = gpu * gpu
    found: np.ndarray = np.sqrt(np.sqrt(squared * squared + host**4)) - gpu
    return found


def _tiles(side: np.ndarray) -> np.ndarray:
    return np.ceil(side * (1 / TILE))


def _product_s(
    m: np.ndarray, n: np.ndarray, depth: np.ndarray, c: Candidates, software: Software, k: Constants
) -> np.ndarray:
    """Seconds of an m x depth by depth x n product; 0 where a side is 0."""
    base = m * n * depth * (2 / (software.product_speed * k.gemm_efficiency)) / c.peak_flops
    tiles = np.maximum(_tiles(m) * _tiles(n), 1.0)
    found: np.ndarray = (
        base * (1 + _half_depth(c) / np.maximum(depth, 1.0)) * (1 + c.num_multiprocessors / 2 / tiles)
    )
    return found


def _half_depth(c: Candidates) -> np.ndarray:
    found: np.ndarray = c.peak_flops / c.num_multiprocessors * (GEMM_DEPTH / A100_FLOPS_PER_MULTIPROCESSOR)
    return found


def _three(
    rows: np.ndarray, n: np.ndarray, depth: np.ndarray, c: Candidates, software: Software, k: Constants
) -> tuple[np.ndarray, np.ndarray]:
    """Forward, and both backward products, of a layer with `depth` inputs and `n` outputs: `_product_s` of
    (rows, n, depth), (rows, depth, n) and (n, depth, rows)."""
    base = rows * n * depth * (2 / (software.product_speed * k.gemm_efficiency)) / c.peak_flops
    half, wave = _half_depth(c), c.num_multiprocessors / 2
    of_rows, of_n, of_depth = (np.maximum(_tiles(side), 1.0) for side in (rows, n, depth))
    forward = base * (1 + half / np.maximum(depth, 1.0)) * (1 + wave / (of_rows * of_n))
    to_inputs = (1 + half / np.maximum(n, 1.0)) * (1 + wave / (of_rows * of_depth))
    to_weights = (1 + half / np.maximum(rows, 1.0)) * (1 + wave / (of_n * of_depth))
    return forward, base * (to_inputs + to_weights)


def _block_products(c: Candidates, software: Software, k: Constants) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a block's products, forward and backward, dense and expert layers averaged."""
    forward, backward = np.zeros(len(c)), np.zeros(len(c))

    def add(
        rows: np.ndarray, n: np.ndarray, depth: np.ndarray, times: np.ndarray | float, *, skip: bool
    ) -> None:
        nonlocal forward, backward
        if skip:
            return
        ahead, back = _three(rows, n, depth, c, software, k)
        forward, backward = forward + times * ahead, backward + times * back

    matrices = attention_matrices(c)
    for at, (n, depth, is_split) in enumerate(matrices):
        is_out = at == len(matrices) - 1
        n_here = n / c.tp if is_split and not is_out else n
        depth_here = depth / c.tp if is_out else depth
        add(c.tokens, n_here, depth_here, 1.0, skip=not n.any())
    dense = 1 - c.num_moe_layers / c.num_layers
    for n, depth in (((1 + c.is_gated) * c.ffn_width / c.tp, c.d_model), (c.d_model, c.ffn_width / c.tp)):
        add(c.tokens, n, depth, dense, skip=not dense.any())
    moe = 1 - dense
    if moe.any():
        on_rank = np.maximum(1.0, c.num_experts / c.ep)
        each = np.maximum(1.0, c.tokens * c.experts_per_token / on_rank)
        for n, depth in (
            ((1 + c.is_gated) * c.expert_width / c.tp, c.d_model),
            (c.d_model, c.expert_width / c.tp),
        ):
            add(each, n, depth, moe * on_rank / k.expert_efficiency, skip=False)
        for n, depth in (
            ((1 + c.is_gated) * c.shared_width / c.tp, c.d_model),
            (c.d_model, c.shared_width / c.tp),
        ):
            add(c.tokens, n, depth, moe, skip=not c.shared_width.any())
    return forward, backward


def _last_product_s(c: Candidates, software: Software, k: Constants) -> np.ndarray:
    found: np.ndarray = _product_s(c.tokens, c.d_model, c.ffn_width / c.tp, c, software, k) * (
        1 - c.num_moe_layers / c.num_layers
    )
    return found


def _attention(c: Candidates, software: Software, k: Constants) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of scores and values of a block, forward and backward. Every key counts, as in published
    figures: a kernel that skips what a causal mask hides shows as a higher efficiency."""
    flops = 2 * c.tokens * c.seq_len * c.num_heads / c.tp * (c.head_width + c.value_width)
    if software.is_fused_attention:
        uneven = 1.0 if software.balances_context else 2 - 1 / c.cp
        forward = flops * uneven / (c.peak_flops * k.attention_efficiency)
        return forward, software.attention_backward * forward
    heads = c.micro_batch * c.num_heads / c.tp
    scores = _batched_s(c.seq_len / c.cp, c.seq_len, c.head_width, heads, c, k)
    values = _batched_s(c.seq_len / c.cp, c.value_width, c.seq_len, heads, c, k)
    moved = 4.5 * software.element_bytes * heads * c.seq_len * c.seq_len / c.cp
    passes = moved / (c.mem_bytes_s * k.memory_efficiency)
    products = scores + values
    return products + passes, 2 * products + 1.5 * passes


def _batched_s(
    m: np.ndarray, n: np.ndarray, depth: np.ndarray, count: np.ndarray, c: Candidates, k: Constants
) -> np.ndarray:
    flops = 2 * m * n * depth * count / (c.peak_flops * k.gemm_efficiency)
    tiles = np.maximum(1.0, np.ceil(m / TILE) * np.ceil(n / TILE) * count)
    found: np.ndarray = flops * (1 + _half_depth(c) / depth) * (1 + c.num_multiprocessors / (2 * tiles))
    return found


def _elementwise_bytes(c: Candidates, software: Software) -> np.ndarray:
    """Read and written by a block's forward pass without its products, 16-bit: norms 2 x 2 D, biases, dropout
    and residuals 2 x 3.5 D; rotary positions of queries and keys; GELU 2 F, or SiLU and gate 3 F, of a
    rank."""
    whole = 11 * c.d_model / np.where(c.sequence_parallel > 0, c.tp, 1.0)
    rotated = np.where(c.position_rows > 0, 0.0, 2 * (c.num_heads + c.num_kv_heads) * c.head_width / c.tp)
    dense = 1 - c.num_moe_layers / c.num_layers
    per_token = dense * c.ffn_width + (1 - dense) * (c.shared_width + c.experts_per_token * c.expert_width)
    activated = (2 + c.is_gated) * per_token / c.tp
    routed = (1 - dense) * 4 * c.experts_per_token * c.d_model  # to experts' order and back
    moved = software.element_bytes * software.elementwise_passes
    found: np.ndarray = moved * c.tokens * (whole + rotated + activated + routed)
    return found


def _loss_s(c: Candidates, software: Software, k: Constants) -> np.ndarray:
    """Embedding, head and loss of a micro batch, forward and backward."""
    vocab = c.vocab_size / c.tp
    forward, backward = _three(c.tokens, vocab, c.d_model, c, software, k)
    speed = np.where(vocab % 8 == 0, 1.0, MISALIGNED)
    passes = c.tokens * vocab * software.loss_bytes / (c.mem_bytes_s * k.memory_efficiency)
    found: np.ndarray = (
        (forward + backward) * software.product_speed / speed + passes + LOSS_LAUNCHES * k.launch_s
    )
    return found


# -- collectives


def _tp_s(c: Candidates, links: collectives.Links, software: Software) -> np.ndarray:
    """Of a forward pass of a block: two all-reduces of its activations, or as many bytes gathered and
    scattered."""
    num_bytes = software.element_bytes * c.tokens * c.d_model
    each = collectives.all_reduce_s(num_bytes, links, size=c.tp, stride=np.ones(len(c)))
    apart = np.where(c.sequence_parallel > 0, SEQUENCE_PARALLEL_COST, 1.0)
    found: np.ndarray = 2 * apart * (1 - software.tp_overlap) * each
    return found


def _cp_s(c: Candidates, links: collectives.Links, software: Software) -> np.ndarray:
    """Keys and values of all ranks, gathered, or heads exchanged: `Software.context`. Nothing is hidden."""
    width = np.where(
        c.kv_rank > 0, c.num_heads * (c.head_width + c.value_width), 2 * c.num_kv_heads * c.head_width
    )
    num_bytes = software.element_bytes * c.tokens * c.cp * width / c.tp
    gathered = collectives.all_gather_s(num_bytes, links, size=c.cp, stride=c.tp)
    if software.context == "gather" or not (c.cp > 1).any():
        return gathered
    # of a tensor-parallel rank; a key/value head goes to every rank whose query heads need it, as in
    # parallel/volume.py cp_bytes
    heads, kv_heads = c.num_heads / c.tp, np.maximum(1.0, c.num_kv_heads / c.tp)
    divides = (c.num_heads % (c.tp * c.cp) == 0) & (heads % kv_heads == 0) & (c.kv_rank == 0)
    served = np.where(divides, heads / kv_heads, 1.0).astype(np.int64)
    repeats = served / np.gcd(served, np.where(divides, heads / c.cp, 1.0).astype(np.int64))
    sent = software.element_bytes * c.tokens * c.head_width * (2 * heads + 2 * kv_heads * repeats)
    exchanged = collectives.all_to_all_s(sent, links, size=c.cp, stride=c.tp)
    exchanged = exchanged + np.where(c.cp > 1, links.call_s, 0.0)  # q, k and v go at once, the result back
    found: np.ndarray = np.where(divides, exchanged, gathered)
    return found


def _ep_s(c: Candidates, links: collectives.Links, software: Software, k: Constants) -> np.ndarray:
    """Tokens to their experts and back, in the layers that have some. Experts lie over tp's ranks, too, where
    dp * cp ranks are fewer than ep."""
    if not c.num_moe_layers.any():
        return np.zeros(len(c))
    stride = np.maximum(1.0, np.minimum(c.tp, c.tp * c.dp * c.cp / c.ep))
    num_bytes = software.element_bytes * c.tokens * c.experts_per_token * c.d_model / c.tp
    copies = 1.0
    if software.sends_once_a_node:
        nodes = c.ep / collectives.ranks_per_node(links, size=c.ep, stride=stride)
        chosen = np.maximum(c.experts_per_token, 1.0)
        copies = nodes * (1 - (1 - 1 / nodes) ** chosen) / chosen
    each = collectives.all_to_all_s(num_bytes, links, size=c.ep, stride=stride, outside_share=copies)
    found: np.ndarray = 2 * c.num_moe_layers / c.num_layers * each
    return found


def _pp_s(c: Candidates, links: collectives.Links, software: Software) -> np.ndarray:
    """Sends of a step that nothing hides: two a micro batch and chunk, those of the first one's way
    included."""
    is_split = (c.sequence_parallel > 0) | software.splits_sends
    num_bytes = software.element_bytes * c.tokens * c.d_model / np.where(is_split, c.tp, 1.0)
    each = collectives.send_s(num_bytes, links, stride=c.tp * c.cp * c.dp)
    exposed = c.grad_accum
    if software.overlaps_sends:
        exposed = np.where(c.schedule == schedule.INTERLEAVED, 0.0, exposed)
    found: np.ndarray = np.where(c.pp > 1, (exposed + c.pp - 1) * c.vpp * 2 * each, 0.0)
    return found


def _dp_s(
    c: Candidates, links: collectives.Links, software: Software, k: Constants, *, window: np.ndarray
) -> np.ndarray:
    """Exposed seconds of a step.

    | ZeRO | once a step | in every micro batch |
    |---|---|---|
    | 0 | gradients all-reduced | |
    | 1 | gradients reduce-scattered, weights gathered | |
    | 2 | weights gathered | gradients reduce-scattered |
    | 3 | | weights gathered twice, gradients reduce-scattered |

    Each hides behind one micro batch's computation and tensor-parallel collectives, `window`. A ring that
    waits for the network leaves the GPU's memory alone meanwhile: its contention is less by as much. Experts'
    weights go round the ranks that hold the same ones, dp * cp / ep of them.
    """
    size, stride = c.dp * c.cp, c.tp
    contention = k.contention * collectives.ring_bytes_s(links, size=size, stride=stride) / links.link_bytes_s
    hides = software.dp_overlap * window
    scattered = _sharded_s(c, links, software.grad_bytes)
    gathered = _sharded_s(c, links, software.element_bytes)
    if software.all_reduces:
        scattered = scattered * np.where((c.zero_stage == 1) | (c.zero_stage == 2), 2.0, 1.0)
    found = np.zeros(len(c))
    for stage in (0, 1, 2, 3):
        here = c.zero_stage == stage
        if not here.any():
            continue
        if stage == 3:
            each = 2 * gathered + scattered
            first = each / np.maximum(c.num_layers, 1.0)  # the first block's weights: nothing runs meanwhile
            seconds = c.grad_accum * (first + _exposed(each - first, hides, contention))
        elif stage == 2:
            seconds = (c.grad_accum - 1) * _exposed(scattered, hides, contention)
            seconds = seconds + _exposed(scattered + gathered, hides, contention)
        else:
            seconds = _exposed(scattered + (gathered if stage else scattered), hides, contention)
        found = np.where(here, seconds, found)
    return found


def _sharded_s(c: Candidates, links: collectives.Links, bytes_a_weight: float) -> np.ndarray:
    """Seconds to gather, or to reduce and scatter, all weights of a rank over the ranks that share them."""
    experts = rank_expert_params(c)
    num_bytes = bytes_a_weight * (rank_params(c) - experts)
    found = collectives.all_gather_s(num_bytes, links, size=c.dp * c.cp, stride=c.tp)
    if not experts.any():
        return found
    of_experts = collectives.all_gather_s(
        bytes_a_weight * experts, links, size=_expert_copies(c), stride=c.tp * c.ep
    )
    return found + np.where(experts > 0, of_experts, 0.0)


def _expert_copies(c: Candidates) -> np.ndarray:
    """Ranks that hold the same experts."""
    found: np.ndarray = np.maximum(1.0, c.dp * c.cp / c.ep)
    return found


def _owned_params(c: Candidates) -> np.ndarray:
    """Weights that a rank's optimizer updates."""
    is_sharded, experts = c.zero_stage >= 1, rank_expert_params(c)
    dense = (rank_params(c) - experts) / np.where(is_sharded, c.dp * c.cp, 1.0)
    found: np.ndarray = dense + experts / np.where(is_sharded, _expert_copies(c), 1.0)
    return found


def _exposed(seconds: np.ndarray, window: np.ndarray, contention: np.ndarray | float) -> np.ndarray:
    """What does not fit behind `window` seconds of computation, and of what does, the share by which it slows
    it."""
    hidden = np.minimum(seconds, window)
    found: np.ndarray = seconds - hidden + contention * hidden
    return found


def rank_params(c: Candidates) -> np.ndarray:
    """Weights of the fullest rank before any sharding over data-parallel ranks: its layers with one end's
    matrix."""
    dense = 1 - c.num_moe_layers / c.num_layers
    layer = attention_params(c) + dense * dense_mlp_params(c)
    layer = layer + (1 - dense) * (shared_params(c) + expert_params(c) / c.ep)
    end = np.where(
        c.pp > 1, c.vocab_size * c.d_model, embedding_params(c) + (1 - c.is_tied) * c.vocab_size * c.d_model
    )
    found: np.ndarray = (c.layers_per_rank * layer + end) / c.tp + c.layers_per_rank * norm_params(c)
    return found


def rank_expert_params(c: Candidates) -> np.ndarray:
    """Those of them that are routed experts'."""
    found: np.ndarray = c.layers_per_rank * c.num_moe_layers / c.num_layers * expert_params(c) / c.ep / c.tp
    return found
