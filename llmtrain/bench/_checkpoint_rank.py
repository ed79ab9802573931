"""One rank of `bench checkpoints`: an engine's whole state saved and loaded by us, and by what is its own.

DeepSpeed at ZeRO-1 with its save_checkpoint and load_checkpoint; FSDP2 with torch.distributed.checkpoint.
Each is as it is by default. Ours flushes to the disk, hashes and reads back; its load is that of a resume:
every byte compared with its hash, then each rank's ranges read. Before each load a step changes the state,
and afterwards it is compared with what was saved: a load that does nothing is no fast one.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from llmtrain.bench._layout_rank import a_batch
from llmtrain.bench.shapes import DEMO, MODEL_300M
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.write import Ranks
from llmtrain.errors import LLMTrainError
from llmtrain.parallel.config import EngineKind, ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.engines import open_engine
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.ranks import join_ranks
from llmtrain.train.state import CountedSource

KINDS = {"deepspeed": (EngineKind.deepspeed, 1), "dcp": (EngineKind.accelerate, 3)}
"""Rival -> the engine that saves with it, and its ZeRO stage."""
SEQ_LEN = 32


def measure(
    rival: str, folder: Path, *, num_rounds: int, is_small: bool, device: torch.device
) -> dict[str, Any]:
    """Median seconds of our and the rival's save and load, over interleaved rounds after a first one."""
    kind, zero_stage = KINDS[rival]
    parallel = ParallelConfig(engine=kind, zero_stage=zero_stage)
    groups = build_groups(Topology.of_world(dist.get_world_size(), pp_size=1, cp_size=1, tp_size=1))
    model = DEMO if is_small else MODEL_300M
    placement = place(model, parallel, groups, seq_len=SEQ_LEN)
    train = TrainConfig(total_tokens=1, global_batch_rows=2 * groups.dp.size, micro_batch_rows=2)
    engine = open_engine(placement, device=device, train=train, optimizer=OptimizerConfig(peak_lr=1e-3))
    engine.load(fresh_weights(placement, seed=0))
    engine.train_step([a_batch(model, device)], lr=1e-3)  # gives the optimizer its state
    saved = _digest(engine)

    ranks = Ranks(dist.get_rank(), dist.get_world_size(), _gather)
    saver = Saver(folder / "ours", ranks, SaveConfig(keep_last=1, in_background=False))

    def save_ours() -> None:
        saver.save(1, engine.pieces(), {"num_optimizer_steps": 1})

    def load_ours() -> None:
        reader = CheckpointReader(folder / "ours" / "step-00000001")
        for at in range(dist.get_rank(), len(reader.files()), dist.get_world_size()):
            for problem in reader.problems_of(at):
                raise LLMTrainError(problem)
        source = CountedSource(reader.read_into)
        engine.load(source, num_optimizer_steps=1)
        source.count(engine.pieces())

    of_rival = {"deepspeed": _deepspeed, "dcp": _dcp}[rival](engine, folder / "theirs")
    taken: dict[str, list[float]] = {}
    for _ in range(num_rounds + 1):
        for name, (save, load) in {"ours": (save_ours, load_ours), "theirs": of_rival}.items():
            if dist.get_rank() == 0:
                shutil.rmtree(folder / name, ignore_errors=True)
            taken.setdefault(f"{name}_save", []).append(_seconds(save))
            engine.train_step([a_batch(model, device)], lr=1e-3)
            if _digest(engine) == saved:
                raise LLMTrainError("a step has changed nothing, so a load could not be seen")
            taken.setdefault(f"{name}_load", []).append(_seconds(load))
            if _digest(engine) != saved:
                raise LLMTrainError(f"the state after the load of {name} is not the one that was saved")
    num_bytes = sum(piece.values.nbytes for piece in engine.pieces())
    return {"bytes": num_bytes, **{name: statistics.median(times[1:]) for name, times in taken.items()}}


def _deepspeed(engine: Any, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    def load() -> None:
        path, _ = engine._engine.load_checkpoint(str(folder), tag="one")
        if path is None:
            raise LLMTrainError("DeepSpeed has loaded nothing")

    return lambda: engine._engine.save_checkpoint(str(folder), tag="one"), load


def _dcp(engine: Any, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    model, optimizer = engine._model, engine._optimizer.optimizer

    def contents() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    def load() -> None:
        state = contents()
        state_dict_loader.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    return lambda: state_dict_saver.save(contents(), checkpoint_id=folder), load


def _seconds(work: Callable[[], object]) -> float:
    """Until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def _digest(engine: Any) -> str:
    """Of all numbers that a rank owns."""
    digest = xxhash.xxh3_128()
    for piece in engine.pieces():
        digest.update(f"{piece.kind} {piece.name} {piece.start}".encode())
        digest.update(piece.values.data)
    return digest.hexdigest()


def _gather(value: object) -> list[object]:
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


if __name__ == "__main__":
    rank_device = join_ranks(timeout_s=300)
    told = json.loads(sys.argv[1])
    result = measure(told.pop("rival"), Path(told.pop("folder")), device=rank_device, **told)
    print(json.dumps(result))
    dist.destroy_process_group()
