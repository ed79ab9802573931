"""`llmtrain train`: check everything that can be checked, then run. Started by torchrun it is one of many ranks."""

from __future__ import annotations

import sys
from dataclasses import replace

import yaml

from llmtrain import files
from llmtrain.cli.compose import run_verb, sweep_folder
from llmtrain.log import world_size
from llmtrain.train.check import check_train
from llmtrain.train.config import TrainRoot
from llmtrain.train.start_up import StartUp


def main() -> None:
    run_verb("train", TrainRoot, run)


def run(cfg: TrainRoot) -> None:
    start_up = StartUp()
    if folder := sweep_folder():  # each job of a --multirun gets its own
        cfg = replace(cfg, run=replace(cfg.run, folder=str(folder)))
    if cfg.check_only:
        report_check(cfg)
        return
    start_up.mark("Python and Hydra")
    import torch  # noqa: F401, PLC0415  a login node's check_only=true must not pay for it

    start_up.mark("torch")
    import llmtrain.train.engine  # noqa: F401, PLC0415  DeepSpeed's border: most of the time is its import

    start_up.mark("DeepSpeed's import")
    from llmtrain.train.assemble import run_training  # noqa: PLC0415  needs torch

    text = yaml.safe_dump(files.plain(cfg), sort_keys=False, allow_unicode=True)
    run_training(cfg, start_up=start_up, config_text=text, command=sys.orig_argv)


def report_check(cfg: TrainRoot) -> None:
    """Print what the run would be, and fail with every problem at once."""
    found = check_train(cfg, world_size=world_size() if world_size() > 1 else None)
    for fact in found.facts:
        print(f"ok       {fact}")
    for warning in found.warnings:
        print(f"warning  {warning}")
    found.raise_if_any()
    print("ok       nothing stands in the way of this run")
