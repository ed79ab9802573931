"""Batch size, peak learning rate, warm-up and schedule lengths for a model of N parameters and a run of D
tokens, from published sweeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.loss.laws import FittedRange

STEP_LAW = "Step Law, Li et al. 2025, arXiv:2503.04715"
STEP_LAW_RANGE = FittedRange(num_params=(6e7, 1e9), num_tokens=(2e9, 1e11))
"""Non-embedding parameters and tokens of the dense runs (section 3.4.1 of version 7, as quoted by others).
The upper ends, 1e9 and 1e11, were kept out of the fit to test it."""
DEEPSEEK = "DeepSeek LLM, DeepSeek-AI 2024, arXiv:2401.02954"
DEEPSEEK_FLOPS = (1e17, 2e19)
"""Budgets of the runs behind DeepSeek's fit (section 3.1)."""

LARGEST_SWEPT_LR = 2.0**-7
"""Upper end of the Step Law's sweep; nothing is claimed above it, so nothing above it is proposed. The number
is recalled, not re-checked."""
WARMUP_SHARE_LIMIT = 0.1
"""Assumed, not measured: at most a tenth of the run warms up."""
MICRO_BATCH_TOKENS = 16_384
"""Assumed, not measured: tokens that one rank feeds to one forward pass; enough to keep its matrix products
large."""
LEAST_BATCH_ROWS = 8
"""Assumed, not measured: a batch of fewer rows would divide among few layouts."""
CBS_SEQUENCE = 512
CBS_RANGE = FittedRange(num_params=(8.5e7, 1.2e9), num_tokens=(1.7e9, 2.4e10))
"""Zhang et al. 2024, arXiv:2410.21676: 85M to 1.2B parameters on C4, 20 tokens each, rows of 512 tokens."""
CBS_OVERHEAD = 0.2
"""Extra tokens at the critical batch, by their definition (section 3.1)."""
WSD_DECAY_SHARE = 0.1
"""Of all tokens: 10% are enough at 40 and 80 tokens a parameter, 2.5% are not (Hu et al. 2024,
arXiv:2404.06395, section 4.3)."""
SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one source proposes."""

    peak_lr: float
    batch_tokens: float


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """Where a larger batch begins to cost tokens."""

    tokens: float
    """Critical batch, in tokens."""
    by_params: float
    """The same from N, on the line of 20 tokens a parameter alone."""
    decades_outside: float

    def extra_tokens(self, batch_tokens: float) -> float:
        """Share of tokens that a batch costs over a small one, for the same loss: 0.2 at the critical batch,
        and in proportion, as steps = a + b / batch gives."""
        return CBS_OVERHEAD * batch_tokens / self.tokens


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A schedule in tokens; the parts add up to the run."""

    kind: str
    """cosine or wsd."""
    warmup_tokens: int
    stable_tokens: int
    decay_tokens: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    peak_lr: float
    global_batch_rows: int
    micro_batch_rows: int
    num_steps: int
    total_tokens: int
    """num_steps whole batches."""
    warmup_tokens: int
    step_law: Rates
    step_law_decades_outside: float
    deepseek: Rates
    deepseek_decades_outside: float
    peak_lr_reason: str
    critical_batch: CriticalBatch
    cosine: Lengths
    wsd: Lengths


def step_law(*, num_non_embedding_params: float, num_tokens: float) -> Rates:
    """lr = 1.79 N^-0.713 D^0.307 and B = 0.58 D^0.571 tokens (Li et al. 2025, equation 1)."""
    return Rates(
        peak_lr=1.79 * num_non_embedding_params**-0.713 * num_tokens**0.307,
        batch_tokens=0.58 * num_tokens**0.571,
    )


def deepseek(*, flops: float) -> Rates:
    """lr = 0.3118 C^-0.1250 and B = 0.2920 C^0.3271 tokens (DeepSeek-AI 2024, equation 1)."""
    return Rates(peak_lr=0.3118 * flops**-0.1250, batch_tokens=0.2920 * flops**0.3271)


def critical_batch(*, num_params: float, num_tokens: float) -> CriticalBatch:
    """B* = 22.91 D^0.47 and 93.20 N^0.47 rows of 512 tokens, N and D in millions (Zhang et al. 2024,
    arXiv:2410.21676).

    It grows with the tokens, and hardly with the model: at fixed D they find 621.341 N^0.087. 22.91 and 0.47
    of D are recalled, not re-checked, and the text does not say the units; these are the ones in which the
    three formulas agree where their runs meet (151M parameters on 3.07B tokens: 985, 997 and 961 rows).
    """
    return CriticalBatch(
        tokens=22.91 * (num_tokens / 1e6) ** 0.47 * CBS_SEQUENCE,
        by_params=93.20 * (num_params / 1e6) ** 0.47 * CBS_SEQUENCE,
        decades_outside=CBS_RANGE.decades_outside(num_params, num_tokens),
    )


