"""Batch size, peak learning rate and warm-up for a model of N parameters and a run of D tokens, from
published sweeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.planner.laws import FittedRange

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
FLOOR_RATIO = 0.1
"""Cosine to a tenth of the peak (Hoffmann et al. 2022, arXiv:2203.15556, section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one source proposes."""

    peak_lr: float
    batch_tokens: float


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


def step_law(*, num_non_embedding_params: float, num_tokens: float) -> Rates:
    """lr = 1.79 N^-0.713 D^0.307 and B = 0.58 D^0.571 tokens (Li et al. 2025, equation 1)."""
    return Rates(
        peak_lr=1.79 * num_non_embedding_params**-0.713 * num_tokens**0.307,
        batch_tokens=0.58 * num_tokens**0.571,
    )


def deepseek(*, flops: float) -> Rates:
    """lr = 0.3118 C^-0.1250 and B = 0.2920 C^0.3271 tokens (DeepSeek-AI 2024, equation 1)."""
    return Rates(peak_lr=0.3118 * flops**-0.1250, batch_tokens=0.2920 * flops**0.3271)


def choose_recipe(
    *,
    num_params: int,
    num_non_embedding_params: int,
    num_tokens: float,
    flops: float,
    seq_len: int,
    num_ranks: int,
) -> Recipe:
    """Return the recipe for about `num_tokens` tokens in rows of `seq_len` on `num_ranks` ranks.

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

    rows = _batch_rows(ours.batch_tokens, seq_len=seq_len, num_ranks=num_ranks)
    num_steps = max(1, round(num_tokens / (rows * seq_len)))
    total_tokens = num_steps * rows * seq_len
    return Recipe(
        peak_lr=float(f"{peak_lr:.3g}"),
        global_batch_rows=rows,
        micro_batch_rows=_micro_batch_rows(rows // num_ranks, seq_len=seq_len),
        num_steps=num_steps,
        total_tokens=total_tokens,
        warmup_tokens=min(num_params, int(total_tokens * WARMUP_SHARE_LIMIT)),
        step_law=ours,
        step_law_decades_outside=outside,
        deepseek=theirs,
        deepseek_decades_outside=_flops_decades(flops),
        peak_lr_reason=reason,
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
