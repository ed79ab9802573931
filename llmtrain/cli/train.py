"""`llmtrain train`: check everything that can be checked, then run. Started by torchrun it is one of many
ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import partial

import yaml

from llmtrain import files
from llmtrain.cli.compose import fail, given_settings, run_verb, sweep_folder
from llmtrain.cli.listen import listening
from llmtrain.errors import ConfigError, LLMTrainError
from llmtrain.launch.environment import array_job
from llmtrain.log import setup_logging, world_size
from llmtrain.parallel.config import EngineKind
from llmtrain.parent import PARENT_VARIABLE, end_with_parent
from llmtrain.tracking.config import WandbMode, sweep_group
from llmtrain.train.check import check_train
from llmtrain.train.config import TrainRoot
from llmtrain.train.deadline import EXIT_AGAIN, EXIT_NEVER, Deadline, leave_with
from llmtrain.train.retries import SameFailureError
from llmtrain.train.start_up import StartUp
from llmtrain.train.unread import refuse_unread


def main() -> None:
    run_verb("train", TrainRoot, partial(run, deadline=listening()))


def run(cfg: TrainRoot, deadline: Deadline) -> None:
    folder = sweep_folder()
    if folder is not None:
        cfg = replace(cfg, run=replace(cfg.run, folder=str(folder)))
    if cfg.tracking.wandb_group is None and cfg.tracking.wandb is not WandbMode.off:
        group = sweep_group(array_job=array_job(os.environ), sweep_folder=folder)
        cfg = replace(cfg, tracking=replace(cfg.tracking, wandb_group=group))
    given = given_settings()
    if cfg.check_only:
        report_check(cfg, given)
        return
    refuse_unread(cfg, given)
    if folder is not None:
        # A job of a --multirun gets a process: DeepSpeed keeps its groups in globals, so one cannot start
        # it twice.
        job = multiprocessing.get_context("spawn").Process(target=run_job, args=(cfg,))
        job.start()
        job.join()
        if job.exitcode:
            sys.exit(job.exitcode)
    else:
        start_training(cfg, deadline)


def run_job(cfg: TrainRoot) -> None:
    """Be one job of a --multirun."""
    setup_logging()
    try:
        start_training(cfg, listening())
    except LLMTrainError as error:
        fail(str(error))


def start_training(cfg: TrainRoot, deadline: Deadline) -> None:
    """Train, and end the process with the status that says what to do with the run: 0 it is over, 75 start
    again, 78 never."""
    if not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", PARENT_VARIABLE)):
        end_with_parent()  # a rank without its launcher would train on, unseen
    deadline.set_limits(time_limit_s=cfg.run.time_limit_s, leave_before_s=cfg.run.leave_before_s)
    deadline.leave_at_once(during_start=world_size() == 1)
    start_up = StartUp()
    start_up.mark("Python and Hydra")
    import torch  # noqa: F401, PLC0415  a login node's check_only=true must not pay for it

    from llmtrain.train import determinism  # noqa: PLC0415  needs torch

    determinism.apply(cfg.train.determinism)  # before anything computes
    start_up.mark("torch")
    if cfg.parallel.engine is EngineKind.deepspeed:
        import llmtrain.train.deepspeed_engine  # noqa: F401, PLC0415  most of the time is DeepSpeed's import

        start_up.mark("DeepSpeed's import")
    from llmtrain.train.assemble import run_training  # noqa: PLC0415  needs torch

    text = yaml.safe_dump(files.plain(cfg), sort_keys=False, allow_unicode=True)
    try:
        is_over = run_training(
            cfg, start_up=start_up, deadline=deadline, config_text=text, command=sys.orig_argv
        )
    except SameFailureError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(leave_with(EXIT_NEVER))
    except ConfigError as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(leave_with(EXIT_NEVER))
    if is_over:
        leave_with(0)  # after an elastic restart the file may still say 75
    else:
        sys.exit(leave_with(EXIT_AGAIN, deadline.reason()))


def report_check(cfg: TrainRoot, given: Collection[str] = ()) -> None:
    """Print what the run would be, and fail with every problem at once."""
    found = check_train(cfg, world_size=world_size() if world_size() > 1 else None, given=given)
    for fact in found.facts:
        print(f"ok       {fact}")
    for warning in found.warnings:
        print(f"warning  {warning}")
    found.raise_if_any()
    print("ok       nothing stands in the way of this run")
