"""Searches layouts: every legal one of a cluster, those that fit in memory, in order of their step time.

Layouts are columns from first to last. Of those that are legal, the ones whose memory's interval has its high
end above what the GPU has are left out; only the others' step time is estimated. Columns go through both in
pieces that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmtrain.errors import ConfigError
from llmtrain.planner.cost.architecture import Architecture
from llmtrain.planner.cost.candidates import FULL
from llmtrain.planner.cost.cluster import THIS_MACHINE, Cluster
from llmtrain.planner.cost.costs import PARTS
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.legality import GRID_AXES, Grid, Limits
from llmtrain.planner.cost.problem import Choice, Columns, Problem
from llmtrain.planner.cost.schedule import NAMES as SCHEDULES
from llmtrain.units import format_bytes

MOST_NODES = 8192
"""How far the search for a cluster that would do goes."""
SETTINGS = ("zero_stage", "micro_batch", "recompute", "sequence_parallel", "schedule", "vpp")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    problem: Problem
    best: Choice
    ranking: tuple[Choice, ...]
    """The fastest layouts in order, the best first: ties by their peak memory, then in order of the axes."""
    runners_up: tuple[Choice, ...]
    """The fastest of each other process grid (pp, dp, cp, tp, ep), in order."""
    variants: tuple[Choice, ...]
    """The best one with one setting changed, whether they fit or not."""
    pareto: tuple[Choice, ...]
    """Those that nothing beats in both step time and peak memory, the fastest first."""
    num_legal: int
    num_fitting: int


def search(
    arch: Architecture,
    cluster: Cluster,
    *,
    seq_len: int,
    global_batch_rows: int,
    most: int = 20,
    **settings: Any,
) -> Ranked:
    """Rank all legal layouts of the cluster's GPUs.

    Args:
        most: Of each list of the answer, entries.
        settings: Other fields of `Problem`: program, precision, limits, ...

    Raises:
        ConfigError: The program cannot train such a model; no layout is legal, with sizes that would be; or
        none fits, with the term that is too large and the smallest changes that help.
    """
    problem = Problem(
        arch=arch, cluster=cluster, seq_len=seq_len, global_batch_rows=global_batch_rows, **settings
    )
    return rank(problem, most=most)


def rank(problem: Problem, *, most: int = 20) -> Ranked:
    """`search` of a problem that is one already."""
    columns = Columns(problem)
    g = problem.enumerate()
    if not len(g):
        raise ConfigError(_nothing_legal(problem))
    peak = columns.fitting_bytes(g)
    fits = np.flatnonzero(np.isfinite(peak))
    if not len(fits):
        raise ConfigError(_nothing_fits(problem, columns, g))
    order = fits[np.lexsort((peak[fits], columns.step_s(g.rows(fits))))]
    lists = {
        "ranking": order,
        "runners_up": order[_first_of_each(g.rows(order))[1:]],
        "variants": _one_changed(g, int(order[0])),
        "pareto": order[_pareto(peak[order])],
    }
    lists = {name: rows[:most] for name, rows in lists.items()}
    choices = iter(columns.choices(g.rows(np.concatenate(list(lists.values())))))
    found = {name: [next(choices) for _ in rows] for name, rows in lists.items()}
    best = found["ranking"][0]
    explained = {
        name: tuple(replace(each, reason=_why_not(problem, best, each)) for each in listed)
        for name, listed in found.items()
    }
    return Ranked(problem=problem, best=best, num_legal=len(g), num_fitting=len(fits), **explained)


# -- orders and subsets


def _first_of_each(g: Grid) -> np.ndarray:
    """The first row of every process grid, in order."""
    key = np.zeros(len(g), dtype=np.int64)
    for name in GRID_AXES:
        values = getattr(g, name).astype(np.int64)
        key = key * (values.max() + 1) + values
    _, firsts = np.unique(key, return_index=True)
    found: np.ndarray = np.sort(firsts)
    return found


def _one_changed(g: Grid, best: int) -> np.ndarray:
    """Rows that differ from `best` in one setting; chunks go with their schedule."""
    same_grid = np.ones(len(g), dtype=bool)
    for name in GRID_AXES:
        same_grid &= getattr(g, name) == getattr(g, name)[best]
    changed = np.zeros(len(g), dtype=np.int32)
    for name in SETTINGS[:-1]:
        changed += getattr(g, name) != getattr(g, name)[best]
    changed += (g.vpp != g.vpp[best]) & (g.schedule == g.schedule[best])
    found: np.ndarray = np.flatnonzero(same_grid & (changed == 1))
    return found


def _pareto(peak: np.ndarray) -> np.ndarray:
    """Rows with less memory than every faster one; `peak` is in order of time."""
    least_before = np.concatenate([[np.inf], np.minimum.accumulate(peak)[:-1]])
    found: np.ndarray = np.flatnonzero(peak < least_before)
    return found


# -- words


def describe(layout: Layout) -> str:
    """Axes above 1, then settings: "dp 8 x tp 8, ZeRO 1, 16 micro batches of 2 rows, full recomputation"."""
    axes = [f"{name} {getattr(layout, name)}" for name in GRID_AXES[:-1] if getattr(layout, name) > 1]
    batches = "1 micro batch" if layout.grad_accum == 1 else f"{layout.grad_accum} micro batches"
    said = [
        " x ".join(axes) or "one rank",
        *([f"experts over {layout.ep}"] if layout.ep > 1 else []),
        f"ZeRO {layout.zero_stage}",
        f"{batches} of {_rows(layout.micro_batch_rows)}",
        "no recomputation" if layout.recompute == "none" else f"{layout.recompute} recomputation",
    ]
    if layout.sequence_parallel:
        said.append("sequence parallel")
    if layout.pp > 1 and layout.schedule != SCHEDULES[0]:
        chunks = f" of {layout.vpp} chunks" if layout.schedule == "interleaved" else ""
        said.append(f"{layout.schedule}{chunks}")
    return ", ".join(said)


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _over(problem: Problem, ranks: int) -> str:
    """What carries a group whose ranks lie within `ranks` neighbours."""
    return "the links of a node" if ranks <= problem.cluster.gpus_per_node else "the network"


CAUSES: Mapping[str, Callable[[Problem, Layout], str]] = {
    "products": lambda p, at: (
        f"matrix products of {at.micro_batch_rows * at.seq_len // at.cp:,} tokens split {at.tp} ways"
    ),
    "attention": lambda p, at: f"attention at tp={at.tp} and cp={at.cp}",
    "elementwise": lambda p, at: (
        "work between the matrices, which tp ranks share"
        if at.sequence_parallel
        else "work between the matrices, which every tp rank repeats"
        if at.tp > 1
        else "work between the matrices"
    ),
    "launches": lambda p, at: f"launching kernels of {at.grad_accum} small micro batches",
    "recompute": lambda p, at: f"{at.recompute} recomputation",
    "loss": lambda p, at: f"head and loss of {at.grad_accum} micro batches",
    "tp": lambda p, at: f"tp={at.tp} over {_over(p, at.tp)}",
    "cp": lambda p, at: f"cp={at.cp} over {_over(p, at.tp * at.cp)}",
    "ep": lambda p, at: f"experts over {at.ep} ranks and {_over(p, at.tp * at.ep)}",
    "pp": lambda p, at: f"sending between {at.pp * at.vpp} pipeline stages",
    "dp": lambda p, at: (
        f"ZeRO {at.zero_stage} over dp * cp = {at.dp * at.cp} ranks and {_over(p, at.dp * at.cp * at.tp)}"
    ),
    "bubble": lambda p, at: f"waiting in a pipeline of {at.pp} ranks and {at.grad_accum} micro batches",
    "optimizer": lambda p, at: f"the optimizer at ZeRO {at.zero_stage} and dp * cp = {at.dp * at.cp}",
    "other": lambda p, at: "what grows with the rest",
}
"""Component of StepTime -> what in a layout makes it."""


def _why_not(problem: Problem, best: Choice, other: Choice) -> str:
    if other.layout == best.layout:
        return ""
    usable = problem.cluster.gpu.mem_bytes
    if other.peak_bytes.high > usable:
        name = max(other.memory, key=lambda part: other.memory[part])
        return (
            f"does not fit: up to {format_bytes(other.peak_bytes.high)} of {format_bytes(usable)}, of which "
            f"{name} {format_bytes(other.memory[name])} at the instant {other.instant!r}"
        )
    slower = other.step_s.mid / best.step_s.mid - 1
    if slower < 5e-4:
        more = other.peak_bytes.mid - best.peak_bytes.mid
        least = 1 << 20
        return f"as fast, with {format_bytes(more)} more" if more > least else "as fast, and as large"
    name = max(PARTS, key=lambda part: other.time[part] - best.time[part])
    cost = other.time[name] - best.time[name]
    return f"+{slower:.1%}: {CAUSES[name](problem, other.layout)} costs {_format_s(cost)} more"


def _format_s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


# -- nothing found


def _nothing_legal(problem: Problem) -> str:
    """Sizes near those asked for that have a legal layout."""
    cluster, rows = problem.cluster, problem.global_batch_rows
    nodes = next(_other_nodes(problem, lambda other: len(_smallest(other)) > 0), None)
    batches = _near_batches(problem)
    hints = []
    if batches:
        tokens = " or ".join(f"{each * problem.seq_len} ({_rows(each)})" for each in batches)
        hints.append(f"plan.global_batch_tokens={tokens}")
    if nodes is not None:
        hints.append(f"cluster.nodes={nodes}")
    if problem.limits not in (Limits(), Limits(max_tp=cluster.gpus_per_node)):
        hints.append("wider limits of the search")
    mend = f"; set {', or '.join(hints)}" if hints else ""
    return (
        f"{problem.program} has no legal layout of {problem.arch.name} on {cluster.num_gpus} GPUs "
        f"({cluster.num_nodes} x {cluster.gpus_per_node}) with a batch of {_rows(rows)} of {problem.seq_len} "
        f"tokens: no pp * dp * cp * tp = {cluster.num_gpus} divides both model and batch{mend}"
    )


def _smallest(problem: Problem) -> Grid:
    """Layouts that take the least memory of their process grid."""
    limits = replace(problem.limits, max_micro_batch_rows=1, recomputes=(FULL,))
    return replace(problem, limits=limits).enumerate()


def _near_batches(problem: Problem) -> list[int]:
    """Batch sizes, below and above the one asked for, that some layout divides. A batch that every size of dp
    divides shows which sizes of dp have one."""
    world, rows = problem.cluster.num_gpus, problem.global_batch_rows
    g = _smallest(replace(problem, global_batch_rows=world))
    sizes = np.unique(g.dp)
    if not len(sizes):
        return []
    below, above = (rows // sizes * sizes).max(), ((rows // sizes + 1) * sizes).min()
    return [int(each) for each in (below, above) if each not in (0, rows)]


def _other_nodes(problem: Problem, works: Callable[[Problem], bool]) -> Iterator[int]:
    """Numbers of nodes, the smallest change first, with which the problem has what is asked for."""
    if problem.cluster.name == THIS_MACHINE:
        return
    now = problem.cluster.num_nodes
    steps = [now + more for more in range(1, 9)]
    doubled = [now * 2**power * quarter // 4 for power in range(14) for quarter in (4, 5, 6, 7)]
    for nodes in sorted({each for each in (*steps, *doubled) if now < each <= MOST_NODES}):
        if works(replace(problem, cluster=replace(problem.cluster, num_nodes=nodes))):
            yield nodes


def _nothing_fits(problem: Problem, columns: Columns, g: Grid) -> str:
    peak = columns.peak_bytes(g)
    least = columns.choices(g.rows(np.array([int(peak.argmin())])))[0]
    needed = format_bytes(least.peak_bytes.high)
    largest = max(least.memory, key=lambda name: least.memory[name])

    def fits(other: Problem) -> bool:
        found = _smallest(other)
        return len(found) > 0 and bool(np.isfinite(Columns(other).fitting_bytes(found)).any())

    nodes = next(_other_nodes(problem, fits), None)
    hints = []
    if nodes is not None:
        hints.append(f"cluster.nodes={nodes} ({nodes * problem.cluster.gpus_per_node} GPUs)")
    shorter = [problem.seq_len // 2**power for power in (1, 2, 3)]
    for length in shorter:
        rows = problem.global_batch_rows * problem.seq_len // length
        if fits(replace(problem, seq_len=length, global_batch_rows=rows)):
            hints.append(f"data.seq_len={length}")
            break
    hints.append(f"{needed} a rank")
    on = f"of {problem.arch.name} on {problem.cluster.num_gpus} {problem.cluster.gpu.name}"
    none = f"none of {len(g):,} legal layouts {on} fits: the smallest"
    only = f"the only legal layout {on} does not fit: it"
    place = f" on the pipeline's {least.place} rank" if least.layout.pp > 1 else ""
    return (
        f"{only if len(g) == 1 else none} takes up to {needed} of "
        f"{format_bytes(columns.usable_bytes)} ({describe(least.layout)}), of which {largest} "
        f"{format_bytes(least.memory[largest])} at the instant {least.instant!r}{place}. "
        f"The smallest changes that fit: {'; or '.join(hints)}"
    )


# -- sensitivity


@dataclass(frozen=True, kw_only=True)
class Change:
    """The same search under another assumption."""

    name: str
    problem: Problem
    best: Choice | None
    """None: nothing is legal, or fits."""
    time_ratio: float | None
    """Seconds for as many tokens over those of the first search."""
    is_same_layout: bool
    """Whether the choice has the same axes and settings; its micro batches may be more or fewer."""
    note: str = ""
    """Why there is none; or which batch was taken, and how many nodes are idle."""


def sensitivity(ranked: Ranked) -> tuple[Change, ...]:
    """What other assumptions do to a choice.

    The network carries 10% less; a node is missing, with what the others do best; rows are twice as long and
    half as many.
    """
    problem, best = ranked.problem, ranked.best
    cluster = problem.cluster
    slower = replace(cluster, node_bytes_s=0.9 * cluster.node_bytes_s)
    changes = []
    if cluster.num_nodes > 1:
        changes.append(_changed("network -10%", [replace(problem, cluster=slower)], problem, best))
        changes.append(_changed("one node fewer", _one_node_fewer(problem), problem, best))
    longer = replace(
        problem, seq_len=2 * problem.seq_len, global_batch_rows=max(1, problem.global_batch_rows // 2)
    )
    changes.append(_changed("rows twice as long", [longer], problem, best))
    return tuple(changes)


def _one_node_fewer(problem: Problem) -> list[Problem]:
    """All others with the batch as it is, or with the nearest that they share evenly; or some of those idle,
    so that the rest has many divisors: 15 of 16 where 2,047 of 2,048 divide nothing."""
    now, rows = problem.cluster.num_nodes, problem.global_batch_rows
    used = [now - 1, *(now - now // part for part in (32, 16, 8) if now % part == 0 and now > part)]

    def with_nodes(nodes: int, rows: int) -> Problem:
        cluster = replace(problem.cluster, num_nodes=nodes)
        return replace(problem, cluster=cluster, global_batch_rows=rows)

    return [
        with_nodes(now - 1, rows),
        *(with_nodes(each, max(1, round(rows / each)) * each) for each in used),
    ]


def _changed(name: str, others: list[Problem], problem: Problem, best: Choice) -> Change:
    found: list[tuple[float, Problem, Choice]] = []
    notes = []
    for other in others:
        try:
            choice = rank(other, most=1).best
        except ConfigError as error:
            notes.append(str(error))
            continue
        tokens = other.global_batch_rows * other.seq_len
        found.append((choice.step_s.mid / tokens, other, choice))
    if not found:
        return Change(
            name=name, problem=others[0], best=None, time_ratio=None, is_same_layout=False, note=notes[0]
        )
    a_token, other, choice = min(found, key=lambda each: each[0])
    tokens = problem.global_batch_rows * problem.seq_len
    taken = []
    if other.global_batch_rows != problem.global_batch_rows:
        taken.append(f"batches of {_rows(other.global_batch_rows)}")
    idle = others[0].cluster.num_nodes - other.cluster.num_nodes
    if idle:
        taken.append(f"{idle} idle {'node' if idle == 1 else 'nodes'}")
    return Change(
        name=name,
        problem=other,
        best=choice,
        time_ratio=a_token / (best.step_s.mid / tokens),
        is_same_layout=_settings(choice.layout) == _settings(best.layout),
        note=f"with {' and '.join(taken)}" if taken else "",
    )


def _settings(layout: Layout) -> tuple[Any, ...]:
    return (
        layout.pp, layout.vpp, layout.cp, layout.tp, layout.ep, layout.zero_stage, layout.micro_batch_rows,
        layout.recompute, layout.sequence_parallel, layout.schedule,
    )  # fmt: skip
