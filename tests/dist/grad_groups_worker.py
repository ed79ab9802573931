"""One rank of test_grad_groups: two steps in every layout asked for, measured, and one that is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cases import run_cases
from engine_worker import OPTIMIZER, SEED, batch_of, build, rows_of

from llmtrain.train.engine import Judge
from llmtrain.train.placement import fresh_weights

STEPS = 2
"""Measured; the first makes the optimizer's state."""


def run(case: dict[str, Any]) -> dict[str, Any]:
    """By step the whole norm, norms by group and this rank's memory; then of a step that nobody asked to
    measure, of one that is withheld, and of one whose loss is not finite."""
    micro_rows = case["micro"]
    engine = build(case)
    engine.load(fresh_weights(engine.placement, seed=SEED))
    if engine.loss_scale is not None:
        engine.loss_scale = 256.0  # nothing overflows
    dp = engine.placement.groups.dp

    def take(step: int, *, measure: bool, judge: Judge | None = None) -> Any:
        share = rows_of(step) // dp.size
        firsts = range(dp.rank * share, (dp.rank + 1) * share, micro_rows)
        batches = [batch_of(step, first, first + micro_rows) for first in firsts]
        return engine.train_step(batches, lr=OPTIMIZER.peak_lr, judge=judge, measure=measure)

    measured = [take(step, measure=True) for step in range(STEPS)]
    asked_for_nothing = take(STEPS, measure=False)
    withheld = take(STEPS + 1, measure=True, judge=lambda loss, norm: False)
    with torch.no_grad():
        for weight in engine._parameters.values():  # type: ignore[attr-defined]
            weight.data.fill_(np.nan)
    broken = take(STEPS + 1, measure=True)
    return {
        "grad_norm": [each.grad_norm for each in measured],
        "grad_norms": [each.grad_norms for each in measured],
        "memory": [vars(each.memory) for each in measured],
        "unmeasured": [asked_for_nothing.grad_norms, asked_for_nothing.memory],
        "withheld": [withheld.grad_norm, withheld.grad_norms, withheld.is_withheld],
        "broken": broken.grad_norms,
    }


if __name__ == "__main__":
    run_cases(run)
