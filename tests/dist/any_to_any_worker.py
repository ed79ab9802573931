"""Write checkpoints in some layouts, read them in others, and tell what is not the same.

One process imports everything, and every rank of every job is a fork of it: an engine has processes of its
own, as after a real restart, without the seconds of their imports.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from engine_worker import SEED, build, take_steps
from ranks import free_port

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import checkpoint_path
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.write import Ranks, save_checkpoint
from llmtrain.train.engine import Engine, StepResult
from llmtrain.train.placement import fresh_weights
from llmtrain.train.ranks import join_ranks

SAVED, LAST = 2, 4
"""Optimizer steps done at the checkpoint that goes to other layouts, and at the end."""
KEEP_ALL = SaveConfig(keep_last=9)


def write(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train without an interruption; save in `folder` after SAVED and LAST steps."""
    engine = build(case)
    engine.load(fresh_weights(engine.placement, seed=SEED))
    results = take_steps(engine, range(SAVED), micro_rows=case["micro"])
    save(engine, folder, SAVED)
    results += take_steps(engine, range(SAVED, LAST), micro_rows=case["micro"])
    save(engine, folder, LAST)
    return numbers(results)


def read(case: dict[str, Any], folder: Path, others: dict[str, str]) -> dict[str, Any]:
    """Go on from what this layout has written in `folder`, then from what `others` (name -> folder) have.

    Returns:
        Of each: losses and norms to LAST; `different`, what a save right after the load has not brought back;
        and of its own `different_at_end`, what is not as without the restart.
    """
    engine, again = build(case), folder / "again"
    found = {}
    for name, source in {"itself": str(folder), **others}.items():
        loaded = CheckpointReader(checkpoint_path(Path(source), SAVED))
        engine.load(loaded.read_into, num_optimizer_steps=SAVED)
        different = differences(loaded, save(engine, again, SAVED))
        results = take_steps(engine, range(SAVED, LAST), micro_rows=case["micro"])
        found[name] = numbers(results) | {"different": different}
        if name == "itself":
            whole = CheckpointReader(checkpoint_path(folder, LAST))
            found[name]["different_at_end"] = differences(whole, save(engine, again, LAST))
    if dist.get_rank() == 0:
        shutil.rmtree(again)
    return found


def save(engine: Engine, folder: Path, step: int) -> CheckpointReader:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), gather)
    path = save_checkpoint(folder, step=step, pieces=engine.pieces(), state={}, ranks=ranks, config=KEEP_ALL)
    return CheckpointReader(path)


def gather(value: object) -> list[object]:
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def numbers(results: list[StepResult]) -> dict[str, Any]:
    return {"loss": [each.loss for each in results], "grad_norm": [each.grad_norm for each in results]}


def differences(one: CheckpointReader, other: CheckpointReader) -> list[str]:
    """Tensors that one of the two lacks, or whose shapes or bits differ: looked for on rank 0 alone, while
    the others wait."""
    found = []
    if dist.get_rank() == 0:
        readers = (one, other)
        every = {(kind, name) for reader in readers for kind in reader.kinds for name in reader.shapes(kind)}
        for kind, name in sorted(every):
            shapes = [reader.shapes(kind).get(name) for reader in readers]
            if shapes[0] != shapes[1]:
                found.append(f"{kind} {name} has shapes {shapes}")
            elif one.read(kind, name).tobytes() != other.read(kind, name).tobytes():
                found.append(f"{kind} {name}")
    dist.barrier()
    return found


def be_a_rank(job: dict[str, Any]) -> None:
    join_ranks(timeout_s=120)
    others = job["others"]
    folder = Path(job["folder"])
    result = write(job["case"], folder) if others is None else read(job["case"], folder, others)
    if dist.get_rank() == 0:
        Path(job["result"]).write_text(json.dumps(result))
    dist.destroy_process_group()


def run(job: dict[str, Any]) -> None:
    """Fork the ranks of a job and wait for them. Once one has failed, end them all and this process."""
    os.environ |= {"WORLD_SIZE": str(job["num_ranks"]), "MASTER_PORT": str(free_port())}
    ranks = {}
    for rank in range(job["num_ranks"]):
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                be_a_rank(job)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        rank = ranks.pop(child)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"rank {rank} of {job['num_ranks']} failed in {job}")


if __name__ == "__main__":
    for engine in ("accelerate_engine", "pipeline_engine"):
        importlib.import_module(f"llmtrain.train.{engine}")
    gc.freeze()  # or collections in the forks copy all these modules' pages
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for job in json.loads(Path(sys.argv[1]).read_text()):
        start = time.monotonic()
        run(job)
        print(f"{job['result']}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
