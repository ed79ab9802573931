"""`llmtrain report folder=FOLDER`: one self-contained report.html of a training run or of a data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError
from llmtrain.tracking.data_report import is_data_folder, write_data_report
from llmtrain.tracking.report import write_report


@dataclass(kw_only=True)
class ReportRoot:
    folder: str | None = None
    """Folder of a training run, or of prepared data (one with a manifest.json or facts.json)."""
    run: str | None = None
    """Folder of a training run; the same as `folder`."""
    out: str | None = None
    """File to write; null: report.html in the folder."""


def report(config: ReportRoot) -> None:
    if (config.folder is None) == (config.run is None):
        given = f"both folder={config.folder} and run={config.run}" if config.folder else "neither"
        raise ConfigError(f"give one of folder=FOLDER and run=FOLDER, not {given}")
    folder = Path(str(config.folder or config.run))
    out = None if config.out is None else Path(config.out)
    path = write_data_report(folder, out) if is_data_folder(folder) else write_report(folder, out)
    print(f"report: {path} ({path.stat().st_size / 1024:.0f} KiB, opens without a network)")


def main() -> None:
    run_verb("report", ReportRoot, report)
