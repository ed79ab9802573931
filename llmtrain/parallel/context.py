"""Context parallelism: the positions of a row are spread over ranks, and attention brings them together.

| kind | a rank holds | attention |
|---|---|---|
| heads | S/cp consecutive positions | all-to-all to all positions of H/cp heads, and back |
| sequence | chunks r and 2cp-1-r of 2cp | keys and values go round a ring of ranks |

Heads: Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv:2309.14509). Sequence: Liu et al. 2023 (ring attention,
arXiv:2310.01889), with a softmax put together from parts as in FlashAttention-2 (Dao 2023, arXiv:2307.08691).
It is cut zig-zag because of the causal mask: of consecutive positions the last rank's would be most of the
work (Llama 3, Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2).

`c` stands for the positions of one chunk, `t` for some of its queries, and `R` for H/G, the query heads that
one key/value head serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.groups import Axis

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]

POSITION_DIM = 1


def own_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two of the 2 * size chunks of a row that a rank holds under the zig-zag cut."""
    return rank, 2 * size - 1 - rank


def own_positions(x_BS: Tensor, axis: Axis, *, zigzag: bool) -> Tensor:
    """This rank's columns: one run of S/cp of them, or under `zigzag` two runs of S/(2cp)."""
    num_chunks = 2 * axis.size if zigzag else axis.size
    num_positions = x_BS.shape[POSITION_DIM]
    assert num_positions % num_chunks == 0, f"{num_positions} positions do not make {num_chunks} equal chunks"
    chunks = x_BS.chunk(num_chunks, POSITION_DIM)
    if not zigzag:
        return chunks[axis.rank]
    return torch.cat([chunks[at] for at in own_chunks(axis.rank, axis.size)], POSITION_DIM)


def own_mask(segments_BS: Tensor, dtype: torch.dtype, axis: Axis) -> Tensor:
    """Additive [B, 1, s, S] for `attend_over_sequence`: this rank's queries, and all keys in row order.

    Query i sees key j, 0 in place of -inf, when j <= i and both are of one segment.
    """
    places_1S = torch.arange(segments_BS.shape[1], device=segments_BS.device)[None]
    own_places_1s = own_positions(places_1S, axis, zigzag=True)
    own_segments_Bs = own_positions(segments_BS, axis, zigzag=True)
    hidden_BsS = own_segments_Bs[:, :, None] != segments_BS[:, None, :]
    hidden_BsS.logical_or_(places_1S[:, None, :] > own_places_1s[:, :, None])
    mask_BsS = torch.zeros(hidden_BsS.shape, dtype=dtype, device=segments_BS.device)
    return mask_BsS.masked_fill_(hidden_BsS, -torch.inf)[:, None]


# --- heads: all-to-all


def attend_over_heads(
    q_BHsK: Tensor,
    k_BGsK: Tensor,
    v_BGsK: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    *,
    axis: Axis,
    attend: Attend,
) -> Tensor:
    """Attention over whole rows, of which this rank holds S/cp consecutive positions. Returns out_BHsK.

    One all-to-all takes the rank to all positions of H/cp query heads and of the key/value heads that those
    need, a second one takes the result back. A key/value head that the heads of several ranks need is sent to
    each of them.

    Args:
        mask: what `attend` takes for whole rows, [B, 1, S, S].
        attend: (q_BhSK, k_BgSK, v_BgSK, mask, is_causal) -> out_BhSK, where each key/value head serves h/g
            consecutive query heads.
    """
    if axis.group is None:
        return attend(q_BHsK, k_BGsK, v_BGsK, mask, is_causal)
    num_heads, num_kv_heads = q_BHsK.shape[1], k_BGsK.shape[1]
    assert num_heads % axis.size == 0, f"{num_heads} heads are not a multiple of cp_size={axis.size}"
    repeats = kv_repeats(num_heads, num_kv_heads, axis.size)
    k_BGsK, v_BGsK = _repeat_heads(k_BGsK, repeats), _repeat_heads(v_BGsK, repeats)
    to_heads: Any = _ToHeads.apply
    q_BhSK, k_BgSK, v_BgSK = to_heads(q_BHsK, k_BGsK, v_BGsK, axis)
    out_BhSK = attend(q_BhSK, k_BgSK, v_BgSK, mask, is_causal)
    to_positions: Any = _ToPositions.apply
    out_BHsK: Tensor = to_positions(out_BhSK, axis)
    return out_BHsK


