"""How a run is spread over ranks. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmtrain.errors import ConfigError


class EngineKind(Enum):
    """What drives the ranks."""

    deepspeed = "deepspeed"
    """DeepSpeed: every layout."""
    accelerate = "accelerate"
    """Hugging Face Accelerate: one process, DDP (zero_stage 0) or FSDP2 (2: weights stay whole between
    forward and backward; 3: they are gathered again)."""


class ContextKind(Enum):
    """What context-parallel ranks exchange in attention."""

    heads = "heads"
    """All-to-all: each rank has all positions of some heads (Jacobs et al. 2023, Ulysses,
    arXiv:2309.14509)."""
    sequence = "sequence"
    """A ring: keys and values of each rank's positions go round (Liu et al. 2023, arXiv:2310.01889), cut so
    that causal work is even."""


class PipelineSchedule(Enum):
    """In which order a pipeline's ranks work on the micro batches of a step."""

    one_f_one_b = "one_f_one_b"
    """One stage a rank; one forward, one backward in turn (Narayanan et al. 2021, arXiv:2104.04473)."""
    dual_pipe_v = "dual_pipe_v"
    """Two stages a rank, the first of which lies on rank r and the last on rank r again: micro batches go
    out through the pipeline and come back (DeepSeek-AI 2024, arXiv:2412.19437, DualPipe cut in half). Less
    waiting; at least 2 * pp_size micro batches a step."""

    @property
    def stages_per_rank(self) -> int:
        return 2 if self is PipelineSchedule.dual_pipe_v else 1

    def stages_of(self, rank: int, pp_size: int) -> tuple[int, ...]:
        """Which of the pp_size * stages_per_rank stages a rank holds, in the order of the model."""
        last = self.stages_per_rank * pp_size - 1
        return (rank, last - rank) if self is PipelineSchedule.dual_pipe_v else (rank,)

    def loss_rank(self, pp_size: int) -> int:
        """The rank that holds the model's last stage."""
        return 0 if self is PipelineSchedule.dual_pipe_v else pp_size - 1


@dataclass(kw_only=True)
class ParallelConfig:
    """The grid (pp, dp, cp, tp), tp fastest. Data parallelism takes the ranks that the other axes leave."""

    engine: EngineKind = EngineKind.deepspeed
    zero_stage: int = 1
    """0: every rank keeps all; 1: optimizer states are split; 2: gradients too; 3: weights too
    (Rajbhandari et al. 2020, arXiv:1910.02054). Over dp * cp ranks."""
    pp_size: int = 1
    """Ranks that share the blocks, as pipeline stages of consecutive ones."""
    pp_schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    """No effect at pp_size=1."""
    cp_size: int = 1
    """Ranks that share the positions of a row."""
    tp_size: int = 1
    """Ranks that share every matrix."""
    sequence_parallel: bool = False
    """Whether tp ranks share the positions of activations between the matrices, too (Korthikanti et al.
    2022, arXiv:2205.05198). Less memory, as many bytes sent. No effect at tp_size=1."""
    context: ContextKind = ContextKind.heads
    """No effect at cp_size=1."""
    world_size: int | None = None
    """Ranks that the run is meant for. A launch with another number is refused; null takes any that divides
    the batch."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's own configuration beside those that llmtrain sets, checked against its schema."""

    def __post_init__(self) -> None:
        if self.world_size is not None and self.world_size < 1:
            raise ConfigError(f"parallel.world_size={self.world_size} must be at least 1, or null")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        for name in ("pp_size", "cp_size", "tp_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")
