"""Which settings of a layout go together, and which sizes must divide which: a table of rules. stdlib only.

Nothing else decides this: the check on a login node, the planner and the suggestions below read the same
table. Rules of kind "combination" on DeepSpeed say what DeepSpeed 0.19.8 was seen to do; each is run by
tests/dist/test_deepspeed_rules.py. The others are arithmetic, or name what this package does not do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmtrain.parallel.config import ContextKind, EngineKind, PipelineSchedule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the rules read, gathered from all over a configuration."""

    engine: EngineKind
    pp_size: int
    dp_size: int
    cp_size: int
    tp_size: int
    zero_stage: int
    sequence_parallel: bool
    context: ContextKind
    precision: str
    """fp32, bf16 or fp16."""
    optimizer: str
    """adamw or muon."""
    device: str | None
    """cpu or cuda; None where it is not known, as on a login node: then no rule speaks of it."""
    micro_batch_rows: int
    rows_per_step: tuple[int, ...]
    """Every batch size of a ramp, then the final one."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    vocab_size: int
    seq_len: int
    tie_embeddings: bool
    """No rule reads it: where the embedding and the head lie on two ranks, each holds a copy."""
    recompute: str = "none"
    """"none", "full" or "selective"."""
    pp_schedule: PipelineSchedule = PipelineSchedule.one_f_one_b

    @property
    def world_size(self) -> int:
        return self.pp_size * self.dp_size * self.cp_size * self.tp_size


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that a layout can get wrong."""

    name: str
    reason: str
    """One sentence: why, and how that is known."""
    kind: Literal["combination", "divides"]
    engine: EngineKind | None = None
    """Whose rule it is; None: it holds whatever drives the ranks."""
    find: Callable[[Layout], str | None]

    def broken(self, layout: Layout) -> str | None:
        """What is wrong, with the values and what to do; None when it is kept, or is another engine's."""
        return self.find(layout) if self.engine in (None, layout.engine) else None


# -- combinations


def _pipeline_with_zero_2_or_3(layout: Layout) -> str | None:
    if layout.pp_size == 1 or layout.zero_stage < 2:
        return None
    return (
        f"parallel.pp_size={layout.pp_size} with parallel.zero_stage={layout.zero_stage}: DeepSpeed's "
        "pipeline refuses ZeRO-2 and ZeRO-3; set parallel.zero_stage=1"
    )


def _pipeline_with_zero_0(layout: Layout) -> str | None:
    if layout.pp_size == 1 or layout.zero_stage != 0:
        return None
    return (
        f"parallel.pp_size={layout.pp_size} with parallel.zero_stage=0: each pipeline stage would clip by "
        "the norm of its own gradients; set parallel.zero_stage=1"
    )


def _few_micro_batches_for_dual_pipe_v(layout: Layout) -> str | None:
    if layout.pp_size == 1 or layout.pp_schedule is not PipelineSchedule.dual_pipe_v:
        return None
    wanted, each = 2 * layout.pp_size, layout.micro_batch_rows * layout.dp_size
    named = zip(_batch_names(layout), layout.rows_per_step, strict=True)
    too_few = {name: rows for name, rows in named if rows < wanted * each}
    if not too_few:
        return None
    found = ", ".join(f"{name}={rows} is {rows / each:g}" for name, rows in too_few.items())
    return (
        f"parallel.pp_schedule=dual_pipe_v wants 2 * parallel.pp_size = {wanted} micro batches a step and "
        f"rank or more, of train.micro_batch_rows={layout.micro_batch_rows} rows, and {found}; raise it to "
        f"{wanted * each}, lower train.micro_batch_rows, or set parallel.pp_schedule=one_f_one_b"
    )


def _half_precision_with_zero_0(layout: Layout) -> str | None:
    if layout.precision == "fp32" or layout.zero_stage != 0:
        return None
    return (
        f"train.precision={layout.precision} with parallel.zero_stage=0: DeepSpeed's {layout.precision} "
        "optimizer at stage 0 makes an update of its own before the first, so that the optimizer's count of "
        "steps is one ahead; set parallel.zero_stage=1"
    )


