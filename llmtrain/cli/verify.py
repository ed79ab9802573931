"""`llmtrain verify <what llmtrain train takes>`: run a small copy of the config on its layout, against one
process, and write what was found as a certificate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError, LLMTrainError
from llmtrain.log import global_rank, world_size
from llmtrain.parallel.compatibility import explain
from llmtrain.parallel.deepspeed_keys import check_extra
from llmtrain.train.certificate import CERTIFICATE_NAME
from llmtrain.train.check import layout_of
from llmtrain.train.config import TrainRoot
from llmtrain.train.deepspeed_config import our_keys
from llmtrain.train.shrink import shrink
from llmtrain.units import format_duration

if TYPE_CHECKING:
    from llmtrain.train.verify import Check


def main() -> None:
    ConfigStore.instance().store(name="train_schema", node=TrainRoot)  # conf/verify.yaml begins with train's
    run_verb("verify", TrainRoot, run)


def run(cfg: TrainRoot) -> None:
    if global_rank() != 0:  # under torchrun one process does it all
        return
    ranks = ranks_of(cfg)
    small = shrink(cfg, num_ranks=ranks)
    print(f"verify: {ranks} ranks as {small.num_ranks} CPU processes, against one process in fp32")
    for name, (before, after) in small.changes.items():
        print(f"  {name}: {before} -> {after}")
    for sentence in small.not_covered:
        print(f"  not covered: {sentence}")
    from llmtrain.train import verify  # noqa: PLC0415  torch: mistakes in the config are told before it

    found = verify.verify(small)
    print_checks(found.checks)
    path = Path(cfg.verify.folder or cfg.run.folder) / CERTIFICATE_NAME
    verify.write_certificate(path, cfg, ranks, small, found)
    print(f"verify: {format_duration(found.seconds)}, certificate: {path}")
    if not found.passed:
        failed = [check.sentence() for check in found.checks if not check.passed]
        raise LLMTrainError("\n       ".join(failed))


def ranks_of(cfg: TrainRoot) -> int:
    """How many ranks the run is meant for.

    Raises:
        ConfigError: the layout does not fit them, or is not legal.
    """
    if (
        None not in (cfg.verify.ranks, cfg.parallel.world_size)
        and cfg.verify.ranks != cfg.parallel.world_size
    ):
        raise ConfigError(
            f"verify.ranks={cfg.verify.ranks}, but parallel.world_size={cfg.parallel.world_size}; "
            "give one of them, or the same"
        )
    ranks = cfg.verify.ranks or cfg.parallel.world_size or world_size()
    broken = explain(layout_of(cfg, device=None), ranks)
    broken += check_extra(cfg.parallel.deepspeed, our_keys(cfg.train, cfg.parallel))
    if broken:
        raise ConfigError("\n       ".join(broken))
    return ranks


def print_checks(checks: Sequence[Check]) -> None:
    """A table on a terminal, else a line a check."""
    rows = [
        (
            check.name,
            f"{check.worst:.1e}",
            f"{check.bound:.0e}",
            "pass" if check.passed else "FAIL",
            check.where,
        )
        for check in checks
    ]
    heads = ("check", "worst", "bound", "", "where")
    if sys.stdout.isatty():
        table = Table(*heads)
        for row in rows:
            verdict = Text(row[3], style="green" if row[3] == "pass" else "bold red")
            table.add_row(*row[:3], verdict, Text(row[4]))
        Console(highlight=False).print(table)
        return
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(4)]
    for row in (heads, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
        print("  ".join([*cells, row[4]]).rstrip())
