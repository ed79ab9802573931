"""One rank of Muon's resume test: every layout is stopped half-way, and goes on from its own state and from
another layout's."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_worker import CLIP, MODELS, MUON, ROWS, SEED, SEQ_LEN, STEPS, batch_of
from numpy.typing import NDArray

from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train import muon
from llmtrain.train.config import Precision, TrainConfig
from llmtrain.train.engine import Engine
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks

HALF = STEPS // 2
State = dict[tuple[str, str], NDArray[np.float32]]


def open_case(case: dict[str, Any]) -> Engine:
    case = dict(case)
    precision = Precision[case.pop("precision", "fp32")]
    parallel = ParallelConfig(**case)
    groups = build_groups(
        Topology.of_world(
            dist.get_world_size(),
            pp_size=parallel.pp_size,
            cp_size=parallel.cp_size,
            tp_size=parallel.tp_size,
        )
    )
    train = TrainConfig(
        total_tokens=1,
        global_batch_rows=ROWS,
        micro_batch_rows=ROWS // groups.dp.size // 2,
        precision=precision,
        grad_clip=CLIP,
    )
    placement = place(MODELS["llama"], parallel, groups, seq_len=SEQ_LEN, seed=SEED)
    return open_engine(placement, device=torch.device("cpu"), train=train, optimizer=MUON)


def train_steps(engine: Engine, first_step: int, last_step: int) -> list[float]:
    dp = engine.placement.groups.dp
    rows = ROWS // dp.size
    edges = [rows * dp.rank + rows * half // 2 for half in range(3)]
    losses = []
    for step in range(first_step, last_step):
        batches = [batch_of(step, first, last) for first, last in pairwise(edges)]
        losses.append(engine.train_step(batches, lr=MUON.peak_lr).loss)
    return losses


def state_of(engine: Engine) -> State:
    """All ranks' pieces put together."""
    mine = [(piece.kind, piece.name, piece.start, piece.values.copy()) for piece in engine.pieces()]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    whole: State = {}
    for kind, name, start, values in (piece for pieces in gathered for piece in pieces):
        numel = math.prod(engine.placement.shapes[name])
        flat = whole.setdefault((kind, name), np.full(numel, np.nan, np.float32))
        assert np.isnan(flat[start : start + len(values)]).all(), f"{kind} {name} is owned twice at {start}"
        flat[start : start + len(values)] = values
    assert not any(np.isnan(flat).any() for flat in whole.values()), "an element is owned by nobody"
    return whole


def resumed(case: dict[str, Any], state: State) -> tuple[list[float], State]:
    def source(kind: str, name: str, start: int, into: Any) -> None:
        into[:] = state[kind, name][start : start + into.size]

    engine = open_case(case)
    engine.load(source, num_optimizer_steps=HALF)
    return train_steps(engine, HALF, STEPS), state_of(engine)


def main() -> None:
    join_ranks(timeout_s=120)
    muon.MAX_ROUND_BYTES = 3 * 80 * 32 * 4  # so that a step has several rounds, of a few matrices
    cases: dict[str, Any] = json.loads(sys.argv[1])
    results: dict[str, Any] = {}
    previous: State | None = None
    for name, case in cases.items():
        engine = open_case(case)
        engine.load(fresh_weights(engine.placement, seed=SEED))
        losses = train_steps(engine, 0, HALF)
        half = state_of(engine)
        losses += train_steps(engine, HALF, STEPS)
        end = state_of(engine)
        own_losses, own_end = resumed(case, half)
        results[name] = {
            "kinds": {name: sorted(kind for kind, each in half if each == name) for _, name in half},
            "loss": losses,
            "own": own_losses,
            "own_state_is_equal": all(np.array_equal(end[key], own_end[key]) for key in end),
            "other": resumed(case, previous)[0] if previous and "precision" not in case else losses[HALF:],
        }
        previous = previous if "precision" in case else half
    print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