def _fp16_off_cuda(layout: Layout) -> str | None:
    if layout.precision != "fp16" or layout.device in (None, "cuda"):
        return None
    return (
        f"train.precision=fp16 on {layout.device}: fp16 is for CUDA devices; set train.precision=bf16 or fp32"
    )


def _accelerate_with_fp16(layout: Layout) -> str | None:
    if layout.precision != "fp16":
        return None
    return (
        "train.precision=fp16 with parallel.engine=accelerate: only DeepSpeed scales the loss here; set "
        "train.precision=bf16 or parallel.engine=deepspeed"
    )


def _muon_at_zero_3(layout: Layout) -> str | None:
    if layout.optimizer != "muon" or layout.zero_stage != 3:
        return None
    return (
        "optimizer.kind=muon with parallel.zero_stage=3: Muon needs whole matrices, and ZeRO-3 splits each "
        "over all ranks; set parallel.zero_stage=2 or optimizer.kind=adamw"
    )


def _selective_at_zero_3(layout: Layout) -> str | None:
    is_deepspeed = layout.engine is EngineKind.deepspeed
    if layout.recompute != "selective" or layout.zero_stage != 3 or not is_deepspeed:
        return None
    return (
        "train.recompute=selective with parallel.zero_stage=3: weights are gathered inside what is computed "
        "again, which selective recomputation does not take; set train.recompute=full or "
        "parallel.zero_stage=2"
    )


def _accelerate_with_pipeline(layout: Layout) -> str | None:
    if layout.pp_size == 1:
        return None
    return (
        f"parallel.pp_size={layout.pp_size} with parallel.engine=accelerate, which has no pipeline here; set "
        "parallel.pp_size=1 or parallel.engine=deepspeed"
    )


def _accelerate_with_tensor(layout: Layout) -> str | None:
    if layout.tp_size == 1:
        return None
    return (
        f"parallel.tp_size={layout.tp_size} with parallel.engine=accelerate, which splits no matrix here; "
        "set parallel.tp_size=1 or parallel.engine=deepspeed"
    )


def _accelerate_at_zero_1(layout: Layout) -> str | None:
    if layout.zero_stage != 1:
        return None
    return (
        "parallel.zero_stage=1 with parallel.engine=accelerate, which has DDP (0) and FSDP2 (2 and 3); set "
        "parallel.zero_stage=2, or 0 to split nothing"
    )


def _accelerate_with_muon(layout: Layout) -> str | None:
    if layout.optimizer != "muon" or layout.zero_stage in (0, 1):  # 1 is another rule's
        return None
    return (
        f"optimizer.kind=muon with parallel.engine=accelerate and parallel.zero_stage={layout.zero_stage}: "
        "Muon needs whole matrices, and FSDP2 splits each over all ranks; set parallel.zero_stage=0 or "
        "optimizer.kind=adamw"
    )


# -- sizes


def _heads(layout: Layout) -> str | None:
    heads, tp = layout.num_heads, layout.tp_size
    if heads % tp == 0:
        return None
    return (
        f"model.num_heads={heads} is not a multiple of parallel.tp_size={tp}: a tensor-parallel rank holds "
        f"whole heads; set parallel.tp_size={_near(tp, _divisors(heads))} or "
        f"model.num_heads={_near_multiples(heads, tp)}"
    )


def _kv_heads(layout: Layout) -> str | None:
    kv_heads, tp = layout.num_kv_heads, layout.tp_size
    if kv_heads % tp == 0 or tp % kv_heads == 0:
        return None
    fits = [size for size in _divisors(layout.num_heads) if kv_heads % size == 0 or size % kv_heads == 0]
    return (
        f"model.num_kv_heads={kv_heads} and parallel.tp_size={tp}: one must be a multiple of the other, for "
        "a tensor-parallel rank holds whole key/value heads, or as many ranks share each; set "
        f"parallel.tp_size={_near(tp, fits)}"
    )


def _ffn_width(layout: Layout) -> str | None:
    width, tp = layout.ffn_width, layout.tp_size
    if width % tp == 0:
        return None
    return (
        f"model.ffn_width={width} is not a multiple of parallel.tp_size={tp}: tensor-parallel ranks hold "
        f"equal numbers of columns; set model.ffn_width={_near_multiples(width, tp)}"
    )


