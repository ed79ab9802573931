"""One rank of test_batch_splits: one step of every split asked for; print the loss and every gradient."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_worker import MODELS, SEQ_LEN, batch_of

from llmtrain.loader.batches import Batch
from llmtrain.loader.dataset import NO_TARGET
from llmtrain.model.init import build_transformer
from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks

SEED = 11
OPTIMIZER = OptimizerConfig(peak_lr=1e-3)


def masked_batch(first: int, last: int, valid: list[int]) -> Batch:
    """Rows [first, last) of the step, row r with its first valid[r] targets left."""
    batch = batch_of(0, first, last)
    targets = batch.targets_BS.clone()
    for row in range(first, last):
        targets[row - first, valid[row] :] = NO_TARGET
    return replace(batch, targets_BS=targets, num_valid=int((targets != NO_TARGET).sum()))


def reference(family: str, valid: list[int]) -> tuple[float, dict[str, np.ndarray]]:
    """Mean loss over all valid targets of all rows, and its gradients, in one process and one batch."""
    model = build_transformer(MODELS[family], seed=SEED)
    batch = masked_batch(0, len(valid), valid)
    logits = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten())
    loss.backward()
    return loss.item(), {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def step(case: dict[str, Any]) -> dict[str, Any]:
    """The same from one step of the engine: AdamW's first moment is (1 - beta1) times the gradient."""
    valid, micro = case["valid"], case["micro"]
    groups = build_groups(Topology.of_world(dist.get_world_size(), pp_size=case["pp"], cp_size=1, tp_size=1))
    train = TrainConfig(total_tokens=1, global_batch_rows=len(valid), micro_batch_rows=micro, grad_clip=0.0)
    parallel = ParallelConfig(zero_stage=1, pp_size=case["pp"])
    placement = place(MODELS[case["family"]], parallel, groups, seq_len=SEQ_LEN)
    engine = open_engine(placement, device=torch.device("cpu"), train=train, optimizer=OPTIMIZER)
    engine.load(fresh_weights(placement, seed=SEED))
    share = len(valid) // groups.dp.size
    begin = groups.dp.rank * share
    batches = [masked_batch(at, at + micro, valid) for at in range(begin, begin + share, micro)]
    result = engine.train_step(batches, lr=1e-3)
    mine = [(p.name, p.start, p.values.copy()) for p in engine.pieces() if p.kind == "exp_avg"]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    flat = {name: np.zeros(int(np.prod(shape)), np.float32) for name, shape in placement.shapes.items()}
    for name, start, values in (piece for pieces in gathered for piece in pieces):
        flat[name][start : start + len(values)] = values / (1 - OPTIMIZER.beta1)
    expected_loss, expected = reference(case["family"], valid)
    # Largest error of a gradient in parts of the largest gradient of its weight. Those of key biases are
    # zero but for rounding: softmax does not see them.
    largest = max(float(np.abs(value).max()) for value in expected.values())
    worst = {
        name: float(np.abs(flat[name] - value.ravel()).max() / max(np.abs(value).max(), 1e-3 * largest))
        for name, value in expected.items()
    }
    return {"loss": result.loss, "expected": expected_loss, "worst": worst, "num_valid": result.num_valid}


if __name__ == "__main__":
    join_ranks(timeout_s=120)
    print(json.dumps([step(case) for case in json.loads(sys.argv[1])]))
    dist.destroy_process_group()
