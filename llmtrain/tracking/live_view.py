"""One run on a terminal, as it goes: where it is, its curves, its latest events.

Fed with records, it knows no files and no clock of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtrain.tracking.charts import number
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import ENDINGS, as_number
from llmtrain.tracking.run_events import printable, told
from llmtrain.tracking.run_list import PACE_STEPS, pace_of, total_steps
from llmtrain.tracking.terminal_charts import Curve, Line, chart
from llmtrain.units import format_count, format_duration

MAX_EVENTS = 50
MIN_COLUMNS_FOR_TWO = 100
"""Narrower terminals get one column of charts."""
MIN_ROWS_FOR_EVENTS = 16
MIN_CHART_ROWS = 6
FULL_CHART_ROWS = 14
LEVEL_STYLES = {"good": "green", "info": "", "warn": "yellow", "bad": "bold red"}
MIN_STEPS_TO_CUT, CUT_SHARE = 100, 15
"""As in the report: the loss picture begins at the height after 1/15 of the steps; the fall is cut off."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A field of step records as a chart."""

    title: str
    field: str
    unit: str
    format_y: Callable[[float], str] = number
    log_y: bool = False
    from_zero: bool = False


PANELS = (
    Panel(title="loss", field="loss", unit="nats per token"),
    Panel(
        title="throughput",
        field="tokens_per_s",
        unit="tokens per second",
        format_y=format_count,
        from_zero=True,
    ),
    Panel(
        title="MFU",
        field="mfu",
        unit="share of the devices' peak",
        format_y=lambda share: f"{share:.0%}",
        from_zero=True,
    ),
    Panel(title="gradient norm", field="grad_norm", unit="L2 before clipping, log scale", log_y=True),
    Panel(title="memory", field="mem_gib", unit="GiB, peak of rank 0", from_zero=True),
)
"""In the order of how much they are missed where there is no room for all."""


