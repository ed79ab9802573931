"""`llmtrain report run=FOLDER`: one self-contained report.html of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtrain.cli.compose import run_verb
from llmtrain.tracking.report import write_report


@dataclass(kw_only=True)
class ReportRoot:
    run: str
    """Folder of the run."""
    out: str | None = None
    """File to write; null: report.html in the run folder."""


def report(config: ReportRoot) -> None:
    path = write_report(Path(config.run), None if config.out is None else Path(config.out))
    print(f"report: {path} ({path.stat().st_size / 1024:.0f} KiB, opens without a network)")


def main() -> None:
    run_verb("report", ReportRoot, report)
