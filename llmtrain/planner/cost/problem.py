"""What is to be laid out, and step time and memory of any columns of layouts of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from llmtrain.errors import ConfigError
from llmtrain.parallel.config import ContextKind, EngineKind
from llmtrain.planner.cost import architecture, legality
from llmtrain.planner.cost import cluster as clusters
from llmtrain.planner.cost.architecture import Architecture
from llmtrain.planner.cost.candidates import (
    DEFAULTS,
    Candidates,
    attention_params,
    dense_mlp_params,
    expert_params,
)
from llmtrain.planner.cost.cluster import Cluster
from llmtrain.planner.cost.costs import PARTS, find_costs
from llmtrain.planner.cost.layout import RECOMPUTES, Layout
from llmtrain.planner.cost.legality import GRID_AXES, Grid, Limits, Workload
from llmtrain.planner.cost.memory import COMPONENTS, INSTANTS, PLACES, MemoryProgram, memory
from llmtrain.planner.cost.programs import Calibrated, generation_of
from llmtrain.planner.cost.schedule import NAMES as SCHEDULES
from llmtrain.planner.cost.step_time import step_time
from llmtrain.planner.interval import Interval

ROWS_AT_ONCE = 8192
"""Candidates evaluated together: 64 KiB a column."""
MOST_GPUS = 1 << 31
LARGEST = 1 << 62
"""Of sizes and of tokens a step: columns are int64."""
RECOMPUTE_NAMES = {code: name for name, code in RECOMPUTES.items()}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be laid out, where, and by which program."""

    arch: Architecture
    cluster: Cluster
    seq_len: int
    global_batch_rows: int
    program: str = "llmtrain"
    precision: str = "bf16"
    optimizer: str = "adamw"
    engine: EngineKind = EngineKind.deepspeed
    """llmtrain's; no effect on other programs."""
    is_compiled: bool = False
    limits: Limits = field(default_factory=Limits)
    calibrated: Calibrated | None = None
    """Constants of step time; None: the program's on this GPU."""
    memory_program: MemoryProgram | None = None
    """None: the program's."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "global_batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.cluster.num_gpus > MOST_GPUS:
            raise ConfigError(
                f"cluster.nodes={self.cluster.num_nodes} of {self.cluster.gpus_per_node} GPUs are "
                f"{self.cluster.num_gpus:,} GPUs, and layouts are searched for up to {MOST_GPUS:,}; lower "
                "cluster.nodes"
            )
        if self.global_batch_rows * self.seq_len > LARGEST:
            raise ConfigError(
                f"a batch of {self.global_batch_rows:,} rows of {self.seq_len:,} tokens is more than "
                f"{LARGEST:,} tokens; lower plan.global_batch_tokens or data.seq_len"
            )
        for name, size in architecture.columns(self.arch).items():
            if size > LARGEST:
                raise ConfigError(
                    f"{name}={size:.3g} of {self.arch.name} is more than {LARGEST:,}, the largest size that "
                    "is costed; lower the budget, model.params or model.vocab_size"
                )
        self.cluster.gpu.peak(self.precision)  # raises where the GPU has none

    @property
    def workload(self) -> Workload:
        c = architecture.columns(self.arch)
        return Workload(
            num_layers=int(c["num_layers"]),
            num_heads=int(c["num_heads"]),
            num_kv_heads=int(c["num_kv_heads"]),
            ffn_width=int(c["ffn_width"]),
            vocab_size=int(c["vocab_size"]),
            seq_len=self.seq_len,
            global_batch_rows=self.global_batch_rows,
            num_experts=int(c.get("num_experts", 0)),
            expert_width=int(c.get("expert_width", 0)),
            shared_width=int(c.get("shared_width", 0)),
            is_latent=c["kv_rank"] > 0,
            precision=self.precision,
            optimizer=self.optimizer,
            engine=self.engine,
            device="cpu" if generation_of(self.cluster.gpu.name) == "cpu" else "cuda",
        )

    def enumerate(self) -> Grid:
        engine = legality.find_engine(self.program)
        return legality.enumerate_layouts(
            engine, self.workload, world_size=self.cluster.num_gpus, limits=self.limits
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One layout, and what to expect of it."""

    layout: Layout
    context: str
    """parallel.context: how context-parallel ranks share attention; no effect at cp=1."""
    step_s: Interval
    time: Mapping[str, float]
    """Seconds of a step by component; they add up to step_s.mid."""
    peak_bytes: Interval
    memory: Mapping[str, float]
    """Bytes by component at the fullest instant; they add up to what is allocated."""
    instant: str
    """The fullest."""
    place: str
    """Of the fullest rank in a pipeline: first, middle or last."""
    reason: str = ""
    """Why it was not chosen, in words with numbers; empty for the one that was."""


