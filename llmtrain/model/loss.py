"""Summed cross entropy, in nats. Callers divide by the number of valid targets, over micro-batches and ranks.

`linear_sum_cross_entropy` takes the head's matrix product in as well and works on a few rows at a time, so
the logits of a whole micro-batch never exist: at a vocabulary of 128k and 8,192 tokens they are 2 GiB in
bf16, and 4 more in fp32. The gradients are taken in the forward pass, while the logits are there (the method
of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2), so nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TARGET = -100
"""Target of a position that predicts nothing: padding, or the last token of a document."""


def sum_cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """-Σ log softmax(logits)[target] over targets other than NO_TARGET: an fp32 scalar."""
    logits_TV, targets_T = logits_BSV.flatten(0, -2).float(), targets_BS.flatten()
    return F.cross_entropy(logits_TV, targets_T, ignore_index=NO_TARGET, reduction="sum")


def linear_sum_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, rows_at_once: int | None = None
) -> Tensor:
    """`sum_cross_entropy` of x @ weight^T, with the logits of only `rows_at_once` positions in memory.

    Args:
        rows_at_once: None picks what suits the device.
    """
    rows = rows_at_once or _rows_at_once(weight_VD)
    wants_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    apply: Any = _LinearCrossEntropy.apply
    total: Tensor = apply(x_TD, weight_VD, targets_T, rows, wants_grad)
    return total


CACHED_LOGITS_BYTES = 8 << 20
"""fp32 logits at once on a CPU: few enough to stay in cache from one pass to the next. Measured on one core
of a Xeon with AMX, 4,096 positions, V = 8,192, bf16: 140 ms at 8 MiB, 253 ms at 128 MiB, 336 ms without
chunks."""
CUDA_LOGITS_BYTES = 1 << 30
"""fp32 logits at once on a GPU: enough rows for a full-speed matrix product. Assumed, not measured."""


def _rows_at_once(weight_VD: Tensor) -> int:
    budget = CUDA_LOGITS_BYTES if weight_VD.is_cuda else CACHED_LOGITS_BYTES
    return max(128, budget // (4 * weight_VD.shape[0]))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, rows_at_once: int, wants_grad: bool
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        is_wide = x_TD.dtype == torch.float32
        # Buffers of one chunk, used again by the next: to free and to ask again costs page faults on a CPU.
        logits_buffer = x_TD.new_empty(min(rows_at_once, x_TD.shape[0]), weight_VD.shape[0])
        wide_buffer = logits_buffer if is_wide else torch.empty_like(logits_buffer, dtype=torch.float32)
        log_probs_buffer = torch.empty_like(wide_buffer)
        if wants_grad:
            grad_x_TD = torch.empty_like(x_TD)
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
            addend_VD = None if is_wide else torch.empty_like(weight_VD)
            wide_addend_VD = None if is_wide else torch.empty_like(grad_weight_VD)
        for start in range(0, x_TD.shape[0], rows_at_once):
            part = slice(start, start + rows_at_once)
            x_tD, targets_t = x_TD[part], targets_T[part]
            num_rows = x_tD.shape[0]
            valid_t1 = (targets_t != NO_TARGET)[:, None]
            index_t1 = targets_t[:, None].clamp_min(0)
            logits_tV = torch.mm(x_tD, weight_VD.T, out=logits_buffer[:num_rows])
            wide_tV = logits_tV if is_wide else wide_buffer[:num_rows].copy_(logits_tV)
            log_probs_tV = torch.log_softmax(wide_tV, -1, out=log_probs_buffer[:num_rows])
            loss -= (log_probs_tV.gather(1, index_t1) * valid_t1).sum()
            if not wants_grad:
                continue
            # d loss / d logits = softmax - onehot(target); rows without a target are zeroed further on.
            grad_tV = log_probs_tV.exp_()
            grad_tV.scatter_add_(1, index_t1, torch.full_like(index_t1, -1.0, dtype=torch.float32))
            if not is_wide:
                grad_tV = logits_tV.copy_(grad_tV)
            torch.mm(grad_tV, weight_VD, out=grad_x_TD[part]).mul_(valid_t1)
            x_tD = x_tD * valid_t1
            if addend_VD is None or wide_addend_VD is None:
                torch.addmm(grad_weight_VD, grad_tV.T, x_tD, out=grad_weight_VD)
            else:
                torch.mm(grad_tV.T, x_tD, out=addend_VD)
                grad_weight_VD += wide_addend_VD.copy_(addend_VD)
        if wants_grad:
            ctx.save_for_backward(grad_x_TD, grad_weight_VD)
            ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]  # multiplied in fp32: rounded to bf16 it would bend every gradient by up to 0.4%
        scaled_x_TD = (grad_x_TD.float() * scale).to(grad_x_TD.dtype)
        return scaled_x_TD, (grad_weight_VD * scale).to(ctx.weight_dtype), None, None, None