def kv_repeats(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often each key/value head is there when the heads have been cut into `size` equal runs, so that
    within each run every one serves equally many consecutive query heads."""
    served = num_heads // num_kv_heads
    return served // math.gcd(served, num_heads // size)


def _repeat_heads(x_BGsK: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return x_BGsK
    return x_BGsK[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _heads_from_positions(parts: tuple[Tensor, ...], axis: Axis) -> tuple[Tensor, ...]:
    """Of each [B, H, s, K] its [B, h, S, K], all in one exchange. H may differ between them."""
    num_rows, _, num_own, width = parts[0].shape
    widths = [part.shape[1] // axis.size for part in parts]
    wire = parts[0].new_empty(axis.size, num_own, num_rows, sum(widths), width)
    for part, room in zip(parts, torch.split(wire, widths, dim=3), strict=True):
        room.copy_(part.view(num_rows, axis.size, -1, num_own, width).permute(1, 3, 0, 2, 4))
    heard = torch.empty_like(wire)
    dist.all_to_all_single(heard, wire, group=axis.group)
    whole_SBhK = heard.flatten(0, 1)  # positions lie in order as they came: no copy on this side
    return tuple(part.permute(1, 2, 0, 3) for part in torch.split(whole_SBhK, widths, dim=2))


def _positions_from_heads(parts: tuple[Tensor, ...], axis: Axis) -> tuple[Tensor, ...]:
    """The way back: of each [B, h, S, K] its [B, H, s, K]."""
    num_rows, _, num_positions, width = parts[0].shape
    widths = [part.shape[1] for part in parts]
    wire = parts[0].new_empty(axis.size, num_positions // axis.size, num_rows, sum(widths), width)
    for part, room in zip(parts, torch.split(wire.flatten(0, 1), widths, dim=2), strict=True):
        room.copy_(part.permute(2, 0, 1, 3))
    heard = torch.empty_like(wire)
    dist.all_to_all_single(heard, wire, group=axis.group)
    # [cp, s, B, h, K] -> [B, s, H, K] in memory: the order in which the projections read it
    return tuple(
        part.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)
        for part in torch.split(heard, widths, dim=3)
    )


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHsK: Tensor, k_BGsK: Tensor, v_BGsK: Tensor, axis: Axis) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return _heads_from_positions((q_BHsK, k_BGsK, v_BGsK), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_positions_from_heads(grads, ctx.axis), None


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_BhSK: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _positions_from_heads((out_BhSK,), axis)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _heads_from_positions(grads, ctx.axis)[0], None


# --- sequence: the ring


SCORES_BYTES = 1 << 28
"""fp32 scores at once: a query chunk is worked on in as many pieces as that takes. Assumed, not measured."""


def attend_over_sequence(
    q_BHsK: Tensor,
    k_BGsK: Tensor,
    v_BGsK: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    *,
    axis: Axis,
    queries_at_once: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v over whole rows, cut zig-zag over the ranks. Returns out_BHsK.

    Keys and values go round the ring while this rank works on those it has. Scores, sums and gradients that
    are added up are fp32; a product takes its factors in the dtype of q.

    Args:
        mask: `own_mask`: every query must see itself, and nothing after itself.
        queries_at_once: of a chunk; None takes as many as keep the scores within SCORES_BYTES.
    """
    assert mask is not None, "the ring needs the mask of this rank's queries: is_causal says too little"
    assert not is_causal, "the mask says who sees whom"
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHsK, k_BGsK, v_BGsK))
    apply: Any = _RingAttention.apply
    out_BHsK: Tensor = apply(q_BHsK, k_BGsK, v_BGsK, mask, axis, queries_at_once, wants_grad)
    return out_BHsK


def chunk_products(rank: int, step: int, size: int) -> list[tuple[int, int]]:
    """(query chunk, key chunk) that `rank` works on at a step of the ring, when it has the keys and values
    of rank - step. Key chunks after the query chunk are left out: nobody sees later positions.

    At step 0 there are 3, after it 2, whatever the rank.
    """
    holder = (rank - step) % size
    return [
        (query, key) for query in own_chunks(rank, size) for key in own_chunks(holder, size) if key <= query
    ]


def _pass_on(told: Tensor, heard: Tensor, axis: Axis, *, tag: int) -> list[dist.Work]:
    """Send `told` to the next rank, and fill `heard` from the one before. Leave both alone until then."""
    following, preceding = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, told, following, axis.group, tag),
            dist.P2POp(dist.irecv, heard, preceding, axis.group, tag),
        ]
    )


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [batch, ., .], summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


