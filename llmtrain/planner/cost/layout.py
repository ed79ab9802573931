"""How a model lies on a cluster: the process grid, what is sharded and recomputed, and the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.cost import schedule
from llmtrain.planner.cost.candidates import FULL, NO_RECOMPUTE, SELECTIVE

RECOMPUTES: Mapping[str, int] = {"none": NO_RECOMPUTE, "selective": SELECTIVE, "full": FULL}
PRECISIONS = ("bf16", "fp16", "fp8", "fp32")
CHUNKED_SCHEDULES = ("interleaved", "dual_pipe_v")
"""Those in which a rank holds more than one chunk of the model: vpp of them, and two."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to run one model. Sizes of axes are counts of ranks; ConfigError where they cannot be."""

    seq_len: int
    """Tokens a row."""
    pp: int = 1
    vpp: int = 1
    """Chunks of the model a pipeline rank holds."""
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    """Experts lie over ep of the dp * cp ranks; the axis needs no ranks of its own."""
    zero_stage: int = 1
    micro_batch_rows: int = 1
    grad_accum: int = 1
    """Micro batches a step and dp rank: with pp > 1, what the pipeline is filled with."""
    recompute: str = "none"
    """none, selective (attention's scores) or full (whole blocks from their inputs)."""
    sequence_parallel: bool = False
    """Between tensor-parallel matrices each tp rank holds a part of the sequence. No effect with tp=1."""
    schedule: str = "one_f_one_b"
    """One of planner.cost.schedule.NAMES. No effect with pp=1."""
    precision: str = "bf16"
    """Of matrix products: bf16, fp16, fp8 or fp32."""
    compiled: bool = False
    """Whether elementwise work is fused by a compiler (torch.compile)."""

    def __post_init__(self) -> None:
        sizes = ("seq_len", "pp", "vpp", "dp", "cp", "tp", "ep", "micro_batch_rows", "grad_accum")
        for name in sizes:
            value = getattr(self, name)
            if value < 1 or value != int(value):
                raise ConfigError(f"layout.{name}={value} must be a whole number, at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"layout.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.recompute not in RECOMPUTES:
            raise ConfigError(unknown_name("layout.recompute", self.recompute, RECOMPUTES))
        if self.schedule not in schedule.NAMES:
            raise ConfigError(unknown_name("layout.schedule", self.schedule, schedule.NAMES))
        if self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("layout.precision", self.precision, PRECISIONS))
        if self.seq_len % self.cp:
            raise ConfigError(
                f"layout.seq_len={self.seq_len} is not a multiple of layout.cp={self.cp}; each "
                "context-parallel rank takes an equal part of a row"
            )
        if (self.dp * self.cp) % self.ep:
            raise ConfigError(
                f"layout.ep={self.ep} does not divide layout.dp * layout.cp = {self.dp} * {self.cp}; experts "
                "lie over data- and context-parallel ranks"
            )
        self._check_pipeline()

    def _check_pipeline(self) -> None:
        if self.vpp > 1 and (self.pp == 1 or self.schedule not in CHUNKED_SCHEDULES):
            raise ConfigError(
                f"layout.vpp={self.vpp} with layout.pp={self.pp} and layout.schedule={self.schedule}: more "
                f"than one chunk a rank needs pp > 1 and one of the schedules {', '.join(CHUNKED_SCHEDULES)}"
            )
        if self.pp > 1 and self.schedule == "dual_pipe_v" and self.vpp != 2:
            raise ConfigError(
                f"layout.schedule=dual_pipe_v has two chunks a rank; set layout.vpp=2, not {self.vpp}"
            )
        if self.pp > 1 and self.schedule == "interleaved" and self.grad_accum % self.pp:
            raise ConfigError(
                f"layout.grad_accum={self.grad_accum} is not a multiple of layout.pp={self.pp}; the "
                "interleaved schedule runs micro batches in groups of pp"
            )

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def global_batch_rows(self) -> int:
        return self.dp * self.micro_batch_rows * self.grad_accum

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_rows * self.seq_len


def columns(layout: Layout) -> dict[str, float]:
    """The layout as keywords of `candidates()`. Precision and compilation are not among them: they choose the
    cluster's peak and the program."""
    names = ("seq_len", "pp", "vpp", "dp", "cp", "tp", "ep", "zero_stage", "grad_accum", "sequence_parallel")
    found = {name: float(getattr(layout, name)) for name in names}
    found["micro_batch"] = float(layout.micro_batch_rows)
    found["recompute"] = float(RECOMPUTES[layout.recompute])
    found["schedule"] = float(schedule.NAMES.index(layout.schedule))
    return found
