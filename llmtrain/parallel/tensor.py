"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053) and its sequence parallelism (Korthikanti et al.
2022, arXiv:2205.05198): the collectives at the borders of a split region, and at the vocabulary.

A region begins with a matrix split by its outputs and ends with one split by its inputs. Outside of regions
every rank of the axis holds the same x_BSD; under sequence parallelism each holds its S/tp positions of it.

| border | forward, backward | with sequence parallelism |
|---|---|---|
| enter | nothing, all-reduce | all-gather along S, reduce-scatter |
| leave | all-reduce, nothing | reduce-scatter along S, all-gather |
| embed | look up own rows, leave | the same |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llmtrain.parallel.groups import Axis

SEQUENCE_DIM = 1


def enter(x_BSD: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """The input of a region, whole on every rank; its gradient is the sum of the ranks'."""
    if axis.group is None:
        return x_BSD
    out: Tensor = (_Gather if sequence_parallel else _Copy).apply(x_BSD, axis)  # type: ignore[no-untyped-call]
    return out


def leave(x_BSD: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """The sum of the ranks' parts of a region's output."""
    if axis.group is None:
        return x_BSD
    out: Tensor = (_Scatter if sequence_parallel else _Reduce).apply(x_BSD, axis)  # type: ignore[no-untyped-call]
    return out


def embed(tokens_BS: Tensor, weight_vD: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """Rows of a table of which this rank holds rows [rank * v, (rank + 1) * v)."""
    if axis.group is None:
        return F.embedding(tokens_BS, weight_vD)
    own_BS = tokens_BS - axis.rank * weight_vD.shape[0]
    outside_BS = (own_BS < 0) | (own_BS >= weight_vD.shape[0])
    x_BSD = F.embedding(own_BS.masked_fill(outside_BS, 0), weight_vD)
    x_BSD = x_BSD.masked_fill(outside_BS[..., None], 0.0)
    return leave(x_BSD, axis, sequence_parallel=sequence_parallel)


def own_positions(positions_BS: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """Those of the S/tp positions that this rank holds outside of regions."""
    if axis.group is None or not sequence_parallel:
        return positions_BS
    return positions_BS.chunk(axis.size, SEQUENCE_DIM)[axis.rank]


def sum_gradient(parameter: Tensor, axis: Axis) -> None:
    """Have the gradient of `parameter` summed over the axis before anything else sees it.

    For what several ranks hold whole and each uses for a part of the work: norms under sequence parallelism,
    a key/value head that several ranks share.
    """

    def total(grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=axis.group)
        return grad

    parameter.register_hook(total)  # type: ignore[no-untyped-call]


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=axis.group)
    return x


def _all_gather(x_BsD: Tensor, axis: Axis) -> Tensor:
    """Along S. Ranks hold consecutive positions."""
    if x_BsD.shape[0] == 1:  # one row lies in memory as it goes over the wire
        out = x_BsD.new_empty(axis.size * x_BsD.shape[1], *x_BsD.shape[2:])
        dist.all_gather_into_tensor(out, x_BsD[0].contiguous(), group=axis.group)
        return out[None]
    parts = [torch.empty_like(x_BsD, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x_BsD.contiguous(), group=axis.group)
    return torch.cat(parts, SEQUENCE_DIM)


def _reduce_scatter(x_BSD: Tensor, axis: Axis) -> Tensor:
    """Along S: the sum of the ranks' x, this rank's positions of it."""
    parts = x_BSD.chunk(axis.size, SEQUENCE_DIM)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(out, torch.cat(parts), group=axis.group)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.axis), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.axis), None
