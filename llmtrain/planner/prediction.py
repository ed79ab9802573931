"""What to expect of one model on one layout of one cluster: the planner's stable entry point.

    from llmtrain.planner import predict

    predict("llama3_8b", {"seq_len": 8192, "dp": 8, "zero_stage": 3}, "h100_sxm_8x").step_s

`predict` and `predict_many`, their arguments and the fields of `Prediction` keep their meaning from version
to version, so that others can hold them against their own measurements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import FLOPS_CONVENTIONS
from llmtrain.planner.cost import architecture
from llmtrain.planner.cost import cluster as clusters
from llmtrain.planner.cost import layout as layouts
from llmtrain.planner.cost.architecture import Architecture, find_model, flops_per_token, from_model_config
from llmtrain.planner.cost.candidates import DEFAULTS, Candidates, candidates
from llmtrain.planner.cost.cluster import Cluster, find_cluster
from llmtrain.planner.cost.costs import PARTS, Costs, find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.memory import COMPONENTS, INSTANTS, MemoryProgram, memory
from llmtrain.planner.cost.programs import Calibrated, find_program, generation_of
from llmtrain.planner.cost.step_time import step_time
from llmtrain.planner.interval import Interval

Model = Architecture | ModelConfig | str
"""A graph, a configuration of ours, or a name of tables/cost/models.csv."""
Setting = int | str | bool
LayoutLike = Layout | Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a question lies outside of the rows that the program's constants were fitted on."""

    decades: float | None
    """Powers of ten by which the furthest column is outside; 0: inside of all; None: there are no rows."""
    column: str
    """The furthest: of `Candidates`."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Intervals: 8 in 10 measurements lie between low and high."""

    step_s: Interval
    """Seconds of an optimizer step."""
    peak_bytes: Interval
    """Of the fullest GPU's memory, what the driver shows: the allocator's reserve and what lies outside
    it."""
    tokens_per_s: Interval
    """Of all GPUs together."""
    mfu: Mapping[str, Interval]
    """By each convention of model/size.py FLOPS_CONVENTIONS: FLOPs of the step over what the GPUs' peak in
    the layout's precision would do in step_s. `palm` counts every key, `causal` those before a query, and
    `fused` is the hardware's work with fused attention; recomputation counts in none."""
    time: Mapping[str, float]
    """Seconds by component (cost/step_time.py StepTime); they add up to step_s.mid."""
    memory: Mapping[str, float]
    """Bytes by component at the fullest instant (cost/memory.py COMPONENTS); what the allocator gives out."""
    instants: Mapping[str, float]
    """Bytes given out at each instant of a step, of the fullest rank."""
    fullest_instant: str
    fits: bool
    """Whether peak_bytes.high is at most what the GPU has."""
    program: str
    program_reason: str
    """"given", or why this one was taken."""
    source: str
    """Where the program's constants on this GPU come from."""
    distance: Distance


def predict(
    model: Model,
    layout: LayoutLike,
    cluster: Cluster | str,
    *,
    program: str | None = None,
    constants: Calibrated | None = None,
    memory_program: MemoryProgram | None = None,
) -> Prediction:
    """Step time and peak memory, each an interval.

    Args:
        layout: A mapping has the fields of `Layout`; `seq_len` is needed, the others have plain values, and
            precision is bf16 or, on a GPU without, the first it has (fp16 on V100).
        cluster: A name of tables/cost/nodes.csv stands for as many of its nodes as the layout's ranks need.
        program: The training program (cost/programs.py); None: the one whose runs are most like this one,
        which
            the answer names with the reason.
        constants: In place of the program's on this GPU, as `llmtrain plan calibrate` writes them.
        memory_program: In place of the program's.

    Raises:
        ConfigError: A name that is not known, a size that cannot be, a layout that does not go with the
        model or has more ranks than the cluster has GPUs.
    """
    asked = (model, layout, cluster)
    return predict_many([asked], program=program, constants=constants, memory_program=memory_program)[0]


