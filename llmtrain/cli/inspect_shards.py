"""`llmtrain inspect shards`: what shards hold, and whether every byte of them is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from llmtrain.cli.compose import run_verb
from llmtrain.data.inspect import InspectConfig, Inspection, as_json, inspect_shards
from llmtrain.data.trace import OutputFormat
from llmtrain.units import format_bytes

MAX_ROWS = 40


def main() -> None:
    run_verb("inspect_shards", InspectConfig, show)


def show(cfg: InspectConfig) -> None:
    """Print what was found; exit status 1 when something is damaged."""
    found = inspect_shards(cfg)
    if cfg.format is OutputFormat.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        console = Console(highlight=False)
        console.print(shards_table(found))
        for line in lines(found, content=cfg.content):
            console.print(line, soft_wrap=True, markup=False)
    if found.num_problems:
        sys.exit(1)


def shards_table(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("shard", no_wrap=True, overflow="fold")
    for heading in ("docs", "tokens", "bytes", "max id", "inner EOS"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for shard in found.shards[:MAX_ROWS]:
        inside = "–" if shard.num_eos is None else f"{shard.num_eos - shard.num_documents:,}"
        table.add_row(
            Path(shard.path).name,
            f"{shard.num_documents:,}",
            f"{shard.num_tokens:,}",
            format_bytes(shard.num_bytes),
            "–" if shard.max_id is None else f"{shard.max_id:,}",
            inside,
            "damaged" if shard.problems else "whole",
        )
    if len(found.shards) > MAX_ROWS:
        table.caption = f"and {len(found.shards) - MAX_ROWS:,} more"
    return table


def lines(found: Inspection, *, content: bool) -> list[str]:
    """Every problem, and the sum."""
    told = [problem for shard in found.shards for problem in shard.problems] + found.problems
    told += [
        f"moved to {path}.*; `{found.made_by}` with the same settings writes it again"
        for path in found.quarantined
    ]
    num_damaged = sum(bool(shard.problems) for shard in found.shards)
    how = "every byte read" if content else "sizes only"
    kinds = ", ".join(sorted({shard.dtype for shard in found.shards}))
    told.append(
        f"{len(found.shards):,} shards with {sum(shard.num_tokens for shard in found.shards):,} tokens of "
        f"{kinds}, {how}: {num_damaged} damaged"
    )
    return told
