"""`llmtrain data trace`: from a token, a row of a pack or a step of a run back to document, file and text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llmtrain.cli.compose import run_verb
from llmtrain.cli.past_step import TracedRow, excerpt, past_run, traced
from llmtrain.data.trace import OutputFormat, TraceConfig, Traced, as_json, trace
from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class TraceRoot(TraceConfig):
    """What `TraceConfig` takes, or a step of a run."""

    run: str | None = None
    """A run folder, in place of `folder`: its ledger and its config say what was read."""
    step: int | None = None
    """Step of that run, from 1."""
    rank: int | None = None
    """Only what this data-parallel rank read; null: all ranks."""
    micro_batch: int | None = None
    """Only this micro batch of each rank, from 0; null: all of them."""
    position: int | None = None
    """A row that the step took: after a rollback there are two steps of one number; null: the last one."""
    attempt: int | None = None
    """The attempt that did it; null: the last one that did."""

    def __post_init__(self) -> None:
        if self.run is None:
            of_runs = ("step", "rank", "micro_batch", "position", "attempt")
            if any(getattr(self, name) is not None for name in of_runs):
                raise ConfigError(f"{', '.join(of_runs)} belong to a run; give run=RUN_FOLDER")
            super().__post_init__()
        elif self.step is None or self.step < 1:
            raise ConfigError(f"step={self.step} with run={self.run}: steps of a run count from 1")
        elif given := [
            name
            for name in ("folder", "shard", "token", "row", "seq_len", "split", "length", "packing")
            if getattr(self, name) != getattr(TraceConfig, name)
        ]:
            raise ConfigError(
                f"{', '.join(given)}: a place in the data, and run={self.run} is a step of a run; leave one "
                "of them out"
            )


def main() -> None:
    run_verb("data_trace", TraceRoot, show)


def show(cfg: TraceRoot) -> None:
    if cfg.run is not None:
        show_step(cfg)
        return
    found = trace(cfg)
    if cfg.format is OutputFormat.json:
        print(json.dumps(as_json(found), ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False)
    for line in details(found[0]) if len(found) == 1 else overview(found):
        console.print(line, soft_wrap=True)


def show_step(cfg: TraceRoot) -> None:
    assert cfg.run is not None, "the caller looked"
    assert cfg.step is not None, "checked by TraceRoot"
    past = past_run(Path(cfg.run))
    found = past.rows_of(
        cfg.step,
        rank=cfg.rank,
        micro_batch=cfg.micro_batch,
        position=cfg.position,
        attempt=cfg.attempt,
    )
    rows = traced(past, found)
    if cfg.format is OutputFormat.json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False)
    for row in rows:
        console.print(headline(row), soft_wrap=True)
        for line in overview(row.documents):
            console.print(Text("  ") + line, soft_wrap=True)


def headline(row: TracedRow) -> Text:
    place = row.place
    return Text(
        f"row {place.position:,} of the run: rank {place.rank}, micro batch {place.micro_batch}; "
        f"row {place.row:,} of {place.source}",
        "bold",
    )


def details(run: Traced) -> list[Text]:
    """One document, with the run of tokens marked in its text."""
    tokens = (
        f"{run.token:,}" if run.num_tokens == 1 else f"{run.token:,} to {run.token + run.num_tokens - 1:,}"
    )
    inside = f"{run.token_in_document:,} of {run.document_tokens:,}"
    span = f"{run.byte_start:,} to {run.byte_end:,} of {run.text_bytes:,}"
    if not run.is_exact:
        span += ", of the decoded tokens: this tokenizer does not give back the text that it encodes"
    facts = {
        "file": f"{run.path}, record {run.record:,}",
        "source": run.source,
        "document": f"{run.document_id} (number {run.document:,} of its shard)",
        "tokens": f"{tokens} of {run.shard} ({run.split}); in the document {inside}",
        "bytes": span,
        "characters": f"{run.char_start:,} to {run.char_end:,}",
    }
    lines = [Text.assemble((f"{name:<11}", "bold"), fact) for name, fact in facts.items()]
    marked = (run.text, "reverse") if run.text else ("<end of document>", "reverse")
    before = "…" if run.byte_start > len(run.before.encode()) else ""
    after = "…" if run.byte_end + len(run.after.encode()) < run.text_bytes else ""
    return [*lines, Text(), Text.assemble(before, run.before, marked, run.after, after)]


def overview(found: list[Traced]) -> Iterator[Text]:
    """Two lines for each document."""
    for run in found:
        span = f"bytes {run.byte_start:,} to {run.byte_end:,} of {run.text_bytes:,}"
        place = f"{run.path}, record {run.record:,}, {span}"
        yield Text.assemble(
            (f"token {run.token:,}, {run.num_tokens:,} long", "bold"),
            f"  {place}, document {run.document_id}",
        )
        yield Text(f"    {excerpt(run.text)}", "dim")