@dataclass(frozen=True)
class _Shape:
    """B, G, R, s, K of this rank's queries, and how to read the mask."""

    num_rows: int
    num_kv_heads: int
    num_served: int
    num_own: int
    width: int
    queries_at_once: int

    @classmethod
    def of(cls, q_BHsK: Tensor, k_BGsK: Tensor, queries_at_once: int | None) -> _Shape:
        num_rows, num_heads, num_own, width = q_BHsK.shape
        num_kv_heads = k_BGsK.shape[1]
        assert num_own % 2 == 0, f"{num_own} positions are not two chunks"
        assert num_heads % num_kv_heads == 0, f"{num_heads} heads, {num_kv_heads} key/value heads"
        fitting = SCORES_BYTES // (4 * num_rows * num_heads * (num_own // 2))
        at_once = max(1, queries_at_once or fitting)
        return cls(num_rows, num_kv_heads, num_heads // num_kv_heads, num_own, width, at_once)

    @property
    def chunk(self) -> int:
        return self.num_own // 2

    def pieces(self, rank: int, step: int, size: int) -> Iterator[tuple[slice, slice, slice]]:
        """Of every chunk product in turn: some of this rank's queries, the keys among those that the ring
        has brought, and the same keys in the row."""
        mine, theirs = own_chunks(rank, size), own_chunks((rank - step) % size, size)
        for query, key in chunk_products(rank, step, size):
            first = mine.index(query) * self.chunk
            keys = theirs.index(key) * self.chunk
            for start in range(first, first + self.chunk, self.queries_at_once):
                yield (
                    slice(start, min(start + self.queries_at_once, first + self.chunk)),
                    slice(keys, keys + self.chunk),
                    slice(key * self.chunk, (key + 1) * self.chunk),
                )

    def queries(self, x_BHsK: Tensor, some: slice) -> Tensor:
        """[B * G, R * t, K]: the query heads of one key/value head below one another."""
        return x_BHsK[:, :, some].reshape(self.num_rows * self.num_kv_heads, -1, self.width)

    def keys(self, x_BGsK: Tensor, some: slice) -> Tensor:
        """[B * G, c, K]."""
        return x_BGsK[:, :, some].flatten(0, 1)

    def back(self, x: Tensor) -> Tensor:
        """[B * G, R * t, .] -> [B, H, t, .]."""
        return x.view(self.num_rows, self.num_kv_heads * self.num_served, -1, x.shape[-1])

    def scores(self, q: Tensor, k: Tensor, mask_B1tc: Tensor) -> Tensor:
        """[B, H, t, c], masked."""
        scores_BHtc = self.back(_product(q, k.transpose(1, 2)))
        return scores_BHtc.mul_(self.width**-0.5).add_(mask_B1tc)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHsK: Tensor,
        k_BGsK: Tensor,
        v_BGsK: Tensor,
        mask_B1sS: Tensor,
        axis: Axis,
        queries_at_once: int | None,
        wants_grad: bool,
    ) -> Tensor:
        shape = _Shape.of(q_BHsK, k_BGsK, queries_at_once)
        wide_BHsK = torch.zeros(q_BHsK.shape, dtype=torch.float32, device=q_BHsK.device)
        sum_BHs1 = wide_BHsK.new_zeros(*q_BHsK.shape[:3], 1)
        # The least finite number: a query that sees nothing of the first chunk adds exp(-inf - it) = 0.
        largest_BHs1 = torch.full_like(sum_BHs1, torch.finfo(torch.float32).min)
        kv_2BGsK = torch.stack([k_BGsK, v_BGsK])
        next_2BGsK = torch.empty_like(kv_2BGsK)
        for step in range(axis.size):
            is_last = step == axis.size - 1
            coming = [] if is_last else _pass_on(kv_2BGsK, next_2BGsK, axis, tag=0)
            for some, keys, in_row in shape.pieces(axis.rank, step, axis.size):
                k, v = shape.keys(kv_2BGsK[0], keys), shape.keys(kv_2BGsK[1], keys)
                scores_BHtc = shape.scores(shape.queries(q_BHsK, some), k, mask_B1sS[:, :, some, in_row])
                before_BHt1 = largest_BHs1[:, :, some]
                largest_BHt1 = torch.maximum(before_BHt1, scores_BHtc.amax(-1, keepdim=True))
                exp_BHtc = scores_BHtc.sub_(largest_BHt1).exp_()
                shrink_BHt1 = (before_BHt1 - largest_BHt1).exp_()
                largest_BHs1[:, :, some] = largest_BHt1
                sum_BHs1[:, :, some].mul_(shrink_BHt1).add_(exp_BHtc.sum(-1, keepdim=True))
                exp = exp_BHtc.to(q_BHsK.dtype).view(k.shape[0], -1, shape.chunk)
                wide_BHsK[:, :, some].mul_(shrink_BHt1).add_(shape.back(_product(exp, v)))
            _wait(coming)
            kv_2BGsK, next_2BGsK = next_2BGsK, kv_2BGsK
        # [B, s, H, K] in memory: the order in which the output projection reads it
        out_BHsK = q_BHsK.new_empty(wide_BHsK.transpose(1, 2).shape).transpose(1, 2)
        out_BHsK.copy_(wide_BHsK.div_(sum_BHs1))
        if wants_grad:
            log_sum_BHs1 = sum_BHs1.log_().add_(largest_BHs1)
            ctx.save_for_backward(q_BHsK, k_BGsK, v_BGsK, mask_B1sS, out_BHsK, log_sum_BHs1)
            ctx.shape, ctx.axis = shape, axis
        return out_BHsK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Keys and values go round once more, and behind them their gradients, one hop further: home."""
        q_BHsK, k_BGsK, v_BGsK, mask_B1sS, out_BHsK, log_sum_BHs1 = ctx.saved_tensors
        shape: _Shape = ctx.shape
        axis: Axis = ctx.axis
        dtype, grad_out_BHsK = q_BHsK.dtype, grads[0]
        # Σ_j p_j dp_j, which the gradient of a softmax subtracts (FlashAttention-2, section 3.1, D)
        mean_BHs1 = (grad_out_BHsK.float() * out_BHsK.float()).sum(-1, keepdim=True)
        grad_q_BHsK = torch.zeros(q_BHsK.shape, dtype=torch.float32, device=q_BHsK.device)
        kv_2BGsK = torch.stack([k_BGsK, v_BGsK])
        next_2BGsK = torch.empty_like(kv_2BGsK)
        heard_2BGsK = torch.empty_like(kv_2BGsK, dtype=torch.float32)
        returning: list[dist.Work] = []
        for step in range(axis.size):
            is_last = step == axis.size - 1
            coming = [] if is_last else _pass_on(kv_2BGsK, next_2BGsK, axis, tag=0)
            grad_kv_2BGsK = torch.zeros_like(heard_2BGsK)
            for some, keys, in_row in shape.pieces(axis.rank, step, axis.size):
                k, v = shape.keys(kv_2BGsK[0], keys), shape.keys(kv_2BGsK[1], keys)
                q, grad_out = shape.queries(q_BHsK, some), shape.queries(grad_out_BHsK, some)
                scores_BHtc = shape.scores(q, k, mask_B1sS[:, :, some, in_row])
                prob_BHtc = scores_BHtc.sub_(log_sum_BHs1[:, :, some]).exp_()
                prob = prob_BHtc.to(dtype).view(k.shape[0], -1, shape.chunk)
                grad_v = _product(prob.transpose(1, 2), grad_out)
                grad_prob_BHtc = shape.back(_product(grad_out, v.transpose(1, 2)))
                grad_scores_BHtc = grad_prob_BHtc.sub_(mean_BHs1[:, :, some]).mul_(prob_BHtc)
                grad_scores_BHtc.mul_(shape.width**-0.5)
                grad_scores = grad_scores_BHtc.to(dtype).view(k.shape[0], -1, shape.chunk)
                grad_q_BHsK[:, :, some] += shape.back(_product(grad_scores, k))
                grad_k = _product(grad_scores.transpose(1, 2), q)
                grad_kv_2BGsK[0, :, :, keys] += grad_k.view(shape.num_rows, -1, *grad_k.shape[1:])
                grad_kv_2BGsK[1, :, :, keys] += grad_v.view(shape.num_rows, -1, *grad_v.shape[1:])
            if step > 0:
                _wait(returning)
                grad_kv_2BGsK += heard_2BGsK
            if axis.size > 1:
                leaving_2BGsK = grad_kv_2BGsK  # alive until it has been sent
                returning = _pass_on(leaving_2BGsK, heard_2BGsK, axis, tag=1)
            _wait(coming)
            kv_2BGsK, next_2BGsK = next_2BGsK, kv_2BGsK
        _wait(returning)
        grad_k_BGsK, grad_v_BGsK = (heard_2BGsK if axis.size > 1 else grad_kv_2BGsK).to(dtype)
        return grad_q_BHsK.to(dtype), grad_k_BGsK, grad_v_BGsK, None, None, None, None
