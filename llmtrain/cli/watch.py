"""`llmtrain watch run=FOLDER`: one run in the terminal, as it goes, read from its metrics.jsonl."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.live import Live

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError, DataError
from llmtrain.tracking.beats import pulse_of
from llmtrain.tracking.console import Terminal
from llmtrain.tracking.follow import MetricsFollower
from llmtrain.tracking.live_view import RunView, local_clock, silent_words
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import as_number
from llmtrain.tracking.run_events import told
from llmtrain.tracking.run_list import CONFIG_NAME, METRICS_NAME, age_s, config_parts

PULSE_AFTER_S = 10.0
"""Without a record for so long, the picture says what rank 0 writes of itself."""


@dataclass(kw_only=True)
class WatchConfig:
    run: str
    """The run folder."""
    refresh_s: float = 1.0
    """Seconds between two looks at the file."""
    silent_after_s: float = 300.0
    """Seconds without a record after which the run is called silent."""
    restarts: bool = False
    """Whether to go on watching after an attempt has ended before the run's last step, for the next one."""
    log_every_steps: int = 10
    """Steps between two lines where the output is not a terminal."""

    def __post_init__(self) -> None:
        if not (self.refresh_s > 0 and self.silent_after_s > 0):
            raise ConfigError(
                f"refresh_s={self.refresh_s} and silent_after_s={self.silent_after_s} must be above 0 seconds"
            )
        if self.log_every_steps < 1:
            raise ConfigError(f"log_every_steps={self.log_every_steps} must be at least 1")


def main() -> None:
    run_verb("watch", WatchConfig, watch)


def watch(cfg: WatchConfig) -> None:
    """Follow the run until it ends or the user leaves. Exit status 1 if it ended before its last step."""
    folder = Path(cfg.run)
    if not folder.is_dir():
        raise DataError(
            f"no run folder {folder}; `llmtrain status folder={folder.parent}` lists those that there are"
        )
    watcher = Watcher(folder)
    try:
        if sys.stdout.isatty():
            _on_a_terminal(cfg, watcher)
        else:
            _as_lines(cfg, watcher)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:  # the reader has left, as in `| head`; what is still buffered is for nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not watcher.view.is_finished:
        sys.exit(1)


class Watcher:
    """A run's file and what is known of the run; begins anew when the file is another one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._follower = MetricsFollower(folder / METRICS_NAME)
        self._generation = 0
        self.view = self._new_view()

    def look(self) -> Iterator[Record]:
        """Take in what is new, and yield each record when it is in the view."""
        records = self._follower.new_records()
        if self._follower.generation != self._generation:
            self._generation = self._follower.generation
            self.view = self._new_view()
        if records and self.view.last_record is None:
            self.view = self._new_view()  # config.yaml may be younger than the first look
        for record in records:
            self.view.feed([record])
            yield record

    def silent_s(self) -> float:
        """Seconds since the last record."""
        last = self.view.last_record or {}
        return age_s(as_number(last.get("time")), self._follower.modified, time.time()) or 0.0

    def pulse_words(self) -> str:
        """Whether rank 0 still writes, and where it is; empty where its file does not say."""
        pulse = pulse_of(self.folder, attempt=self.view.attempt, now=time.time())
        return "" if pulse is None else pulse.words

    @property
    def is_behind(self) -> bool:
        return self._follower.is_behind

    def is_over(self, *, restarts: bool) -> bool:
        """Whether nothing more is to be waited for."""
        is_ended = self.view.is_finished or (self.view.ending is not None and not restarts)
        return is_ended and not self.is_behind

    def _new_view(self) -> RunView:
        config: dict[str, Any] = config_parts(self.folder / CONFIG_NAME)
        return RunView(self.folder.resolve().name, config)


def _on_a_terminal(cfg: WatchConfig, watcher: Watcher) -> None:
    terminal = Terminal()
    plain = not (terminal.encoding or "").lower().startswith("utf")

    def screen() -> Any:
        silent_s = watcher.silent_s()
        return watcher.view.render(
            width=terminal.width,
            height=terminal.height,
            silent_s=silent_s,
            silent_after_s=cfg.silent_after_s,
            pulse=watcher.pulse_words() if silent_s > PULSE_AFTER_S else "",
            plain=plain,
        )

    with Live(console=terminal, screen=True, auto_refresh=False) as live:
        while True:
            for _ in watcher.look():
                pass
            live.update(screen(), refresh=True)
            if watcher.is_over(restarts=cfg.restarts):
                break
            time.sleep(0.0 if watcher.is_behind else cfg.refresh_s)
    terminal.print(screen())  # what the terminal held before came back; the last picture stays below it


def _as_lines(cfg: WatchConfig, watcher: Watcher) -> None:
    """Where the run stands, then a line for every event and for some steps."""
    for _ in watcher.look():
        pass
    while watcher.is_behind:
        for _ in watcher.look():
            pass
    view = watcher.view
    state = view.state_words(watcher.silent_s(), cfg.silent_after_s).plain
    print(" | ".join([view.name, view.position(), state, *view.facts()]), flush=True)
    is_silent = watcher.silent_s() > cfg.silent_after_s
    while not watcher.is_over(restarts=cfg.restarts):
        time.sleep(0.0 if watcher.is_behind else cfg.refresh_s)
        for record in watcher.look():
            is_silent = False
            line = _line_of(record, watcher.view, cfg.log_every_steps)
            if line is not None:
                print(f"{local_clock(record)} {line}", flush=True)
        silent_s = watcher.silent_s()
        if not is_silent and silent_s > cfg.silent_after_s:
            is_silent = True
            print("; ".join(filter(None, [silent_words(silent_s), watcher.pulse_words()])), flush=True)


def _line_of(record: Record, view: RunView, log_every_steps: int) -> str | None:
    """What a log says of one record; None for a step between two lines, and for what the run only notes."""
    if record["kind"] == "step":
        is_shown = record["step"] % log_every_steps == 0 or record["step"] == view.total_steps
        return " | ".join([view.position(), *view.facts()]) if is_shown else None
    if record["kind"] in ("eval", "checkpoint", "event"):
        return f"step {record['step']:,}: {told(record).line}"
    return None
