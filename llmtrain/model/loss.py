"""Summed cross entropy, in nats. Callers divide by the number of valid targets, over all micro-batches and ranks.

`linear_sum_cross_entropy` takes the head's matrix product in as well and works on a few rows at a time, so the logits
of a whole micro-batch never exist: at a vocabulary of 128k and 8,192 tokens that is 2 GiB of bf16, and twice that in
fp32, saved. The gradients are taken in the forward pass, while the logits are there (the method of Liger-Kernel,
Hsu et al. 2024, arXiv:2410.10989, section 3.2): nothing is computed twice.
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
    """`sum_cross_entropy` of x @ weight^T, without the logits of more than `rows_at_once` positions in memory.

    Args:
        rows_at_once: None picks a number that fills about LOGITS_BYTES.
    """
    rows = rows_at_once or _rows_at_once(weight_VD.shape[0])
    wants_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    total: Tensor = _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, rows, wants_grad)  # type: ignore[no-untyped-call]
    return total


LOGITS_BYTES = 1 << 25
"""Target size of a chunk's fp32 logits."""


def _rows_at_once(vocab_size: int) -> int:
    return max(256, LOGITS_BYTES // (4 * vocab_size))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, rows_at_once: int, wants_grad: bool
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if wants_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
        for start in range(0, x_TD.shape[0], rows_at_once):
            part = slice(start, start + rows_at_once)
            x_tD, targets_t = x_TD[part], targets_T[part]
            valid_t1 = (targets_t != NO_TARGET)[:, None]
            index_t1 = targets_t[:, None].clamp_min(0)
            log_probs_tV = F.log_softmax(x_tD @ weight_VD.T, dim=-1, dtype=torch.float32)
            loss -= (log_probs_tV.gather(1, index_t1) * valid_t1).sum()
            if grad_x_TD is None or grad_weight_VD is None:
                continue
            # d loss / d logits = softmax - onehot(target), and 0 where there is no target.
            grad_tV = log_probs_tV.exp_()
            grad_tV.scatter_add_(1, index_t1, torch.full_like(index_t1, -1.0, dtype=torch.float32))
            grad_tV = (grad_tV.mul_(valid_t1)).to(x_TD.dtype)
            torch.mm(grad_tV, weight_VD, out=grad_x_TD[part])
            if grad_tV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_tV.T, x_tD)
            else:
                grad_weight_VD += grad_tV.T @ x_tD
        if grad_x_TD is not None and grad_weight_VD is not None:
            ctx.save_for_backward(grad_x_TD, grad_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_x_TD * scale.to(grad_x_TD.dtype),
            grad_weight_VD * scale.to(grad_weight_VD.dtype),
            None,
            None,
            None,
        )
