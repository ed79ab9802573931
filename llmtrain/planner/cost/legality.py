"""Which layouts a training program takes: columns of layouts in, columns of verdicts out. numpy only.

llmtrain's own rules are those of llmtrain/parallel/compatibility.py, which looks at one layout at a time and
says what is wrong; here each is a mask over many. A rule without a mask, or a mask whose verdict differs,
fails a test. Other programs' rules are what their code says, without their messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.parallel.compatibility import RULES
from llmtrain.parallel.config import EngineKind
from llmtrain.planner.cost.candidates import FULL, NO_RECOMPUTE, SELECTIVE
from llmtrain.planner.cost.schedule import DUAL_PIPE_V, INTERLEAVED, ONE_F_ONE_B

GRID_AXES = ("pp", "dp", "cp", "tp", "ep")
CONTEXT_HEADS, CONTEXT_SEQUENCE = range(2)
"""parallel.config.ContextKind as numbers."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a layout is wanted for: the sizes and settings that rules read."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    """Of dense layers; 0 when there are none."""
    vocab_size: int
    seq_len: int
    global_batch_rows: int
    num_experts: int = 0
    """0: a dense model."""
    expert_width: int = 0
    shared_width: int = 0
    is_latent: bool = False
    """Whether keys and values are latent (DeepSeek-V2, arXiv:2405.04434)."""
    precision: str = "bf16"
    optimizer: str = "adamw"
    engine: EngineKind = EngineKind.deepspeed
    """llmtrain's; no effect on other programs."""
    device: str | None = "cuda"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Layouts as int64 columns of one length; the codes of recompute and schedule are candidates.py's and
    schedule.py's."""

    pp: np.ndarray
    vpp: np.ndarray
    """Chunks of a rank: above 1 with INTERLEAVED, 2 with DUAL_PIPE_V, else 1."""
    dp: np.ndarray
    cp: np.ndarray
    tp: np.ndarray
    ep: np.ndarray
    zero_stage: np.ndarray
    micro_batch: np.ndarray
    """Rows."""
    recompute: np.ndarray
    sequence_parallel: np.ndarray
    schedule: np.ndarray
    context: np.ndarray

    def __len__(self) -> int:
        return len(self.pp)

    def rows(self, which: np.ndarray | slice) -> Grid:
        """Those of a mask, of row numbers or of a slice."""
        return replace(self, **{each.name: getattr(self, each.name)[which] for each in fields(self)})


def grid(**columns: np.ndarray | int) -> Grid:
    """Columns broadcast to one length; left out is plain: one rank an axis, ZeRO 1, nothing recomputed."""
    plain = {each.name: 1 for each in fields(Grid)} | dict.fromkeys(
        ("recompute", "sequence_parallel", "schedule", "context"), 0
    )
    given = {**plain, **columns}
    length = max(np.size(value) for value in given.values())
    return Grid(**{name: np.broadcast_to(np.asarray(v, np.int64), (length,)) for name, v in given.items()})


# -- llmtrain: a mask for every rule of parallel/compatibility.py, true where it is broken


def _when(claim: bool, mask: np.ndarray) -> np.ndarray:
    return mask if claim else np.zeros(len(mask), dtype=bool)


def _dual(g: Grid) -> np.ndarray:
    found: np.ndarray = (g.schedule == DUAL_PIPE_V) & (g.pp > 1)
    return found


def _few_micro_batches(g: Grid, w: Workload) -> np.ndarray:
    found: np.ndarray = (w.global_batch_rows < 2 * g.pp * g.micro_batch * g.dp) & _dual(g)
    return found


def _kv_heads(g: Grid, w: Workload) -> np.ndarray:
    found: np.ndarray = (w.num_kv_heads % g.tp != 0) & (g.tp % w.num_kv_heads != 0)
    return found


def _positions_over_context(g: Grid, w: Workload) -> np.ndarray:
    chunks = np.where(g.context == CONTEXT_SEQUENCE, 2 * g.cp, g.cp)
    found: np.ndarray = (g.cp > 1) & (w.seq_len % chunks != 0)
    return found


