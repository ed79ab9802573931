"""The frame of every benchmark: settings, rows, the topics there are, the table and the file.

A topic is a module of this package with a one-line docstring and

    def run(config: BenchConfig) -> list[Row]

It is found by its file name, so adding one needs no registration. Modules that start with an underscore are
helpers.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

import llmtrain.bench
from llmtrain.errors import ConfigError, unknown_name
from llmtrain.files import write_json

Value = TypeVar("Value", int, float, str)


@dataclass(kw_only=True)
class BenchConfig:
    """What to measure, how much of it, and where the rows go."""

    topic: str | None = None
    """A module of llmtrain/bench; `llmtrain bench TOPIC` is short for topic=TOPIC. Null lists the topics."""
    out: str | None = None
    """JSON file for the rows; null writes none."""
    scale: float = 1.0
    """Multiplies the amount of work a topic does: 0.1 for a quick look, 10 for a steadier figure."""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # each topic reads its own keys, of its own types
    """Settings of one topic, as in +options.num_workers=2. One that the topic does not know is an error."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale={self.scale} must be above 0; 1 is the size a topic was made for")

    def scaled(self, count: int, *, least: int = 1) -> int:
        """`count` times `scale`, rounded, and never under `least`."""
        return max(least, round(count * self.scale))

    def only_options(self, *known: str) -> None:
        """Refuse options that the topic does not read. A topic that takes none calls it with no names."""
        for name in self.options:
            if name not in known:
                taken = unknown_name("option", f"options.{name}", [f"options.{each}" for each in known])
                raise ConfigError(
                    taken if known else f"topic {self.topic} takes no options, got options.{name}"
                )

    def option(self, name: str, default: Value) -> Value:
        """`options.<name>` in the type of `default`, or `default`."""
        value = self.options.get(name, default)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ConfigError(f"options.{name}={value!r} must be of type {type(default).__name__}")
        checked: Value = value
        return checked


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `value`, `rival` and `limit` are in the same unit."""

    name: str
    """What was measured, and who the rival is: 'training step, rival: bare PyTorch loop'."""
    value: float
    unit: str
    rival: float | None = None
    """What the rival needed for the same work on the same machine, measured in the same run."""
    limit: float | None = None
    """What the machine allows at best (a bandwidth, a peak), or the bound that a promise of ours sets."""

    @property
    def ratio(self) -> float | None:
        """value / rival, or value / limit when there is no rival."""
        against = self.rival if self.rival is not None else self.limit
        return self.value / against if against else None

    def as_json(self) -> dict[str, float | str | None]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "rival": self.rival,
            "ratio": self.ratio,
            "limit": self.limit,
        }


def topics() -> dict[str, str]:
    """Every topic with the first line of its docstring, read without importing it: a topic may need torch."""
    found = {}
    for module in pkgutil.iter_modules(llmtrain.bench.__path__):
        if module.name == "table" or module.name.startswith("_"):
            continue
        spec = importlib.util.find_spec(f"llmtrain.bench.{module.name}")
        assert spec is not None, f"{module.name} was listed and cannot be found"
        source = Path(str(spec.origin)).read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(source)) or ""
        found[module.name] = docstring.partition("\n")[0]
    return found


def run_topic(config: BenchConfig) -> list[Row]:
    """Measure `config.topic`, and write the rows to `config.out` if that is set."""
    known = topics()
    if config.topic not in known:
        raise ConfigError(unknown_name("topic", str(config.topic), known))
    module = importlib.import_module(f"llmtrain.bench.{config.topic}")
    run: Callable[[BenchConfig], list[Row]] = module.run
    rows = run(config)
    if config.out is not None:
        write_json(Path(config.out), [row.as_json() for row in rows])
    return rows


def format_figure(value: float | None) -> str:
    """Three or four significant digits, or a dash."""
    if value is None:
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table_of(rows: Sequence[Row], *, title: str) -> Table:
    """The rows as they are printed on the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("value", "unit", "rival", "limit", "ratio"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for row in rows:
        figures = [format_figure(each) for each in (row.value, row.rival, row.limit, row.ratio)]
        table.add_row(row.name, figures[0], row.unit, *figures[1:])
    return table
