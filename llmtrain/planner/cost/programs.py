"""Training programs: what each does in a step, its constants on the GPUs it was measured on, and how far off
they were.

Constants are fitted by calibration.py to the tables in planner/tables/cost; a test fits them again and holds
these numbers against it. On other GPUs the nearest generation's stand in, and the interval is wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.cost.candidates import Candidates
from llmtrain.planner.cost.step_time import Constants, Software

GENERATIONS: Mapping[str, tuple[str, ...]] = {
    "volta": ("v100",),
    "ampere": ("a100", "a800", "a10", "a6000", "rtx_3090"),
    "hopper": ("h100", "h200", "h800", "h20", "gh200"),
    "blackwell": ("b200", "gb200", "b300", "gb300", "rtx_5090"),
    "ada": ("l40", "l4", "rtx_4090"),
    "cdna2": ("mi250",),
    "cdna3": ("mi300", "mi325"),
    "cdna4": ("mi355",),
    "cpu": ("cpu", "this_machine"),
}
"""Generation -> how names of its GPUs in tables/cost/gpus.csv begin."""


def generation_of(gpu_name: str) -> str | None:
    """Of a GPU's name; None when it begins like no known one."""
    plain = gpu_name.lower().replace("-", "_").replace(" ", "_")
    starts = [
        (len(start), generation)
        for generation, known in GENERATIONS.items()
        for start in known
        if plain.startswith(start)
    ]
    return max(starts)[1] if starts else None


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A program on one generation of GPUs."""

    constants: Constants
    log_low: float
    log_high: float
    """Quantiles, 10% and 90%, of log(measured / predicted) on another cluster."""
    num_rows: int
    """Rows fitted; 0 where constants come from elsewhere."""
    source: str
    ranges: Mapping[str, tuple[float, float]]
    """Of QUANTITIES -> least and largest value among the rows that the constants are from, here or on the GPU
    that stands in; empty where there are none."""
    left_out: tuple[float, float] | None = None
    """The quantiles of the rows fitted, each left out in turn, without experts; None where there are none."""
    experts: tuple[float, float] | None = None
    """log_low and log_high of models with experts; None: no row had any."""


RANK_AXES = ("pp", "dp", "cp", "tp", "ep")
QUANTITIES = ("tokens", "seq_len", "d_model", *RANK_AXES, "world_size")
"""What says where constants are known: columns of Candidates, and pp * dp * cp * tp ranks."""


def quantity(c: Candidates, name: str) -> np.ndarray:
    """A column by its name of QUANTITIES."""
    found: np.ndarray = c.pp * c.dp * c.cp * c.tp if name == "world_size" else getattr(c, name)
    return found


OTHER_CLUSTER = 0.05
"""What the interval of another cluster has on top of rows of the same tables, in quadrature: constants of
vTrain's A100 are off by 2% to 7% in the median of tables of other A100 and V100 clusters (Megatron-LM's
README of 2020, arXiv:2205.05198 table 4)."""


def widened(low: float, high: float) -> tuple[float, float]:
    """The interval on another cluster, from the quantiles of rows left out."""
    return min(low, 0.0) - _added(low), max(high, 0.0) + _added(high)


def _added(end: float) -> float:
    return math.hypot(end, OTHER_CLUSTER) - abs(end)


def _fitted(
    constants: Constants,
    left_out: tuple[float, float],
    *,
    experts: tuple[float, float] | None = None,
    num_rows: int,
    ranges: Mapping[str, tuple[float, float]],
    source: str,
) -> Calibrated:
    low, high = widened(*left_out)
    return Calibrated(
        constants=constants,
        log_low=low,
        log_high=high,
        num_rows=num_rows,
        source=source,
        ranges={**dict.fromkeys(RANK_AXES, (1.0, 1.0)), **ranges},
        left_out=left_out,
        experts=experts,
    )


@dataclass(frozen=True, kw_only=True)
class Program:
    name: str
    software: Software
    calibrated: Mapping[str, Calibrated]
    """By generation."""
    source: str
    fp8_spread: float = 0.1
    """What the interval has in fp8 on top, in quadrature: FP8_SPEED is known to 15%, and products are most of
    a step. Assumed; 0 where the rows fitted are in fp8 as well, so that their errors say it."""
    compiled_passes: float | None = None
    """`elementwise_passes` under torch.compile; None: the program has no such switch."""

    def does(self, *, precision: str = "bf16", is_compiled: bool = False) -> Software:
        """What it does with matrix products of this precision (bf16, fp16, fp8 or fp32), compiled or not.

        With fp8 the candidates' peak_flops must still be the 16-bit one: FP8_SPEED is over that.
        """
        software = self.software
        if is_compiled and self.compiled_passes is not None:
            software = replace(software, elementwise_passes=self.compiled_passes)
        if precision == "fp32":
            return replace(software, element_bytes=4.0, grad_bytes=4.0)
        return replace(software, product_speed=FP8_SPEED) if precision == "fp8" else software

    def on(self, gpu_name: str, *, has_experts: bool = False) -> Calibrated:
        """Constants and interval on a GPU: measured, or from the nearest generation that was.

        Args:
            gpu_name: As in tables/cost/gpus.csv; one of an unknown kind is taken for a Hopper.
            has_experts: Whether the interval is that of models with experts, which are less well known: half
                more than a guess where no row had any.
        """
        generation = generation_of(gpu_name)
        if generation is not None and generation in self.calibrated:
            found = self.calibrated[generation]
        else:
            found = _guessed(self, generation)
        if has_experts:
            low, high = found.experts or (1.5 * GUESS_LOW, 1.5 * GUESS_HIGH)
            found = replace(found, log_low=min(low, found.log_low), log_high=max(high, found.log_high))
        return found


FP8_SPEED = 1.55
"""Products with fp8 inputs over those with bf16 ones, casts included, of a printed 2: llm-foundry's rows and
torchtitan's fit best with it, and worse by a fifth at 1.3 and 1.85."""

