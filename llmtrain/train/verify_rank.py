"""One rank of `llmtrain verify`: some steps of a small config on its real layout, and all numbers to a file.

    python -m llmtrain.train.verify_rank FOLDER

FOLDER holds what `train/verify.py` put there: the cases to run, one after another. What both sides must
agree on, rows and initial weights, is here too: functions of names, no ranks in them.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from llmtrain import rng
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import FlatSource
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.write import Ranks, save_checkpoint
from llmtrain.loader.batches import Batch, to_batch
from llmtrain.loader.dataset import NO_TARGET, Row
from llmtrain.model.config import ModelConfig
from llmtrain.model.init import initial_weight
from llmtrain.parallel.config import EngineKind
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.parent import end_with_parent
from llmtrain.train.config import TrainRoot
from llmtrain.train.engine import Engine, StepResult
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import Placement, place
from llmtrain.train.ranks import join_ranks

CASES_FILE = "cases.pickle"
RATES = (1e-2, 4e-3, 2e-2)
"""Learning rates of the steps, in turn."""
NUM_HELD_OUT = 2
"""Batches of each data-parallel rank; the last rank's last is masked as a whole."""

Values = NDArray[np.float32]


# -- what ranks and the reference agree on


def rate_of(step: int) -> float:
    return RATES[step % len(RATES)]


def start_weight(name: str, numel: int, model: ModelConfig) -> Values:
    """The flattened weight that a check begins with: the initial one, but norms and biases differ from
    element to element, too: a wrong slice of equal numbers would not show."""
    values = initial_weight(name, numel, model, 0)
    if name.endswith(("norm.weight", ".bias")):
        values += 0.1 * rng.stream(0, "verify", "weight", name).standard_normal(numel, dtype=np.float32)
    return values


def rows_of_step(cfg: TrainRoot, step: int) -> range:
    """Row numbers of a step: they go on where the step before ended."""
    position = 0
    for _ in range(step):
        position += cfg.batch_sizes.rows_at(position)
    return range(position, position + cfg.batch_sizes.rows_at(position))


def held_out_rows(cfg: TrainRoot, dp_rank: int, number: int) -> range:
    first = 10**6 + (dp_rank * NUM_HELD_OUT + number) * cfg.train.micro_batch_rows
    return range(first, first + cfg.train.micro_batch_rows)


def held_out_batch(cfg: TrainRoot, dp_rank: int, number: int, *, dp_size: int) -> Batch:
    is_masked = dp_size > 1 and (dp_rank, number) == (dp_size - 1, NUM_HELD_OUT - 1)
    return random_batch(cfg, held_out_rows(cfg, dp_rank, number), is_masked=is_masked)


def step_batch(cfg: TrainRoot, rows: range) -> Batch:
    """Rows with their places in the run, by which dropout goes."""
    return replace(random_batch(cfg, rows), places=np.array(rows, dtype=np.int64))


