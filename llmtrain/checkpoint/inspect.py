"""What a checkpoint holds and whether every byte of it is right, for people to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from llmtrain.checkpoint.find import checkpoints_of, list_checkpoints, newest_folder
from llmtrain.checkpoint.format import STEP_NAME
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place
from llmtrain.errors import CheckpointError

AXES = ("pp_size", "cp_size", "tp_size")


@dataclass(frozen=True)
class KindSummary:
    """All tensors of one kind."""

    kind: str
    num_tensors: int
    num_elements: int
    num_bytes: int
    dtypes: list[str]
    largest: str
    """The name of the tensor with the most elements."""
    largest_shape: list[int]


@dataclass(frozen=True)
class FileSummary:
    path: str
    num_bytes: int
    num_pieces: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    path: str
    step: int
    manifest_sha256: str
    steps: list[int]
    """All committed ones beside it."""
    facts: dict[str, Any]
    """Of the run: where it stood, and the layout that wrote this."""
    kinds: list[KindSummary]
    files: list[FileSummary]

    @property
    def problems(self) -> list[str]:
        return [problem for file in self.files for problem in file.problems]


def find(path: Place) -> Place:
    """A checkpoint itself, or the newest of a run folder or of its checkpoints/.

    Raises:
        CheckpointError: there is none.
    """
    if STEP_NAME.fullmatch(path.name):
        return path
    folder = checkpoints_of(path)
    newest = newest_folder(folder)
    if newest is None:
        raise CheckpointError(
            f"no finished checkpoint in {folder}; give path=RUN_FOLDER, or a step of its checkpoints/"
        )
    return newest


def inspect_checkpoint(path: Place, *, verify: bool) -> Inspection:
    """
    Args:
        path: a run folder, its checkpoints/, or one step's folder.
        verify: whether to compare every byte with its hash; False compares marker, manifest and sizes.

    Raises:
        CheckpointError: no checkpoint there, or one whose marker, manifest or sizes are wrong.
    """
    reader = CheckpointReader(find(path))
    return Inspection(
        path=str(reader.path),
        step=reader.step,
        manifest_sha256=reader.manifest_hash,
        steps=list_checkpoints(reader.path.parent),
        facts=_facts(reader.state),
        kinds=[_kind(reader, kind) for kind in reader.kinds],
        files=[
            FileSummary(file.name, num_bytes, num_pieces, list(reader.problems_of(at)) if verify else [])
            for at, (file, num_bytes, num_pieces) in enumerate(reader.files())
        ],
    )


def _facts(state: dict[str, Any]) -> dict[str, Any]:
    """What is there of it: tests and other tools save less."""
    config = state.get("config", {})
    parallel, train = config.get("parallel", {}), config.get("train", {})
    layout = {axis: parallel[axis] for axis in AXES if axis in parallel}
    if layout and "world_size" in state:
        layout["dp_size"] = state["world_size"] // math.prod(layout.values())
    layout |= {name: parallel[name] for name in ("engine", "zero_stage") if name in parallel}
    made_by = state.get("made_by")
    parent, code = state.get("parent"), state.get("code", {})
    told = {
        "rows consumed": state.get("position"),
        "tokens of the budget": state.get("tokens"),
        "valid targets": state.get("targets"),
        "optimizer steps": state.get("num_optimizer_steps"),
        "held-out loss": state.get("eval_loss"),
        "attempt": state.get("attempt"),
        "made by": made_by and made_by["command"],
        "goes on from": parent and f"{parent['checkpoint']}, step {parent['step']} ({parent['intent']})",
        "changed since": parent and _changes(parent["changed"]),
        "written by": " ".join(f"{name}={value}" for name, value in layout.items()) or None,
        "precision": train.get("precision"),
        "data": state.get("data_folder"),
        "torch": state.get("torch"),
        "commit": code.get("git_commit"),
        "W&B id": state.get("wandb_id"),
    }
    return {name: value for name, value in told.items() if value is not None}


def _changes(changed: dict[str, list[Any]]) -> str | None:
    return ", ".join(f"{name}={after} (was {before})" for name, (before, after) in changed.items()) or None


def _kind(reader: CheckpointReader, kind: str) -> KindSummary:
    shapes = reader.shapes(kind)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    dtypes = {name: reader.dtype(kind, name) for name in shapes}
    return KindSummary(
        kind=kind,
        num_tensors=len(shapes),
        num_elements=sum(sizes.values()),
        num_bytes=sum(sizes[name] * dtypes[name].itemsize for name in shapes),
        dtypes=sorted({dtype.name for dtype in dtypes.values()}),
        largest=largest,
        largest_shape=list(shapes[largest]),
    )
