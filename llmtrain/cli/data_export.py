"""`llmtrain data export`: shards for Megatron-LM, datatrove and OLMo, as hard links."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.cli.compose import run_verb
from llmtrain.data.formats.config import ExportConfig, TokenFormat
from llmtrain.data.formats.exporting import ExportReport, export_tokens
from llmtrain.units import format_count


def main() -> None:
    run_verb("data_export", ExportConfig, export)


def export(cfg: ExportConfig) -> None:
    """Export, and say what to tell the other framework."""
    for line in lines(cfg, export_tokens(cfg)):
        print(line)


def lines(cfg: ExportConfig, report: ExportReport) -> Iterator[str]:
    for split, num_files in report.num_files.items():
        where = report.out / split
        yield f"{split:<9} {format_count(report.num_tokens[split])} tokens in {num_files} files in {where}"
    num_files = sum(report.num_files.values())
    copied = num_files - report.num_linked
    yield f"linked    {report.num_linked} of {num_files}" + (
        f"; {copied} copied: {report.out} is on another file system" if copied else ": no token was copied"
    )
    first = next(iter(report.num_files), "train")
    told = {
        TokenFormat.megatron: f"--data-path {report.out}/{first}/{first}-00000 ...",
        TokenFormat.datatrove: f"dataset_folder: {report.out}/{first}, of {report.token_type}",
        TokenFormat.olmo: f"paths: {report.out}/{first}/*.npy, dtype: {report.token_type}",
    }
    yield f"there     {told[cfg.kind]}"