def _vocabulary(layout: Layout) -> str | None:
    size, tp = layout.vocab_size, layout.tp_size
    if size % tp == 0:
        return None
    return (
        f"model.vocab_size={size} is not a multiple of parallel.tp_size={tp}: tensor-parallel ranks hold "
        f"equal numbers of rows of the embedding; set model.vocab_size={-(-size // tp) * tp}, whose last "
        "rows are padding"
    )


def _positions_over_context(layout: Layout) -> str | None:
    length, cp = layout.seq_len, layout.cp_size
    ring = layout.context is ContextKind.sequence
    chunks = 2 * cp if ring else cp
    if cp == 1 or length % chunks == 0:
        return None
    named, why = "parallel.cp_size", "context-parallel ranks hold equal numbers of positions"
    product = f"{named}={cp}"
    if ring:
        product = f"2 * {named} = 2 * {cp} = {chunks}"
        why = "with parallel.context=sequence a rank holds two equal pieces, an early and a late one"
    return (
        f"data.seq_len={length} is not a multiple of {product}: {why}; set "
        f"data.seq_len={_near_multiples(length, chunks)}"
    )


def _positions_over_tensor(layout: Layout) -> str | None:
    length, cp, tp = layout.seq_len, layout.cp_size, layout.tp_size
    if not layout.sequence_parallel or length % cp or length // cp % tp == 0:  # cp's own rule comes first
        return None
    pieces = (2 if layout.context is ContextKind.sequence and cp > 1 else 1) * cp
    return (
        f"data.seq_len / parallel.cp_size = {length} / {cp} = {length // cp} is not a multiple of "
        f"parallel.tp_size={tp}: with parallel.sequence_parallel=true tensor-parallel ranks share positions "
        f"evenly; set data.seq_len={_near_multiples(length, math.lcm(pieces, cp * tp))} or "
        "parallel.sequence_parallel=false"
    )


def _heads_over_context(layout: Layout) -> str | None:
    heads, cp, tp = layout.num_heads, layout.cp_size, layout.tp_size
    if layout.context is not ContextKind.heads or heads % tp or heads // tp % cp == 0:
        return None
    return (
        f"model.num_heads / parallel.tp_size = {heads} / {tp} = {heads // tp} is not a multiple of "
        f"parallel.cp_size={cp}: with parallel.context=heads a context-parallel rank attends for whole "
        f"heads; set parallel.cp_size={_near(cp, _divisors(heads // tp))} or parallel.context=sequence"
    )


def _layers(layout: Layout) -> str | None:
    each = layout.pp_schedule.stages_per_rank if layout.pp_size > 1 else 1
    if each * layout.pp_size <= layout.num_layers:
        return None
    stages = f"parallel.pp_size={layout.pp_size}"
    if each > 1:
        stages = f"{each} * {stages} = {each * layout.pp_size} (pp_schedule={layout.pp_schedule.name})"
    return (
        f"{stages} is more than model.num_layers={layout.num_layers}: a pipeline stage holds at least one "
        f"block; set parallel.pp_size={max(1, layout.num_layers // each)} or less"
    )


