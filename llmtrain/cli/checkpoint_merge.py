"""`llmtrain checkpoint merge`: one safetensors file with whole tensors."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.checkpoint.rewrite import merge
from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.checkpoint import tell
from llmtrain.cli.compose import run_verb


@dataclass(kw_only=True)
class MergeConfig:
    path: str
    """A run folder or its checkpoints/, for the newest; or one step's folder. Or a URL."""
    out: str
    """A folder or URL that is not there yet. The checkpoint is a step's folder in it."""
    kinds: str = "weight"
    """weight: without the optimizer's state, for run.init_from and for other programs; all: everything, as a
    resume needs it; or another kind that is there, as exp_avg."""


def main() -> None:
    run_verb("checkpoint_merge", MergeConfig, run)


def run(cfg: MergeConfig) -> None:
    tell(merge(place_of(cfg.path), place_of(cfg.out), kinds=cfg.kinds))
