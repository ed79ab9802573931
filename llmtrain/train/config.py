"""What a run is, how long it lasts, and how it updates weights. stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.errors import ConfigError
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.config import LoaderConfig
from llmtrain.model.config import ModelConfig
from llmtrain.parallel.config import ParallelConfig
from llmtrain.tracking.config import TrackingConfig
from llmtrain.train.spike_config import SpikeConfig


class Intent(Enum):
    """What the user means to happen to the run folder. A guess is never made."""

    fresh = "fresh"
    """Start at step 0; an error over a folder that holds a run."""
    resume = "resume"
    """Continue from the newest verified checkpoint; an error without one."""
    fresh_or_resume = "fresh_or_resume"
    """Fresh in an empty folder, else resume: for a command that a scheduler or a person repeats until the
    run is over."""
    warm_start = "warm_start"
    """Step 0, fresh optimizer, weights of run.init_from; an error over a folder that holds a run."""


class Precision(Enum):
    """Number format of weights and activations in the forward and backward pass. Master weights are fp32
    always."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    """With a loss scale that follows overflows (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
    Needs CUDA."""


class Recompute(Enum):
    """What the blocks of train.recompute_every compute again."""

    full = "full"
    """Everything: the least memory, a third more FLOPs."""
    selective = "selective"
    """All but matrix products and attention: hardly any FLOPs (Korthikanti et al. 2022, arXiv:2205.05198,
    section 5)."""


class Determinism(Enum):
    """How far two runs of one config agree, on one layout, one kind of machine and one set of versions. What
    each level sets is in train/determinism.py, what it costs in docs/determinism.md."""

    fast = "fast"
    """Kernels are chosen for speed: nothing is promised beyond the same rows, weights and masks at the
    start."""
    reproducible = "reproducible"
    """Operations add in a fixed order, and one that cannot is an error: the same bits, if nobody changes the
    number of threads or how NCCL talks."""
    bitwise = "bitwise"
    """These are fixed too, and a resume that could not have the same bits is refused: on another layout,
    machine, number of threads or version."""


class ScheduleKind(Enum):
    """The learning rate after warm-up."""

    cosine = "cosine"
    """Half a cosine from peak to floor (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    wsd = "wsd"
    """The peak, then down to the floor over the last decay_tokens (Hu et al. 2024, arXiv:2404.06395)."""
    inverse_sqrt = "inverse_sqrt"
    """The peak times sqrt(warmup_tokens / tokens), not below the floor (Vaswani et al. 2017,
    arXiv:1706.03762, section 5.3): no end is planned for."""
    constant = "constant"
    """The peak."""


class DecayShape(Enum):
    """How wsd goes down. With t from 0 to 1 over decay_tokens, the share of the way to the floor is"""

    linear = "linear"
    """t;"""
    sqrt = "sqrt"
    """sqrt(t), the best of those that Hägele et al. 2024 (arXiv:2405.18392, section 3.2) compare."""


@dataclass(kw_only=True)
class RunConfig:
    name: str
    folder: str
    """Everything the run writes lies here: config, metrics, checkpoints, report."""
    intent: Intent = Intent.fresh
    seed: int = 0
    """Root of every random stream: initial weights and the order of rows."""
    init_from: str | None = None
    """A run folder or a checkpoint; only for intent=warm_start."""
    fallback: bool = False
    """Whether a start goes back to the newest whole checkpoint where a newer one is damaged, and does the
    steps between again; false: it ends."""
    time_limit_s: float | None = None
    """Seconds from the start of the process by which it must have left; null: none of yours. The limit of a
    Slurm job holds as well."""
    leave_before_s: float = 180.0
    """So long before a time limit the run saves and leaves, with exit status 75; of a short job, half of its
    time at most. A signal needs no lead: it is there."""
    max_same_failures: int = 3
    """A run whose last so many attempts ended alike after the same step does not start again, and its exit
    status is 78; 0: it always does."""
    plan: str | None = None
    """The plan.json that `llmtrain plan` wrote, for the report to hold this run against; null: no plan was
    made."""

    def __post_init__(self) -> None:
        if not self.name or not self.folder:
            raise ConfigError(f"run.name={self.name!r} and run.folder={self.folder!r} must not be empty")
        if self.leave_before_s < 0 or self.max_same_failures < 0:
            raise ConfigError(
                f"run.leave_before_s={self.leave_before_s} and "
                f"run.max_same_failures={self.max_same_failures} must be at least 0"
            )
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ConfigError(f"run.time_limit_s={self.time_limit_s} must be above 0, or null for none")
        if (self.intent is Intent.warm_start) != (self.init_from is not None):
            raise ConfigError(
                f"run.intent={self.intent.name} with run.init_from={self.init_from}: "
                f"warm_start needs init_from, and nothing else takes it"
            )


@dataclass(kw_only=True)
class RampConfig:
    """A stage of a rising batch."""

    until_tokens: int
    """Input positions consumed at which the next stage begins; a step under way is finished first."""
    rows: int
    """Rows of a step in this stage, over all ranks."""


@dataclass(kw_only=True)
class TrainConfig:
    total_tokens: int
    """Input positions to train on, repeats included; rounded up to whole steps."""
    global_batch_rows: int
    """Rows of seq_len tokens in one optimizer update, over all ranks."""
    micro_batch_rows: int
    """Rows that one rank feeds to one forward pass."""
    batch_ramp: list[RampConfig] = field(default_factory=list)
    """Smaller or larger steps at the beginning; after the last stage a step has global_batch_rows."""
    precision: Precision = Precision.fp32
    recompute_every: int = 0
    """Activation checkpointing: of so many blocks the first keeps its input alone, and is computed again in
    the backward pass. 1: every block; 0: none. Changes no number."""
    recompute: Recompute = Recompute.full
    """No effect at recompute_every=0."""
    compile_blocks: bool = False
    """Whether to compile each block with torch.compile: minutes at the start, faster steps on GPUs. Changes
    the order of sums, so losses differ in the last digits."""
    determinism: Determinism = Determinism.fast
    """How far a run repeats itself to the last bit."""
    dropout: float = 0.0
    """Share of the embedding's elements, and of those that each layer adds, that are zeroed in training
    (GPT-2: 0.1). The mask is the same in every layout and after every restart."""
    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    eval_every_steps: int = 0
    """Steps between held-out evaluations; 0: only after the last step."""
    eval_rows: int | None = None
    """Held-out rows of an evaluation inside the run, spread evenly over the split; null: all of them."""
    process_group_timeout_s: float = 600.0
    """How long a rank waits for the others in a collective before it gives up."""
    hang_timeout_s: float | None = None
    """A rank that stands still for so long in a step has all ranks say where they are, and the run ends, with
    the odd one named: docs/hangs.md. Longer in what is done for the first time; null: a quarter of
    process_group_timeout_s; 0: nobody watches."""
    straggler_slower_than: float = 0.2
    """Share by which a rank is slower than the median before it is reported as a straggler."""
    start_up_silence_s: float = 25.0
    """A rank that is not heard for so long before the first step is named, and the run ends; 0: wait for
    process_group_timeout_s without a word."""
    device_peak_tflops: float | None = None
    """Peak of one device in this precision, dense; null leaves MFU out. `llmtrain bench peak` measures a
    CPU's."""
    device_peak_source: str | None = None
    """Where device_peak_tflops comes from: printed beside every MFU."""

    def __post_init__(self) -> None:
        for name in (
            "total_tokens",
            "global_batch_rows",
            "micro_batch_rows",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        if not (self.eval_every_steps >= 0 and 0 <= self.grad_clip < math.inf):
            raise ConfigError(
                f"train.eval_every_steps={self.eval_every_steps} and train.grad_clip={self.grad_clip} "
                f"must be finite and not negative; 0 switches them off"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"train.dropout={self.dropout} must be in [0, 1)")
        if self.recompute_every < 0:
            raise ConfigError(
                f"train.recompute_every={self.recompute_every} must be 0 (none), 1 (every block) or more"
            )
        if self.eval_rows is not None and self.eval_rows < 1:
            raise ConfigError(f"train.eval_rows={self.eval_rows} must be at least 1, or null for all")
        if self.global_batch_rows % self.micro_batch_rows:
            raise ConfigError(
                f"train.global_batch_rows={self.global_batch_rows} is not a multiple of "
                f"train.micro_batch_rows={self.micro_batch_rows}; every micro batch must be full"
            )
        bounds = [stage.until_tokens for stage in self.batch_ramp]
        if bounds != sorted(set(bounds)) or min(bounds, default=1) < 1:
            raise ConfigError(f"train.batch_ramp: until_tokens={bounds} must rise, from 1 on")
        for stage in self.batch_ramp:
            if stage.rows < 1 or stage.rows % self.micro_batch_rows:
                raise ConfigError(
                    f"train.batch_ramp: rows={stage.rows} is not a positive multiple of "
                    f"train.micro_batch_rows={self.micro_batch_rows}; every micro batch must be full"
                )
        if self.process_group_timeout_s <= 0 or self.start_up_silence_s < 0:
            raise ConfigError(
                f"need train.process_group_timeout_s={self.process_group_timeout_s} above 0 and "
                f"train.start_up_silence_s={self.start_up_silence_s} at least 0"
            )
        if not 0 <= self.hang_limit_s < self.process_group_timeout_s / 2:
            raise ConfigError(
                f"train.hang_timeout_s={self.hang_timeout_s} must be at least 0 and less than half of "
                f"train.process_group_timeout_s={self.process_group_timeout_s}, or collectives give up first"
            )
        if not self.straggler_slower_than > 0:
            raise ConfigError(f"train.straggler_slower_than={self.straggler_slower_than} must be above 0")
        if (self.device_peak_tflops is None) != (self.device_peak_source is None):
            raise ConfigError(
                f"train.device_peak_tflops={self.device_peak_tflops} and "
                f"train.device_peak_source={self.device_peak_source}: give both, or neither"
            )

    @property
    def hang_limit_s(self) -> float:
        """hang_timeout_s, with its default filled in."""
        return self.process_group_timeout_s / 4 if self.hang_timeout_s is None else self.hang_timeout_s


class OptimizerKind(Enum):
    """What updates the weights."""

    adamw = "adamw"
    """Loshchilov & Hutter 2019 (arXiv:1711.05101)."""
    muon = "muon"
    """Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/) for the matrices of blocks, AdamW for
    the rest. Its updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2),
    so peak_lr and weight_decay are for both."""


@dataclass(kw_only=True)
class OptimizerConfig:
    peak_lr: float
    kind: OptimizerKind = OptimizerKind.adamw
    beta1: float = 0.9
    """AdamW's, as are beta2 and eps: with muon, of embeddings, head, norms and biases."""
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only, never to norms and biases."""
    momentum: float = 0.95
    """Muon's, in Nesterov's form; no effect with adamw."""

    def __post_init__(self) -> None:
        if not (
            0 < self.peak_lr < math.inf and 0 < self.eps < math.inf and 0 <= self.weight_decay < math.inf
        ):
            raise ConfigError(
                f"need finite optimizer.peak_lr > 0, optimizer.eps > 0 and optimizer.weight_decay >= 0, got "
                f"{self.peak_lr}, {self.eps} and {self.weight_decay}"
            )
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of tokens seen, so that a change of batch size cannot stretch it."""

    kind: ScheduleKind = ScheduleKind.cosine
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0 to peak."""
    decay_tokens: int | None = None
    """Only for wsd, which needs it (Hägele et al. 2024, arXiv:2405.18392, use 10-20% of the run)."""
    decay_shape: DecayShape = DecayShape.linear
    """No effect on other kinds."""
    floor_ratio: float = 0.1
    """The lowest rate as a fraction of the peak; no effect on constant."""

    def __post_init__(self) -> None:
        if (self.kind is ScheduleKind.wsd) != (self.decay_tokens is not None):
            raise ConfigError(
                f"schedule.decay_tokens={self.decay_tokens} with schedule.kind={self.kind.name}: "
                "wsd needs decay_tokens, and the other kinds have none"
            )
        if self.kind is ScheduleKind.inverse_sqrt and self.warmup_tokens < 1:
            raise ConfigError(
                f"schedule.warmup_tokens={self.warmup_tokens} with schedule.kind=inverse_sqrt: the rate "
                "falls from the end of warm-up on, in its measure; give at least 1"
            )
        if self.warmup_tokens < 0 or (self.decay_tokens or 0) < 0 or not 0 <= self.floor_ratio <= 1:
            raise ConfigError(
                "need schedule.warmup_tokens >= 0, schedule.decay_tokens >= 0 and 0 <= "
                "schedule.floor_ratio <= 1, got "
                f"{self.warmup_tokens}, {self.decay_tokens} and {self.floor_ratio}"
            )


@dataclass(kw_only=True)
class VerifyConfig:
    """What `llmtrain verify` runs, and what `llmtrain train` asks of the certificate that it writes."""

    ranks: int | None = None
    """Ranks of the run that is meant; null: parallel.world_size, else those of the launch."""
    max_ranks: int = 8
    """Most processes that `verify` starts; a larger layout is made smaller first."""
    num_steps: int = 3
    """Optimizer updates, at least 2: one to look at, one after a reload."""
    timeout_s: float = 300.0
    """How long the ranks may take together."""
    folder: str | None = None
    """Where certificate.json is written; null: run.folder."""
    certificate: str | None = None
    """The certificate.json that `train` looks at; null: the one in run.folder."""
    required: bool = False
    """Whether `train` refuses to start without a passing certificate for its config; else it warns."""

    def __post_init__(self) -> None:
        if (self.ranks is not None and self.ranks < 1) or self.max_ranks < 1 or self.timeout_s <= 0:
            raise ConfigError(
                f"verify.ranks={self.ranks} and verify.max_ranks={self.max_ranks} must be at least 1, and "
                f"verify.timeout_s={self.timeout_s} above 0"
            )
        if self.num_steps < 2:
            raise ConfigError(
                f"verify.num_steps={self.num_steps} must be at least 2: the last one follows a reload"
            )


@dataclass(kw_only=True)
class TrainRoot:
    """Everything `llmtrain train` can be told. conf/train.yaml says what of it differs from the defaults."""

    run: RunConfig
    data: LoaderConfig
    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    check_only: bool = False
    """Find every mistake that can be found without ranks, say them all, and start nothing."""

    @property
    def batch_sizes(self) -> BatchSizes:
        """Rows of every step, as a function of its position."""
        ramp = [(-(-stage.until_tokens // self.data.seq_len), stage.rows) for stage in self.train.batch_ramp]
        return BatchSizes.of(ramp, self.train.global_batch_rows)

    @property
    def total_rows(self) -> int:
        """Rows of an uninterrupted run, whole steps."""
        return self.batch_sizes.walk(0, self.wanted_rows)[1]

    @property
    def total_steps(self) -> int:
        """Optimizer updates of an uninterrupted run."""
        return self.batch_sizes.walk(0, self.wanted_rows)[0]

    @property
    def wanted_rows(self) -> int:
        """Rows at which the run is over; the step that reaches them is finished."""
        return -(-self.train.total_tokens // self.data.seq_len)