def predict_many(
    asked: Sequence[tuple[Model, LayoutLike, Cluster | str]],
    *,
    program: str | None = None,
    constants: Calibrated | None = None,
    memory_program: MemoryProgram | None = None,
) -> list[Prediction]:
    """`predict` of many (model, layout, cluster), in their order, evaluated together as columns."""
    questions = [_Question.of(*each, program=program) for each in asked]
    groups: dict[tuple[str, str, bool, str, bool], list[int]] = defaultdict(list)
    for at, each in enumerate(questions):
        groups[each.how].append(at)
    found: dict[int, Prediction] = {}
    for (name, precision, is_compiled, gpu_name, has_experts), members in groups.items():
        costs = find_costs(
            name,
            gpu_name=gpu_name,
            precision=precision,
            is_compiled=is_compiled,
            has_experts=has_experts,
            calibrated=constants,
            memory_program=memory_program,
        )
        found |= zip(members, _evaluated([questions[at] for at in members], costs), strict=True)
    return [found[at] for at in range(len(questions))]


@dataclass(frozen=True)
class _Question:
    arch: Architecture
    layout: Layout
    cluster: Cluster
    program: str
    reason: str

    @classmethod
    def of(
        cls, model: Model, layout: LayoutLike, cluster: Cluster | str, *, program: str | None
    ) -> _Question:
        arch = _architecture(model)
        laid_out = layout if isinstance(layout, Layout) else _layout(layout)
        where = _cluster(cluster, laid_out)
        if (
            not isinstance(layout, Layout)
            and "precision" not in layout
            and "bf16" not in where.gpu.peak_flops
        ):
            laid_out = replace(laid_out, precision=next(iter(where.gpu.peak_flops)))
        _check(arch, laid_out)
        if program is not None:
            return cls(arch, laid_out, where, find_program(program).name, "given")
        return cls(arch, laid_out, where, *choose_program(arch, laid_out, where))

    @property
    def how(self) -> tuple[str, str, bool, str, bool]:
        """What chooses the constants: program, precision, compiled or not, GPU, with experts or not."""
        layout, has_experts = self.layout, architecture.columns(self.arch).get("num_experts", 0) > 0
        return self.program, layout.precision, layout.compiled, self.cluster.gpu.name, has_experts

    def columns(self, precision: str) -> dict[str, float]:
        return {
            **DEFAULTS,
            **architecture.columns(self.arch),
            **layouts.columns(self.layout),
            **clusters.columns(self.cluster, precision),
        }


def _architecture(model: Model) -> Architecture:
    if isinstance(model, ModelConfig):
        return from_model_config(model)
    return find_model(model) if isinstance(model, str) else model


def _layout(settings: Mapping[str, Setting]) -> Layout:
    known = [each.name for each in fields(Layout)]
    for name in settings:
        if name not in known:
            raise ConfigError(unknown_name("field of a layout", name, known))
    if "seq_len" not in settings:
        raise ConfigError("the layout has no seq_len; give the tokens of a row")
    return Layout(**settings)  # type: ignore[arg-type]


def _cluster(cluster: Cluster | str, layout: Layout) -> Cluster:
    if isinstance(cluster, str):
        one = find_cluster(cluster)
        nodes = math.ceil(layout.world_size / one.gpus_per_node)
        return one if nodes == 1 else find_cluster(cluster, num_nodes=nodes)
    if layout.world_size > cluster.num_gpus:
        nodes = math.ceil(layout.world_size / cluster.gpus_per_node)
        raise ConfigError(
            f"the layout has pp * dp * cp * tp = {layout.world_size} ranks, and the cluster {cluster.name} "
            f"{cluster.num_gpus} GPUs; give it num_nodes={nodes}, or a smaller layout"
        )
    return cluster


def _check(arch: Architecture, layout: Layout) -> None:
    """What no program could run."""
    sizes = architecture.columns(arch)
    for axis, product, what, more in (
        (
            "pp * vpp",
            layout.pp * layout.vpp,
            "num_layers",
            2,
        ),  # embedding and head may be stages of their own
        ("tp", layout.tp, "num_heads", 0),
        ("ep", layout.ep, "num_experts", 0),
    ):
        most = int(sizes.get(what, 0))
        if product > max(1, most + more):
            raise ConfigError(f"the layout has {axis}={product}, and {arch.name} {what}={most}; lower {axis}")


