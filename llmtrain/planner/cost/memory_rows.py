"""Measured peaks beside `memory()`'s: what its lists of operations, its slack and its intervals rest on.

| rows | peak is | runs |
|---|---|---|
| golden | allocated, of a pipeline's last rank, which writes the log | small GPT and MoE, 8 or 4 GPUs |
| simumax | allocated and reserved, of the fullest rank | Llama 3 and DeepSeek with few layers, 8 B200 |
| torchtitan | reserved | Llama 3.1 8B on 8 H100 |
| llmtrain | live tensors, of a pipeline's first and last rank | tiny Llama and GPT-2 on 2 or 4 CPU ranks |

Each table has a row a run, its columns those of `candidates()`, and which runs were left out, and why, at its
top.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import resources

import numpy as np

from llmtrain.planner.cost.candidates import Candidates, candidates, stacked
from llmtrain.planner.cost.memory import Memory, MemoryProgram, memory
from llmtrain.planner.cost.memory_programs import TORCHTITAN, llmtrain, megatron

CLUSTER = {
    "peak_flops": 1e15,
    "mem_bytes_s": 1e12,
    "num_multiprocessors": 1,
    "gpus_per_node": 8,
    "link_bytes_s": 1e11,
    "node_bytes_s": 1e11,
}
"""Without effect on memory."""
SHAPE_COLUMNS = tuple(each.name for each in fields(Candidates) if each.name not in CLUSTER)
"""Those that the tables may have."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured peak. `case` names the run's configuration, which several rows may share."""

    case: str
    candidate: Candidates
    program: MemoryProgram
    allocated_bytes: float | None
    """Of the allocator; None where only what it reserved is told."""
    reserved_bytes: float | None
    device_bytes: float | None
    """The device's size, where it is told."""
    place: str | None
    """Of the rank in its pipeline; None: the fullest."""

    def predicted(self, found: Memory, at: int) -> float:
        """Allocated bytes of that rank in row `at`."""
        if self.place is None:
            return float(found.allocated[at])
        only = float(self.candidate.pp[0]) == 1
        return float(found.on["first" if only else self.place][at])


