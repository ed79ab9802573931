"""A small run over poisoned data, once for each thing that may be done about a spike."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_folder import VOCAB_SIZE

from llmtrain.loader.batches import to_batch
from llmtrain.loader.config import LoaderConfig, Verify
from llmtrain.loader.open import OpenData, open_data
from llmtrain.loader.skipped import PassedOver, SkippedWindow
from llmtrain.model.config import ModelConfig
from llmtrain.parallel.config import EngineKind, ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.engine import Engine
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks
from llmtrain.train.spike_config import SpikeAction, SpikeConfig
from llmtrain.train.spikes import SpikeWatch, Verdict

SEQ_LEN, ROWS, STEPS, SAVE_STEPS, SEED = 32, 8, 70, 10, 0
POISONED_STEP = 47
WINDOW = ((POISONED_STEP - 1) * ROWS, POISONED_STEP * ROWS - 1)
MODEL = ModelConfig(
    vocab_size=VOCAB_SIZE, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=64
)


def open_model() -> Engine:
    groups = build_groups(Topology.of_world(1, pp_size=1, cp_size=1, tp_size=1))
    placement = place(MODEL, ParallelConfig(engine=EngineKind.accelerate), groups, seq_len=SEQ_LEN, seed=SEED)
    train = TrainConfig(total_tokens=1, global_batch_rows=ROWS, micro_batch_rows=ROWS)
    engine = open_engine(
        placement, device=torch.device("cpu"), train=train, optimizer=OptimizerConfig(peak_lr=0.01)
    )
    engine.load(fresh_weights(placement, seed=SEED))
    return engine


def saved(engine: Engine) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    return {(piece.kind, piece.name): np.array(piece.values, copy=True) for piece in engine.pieces()}


def run(data: OpenData, action: SpikeAction, passed: PassedOver) -> dict[str, Any]:
    """Train to the end as a loop would, with `passed` passed over from the beginning."""
    engine = open_model()
    cfg = SpikeConfig(on_spike=action, window_steps=32, warmup_steps=16)
    watch, windows = (
        SpikeWatch(cfg),
        [SkippedWindow(first=a, last=b, step=0, attempt=0, reason="") for a, b in passed.ranges],
    )
    step, position, verdicts, losses = 0, 0, [], {}
    checkpoint: dict[str, Any] = {}
    while (position := passed.next_position(position)) < STEPS * ROWS:
        rows = passed.positions(position, ROWS)
        first, last = int(rows[0]), int(rows[-1])
        numbers = data.order.rows_at(rows)
        batch = to_batch(data.train.read_many(numbers), numbers)
        judged: list[Verdict] = []
        about = {"step": step + 1, "first": first, "last": last}
        result = engine.train_step([batch], lr=0.01, judge=partial(_judge, watch, judged, about))
        [verdict] = judged
        if verdict.action is not SpikeAction.ignore:
            verdicts.append([step + 1, first, verdict.action.name, verdict.quantity, result.is_withheld])
        if verdict.action is SpikeAction.rollback:
            windows.append(_window(verdict.skip_first, verdict.skip_last, step + 1))
            passed = PassedOver.of_windows(windows)
            step, position, state = checkpoint["step"], checkpoint["position"], checkpoint["state"]

            def source(kind: str, name: str, start: int, into: Any) -> None:
                into[:] = state[kind, name][start : start + into.size]  # noqa: B023

            engine.load(source, num_optimizer_steps=checkpoint["updates"])
            watch = SpikeWatch.from_state(cfg, checkpoint["watch"], windows)
            continue
        step, position = step + 1, last + 1
        losses[first] = result.loss
        if step % SAVE_STEPS == 0:
            checkpoint = {"step": step, "position": position, "state": saved(engine)}
            checkpoint |= {"watch": watch.state(), "updates": engine.num_optimizer_steps}
    held_out = [np.arange(at, at + 4) for at in range(0, data.held_out.num_rows - 3, 4)]
    sums = engine.held_out_sums(to_batch(data.held_out.read_many(at), at) for at in held_out)
    return {
        "verdicts": verdicts,
        "losses": losses,
        "held_out": sums[0] / sums[1],
        "weights": float(
            sum(values.sum() for (kind, _), values in saved(engine).items() if kind == "weight")
        ),
        "steps": step,
    }


def _judge(
    watch: SpikeWatch, judged: list[Verdict], about: dict[str, int], loss: float, grad_norm: float
) -> bool:
    judged.append(watch.judge(**about, loss=loss, grad_norm=grad_norm))
    return judged[-1].updates


def _window(first: int, last: int, step: int = 0) -> SkippedWindow:
    return SkippedWindow(first=first, last=last, step=step, attempt=1, reason="")


def main(clean: Path, poisoned: Path) -> dict[str, Any]:
    opened = {
        folder: open_data(
            LoaderConfig(folder=str(folder), seq_len=SEQ_LEN, verify=Verify.none, max_epochs=99), seed=SEED
        )
        for folder in (clean, poisoned)
    }
    assert opened[clean].hash == opened[poisoned].hash, "the same rows at the same positions"
    told = {
        "clean": run(opened[clean], SpikeAction.skip, PassedOver()),
        "clean without": run(opened[clean], SpikeAction.ignore, PassedOver.of([WINDOW])),
        "poisoned without": run(opened[poisoned], SpikeAction.ignore, PassedOver.of([WINDOW])),
    }
    for action in (SpikeAction.ignore, SpikeAction.skip, SpikeAction.rollback):
        told[action.name] = run(opened[poisoned], action, PassedOver())
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_ranks(timeout_s=60)
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
