"""A training step on one process: our engine under DeepSpeed beside a bare PyTorch loop of the same model.

Both do the same work on the same batches: forward, backward, clipping, fused AdamW. They take turns step by
step, so that a machine whose speed drifts slows both; the figures are medians.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from llmtrain.bench.shapes import DEMO
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.loader.batches import Batch
from llmtrain.model.init import build_transformer
from llmtrain.model.size import flops_per_token, num_params
from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, Precision, TrainConfig
from llmtrain.train.engines import open_engine
from llmtrain.train.optimizer import build_optimizer
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks

SEQ_LEN, GLOBAL_ROWS, MICRO_ROWS, DOCUMENTS_A_ROW = 512, 8, 4, 3
LR, CLIP = 1e-3, 1.0


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    device = join_ranks(timeout_s=60)
    rows = []
    bare = bare_step(device)
    for stage in (0, 1):
        ours = engine_step(device, stage)
        ours_s, bare_s = alternate(ours, bare, num_pairs=config.scaled(15, least=3))
        tokens = GLOBAL_ROWS * SEQ_LEN
        rows += [
            Row(name=f"step, ZeRO-{stage}, rival: bare PyTorch loop", value=ours_s, rival=bare_s, unit="s"),
            Row(
                name=f"tokens a second, ZeRO-{stage}, rival: bare PyTorch loop",
                value=tokens / ours_s,
                rival=tokens / bare_s,
                unit="tokens/s",
            ),
        ]
        del ours
        gc.collect()
    dist.destroy_process_group()
    token_flops = flops_per_token(DEMO, SEQ_LEN, convention="causal")
    rows.append(
        Row(
            name=f"model FLOPs a second, {num_params(DEMO):,} parameters, causal convention, ZeRO-1",
            value=rows[3].value * token_flops / 1e9,
            unit="GFLOP/s",
        )
    )
    return rows


def micro_batches(device: torch.device) -> list[Batch]:
    """One step's batches: random tokens, documents of equal length."""
    random = np.random.default_rng(0)
    length = -(-SEQ_LEN // DOCUMENTS_A_ROW)
    places = np.arange(SEQ_LEN)
    batches = []
    for _ in range(GLOBAL_ROWS // MICRO_ROWS):
        tokens = torch.from_numpy(random.integers(0, DEMO.vocab_size, (MICRO_ROWS, SEQ_LEN + 1)))
        batches.append(
            Batch(
                tokens_BS=tokens[:, :-1].contiguous(),
                targets_BS=tokens[:, 1:].contiguous(),
                positions_BS=torch.from_numpy(places % length).repeat(MICRO_ROWS, 1),
                segments_BS=torch.from_numpy((places // length).astype(np.int32)).repeat(MICRO_ROWS, 1),
                num_valid=MICRO_ROWS * SEQ_LEN,
                rows=np.arange(MICRO_ROWS),
            ).to(device)
        )
    return batches


def bare_step(device: torch.device) -> Callable[[], None]:
    """What a good PyTorch loop does, and nothing else."""
    model = build_transformer(DEMO, seed=0, device=device)
    optimizer = build_optimizer(model, OptimizerConfig(peak_lr=LR))
    batches = micro_batches(device)
    num_valid = sum(batch.num_valid for batch in batches)

    def step() -> None:
        for batch in batches:
            loss_sum = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.targets_BS)
            (loss_sum / num_valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def engine_step(device: torch.device, stage: int) -> Callable[[], object]:
    train = TrainConfig(
        total_tokens=1,
        global_batch_rows=GLOBAL_ROWS,
        micro_batch_rows=MICRO_ROWS,
        grad_clip=CLIP,
        precision=Precision.fp32,
    )
    parallel = ParallelConfig(zero_stage=stage)
    placement = place(DEMO, parallel, build_groups(Topology()), seq_len=SEQ_LEN)
    engine = open_engine(placement, device=device, train=train, optimizer=OptimizerConfig(peak_lr=LR))
    engine.load(fresh_weights(placement, seed=0))
    batches = micro_batches(device)
    return lambda: engine.train_step(batches, lr=LR)


def alternate(
    first: Callable[[], object], second: Callable[[], object], *, num_pairs: int
) -> tuple[float, float]:
    """Median seconds of each, after two turns to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(num_pairs + 2):
        for step, spent in zip((first, second), times, strict=True):
            start = time.perf_counter()
            step()
            if turn >= 2:
                spent.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