class RunView:
    """What is known of a run after the records so far."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        """
        Args:
            config: the run's resolved config, for its length; empty where there is none.
        """
        self.name = printable(name)
        self._config = config
        self.curves = {panel.field: Curve() for panel in PANELS}
        self.held_out = Curve()
        self.events: deque[Record] = deque(maxlen=MAX_EVENTS)
        self.attempt = 0
        self.ending: Record | None = None
        """How the newest attempt ended; None while it goes on."""
        self.last_step: Record | None = None
        self.last_record: Record | None = None
        self._recent: deque[Record] = deque(maxlen=PACE_STEPS + 1)

    def feed(self, records: Iterable[Record]) -> None:
        """Take the next records, in the order of the file."""
        for record in records:
            if record["attempt"] != self.attempt:
                self._begin_attempt(record)
            self.last_record = record
            kind = record["kind"]
            if kind == "step":
                self.last_step, self.ending = record, None
                self._recent.append(record)
                for name, curve in self.curves.items():
                    curve.add(record["step"], as_number(record.get(name)))
            elif kind == "eval":
                self.held_out.add(record["step"], as_number(record.get("eval_loss")))
                self.events.append(record)
            elif kind == "checkpoint":
                self.events.append(record)
            elif kind == "event":
                self.events.append(record)
                if record.get("what") in ENDINGS:
                    self.ending = record

    def _begin_attempt(self, record: Record) -> None:
        """Forget what the new attempt goes back behind."""
        self.attempt, self.ending = record["attempt"], None
        self._recent.clear()
        begin = record["step"] - 1 if record["kind"] == "step" else record["step"]
        for curve in (*self.curves.values(), self.held_out):
            curve.forget_after(begin)
        if self.last_step is not None and self.last_step["step"] > begin:
            self.last_step = None

    @property
    def is_finished(self) -> bool:
        return self.ending is not None and self.ending["what"] == "finished"

    @property
    def step(self) -> int:
        record = self.last_step or self.last_record
        return int(record["step"]) if record is not None else 0

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, where its config says."""
        return total_steps(self._config, self.last_step or {"step": 0, "position": 0})

    def seconds_left(self) -> float | None:
        """At the pace of the last steps, with what lies between them."""
        pace_s, total = pace_of(list(self._recent)), self.total_steps
        if pace_s is None or total is None or self.ending is not None:
            return None
        return max(0, total - self.step) * pace_s

    def state_words(self, silent_s: float, silent_after_s: float) -> Text:
        """What the run does: one phrase, with how long it has been silent if it has."""
        if self.last_record is None:
            return Text("waiting for the first record", style="yellow")
        if self.ending is not None:
            it = told(self.ending)
            return Text(it.line, style=LEVEL_STYLES[it.level])
        if silent_s > silent_after_s:
            return Text(silent_words(silent_s), style="bold red")
        return Text("running" if self.last_step is not None else "starting", style="green")

    def facts(self) -> list[str]:
        """The figures of the last step, each with its unit; what is unknown is left out."""
        last = self.last_step or {}
        loss, held_out = as_number(last.get("loss")), self.held_out.last_value
        rate, mfu, left_s = as_number(last.get("tokens_per_s")), as_number(last.get("mfu")), None
        facts = []
        if last:
            facts.append(f"loss {loss:.4f}" if loss is not None else "loss not finite")
        if held_out is not None:
            facts.append(f"held-out {held_out:.4f}")
        if rate is not None:
            facts.append(f"{format_count(rate)} tokens/s")
        if mfu is not None:
            facts.append(f"MFU {mfu:.1%}")
        if self.attempt > 1:
            facts.append(f"attempt {self.attempt}")
        left_s = self.seconds_left()
        if left_s is not None:
            facts.append(f"{format_duration(left_s)} left")
        return facts

    def position(self) -> str:
        total = self.total_steps
        share = f" ({self.step / total:.0%})" if total else ""
        return f"step {self.step:,}" + (f" of {total:,}{share}" if total else "")

    def render(
        self,
        *,
        width: int,
        height: int,
        silent_s: float,
        silent_after_s: float,
        pulse: str = "",
        plain: bool = False,
    ) -> RenderableType:
        """The screen, at most `height` rows of `width` columns.

        Args:
            silent_s: since the last record.
            pulse: what rank 0 writes of itself; empty: nothing.
            plain: ASCII only.
        """
        between = " - " if plain else " · "
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(self.name, style="bold")
        head.append(f"{between}{self.position()}{between}")
        head.append_text(self.state_words(silent_s, silent_after_s))
        facts = Text(between.join(self.facts()), no_wrap=True, overflow="ellipsis")
        heard = f"last record {format_duration(silent_s)} ago" if self.last_record else ""
        foot = Text(
            between.join(filter(None, [heard, pulse, "Ctrl-C leaves; the run goes on"])),
            style="dim",
            no_wrap=True,
        )

        shown = [panel for panel in PANELS if panel.field == "loss" or self.curves[panel.field].last_value]
        columns = 2 if width >= MIN_COLUMNS_FOR_TWO else 1
        num_events = (
            min(len(self.events), max(2, min(8, height // 5))) if height >= MIN_ROWS_FOR_EVENTS else 0
        )
        room = height - 4 - num_events
        share = room // max(1, -(-len(shown) // columns)) - 1
        chart_rows = max(1, min(FULL_CHART_ROWS, max(MIN_CHART_ROWS, share), room - 1))
        fitting = max(0, room) // (chart_rows + 1) * columns
        grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
        for _ in range(columns):
            grid.add_column(width=width // columns - 2, no_wrap=True)
        charts = [
            self._panel(panel, width=width // columns - 2, height=chart_rows, plain=plain)
            for panel in shown[:fitting]
        ]
        for begin in range(0, len(charts), columns):
            grid.add_row(*charts[begin : begin + columns])
        latest = list(self.events)[-num_events:] if num_events else []
        return Group(head, facts, grid, *(self._event(record) for record in latest), foot)

    def _panel(self, panel: Panel, *, width: int, height: int, plain: bool) -> RenderableType:
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(panel.title, style="bold")
        title.append(f"  {panel.unit}", style="dim")
        lines = [Line(curve=self.curves[panel.field], style="blue")]
        y_high = None
        if panel.field == "loss":
            y_high = self._height_after_the_first_fall()
            if self.held_out.last_value is not None:
                lines.append(Line(curve=self.held_out, style="bright_yellow", is_noisy=False))
                title.append("  held-out", style="bright_yellow")
        drawn = chart(
            lines,
            width=width,
            height=height,
            format_y=panel.format_y,
            log_y=panel.log_y,
            from_zero=panel.from_zero,
            y_high=y_high,
            plain=plain,
        )
        return Group(title, drawn)

    def _height_after_the_first_fall(self) -> float | None:
        buckets = [bucket for bucket in self.curves["loss"].buckets if bucket.count]
        if len(buckets) < MIN_STEPS_TO_CUT:
            return None
        later = [bucket.high for bucket in buckets[len(buckets) // CUT_SHARE :]]
        return max([*later, *(bucket.high for bucket in self.held_out.buckets if bucket.count)])

    def _event(self, record: Record) -> Text:
        it = told(record)
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{local_clock(record)}  step {record['step']:<8,} ", style="dim")
        text.append(it.line, style=LEVEL_STYLES[it.level])
        return text


def silent_words(silent_s: float) -> str:
    return f"silent for {format_duration(silent_s)}: hung, killed, or slow"


def local_clock(record: Mapping[str, Any]) -> str:
    """When it was, by the clock of the reader's place."""
    at = as_number(record.get("time"))
    return time.strftime("%H:%M:%S", time.localtime(at)) if at is not None else "--:--:--"
