"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in Hugging Face's half-split layout.

Dimension i of a head turns together with dimension i + K/2. (Meta's own LLaMA files pair 2i with 2i + 1;
their weights need a permutation of each head's rows first.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, [B, S, 1, K/2]: made once per forward, for all blocks."""

    cos: Tensor
    sin: Tensor


def rotation(positions_BS: Tensor, *, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2i/K), i in [0, K/2), taken in fp32 and rounded to `dtype` at the end."""
    exponents = torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32) / width
    frequencies = 1.0 / theta**exponents
    angles = (positions_BS[:, :, None].float() * frequencies)[:, :, None, :]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x_BSHK: Tensor, by: Rotation) -> Tensor:
    """Turn every head of `x_BSHK` by its position's angles."""
    if torch.compiler.is_compiling():  # it fuses the plain words, and stumbles over `out`
        first, second = x_BSHK.chunk(2, dim=-1)
        return torch.cat((first * by.cos - second * by.sin, second * by.cos + first * by.sin), dim=-1)
    turned: Tensor = _Rotate.apply(x_BSHK, by.cos, by.sin)  # type: ignore[no-untyped-call]
    return turned


def _turn(x_BSHK: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x_BSHK.shape[-1] // 2
    out_BSHK = torch.empty_like(x_BSHK, memory_format=torch.contiguous_format)
    first, second = x_BSHK[..., :half], x_BSHK[..., half:]
    torch.mul(first, cos, out=out_BSHK[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_BSHK[..., half:]).addcmul_(first, sin, value=sign)
    return out_BSHK


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing of x is kept, and each way is four half passes."""

    @staticmethod
    def forward(ctx: Any, x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BSHK, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None
