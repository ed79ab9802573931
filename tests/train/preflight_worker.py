"""Ranks that meet over gloo, look at each other, and load nothing: `run_preflight` as a run calls it.

This process imports everything once. For each line it is told it forks the ranks, each with arguments,
variables, a folder and a fault of its own, and prints how they ended and what they said.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

import llmtrain
from llmtrain.cli.compose import conf_folder, to_dataclass
from llmtrain.errors import EXIT_FAILED, LLMTrainError
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.log import setup_logging
from llmtrain.train import preflight
from llmtrain.train.config import TrainRoot
from llmtrain.train.ranks import join_ranks

GIVE_UP_S = 60.0


def break_something(fault: str | None, value: str) -> None:
    """In this process alone."""
    if fault == "code":
        llmtrain.__file__ = str(Path(value, "__init__.py"))
    elif fault == "clock":
        right = time.time
        time.time = lambda: right() + float(value)
    elif fault == "sum":
        reduce = dist.all_reduce

        def all_reduce(tensor: torch.Tensor) -> None:
            reduce(tensor)
            tensor[:3] += 1

        dist.all_reduce = all_reduce
    elif fault == "link":
        pass_on = preflight._pass_on

        def slow(*arguments: Any) -> None:
            time.sleep(float(value))
            pass_on(*arguments)

        preflight._pass_on = slow
    else:
        assert fault is None, fault


def gather(value: object) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def be_a_rank(plan: dict[str, Any]) -> int:
    os.environ.update(plan["environ"])
    os.chdir(plan["cwd"])
    setup_logging()
    ConfigStore.instance().store(name="train_schema", node=TrainRoot)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        cfg = to_dataclass(compose(config_name="train", overrides=plan["arguments"]), TrainRoot)
    break_something(plan.get("fault"), plan.get("value", ""))
    device = join_ranks(timeout_s=GIVE_UP_S)
    try:
        report = preflight.run_preflight(
            cfg, PreflightConfig(**plan["preflight"]), device=device, gather=gather
        )
    except LLMTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if report is not None and dist.get_rank() == 0:
        report.write(Path(plan["report"]), attempt=1)
    dist.destroy_process_group()
    return 0


def fork_rank(plan: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(plan["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = be_a_rank(plan)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        plans = json.loads(line)
        ranks = [fork_rank(plan) for plan in plans]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        texts = [Path(plan["output"]).read_text() for plan in plans]
        print(json.dumps({"statuses": statuses, "texts": texts}), flush=True)
