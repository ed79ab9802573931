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
from numbers import Real

import numpy as np

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import FLOPS_CONVENTIONS
from llmtrain.parallel.config import EngineKind
from llmtrain.planner.cost import architecture, legality
from llmtrain.planner.cost import cluster as clusters
from llmtrain.planner.cost import layout as layouts
from llmtrain.planner.cost.architecture import Architecture, find_model, flops_per_token, from_model_config
from llmtrain.planner.cost.candidates import DEFAULTS, Candidates, candidates
from llmtrain.planner.cost.cluster import THIS_MACHINE, Cluster, find_cluster
from llmtrain.planner.cost.costs import PARTS, Costs, find_costs
from llmtrain.planner.cost.layout import RECOMPUTES, Layout
from llmtrain.planner.cost.memory import COMPONENTS, INSTANTS, MemoryProgram, memory
from llmtrain.planner.cost.programs import GUESS_HIGH, Calibrated, find_program, generation_of, quantity
from llmtrain.planner.cost.schedule import NAMES as SCHEDULES
from llmtrain.planner.cost.step_time import step_time
from llmtrain.planner.interval import Interval, decades_between

Model = Architecture | ModelConfig | str
"""A graph, a configuration of ours, or a name of tables/cost/models.csv."""
Setting = int | str | bool
LayoutLike = Layout | Mapping[str, Setting]

UNTOLD = 0.12
"""What the interval of a step has on top, half its width in logarithms and in quadrature, when nobody said
which program runs: Llama 3 8B under FSDP takes 1.20 s a step on 8 H100 by the constants of llm_foundry, and
1.35 s by those of torchtitan."""
UNTOLD_ALONE = 0.6
"""The same for models over data-parallel ranks alone on Volta and Ampere: GPT-2 124M on 8 A100 takes 0.28 s a
step of 0.5M tokens by hand-written kernels (karpathy/llm.c, discussion 481, as remembered) and 0.69 s by the
Megatron of 2021 as its constants have it, and what is answered, 0.50 s, lies between."""


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
    """It widens step_s, but where `constants` were given: their interval stands."""
    legal: bool
    """Whether the program runs this layout. Where it does not, step_s is as much wider as for a program on
    GPUs it was not measured on."""
    why_not: str
    """What it does not run; empty where it runs it."""


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
        cluster: A name of tables/cost/nodes.csv stands for as many of its nodes as the layout's ranks need,
            this_machine for as many ranks on one.
        program: The training program (cost/programs.py); None: the one whose runs are most like this one,
            which the answer names with the reason.
        constants: In place of the program's on this GPU, as `llmtrain plan calibrate` writes them, with their
            interval.
        memory_program: In place of the program's.

    Raises:
        ConfigError: A name that is not known, a value of a wrong kind, a size that cannot be, a layout that
            no program could run this model on or with more ranks than the cluster has GPUs.
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
        those = [questions[at] for at in members]
        found |= zip(members, _evaluated(those, costs, is_own=constants is not None), strict=True)
    return [found[at] for at in range(len(questions))]


@dataclass(frozen=True)
class _Question:
    arch: Architecture
    layout: Layout
    cluster: Cluster
    program: str
    reason: str
    added: float
    """Half a width in logarithms that the interval has because nobody said the program."""

    @classmethod
    def of(
        cls, model: Model, layout: LayoutLike, cluster: Cluster | str, *, program: str | None
    ) -> _Question:
        laid_out = layout if isinstance(layout, Layout) else _layout(layout)
        arch = _architecture(model, laid_out)
        where = _cluster(cluster, laid_out)
        if (
            not isinstance(layout, Layout)
            and "precision" not in layout
            and "bf16" not in where.gpu.peak_flops
        ):
            laid_out = replace(laid_out, precision=next(iter(where.gpu.peak_flops)))
        _check(arch, laid_out)
        if program is not None:
            return cls(arch, laid_out, where, find_program(program).name, "given", 0.0)
        return cls(arch, laid_out, where, *choose_program(arch, laid_out, where))

    @property
    def why_not(self) -> str:
        layout = self.layout
        if self.added == UNTOLD_ALONE:
            layout = replace(
                layout, zero_stage=0
            )  # the program stands in for others, of which some have ZeRO 1
        return why_not(self.arch, layout, self.cluster, self.program)

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


def _architecture(model: Model, layout: Layout) -> Architecture:
    if isinstance(model, ModelConfig):
        return from_model_config(model)
    arch = find_model(model) if isinstance(model, str) else model
    if not isinstance(arch, Architecture):
        raise ConfigError(
            f"the model is {arch!r}; give a name of tables/cost/models.csv, a ModelConfig or an Architecture"
        )
    is_mpt = arch.name.startswith("mpt_") and arch.embedding.positions
    if is_mpt and layout.seq_len > arch.embedding.positions:
        # llm-foundry makes the table of positions as long as a row (max_seq_len), as in its published rows
        return replace(arch, embedding=replace(arch.embedding, positions=layout.seq_len))
    return arch


