"""What a plan is made from: a budget, a model's or a data set's limits, and how to choose. stdlib only.

Quantities are text, read by planner/units.py: 7B, 1.5e21, 300B, 14d, 20k.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner import units

COMPUTE_BUDGETS = {
    "flops": units.FLOPS,
    "gpu_hours": units.HOURS,
    "usd": units.MONEY,
    "days": units.DURATION,
}
PRECISIONS = ("bf16", "fp16", "fp32")
LONGEST_ROWS = 1 << 24


@dataclass(kw_only=True)
class BudgetConfig:
    """How much there is to spend: at most one of flops, gpu_hours, usd and days, and tokens beside it or
    alone."""

    flops: str | None = None
    """Training FLOPs of the model itself (forward and backward, no recomputation), as in 1.5e21."""
    gpu_hours: str | None = None
    """Hours summed over devices, as clouds bill them: 8 GPUs for 2 hours are 16. As in 20k."""
    usd: str | None = None
    """Dollars; wants cluster.price_usd_per_gpu_hour. As in 50k."""
    days: str | None = None
    """Days that the whole cluster runs; with a unit any duration, as in 14d or 36h."""
    tokens: str | None = None
    """Tokens of the run: with a compute budget the model takes what they leave; alone, the law's model for
    them. As in 300B."""

    @property
    def compute(self) -> tuple[str, float] | None:
        """The compute budget's name and its value in FLOPs, hours, dollars or seconds; None without one."""
        for name, kind in COMPUTE_BUDGETS.items():
            if (given := getattr(self, name)) is not None:
                in_days = name == "days" and _is_number(given)
                text = f"{given}d" if in_days else given
                return name, units.parse_quantity(text, kind, name=f"budget.{name}")
        return None

    @property
    def num_tokens(self) -> float | None:
        return (
            None
            if self.tokens is None
            else units.parse_quantity(self.tokens, units.TOKENS, name="budget.tokens")
        )

    def __post_init__(self) -> None:
        given = {
            f"budget.{name}": getattr(self, name)
            for name in COMPUTE_BUDGETS
            if getattr(self, name) is not None
        }
        if len(given) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigError(
                "give at most one of budget.flops, budget.gpu_hours, budget.usd and budget.days; got "
                f"{listed}"
            )
        _ = self.compute, self.num_tokens  # parsed once, so that a mistake shows here


@dataclass(kw_only=True)
class ModelWishConfig:
    """What the plan must not choose about the model."""

    params: str | None = None
    """Parameters, embeddings included, as in 7B; null: the law's."""
    vocab_size: int = 8192
    """Rows of the embedding: the tokenizer's vocabulary. Rounded up to a multiple of 128 from 4,096 on."""

    @property
    def num_params(self) -> float | None:
        return (
            None
            if self.params is None
            else units.parse_quantity(self.params, units.PARAMS, name="model.params")
        )

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(f"model.vocab_size={self.vocab_size} must be at least 2")
        _ = self.num_params


@dataclass(kw_only=True)
class DataWishConfig:
    """What the run reads."""

    seq_len: int = 512
    """Tokens a row. The data folder must hold a pack of this length when the plan is trained."""
    unique_tokens: str | None = None
    """Tokens of the text there is, as in 120B; null: those of `folder`, or no limit."""
    folder: str | None = None
    """A folder of `llmtrain data`: its training tokens are the unique ones."""

    def __post_init__(self) -> None:
        if not 2 <= self.seq_len <= LONGEST_ROWS:
            raise ConfigError(
                f"data.seq_len={self.seq_len} must be from 2 (a row needs a token and a target) to "
                f"{LONGEST_ROWS:,}"
            )
        if self.unique_tokens is not None and self.folder is not None:
            raise ConfigError(
                f"data.unique_tokens={self.unique_tokens} and data.folder={self.folder} both say how much "
                "text there is; give one"
            )
        if self.unique_tokens is not None:
            units.parse_quantity(self.unique_tokens, units.TOKENS, name="data.unique_tokens")


@dataclass(kw_only=True)
class InferenceConfig:
    """What the model is for."""

    tokens: str | None = None
    """Tokens that it will read and write once trained, as in 2T: a smaller model trained for longer may cost
    less in all. null: only training counts."""

    @property
    def num_tokens(self) -> float | None:
        if self.tokens is None:
            return None
        return units.parse_quantity(self.tokens, units.TOKENS, name="inference.tokens", may_be_zero=True)

    def __post_init__(self) -> None:
        _ = self.num_tokens


@dataclass(kw_only=True)
class ChoiceConfig:
    """How to choose."""

    law: str = "besiroglu"
    """Which law decides size against tokens, by name or the beginning of one; all are printed, and their
    band."""
    schedule: str = "cosine"
    """cosine, or wsd: a constant rate, then a short decay; it may be lengthened while it runs."""
    precision: str | None = None
    """bf16, fp16 or fp32; null: bf16 on GPUs, fp32 on a CPU."""
    program: str = "llmtrain"
    """Whose step time, memory and layouts: this package's, or another's to compare (megatron, torchtitan)."""
    calibration: str | None = None
    """A file of `llmtrain plan calibrate`, from runs on this cluster; null: published figures."""
    global_batch_tokens: str | None = None
    """Tokens a step; null: the Step Law's."""

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise ConfigError(unknown_name("plan.schedule", self.schedule, ("cosine", "wsd")))
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("plan.precision", self.precision, PRECISIONS))
        if self.global_batch_tokens is not None:
            units.parse_quantity(self.global_batch_tokens, units.TOKENS, name="plan.global_batch_tokens")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
