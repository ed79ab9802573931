"""Ranks that train until one of them does what its case says: this process imports everything once, and forks
the ranks of all cases, which run side by side and mostly wait.

Prints, for each case, how its ranks ended and how many seconds after the fault the last one had.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch._dynamo
import torch.distributed as dist
from engine_worker import batch_of, build
from ranks import free_port

from llmtrain.log import setup_logging
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.train import deepspeed_engine
from llmtrain.train.heartbeat import Heartbeat
from llmtrain.train.placement import fresh_weights
from llmtrain.train.ranks import agree, join_ranks
from llmtrain.train.stragglers import StragglerReport
from llmtrain.train.watchdog import HangLimits, Watchdog, prepare

PRELOADED = deepspeed.runtime.zero.muon.muon_optimizer, torch._dynamo, deepspeed_engine
"""Once for all ranks."""
STEPS = 6
GIVE_UP_S = 150.0
FOREVER_S = 3600
SLOW_STEPS, LOOK_EVERY = 30, 5
MICRO_S, SLOW_MICRO_S = 0.1, 0.3
"""What a micro batch takes a rank of a case that is slow: slept, so that a busy machine changes it little."""


def sleep() -> None:
    time.sleep(FOREVER_S)


def fail() -> None:
    raise ValueError("the planted 7")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold_interpreter() -> None:
    ctypes.PyDLL(None).sleep(FOREVER_S)  # PyDLL keeps the lock


FAULTS = {"sleeps": sleep, "raises": fail, "is stopped": stop, "is killed": die, "is stuck": hold_interpreter}


def plant(engine: Any, case: dict[str, Any], at: dict[str, int], plan: dict[str, Any], began: Path) -> None:
    """Have this rank do what `case` says, in the second micro batch of plan["fault_step"]."""
    if case["fault"] == "skips":
        sums = engine._sum

        def skipping(*values: float) -> Any:
            at["sums"] += 1
            if at["step"] == plan["fault_step"] and at["sums"] == 2:
                began.write_text(str(time.monotonic()))
                return list(values)
            return sums(*values)

        engine._sum = skipping
        return
    if case.get("layout", {}).get("pp_size"):
        forward = engine._last.forward

        def sleeping(inputs: Any) -> Any:
            if at["step"] == plan["fault_step"]:
                began.write_text(str(time.monotonic()))
                sleep()
            return forward(inputs)

        engine._last.forward = sleeping
        return
    loss_sum = engine._loss_sum
    if case["fault"] == "is slow":
        each_s = SLOW_MICRO_S if engine.placement.groups.dp.rank == plan["victim"] else MICRO_S

        def slow(batch: Any) -> Any:
            time.sleep(each_s)
            return loss_sum(batch)

        engine._loss_sum = slow
        return

    def broken(batch: Any) -> Any:
        at["micro"] += 1
        if at["step"] == plan["fault_step"] and at["micro"] == 2:
            began.write_text(str(time.monotonic()))
            FAULTS[case["fault"]]()
        return loss_sum(batch)

    engine._loss_sum = broken


def be_a_rank(rank: int, name: str, case: dict[str, Any], plan: dict[str, Any]) -> None:
    folder, timeout_s, limit_s = Path(plan["folder"]), plan["timeout_s"], plan["limit_s"]
    num_rows = plan["rows"]
    run, world_size = folder / name, case.get("num_ranks", 2)
    output = os.open(run / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case["port"])}
    setup_logging()
    torch.set_num_threads(1)
    join_ranks(timeout_s=limit_s)
    limits = HangLimits(timeout_s, 0.8 * limit_s)
    if rank == 0:
        prepare(run / "ranks", world_size=world_size)
        MetricsFile(run / "metrics.jsonl", attempt=1).write("event", 0, what="start")
    dist.barrier()
    beat = {"token": name, "attempt": 1, "rank": rank, "world_size": world_size}
    with (
        Heartbeat(run / "ranks", **beat, every_s=limits.every_s, stuck_s=timeout_s) as heartbeat,
        Watchdog(heartbeat, limits, run_folder=run, metrics=run / "metrics.jsonl", backend="gloo"),
    ):
        engine = build({"family": "llama", "num_layers": 2, "micro": 2, **case.get("layout", {})})
        engine.mark = heartbeat.mark
        engine.load(fresh_weights(engine.placement, seed=1))
        at = {"step": 0, "micro": 0, "sums": 0}
        report = StragglerReport(run / "ranks", token=name, world_size=world_size, slower_than=0.15)
        is_slow = case["fault"] == "is slow"
        victim = case.get("victim", min(plan["victim"], world_size - 1))
        if case["fault"] is not None and (rank == victim or is_slow):
            plant(engine, case, at, plan, run / "began.txt")
        dp = engine.placement.groups.dp
        engine.held_out_sums(iter([batch_of(99, 2 * dp.rank, 2 * dp.rank + 2)]))
        assert heartbeat.beat().at == "step 0, micro-step 1, evaluate", "every engine marks its batches"
        records, stragglers = [], []
        for step in range(1, (SLOW_STEPS if is_slow else STEPS) + 1):
            heartbeat.begin_step(step, position=(step - 1) * num_rows, num_rows=num_rows)
            at |= {"step": step, "micro": 0, "sums": 0}
            first = dp.rank * (num_rows // dp.size)
            rows = range(first, first + num_rows // dp.size, 2)
            batches = [batch_of(step, row, row + 2) for row in rows]
            heartbeat.mark("agree")
            agree(engine.placement.groups, engine.device, level=0, tokens_hash=0)
            engine.train_step(batches, lr=1e-3)
            heartbeat.mark("record")
            if is_slow and rank == 0:
                if step % LOOK_EVERY == 0:
                    report.look()
                if found := report.take():
                    records.append(found[0])
                    stragglers += map(vars, found[1])
        if is_slow and rank == 0:
            told = {"records": records, "stragglers": stragglers}
            (run / "stragglers.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def fork(*arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        be_a_rank(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    cases, folder = plan["cases"], Path(plan["folder"])
    ranks: dict[int, tuple[str, int]] = {}
    for name, case in cases.items():
        (folder / name).mkdir()
        case["port"] = free_port()
        for rank in range(case.get("num_ranks", 2)):
            ranks[fork(rank, name, case, plan)] = name, rank
    ends: dict[str, dict[str, Any]] = {name: {"statuses": {}, "last_s": None} for name in cases}
    limit = time.monotonic() + GIVE_UP_S
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            name, rank = ranks.pop(child)
            began = folder / name / "began.txt"
            ends[name]["statuses"][rank] = os.waitstatus_to_exitcode(status)
            if began.exists():
                ends[name]["last_s"] = time.monotonic() - float(began.read_text())
        elif time.monotonic() > limit:
            for other, (name, rank) in ranks.items():
                ends[name]["statuses"][rank] = "did not end"
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            ranks.clear()
        else:
            time.sleep(0.02)
    print(json.dumps(ends))