def random_batch(cfg: TrainRoot, rows: range, *, is_masked: bool = False) -> Batch:
    """Random tokens, up to three documents a row, and very uneven numbers of targets; one row of seven has
    none."""
    length = cfg.data.seq_len
    tokens, targets, positions, segments = [], [], [], []
    for number in rows:
        random = rng.stream(0, "verify", "row", number)
        text = random.integers(0, cfg.model.vocab_size, length + 1)
        starts = np.sort(random.choice(np.arange(1, length), min(2, length - 1), replace=False))
        segment = np.searchsorted(starts, np.arange(length), side="right")
        own_targets = text[1:].copy()
        own_targets[starts - 1] = NO_TARGET  # a document's last token predicts nothing
        own_targets[int(random.integers(length // 3, length + 1)) :] = NO_TARGET
        if is_masked or number % 7 == 3:
            own_targets[:] = NO_TARGET
        tokens.append(text[:-1])
        targets.append(own_targets)
        segments.append(segment.astype(np.int32))
        positions.append(np.arange(length) - np.concatenate([[0], starts])[segment])
    block = Row(*(np.stack(part) for part in (tokens, targets, positions, segments)))
    return to_batch(block, np.array(rows))


# -- what is run


@dataclass(frozen=True)
class Case:
    """A config that runs as it is."""

    cfg: TrainRoot
    num_steps: int


@dataclass(frozen=True)
class Told:
    """What one rank found, as it lies in its files."""

    losses: list[float]
    grad_norms: list[float]
    held_out: tuple[float, int]
    reloaded: tuple[float, float]
    """Loss and norm of the last step, taken again after a reload."""
    reload_differs: list[str]
    """`kind name` of what a reload did not bring back to the last bit."""
    reload_step: tuple[float, str]
    """Largest deviation that the step after a reload made, of the largest element, and of which `kind
    name`."""
    after_first: dict[tuple[str, str, int], Values]
    """(kind, name, start) -> piece, after the first update."""
    at_end: dict[tuple[str, str, int], Values]
    """Weights after the last update."""
    copies: dict[tuple[str, str, int], Values]
    """The weights that this rank computes with, after the last update: all of them, copies too."""
    seconds: float


def main(
    arguments: list[str] | None = None, *, around: Callable[[str], AbstractContextManager[Any]] | None = None
) -> None:
    """Run every case of the folder.

    Args:
        around: entered with a case's name while it runs: tests plant faults here.
    """
    end_with_parent()
    folder = Path((sys.argv[1:] if arguments is None else arguments)[0])
    cases: dict[str, Case] = pickle.loads((folder / CASES_FILE).read_bytes())
    timeout_s = max(case.cfg.verify.timeout_s for case in cases.values())
    device = join_ranks(timeout_s=timeout_s)
    for name, case in cases.items():
        with (around or _as_it_is)(name):
            told = run_case(case, folder / name, device=device)
        _write(folder / name / f"rank-{dist.get_rank()}", told)
    dist.barrier()  # nobody leaves while another still saves
    dist.destroy_process_group()


def run_case(case: Case, folder: Path, *, device: torch.device) -> Told:
    """Train, save before the last step, take it, and take it again from the checkpoint. Every rank calls
    this."""
    start = time.monotonic()
    cfg, last = case.cfg, case.num_steps - 1
    parallel = cfg.parallel
    sizes = {"pp_size": parallel.pp_size, "cp_size": parallel.cp_size, "tp_size": parallel.tp_size}
    groups = build_groups(Topology.of_world(dist.get_world_size(), **sizes))
    placement = place(cfg.model, parallel, groups, seq_len=cfg.data.seq_len, seed=cfg.run.seed)
    engine = open_engine(placement, device=device, train=cfg.train, optimizer=cfg.optimizer)
    engine.load(_start_source(placement))
    results, after_first = [], {}
    for step in range(last):
        results.append(_train_step(cfg, engine, step))
        if step == 0:
            after_first = _pieces(engine)
    before = _pieces(engine)
    path = save_checkpoint(
        folder / "checkpoints",
        step=last,
        pieces=engine.pieces(),
        state={"num_optimizer_steps": engine.num_optimizer_steps},
        ranks=Ranks(dist.get_rank(), dist.get_world_size(), _gather),
        config=SaveConfig(keep_last=1),
    )
    results.append(_train_step(cfg, engine, last))
    at_end, copies = _pieces(engine), _computing_weights(engine)
    dp_rank, dp_size = groups.dp.rank, groups.dp.size
    held_out = engine.held_out_sums(
        held_out_batch(cfg, dp_rank, number, dp_size=dp_size) for number in range(NUM_HELD_OUT)
    )

    engine = open_engine(placement, device=device, train=cfg.train, optimizer=cfg.optimizer)
    reader = CheckpointReader(path)
    reader.require(placement.shapes, kinds=("weight",))
    engine.load(reader.read_into, num_optimizer_steps=reader.state["num_optimizer_steps"])
    differs = [what for deviation, what in _deviations(before, _pieces(engine)) if deviation != 0]
    again = _train_step(cfg, engine, last)
    nothing = (0.0, "nothing")  # of a rank that owns nothing
    return Told(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        held_out=held_out,
        reloaded=(again.loss, again.grad_norm),
        reload_differs=differs,
        reload_step=max(_deviations(at_end, _pieces(engine)), default=nothing),
        after_first=after_first,
        at_end={key: values for key, values in at_end.items() if key[0] == "weight"},
        copies=copies,
        seconds=time.monotonic() - start,
    )


def _train_step(cfg: TrainRoot, engine: Engine, step: int) -> StepResult:
    dp, at_once = engine.placement.groups.dp, cfg.train.micro_batch_rows
    rows = rows_of_step(cfg, step)
    own = rows[len(rows) * dp.rank // dp.size : len(rows) * (dp.rank + 1) // dp.size]
    batches = [step_batch(cfg, own[first : first + at_once]) for first in range(0, len(own), at_once)]
    return engine.train_step(batches, lr=rate_of(step))


def _start_source(placement: Placement) -> FlatSource:
    def source(kind: str, name: str, start: int, into: Values) -> None:
        assert kind == "weight", f"nobody asks for {kind} at the start"
        whole = start_weight(name, math.prod(placement.shapes[name]), placement.model)
        into[:] = whole[start : start + into.size]

    return source


def _pieces(engine: Engine) -> dict[tuple[str, str, int], Values]:
    return {(piece.kind, piece.name, piece.start): np.array(piece.values) for piece in engine.pieces()}


def _computing_weights(engine: Engine) -> dict[tuple[str, str, int], Values]:
    """What the forward pass reads, where a rank holds it whole; else this rank's share."""
    inside = cast(Any, engine)  # no other part of the program looks at copies that nobody answers for
    parallel = engine.placement.parallel
    if parallel.zero_stage == 3 or (parallel.zero_stage == 2 and parallel.engine is EngineKind.accelerate):
        held: Iterator[tuple[str, int, torch.Tensor]] = inside._fragments("weight")
    else:
        held = (
            (name, engine.placement.offset(name), weight.detach().flatten())
            for name, weight in inside._parameters.items()
        )
    return {("weight", name, start): values.float().cpu().numpy().copy() for name, start, values in held}


def _deviations(
    expected: dict[tuple[str, str, int], Values], found: dict[tuple[str, str, int], Values]
) -> list[tuple[float, str]]:
    """Of every piece the largest deviation, of its largest element, with its `kind name`; infinite for a NaN
    and for a piece that is on one side only."""
    told = []
    for key in dict.fromkeys([*expected, *found]):
        deviation = math.inf
        if key in expected and key in found and expected[key].shape == found[key].shape:
            largest = float(np.abs(found[key] - expected[key]).max(initial=0.0))
            scale = float(np.abs(expected[key]).max(initial=0.0)) or 1.0
            deviation = largest / scale if math.isfinite(largest) else math.inf
        told.append((deviation, f"{key[0]} {key[1]}"))
    return told


# -- files


def _write(stem: Path, told: Told) -> None:
    numbers = {key: value for key, value in vars(told).items() if not isinstance(value, dict)}
    stem.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "|".join((field, kind, name, str(start))): values
        for field in ("after_first", "at_end", "copies")
        for (kind, name, start), values in getattr(told, field).items()
    }
    with open(stem.with_suffix(".npz"), "wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)
    stem.with_suffix(".json").write_text(json.dumps(numbers))


def read_told(folder: Path, rank: int) -> Told:
    """What a rank wrote of a case."""
    numbers = json.loads((folder / f"rank-{rank}.json").read_text())
    arrays: dict[str, dict[tuple[str, str, int], Values]] = {"after_first": {}, "at_end": {}, "copies": {}}
    with np.load(folder / f"rank-{rank}.npz", allow_pickle=False) as stored:
        for key in stored.files:
            field, kind, name, start = key.split("|")
            arrays[field][kind, name, int(start)] = stored[key]
    fields: dict[str, Any] = {**numbers, **arrays}
    return Told(**fields)


# -- the process


def _as_it_is(_name: str) -> AbstractContextManager[Any]:
    return nullcontext()


def _gather(value: object) -> list[object]:
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


if __name__ == "__main__":
    main()