GUESS_LOW, GUESS_HIGH = -0.3, 0.3
"""Interval of a program on GPUs it was not measured on. Constants of one family predict rows of another
program on the same GPU, or of the same program on the next generation, with log(measured / predicted) from
-0.4 to 0.5 at 10% and 90%, 0.2 off in the median, before GENERATION_SPEED takes its part of that away."""

GENERATION_SPEED: Mapping[str | None, tuple[float, float]] = {
    "volta": (0.85, 1.0),
    "ampere": (1.0, 1.0),
    "ada": (1.0, 1.0),
    "hopper": (0.9, 0.68),
    "blackwell": (0.77, 0.68),
    "cdna2": (0.7, 0.68),
    "cdna3": (0.7, 0.68),
    "cdna4": (0.6, 0.68),
    None: (0.9, 0.68),
}
"""Efficiency of matrix products and of memory, over an Ampere's: printed peaks grow faster than what programs
get of them. Hopper: llm-foundry's rows on both; Blackwell: over Hopper, Megatron-Bridge's rows. Volta: with
1, vTrain's A100 constants predict the V100 rows of Megatron-LM's README of 2020 within 5%, and steps of Jean
Zay's V100 1.3 to 2.3 times too short (bigscience-workshop/bigscience@9e64ede experiments/gpt2.md); 0.85 is
between. The others: assumed, not measured."""

NEAREST: Mapping[str | None, tuple[str, ...]] = {
    "volta": ("ampere", "hopper", "blackwell"),
    "ampere": ("hopper", "blackwell"),
    "ada": ("ampere", "hopper", "blackwell"),
    "hopper": ("blackwell", "ampere"),
    "blackwell": ("hopper", "ampere"),
    "cdna2": ("ampere", "hopper", "blackwell"),
    "cdna3": ("hopper", "blackwell", "ampere"),
    "cdna4": ("blackwell", "hopper", "ampere"),
    None: ("hopper", "blackwell", "ampere"),
}
"""Generation -> those whose constants stand in for it, nearest first."""


