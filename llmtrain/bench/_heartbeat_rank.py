"""One rank of `bench heartbeat`: what a call costs, and how many of them a step of the demo's model makes."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.bench.shapes import DEMO
from llmtrain.bench.train_step import CLIP, GLOBAL_ROWS, LR, MICRO_ROWS, SEQ_LEN, micro_batches
from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.engines import open_engine
from llmtrain.train.heartbeat import Heartbeat
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks

LAYOUTS = {"ZeRO-1": 1, "ZeRO-3": 3}
REPEATS = 5


def best_us(call: Callable[[], object], times: int) -> float:
    """Microseconds of a core that one takes, in the best of a few rounds."""
    rounds = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(times):
            call()
        rounds.append((time.thread_time() - begin) / times * 1e6)
    return min(rounds)


class _Nothing:
    """A Work that is done."""


def hearing_us(heartbeat: Heartbeat, times: int) -> float:
    """What a heard collective, and the wait for its end, take more than ones that do nothing."""
    group, tensors = dist.group.WORLD, [torch.zeros(8)]
    work_class = dist.distributed_c10d.Work
    kept = vars(dist.ProcessGroup)["allreduce"], vars(work_class)["wait"]
    nothing = _Nothing()
    setattr(dist.ProcessGroup, "allreduce", lambda group, tensors: nothing)  # noqa: B010
    setattr(work_class, "wait", lambda work: True)  # noqa: B010

    def both() -> None:
        found: Any = dist.ProcessGroup.allreduce(group, tensors)  # type: ignore[arg-type]
        work_class.wait(found)

    try:
        bare = best_us(both, times)
        with heartbeat:
            return best_us(both, times) - bare
    finally:
        setattr(dist.ProcessGroup, "allreduce", kept[0])  # noqa: B010
        setattr(work_class, "wait", kept[1])  # noqa: B010


def step_of(stage: int, heartbeat: Heartbeat, num_steps: int) -> dict[str, float]:
    """Median seconds, marks and collectives of a step."""
    train = TrainConfig(
        total_tokens=1,
        global_batch_rows=dist.get_world_size() * GLOBAL_ROWS,
        micro_batch_rows=MICRO_ROWS,
        grad_clip=CLIP,
    )
    groups = build_groups(Topology(dp_size=dist.get_world_size()))
    placement = place(DEMO, ParallelConfig(zero_stage=stage), groups, seq_len=SEQ_LEN)
    engine = open_engine(
        placement, device=torch.device("cpu"), train=train, optimizer=OptimizerConfig(peak_lr=LR)
    )
    engine.load(fresh_weights(placement, seed=0))
    batches = micro_batches(engine.device)
    engine.mark = heartbeat.mark
    with heartbeat:
        for _ in range(2):
            engine.train_step(batches, lr=LR)
        marks, collectives, seconds = heartbeat.num_marks, heartbeat.collectives.count, []
        for step in range(num_steps):
            begin = time.perf_counter()
            heartbeat.begin_step(step + 1, position=0, num_rows=GLOBAL_ROWS)
            heartbeat.mark("agree")
            engine.train_step(batches, lr=LR)
            heartbeat.mark("record")
            seconds.append(time.perf_counter() - begin)
        return {
            "step_s": statistics.median(seconds),
            "marks": (heartbeat.num_marks - marks) / num_steps,
            "collectives": (heartbeat.collectives.count - collectives) / num_steps,
            "beat_us": best_us(heartbeat.write, 50),
        }


if __name__ == "__main__":
    folder, times, num_steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    join_ranks(timeout_s=600)

    def a_heartbeat() -> Heartbeat:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return Heartbeat(folder, token="bench", attempt=1, rank=rank, world_size=world_size)

    with a_heartbeat() as heartbeat:
        told: dict[str, Any] = {"mark_us": best_us(lambda: heartbeat.mark("forward", micro_step=1), times)}
    told["collective_us"] = hearing_us(a_heartbeat(), times)
    told["steps"] = {name: step_of(stage, a_heartbeat(), num_steps) for name, stage in LAYOUTS.items()}
    print(json.dumps(told))
    dist.destroy_process_group()
