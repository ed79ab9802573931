"""One rank of test_context: attention over positions spread over all ranks against float64 in one process."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.model.attend import attend, document_mask
from llmtrain.model.config import ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.model.seams import Seams
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.context import attend_over_heads, attend_over_sequence, own_mask, own_positions
from llmtrain.parallel.groups import Axis, build_groups
from llmtrain.parallel.topology import Topology

NUM_POSITIONS, WIDTH = 48, 16
DOCUMENTS = {  # lengths of the documents of a row; chunks have 6, 12 or 24 positions
    "many": [[5, 20, 1, 22], [11, 26, 3, 8]],
    "one": [[48], [48]],
    "short": [[3] * 16, [1] * 48],  # whole chunks of keys that a query sees nothing of
}


@dataclass(frozen=True)
class Case:
    kind: str
    """heads, heads_causal (no mask: one document a row), sequence."""
    num_rows: int
    num_heads: int
    num_kv_heads: int
    documents: str = "many"
    dtype: str = "float32"
    queries_at_once: int | None = None


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output, of whole rows and as a projection leaves them; and segments."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(case.num_rows, NUM_POSITIONS, heads, WIDTH, generator=generator)
        .to(getattr(torch, case.dtype))
        .transpose(1, 2)
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    ]
    lengths = DOCUMENTS[case.documents][: case.num_rows]
    segments = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    return tensors, torch.stack(segments)


def own(x_BHSK: Tensor, axis: Axis, *, zigzag: bool) -> Tensor:
    return own_positions(x_BHSK.transpose(1, 2), axis, zigzag=zigzag).transpose(1, 2)


def spread(case: Case, axis: Axis, q: Tensor, k: Tensor, v: Tensor, segments_BS: Tensor) -> Tensor:
    if case.kind == "sequence":
        mask = own_mask(segments_BS, q.dtype, axis)
        return attend_over_sequence(q, k, v, mask, False, axis=axis, queries_at_once=case.queries_at_once)
    if case.kind == "heads_causal":
        return attend_over_heads(q, k, v, None, True, axis=axis, attend=attend)
    return attend_over_heads(q, k, v, document_mask(segments_BS, q.dtype), False, axis=axis, attend=attend)


def run(case: Case, axis: Axis) -> dict[str, float]:
    """Errors of this rank's part, over the largest exact element."""
    tensors, segments_BS = inputs(case)
    *exact_leaves, exact_grad = (x.double() for x in tensors)
    for x in exact_leaves:
        x.requires_grad_()
    exact = attend(*exact_leaves, document_mask(segments_BS, torch.float64), False)
    exact.backward(exact_grad)

    zigzag = case.kind == "sequence"
    *leaves, grad = (own(x, axis, zigzag=zigzag).clone() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    out = spread(case, axis, *leaves, segments_BS)
    assert out.dtype == grad.dtype
    out.backward(grad)
    with torch.no_grad():
        again = spread(case, axis, *leaves, segments_BS)
    assert torch.equal(out, again), "the result depends on whether a gradient is wanted"
    assert not again.requires_grad

    pairs = {
        "out": (out, exact),
        **{
            f"grad_{name}": (mine.grad, its.grad)
            for name, mine, its in zip("qkv", leaves, exact_leaves, strict=True)
        },
    }
    errors = {}
    for name, (mine, its) in pairs.items():
        assert mine is not None
        assert its is not None
        difference = mine.double() - own(its, axis, zigzag=zigzag)
        errors[name] = float(difference.abs().max() / its.abs().max())
    return errors


def run_model(kind: str, axis: Axis, *, recompute: bool) -> dict[str, float]:
    """Loss and gradients of a small model, summed over the ranks, and of the same model in one process."""
    cfg = ModelConfig(vocab_size=96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, ffn_width=80)
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(0, 96, (2, 2, NUM_POSITIONS), generator=generator)
    targets_BS[:, ::7] = -100
    lengths = DOCUMENTS["many"]
    segments_BS = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    )
    positions_BS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])

    alone = build_transformer(cfg, seed=3)
    exact = alone(tokens_BS, positions_BS, segments_BS, targets_BS)
    exact.backward()

    cut = partial(own_positions, axis=axis, zigzag=kind == "sequence")
    if kind == "sequence":
        seams = Seams(
            mask=partial(own_mask, axis=axis),
            attend=partial(attend_over_sequence, axis=axis),
        )
    else:
        seams = Seams(attend=partial(attend_over_heads, axis=axis, attend=attend))
    model = Transformer(cfg, seams=seams)
    model.load_state_dict(alone.state_dict())
    model.recompute_every = int(recompute)
    loss = model(cut(tokens_BS), cut(positions_BS), segments_BS, cut(targets_BS))
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    difference = norm = 0.0
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        dist.all_reduce(ours.grad)
        difference += float((ours.grad - theirs.grad).square().sum())
        norm += float(theirs.grad.square().sum())
    return {"loss": total.item(), "exact": exact.item(), "grad_error": (difference / norm) ** 0.5}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cp = build_groups(Topology(cp_size=dist.get_world_size())).cp
    told = {
        "attention": [run(Case(**case), cp) for case in json.loads(sys.argv[1])],
        "model": {
            f"{kind} {name}": run_model(kind, cp, recompute=recompute)
            for kind in ("heads", "sequence")
            for name, recompute in (("kept", False), ("recomputed", True))
        },
    }
    print(json.dumps(told))
    dist.destroy_process_group()