def _guessed(program: Program, generation: str | None) -> Calibrated:
    if generation == "cpu":
        return CPU
    nearest = next(each for each in NEAREST[generation] if each in program.calibrated)
    known = program.calibrated[nearest]
    products, memory = (
        here / there
        for here, there in zip(GENERATION_SPEED[generation], GENERATION_SPEED[nearest], strict=True)
    )
    return Calibrated(
        constants=replace(
            known.constants,
            gemm_efficiency=known.constants.gemm_efficiency * products,
            memory_efficiency=known.constants.memory_efficiency * memory,
        ),
        log_low=GUESS_LOW,
        log_high=GUESS_HIGH,
        num_rows=0,
        source=f"guessed from {program.name} on {nearest}; assumed, not measured",
        ranges=known.ranges,
        experts=(1.5 * GUESS_LOW, 1.5 * GUESS_HIGH),
    )


MEGATRON_DEEPSPEED = Program(
    name="megatron_deepspeed",
    # its attention: a matrix product, a fused softmax with mask, a dropout, a matrix product
    software=Software(is_fused_attention=False, overlaps_tp_backward=True, splits_sends=True),
    calibrated={
        "ampere": _fitted(
            Constants(
                gemm_efficiency=0.8766,
                memory_efficiency=0.5041,
                launch_s=0.0008732,
                node_efficiency=0.8,
                contention=0.2,
                slowdown=1.052,
                fixed_s=0.003424,
            ),
            (-0.098, 0.099),
            num_rows=775,
            ranges={
                "tokens": (1024, 65536),
                "seq_len": (1024, 2048),
                "d_model": (1024, 12288),
                "pp": (1, 32),
                "dp": (1, 64),
                "tp": (1, 16),
                "world_size": (2, 512),
            },
            source="VIA-Research/vTrain@f8dda84 data/ground_truth_{single,multi}.csv",
        )
    },
    source="microsoft/Megatron-DeepSpeed and Megatron-LM of 2020 to 2023, before fused attention",
)
LLM_FOUNDRY = Program(
    name="llm_foundry",
    fp8_spread=0.0,
    # Triton's FlashAttention, FSDP FULL_SHARD, checkpoints of whole blocks
    software=Software(
        checkpoint_stops_early=True, attention_backward=3.5, dp_overlap=1.0, selective_attention=False
    ),
    calibrated={
        "ampere": _fitted(
            Constants(
                gemm_efficiency=0.7044,
                attention_efficiency=0.7869,
                memory_efficiency=0.7117,
                node_efficiency=0.8,
                contention=1.056,
            ),
            (-0.031, 0.090),
            num_rows=78,
            ranges={
                "tokens": (4096, 53248),
                "seq_len": (512, 32768),
                "d_model": (768, 8192),
                "dp": (8, 128),
                "world_size": (8, 128),
            },
            source="mosaicml/llm-foundry@8c8dd48 scripts/train/benchmarking/README.md, A100 40 GB",
        ),
        "hopper": _fitted(
            Constants(
                gemm_efficiency=0.6326,
                attention_efficiency=0.4451,
                memory_efficiency=0.4862,
                node_efficiency=0.8,
                contention=0.8493,
            ),
            (-0.022, 0.033),
            num_rows=30,
            ranges={
                "tokens": (4096, 98304),
                "seq_len": (512, 65536),
                "d_model": (1536, 8192),
                "dp": (8, 64),
                "world_size": (8, 64),
            },
            source="mosaicml/llm-foundry@8c8dd48 scripts/train/benchmarking/README.md, H100",
        ),
    },
    source="mosaicml/llm-foundry@8c8dd48",
)
TORCHTITAN = Program(
    name="torchtitan",
    software=Software(
        selective_products=0.5,
        selective_attention=False,
        selective_elementwise=True,
        dp_overlap=1.0,
        elementwise_passes=1.6,  # eager, and 0.8 compiled: assumed, between them lies the gain of its rows
        grad_bytes=4.0,
        balances_context=False,  # else its rows, left out in turn, are 14% off and not 7%
        loss_bytes=20.0,
    ),
    compiled_passes=0.8,
    fp8_spread=0.0,
    calibrated={
        "hopper": _fitted(
            Constants(
                gemm_efficiency=0.466,
                attention_efficiency=0.676,
                memory_efficiency=0.6,
                node_efficiency=0.8,
                contention=0.2,
            ),
            (-0.149, 0.156),
            num_rows=7,
            ranges={
                "tokens": (16384, 32768),
                "seq_len": (8192, 262144),
                "d_model": (4096, 4096),
                "dp": (1, 8),
                "cp": (1, 8),
                "world_size": (8, 8),
            },
            source="pytorch/torchtitan@b5bcd76 benchmarks/llama3_h100_202412_torchtitan.md, H100 of 500 W",
        )
    },
    source="pytorch/torchtitan@b5bcd76",
)
MEGATRON = Program(
    name="megatron",
    # All overlaps switched on, as in README and NeMo's recipes: --overlap-grad-reduce,
    # --overlap-param-gather, --tp-comm-overlap, interleaved sends; fused norms and loss. That the third hides
    # half, and 0.7 of the elementwise bytes, were chosen among a few values against the rows fitted below.
    software=Software(
        elementwise_passes=0.7,
        loss_bytes=20.0,
        grad_bytes=4.0,
        dp_overlap=1.0,
        tp_overlap=0.5,
        overlaps_tp_backward=True,
        overlaps_sends=True,
        overlaps_experts=True,
        splits_sends=True,
        sends_once_a_node=True,
    ),
    calibrated={
        "hopper": _fitted(
            Constants(
                gemm_efficiency=0.7553,
                attention_efficiency=1.206,
                expert_efficiency=0.392,
                memory_efficiency=0.3348,
                launch_s=0.00087,
                node_efficiency=0.8,
                contention=0.2,
            ),
            (-0.063, 0.085),
            experts=(-0.308, 0.317),
            num_rows=9,
            ranges={
                "tokens": (4096, 8192),
                "seq_len": (4096, 8192),
                "d_model": (2048, 16384),
                "pp": (1, 8),
                "dp": (2, 64),
                "cp": (1, 2),
                "tp": (1, 8),
                "ep": (1, 64),
                "world_size": (8, 1536),
            },
            source="NVIDIA/Megatron-LM@d98e8a6 images/model_table.png; "
            "NVIDIA-NeMo/Megatron-Bridge@067f987 docs/performance-summary-archive.md",
        ),
        "blackwell": _fitted(
            Constants(
                gemm_efficiency=0.6348,
                attention_efficiency=0.8542,
                expert_efficiency=0.5291,
                memory_efficiency=0.39,
                launch_s=0.00087,
                node_efficiency=0.8,
                contention=0.2,
            ),
            (-0.193, 0.209),
            experts=(-0.308, 0.317),
            num_rows=11,
            ranges={
                "tokens": (4096, 16384),
                "seq_len": (4096, 8192),
                "d_model": (2048, 16384),
                "pp": (1, 16),
                "dp": (2, 64),
                "cp": (1, 2),
                "tp": (1, 4),
                "ep": (1, 64),
                "world_size": (8, 256),
            },
            source="NVIDIA-NeMo/Megatron-Bridge@067f987 docs/performance-summary-archive.md",
        ),
    },
    source="NVIDIA/Megatron-LM, Megatron-Core 0.8 on, with its overlaps on",
)
MEGATRON_PLAIN = Program(
    name="megatron_plain",
    software=Software(loss_bytes=20.0, grad_bytes=4.0, overlaps_tp_backward=True, splits_sends=True),
    calibrated={
        "blackwell": _fitted(
            Constants(
                gemm_efficiency=0.4303,
                attention_efficiency=0.8491,
                expert_efficiency=0.7087,
                memory_efficiency=0.5821,
                launch_s=0.00087,
                node_efficiency=0.8,
                contention=0.2,
            ),
            (-0.090, 0.095),
            experts=(-0.108, 0.085),
            num_rows=19,
            ranges={
                "tokens": (4096, 32768),
                "seq_len": (4096, 131072),
                "d_model": (5120, 16384),
                "pp": (1, 2),
                "dp": (1, 8),
                "cp": (1, 8),
                "tp": (1, 8),
                "ep": (1, 8),
                "world_size": (8, 8),
            },
            source="MooreThreads/SimuMax@4dcaae5 docs/b200/b200_release_v1.2_summary.json",
        )
    },
    source="NVIDIA/Megatron-LM 0.14 without options of overlap",
)


