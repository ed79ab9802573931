"""How far long work has come: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from llmtrain.units import format_bytes, format_count, format_duration

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(
    title: str, *, total: float, unit: str, quiet: bool = False
) -> Iterator[Callable[[float], None]]:
    """Yield a function that takes how much more is done. The last line says what was done, and how fast.

    Args:
        total: in `unit`; `B` is shown as bytes, anything else as a count.
        quiet: show nothing, for tests and for work that nobody waits for.
    """
    if quiet:
        yield lambda more: None
    elif sys.stderr.isatty():
        with _bar(title, total, unit) as advance:
            yield advance
    else:
        lines = _Lines(title, total, unit)
        yield lines.advance
        lines.finish()


@contextmanager
def _bar(title: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    started, done = time.monotonic(), 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"{title:<9}", total=total or 1, amount="")

        def advance(more: float) -> None:
            nonlocal done
            done += more
            bars.update(task, advance=more, amount=_amount(done, unit, time.monotonic() - started))

        yield advance
    console.print(f"{title:<9} {_amount(done, unit, time.monotonic() - started)}", highlight=False)


class _Lines:
    """Plain lines, at most one every SECONDS_BETWEEN_LINES."""

    def __init__(self, title: str, total: float, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.started = self.last_line = time.monotonic()
        self.done = 0.0

    def advance(self, more: float) -> None:
        self.done += more
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            share = self.done / self.total if self.total else 1.0
            left = format_duration((now - self.started) * (1 / share - 1)) if share > 0 else "?"
            log.info(
                "%s: %.0f%%, %s, %s left",
                self.title,
                100 * share,
                _amount(self.done, self.unit, now - self.started),
                left,
            )

    def finish(self) -> None:
        log.info("%s: %s", self.title, _amount(self.done, self.unit, time.monotonic() - self.started))


def _amount(done: float, unit: str, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    if unit == "B":
        return f"{format_bytes(done)} in {format_duration(seconds)}, {format_bytes(rate)}/s"
    return f"{format_count(done)} {unit} in {format_duration(seconds)}, {format_count(rate)} {unit}/s"