def _layout(settings: Mapping[str, Setting]) -> Layout:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"the layout is {settings!r}; give a Layout, or a mapping with its fields")
    known = {each.name: str(each.type) for each in fields(Layout)}
    for name in settings:
        if name not in known:
            raise ConfigError(unknown_name("field of a layout", str(name), known))
    if "seq_len" not in settings:
        raise ConfigError("the layout has no seq_len; give the tokens of a row")
    values = {name: _value(name, known[name], value) for name, value in settings.items()}
    return Layout(**values)  # type: ignore[arg-type]


def _value(name: str, kind: str, value: object) -> Setting:
    """A field's value in its type: tables hold whole numbers as floats, and claims as 0 and 1."""
    if kind == "str" and isinstance(value, str):
        return value
    number = float(value) if isinstance(value, Real) else math.nan  # a bool is a number, too
    if kind == "int" and type(value) is not bool and number.is_integer():
        return int(number)
    if kind == "bool" and number in (0.0, 1.0):
        return bool(number)
    if kind == "bool" and isinstance(value, np.bool_):
        return bool(value)
    wanted = {"str": "a name", "int": "a whole number", "bool": "true or false"}[kind]
    raise ConfigError(f"layout.{name}={value!r} must be {wanted}")


def _cluster(cluster: Cluster | str, layout: Layout) -> Cluster:
    if isinstance(cluster, str):
        if cluster == THIS_MACHINE:
            return find_cluster(cluster, gpus_per_node=layout.world_size)
        one = find_cluster(cluster)
        nodes = math.ceil(layout.world_size / one.gpus_per_node)
        return one if nodes == 1 else find_cluster(cluster, num_nodes=nodes)
    if not isinstance(cluster, Cluster):
        raise ConfigError(f"the cluster is {cluster!r}; give a name of tables/cost/nodes.csv, or a Cluster")
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
    num_heads, positions = int(sizes["num_heads"]), arch.embedding.positions
    if num_heads % layout.tp:
        raise ConfigError(
            f"the layout has tp={layout.tp}, which does not divide num_heads={num_heads} of {arch.name}; a "
            "tensor-parallel rank takes whole heads"
        )
    if 0 < positions < layout.seq_len:
        raise ConfigError(
            f"the layout has seq_len={layout.seq_len}, and {arch.name} a table of {positions} positions; "
            "lower seq_len, or give an Architecture with as many"
        )


def choose_program(arch: Architecture, layout: Layout, cluster: Cluster) -> tuple[str, str, float]:
    """(Program, reason, UNTOLD or UNTOLD_ALONE) when none was given: by the kind of sharding and the GPU's
    generation, as programs that published their speeds were used."""
    generation, model = generation_of(cluster.gpu.name), architecture.columns(arch)
    has_experts = model.get("num_experts", 0) > 0
    if generation == "cpu":
        return "llmtrain", "on a CPU only llmtrain's own steps are known", 0.0
    if layout.zero_stage >= 2 and layout.pp == 1 and layout.tp == 1:
        is_plain = layout.cp == 1 and not has_experts and not layout.compiled
        name = "llm_foundry" if is_plain else "torchtitan"  # the former has ten times the rows
        reason = f"gradients or weights sharded over data-parallel ranks, as by FSDP, on {generation}"
        return name, reason, UNTOLD
    if layout.zero_stage >= 2:
        return "torchtitan", f"ZeRO {layout.zero_stage} with pp or tp", UNTOLD
    is_modern = layout.cp > 1 or has_experts or model["kv_rank"] > 0
    if generation not in ("volta", "ampere") or is_modern:
        return "megatron", f"ZeRO {layout.zero_stage} on {generation or cluster.gpu.name}", UNTOLD
    if layout.pp > 1 or layout.tp > 1 or layout.recompute == "full":
        what = "pp or tp" if layout.pp > 1 or layout.tp > 1 else "whole blocks recomputed"
        reason = f"ZeRO {layout.zero_stage} with {what} on {generation}: Megatron of its years"
        return "megatron_deepspeed", reason, UNTOLD
    reason = (
        f"ZeRO {layout.zero_stage} over data-parallel ranks alone on {generation}: fused attention, as in "
        "most programs since 2022; from hand-written kernels to the Megatron of 2021 they lie 2.5 times "
        "apart, hence the interval"
    )
    return "llm_foundry", reason, UNTOLD_ALONE


# -- what a program runs

RUNS_TOO: Mapping[str, tuple[str, ...]] = {"megatron_deepspeed": ("sequence_parallel", "schedule")}
"""Settings that cost/legality.py keeps a search from and that programs of this name have run: Megatron-LM of
2021 and 2022 (arXiv:2104.04473, arXiv:2205.05198)."""


