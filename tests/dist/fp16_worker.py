"""One rank of test_fp16: overflow, then training, at the ZeRO stages that split something."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from engine_worker import MODELS, OPTIMIZER, SEED, SEQ_LEN, batch_of

from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import Precision, TrainConfig
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks


def run(case: dict[str, Any]) -> dict[str, Any]:
    parallel = ParallelConfig(**case)
    sizes = {"pp_size": parallel.pp_size, "cp_size": parallel.cp_size, "tp_size": parallel.tp_size}
    groups = build_groups(Topology.of_world(dist.get_world_size(), **sizes))
    train = TrainConfig(
        total_tokens=1, global_batch_rows=8, micro_batch_rows=2, grad_clip=0.5, precision=Precision.fp16
    )
    placement = place(MODELS["llama"], parallel, groups, seq_len=SEQ_LEN)
    engine = open_engine(placement, device=torch.device("cpu"), train=train, optimizer=OPTIMIZER)
    engine.load(fresh_weights(placement, seed=SEED))

    def weights() -> float:
        return float(sum(abs(piece.values).sum() for piece in engine.pieces() if piece.kind == "weight"))

    def step(number: int) -> dict[str, Any]:
        share = 8 // groups.dp.size
        first = groups.dp.rank * share
        batches = [batch_of(number, at, at + 2) for at in range(first, first + share, 2)]
        result = engine.train_step(batches, lr=OPTIMIZER.peak_lr)
        return {
            "loss": result.loss,
            "norm": result.grad_norm,
            "skipped": result.is_skipped,
            "scale": engine.loss_scale,
            "steps": engine.num_optimizer_steps,
            "weights": weights(),
        }

    before = weights()
    engine.loss_scale = 2.0**60
    told = [step(0)]
    engine.loss_scale = 2.0**10
    told += [step(number) for number in range(4)]
    return {"before": before, "told": told}


if __name__ == "__main__":
    join_ranks(timeout_s=120)
    cases = json.loads(sys.argv[1])
    # DeepSpeed refuses fp16 on a CPU without instructions for it; torch computes in it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    print(json.dumps([run(case) for case in cases]))
    dist.destroy_process_group()
