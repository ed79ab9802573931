"""`llmtrain replay run=RUN step=N`: feed exactly the rows of a step to the model, and tell the loss of each
document in them. `capsule=FILE` does the failed step of a capsule again: cli/capsule.py.

With the weights of the step before, the loss is the one that the run recorded. The documents are listed with
the worst first: what is behind a loss spike stands at the top.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from llmtrain.checkpoint.find import checkpoint_path, checkpoints_of, list_checkpoints
from llmtrain.checkpoint.storage import Place, place_of
from llmtrain.cli.capsule import lines as capsule_lines
from llmtrain.cli.capsule import replay_capsule
from llmtrain.cli.compose import run_verb
from llmtrain.cli.past_step import TracedRow, excerpt, traced
from llmtrain.cli.restore import Precision, load_weights
from llmtrain.cli.run_config import run_config
from llmtrain.data.trace import OutputFormat, Traced
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.inference.perplexity import losses_of_tokens
from llmtrain.loader.batches import to_batch
from llmtrain.loader.ledger import Step
from llmtrain.loader.replay import PastRun, StepRow
from llmtrain.model.transformer import Transformer
from llmtrain.progress import progress
from llmtrain.tracking.metrics import read_lines
from llmtrain.train.run_folder import RunFolder

log = logging.getLogger(__name__)

OF_A_RUN = ("run", "step", "position", "attempt", "rank", "micro_batch")
"""Settings that say which rows, where no capsule does."""
AT_ONCE = 8
"""Rows that are read and kept at a time."""


@dataclass(kw_only=True)
class ReplayRoot:
    run: str | None = None
    """The run folder."""
    step: int | None = None
    """The step to replay, from 1."""
    capsule: str | None = None
    """A failure capsule, in place of a run and a step."""
    position: int | None = None
    """A row that the step took, as a place in the run: after a rollback two steps of one number have other
    rows. null: the step as it was done last."""
    attempt: int | None = None
    """The attempt that did the step; null: the last."""
    rank: int | None = None
    """Only the rows of this data-parallel rank; null: all."""
    micro_batch: int | None = None
    """Only this micro batch of each rank, from 0; null: all of them."""
    checkpoint: str | None = None
    """Weights to take; null: the run's of the step before, or the newest before that, or the oldest after;
    of a capsule, those that it holds or names."""
    device: str | None = None
    """null: a GPU if there is one, else the CPU; for a capsule the CPU."""
    precision: Precision | None = None
    """null: that of the run."""
    worst: int = 20
    """Documents to print, of a capsule rows; all of them are in the JSON."""
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        own = {name: getattr(self, name) for name in OF_A_RUN}
        if self.capsule is not None and any(value is not None for value in own.values()):
            told = ", ".join(f"{name}={value}" for name, value in own.items() if value is not None)
            raise ConfigError(f"{told}: a capsule is of one step of one run; leave it out with capsule=FILE")
        if self.capsule is None and (self.run is None or self.step is None):
            raise ConfigError(f"run={self.run} and step={self.step}: give both, or capsule=FILE")
        if (self.step is not None and self.step < 1) or self.worst < 1:
            raise ConfigError(f"step={self.step} and worst={self.worst} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DocumentLoss:
    """A document's part in a row."""

    loss: float | None
    """Mean over its targets in nats; None when it has none here."""
    num_targets: int
    document: Traced


@dataclass(frozen=True, kw_only=True)
class RowLoss:
    place: StepRow
    loss: float
    num_targets: int
    documents: list[DocumentLoss]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    step: int
    weights_step: int
    checkpoint: str
    loss: float
    num_targets: int
    recorded_loss: float | None
    """What metrics.jsonl has for the step; None when only a part of it was replayed, or it has none."""
    hash: str | None
    """Of the tokens as they are now; None when only a part of the step was replayed."""
    ledger_hash: str
    rows: list[RowLoss]


def main() -> None:
    run_verb("replay", ReplayRoot, show)


def show(cfg: ReplayRoot) -> None:
    """Print the losses; exit status 1 when the tokens are not those that the run read."""
    if cfg.capsule is not None:
        show_capsule(cfg, Path(cfg.capsule))
        return
    found = replay(cfg)
    if cfg.format is OutputFormat.json:
        print(json.dumps(asdict(found), ensure_ascii=False, indent=1))
    else:
        console = Console(highlight=False)
        for line in summary(found):
            console.print(line, soft_wrap=True, markup=False)
        for text in worst_documents(found, worst=cfg.worst):
            console.print(text, soft_wrap=True)
    if found.hash not in (None, found.ledger_hash):
        sys.exit(1)


