"""`llmtrain tensorboard run=FOLDER`: a run's curves as files for TensorBoard, followed while it goes.

It reads metrics.jsonl and writes beside it, so a run neither needs it nor notices it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError, DataError, DiskError
from llmtrain.files import FolderLock
from llmtrain.tracking.follow import MetricsFollower
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import ENDINGS
from llmtrain.tracking.run_list import METRICS_NAME
from llmtrain.tracking.tensorboard import FOLDER_NAME, EventFile, TensorBoardSink, clear

HINT = "look at it with `tensorboard --logdir {folder}` (pip install tensorboard)"


@dataclass(kw_only=True)
class TensorBoardConfig:
    run: str
    """The run folder."""
    out: str | None = None
    """Folder of the event files; null: tensorboard/ in the run folder. Event files in it are replaced."""
    follow: bool = True
    """Whether to wait for more until the run is finished; false: convert what there is."""
    refresh_s: float = 5.0
    """Seconds between two looks at metrics.jsonl."""

    def __post_init__(self) -> None:
        if not self.refresh_s > 0:
            raise ConfigError(f"refresh_s={self.refresh_s} must be above 0 seconds")


def main() -> None:
    run_verb("tensorboard", TensorBoardConfig, follow)


def follow(cfg: TensorBoardConfig) -> None:
    """Write event files until the run is finished. One that was stopped or failed may go on: it is waited
    for."""
    folder = Path(cfg.run)
    if not (folder / METRICS_NAME).exists():
        raise DataError(
            f"{folder} holds no {METRICS_NAME}; `llmtrain status folder={folder.parent}` lists the runs there"
        )
    out = Path(cfg.out) if cfg.out is not None else folder / FOLDER_NAME
    try:
        with FolderLock(out):
            print(f"writing {out}; {HINT.format(folder=out)}", flush=True)
            num_steps = _write(MetricsFollower(folder / METRICS_NAME), out, cfg)
    except OSError as error:
        if isinstance(error, DataError | DiskError) or error.errno is None:
            raise
        raise DiskError(f"{out} cannot be written: {error.strerror}; give another folder with out=") from None
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{num_steps:,} steps in {out}")


def _write(follower: MetricsFollower, out: Path, cfg: TensorBoardConfig) -> int:
    """Convert until the end; begin anew when metrics.jsonl turns out to be another file."""
    records = follower.new_records()
    while True:
        clear(out)
        generation, num_steps, is_finished = follower.generation, 0, False
        with EventFile(out) as events:
            sink = TensorBoardSink(events)
            while follower.generation == generation:
                sink.take(records)
                num_steps += sum(1 for record in records if record["kind"] == "step")
                is_finished = _finished(records, before=is_finished)
                if not follower.is_behind:
                    if is_finished or not cfg.follow:
                        return num_steps
                    time.sleep(cfg.refresh_s)
                records = follower.new_records()


def _finished(records: list[Record], *, before: bool) -> bool:
    """Whether the newest attempt has done the run's last step."""
    for record in records:
        if record["kind"] == "event" and record.get("what") in (*ENDINGS, "start", "resume"):
            before = record["what"] == "finished"
    return before
