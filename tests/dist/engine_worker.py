"""One rank of test_engine_parity: train under every ZeRO stage asked for, print losses, norms and final
weights."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from llmtrain.loader.batches import Batch
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.init import build_transformer, initial_weight
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.config import ParallelConfig
from llmtrain.train.config import OptimizerConfig, Precision, RampConfig, TrainConfig

SHAPE = {"vocab_size": 96, "num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 80}
MODELS = {
    "llama": ModelConfig(**SHAPE),
    "gpt2": ModelConfig(**SHAPE, family=Family.gpt2, max_positions=24, tie_embeddings=True),
}
OPTIMIZER = OptimizerConfig(peak_lr=3e-3)
SEQ_LEN, ROWS, STEPS, CLIP, SEED = 24, 8, 20, 0.5, 5


def rows_of(step: int) -> int:
    """Rows of a step: a batch ramp, so that DeepSpeed meets two numbers of micro batches."""
    return ROWS if step < 7 else 2 * ROWS


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
    )


def reference(family: str) -> dict[str, list[float]]:
    """The same run in plain PyTorch: one process, one batch, nothing of ours but the model."""
    model = build_transformer(MODELS[family], seed=SEED)
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
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
        logits = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten())
        adamw.zero_grad()
        loss.backward()
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        adamw.step()
        losses.append(loss.item())
    return {"loss": losses, "grad_norm": grad_norms, "checksum": checksums(dict(model.named_parameters()))}


def checksums(weights: dict[str, torch.Tensor]) -> list[float]:
    """One number a weight, that any wrong element changes."""
    return [
        float((weight.detach().double().flatten() * torch.linspace(1, 2, weight.numel()).double()).sum())
        for _, weight in sorted(weights.items())
    ]


def run(family: str, stage: int, micro_rows: int, precision: Precision) -> dict[str, list[float]]:
    from llmtrain.train.engine import Engine, build_context  # noqa: PLC0415  the reference needs no DeepSpeed

    train = TrainConfig(
        total_tokens=1,
        global_batch_rows=2 * ROWS,
        batch_ramp=[RampConfig(until_tokens=7 * ROWS * SEQ_LEN, rows=ROWS)],
        micro_batch_rows=micro_rows,
        grad_clip=CLIP,
        precision=precision,
    )
    parallel = ParallelConfig(zero_stage=stage)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with build_context(train, parallel, dp_size=num_ranks):
        model = Transformer(MODELS[family])
    model.recompute_every = int(family == "gpt2")
    engine = Engine(model, device=torch.device("cpu"), train=train, parallel=parallel, optimizer=OPTIMIZER)

    def fresh(kind: str, name: str, start: int, length: int) -> np.ndarray:
        whole = initial_weight(name, int(np.prod(engine.shapes[name])), MODELS[family], SEED)
        return whole[start : start + length]

    engine.load(fresh)
    losses, grad_norms = [], []
    for step in range(STEPS):
        mine = np.linspace(0, rows_of(step), num_ranks + 1).astype(int)
        edges = range(mine[rank], mine[rank + 1] + 1, micro_rows)
        result = engine.train_step(
            [batch_of(step, first, last) for first, last in pairwise(edges)], lr=OPTIMIZER.peak_lr
        )
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
    return {"loss": losses, "grad_norm": grad_norms, "checksum": whole_checksums(engine)}


def whole_checksums(engine: object) -> list[float]:
    """Put the pieces of all ranks together again."""
    gathered: list[list[tuple[str, int, np.ndarray]]] = [[] for _ in range(dist.get_world_size())]
    mine = [(p.name, p.start, p.values.copy()) for p in engine.pieces() if p.kind == "weight"]  # type: ignore[attr-defined]
    dist.all_gather_object(gathered, mine)
    flat = {name: np.full(int(np.prod(shape)), np.nan, np.float32) for name, shape in engine.shapes.items()}  # type: ignore[attr-defined]
    for pieces in gathered:
        for name, start, values in pieces:
            assert np.isnan(flat[name][start : start + len(values)]).all(), (
                f"{name} is owned twice at {start}"
            )
            flat[name][start : start + len(values)] = values
    assert not any(np.isnan(values).any() for values in flat.values()), "an element is owned by nobody"
    return checksums({name: torch.from_numpy(values) for name, values in flat.items()})


if __name__ == "__main__":
    from llmtrain.train.engine import init_ranks

    init_ranks(timeout_s=120)
    cases = json.loads(sys.argv[1])
    print(
        json.dumps(
            {
                f"{family}/{stage}/{micro}/{kind}": run(family, stage, micro, Precision[kind])
                for family, stage, micro, kind in cases
            }
        )
    )
    dist.destroy_process_group()
