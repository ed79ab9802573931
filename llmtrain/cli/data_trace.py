"""`llmtrain data trace`: from a token or a row of a pack back to document, file and text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from llmtrain.cli.compose import run_verb
from llmtrain.data.trace import OutputFormat, TraceConfig, Traced, as_json, trace

EXCERPT_CHARS = 100
"""Of each document, when a trace touches several."""


def main() -> None:
    run_verb("data_trace", TraceConfig, show)


def show(cfg: TraceConfig) -> None:
    found = trace(cfg)
    if cfg.format is OutputFormat.json:
        print(json.dumps(as_json(found), ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False)
    for line in details(found[0]) if len(found) == 1 else overview(found):
        console.print(line, soft_wrap=True)


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
        excerpt = " ".join(run.text.split())
        yield Text(f"    {excerpt[:EXCERPT_CHARS]}{'…' if len(excerpt) > EXCERPT_CHARS else ''}", "dim")