def why_not(arch: Architecture, layout: Layout, cluster: Cluster, program: str) -> str:
    """What the program does not run of a layout, by cost/legality.py; empty where it runs it."""
    engine, sizes = legality.find_engine(program), architecture.columns(arch)
    num_experts, is_latent = int(sizes.get("num_experts", 0)), sizes["kv_rank"] > 0
    axes = {axis: getattr(layout, axis) for axis in ("pp", "cp", "tp")}
    has_many = {"schedule": layout.pp > 1, "sequence_parallel": layout.sequence_parallel and layout.tp > 1}
    # Megatron-FSDP: rows that megatron's constants are fitted to have it
    is_megatron_fsdp = program == "megatron" and layout.zero_stage == 3 and layout.pp == 1
    broken = {
        "experts": num_experts > 0 and not engine.has_experts,
        "latent attention": is_latent and not engine.has_latent_attention,
        f"precision={layout.precision}": layout.precision not in engine.precisions,
        **{f"{axis}={size}": size > 1 and axis not in engine.axes for axis, size in axes.items()},
        f"zero_stage={layout.zero_stage}": layout.zero_stage not in engine.zero_stages
        and not is_megatron_fsdp,
        f"recompute={layout.recompute}": RECOMPUTES[layout.recompute] not in engine.recomputes,
        f"schedule={layout.schedule}": has_many["schedule"]
        and SCHEDULES.index(layout.schedule) not in engine.schedules
        and "schedule" not in RUNS_TOO.get(program, ()),
        "sequence_parallel": has_many["sequence_parallel"]
        and not engine.has_sequence_parallel
        and "sequence_parallel" not in RUNS_TOO.get(program, ()),
    }
    found = [what for what, is_broken in broken.items() if is_broken]
    if not found:
        skipped = ("zero_stage",) if is_megatron_fsdp else ()
        # llmtrain has two engines, of which a question does not say one
        engines = tuple(EngineKind) if program == "llmtrain" else (EngineKind.deepspeed,)
        rules = [_rules_broken(arch, layout, cluster, program, each) for each in engines]
        fewest = min(rules, key=len)
        found = [f"this (its rule: {name.replace('_', ' ')})" for name in fewest if name not in skipped]
    return f"{program} does not run {', '.join(found)}" if found else ""


def _rules_broken(
    arch: Architecture, layout: Layout, cluster: Cluster, program: str, engine: EngineKind
) -> list[str]:
    sizes = defaultdict(int, {name: int(value) for name, value in architecture.columns(arch).items()})
    g = legality.grid(
        **{name: getattr(layout, name) for name in ("pp", "vpp", "dp", "cp", "tp", "ep", "zero_stage")},
        micro_batch=layout.micro_batch_rows,
        recompute=RECOMPUTES[layout.recompute],
        sequence_parallel=int(layout.sequence_parallel and layout.tp > 1),
        schedule=SCHEDULES.index(layout.schedule),
        context=int(sizes["num_heads"] % (layout.tp * layout.cp) != 0),  # heads where they divide
    )
    workload = legality.Workload(
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        ffn_width=sizes["ffn_width"],
        vocab_size=sizes["vocab_size"],
        num_experts=sizes["num_experts"],
        expert_width=sizes["expert_width"],
        shared_width=sizes["shared_width"],
        seq_len=layout.seq_len,
        global_batch_rows=layout.global_batch_rows,
        is_latent=sizes["kv_rank"] > 0,
        precision=layout.precision,
        engine=engine,
        device="cpu" if generation_of(cluster.gpu.name) == "cpu" else "cuda",
    )
    broken = legality.find_engine(program).broken(g, workload)
    return [name for name, mask in broken.items() if mask.any()]


def _evaluated(questions: list[_Question], costs: Costs, *, is_own: bool) -> list[Prediction]:
    rows = [each.columns(costs.peak_precision) for each in questions]
    c = candidates(**{name: np.array([row[name] for row in rows]) for name in rows[0]})
    time, peak = step_time(c, costs.software, costs.calibrated.constants), memory(c, costs.memory_program)
    total = time.total
    found = []
    for row, each in enumerate(questions):
        distance = distance_of(c, row, costs.calibrated)
        reason = each.why_not
        added = math.hypot(each.added, GUESS_HIGH if reason else 0.0)
        decades = distance.decades or 0.0
        if is_own:
            added, decades = 0.0, 0.0
        step = costs.interval(float(total[row]), decades, added)
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
                distance=distance,
                legal=not reason,
                why_not=reason,
            )
        )
    return found


def distance_of(c: Candidates, row: int, calibrated: Calibrated) -> Distance:
    """How far row `row` lies outside of the fitted rows' range, in the column where it is furthest."""
    if not calibrated.ranges:
        return Distance(decades=None, column="", text=f"not known: {calibrated.source}")
    outside = {}
    for name, (least, most) in calibrated.ranges.items():
        value = float(quantity(c, name)[row])
        outside[name] = max(0.0, decades_between(value, most), decades_between(least, value))
    column = max(outside, key=lambda name: outside[name])
    least, most = calibrated.ranges[column]
    those = f"{calibrated.num_rows} rows fitted" if calibrated.num_rows else "rows behind its constants"
    if not outside[column]:
        return Distance(decades=0.0, column="", text=f"inside of the {those}")
    value = float(quantity(c, column)[row])
    span = f"{least:g}" if least == most else f"{least:g} to {most:g}"
    source = f" ({calibrated.source})" if calibrated.num_rows else ""
    text = f"{column}={value:g} where the {those} have {span}{source}"
    return Distance(decades=outside[column], column=column, text=text)
