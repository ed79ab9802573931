"""`llmtrain data`: text to shards of tokens, and a summary of what became of it."""

from __future__ import annotations

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
    console.print(funnel_table(report.manifest))
    for line in summary_lines(report):
        console.print(line, soft_wrap=True)


def funnel_table(manifest: Manifest) -> Table:
    """What each pass took in, kept and dropped, by reason."""
    table = Table(title=f"What became of corpus {manifest.corpus}", title_justify="left")
    table.add_column("pass")
    for heading in ("documents", "text", "share"):
        table.add_column(heading, justify="right")
    for entry in manifest.funnel:
        if entry["pass"] not in ("scan", "decide"):
            continue
        into = entry["in"]
        table.add_row(f"{entry['pass']}: in", *_cells(into, into), style="bold")
        for reason, count in sorted(entry["dropped"].items(), key=lambda item: -item[1]["bytes"]):
            table.add_row(f"  {reason.replace('_', ' ')}", *_cells(count, into))
        table.add_row("  kept", *_cells(entry["kept"], into))
    return table


def summary_lines(report: Report) -> list[str]:
    """Tokens, bytes per token, where it lies, what to type next."""
    manifest = report.manifest
    lines = []
    for split in manifest.splits[::-1]:
        shards = manifest.split_shards(split)
        num_tokens, text_bytes = sum(s.num_tokens for s in shards), sum(s.text_bytes for s in shards)
        rows = ", ".join(
            f"{pack.num_rows:,} rows of {pack.seq_len}" for pack in manifest.packs if pack.split == split
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
    times = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in report.seconds.items())
    lines.append(f"time      {times}")
    lines.append(f"in        {report.out} (manifest.json says what is there)")
    lines.append(f"next      llmtrain train +experiment=demo data.folder={report.out}")
    return lines


def _cells(count: dict[str, int], into: dict[str, int]) -> tuple[str, str, str]:
    share = count["bytes"] / into["bytes"] if into["bytes"] else 0.0
    documents = f"{count['documents']:,}" if count["documents"] else "–"
    return documents, format_bytes(count["bytes"]), f"{share:.1%}"
