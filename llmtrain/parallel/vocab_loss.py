"""Summed cross entropy over a vocabulary of which every rank holds a part (Shoeybi et al. 2019,
arXiv:1909.08053, section 3), with the head's matrix product taken in.

Like the loss of one process, it works on a few positions at a time and takes the gradients in the forward
pass, while the logits are there (the method of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2).
For every such chunk the ranks say three numbers a position in one all-gather: the largest of their logits,
the sum of exp(logit - largest), and the target's logit where they hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.groups import Axis

NO_TARGET = -100
"""Target of a position that predicts nothing. Below row 0 of every rank, so nobody holds it."""

CPU_LOGITS_BYTES = 8 << 20
CUDA_LOGITS_BYTES = 1 << 30
"""fp32 logits at once on this rank: the budgets of the loss of one process."""


def vocab_parallel_sum_cross_entropy(
    x_TD: Tensor, head_vD: Tensor, targets_T: Tensor, axis: Axis, *, rows_at_once: int | None = None
) -> Tensor:
    """-Σ log softmax(x @ head^T)[target] over targets other than NO_TARGET: an fp32 scalar, in nats.

    The value is the whole sum on every rank. The gradient of x is this rank's part of it, for the border of
    the region to sum; that of the head is complete.

    Args:
        x_TD: the same on all ranks of `axis`.
        head_vD: rows [axis.rank * v, (axis.rank + 1) * v) of the head.
        targets_T: rows of the whole head, the same on all ranks.
        rows_at_once: positions whose logits exist at one time, the same on all ranks. None picks what suits
            the device.
    """
    rows = rows_at_once or _rows_at_once(head_vD)
    wants_grad = torch.is_grad_enabled() and (x_TD.requires_grad or head_vD.requires_grad)
    apply: Any = _VocabParallelCrossEntropy.apply
    total: Tensor = apply(x_TD, head_vD, targets_T, axis, rows, wants_grad)
    return total


def _rows_at_once(head_vD: Tensor) -> int:
    budget = CUDA_LOGITS_BYTES if head_vD.is_cuda else CPU_LOGITS_BYTES
    return max(128, budget // (4 * head_vD.shape[0]))


def _from_all(told: Tensor, axis: Axis) -> Tensor:
    """What each rank tells, along a new first dimension."""
    if axis.group is None:
        return told[None]
    heard = told.new_empty(axis.size * told.shape[0], *told.shape[1:])
    dist.all_gather_single(heard, told, group=axis.group)
    return heard.view(axis.size, *told.shape)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        head_vD: Tensor,
        targets_T: Tensor,
        axis: Axis,
        rows_at_once: int,
        wants_grad: bool,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        is_wide = x_TD.dtype == torch.float32
        num_own = head_vD.shape[0]
        # Buffers of one chunk, used again by the next: to free and to ask again costs page faults on a CPU.
        logits_buffer = x_TD.new_empty(min(rows_at_once, x_TD.shape[0]), num_own)
        wide_buffer = logits_buffer if is_wide else torch.empty_like(logits_buffer, dtype=torch.float32)
        if wants_grad:
            grad_x_TD = torch.empty_like(x_TD)
            grad_head_vD = torch.zeros_like(head_vD, dtype=torch.float32)
            addend_vD = None if is_wide else torch.empty_like(head_vD)
            wide_addend_vD = None if is_wide else torch.empty_like(grad_head_vD)
        for start in range(0, x_TD.shape[0], rows_at_once):
            part = slice(start, start + rows_at_once)
            x_tD, targets_t = x_TD[part], targets_T[part]
            num_rows = x_tD.shape[0]
            valid_t1 = (targets_t != NO_TARGET)[:, None]
            own_t1 = targets_t[:, None] - axis.rank * num_own
            is_own_t1 = (own_t1 >= 0) & (own_t1 < num_own)
            index_t1 = own_t1.clamp(0, num_own - 1)
            logits_tv = torch.mm(x_tD, head_vD.T, out=logits_buffer[:num_rows])
            wide_tv = logits_tv if is_wide else wide_buffer[:num_rows].copy_(logits_tv)

            largest_t1 = wide_tv.amax(-1, keepdim=True)
            target_t1 = wide_tv.gather(1, index_t1).masked_fill_(~is_own_t1, 0.0)
            exp_tv = wide_tv.sub_(largest_t1).exp_()
            told_t3 = torch.cat([largest_t1, exp_tv.sum(-1, keepdim=True), target_t1], dim=1)
            each_largest, each_sum, each_target = _from_all(told_t3, axis).chunk(3, dim=-1)  # [ranks, t, 1]
            all_largest_t1 = each_largest.amax(0)
            all_sum_t1 = (each_sum * (each_largest - all_largest_t1).exp_()).sum(0)
            log_prob_t1 = each_target.sum(0) - all_largest_t1 - all_sum_t1.log()
            loss -= (log_prob_t1 * valid_t1).sum()
            if not wants_grad:
                continue

            # d loss / d logits = softmax - onehot(target); rows without a target are zeroed further on.
            grad_tv = exp_tv.mul_((largest_t1 - all_largest_t1).exp_() / all_sum_t1)
            grad_tv.scatter_add_(1, index_t1, -is_own_t1.float())
            if not is_wide:
                grad_tv = logits_tv.copy_(grad_tv)
            torch.mm(grad_tv, head_vD, out=grad_x_TD[part]).mul_(valid_t1)
            x_tD = x_tD * valid_t1
            if addend_vD is None or wide_addend_vD is None:
                torch.addmm(grad_head_vD, grad_tv.T, x_tD, out=grad_head_vD)
            else:
                torch.mm(grad_tv.T, x_tD, out=addend_vD)
                grad_head_vD += wide_addend_vD.copy_(addend_vD)
        if wants_grad:
            ctx.save_for_backward(grad_x_TD, grad_head_vD)
            ctx.head_dtype = head_vD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x_TD, grad_head_vD = ctx.saved_tensors
        scale = grads[0]  # multiplied in fp32: rounded to bf16 it would bend every gradient by up to 0.4%
        scaled_x_TD = (grad_x_TD.float() * scale).to(grad_x_TD.dtype)
        return scaled_x_TD, (grad_head_vD * scale).to(ctx.head_dtype), None, None, None, None
