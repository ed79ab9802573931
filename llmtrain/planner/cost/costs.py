"""How one program's steps are costed on one kind of GPU: what it does, its constants, what it keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from llmtrain.planner.cost import memory_programs
from llmtrain.planner.cost.memory import MemoryProgram
from llmtrain.planner.cost.programs import Calibrated, find_program, generation_of
from llmtrain.planner.cost.step_time import Software, StepTime
from llmtrain.planner.interval import Interval

WIDER_PER_DECADE = 0.15
"""Standard deviation of log(measured / predicted) that each power of ten outside of the rows fitted adds, in
quadrature. Assumed; about what Llama 3 405B on 16,384 GPUs (arXiv:2407.21783, table 4), a decade from the
rows of `megatron`, is slower than its constants have it, 1.24 times with a layer a chunk."""
NORMAL_90 = 1.2816
"""90% quantile of a normal distribution."""

PARTS = tuple(each.name for each in fields(StepTime))
"""Components of a step's seconds."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    program: str
    software: Software
    calibrated: Calibrated
    memory_program: MemoryProgram
    peak_precision: str
    """Of the GPU's peaks, the one that constants are parts of: at fp8, whose products `software` speeds up,
    bf16's."""

    added: float = 0.0
    """Half a width in logarithms that the interval has on top, in quadrature."""

    def interval(self, seconds: float, decades: float = 0.0, added: float = 0.0) -> Interval:
        """8 in 10 measured steps lie inside.

        Args:
            decades: Powers of ten outside of the rows fitted: each adds WIDER_PER_DECADE, in quadrature.
            added: Another half width in logarithms, in quadrature.
        """
        more = math.hypot(NORMAL_90 * WIDER_PER_DECADE * decades, added, self.added)
        low, high = self.calibrated.log_low, self.calibrated.log_high
        return Interval(
            low=seconds * math.exp(low - (math.hypot(low, more) - abs(low))),
            mid=seconds,
            high=seconds * math.exp(high + math.hypot(high, more) - abs(high)),
        )


def find_costs(
    program: str,
    *,
    gpu_name: str,
    precision: str = "bf16",
    is_compiled: bool = False,
    has_experts: bool = False,
    calibrated: Calibrated | None = None,
    memory_program: MemoryProgram | None = None,
) -> Costs:
    """
    Args:
        has_experts: Whether the model has some: their intervals are wider.
        calibrated, memory_program: None: the program's on this GPU.

    Raises:
        ConfigError: The program is not known.
    """
    known = find_program(program)
    device = "cpu" if generation_of(gpu_name) == "cpu" else "cuda"
    return Costs(
        program=known.name,
        software=known.does(precision=precision, is_compiled=is_compiled),
        calibrated=calibrated or known.on(gpu_name, has_experts=has_experts),
        memory_program=memory_program or _memory_program(known.name, precision=precision, device=device),
        peak_precision="bf16" if precision == "fp8" else precision,
        added=known.fp8_spread if precision == "fp8" and calibrated is None else 0.0,
    )


def _memory_program(program: str, *, precision: str, device: str) -> MemoryProgram:
    if program == "llmtrain":  # fp16 keeps as many bytes as bf16
        precision = "fp32" if precision == "fp32" else "bf16"
        return memory_programs.llmtrain(precision=precision, device=device, is_resident=device == "cpu")
    if program == "megatron_plain":
        return memory_programs.MEGATRON
    if program == "megatron_deepspeed":
        return MEGATRON_DEEPSPEED
    return memory_programs.find_memory_program(program)


MEGATRON_DEEPSPEED = replace(
    memory_programs.megatron(is_fused_attention=False, has_dropout=True, accumulates_in_products=False),
    source="as Megatron, with attention that is not fused and with dropout, as its scripts of 2021 and 2022 "
    "have it (bigscience-workshop/Megatron-DeepSpeed); assumed, not measured",
    zero_stages=(0, 1, 2, 3),
    spread=(0.9, 1.1),
)
