"""One rank of the parity tests: train in every layout asked for, print losses, norms and final weights."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmtrain.loader.batches import Batch
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.dropout import token_keys
from llmtrain.model.init import build_transformer
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.config import ContextKind, EngineKind, ParallelConfig, PipelineSchedule
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import (
    OptimizerConfig,
    OptimizerKind,
    Precision,
    RampConfig,
    Recompute,
    TrainConfig,
)
from llmtrain.train.engine import Engine, StepResult
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks

SHAPE = {"vocab_size": 96, "num_layers": 4, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 80}
MODELS = {
    "llama": ModelConfig(**SHAPE),
    "gpt2": ModelConfig(**SHAPE, family=Family.gpt2, max_positions=24, tie_embeddings=True),
}
OPTIMIZER = OptimizerConfig(peak_lr=3e-3)
MUON = OptimizerConfig(peak_lr=3e-3, kind=OptimizerKind.muon)
SEQ_LEN, ROWS, STEPS, CLIP, SEED = 24, 8, 10, 0.5, 5
RAMP_STEPS = 4
HELD_OUT = range(98, 103)
"""Batches beyond training: more than a pipeline takes at once."""


def rows_of(step: int) -> int:
    """Rows of a step: a batch ramp, so that DeepSpeed meets two numbers of micro batches."""
    return ROWS if step < RAMP_STEPS else 2 * ROWS


def batch_of(step: int, first: int, last: int) -> Batch:
    """Rows [first, last) of a step: random tokens, two documents a row, and very uneven numbers of
    targets."""
    rows = []
    for row in range(first, last):
        random = np.random.default_rng([step, row])
        tokens = random.integers(0, SHAPE["vocab_size"], SEQ_LEN + 1)
        cut = int(random.integers(4, SEQ_LEN - 4))
        targets = tokens[1:].copy()
        targets[cut - 1] = -100
        targets[int(random.integers(6, SEQ_LEN)) :] = -100
        positions = np.concatenate([np.arange(cut), np.arange(SEQ_LEN - cut)])
        rows.append((tokens[:-1], targets, positions, np.repeat([0, 1], [cut, SEQ_LEN - cut])))
    tokens, targets, positions, segments = (
        torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)
    )
    return Batch(
        tokens_BS=tokens,
        targets_BS=targets,
        positions_BS=positions,
        segments_BS=segments.int(),
        num_valid=int((targets != -100).sum()),
        rows=np.arange(first, last),
        places=1000 * step + np.arange(first, last),
    )


def muon_update(gradient: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """Move `momentum`, and return what is subtracted per unit of rate: by singular values, in float64."""
    momentum.mul_(0.95).add_(gradient)
    left, values, right = torch.linalg.svd((gradient + 0.95 * momentum).double(), full_matrices=False)
    values = values / (values.norm() + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    update = (left * values) @ right * 0.2 * max(gradient.shape) ** 0.5
    return update.float()


def model_of(family: str, num_layers: int | None) -> ModelConfig:
    return replace(MODELS[family], num_layers=num_layers or SHAPE["num_layers"])


def reference(
    family: str,
    optimizer: str = "adamw",
    dropout: float = 0.0,
    num_layers: int | None = None,
    watch: Callable[[int, Transformer, torch.optim.AdamW], None] = lambda *_: None,
) -> dict[str, Any]:
    """The same run in plain PyTorch: one process, one batch, nothing of ours but the model.

    Args:
        watch: is shown the number of steps done, the model and its AdamW after every step.
    """
    model = build_transformer(model_of(family, num_layers), seed=SEED)
    model.dropout = dropout
    muons = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    muons = muons if optimizer == "muon" else []
    momenta = [torch.zeros_like(p) for p in muons]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2 and not any(p is muon for muon in muons)]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.peak_lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    losses, grad_norms = [], []
    for step in range(STEPS):
        batch = batch_of(step, 0, rows_of(step))
        keys = token_keys(SEED, batch.places, SEQ_LEN)
        logits = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, keys_BS=keys)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten())
        model.zero_grad()
        loss.backward()
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        adamw.step()
        with torch.no_grad():
            for weight, momentum in zip(muons, momenta, strict=True):
                update = muon_update(weight.grad, momentum) + MUON.weight_decay * weight
                weight -= MUON.peak_lr * update
        losses.append(loss.item())
        watch(step + 1, model, adamw)
    return {
        "loss": losses,
        "grad_norm": grad_norms,
        "checksum": checksums(dict(model.named_parameters())),
        "held_out_by_rows": held_out_by_rows(model),
    }


@torch.no_grad()
def held_out_by_rows(model: Transformer) -> list[tuple[float, int]]:
    """Loss sum and number of targets of the first 0, 1, 2, ... rows of each held-out batch."""
    model.eval()
    loss_sum, num_valid, found = 0.0, 0, [(0.0, 0)]
    for row in range(ROWS):
        for step in HELD_OUT:
            batch = batch_of(step, row, row + 1)
            logits = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
            loss_sum += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="sum"
                )
            )
            num_valid += batch.num_valid
        found.append((loss_sum, num_valid))
    return found


def checksums(weights: dict[str, torch.Tensor]) -> list[float]:
    """One number a weight, that any wrong element changes."""
    return [
        float((weight.detach().double().flatten() * torch.linspace(1, 2, weight.numel()).double()).sum())
        for _, weight in sorted(weights.items())
    ]


def build(case: dict[str, Any]) -> Engine:
    """An engine without weights, as `case` says: family, num_layers, micro (rows), precision, recompute,
    optimizer; the rest is ParallelConfig's."""
    case = dict(case)
    optimizer = {"adamw": OPTIMIZER, "muon": MUON}[case.pop("optimizer", "adamw")]
    model = model_of(case.pop("family"), case.pop("num_layers", None))
    train = TrainConfig(
        total_tokens=1,
        global_batch_rows=2 * ROWS,
        batch_ramp=[RampConfig(until_tokens=RAMP_STEPS * ROWS * SEQ_LEN, rows=ROWS)],
        micro_batch_rows=case.pop("micro"),
        grad_clip=CLIP,
        precision=Precision[case.pop("precision", "fp32")],
        recompute_every=case.pop("recompute", 0),
        recompute=Recompute[case.pop("recompute_what", "full")],
        compile_blocks=case.pop("compile", False),
        dropout=case.pop("dropout", 0.0),
    )
    case["context"] = ContextKind[case.pop("context", "heads")]
    case["pp_schedule"] = PipelineSchedule[case.pop("pp_schedule", "one_f_one_b")]
    case["engine"] = EngineKind[case.pop("engine", "deepspeed")]
    parallel = ParallelConfig(**case)
    sizes = {"pp_size": parallel.pp_size, "cp_size": parallel.cp_size, "tp_size": parallel.tp_size}
    groups = build_groups(Topology.of_world(dist.get_world_size(), **sizes))
    placement = place(model, parallel, groups, seq_len=SEQ_LEN, seed=SEED)
    return open_engine(placement, device=torch.device("cpu"), train=train, optimizer=optimizer)


