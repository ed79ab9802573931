"""Where a run keeps what, and what its intent means for a folder as it stands."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.find import checkpoints_of, newest_folder, newest_whole
from llmtrain.checkpoint.format import STEP_NAME
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place, place_of
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.tracking.beats import RANKS_NAME
from llmtrain.tracking.metrics import read_lines
from llmtrain.train.config import Intent, RunConfig, TrainRoot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    path: Path
    save_folder: str | None = None
    """Of the config."""

    @property
    def checkpoints(self) -> Place:
        return self.path / "checkpoints" if self.save_folder is None else place_of(self.save_folder)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved config of the newest attempt."""
        return self.path / "config.yaml"

    @property
    def facts(self) -> Path:
        """Commit, versions, command line and host of every attempt."""
        return self.path / "run.json"

    @property
    def ranks(self) -> Path:
        """Each rank's beat."""
        return self.path / RANKS_NAME

    def holds_a_run(self) -> bool:
        return self.metrics.exists() or self.holds_checkpoints()

    def holds_checkpoints(self) -> bool:
        return newest_folder(self.checkpoints) is not None


def run_folder(cfg: TrainRoot) -> RunFolder:
    return RunFolder(Path(cfg.run.folder), cfg.save.folder)


def checkpoint_to_start_from(
    cfg: RunConfig, folder: RunFolder, *, damaged: Mapping[Place, str] | None = None
) -> Place | None:
    """The checkpoint that the intent asks for, or None to start from fresh weights.

    Its marker, manifest and file sizes are right. A damaged one is passed over only with run.fallback, and
    not in silence.

    Args:
        damaged: what is wrong with the contents of some, found before.

    Raises:
        ConfigError: fresh or warm_start over a folder that holds a run.
        CheckpointError: resume or warm_start without a checkpoint that is whole, or, without run.fallback,
            with a damaged one that is newer.
    """
    if cfg.intent in (Intent.fresh, Intent.warm_start) and folder.holds_a_run():
        how = "resume to continue it" if folder.holds_checkpoints() else "fresh_or_resume to start it anew"
        held = folder.path if folder.metrics.exists() else folder.checkpoints
        raise ConfigError(
            f"run.intent={cfg.intent.name}, but {held} holds a run already; set run.intent={how}, "
            f"or choose another run.name"
        )
    if cfg.intent is Intent.fresh:
        return None
    source = folder.checkpoints
    if cfg.intent is Intent.warm_start:
        assert cfg.init_from is not None, "checked by RunConfig"
        source = place_of(cfg.init_from)
        if STEP_NAME.fullmatch(source.name):
            if damaged and source in damaged:
                raise CheckpointError(damaged[source])
            CheckpointReader(source)
            return source
        source = checkpoints_of(source)
    newest = _newest(source, cfg, damaged or {})
    if newest is None and cfg.intent is Intent.fresh_or_resume and folder.metrics.exists():
        saved = [line["step"] for line in read_lines(folder.metrics) if line["kind"] == "checkpoint"]
        if saved:
            raise CheckpointError(
                f"{folder.metrics} tells of a checkpoint of step {max(saved)}, and {source} holds none: "
                f"put it back, or move {folder.path} away to start anew"
            )
    if newest is None and cfg.intent is not Intent.fresh_or_resume:
        where = "run.init_from" if cfg.intent is Intent.warm_start else "run.folder"
        raise CheckpointError(
            f"run.intent={cfg.intent.name}, but there is no finished checkpoint in {source}; check {where}, "
            f"or set run.intent=fresh to start anew"
        )
    return newest


def _newest(folder: Place, cfg: RunConfig, known: Mapping[Place, str]) -> Place | None:
    whole, damaged = newest_whole(folder, verify=False, known=known)
    if whole is None or not damaged:
        return whole
    if not cfg.fallback:
        raise CheckpointError(
            f"{'; '.join(damaged)}; run.fallback=true goes back to {whole.name}, or put a copy of the "
            "damaged one there"
        )
    for problem in damaged:
        log.error("run.fallback=true: not using a damaged checkpoint: %s", problem)
    log.error("run.fallback=true: going back to %s", whole)
    return whole
