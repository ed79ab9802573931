"""`llmtrain inspect checkpoint`: what a checkpoint holds, who wrote it, and whether every byte is right."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from llmtrain.checkpoint.inspect import Inspection, inspect_checkpoint
from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.compose import run_verb
from llmtrain.data.trace import OutputFormat
from llmtrain.units import format_bytes

MAX_FILES = 16


@dataclass(kw_only=True)
class InspectCheckpointConfig:
    path: str
    """A run folder or its checkpoints/, for the newest; or one step's folder."""
    verify: bool = True
    """Whether every byte is compared with its hash, which takes as long as reading it; false: marker,
    manifest and sizes alone."""
    format: OutputFormat = OutputFormat.text


def main() -> None:
    run_verb("inspect_checkpoint", InspectCheckpointConfig, show)


def show(cfg: InspectCheckpointConfig) -> None:
    """Print what was found; exit status 1 when something is damaged."""
    found = inspect_checkpoint(place_of(cfg.path), verify=cfg.verify)
    if cfg.format is OutputFormat.json:
        print(json.dumps(asdict(found) | {"problems": found.problems}, indent=1))
    else:
        console = Console(highlight=False)
        console.print(f"{found.path}: step {found.step}", soft_wrap=True, markup=False)
        for name, value in found.facts.items():
            console.print(f"  {name:<16} {value}", soft_wrap=True, markup=False)
        console.print(kinds_table(found))
        console.print(files_table(found, verified=cfg.verify))
        for line in [*found.problems, summary(found, verified=cfg.verify)]:
            console.print(line, soft_wrap=True, markup=False)
    if found.problems:
        sys.exit(1)


def kinds_table(found: Inspection) -> Table:
    table = Table("kind", box=box.SIMPLE)
    for heading in ("tensors", "elements", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("type", "largest tensor"):
        table.add_column(heading)
    for each in found.kinds:
        table.add_row(
            each.kind,
            f"{each.num_tensors:,}",
            f"{each.num_elements:,}",
            format_bytes(each.num_bytes),
            ", ".join(each.dtypes),
            f"{each.largest} {each.largest_shape}",
        )
    return table


def files_table(found: Inspection, *, verified: bool) -> Table:
    table = Table("file", box=box.SIMPLE)
    for heading in ("pieces", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    damaged_first = sorted(found.files, key=lambda file: not file.problems)
    for file in damaged_first[:MAX_FILES]:
        state = "damaged" if file.problems else "whole" if verified else "there"
        table.add_row(file.path, f"{file.num_pieces:,}", format_bytes(file.num_bytes), state)
    if len(found.files) > MAX_FILES:
        table.caption = f"and {len(found.files) - MAX_FILES:,} more, all {'whole' if verified else 'there'}"
    return table


def summary(found: Inspection, *, verified: bool) -> str:
    num_bytes = sum(file.num_bytes for file in found.files)
    how = "every byte compared with its hash" if verified else "sizes compared, contents not"
    num_damaged = sum(bool(file.problems) for file in found.files)
    others = [step for step in found.steps if step != found.step]
    beside = f"; beside it: step {', '.join(map(str, others))}" if others else ""
    return f"{len(found.files):,} files, {format_bytes(num_bytes)}, {how}: {num_damaged} damaged{beside}"