def take_steps(engine: Engine, steps: Iterable[int], *, micro_rows: int) -> list[StepResult]:
    dp, found = engine.placement.groups.dp, []
    for step in steps:
        mine = np.linspace(0, rows_of(step), dp.size + 1).astype(int)
        edges = range(mine[dp.rank], mine[dp.rank + 1] + 1, micro_rows)
        batches = [batch_of(step, first, last) for first, last in pairwise(edges)]
        found.append(engine.train_step(batches, lr=OPTIMIZER.peak_lr))
    return found


def run(case: dict[str, Any]) -> dict[str, list[float]]:
    """Train as `build` takes `case`."""
    engine, micro_rows = build(case), case["micro"]
    groups = engine.placement.groups
    engine.load(fresh_weights(engine.placement, seed=SEED))
    results = take_steps(engine, range(STEPS), micro_rows=micro_rows)
    first = groups.dp.rank * micro_rows
    held_out = [batch_of(step, first, first + micro_rows) for step in HELD_OUT]
    loss_sum, num_valid = engine.held_out_sums(iter(held_out))
    return {
        "loss": [each.loss for each in results],
        "grad_norm": [each.grad_norm for each in results],
        "checksum": whole_checksums(engine),
        "held_out": [loss_sum, num_valid],
    }


def whole_checksums(engine: Engine) -> list[float]:
    """Put the pieces of all ranks together again."""
    gathered: list[Any] = [None] * dist.get_world_size()
    mine = [(p.name, p.start, p.values.copy()) for p in engine.pieces() if p.kind == "weight"]
    dist.all_gather_object(gathered, mine)
    shapes = engine.placement.shapes
    flat = {name: np.full(int(np.prod(shape)), np.nan, np.float32) for name, shape in shapes.items()}
    for pieces in gathered:
        for name, start, values in pieces:
            assert np.isnan(flat[name][start : start + len(values)]).all(), (
                f"{name} is owned twice at {start}"
            )
            flat[name][start : start + len(values)] = values
    assert not any(np.isnan(values).any() for values in flat.values()), "an element is owned by nobody"
    return checksums({name: torch.from_numpy(values) for name, values in flat.items()})


if __name__ == "__main__":
    join_ranks(timeout_s=120)
    results = {}
    for name, case in json.loads(sys.argv[1]).items():
        start = time.monotonic()
        results[name] = run(case)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(results))
    dist.destroy_process_group()