def _rows(layout: Layout) -> str | None:
    micro, dp = layout.micro_batch_rows, layout.dp_size
    named = zip(_batch_names(layout), layout.rows_per_step, strict=True)
    uneven = {name: rows for name, rows in named if rows % (micro * dp)}
    if not uneven:
        return None
    common = math.gcd(*layout.rows_per_step)
    if common % dp == 0:
        mend = f"train.micro_batch_rows={_near(micro, _divisors(common // dp))}"
    else:
        mend = " ".join(f"{name}={_near_multiples(rows, micro * dp)}" for name, rows in uneven.items())
        if others := _dp_near(layout, dp):
            mend += f", or launch ranks for dp={others}"
    return (
        f"{', '.join(f'{name}={rows}' for name, rows in uneven.items())}: not a multiple of "
        f"train.micro_batch_rows * dp = {micro} * {dp} = {micro * dp}, and every micro batch must be full; "
        f"set {mend}"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="pipeline_with_zero_2_or_3",
        reason="DeepSpeed's pipeline engine raises 'ZeRO-2 and ZeRO-3 are incompatible with pipeline "
        "parallelism' (seen).",
        kind="combination",
        engine=EngineKind.deepspeed,
        find=_pipeline_with_zero_2_or_3,
    ),
    Rule(
        name="pipeline_with_zero_0",
        reason="Without ZeRO, DeepSpeed clips each pipeline stage by the norm of that stage's gradients "
        "alone (seen: losses differ from one process's; at ZeRO-1 they are equal).",
        kind="combination",
        engine=EngineKind.deepspeed,
        find=_pipeline_with_zero_0,
    ),
    Rule(
        name="few_micro_batches_for_dual_pipe_v",
        reason="DeepSpeed raises 'DualPipeV needs gradient_accumulation_steps >= 2 * stages' at the start, "
        "and 'DualPipeV needs at least 2 * stages micro-batches' at a step of a batch ramp (both seen).",
        kind="combination",
        engine=EngineKind.deepspeed,
        find=_few_micro_batches_for_dual_pipe_v,
    ),
    Rule(
        name="half_precision_with_zero_0",
        reason="DeepSpeed's bf16 and fp16 optimizer at stage 0 makes its states by an update with zero "
        "gradients, so AdamW's bias correction and weight decay are one step ahead (seen in bf16: the losses "
        "of ZeRO-1 are those of plain PyTorch, stage 0's are not; fp16 takes the same code).",
        kind="combination",
        engine=EngineKind.deepspeed,
        find=_half_precision_with_zero_0,
    ),
    Rule(
        name="fp16_off_cuda",
        reason="DeepSpeed raises 'Type fp16 is not supported on your device' on a CPU without fp16 "
        "instructions, and takes it on one with them (both seen): whether a run starts would depend on the "
        "CPU.",
        kind="combination",
        engine=EngineKind.deepspeed,
        find=_fp16_off_cuda,
    ),
    Rule(
        name="muon_at_zero_3",
        reason="ZeRO-3 hands the optimizer flat pieces (seen), and this package puts matrices together from "
        "those of ZeRO-1 and 2 only.",
        kind="combination",
        engine=EngineKind.deepspeed,
        find=_muon_at_zero_3,
    ),
    Rule(
        name="selective_at_zero_3",
        reason="torch's selective checkpointing raises at gathers of ZeRO-3 that it did not see in the "
        "forward pass (seen with this package's model; the order of prefetching decides).",
        kind="combination",
        find=_selective_at_zero_3,
    ),
    Rule(
        name="accelerate_with_pipeline",
        reason="This package's pipeline is DeepSpeed's.",
        kind="combination",
        engine=EngineKind.accelerate,
        find=_accelerate_with_pipeline,
    ),
    Rule(
        name="accelerate_with_tensor",
        reason="This package's tensor-parallel ranks hold plain tensors, parts of matrices, which FSDP2 "
        "would take for whole weights.",
        kind="combination",
        engine=EngineKind.accelerate,
        find=_accelerate_with_tensor,
    ),
    Rule(
        name="accelerate_at_zero_1",
        reason="PyTorch's DDP splits nothing and FSDP2 splits gradients with the optimizer states; neither "
        "is ZeRO-1.",
        kind="combination",
        engine=EngineKind.accelerate,
        find=_accelerate_at_zero_1,
    ),
    Rule(
        name="accelerate_with_fp16",
        reason="The loss scale is DeepSpeed's: this package has none of its own for Accelerate.",
        kind="combination",
        engine=EngineKind.accelerate,
        find=_accelerate_with_fp16,
    ),
    Rule(
        name="accelerate_with_muon",
        reason="FSDP2 hands the optimizer rows of each matrix, and this package puts matrices together from "
        "DeepSpeed's pieces only.",
        kind="combination",
        engine=EngineKind.accelerate,
        find=_accelerate_with_muon,
    ),
    Rule(
        name="heads_over_tensor",
        reason="A head's queries, keys and values meet on one rank.",
        kind="divides",
        find=_heads,
    ),
    Rule(
        name="kv_heads_over_tensor",
        reason="A rank holds whole key/value heads, or each is copied to as many ranks as every other.",
        kind="divides",
        find=_kv_heads,
    ),
    Rule(
        name="ffn_width_over_tensor",
        reason="Parts of a matrix are of one size, for collectives and for checkpoints.",
        kind="divides",
        find=_ffn_width,
    ),
    Rule(
        name="vocabulary_over_tensor",
        reason="Parts of a matrix are of one size, for collectives and for checkpoints.",
        kind="divides",
        find=_vocabulary,
    ),
    Rule(
        name="positions_over_context",
        reason="Ranks exchange pieces of one size; a ring gives a rank an early and a late piece, so that "
        "causal work is even.",
        kind="divides",
        find=_positions_over_context,
    ),
    Rule(
        name="positions_over_tensor",
        reason="Gathers and scatters along positions take pieces of one size.",
        kind="divides",
        find=_positions_over_tensor,
    ),
    Rule(
        name="heads_over_context",
        reason="The all-to-all gives each rank every position of an equal number of heads.",
        kind="divides",
        find=_heads_over_context,
    ),
    Rule(
        name="layers_over_pipeline",
        reason="A pipeline stage without a block would have no weights.",
        kind="divides",
        find=_layers,
    ),
    Rule(
        name="rows_over_data",
        reason="Every rank runs as many micro batches as every other, all of one size.",
        kind="divides",
        find=_rows,
    ),
)


