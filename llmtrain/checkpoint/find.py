"""Which checkpoints are in a folder, and which of them go."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import MARKER_FILE, STEP_NAME, TEMPORARY_PREFIX, some
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.errors import CheckpointError

log = logging.getLogger(__name__)


def list_checkpoints(folder: Path) -> list[int]:
    """Return the committed steps in `folder`, ascending. A folder that does not exist holds none."""
    return sorted(step for step, path in _step_folders(folder).items() if (path / MARKER_FILE).exists())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the committed checkpoint of `step`; CheckpointError lists the steps there are."""
    steps = list_checkpoints(folder)
    if step not in steps:
        there = f"it holds {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; {there}")
    return _step_folders(folder)[step]


def newest_folder(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, whole or not; None if there is none."""
    folders = _step_folders(folder)
    return folders[max(folders)] if folders else None


def newest_checkpoint(folder: Path, *, verify: bool = True) -> Path | None:
    """Return the newest checkpoint in `folder` that is whole, or None if there never was one.

    A damaged one is logged as an error and the next older is tried. With `verify=False` only its marker,
    manifest and file sizes are checked, not its contents.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    whole, damaged = newest_whole(folder, verify=verify)
    for problem in damaged:
        log.error("not using a damaged checkpoint: %s", problem)
    return whole


def newest_whole(folder: Path, *, verify: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    for _, path in sorted(_step_folders(folder).items(), reverse=True):
        try:
            reader = CheckpointReader(path)
            if verify:
                reader.verify()
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged: {some(damaged)}; restore one from a copy, "
            "or start a fresh run in another folder"
        )
    return None, []


def _step_folders(folder: Path) -> dict[int, Path]:
    """Step → its folder. One set aside by a replacement counts only while the new one is not there."""
    if not folder.is_dir():
        return {}
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # "step-N" sorts before "step-N.replaced"
        if match := STEP_NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), path)
    return found


def retire(folder: Path, *, step: int, config: SaveConfig) -> None:
    """Delete the checkpoints before `step` that `config` does not keep."""
    earlier = [older for older in list_checkpoints(folder) if older < step]
    kept = _kept(folder, [*earlier, step], config)
    for older in earlier:
        if older not in kept:
            remove(checkpoint_path(folder, older))


def _kept(folder: Path, steps: list[int], config: SaveConfig) -> set[int]:
    kept = set(steps[-config.keep_last :])
    if not (config.keep_every_tokens or config.keep_best):
        return kept
    states = {}
    for step in steps:
        try:
            states[step] = CheckpointReader(checkpoint_path(folder, step)).state
        except CheckpointError as error:
            log.error("a damaged checkpoint stays, though nothing starts from it: %s", error)
            kept.add(step)
    if config.keep_every_tokens:
        passed = 0
        for step, state in states.items():
            multiple = state["tokens"] // config.keep_every_tokens
            if multiple > passed:
                kept.add(step)
            passed = max(passed, multiple)
    losses = {
        step: state["eval_loss"] for step, state in states.items() if state.get("eval_loss") is not None
    }
    return kept | set(sorted(losses, key=lambda step: (losses[step], step))[: config.keep_best])


def remove(checkpoint: Path) -> None:
    """Delete a folder that nothing needs any more: unseen first, so that no half of it is ever found."""
    doomed = checkpoint.with_name(f"{TEMPORARY_PREFIX}retired-{checkpoint.name}")
    try:
        if checkpoint.exists():
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        log.warning("could not delete the old checkpoint %s: %s", checkpoint, error)


def clean(folder: Path) -> None:
    """Remove what saves that were killed have left behind."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        log.info("removing %s, left by a save that was cut off", leftover)
        shutil.rmtree(leftover)
    for replaced in folder.glob("step-*.replaced"):
        if (replaced.with_suffix("") / MARKER_FILE).exists():
            remove(replaced)
