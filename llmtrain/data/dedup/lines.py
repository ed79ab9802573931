"""Lines or paragraphs that occur more than once in the corpus: one copy stays, the others are cut out.

CCNet (Wenzek et al. 2020, arXiv:1911.00359, section 3.1) removes the lines whose hash was seen before, Dolma
(Soldaini et al. 2024, arXiv:2402.00159) does it with a Bloom filter, and C4 (Raffel et al. 2020,
arXiv:1910.10683, section 2.2) with spans of three sentences. Here it is exact, up to 64-bit hashes, and does
not depend on the order of the documents: the copy that stays is the first one in the best document that has
it (dedup/standing.py). Copies inside one document are copies too. A line whose owner is dropped later for
what it lost itself is gone.

The scan writes `line_text.line_hashes` of each unit. Here the best copy of each unit, or of a piece of a
large one, is shuffled by hash, and each unit then learns which of its lines another document owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.dedup.arrays import open_array, remove_work
from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.line_text import LINE_DTYPE, SPAN_DTYPE, Lines, Spans
from llmtrain.data.dedup.owners import RECORD, Run, SettleTask, read_lost, run_file, settle, write_run
from llmtrain.data.dedup.partition import num_partitions_for
from llmtrain.data.dedup.standing import document_rows, read_standings, standings
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, RowWriter, Table
from llmtrain.data.engines.engine import Engine
from llmtrain.data.folder import read_done, write_done
from llmtrain.errors import DataError

LINE_TASK_BYTES = 128
"""Memory a line in a task: the record, its hash and order, and what is written of it."""


@dataclass(frozen=True, kw_only=True)
class LineResult:
    removals: list[Path]
    """One .npy of SPAN_DTYPE a unit, in their order; `row` counts from the unit's first document."""
    num_lines: int
    """Those of living new documents that are long enough."""
    num_removed: int
    removed_bytes: int
    """Of the lines alone. What blank lines and line ends come to, `remove_spans` tells."""