def problems(layout: Layout) -> list[str]:
    """A sentence for every broken rule."""
    return [message for rule in RULES if (message := rule.broken(layout)) is not None]


def warnings(layout: Layout) -> list[str]:
    """What is legal, but has no effect or is slow."""
    found = []
    if layout.sequence_parallel and layout.tp_size == 1:
        found.append("parallel.sequence_parallel=true has no effect at parallel.tp_size=1")
    if layout.context is ContextKind.sequence and layout.cp_size == 1:
        found.append("parallel.context=sequence has no effect at parallel.cp_size=1")
    if layout.pp_schedule is PipelineSchedule.dual_pipe_v and layout.pp_size == 1:
        found.append("parallel.pp_schedule=dual_pipe_v has no effect at parallel.pp_size=1")
    for name, rows in zip(_batch_names(layout), layout.rows_per_step, strict=True):
        num_micro = rows // (layout.micro_batch_rows * layout.dp_size)
        if 0 < num_micro < layout.pp_size:
            idle = (layout.pp_size - 1) / (num_micro + layout.pp_size - 1)
            found.append(
                f"with {name}={rows} a step has fewer micro batches ({num_micro}) than "
                f"parallel.pp_size={layout.pp_size} pipeline stages, which then wait {idle:.0%} of the time, "
                "(pp - 1) / (micro batches + pp - 1); lower train.micro_batch_rows or parallel.pp_size"
            )
    return found


