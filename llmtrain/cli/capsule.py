"""`llmtrain replay capsule=FILE`: the failed step of a capsule again, in one process, beside what the run
recorded.

With the checkpoint from before the step, and with the steps between, which the capsule holds too, loss and
norm are those of the run but for the order of sums.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text

from llmtrain.checkpoint.find import checkpoints_of, newest_checkpoint
from llmtrain.checkpoint.format import STEP_NAME
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.restore import Precision
from llmtrain.cli.run_config import parsed
from llmtrain.errors import CheckpointError, DataError
from llmtrain.loader.batches import Batch, to_batch
from llmtrain.loader.dataset import Row
from llmtrain.loader.ledger import hash_rows
from llmtrain.model.init import initial_weight
from llmtrain.model.transformer import Transformer
from llmtrain.train import config
from llmtrain.train.capsule import Capsule, StepRows, read_capsule
from llmtrain.train.config import TrainRoot
from llmtrain.train.rerun import Rerun, StepAgain, Tensors

log = logging.getLogger(__name__)

SHOWN_DOCUMENTS = 3
"""Of a row."""


@dataclass(frozen=True, kw_only=True)
class RowAgain:
    """A row of the step."""

    place: int
    """In the run."""
    number: int
    """In the data; with it `llmtrain data trace` shows the text, where the data is."""
    loss: float
    num_targets: int
    documents: list[dict[str, Any]]
    """Those in it, of loader/documents.py; empty where the capsule does not name them."""


@dataclass(frozen=True, kw_only=True)
class ReplayedCapsule:
    run: str
    step: int
    attempt: int
    why: str
    error: str | None
    weights: str
    """Where they come from."""
    weights_step: int
    again: StepAgain
    recorded_loss: float | str | None
    recorded_grad_norm: float | str | None
    max_loss_difference: float | None
    """Of the steps between that were done again; None: there were none."""
    rows: list[RowAgain]
    """The highest loss first."""
    left_out: list[str] = field(default_factory=list)


def replay_capsule(
    path: Path, *, checkpoint: str | None, device: str | None, precision: Precision | None
) -> ReplayedCapsule:
    """
    Args:
        checkpoint: in place of the one that the capsule holds or names: a run folder or a checkpoint.
        device: None: the CPU.
        precision: None: that of the run.

    Raises:
        DataError: no capsule, or one without rows.
        CheckpointError: no weights.
    """
    capsule = read_capsule(path)
    facts = capsule.facts
    if not facts.steps:
        raise DataError(
            f"{path} holds no rows, for {'; '.join(facts.left_out)}: there is nothing to do again"
        )
    root = parsed(capsule.text("config.yaml"), path)
    start = _weights(capsule, root, checkpoint)
    between = [each for each in facts.steps[:-1] if each.step > start.step]
    known = [start.step + 1 + at for at in range(len(between))] == [each.step for each in between]
    if not known or start.step + len(between) != facts.step - 1:
        log.warning(
            "the weights are those of step %d, not of step %d, and the steps between are not in the capsule: "
            "numbers differ from what the run recorded",
            *(start.step, facts.step - 1),
        )
        between = []
    again = Rerun(
        root,
        start.tensors,
        num_optimizer_steps=start.num_optimizer_steps,
        precision=_precision(root, precision),
        device=torch.device(device or "cpu"),
    )
    differences = []
    for each in between:
        assert each.lr is not None, "a step that was done has a record"
        found = again.step(_batches(capsule, each), lr=each.lr, updates=not each.withheld)
        if each.loss is not None:
            differences.append(abs(found.loss - each.loss))
    failed = facts.steps[-1]
    batches = _batches(capsule, failed)
    documents = _documents(capsule)
    rows = [row for batch in batches for row in _rows(again, batch, documents)]
    found = again.step(batches, lr=failed.lr or 0.0, updates=False, watches=True)
    return ReplayedCapsule(
        run=facts.run,
        step=facts.step,
        attempt=facts.attempt,
        why=facts.why,
        error=facts.error,
        weights=start.told,
        weights_step=start.step,
        again=found,
        recorded_loss=facts.recorded.get("loss"),
        recorded_grad_norm=facts.recorded.get("grad_norm"),
        max_loss_difference=max(differences, default=None),
        rows=sorted(rows, key=lambda row: -row.loss if row.loss == row.loss else float("-inf")),
        left_out=facts.left_out,
    )


def lines(found: ReplayedCapsule, *, worst: int) -> Iterator[Text]:
    """What is printed."""
    why = f": {found.error}" if found.error else ""
    yield Text(f"capsule of step {found.step:,}, attempt {found.attempt} of {found.run}: {found.why}{why}")
    yield Text(f"weights of step {found.weights_step:,}, {found.weights}")
    if found.max_loss_difference is not None:
        yield Text(
            f"steps {found.weights_step + 1:,} to {found.step - 1:,} done again: losses differ from the "
            f"run's by at most {found.max_loss_difference:.2g}"
        )
    again = found.again
    yield Text(
        f"loss {again.loss:.6f} over {again.num_valid:,} targets{_recorded(found.recorded_loss)}", "bold"
    )
    yield Text(f"gradient norm {again.grad_norm:.6f}{_recorded(found.recorded_grad_norm)}", "bold")
    for group, norm in again.group_norms.items():
        yield Text(f"  {group:<20} {norm:.6f}")
    yield Text(f"first that is not finite: {again.first_non_finite or 'none, all is'}", "bold")
    for row in found.rows[:worst]:
        yield Text(
            f"{row.loss:8.4f} over {row.num_targets:,} targets  row {row.place:,} of the run, "
            f"{row.number:,} of the data"
        )
        for document in row.documents[:SHOWN_DOCUMENTS]:
            where = document["path"] or document["shard"]
            name = document["id"] or f"document {document['document']:,}"
            yield Text(f"         {document['num_tokens']:,} tokens of {name} in {where}", "dim")
    for each in found.left_out:
        yield Text(f"not in the capsule: {each}", "yellow")


def _recorded(value: float | str | None) -> str:
    told = f"{value:.6f}" if isinstance(value, float) else value
    return "" if value is None else f"; the run recorded {told}"


@dataclass(frozen=True)
class _Start:
    tensors: Tensors
    step: int
    num_optimizer_steps: int
    told: str


def _weights(capsule: Capsule, root: TrainRoot, given: str | None) -> _Start:
    facts = capsule.facts
    if given is not None:
        return _of_reader(_open(given), capsule)
    if facts.is_fresh:
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in Transformer(root.model).named_parameters()}
        return _Start(
            lambda _, name: initial_weight(name, shapes[name].numel(), root.model, root.run.seed).reshape(
                shapes[name]
            ),
            *(0, 0, "fresh ones, made from the seed"),
        )
    told = facts.checkpoint
    if told is None:
        raise CheckpointError(
            f"{capsule.path} names no checkpoint, for {'; '.join(facts.left_out)}: give checkpoint=FOLDER"
        )
    if not told["is_inside"]:
        try:
            return _of_reader(_open(told["path"]), capsule)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; the model is too large for its capsule: give checkpoint=FOLDER, a copy of "
                f"{told['path']} (manifest sha256 {told['manifest_sha256'][:12]})"
            ) from error
    steps = 0 if facts.weights_only else told["state"]["num_optimizer_steps"]
    return _Start(
        capsule.read, 0 if facts.weights_only else told["step"], steps, f"{told['path']}, in the capsule"
    )


def _open(given: str) -> CheckpointReader:
    place = place_of(given)
    if not STEP_NAME.fullmatch(place.name):
        newest = newest_checkpoint(checkpoints_of(place))
        if newest is None:
            raise CheckpointError(f"no finished checkpoint in {place}")
        place = newest
    reader = CheckpointReader(place)
    reader.verify()
    return reader


def _of_reader(reader: CheckpointReader, capsule: Capsule) -> _Start:
    facts = capsule.facts
    told = facts.checkpoint
    is_named = told is not None and told["manifest_sha256"] == reader.manifest_hash
    if not is_named:
        log.warning("%s is not the checkpoint that %s names", reader.path, capsule.path)
    weights_only = facts.weights_only and is_named
    return _Start(
        reader.read,
        0 if weights_only else reader.step,
        0 if weights_only else reader.state["num_optimizer_steps"],
        str(reader.path),
    )


def _precision(root: TrainRoot, asked: Precision | None) -> config.Precision:
    if asked is not None:
        return config.Precision[asked.name]
    if root.train.precision is config.Precision.fp16:
        log.warning(
            "the run computed in fp16, which this does in fp32: what overflowed there may be finite here"
        )
        return config.Precision.fp32
    return root.train.precision


def _batches(capsule: Capsule, step: StepRows) -> list[Batch]:
    """The step's micro batches, of all ranks in turn, as the run cut them.

    Raises:
        DataError: the tokens are not those that were hashed.
    """
    before = sum(each.num_rows for each in capsule.facts.steps[: capsule.facts.steps.index(step)])
    size, end = capsule.facts.micro_batch_rows, before + step.num_rows
    arrays = {
        name: capsule.array(f"rows/{name}.npy")
        for name in ("places", "numbers", "tokens", "targets", "positions", "segments")
    }
    places, numbers = arrays.pop("places"), arrays.pop("numbers")
    found = f"{hash_rows(places[before:end], arrays['tokens'][before:end]):016x}"
    if step.hash not in (None, found):
        raise DataError(
            f"{capsule.path} is damaged: the tokens of step {step.step} have the hash {found}, not "
            f"{step.hash}"
        )
    batches = []
    for first in range(before, end, size):
        part = slice(first, min(first + size, end))
        wide = {name: arrays[name][part].astype(np.int64) for name in ("tokens", "targets", "positions")}
        row = Row(**wide, segments=arrays["segments"][part].astype(np.int32))
        batches.append(replace(to_batch(row, numbers[part]), places=places[part]))
    return batches


def _documents(capsule: Capsule) -> dict[int, list[dict[str, Any]]]:
    """By place in the run."""
    found: dict[int, list[dict[str, Any]]] = {}
    if "documents.json" in capsule.members:
        for each in json.loads(capsule.text("documents.json")):
            found.setdefault(each["position"], []).append(each)
    return found


def _rows(again: Rerun, batch: Batch, documents: dict[int, list[dict[str, Any]]]) -> Iterator[RowAgain]:
    assert batch.places is not None, "of a run"
    for place, number, (loss, num_targets) in zip(
        batch.places.tolist(), batch.rows.tolist(), again.losses_of_rows(batch), strict=True
    ):
        yield RowAgain(
            place=place,
            number=number,
            loss=loss,
            num_targets=num_targets,
            documents=documents.get(place, []),
        )
