"""`llmtrain data import`: tokens of Megatron-LM, datatrove and OLMo as a data folder."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.cli.compose import run_verb
from llmtrain.data.formats.config import ImportConfig
from llmtrain.data.formats.importing import ImportReport, import_tokens
from llmtrain.units import format_count


def main() -> None:
    run_verb("data_import", ImportConfig, take_in)


def take_in(cfg: ImportConfig) -> None:
    """Import, and say what came of it."""
    for line in lines(import_tokens(cfg)):
        print(line)


def lines(report: ImportReport) -> Iterator[str]:
    manifest = report.manifest
    for split in ("train", "held_out"):
        own = manifest.split_shards(split)
        documents, tokens = (int(own.records[name].sum()) for name in ("num_documents", "num_tokens"))
        yield f"{split:<9} {documents:,} documents, {format_count(tokens)} tokens in {len(own)} shards"
    copied = len(manifest.table) - report.num_linked
    yield f"linked    {report.num_linked} shards are the files themselves, {copied} were written anew"
    if report.num_appended:
        yield f"EOS       {report.num_appended:,} documents got one"
    if report.num_empty:
        yield f"empty     {report.num_empty:,} documents without a token were left out"
    for pack in manifest.packs:
        yield (
            f"pack      {pack.split} seq_len={pack.seq_len} {pack.strategy}: {pack.num_rows:,} rows, "
            f"{pack.num_target_tokens:,} targets"
        )
    yield f"next      llmtrain train +experiment=demo data.folder={report.out}"
