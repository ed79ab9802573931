"""`llmtrain data`: text to shards of tokens, and a summary of what became of it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.cli.compose import run_verb
from llmtrain.data.config import DataConfig
from llmtrain.data.manifest import Manifest
from llmtrain.data.pipeline import Report, run
from llmtrain.units import format_bytes, format_count, format_duration


def main() -> None:
    run_verb("data", DataConfig, prepare)


def prepare(cfg: DataConfig) -> None:
    """Run the passes and print the funnel."""
    report = run(cfg)
    console = Console(highlight=False, width=None)
    console.print(funnel_table(cfg.corpus.name, report.funnel))
    for line in summary_lines(report):
        console.print(line, soft_wrap=True)


def funnel_table(corpus: str, funnel: list[dict[str, Any]]) -> Table:
    """What each pass took in, kept and dropped, by reason."""
    table = Table(title=f"What became of corpus {corpus}", title_justify="left")
    table.add_column("pass")
    for heading in ("documents", "text", "share"):
        table.add_column(heading, justify="right")
    for entry in funnel:
        if entry["pass"] not in ("scan", "decide"):
            continue
        into = entry["in"]
        table.add_row(f"{entry['pass']}: in", *_cells(into, into), style="bold")
        for reason, count in sorted(entry["dropped"].items(), key=lambda item: -item[1]["bytes"]):
            table.add_row(f"  {reason.replace('_', ' ')}", *_cells(count, into))
        table.add_row("  kept", *_cells(entry["kept"], into))
    return table


def summary_lines(report: Report) -> list[str]:
    """What was written, how long it took, what to type next."""
    lines = []
    if report.manifest is not None:
        lines += _shard_lines(report.manifest)
    for split in ("train", "held_out"):
        if files := [file for file in report.documents if file.split == split]:
            num_documents = sum(file.num_documents for file in files)
            text, written = (
                format_bytes(sum(getattr(f, n) for f in files)) for n in ("text_bytes", "num_bytes")
            )
            where = f"{len(files)} Parquet files of {written}"
            lines.append(f"{split:<9} {num_documents:,} documents, {text} of text in {where}")
    times = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in report.seconds.items())
    lines.append(f"time      {times}")
    listing = "manifest.json" if report.manifest else "documents.json" if report.documents else "facts.json"
    lines.append(f"in        {report.out} ({listing} says what is there)")
    if report.manifest is not None:
        lines.append(f"next      llmtrain train +experiment=demo data.folder={report.out}")
    lines.append(f"look      llmtrain report folder={report.out}")
    return lines


def _shard_lines(manifest: Manifest) -> list[str]:
    lines = []
    for split in manifest.splits[::-1]:
        shards = manifest.split_shards(split)
        num_tokens, text_bytes = sum(s.num_tokens for s in shards), sum(s.text_bytes for s in shards)
        rows = ", ".join(
            f"{pack.num_rows:,} rows of {pack.seq_len} by {pack.strategy.replace('_', ' ')} "
            f"({pack.num_padding / (pack.num_rows * pack.seq_len or 1):.2%} padding, "
            f"{pack.num_cut_documents:,} documents cut)"
            for pack in manifest.packs
            if pack.split == split
        )
        lines.append(
            f"{split:<9} {format_count(num_tokens)} tokens = {format_bytes(text_bytes)} of text at "
            f"{text_bytes / num_tokens:.2f} bytes a token; {rows}; {len(shards)} shards"
        )
    checks = next(entry for entry in manifest.funnel if entry["pass"] == "tokenize")
    lines.append(
        f"tokenizer {manifest.tokenizer.vocab_size:,} pieces; of {checks['checked_documents']:,} documents "
        f"encoded again by SentencePiece {checks['differing_documents']} differ"
    )
    return lines


def _cells(count: dict[str, int], into: dict[str, int]) -> tuple[str, str, str]:
    share = count["bytes"] / into["bytes"] if into["bytes"] else 0.0
    documents = f"{count['documents']:,}" if count["documents"] else "–"
    return documents, format_bytes(count["bytes"]), f"{share:.1%}"
