"""One rank of test_withheld: a run that withholds steps, one that goes back behind them in the same process,
and one that never saw their batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import run_cases
from engine_worker import OPTIMIZER, ROWS, SEED, batch_of, build

from llmtrain.model.block import Block
from llmtrain.train.engine import Engine, Judge
from llmtrain.train.placement import fresh_weights

STEPS = 5
BLOWN_UP = {"none": 1.0, "gradient": math.inf, "loss": math.nan}


def blow_up(module: torch.nn.Module, factor: float, *, gradient_only: bool) -> list[Any]:
    """Multiply what the first block that is here gives, or the gradient that comes back to it."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not gradient_only:
            return output * factor
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)
        return None

    block = next(each for each in module.modules() if isinstance(each, Block))
    return [block.register_forward_hook(hook)]


def module_of(engine: Any) -> torch.nn.Module:
    found: torch.nn.Module = engine._model if hasattr(engine, "_model") else engine._engine.module
    return found


def take_step(engine: Engine, step: int, micro_rows: int, judge: Judge | None) -> Any:
    dp = engine.placement.groups.dp
    share = ROWS // dp.size
    first = dp.rank * share
    batches = [batch_of(step, at, at + micro_rows) for at in range(first, first + share, micro_rows)]
    return engine.train_step(batches, lr=OPTIMIZER.peak_lr, judge=judge)


def state_of(engine: Engine) -> dict[str, Any]:
    found = {
        f"{piece.kind} {piece.name} {piece.start}": np.array(piece.values, copy=True)
        for piece in engine.pieces()
    }
    scaler = None if engine.loss_scale is None else dict(vars(engine._optimizer.loss_scaler))  # type: ignore[attr-defined]
    return {"pieces": found, "scaler": scaler, "updates": engine.num_optimizer_steps}


def whole_state(engine: Engine) -> dict[tuple[str, str], Any]:
    """(kind, name) -> every element, put together from all ranks' pieces."""
    gathered: list[Any] = [None] * dist.get_world_size()
    mine = [(piece.kind, piece.name, piece.start, np.array(piece.values)) for piece in engine.pieces()]
    dist.all_gather_object(gathered, mine)
    found: dict[tuple[str, str], Any] = {}
    for kind, name, start, values in (piece for pieces in gathered for piece in pieces):
        numel = math.prod(engine.placement.shapes[name])
        found.setdefault((kind, name), np.full(numel, np.nan, np.float32))[start : start + len(values)] = (
            values
        )
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    a, b = one["pieces"], other["pieces"]
    return (
        a.keys() == b.keys()
        and all(np.array_equal(a[name], b[name]) for name in a)
        and (one["scaler"], one["updates"]) == (other["scaler"], other["updates"])
    )


def run(case: dict[str, Any]) -> dict[str, Any]:
    case = dict(case)
    withheld: Sequence[int] = case.pop("withheld", [2])
    blown: str = case.pop("blown", "none")
    micro_rows = case["micro"]
    engine = build(case)
    engine.load(fresh_weights(engine.placement, seed=SEED))
    asked: list[list[float]] = []
    results, unchanged = [], []
    saved: dict[tuple[str, str], Any] = {}
    for step in range(STEPS):
        before = state_of(engine)
        if step == withheld[0]:
            saved, num_updates, scale = whole_state(engine), engine.num_optimizer_steps, engine.loss_scale

        def judge(loss: float, norm: float, step: int = step) -> bool:
            asked.append([loss, norm])
            return step not in withheld

        hooks = []
        if step in withheld and blown != "none":
            hooks = blow_up(module_of(engine), BLOWN_UP[blown], gradient_only=blown == "gradient")
        results.append(take_step(engine, step, micro_rows, judge))
        for hook in hooks:
            hook.remove()
        unchanged.append(equal(before, state_of(engine)))
    told = state_of(engine)

    def source(kind: str, name: str, start: int, into: Any) -> None:
        into[:] = saved[kind, name][start : start + into.size]

    engine.load(source, num_optimizer_steps=num_updates)
    if scale is not None:
        engine.loss_scale = scale
    for step in range(withheld[0], STEPS):
        if step not in withheld:
            take_step(engine, step, micro_rows, None)
    after_going_back = state_of(engine) | {"scaler": told["scaler"]}  # whose counts no checkpoint keeps
    engine = build(case)
    engine.load(fresh_weights(engine.placement, seed=SEED))
    alone = [take_step(engine, step, micro_rows, None) for step in range(STEPS) if step not in withheld]
    return {
        "asked": asked,
        "told": [[each.loss, each.grad_norm] for each in results],
        "withheld": [each.is_withheld for each in results],
        "skipped": [each.is_skipped for each in results],
        "unchanged": unchanged,
        "ends_alike": equal(told, state_of(engine)),
        "ends_alike_after_going_back": equal(told, after_going_back),
        "num_pieces": len(told["pieces"]),
        "losses": [each.loss for step, each in enumerate(results) if step not in withheld],
        "losses_alone": [each.loss for each in alone],
        "withheld_alone": [each.is_withheld for each in alone],
    }


if __name__ == "__main__":
    run_cases(run)