def read_rows(table: str) -> list[Row]:
    text = resources.files("llmtrain.planner.tables.cost").joinpath(f"memory_{table}.csv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [_row(table, told) for told in csv.DictReader(lines)]


def _row(table: str, told: dict[str, str]) -> Row:
    columns = {name: float(told[name]) for name in SHAPE_COLUMNS if told.get(name)}

    def number(name: str) -> float | None:
        return float(told[name]) if told.get(name) else None

    return Row(
        case=told["case"],
        candidate=candidates(**CLUSTER, **columns),
        program=_PROGRAMS[table](told),
        allocated_bytes=number("allocated_bytes"),
        reserved_bytes=number("reserved_bytes"),
        device_bytes=number("device_bytes"),
        place=told.get("place") or None,
    )


def _of_golden(told: dict[str, str]) -> MemoryProgram:
    return megatron(
        is_fused_attention=told["is_fused_attention"] == "1",
        has_dropout=told["has_dropout"] == "1",
        has_query_norm=told["has_query_norm"] == "1",
        accumulates_in_products=told["accumulates_in_products"] == "1",
    )


def _of_llmtrain(told: dict[str, str]) -> MemoryProgram:
    return llmtrain(
        precision=told["precision"],
        device="cpu",
        bucket_elements=int(told["bucket_elements"]),
        live_weights=float(told["live_weights"]),
    )


_PROGRAMS: dict[str, Callable[[dict[str, str]], MemoryProgram]] = {
    "golden": _of_golden,
    "simumax": lambda _told: megatron(is_fused_loss=True, caps_experts=True),
    "torchtitan": lambda _told: TORCHTITAN,
    "llmtrain": _of_llmtrain,
}


# -- residuals


def ratios(rows: Sequence[Row], *, reserved: bool = False) -> np.ndarray:
    """Measured over predicted bytes, a row each: allocated ones, or `reserved` where those are told alone."""
    found = np.empty(len(rows))
    for program in {row.program for row in rows}:
        which = [at for at, row in enumerate(rows) if row.program == program]
        together = memory(stacked([rows[at].candidate for at in which]), program)
        for number, at in enumerate(which):
            row = rows[at]
            predicted = row.predicted(together, number)
            measured = row.reserved_bytes if reserved or row.allocated_bytes is None else row.allocated_bytes
            if measured is None:
                raise ValueError(f"row {row.case} has no bytes")
            with_slack = reserved or row.allocated_bytes is None
            found[at] = measured / (predicted * (1 + program.slack if with_slack else 1))
    return found


def spread_of(values: np.ndarray) -> tuple[float, float]:
    """Quantiles .1 and .9 of measured over predicted."""
    low, high = np.quantile(values, [0.1, 0.9])
    return float(low), float(high)


def coverage(values: np.ndarray, cases: Sequence[str]) -> float:
    """Share of rows inside the spread of all rows of other configurations: each is left out in turn."""
    inside = np.zeros(len(values), dtype=bool)
    for case in sorted(set(cases)):
        out = np.array([each == case for each in cases])
        low, high = spread_of(values[~out])
        inside[out] = (low <= values[out]) & (values[out] <= high)
    return float(inside.mean())


def without_pipeline(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.candidate.pp[0] == 1]


def family_of(case: str) -> str:
    """A golden configuration without how it was resumed, saved or counted: those do not change its memory."""
    words = (
        "frozen",
        "resume",
        "torch_dist",
        "torch",
        "no_mmap_bin_files",
        "fim_dataset",
        "1node",
        "persistent",
    )
    return re.sub(rf"_({'|'.join(words)})", "", case)


def interval_rows() -> tuple[np.ndarray, list[str]]:
    """(Measured over predicted, configuration) of the rows that Megatron's interval is fitted to: golden ones
    at pp=1, and simumax's reserved bytes, which the slack is in."""
    golden, simumax = without_pipeline(read_rows("golden")), read_rows("simumax")
    values = np.concatenate([ratios(golden), ratios(simumax, reserved=True)])
    return values, [family_of(row.case) for row in [*golden, *simumax]]


def accuracy() -> dict[str, float]:
    """Figures of the accuracy table, as fractions: errors of allocated bytes (torchtitan: reserved).

    `memory_golden_mean` is of the rows at pp=1; `memory_coverage_80` of `interval_rows`, each configuration
    left out in turn; `memory_worst_over_high` the most that a measured peak lies over the interval's upper
    end, where the device's size is told: what a plan that "fits" may lack.
    """
    golden, simumax, torchtitan = (read_rows(name) for name in ("golden", "simumax", "torchtitan"))
    piped = [row for row in golden if row.candidate.pp[0] > 1]

    def error(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.abs(1 / values - 1)
        return found

    sized = [row for row in [*simumax, *torchtitan] if row.device_bytes is not None]
    over = ratios(sized, reserved=True) / np.array([row.program.spread[1] for row in sized])
    return {
        "memory_golden_mean": float(error(ratios(without_pipeline(golden))).mean()),
        "memory_golden_pp_mean": float(error(ratios(piped)).mean()),
        "memory_simumax_mean": float(error(ratios(simumax)).mean()),
        "memory_simumax_max": float(error(ratios(simumax)).max()),
        "memory_simumax_reserved_mean": float(error(ratios(simumax, reserved=True)).mean()),
        "memory_torchtitan_mean": float(error(ratios(torchtitan)).mean()),
        "memory_llmtrain_max": float(error(ratios(read_rows("llmtrain"))).max()),
        "memory_coverage_80": coverage(*interval_rows()),
        "memory_worst_over_high": float(over.max() - 1),
    }