class Columns:
    """Step time and memory of columns of layouts, for one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.costs = find_costs(
            problem.program,
            gpu_name=problem.cluster.gpu.name,
            precision=problem.precision,
            is_compiled=problem.is_compiled,
            has_experts=problem.workload.num_experts > 0,
            calibrated=problem.calibrated,
            memory_program=problem.memory_program,
        )
        self.usable_bytes = problem.cluster.gpu.mem_bytes
        self.fixed: dict[str, float] = {
            **DEFAULTS,
            **architecture.columns(problem.arch),
            **clusters.columns(problem.cluster, self.costs.peak_precision),
            "seq_len": problem.seq_len,
        }

    def candidates(self, g: Grid) -> Candidates:
        """What is the same in every row is one number, seen as a column."""
        columns: dict[str, np.ndarray] = {
            name: np.broadcast_to(np.float64(value), (len(g),)) for name, value in self.fixed.items()
        }
        columns |= {each.name: getattr(g, each.name).astype(np.float64) for each in fields(Grid)}
        del columns["context"]
        columns["grad_accum"] = self.problem.global_batch_rows / (columns["dp"] * columns["micro_batch"])
        return Candidates(**columns)

    def least_bytes(self, g: Grid) -> np.ndarray:
        """What weights, gradients and optimizer states of each layout's blocks take: never more than
        `peak_bytes`, and found in a hundredth of its time. Of models with experts attention and experts
        count, for stages may have unequal numbers of other feed-forward layers."""
        one = self.candidates(g.rows(slice(0, 1)))
        has_experts = one.num_moe_layers > 0
        layer = attention_params(one) + np.where(has_experts, 0.0, dense_mlp_params(one))
        experts = expert_params(one) * one.num_moe_layers / one.num_layers
        num_layers = self.fixed["num_layers"]
        on_rank = np.minimum(np.ceil(num_layers / (g.pp * g.vpp)) * g.vpp, num_layers)
        p = self.costs.memory_program
        tables = np.array([p.weights, p.gradients, p.masters, p.moments]).sum(axis=0)
        whole, shared = tables[:, 0][g.zero_stage], tables[:, 1][g.zero_stage]
        data_ranks = g.dp * g.cp
        states = layer * (whole + shared / data_ranks)
        states = states + experts / g.ep * (whole + shared / np.maximum(1.0, data_ranks / g.ep))
        found: np.ndarray = on_rank * states / g.tp * (1 + p.slack) * p.spread[1] + p.context_bytes
        return found

    def fitting_bytes(self, g: Grid) -> np.ndarray:
        """`peak_bytes` of layouts that fit, and infinity of all others: most of those need no look.

        One whose `least_bytes` are too many does not fit. Nor does one with more rows a micro batch than
        another that is the same elsewhere and does not fit, unless its step is a single micro batch: then
        gradients need not be kept from one to the next.
        """
        found = np.full(len(g), np.inf)
        may_fit = self.least_bytes(g) <= self.usable_bytes
        alike = _alike_but_for_rows(g)
        is_single = g.micro_batch * g.dp == self.problem.global_batch_rows
        few_fit = np.ones(int(alike.max(initial=0)) + 1, dtype=bool)
        _, which, counts = np.unique(g.micro_batch, return_inverse=True, return_counts=True)
        turn = ((np.cumsum(counts) - counts) // ROWS_AT_ONCE)[which]  # the fewest rows first
        for now in np.unique(turn):
            at = np.flatnonzero(may_fit & (turn == now))
            at = at[few_fit[alike[at]] | is_single[at]]
            peak = self.peak_bytes(g.rows(at))
            fits = peak <= self.usable_bytes
            found[at[fits]] = peak[fits]
            few_fit[alike[at[~fits]]] = False
        return found

    def peak_bytes(self, g: Grid) -> np.ndarray:
        """The high end of each layout's peak."""
        return _piecewise(g, lambda piece: memory(self.candidates(piece), self.costs.memory_program).high)

    def step_s(self, g: Grid) -> np.ndarray:
        """The middle of each layout's step time."""
        software, constants = self.costs.software, self.costs.calibrated.constants
        return _piecewise(g, lambda piece: step_time(self.candidates(piece), software, constants).total)

    def choices(self, g: Grid) -> list[Choice]:
        c = self.candidates(g)
        time = step_time(c, self.costs.software, self.costs.calibrated.constants)
        peak = memory(c, self.costs.memory_program)
        total = time.total
        return [
            Choice(
                layout=_layout(self.problem, g, c, row),
                context=list(ContextKind)[int(g.context[row])].value,
                step_s=self.costs.interval(float(total[row])),
                time={name: float(getattr(time, name)[row]) for name in PARTS},
                peak_bytes=peak.interval(row),
                memory={name: float(getattr(peak, name)[row]) for name in COMPONENTS},
                instant=INSTANTS[int(peak.instant[row])],
                place=PLACES[int(peak.place[row])],
            )
            for row in range(len(g))
        ]


def _piecewise(g: Grid, evaluate: Callable[[Grid], np.ndarray]) -> np.ndarray:
    found = np.empty(len(g))
    for start in range(0, len(g), ROWS_AT_ONCE):
        piece = slice(start, start + ROWS_AT_ONCE)
        found[piece] = evaluate(g.rows(piece))
    return found


def _alike_but_for_rows(g: Grid) -> np.ndarray:
    """A number for each layout, that neighbours share which differ in nothing but the rows of a micro
    batch."""
    differs = np.zeros(len(g), dtype=bool)
    for each in fields(Grid):
        if each.name != "micro_batch":
            column = getattr(g, each.name)
            differs[1:] |= column[1:] != column[:-1]
    found: np.ndarray = np.cumsum(differs)
    return found


def _layout(problem: Problem, g: Grid, c: Candidates, row: int) -> Layout:
    axes = {name: int(getattr(g, name)[row]) for name in (*GRID_AXES, "vpp", "zero_stage")}
    return Layout(
        **axes,
        seq_len=problem.seq_len,
        micro_batch_rows=int(g.micro_batch[row]),
        grad_accum=int(c.grad_accum[row]),
        recompute=RECOMPUTE_NAMES[int(g.recompute[row])],
        sequence_parallel=bool(g.sequence_parallel[row]),
        schedule=SCHEDULES[int(g.schedule[row])],
        precision=problem.precision,
        compiled=problem.is_compiled,
    )