def choose_program(arch: Architecture, layout: Layout, cluster: Cluster) -> tuple[str, str]:
    """(Program, reason) when none was given: by the kind of sharding and the GPU's generation, as programs
    that published their speeds were used."""
    generation = generation_of(cluster.gpu.name)
    if generation == "cpu":
        return "llmtrain", "on a CPU only llmtrain's own steps are known"
    if layout.zero_stage >= 2 and layout.pp == 1 and layout.tp == 1:
        is_plain = layout.cp == 1 and layout.ep == 1 and not layout.compiled
        name = "llm_foundry" if is_plain else "torchtitan"  # the former has ten times the rows
        return name, f"gradients or weights sharded over data-parallel ranks, as by FSDP, on {generation}"
    if layout.zero_stage >= 2:
        return "torchtitan", f"ZeRO {layout.zero_stage} with pp or tp"
    is_modern = layout.cp > 1 or layout.ep > 1 or architecture.columns(arch)["kv_rank"] > 0
    if generation in ("volta", "ampere") and not is_modern:
        return "megatron_deepspeed", f"ZeRO {layout.zero_stage} on {generation}: Megatron of its years"
    return "megatron", f"ZeRO {layout.zero_stage} on {generation or cluster.gpu.name}"


def _evaluated(questions: list[_Question], costs: Costs) -> list[Prediction]:
    rows = [each.columns(costs.peak_precision) for each in questions]
    c = candidates(**{name: np.array([row[name] for row in rows]) for name in rows[0]})
    time, peak = step_time(c, costs.software, costs.calibrated.constants), memory(c, costs.memory_program)
    total = time.total
    found = []
    for row, each in enumerate(questions):
        step = costs.interval(float(total[row]))
        tokens = each.layout.global_batch_tokens
        rate = Interval(low=tokens / step.high, mid=tokens / step.mid, high=tokens / step.low)
        at_peak = each.layout.world_size * each.cluster.gpu.peak(each.layout.precision)
        used = {
            name: flops_per_token(each.arch, each.layout.seq_len, name) / at_peak
            for name in FLOPS_CONVENTIONS
        }
        peak_bytes = peak.interval(row)
        found.append(
            Prediction(
                step_s=step,
                peak_bytes=peak_bytes,
                tokens_per_s=rate,
                mfu={name: rate.scaled(share) for name, share in used.items()},
                time={name: float(getattr(time, name)[row]) for name in PARTS},
                memory={name: float(getattr(peak, name)[row]) for name in COMPONENTS},
                instants={name: float(peak.at[name][row]) for name in INSTANTS},
                fullest_instant=INSTANTS[int(peak.instant[row])],
                fits=peak_bytes.high <= each.cluster.gpu.mem_bytes,
                program=each.program,
                program_reason=each.reason,
                source=costs.calibrated.source,
                distance=distance_of(c, row, costs.calibrated),
            )
        )
    return found


def distance_of(c: Candidates, row: int, calibrated: Calibrated) -> Distance:
    """How far row `row` lies outside of the fitted rows' range, in the column where it is furthest."""
    if not calibrated.ranges:
        return Distance(decades=None, column="", text=f"not known: {calibrated.source}")
    outside = {}
    for name, (least, most) in calibrated.ranges.items():
        value = float(getattr(c, name)[row])
        outside[name] = max(0.0, _decades(value, most), _decades(least, value))
    column = max(outside, key=lambda name: outside[name])
    least, most = calibrated.ranges[column]
    if not outside[column]:
        return Distance(decades=0.0, column="", text=f"inside of the {calibrated.num_rows} rows fitted")
    value = float(getattr(c, column)[row])
    text = (
        f"{column}={value:g} where the {calibrated.num_rows} rows fitted have {least:g} to {most:g} "
        f"({calibrated.source})"
    )
    return Distance(decades=outside[column], column=column, text=text)


def _decades(more: float, less: float) -> float:
    """Powers of ten between two sizes; one decade from none to some."""
    if more <= less:
        return 0.0
    return math.log10(more / less) if less > 0 else 1.0
