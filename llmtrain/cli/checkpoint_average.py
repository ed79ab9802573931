"""`llmtrain checkpoint average`: the mean of the weights of several checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmtrain.checkpoint.rewrite import average, newest_of
from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.checkpoint import tell
from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class AverageConfig:
    paths: list[str] = field(default_factory=list)
    """Runs (for their newest) or steps' folders, of one model. Or `path` with `last`."""
    path: str | None = None
    """A run folder or its checkpoints/, with `last`."""
    last: int | None = None
    """Its newest so many checkpoints."""
    weights: list[float] | None = None
    """How much each counts, in the order of `paths`, or of `last` from the oldest; only proportions matter.
    null: all alike."""
    out: str
    """A folder or URL that is not there yet. The checkpoint is a step's folder in it, of the newest step."""

    def __post_init__(self) -> None:
        if bool(self.paths) == (self.path is not None):
            raise ConfigError(
                f"paths={self.paths} and path={self.path}: name checkpoints as paths=[A,B], or a run as "
                "path=RUN last=3"
            )
        if (self.path is None) != (self.last is None):
            raise ConfigError(f"path={self.path} and last={self.last} go together, as in path=RUN last=3")


def main() -> None:
    run_verb("checkpoint_average", AverageConfig, run)


def run(cfg: AverageConfig) -> None:
    if cfg.path is not None and cfg.last is not None:
        paths = newest_of(place_of(cfg.path), cfg.last)
    else:
        paths = [place_of(path) for path in cfg.paths]
    tell(average(paths, place_of(cfg.out), weights=cfg.weights))
