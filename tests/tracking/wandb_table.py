"""The table of docs/wandb.md: what each name at W&B is."""

from __future__ import annotations

import functools
import re
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs/wandb.md"


@functools.cache
def names() -> dict[str, str]:
    """Name to unit. A star stands for every ending: `events/*` for every kind of event."""
    found: dict[str, str] = {}
    text = PATH.read_text(encoding="utf-8").partition("## What is logged")[2].partition("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in found, f"{name} is there twice"
                found[name] = cells[1]
    assert found, f"{PATH} has no table"
    return found


def unit_of(name: str) -> str:
    """KeyError for a name that is not logged."""
    starred = [known for known in names() if known.endswith("*") and name.startswith(known[:-1])]
    return names()[starred[0] if starred else name]