def legal_layouts(layout: Layout, world_size: int) -> Iterator[Layout]:
    """Every legal (pp, dp, cp, tp) of `world_size` ranks and ZeRO stage, all else as in `layout`."""
    for pp in _divisors(world_size):
        for cp in _divisors(world_size // pp):
            for tp in _divisors(world_size // (pp * cp)):
                dp = world_size // (pp * cp * tp)
                for zero_stage in range(4):
                    other = replace(
                        layout, pp_size=pp, dp_size=dp, cp_size=cp, tp_size=tp, zero_stage=zero_stage
                    )
                    if all(rule.broken(other) is None for rule in RULES):
                        yield other


def nearest(layout: Layout, world_size: int, *, most: int = 3) -> list[Layout]:
    """Up to `most` legal layouts of `world_size` ranks, the nearest first; `layout` itself if it is one.

    Near means: few settings changed (pp_size, cp_size, tp_size, zero_stage: what a user types); then a small
    sum of |log2 of the ratio| of the four axes' sizes; then a near ZeRO stage, and small axes.
    """

    def distance(other: Layout) -> tuple[float, ...]:
        typed = ("pp_size", "cp_size", "tp_size", "zero_stage")
        changed = sum(getattr(other, name) != getattr(layout, name) for name in typed)
        stretch = sum(
            abs(math.log2(getattr(other, name) / getattr(layout, name)))
            for name in ("pp_size", "dp_size", "cp_size", "tp_size")
        )
        by_stage = abs(other.zero_stage - layout.zero_stage)
        # rounded: sums of logarithms that are equal on paper differ in their last bits
        return (changed, round(stretch, 9), by_stage, other.pp_size, other.cp_size, other.tp_size)

    return sorted(legal_layouts(layout, world_size), key=distance)[:most]


def near_world_sizes(layout: Layout, world_size: int) -> list[int]:
    """The nearest numbers of ranks, below and above, that this pp, cp and tp and every batch size divide
    into."""
    each = layout.pp_size * layout.cp_size * layout.tp_size
    below = [dp for dp in range((world_size - 1) // each, 0, -1) if _rows_fit(layout, dp)][:1]
    above = _next_dp(layout, world_size // each)
    return [dp * each for dp in (*below, *above)]


def describe(layout: Layout, *, instead_of: Layout | None = None) -> str:
    """The axes as overrides: those above 1 and those that differ from `instead_of`, and the ZeRO stage."""
    typed = [
        f"parallel.{name}={getattr(layout, name)}"
        for name in ("pp_size", "cp_size", "tp_size")
        if getattr(layout, name) > 1
        or (instead_of is not None and getattr(layout, name) != getattr(instead_of, name))
    ]
    return " ".join([*typed, f"parallel.zero_stage={layout.zero_stage}", f"(dp {layout.dp_size})"])


def explain(layout: Layout, world_size: int | None) -> list[str]:
    """All that is wrong, a sentence each, and last the nearest legal layouts; nothing when all is well.

    Args:
        layout: Its dp_size is not read: data parallelism takes the ranks that the other axes leave.
        world_size: None where it is not known: batch sizes are then not looked at, and no layout is named.
    """
    if world_size is None:
        return problems(replace(layout, dp_size=1, rows_per_step=()))
    each = layout.pp_size * layout.cp_size * layout.tp_size
    layout = replace(layout, dp_size=max(1, world_size // each))
    if world_size % each:
        ranks = " or ".join(map(str, near_world_sizes(layout, world_size)))
        found = [
            f"world_size={world_size} is not a multiple of parallel.pp_size * cp_size * tp_size = "
            f"{layout.pp_size} * {layout.cp_size} * {layout.tp_size} = {each}; "
            + (f"launch {ranks} ranks, or lower one of them" if ranks else "lower one of them"),
            *problems(replace(layout, rows_per_step=())),
        ]
    else:
        found = problems(layout)
    if not found:
        return []
    near = [describe(other, instead_of=layout) for other in nearest(layout, world_size)]
    if near:
        return [*found, f"nearest layouts of {world_size} ranks that work: {'; '.join(near)}"]
    return [
        *found,
        f"no layout of {world_size} ranks works with the other settings as they are; change them first",
    ]


# -- arithmetic


def _batch_names(layout: Layout) -> list[str]:
    """What a user calls each of `rows_per_step`."""
    ramp = [f"train.batch_ramp[{at}].rows" for at in range(len(layout.rows_per_step) - 1)]
    return [*ramp, "train.global_batch_rows"] if layout.rows_per_step else []


def _rows_fit(layout: Layout, dp: int) -> bool:
    return all(rows % (layout.micro_batch_rows * dp) == 0 for rows in layout.rows_per_step)


def _next_dp(layout: Layout, dp: int) -> list[int]:
    """The next larger number of data-parallel ranks that batches divide into; empty where there is none."""
    if not layout.rows_per_step:
        return [dp + 1]
    return [more for more in range(dp + 1, min(layout.rows_per_step) + 1) if _rows_fit(layout, more)][:1]


def _dp_near(layout: Layout, dp: int) -> str:
    fits = [size for size in range(1, dp) if _rows_fit(layout, size)][-1:]
    return " or ".join(map(str, [*fits, *_next_dp(layout, dp)]))


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _near(asked: int, fits: Iterable[int]) -> str:
    """The nearest of `fits` below and above what was asked: '2 or 4'."""
    below = [size for size in fits if size < asked][-1:]
    above = [size for size in fits if size > asked][:1]
    return " or ".join(map(str, [*below, *above]))


def _near_multiples(number: int, of: int) -> str:
    """The nearest multiples of `of` around `number`, which is none: '6 or 9'."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(below + of)