def show_capsule(cfg: ReplayRoot, path: Path) -> None:
    found = replay_capsule(path, checkpoint=cfg.checkpoint, device=cfg.device, precision=cfg.precision)
    if cfg.format is OutputFormat.json:
        print(json.dumps(asdict(found), ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False)
    for text in capsule_lines(found, worst=cfg.worst):
        console.print(text, soft_wrap=True)


def replay(cfg: ReplayRoot) -> Replayed:
    """
    Raises:
        DataError: no ledger, no such step or rank, or other data than the run's.
        CheckpointError: no weights.
    """
    assert cfg.run is not None, "checked by ReplayRoot"
    assert cfg.step is not None, "checked by ReplayRoot"
    folder = Path(cfg.run)
    root = run_config(folder)
    past = PastRun(folder, root.data, seed=root.run.seed)
    which = {"position": cfg.position, "attempt": cfg.attempt}
    step, start = past.step(cfg.step, **which)
    places = past.rows_of(cfg.step, rank=cfg.rank, micro_batch=cfg.micro_batch, **which)
    precision = cfg.precision or Precision[root.train.precision.name]
    checkpoint = place_of(cfg.checkpoint) if cfg.checkpoint else _checkpoint_for(folder, cfg.step)
    model, reader = load_weights(checkpoint, device=cfg.device, precision=precision)
    if reader.step != cfg.step - 1:
        seen = ", and have seen these rows" if reader.step >= cfg.step else ""
        log.warning(
            "the weights are those of step %d, not of step %d%s: losses differ from what the run recorded",
            *(reader.step, cfg.step - 1, seen),
        )
    elif start.passed_over.next_position(reader.state["position"]) != step.first:
        log.warning(
            "the weights of step %d have seen other rows than those of attempt %d had: losses differ from "
            "what the run recorded",
            *(reader.step, step.attempt),
        )
    if root.train.dropout:
        log.warning("the run dropped %g of its activations; nothing is dropped here", root.train.dropout)
    is_whole = len(places) == len(past.positions_of(step))
    rows = list(_losses(model, past, traced(past, places), quiet=cfg.format is OutputFormat.json))
    num_targets = sum(row.num_targets for row in rows)
    return Replayed(
        step=cfg.step,
        weights_step=reader.step,
        checkpoint=str(reader.path),
        loss=math.fsum(row.loss * row.num_targets for row in rows) / max(1, num_targets),
        num_targets=num_targets,
        recorded_loss=_recorded(folder, step) if is_whole else None,
        hash=f"{past.recomputed(step):016x}" if is_whole else None,
        ledger_hash=step.hash,
        rows=rows,
    )


def _checkpoint_for(run: Path, step: int) -> Place:
    """Weights for a step: those of the step before, or the newest before that, or the oldest after it."""
    folder = checkpoints_of(run)
    there = list_checkpoints(folder)
    if not there:
        raise CheckpointError(f"no finished checkpoint in {folder}; name one with checkpoint=FOLDER")
    return checkpoint_path(folder, max([number for number in there if number < step], default=there[0]))


def _recorded(run: Path, step: Step) -> float | None:
    """The loss of the step on these rows; of one that ended the run or was rolled back, as the event has
    it."""
    lines = [
        line
        for line in reversed(read_lines(RunFolder(run).metrics))
        if (line["step"], line["attempt"]) == (step.step, step.attempt)
    ]
    for line in lines:
        if line["kind"] == "step" and line.get("position") == step.last + 1:
            return line.get("loss")
    for line in lines:
        if line.get("what") == "diverged":
            return line.get("loss")
        if line.get("what") == "spike" and line.get("first") == step.first and line.get("quantity") == "loss":
            return line.get("value")
    return None


def _losses(model: Transformer, past: PastRun, rows: list[TracedRow], *, quiet: bool) -> Iterator[RowLoss]:
    device = model.device
    with progress("replay", total=len(rows), unit="rows", quiet=quiet) as advance:
        for first in range(0, len(rows), AT_ONCE):
            part = rows[first : first + AT_ONCE]
            numbers = np.array([row.place.global_row for row in part])
            batch = to_batch(past.data.train.read_many(numbers), numbers)
            losses_BS = losses_of_tokens(model, batch, device=device).double().numpy()
            is_target_BS = batch.targets_BS.numpy() >= 0
            segments_BS = batch.segments_BS.numpy()
            for at, row in enumerate(part):
                documents = []
                for segment, document in enumerate(row.documents):
                    here = is_target_BS[at] & (segments_BS[at] == segment)
                    count = int(here.sum())
                    loss = float(losses_BS[at][here].mean()) if count else None
                    documents.append(DocumentLoss(loss=loss, num_targets=count, document=document))
                num_targets = int(is_target_BS[at].sum())
                yield RowLoss(
                    place=row.place,
                    loss=float(losses_BS[at].sum()) / max(1, num_targets),
                    num_targets=num_targets,
                    documents=documents,
                )
            advance(len(part))


def summary(found: Replayed) -> Iterator[str]:
    yield f"step {found.step:,} with the weights of step {found.weights_step:,}, {found.checkpoint}"
    told = f"loss {found.loss:.6f} over {found.num_targets:,} targets"
    if found.recorded_loss is not None:
        told += f"; the run recorded {found.recorded_loss:.6f}"
    yield told
    if found.hash == found.ledger_hash:
        yield "tokens: those that the run read"
    elif found.hash is not None:
        yield f"tokens: NOT those that the run read: hash {found.hash}, the ledger has {found.ledger_hash}"


def worst_documents(found: Replayed, *, worst: int) -> Iterator[Text]:
    """Two lines for each document, the highest loss first."""
    every = [(row, each) for row in found.rows for each in row.documents if each.loss is not None]
    every.sort(key=lambda pair: -(pair[1].loss or 0.0))
    for row, each in every[:worst]:
        place = row.place
        yield Text.assemble(
            (f"{each.loss:8.4f}", "bold"),
            f" over {each.num_targets:,} targets  row {place.position:,}, rank {place.rank}, micro batch "
            f"{place.micro_batch}, {place.source}: {each.document.path}, record {each.document.record:,}",
        )
        yield Text(f"         {excerpt(each.document.text)}", "dim")
    if len(every) > worst:
        yield Text(f"and {len(every) - worst:,} more with lower losses")