MASKED_ATTENTION = 0.35
"""llmtrain's attention over that of the programs its constants are borrowed from. It hands SDPA an additive
mask (model/attend.py document_mask), which no flash kernel takes: on CUDA the memory-efficient one runs. That
computes every key, where a kernel with causal skip does half of it, and is slower by itself, 0.7: assumed,
not measured. Where SDPA has no such kernel for grouped heads it falls back on unfused products, which is not
counted."""


def _borrowed(known: Calibrated, attention_efficiency: float, source: str) -> Calibrated:
    attention = attention_efficiency * MASKED_ATTENTION
    return Calibrated(
        constants=replace(known.constants, attention_efficiency=attention),
        log_low=GUESS_LOW,
        log_high=GUESS_HIGH,
        num_rows=0,
        source=source,
        ranges=known.ranges,
        experts=(1.5 * GUESS_LOW, 1.5 * GUESS_HIGH),
    )


LLMTRAIN = Program(
    name="llmtrain",
    # DeepSpeed with overlap_comm off (train/deepspeed_config.py); gradients travel in the weights' type
    # (parallel/volume.py); norms and rotations are fp32 chains, as torchtitan's; the loss is taken in chunks
    software=Software(
        elementwise_passes=1.6,
        loss_bytes=20.0,
        selective_attention=False,
        selective_elementwise=True,
        checkpoint_stops_early=True,
        all_reduces=True,
        context="heads",  # the search's choice wherever heads divide
    ),
    compiled_passes=0.8,
    calibrated={
        "ampere": _borrowed(
            LLM_FOUNDRY.calibrated["ampere"],
            LLM_FOUNDRY.calibrated["ampere"].constants.attention_efficiency,
            "constants of llm_foundry on ampere: llmtrain was not measured on GPUs; assumed, not measured",
        ),
        "hopper": _borrowed(
            LLM_FOUNDRY.calibrated["hopper"],
            TORCHTITAN.calibrated["hopper"].constants.attention_efficiency,
            "constants of llm_foundry and torchtitan on hopper: llmtrain was not measured on GPUs; assumed, "
            "not measured",
        ),
    },
    source="llmtrain/parallel, docs/parallelism.md",
)

CPU = Calibrated(
    constants=Constants(
        gemm_efficiency=0.88,
        attention_efficiency=0.6,
        memory_efficiency=0.5,
        launch_s=5e-4,
        link_efficiency=0.3,
        node_efficiency=0.7,
        contention=1.0,
        gradient_bytes=140.0,
        fixed_s=1e-2,
        call_s=1e-4,
        is_synchronous=True,
    ),
    log_low=-0.5,
    log_high=0.5,
    num_rows=0,
    source="one model of 14M weights, profiled on one core of an x86 CPU; this machine was not measured: "
    "calibrate with a run of your own (llmtrain plan calibrate)",
    ranges={},
)
"""torch's operators on a CPU and gloo's collectives, over measured products, copies and links."""

PROGRAMS: Mapping[str, Program] = {
    each.name: each
    for each in (LLMTRAIN, MEGATRON, MEGATRON_PLAIN, MEGATRON_DEEPSPEED, TORCHTITAN, LLM_FOUNDRY)
}


def find_program(name: str) -> Program:
    """
    Raises:
        ConfigError: No program has this name; the message lists them, the nearest first.
    """
    if name not in PROGRAMS:
        raise ConfigError(unknown_name("program", name, PROGRAMS))
    return PROGRAMS[name]
