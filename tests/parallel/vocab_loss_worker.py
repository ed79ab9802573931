"""One rank of test_vocab_loss: the loss of a head split over all ranks against float64 in one process."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llmtrain.parallel.groups import Axis, build_groups
from llmtrain.parallel.tensor import enter
from llmtrain.parallel.topology import Topology
from llmtrain.parallel.vocab_loss import NO_TARGET, vocab_parallel_sum_cross_entropy

NUM_POSITIONS, WIDTH, VOCAB = 37, 24, 104
UPSTREAM = 1 / 3  # not a power of two: a scale rounded to bf16 would show


def inputs(dtype: torch.dtype, targets: str, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = (torch.randn(NUM_POSITIONS, WIDTH, generator=generator) * logit_scale).to(dtype)
    head_VD = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    targets_T = torch.randint(0, VOCAB, (NUM_POSITIONS,), generator=generator)
    if targets == "some":
        targets_T[::5] = NO_TARGET
    elif targets == "none":
        targets_T.fill_(NO_TARGET)
    elif targets == "edges":  # first and last row of every rank's part, for 1, 2 and 4 ranks
        edges = torch.tensor([row for first in range(0, VOCAB, VOCAB // 4) for row in (first, first - 1)])
        targets_T = (edges % VOCAB).repeat(NUM_POSITIONS)[:NUM_POSITIONS]
    elif targets == "sure":  # the model is right with probability near 1: little is left of large logits
        targets_T = (x_TD.float() @ head_VD.float().T).argmax(1)
    return x_TD, head_VD, targets_T


def relative(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference; of the whole where the exact one is zero."""
    return float((ours.double() - exact).norm() / (exact.norm() or 1.0))


def run(axis: Axis, dtype_name: str, targets: str, rows: int | None, logit_scale: float) -> dict[str, Any]:
    x_TD, head_VD, targets_T = inputs(getattr(torch, dtype_name), targets, logit_scale)
    exact_x, exact_head = x_TD.double().requires_grad_(), head_VD.double().requires_grad_()
    exact = F.cross_entropy(exact_x @ exact_head.T, targets_T, reduction="sum", ignore_index=NO_TARGET)
    (exact * UPSTREAM).backward()

    plain_x, plain_head = x_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()
    plain = F.cross_entropy((plain_x @ plain_head.T).float(), targets_T, reduction="sum")
    (plain * UPSTREAM).backward()

    own = slice(axis.rank * VOCAB // axis.size, (axis.rank + 1) * VOCAB // axis.size)
    x_TD, head_vD = x_TD.requires_grad_(), head_VD[own].clone().requires_grad_()
    region_TD = enter(x_TD, axis, sequence_parallel=False)
    loss = vocab_parallel_sum_cross_entropy(region_TD, head_vD, targets_T, axis, rows_at_once=rows)
    (loss * UPSTREAM).backward()
    with torch.no_grad():
        without_grad = vocab_parallel_sum_cross_entropy(x_TD, head_vD, targets_T, axis, rows_at_once=rows)
    assert not without_grad.requires_grad
    assert loss.dtype == torch.float32
    assert x_TD.grad is not None
    assert head_vD.grad is not None
    assert plain_x.grad is not None
    assert plain_head.grad is not None
    assert exact_x.grad is not None
    assert exact_head.grad is not None
    return {
        "loss": loss.item(),
        "without_grad": without_grad.item(),
        "exact": exact.item(),
        "grad_x_error": relative(x_TD.grad, exact_x.grad),
        "grad_head_error": relative(head_vD.grad, exact_head.grad[own]),
        "plain_grad_x_error": relative(plain_x.grad, exact_x.grad),
        "plain_grad_head_error": relative(plain_head.grad[own], exact_head.grad[own]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    tp = build_groups(Topology(tp_size=dist.get_world_size())).tp
    print(json.dumps({json.dumps(case): run(tp, *case) for case in json.loads(sys.argv[1])}))
    dist.destroy_process_group()
