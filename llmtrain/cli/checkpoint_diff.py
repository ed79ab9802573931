"""`llmtrain checkpoint diff`: where two checkpoints differ."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llmtrain.checkpoint.diff import Difference, compare
from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.compose import run_verb
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class DiffConfig:
    a: str
    """A run folder or its checkpoints/, for the newest; or one step's folder. Or a URL."""
    b: str
    """The other."""
    state: bool = True
    """Whether settings, position and everything else of the state counts; false: tensors alone."""
    worst: int = 10
    """Tensors that are shown, those with the largest relative difference; json has all of them."""
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        if self.worst < 1:
            raise ConfigError(f"worst={self.worst} must be at least 1")


def main() -> None:
    run_verb("checkpoint_diff", DiffConfig, show)


def show(cfg: DiffConfig) -> None:
    """Print what differs; exit status 1 when anything does."""
    found = compare(place_of(cfg.a), place_of(cfg.b), state=cfg.state)
    if cfg.format is OutputFormat.json:
        print(json.dumps(_finite(asdict(found) | {"differs": found.differs}), indent=1))
    else:
        console = Console(highlight=False)
        for line in lines(found):
            console.print(line, soft_wrap=True, markup=False)
        if found.tensors:
            console.print(table(found, worst=cfg.worst))
        console.print(summary(found, state=cfg.state), soft_wrap=True, markup=False)
    if found.differs:
        sys.exit(1)


def lines(found: Difference) -> list[str]:
    told = [f"a: {found.a}, step {found.steps[0]}", f"b: {found.b}, step {found.steps[1]}"]
    told += [f"  {name}: {a} -> {b}" for name, a, b in found.state]
    told += [f"  only in a: {each}" for each in by_kind(found.only_in_a, found.kinds[1])]
    told += [f"  only in b: {each}" for each in by_kind(found.only_in_b, found.kinds[0])]
    told += [f"  {name} has shape {a} -> {b}" for name, a, b in found.shapes]
    told += [f"  {name} is of type {a} -> {b}" for name, a, b in found.types]
    return told


def by_kind(names: list[str], others_kinds: list[str]) -> list[str]:
    """A line for each tensor, but for a kind of which the other has none, one."""
    counts = Counter(name.split()[0] for name in names)
    told = [f"{count:,} tensors of {kind}" for kind, count in counts.items() if kind not in others_kinds]
    return [*told, *(name for name in names if name.split()[0] in others_kinds)]


def table(found: Difference, *, worst: int) -> Table:
    shown = Table(box=box.SIMPLE)
    shown.add_column("tensor", overflow="fold")
    for heading in ("unequal", "max |a-b|", "|a-b|/|a|"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for each in found.tensors[:worst]:
        shown.add_row(
            f"{each.kind} {each.name}",
            f"{each.num_unequal:,} of {each.num_elements:,}",
            f"{each.max_abs:.3g}",
            f"{each.relative_l2:.3g}",
        )
    if len(found.tensors) > worst:
        shown.caption = f"and {len(found.tensors) - worst:,} more"
    return shown


def summary(found: Difference, *, state: bool) -> str:
    told = f"{len(found.tensors):,} of {found.num_compared:,} tensors have other numbers"
    if not found.tensors:
        told = f"{found.num_compared:,} tensors, {found.num_elements:,} elements: equal bit by bit"
    settings = f"{len(found.state):,} entries of the state differ" if state else "the state was not compared"
    return f"{told}; {settings}"


def _finite(value: Any) -> Any:
    """JSON knows no infinity, and nothing that is not a number: both become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