def _positions_over_tensor(g: Grid, w: Workload) -> np.ndarray:
    found: np.ndarray = (g.sequence_parallel > 0) & (w.seq_len % g.cp == 0) & (w.seq_len // g.cp % g.tp != 0)
    return found


def _heads_over_context(g: Grid, w: Workload) -> np.ndarray:
    found: np.ndarray = (
        (g.context == CONTEXT_HEADS) & (w.num_heads % g.tp == 0) & (w.num_heads // g.tp % g.cp != 0)
    )
    return found


def _layers(g: Grid, w: Workload) -> np.ndarray:
    found: np.ndarray = np.where(_dual(g), 2, 1) * g.pp > w.num_layers
    return found


Mask = Callable[[Grid, Workload], np.ndarray]

MASKS: Mapping[str, Mask] = {
    "pipeline_with_zero_2_or_3": lambda g, w: (g.pp > 1) & (g.zero_stage >= 2),
    "pipeline_with_zero_0": lambda g, w: (g.pp > 1) & (g.zero_stage == 0),
    "few_micro_batches_for_dual_pipe_v": _few_micro_batches,
    "half_precision_with_zero_0": lambda g, w: _when(w.precision != "fp32", g.zero_stage == 0),
    "fp16_off_cuda": lambda g, w: _when(
        w.precision == "fp16" and w.device not in (None, "cuda"), np.ones(len(g), dtype=bool)
    ),
    "muon_at_zero_3": lambda g, w: _when(w.optimizer == "muon", g.zero_stage == 3),
    "selective_at_zero_3": lambda g, w: _when(
        w.engine is EngineKind.deepspeed, (g.recompute == SELECTIVE) & (g.zero_stage == 3)
    ),
    "accelerate_with_pipeline": lambda g, w: g.pp > 1,
    "accelerate_with_tensor": lambda g, w: g.tp > 1,
    "accelerate_at_zero_1": lambda g, w: g.zero_stage == 1,
    "accelerate_with_fp16": lambda g, w: _when(w.precision == "fp16", np.ones(len(g), dtype=bool)),
    "accelerate_with_muon": lambda g, w: _when(w.optimizer == "muon", g.zero_stage >= 2),
    "heads_over_tensor": lambda g, w: w.num_heads % g.tp != 0,
    "kv_heads_over_tensor": _kv_heads,
    "ffn_width_over_tensor": lambda g, w: w.ffn_width % g.tp != 0,
    "vocabulary_over_tensor": lambda g, w: w.vocab_size % g.tp != 0,
    "positions_over_context": _positions_over_context,
    "positions_over_tensor": _positions_over_tensor,
    "heads_over_context": _heads_over_context,
    "layers_over_pipeline": _layers,
    "rows_over_data": lambda g, w: w.global_batch_rows % (g.micro_batch * g.dp) != 0,
}


def broken_by_llmtrain(g: Grid, w: Workload) -> dict[str, np.ndarray]:
    """Every rule of compatibility.py that speaks of this engine, with where it is broken."""
    return {rule.name: MASKS[rule.name](g, w) for rule in RULES if rule.engine in (None, w.engine)}


# -- other programs


def _experts(g: Grid, w: Workload) -> np.ndarray:
    """Experts lie evenly over ep ranks, taken from dp * cp."""
    is_uneven = g.ep > 1
    if w.num_experts:
        is_uneven = (w.num_experts % g.ep != 0) | (g.dp * g.cp % g.ep != 0)
    found: np.ndarray = is_uneven | (w.expert_width % g.tp != 0) | (w.shared_width % g.tp != 0)
    return found


def _broken_by_megatron(g: Grid, w: Workload) -> dict[str, np.ndarray]:
    """NVIDIA/Megatron-LM@002526d megatron/core/transformer/transformer_config.py. The vocabulary is padded,
    stages may be cut anyhow (pipeline_model_parallel_layout), and each of the two ends may be one. Experts
    train with tp only where it is sequence parallel (@0011998 .../moe/moe_layer.py, MoELayer.forward)."""
    micro_batches = w.global_batch_rows // (g.micro_batch * g.dp)
    return {
        "zero_stage": g.zero_stage > 1,
        "sequence_parallel": _when(w.num_experts > 0, (g.tp > 1) & (g.sequence_parallel == 0)),
        "heads": w.num_heads % g.tp != 0,
        "kv_heads": _when(not w.is_latent, _kv_heads(g, w)),
        "ffn_width": w.ffn_width % g.tp != 0,
        "experts": _experts(g, w),
        "positions": ((g.cp > 1) & (w.seq_len % (2 * g.cp) != 0))
        | ((g.sequence_parallel > 0) & (w.seq_len % (g.cp * g.tp) != 0)),
        "layers": g.pp * g.vpp > w.num_layers + 2,
        "interleaving": (g.vpp > 1) & (micro_batches % g.pp != 0),
        "rows": w.global_batch_rows % (g.micro_batch * g.dp) != 0,
    }


def _broken_by_megatron_deepspeed(g: Grid, w: Workload) -> dict[str, np.ndarray]:
    """Megatron-DeepSpeed (bigscience-workshop/Megatron-DeepSpeed): Megatron's matrices, DeepSpeed's
    pipeline, which takes unequal stages and ZeRO below 2."""
    return {
        "zero_stage": (g.pp > 1) & (g.zero_stage >= 2),
        "heads": w.num_heads % g.tp != 0,
        "kv_heads": w.num_kv_heads % g.tp != 0,
        "ffn_width": w.ffn_width % g.tp != 0,
        "layers": g.pp > w.num_layers,
        "rows": w.global_batch_rows % (g.micro_batch * g.dp) != 0,
    }


def _broken_by_torchtitan(g: Grid, w: Workload) -> dict[str, np.ndarray]:
    """torchtitan: FSDP2 at every size, sequence parallelism whenever tensor parallel, rows a multiple of 2 cp
    tp (torchtitan/distributed/parallel_dims.py, seq_len_divisor)."""
    micro_batches = w.global_batch_rows // (g.micro_batch * g.dp)
    return {
        "zero_stage": g.zero_stage < 2,
        "sequence_parallel": (g.tp > 1) & (g.sequence_parallel == 0),
        "heads": w.num_heads % g.tp != 0,
        "kv_heads": _when(not w.is_latent, w.num_kv_heads % g.tp != 0),
        "ffn_width": w.ffn_width % g.tp != 0,
        "experts": _experts(g, w),
        "positions": ((g.tp > 1) | (g.cp > 1)) & (w.seq_len % (2 * g.cp * g.tp) != 0),
        "layers": g.pp * g.vpp > w.num_layers,
        "interleaving": (g.vpp > 1) & (micro_batches % g.pp != 0),
        "rows": w.global_batch_rows % (g.micro_batch * g.dp) != 0,
    }


def _broken_by_llm_foundry(g: Grid, w: Workload) -> dict[str, np.ndarray]:
    """llm-foundry: PyTorch's FSDP and nothing else."""
    return {
        "axes": (g.pp > 1) | (g.tp > 1) | (g.cp > 1) | (g.ep > 1),
        "zero_stage": (g.zero_stage != 0) & (g.zero_stage != 2) & (g.zero_stage != 3),
        "rows": w.global_batch_rows % (g.micro_batch * g.dp) != 0,
    }


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a training program lays a model out."""

    broken: Callable[[Grid, Workload], dict[str, np.ndarray]]
    """Rule -> where it is broken."""
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    schedules: tuple[int, ...] = (ONE_F_ONE_B,)
    recomputes: tuple[int, ...] = (NO_RECOMPUTE, SELECTIVE, FULL)
    axes: tuple[str, ...] = ("pp", "cp", "tp")
    """Beside dp: those it has at all."""
    precisions: tuple[str, ...] = ("bf16", "fp16", "fp8", "fp32")
    has_sequence_parallel: bool = True
    has_experts: bool = False
    has_latent_attention: bool = False


_MEGATRON = Engine(
    broken=_broken_by_megatron,
    zero_stages=(0, 1),
    schedules=(ONE_F_ONE_B, INTERLEAVED),
    has_experts=True,
    has_latent_attention=True,
)

ENGINES: Mapping[str, Engine] = {
    "llmtrain": Engine(
        broken=broken_by_llmtrain,
        schedules=(ONE_F_ONE_B, DUAL_PIPE_V),
        precisions=("bf16", "fp16", "fp32"),
    ),
    "megatron": _MEGATRON,
    "megatron_plain": _MEGATRON,
    "megatron_deepspeed": Engine(
        broken=_broken_by_megatron_deepspeed, axes=("pp", "tp"), has_sequence_parallel=False
    ),
    "torchtitan": Engine(
        broken=_broken_by_torchtitan,
        zero_stages=(2, 3),
        schedules=(ONE_F_ONE_B, INTERLEAVED),
        has_experts=True,
        has_latent_attention=True,
    ),
    "llm_foundry": Engine(
        broken=_broken_by_llm_foundry, zero_stages=(0, 2, 3), recomputes=(NO_RECOMPUTE, FULL), axes=()
    ),
}


def find_engine(name: str) -> Engine:
    if name not in ENGINES:
        raise ConfigError(unknown_name("training program", name, ENGINES))
    return ENGINES[name]


def legal(engine: Engine, g: Grid, w: Workload) -> np.ndarray:
    """Where no rule is broken."""
    found = np.ones(len(g), dtype=bool)
    for mask in engine.broken(g, w).values():
        found &= ~mask
    return found


# -- enumeration


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a search leaves out although it is legal."""

    max_pp: int | None = None
    max_cp: int | None = None
    max_tp: int | None = None
    max_ep: int | None = None
    max_micro_batch_rows: int = 64
    max_vpp: int = 32
    zero_stages: tuple[int, ...] | None = None
    """None: all that the program has. So with the next two."""
    recomputes: tuple[int, ...] | None = None
    schedules: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("max_pp", "max_cp", "max_tp", "max_ep", "max_micro_batch_rows", "max_vpp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


def enumerate_layouts(engine: Engine, w: Workload, *, world_size: int, limits: Limits | None = None) -> Grid:
    """Every legal layout of `world_size` ranks.

    What has no effect is not listed twice: sequence parallelism at tp 1, a schedule at pp 1. Context
    parallelism goes over heads where they divide, for it runs fused kernels, else round a ring of positions.
    A micro batch is any number of rows that divides a dp rank's.

    Axes are added one after another, and what is illegal is dropped before the next: no rule forbids one row
    a micro batch, or to compute nothing again, and allows more. ConfigError when the program cannot train
    such a model.
    """
    limits = limits or Limits()
    _check_model(engine, w)

    def kept(g: Grid) -> Grid:
        is_legal = legal(engine, g, w)
        return g if is_legal.all() else g.rows(is_legal)

    g = _axes(engine, w, world_size, limits)
    if engine.has_sequence_parallel:
        g = _times(g, sequence_parallel=(0, 1))
        g = g.rows((g.tp > 1) | (g.sequence_parallel == 0))
    g = kept(_times(g, zero_stage=_those(engine.zero_stages, limits.zero_stages)))
    g = _with_schedules(engine, g, w, limits)
    g = kept(_times(g, recompute=_those(engine.recomputes, limits.recomputes)))
    return kept(_with_micro_batches(g, w, limits.max_micro_batch_rows))


def _check_model(engine: Engine, w: Workload) -> None:
    name = next(name for name, known in ENGINES.items() if known is engine)
    others = ("megatron", "torchtitan")
    if w.precision not in engine.precisions:
        raise ConfigError(
            f"{name} does not train in {w.precision}, but in {', '.join(engine.precisions)}; set "
            "plan.precision to one of those"
        )
    if (w.num_experts and not engine.has_experts) or (w.is_latent and not engine.has_latent_attention):
        kind = "experts" if w.num_experts and not engine.has_experts else "latent attention"
        raise ConfigError(
            f"{name} trains no model with {kind}; set plan.program={' or plan.program='.join(others)}"
        )


def _axes(engine: Engine, w: Workload, world_size: int, limits: Limits) -> Grid:
    """(pp, dp, cp, tp, ep) whose sizes divide, one row each."""
    sizes = np.array(divisors(world_size), dtype=np.int64)

    def of(axis: str, most: int | None, fits: np.ndarray) -> np.ndarray:
        if axis not in engine.axes:
            return sizes[:1]
        return sizes[fits & (sizes <= (most or world_size))]

    tp = of("tp", limits.max_tp, w.num_heads % sizes == 0)
    pp = of("pp", limits.max_pp, sizes <= w.num_layers)
    cp = of("cp", limits.max_cp, w.seq_len % sizes == 0)
    pps, cps, tps = (each.ravel() for each in np.meshgrid(pp, cp, tp, indexing="ij"))
    product = pps * cps * tps
    kept = world_size % product == 0
    dp = world_size // product[kept]
    ring = (w.num_heads // tps[kept] % cps[kept] != 0).astype(np.int64)
    g = grid(pp=pps[kept], cp=cps[kept], tp=tps[kept], dp=dp, context=ring)
    if w.num_experts and engine.has_experts:
        most = min(limits.max_ep or w.num_experts, w.num_experts)
        g = _times(g, ep=[size for size in divisors(w.num_experts) if size <= most])
        g = g.rows(g.dp * g.cp % g.ep == 0)
    return g


def _with_schedules(engine: Engine, g: Grid, w: Workload, limits: Limits) -> Grid:
    """Each row once for every schedule, and with INTERLEAVED for every number of chunks that leaves no rank a
    layer short."""
    wanted = _those(engine.schedules, limits.schedules)
    pipelines = g.rows(g.pp > 1)
    found = [g.rows(g.pp == 1)]
    for which in wanted:
        if which == INTERLEAVED:
            each = _times(pipelines, vpp=range(2, limits.max_vpp + 1))
            chunks = each.pp * each.vpp
            empty = -w.num_layers % chunks
            each = each.rows((chunks <= w.num_layers + 2) & (empty < each.pp))
        else:
            each = replace(pipelines, vpp=pipelines.vpp * (2 if which == DUAL_PIPE_V else 1))
        found.append(replace(each, schedule=np.full(len(each), which, dtype=np.int64)))
    return Grid(
        **{each.name: np.concatenate([getattr(part, each.name) for part in found]) for each in fields(Grid)}
    )


def _times(g: Grid, **columns: object) -> Grid:
    """Every row with every combination of the given values."""
    for name, values in columns.items():
        each = np.array(list(values), dtype=np.int64)  # type: ignore[call-overload]
        repeated = {field.name: np.repeat(getattr(g, field.name), len(each)) for field in fields(Grid)}
        g = Grid(**{**repeated, name: np.tile(each, len(g))})
    return g


def _those(of: tuple[int, ...], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    return of if wanted is None else tuple(each for each in of if each in wanted)


def _with_micro_batches(g: Grid, w: Workload, most: int) -> Grid:
    """Each row once for every number of rows, up to `most`, that divides its dp rank's rows of a step."""
    rows = w.global_batch_rows
    sizes = np.array([each for each in range(1, min(most, rows) + 1) if rows % each == 0], dtype=np.int64)
    ranks, which = np.unique(g.dp, return_inverse=True)
    divides = rows % (ranks[:, None] * sizes) == 0
    at, size = np.nonzero(divides[which])
    return replace(g.rows(at), micro_batch=sizes[size])


def divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