def line_duplicates(
    units: Sequence[DedupUnit],
    cfg: DedupConfig,
    engine: Engine,
    folder: Path,
    standing: Sequence[Path] | None = None,
) -> LineResult:
    """Find the lines to cut out of living documents. Those of earlier runs lose none, but own.

    Args:
        folder: of this stage alone, and of these documents and settings; `partition_bytes` may change.
        standing: what `standings` returned; None: it is found in the folder.

    Raises:
        DataError: the lines of a unit were not written, or are not those of its documents.
    """
    removals = [folder / f"unit-{number:06d}.npy" for number in range(len(units))]
    done = folder / "done.json"
    if (finished := read_done(done)) is not None:
        return LineResult(removals=removals, **finished)
    if standing is None:
        standing = standings(units, cfg, engine, folder / "standing")
    max_lines = max(1, cfg.partition_bytes // LINE_TASK_BYTES)
    max_rows = document_rows(cfg.partition_bytes)
    num_lines = sum(_line_table(unit).shape[0] for unit in units if unit.lines is not None)
    num_partitions = num_partitions_for(num_lines * RECORD.itemsize, cfg.partition_bytes)
    work = folder / f"work-{max_lines}-{num_partitions}"
    tasks = []
    num_runs = 0
    for unit, path, removal in zip(units, standing, removals, strict=True):
        runs = tuple(
            Run(num_runs + number, *run) for number, run in enumerate(_cut(unit, max_lines, max_rows))
        )
        num_runs += len(runs)
        tasks.append(_UnitTask(unit, path, runs, work, num_partitions, removal))
    for _ in engine.map(_spread, tasks):
        pass
    partitions = [SettleTask(work, num_runs, n, by_standing=False) for n in range(num_partitions)]
    for _ in engine.map(settle, partitions):
        pass
    counts = np.zeros(3, dtype=np.int64)
    for of_unit in engine.map(_write_removals, tasks):
        counts += of_unit
    names = ("num_lines", "num_removed", "removed_bytes")
    summary = dict(zip(names, counts.tolist(), strict=True))
    write_done(done, summary, removals)
    remove_work(folder)
    return LineResult(removals=removals, **summary)


def read_removals(removal: Path) -> Spans:
    """The spans of a unit, sorted: for `line_text.spans_of_rows` and `line_text.remove_spans`."""
    table = open_array(removal, SPAN_DTYPE)
    return table.read(0, table.shape[0])


@dataclass(frozen=True)
class _UnitTask:
    unit: DedupUnit
    standing: Path
    runs: tuple[Run, ...]
    work: Path
    num_partitions: int
    removal: Path


def _line_table(unit: DedupUnit) -> Table:
    assert unit.lines is not None, "who asks has looked"
    return open_array(unit.lines, LINE_DTYPE)


def _first_line(table: Table, row: int, start: int) -> int:
    """The first line from `start` on that belongs to `row` or a later document."""
    end = table.shape[0]
    while start < end:
        middle = (start + end) // 2
        if int(table.read(middle, middle + 1)["row"][0]) < row:
            start = middle + 1
        else:
            end = middle
    return start


def _cut(unit: DedupUnit, max_lines: int, max_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Whole documents with at most `max_lines` lines, or one document; none without lines."""
    if unit.lines is None:
        return
    table = _line_table(unit)
    num_lines = table.shape[0]
    start = 0
    while start < num_lines:
        first_row = int(table.read(start, start + 1)["row"][0])
        end_row = first_row + max_rows
        if start + max_lines < num_lines:
            end_row = min(end_row, int(table.read(start + max_lines, start + max_lines + 1)["row"][0]))
        end_row = min(max(end_row, first_row + 1), unit.num_documents)
        end = _first_line(table, end_row, start)
        if end == start or not 0 <= first_row < end_row:
            raise DataError(
                f"{unit.lines} has a line of document {first_row}, but unit {unit.number} has "
                f"{unit.num_documents}, in order; scan again"
            )
        yield first_row, end_row, start, end
        start = end


def _read_run(task: _UnitTask, run: Run) -> tuple[Lines, npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """The lines of living documents of a run, with `row` counted from its first document; and the standing
    of each document, and whether it is of an earlier run."""
    lines = _line_table(task.unit).read(run.start, run.end)
    rows = open_array(task.unit.documents, DOCUMENT).read(run.first_row, run.end_row)
    standing = read_standings(task.standing, run.first_row, run.end_row)
    lines["row"] -= run.first_row
    alive = np.ascontiguousarray(rows["alive"])
    if not alive.all():
        lines = lines[alive[lines["row"]]]
    return lines, standing, np.ascontiguousarray(rows["is_previous"])


@compiled
def _keep_first(
    hashes: Any, rows: Any, order: Any, standing: Any, is_previous: Any, lost: Any, owned: Any, best: Any
) -> Any:
    """Of equal lines keep the first one in the best document, unless the hash is in `lost` (ascending).

    Returns:
        which lines go, and how many different hashes there are; `owned` gets these, ascending, and `best` the
        best standing of each, where the two are long enough.
    """
    is_removed = np.zeros(len(hashes), dtype=np.bool_)
    num_owned = 0
    at_lost = 0
    first = 0
    while first < len(order):
        keeper = order[first]
        hashed = hashes[keeper]
        last = first + 1
        while last < len(order) and hashes[order[last]] == hashed:
            line = order[last]
            ahead = np.int64(standing[rows[line]]) - np.int64(standing[rows[keeper]])
            if ahead < 0 or (ahead == 0 and line < keeper):
                keeper = line
            last += 1
        if num_owned < len(owned):
            owned[num_owned] = hashed
            best[num_owned] = standing[rows[keeper]]
        num_owned += 1
        while at_lost < len(lost) and lost[at_lost] < hashed:
            at_lost += 1
        is_lost = at_lost < len(lost) and lost[at_lost] == hashed
        for at in range(first, last):
            line = order[at]
            is_removed[line] = (is_lost or line != keeper) and not is_previous[rows[line]]
        first = last
    return is_removed, num_owned


def _spread(task: _UnitTask) -> None:
    """Write the different lines of each run of a unit with the best document that has each."""
    nothing = np.empty(0, dtype=np.uint64)
    for run in task.runs:
        path = run_file(task.work, run.number)
        if read_done(path.with_suffix(".json")) is not None:
            continue
        lines, standing, is_previous = _read_run(task, run)
        hashes, rows = np.ascontiguousarray(lines["hash"]), np.ascontiguousarray(lines["row"])
        del lines
        owned, best = np.empty_like(hashes), np.empty_like(hashes)
        order = np.argsort(hashes)
        _, num_owned = _keep_first(hashes, rows, order, standing, is_previous, nothing, owned, best)
        write_run(path, owned[:num_owned], best[:num_owned], task.num_partitions)
        write_done(path.with_suffix(".json"), {}, [path])


def _write_removals(task: _UnitTask) -> list[int]:
    """Write what goes of a unit; returns the number of its lines, how many go, and their bytes."""
    done = task.removal.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        counts: list[int] = finished["counts"]
        return counts
    nothing = np.empty(0, dtype=np.uint64)
    num_lines = removed_bytes = 0
    with RowWriter(task.removal, SPAN_DTYPE) as writer:
        for run in task.runs:
            lines, standing, is_previous = _read_run(task, run)
            lost = np.ascontiguousarray(read_lost(task.work, task.num_partitions, run.number)["key"])
            hashes, rows = np.ascontiguousarray(lines["hash"]), np.ascontiguousarray(lines["row"])
            order = np.argsort(hashes)
            is_removed, _ = _keep_first(hashes, rows, order, standing, is_previous, lost, nothing, nothing)
            num_lines += int((~is_previous[rows]).sum())
            spans = np.empty(int(is_removed.sum()), dtype=SPAN_DTYPE)
            for name in ("row", "start", "end"):
                spans[name] = lines[name][is_removed]
            removed_bytes += int((spans["end"].astype(np.int64) - spans["start"]).sum())
            spans["row"] += run.first_row
            writer.append(spans)
    counts = [num_lines, writer.num_rows, removed_bytes]
    write_done(done, {"counts": counts}, [task.removal])
    return counts
