"""Progress for people: a live line on a terminal, plain lines at an interval in a log.

Nothing here may stop a run. A terminal that goes away (a closed ssh session, a finished `| head`) ends the
display and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, cast

import rich.console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from llmtrain.units import format_count, format_duration

RATE_WINDOW_STEPS = 50
"""Steps over which the time left is estimated: long enough to be calm, short enough to follow a change."""
REDRAW_S = 0.1
BAR_COLUMNS = 12
BAR_AND_COUNT_COLUMNS = BAR_COLUMNS + 28
"""Width of the live line left of the facts, for steps of up to six digits."""


class Terminal(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Raise what rich would turn into the end of the program."""
        raise BrokenPipeError("the reader has left")


class Console:
    """Shows step records (see `metrics.py` for their keys) and events.

    Args:
        total_steps: the run's length; the bar is full there.
        start_step: steps done before this attempt.
        log_every_steps: interval of the plain lines; a terminal shows every step.
        stream: standard error unless given.
        is_terminal: None asks the stream.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        log_every_steps: int = 10,
        stream: IO[str] | None = None,
        is_terminal: bool | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._log_every_steps = log_every_steps
        self._stream: IO[str] | None = sys.stderr if stream is None else stream
        self._seen: deque[tuple[float, int]] = deque(
            [(time.monotonic(), start_step)], maxlen=RATE_WINDOW_STEPS
        )
        self._eval_loss: float | None = None
        self._drawn_at = 0.0
        self._progress: Progress | None = None
        self._moved_handlers: list[tuple[logging.StreamHandler[IO[str]], IO[str]]] = []
        live = self._stream.isatty() if is_terminal is None else is_terminal
        if live:
            self._guarded(self._start_live)

    def step(self, record: Mapping[str, object]) -> None:
        """Show a record of kind "step"."""
        self._guarded(lambda: self._show_step(record))

    def evaluation(self, record: Mapping[str, object]) -> None:
        """Show a record of kind "eval"; its loss stays in the live line until the next one."""
        self._eval_loss = _number(record, "eval_loss")
        bits = _number(record, "eval_bits_per_byte")
        text = (
            f"held-out loss {self._eval_loss:.4f}"
            if self._eval_loss is not None
            else "held-out loss not finite"
        )
        self.event(
            f"step {record['step']}: {text}" + (f", {bits:.4f} bits per byte" if bits is not None else "")
        )

    def event(self, text: str) -> None:
        """Show one line of text at once: a save, a resume, a stop."""
        self._guarded(lambda: self._line(text))

    def close(self) -> None:
        """End the live line and leave it on the screen. Further calls show nothing."""
        self._guarded(self._stop_live)
        self._restore_logging()
        self._stream = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _show_step(self, record: Mapping[str, object]) -> None:
        step = cast(int, record["step"])
        now = time.monotonic()
        self._seen.append((now, step))
        is_last = step >= self._total_steps
        if self._progress is not None:
            if is_last or now - self._drawn_at >= REDRAW_S:
                facts = self._fitting(self._facts(record, step), self._progress.console.width)
                self._progress.update(self._progress.task_ids[0], completed=step, facts=facts)
                self._progress.refresh()
                self._drawn_at = now
        elif is_last or step % self._log_every_steps == 0 or step == self._start_step + 1:
            share = f"{step / self._total_steps:.0%}" if self._total_steps else "–"
            self._line(" | ".join([f"step {step}/{self._total_steps} {share}", *self._facts(record, step)]))

    @staticmethod
    def _fitting(facts: list[str], width: int) -> str:
        """The facts that fit beside the bar, left out in the order of how little they are missed."""
        for expendable in ("/step", "lr ", "MFU ", "held-out "):
            if len(" · ".join(facts)) + BAR_AND_COUNT_COLUMNS > width:
                facts = [fact for fact in facts if expendable not in fact]
        return " · ".join(facts)

    def _facts(self, record: Mapping[str, object], step: int) -> list[str]:
        facts = []
        loss, lr = _number(record, "loss"), _number(record, "lr")
        rate, step_s, mfu = (_number(record, name) for name in ("tokens_per_s", "step_s", "mfu"))
        facts.append(f"loss {loss:.4f}" if loss is not None else "loss not finite")
        if self._eval_loss is not None and self._progress is not None:
            facts.append(f"held-out {self._eval_loss:.4f}")
        if lr is not None:
            facts.append(f"lr {lr:.2e}")
        if rate is not None:
            facts.append(f"{format_count(rate)} tok/s")
        if step_s is not None:
            facts.append(f"{format_duration(step_s)}/step")
        if mfu is not None:
            facts.append(f"MFU {mfu:.1%}")
        left_s = self._seconds_left(step)
        if left_s is not None:
            facts.append(f"{format_duration(left_s)} left")
        return facts

    def _seconds_left(self, step: int) -> float | None:
        """At the pace of the last steps, with the saves and evaluations between them; None before step 1.

        The very first step carries the warm-up of every cache and is left out as soon as others are there.
        """
        first = 1 if len(self._seen) > 2 else 0
        (begin_s, begin_step), (end_s, end_step) = self._seen[first], self._seen[-1]
        if end_step <= begin_step:
            return None
        return (end_s - begin_s) / (end_step - begin_step) * max(0, self._total_steps - step)

    def _line(self, text: str) -> None:
        if self._stream is None:
            return
        line = f"{time.strftime('%H:%M:%S')} {text}"
        if self._progress is not None:
            self._progress.console.print(Text(line), soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _start_live(self) -> None:
        assert self._stream is not None, "a new console has a stream"
        terminal = Terminal(file=self._stream, force_terminal=True)
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_COLUMNS),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            console=terminal,
            auto_refresh=False,  # a refreshing thread would raise where nobody can catch
            redirect_stdout=self._stream.isatty(),
            redirect_stderr=self._stream.isatty(),
        )
        self._progress.add_task(
            "train", total=self._total_steps, completed=self._start_step, facts="starting"
        )
        self._progress.start()
        self._progress.refresh()
        self._move_logging(terminal, self._stream)

    def _stop_live(self) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()
            self._progress = None

    def _move_logging(self, terminal: Terminal, stream: IO[str]) -> None:
        """Log lines go above the live line, not through it."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                self._moved_handlers.append((handler, stream))
                handler.setStream(FileProxy(terminal, stream))

    def _restore_logging(self) -> None:
        for handler, stream in self._moved_handlers:
            handler.stream = stream  # not setStream: it flushes the old stream, which may be gone
        self._moved_handlers.clear()

    def _guarded(self, show: Callable[[], None]) -> None:
        """Run `show`; if the terminal is gone, show nothing from here on."""
        if self._stream is None:
            return
        try:
            show()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lose_terminal(is_broken=isinstance(error, OSError))
            logging.getLogger(__name__).warning(
                "the terminal is gone (%s); training goes on without a display", error
            )

    def _lose_terminal(self, *, is_broken: bool) -> None:
        stream, progress = self._stream, self._progress
        self._stream = self._progress = None
        self._restore_logging()
        if is_broken and stream in (sys.__stderr__, sys.__stdout__):
            # Text that the stream still buffers would fail again at exit and turn exit status 0 into 120.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2 if stream is sys.__stderr__ else 1)
            os.close(null)
        if progress is not None:
            with contextlib.suppress(OSError, ValueError):
                progress.stop()  # gives sys.stdout and sys.stderr back


def _number(record: Mapping[str, object], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None
