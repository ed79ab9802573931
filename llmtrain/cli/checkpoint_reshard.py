"""`llmtrain checkpoint reshard`: the same checkpoint in another number of files."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.checkpoint.rewrite import reshard
from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.checkpoint import tell
from llmtrain.cli.compose import run_verb


@dataclass(kw_only=True)
class ReshardConfig:
    path: str
    """A run folder or its checkpoints/, for the newest; or one step's folder. Or a URL."""
    out: str
    """A folder or URL that is not there yet. The checkpoint is a step's folder in it."""
    num_files: int
    """Of as many bytes each, to within an element; tensors are cut where a file is full. Any number of ranks
    reads any number of files."""


def main() -> None:
    run_verb("checkpoint_reshard", ReshardConfig, run)


def run(cfg: ReshardConfig) -> None:
    tell(reshard(place_of(cfg.path), place_of(cfg.out), num_files=cfg.num_files))
