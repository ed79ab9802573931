"""Own runs for a fit, from a table: any CSV with N, D and loss, or what W&B exports from its table of runs.

A column is known by its name (COLUMNS), or is named by the user. A unit may stand in the heading, "N (M)",
"loss [bits]", or in each cell, "7B". A W&B export of llmtrain's own runs needs no N: it has the shape.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from llmtrain.errors import ConfigError, DataError, unknown_name
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_non_embedding_params, num_params
from llmtrain.planner.loss.envelope import Runs
from llmtrain.planner.loss.laws import FLOPS_PER_PARAM_TOKEN
from llmtrain.planner.units import FLOPS, LOSS, PARAMS, TOKENS, Kind, parse_quantity

COLUMNS = {
    "params": ("n", "num_params", "n_params", "params", "parameters", "num_parameters"),
    "tokens": ("d", "num_tokens", "n_tokens", "tokens", "train_tokens", "tokens_seen", "train.total_tokens"),
    "flops": ("c", "flops", "compute", "budget"),
    "loss": (
        *("eval/eval_loss", "held_out_loss", "eval_loss", "val_loss", "validation_loss", "eval/loss"),
        *("val/loss", "test_loss", "final_loss", "loss"),
    ),
    "name": ("name", "run", "run_name", "id"),
    "state": ("state",),
}
"""The first that a table has is taken. train/loss is not among them: it is of one batch, and of text that the
model then sees again."""
KINDS: dict[str, Kind] = {"params": PARAMS, "tokens": TOKENS, "flops": FLOPS, "loss": LOSS}
_HEADING = re.compile(r"^(?P<name>.*?)\s*(?:[(\[](?P<unit>[^)\]]*)[)\]])?\s*$")


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    name: str
    num_params: float
    num_tokens: float
    loss: float
    """Nats per token, held out, at the end."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    runs: list[OwnRun]
    left_out: list[str]
    """Runs that were not over, each with the reason."""


def read_table(path: Path, *, names: Mapping[str, str | None], embeddings: bool = True) -> Reading:
    """Read a CSV.

    Args:
        names: column of params, tokens and loss where the user says so.
        embeddings: whether N counts them, where it is computed from a shape.

    Raises:
        DataError: no such file, no such column, or a cell that is not what its column says, with the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle)
            numbered = [(reader.line_num, cells) for cells in reader if "".join(cells).strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    numbered = [(number, cells) for number, cells in numbered if not cells[0].startswith("#")]
    rows = [cells for _, cells in numbered]
    if len(rows) < 2:
        raise DataError(f"{path} has no rows under a heading; a table of runs has columns N, D and loss")
    table = _Table(path, rows[0], names)
    has_shape = "params" not in table.place and "model.d_model" in table.headings
    needed = {"params": "N", "loss": "loss"} if not has_shape else {"loss": "loss"}
    missing = [shown for key, shown in needed.items() if key not in table.place]
    if "tokens" not in table.place and "flops" not in table.place:
        missing.append("D")
    if missing:
        raise DataError(
            f"{path} has no column for {' and '.join(missing)}; its columns are {', '.join(rows[0])}. Rename "
            "them, or name them: columns.params=..., columns.tokens=..., columns.loss=..."
        )
    runs, left_out = [], []
    for number, cells in numbered[1:]:
        if len(cells) != len(rows[0]):
            raise DataError(f"{path} line {number} has {len(cells)} cells under {len(rows[0])} headings")
        name = table.text("name", cells) or f"line {number}"
        state = table.text("state", cells)
        if state and state.lower() != "finished":
            left_out.append(f"{name}: state {state}")
            continue
        if has_shape:
            size = float(_size(table, cells, embeddings=embeddings, where=f"{path} line {number}"))
        else:
            size = table.number("params", cells, number)
        if "tokens" in table.place:
            tokens = table.number("tokens", cells, number)
        else:
            tokens = table.number("flops", cells, number) / FLOPS_PER_PARAM_TOKEN / size
        runs.append(
            OwnRun(name=name, num_params=size, num_tokens=tokens, loss=table.number("loss", cells, number))
        )
    return Reading(runs=runs, left_out=left_out)


def as_runs(runs: Sequence[OwnRun]) -> Runs:
    """Runs as arrays. DataError when no fit could mean anything."""
    return Runs(
        names=tuple(run.name for run in runs),
        num_params=np.array([run.num_params for run in runs], dtype=float),
        num_tokens=np.array([run.num_tokens for run in runs], dtype=float),
        loss=np.array([run.loss for run in runs], dtype=float),
    )


class _Table:
    """Where a table has what."""

    def __init__(self, path: Path, headings: Sequence[str], names: Mapping[str, str | None]) -> None:
        self.path = path
        parted = [_HEADING.match(heading.strip()) for heading in headings]
        self.headings = [match.group("name") if match else "" for match in parted]
        self.units = [(match.group("unit") or "") if match else "" for match in parted]
        lowered = [name.lower() for name in self.headings]
        self.place: dict[str, int] = {}
        for key, known in COLUMNS.items():
            wished = names.get(key)
            if wished is not None:
                if wished not in headings and wished not in self.headings:
                    raise DataError(f"{path}: {unknown_name('column', wished, headings)}")
                held = headings if wished in headings else self.headings
                self.place[key] = list(held).index(wished)
            else:
                found = next((lowered.index(name) for name in known if name in lowered), None)
                if found is not None:
                    self.place[key] = found

    def text(self, key: str, cells: Sequence[str]) -> str:
        return cells[self.place[key]].strip() if key in self.place else ""

    def number(self, key: str, cells: Sequence[str], line: int) -> float:
        at = self.place[key]
        cell, unit, kind = cells[at].strip(), self.units[at], KINDS[key]
        if cell.lower() in ("nan", "inf", "-inf", "infinity", "null", "none", ""):
            raise DataError(
                f"{self.path} line {line} ({self.text('name', cells) or 'no name'}): {self.headings[at]} is "
                f"{cell or 'empty'}; leave runs that diverged or did not end out of the table"
            )
        try:
            return parse_quantity(f"{cell}{unit}", kind, name=self.headings[at])
        except ConfigError as error:
            raise DataError(f"{self.path} line {line}: {error}") from error


def _size(table: _Table, cells: Sequence[str], *, embeddings: bool, where: str) -> int:
    """N of the shape in the columns model.*, as W&B exports a config."""
    given = {
        heading.removeprefix("model."): cell.strip().strip('"')
        for heading, cell in zip(table.headings, cells, strict=True)
        if heading.startswith("model.") and cell.strip() not in ("", "null", "None")
    }
    known = {field.name for field in fields(ModelConfig)}
    shape: dict[str, object] = {}
    for name, cell in given.items():
        if name not in known:
            continue
        if cell.lower() in ("true", "false"):
            shape[name] = cell.lower() == "true"
        else:
            shape[name] = float(cell) if "." in cell else int(cell) if cell.isdigit() else cell
    try:
        model = ModelConfig(**shape)  # type: ignore[arg-type]  # cells: the dataclass checks them
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the columns model.* are no shape: {error}") from error
    return num_params(model) if embeddings else num_non_embedding_params(model)
