"""What a step of a past run read, down to its documents: for `data trace run=` and `replay`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.cli.run_config import run_config
from llmtrain.data.trace import Traced, trace_rows
from llmtrain.loader.replay import PastRun, StepRow

EXCERPT_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class TracedRow:
    place: StepRow
    documents: list[Traced]
    """One for each of the row's segments, in their order."""


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line[:EXCERPT_CHARS] + ("…" if len(line) > EXCERPT_CHARS else "")


def past_run(folder: Path) -> PastRun:
    """The run's ledger with the data its config names."""
    root = run_config(folder)
    return PastRun(folder, root.data, seed=root.run.seed)


def traced(past: PastRun, rows: Sequence[StepRow]) -> list[TracedRow]:
    """The same rows with their documents."""
    documents: dict[int, list[Traced]] = {}
    for source, folder in past.data.folders.items():
        own = [row for row in rows if row.source == source]
        if own:
            numbers = [row.row for row in own]
            found = trace_rows(
                folder, numbers, split="train", seq_len=past.cfg.seq_len, packing=past.cfg.packing
            )
            documents |= {row.position: each for row, each in zip(own, found, strict=True)}
    return [TracedRow(place=row, documents=documents[row.position]) for row in rows]