def schedule_lengths(kind: str, *, total_tokens: int, warmup_tokens: int) -> Lengths:
    """Return the parts of a schedule that ends with the run.

    A cosine must end where the run ends: one that is 25% too long costs loss (Hoffmann et al. 2022,
    arXiv:2203.15556, appendix B). A wsd run may be lengthened before its decay begins.

    Raises:
        ConfigError: an unknown kind, or a warm-up longer than the run.
    """
    if kind not in SCHEDULES:
        raise ConfigError(unknown_name("schedule", kind, SCHEDULES))
    if not 0 <= warmup_tokens <= total_tokens:
        raise ConfigError(f"a warm-up of {warmup_tokens} tokens in a run of {total_tokens}; shorten it")
    decay = total_tokens - warmup_tokens
    if kind == "wsd":
        decay = min(decay, round(total_tokens * WSD_DECAY_SHARE))
    return Lengths(
        kind=kind,
        warmup_tokens=warmup_tokens,
        stable_tokens=total_tokens - warmup_tokens - decay,
        decay_tokens=decay,
    )


def choose_recipe(
    *,
    num_params: int,
    num_non_embedding_params: int,
    num_tokens: float,
    flops: float,
    seq_len: int,
    num_ranks: int = 1,
    batch_rows: int | None = None,
) -> Recipe:
    """Return the recipe for about `num_tokens` tokens in rows of `seq_len`, in batches of `batch_rows`; None:
    of the Step Law's, for `num_ranks` ranks.

    The Step Law decides. Outside the runs it was fitted to, the lower of both learning rates is taken, never
    one above the sweep. Warm-up is as many tokens as the model has parameters, as in the run configurations
    behind Porian et al. 2024 (arXiv:2406.19146): 5,173,248 tokens for 5,175,744 parameters. It is at most a
    tenth of the run (theirs: a sixth).
    """
    ours = step_law(num_non_embedding_params=num_non_embedding_params, num_tokens=num_tokens)
    theirs = deepseek(flops=flops)
    outside = STEP_LAW_RANGE.decades_outside(num_non_embedding_params, num_tokens)
    if outside == 0:
        peak_lr, reason = ours.peak_lr, "Step Law, inside its runs"
    else:
        peak_lr = min(ours.peak_lr, theirs.peak_lr)
        name = "Step Law" if ours.peak_lr <= theirs.peak_lr else "DeepSeek"
        reason = f"{name}, the lower of both: {outside:.1f} decades outside the Step Law's runs"
    if peak_lr > LARGEST_SWEPT_LR:
        peak_lr, reason = LARGEST_SWEPT_LR, "upper end of the Step Law's sweep: both laws ask for more"

    rows = batch_rows or _batch_rows(ours.batch_tokens, seq_len=seq_len, num_ranks=num_ranks)
    num_steps = max(1, round(num_tokens / (rows * seq_len)))
    total_tokens = num_steps * rows * seq_len
    warmup_tokens = min(num_params, int(total_tokens * WARMUP_SHARE_LIMIT))
    return Recipe(
        peak_lr=float(f"{peak_lr:.3g}"),
        global_batch_rows=rows,
        micro_batch_rows=_micro_batch_rows(rows // num_ranks, seq_len=seq_len),
        num_steps=num_steps,
        total_tokens=total_tokens,
        warmup_tokens=warmup_tokens,
        step_law=ours,
        step_law_decades_outside=outside,
        deepseek=theirs,
        deepseek_decades_outside=_flops_decades(flops),
        peak_lr_reason=reason,
        critical_batch=critical_batch(num_params=num_params, num_tokens=total_tokens),
        cosine=schedule_lengths("cosine", total_tokens=total_tokens, warmup_tokens=warmup_tokens),
        wsd=schedule_lengths("wsd", total_tokens=total_tokens, warmup_tokens=warmup_tokens),
    )


def _batch_rows(batch_tokens: float, *, seq_len: int, num_ranks: int) -> int:
    """The nearest number of rows that is a multiple of `num_ranks`, and of LEAST_BATCH_ROWS."""
    multiple = math.lcm(num_ranks, LEAST_BATCH_ROWS)
    return max(1, round(batch_tokens / (seq_len * multiple))) * multiple


def _micro_batch_rows(rows_per_rank: int, *, seq_len: int) -> int:
    """The largest divisor of `rows_per_rank` that stays within MICRO_BATCH_TOKENS; 1 when even one row does
    not."""
    limit = max(1, MICRO_BATCH_TOKENS // seq_len)
    return max(rows for rows in range(1, min(limit, rows_per_rank) + 1) if rows_per_rank % rows == 0)


def _flops_decades(flops: float) -> float:
    low, high = DEEPSEEK_FLOPS
    return max(0.0, math.log10(low / flops), math.log10(flops / high))
