"""Which checkpoints are in a folder, and which of them go."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import MARKER_FILE, STEP_NAME, UNFINISHED_FILE, folder_name, some
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place, place_of
from llmtrain.errors import CheckpointError

log = logging.getLogger(__name__)

OURS = re.compile(rf"\.|rank-|manifest|{UNFINISHED_FILE}$")
"""Of the names in a step's folder: what a save writes, but for the marker."""


def checkpoints_of(path: Place) -> Place:
    """Where the checkpoints are of a run folder, or of a folder of checkpoints."""
    there = storage.names(path)
    if isinstance(path, Path) and "config.yaml" in there:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
        if elsewhere := config.get("save", {}).get("folder"):
            return place_of(elsewhere)
    return path / "checkpoints" if "checkpoints" in there else path


def list_checkpoints(folder: Place) -> list[int]:
    """Return the committed steps in `folder`, ascending. A folder that does not exist holds none."""
    return sorted(step for step, path in _step_folders(folder).items() if MARKER_FILE in storage.names(path))


def checkpoint_path(folder: Place, step: int) -> Place:
    """Return the committed checkpoint of `step`; CheckpointError lists the steps there are."""
    steps = list_checkpoints(folder)
    if step not in steps:
        there = f"it holds {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; {there}")
    return _step_folders(folder)[step]


def newest_folder(folder: Place) -> Place | None:
    """The newest checkpoint in `folder`, whole or not; None if there is none."""
    return next(_claimed(folder), None)


def newest_checkpoint(folder: Place, *, verify: bool = True) -> Place | None:
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


def newest_whole(
    folder: Place, *, verify: bool, known: Mapping[Place, str] | None = None
) -> tuple[Place | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one.

    Args:
        known: what is wrong with some, found before.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    for path in _claimed(folder):
        try:
            if known and path in known:
                raise CheckpointError(known[path])
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


def _claimed(folder: Place) -> Iterator[Place]:
    """Step folders that hold a checkpoint or must have held one, newest first: not those that are being saved
    or deleted."""
    for _, path in sorted(_step_folders(folder).items(), reverse=True):
        there = _visible(storage.names(path))
        if MARKER_FILE in there or (there and UNFINISHED_FILE not in there):
            yield path


def _visible(names: list[str]) -> list[str]:
    """Without temporary files, whose names begin with a dot."""
    return [name for name in names if not name.startswith(".")]


def _step_folders(folder: Place) -> dict[int, Place]:
    found = {name: STEP_NAME.fullmatch(name) for name in storage.names(folder)}
    return {int(match[1]): folder / name for name, match in found.items() if match}


def retire(folder: Place, *, step: int, config: SaveConfig) -> None:
    """Delete the checkpoints before `step` that `config` does not keep. A failure is only told: the next save
    tries again."""
    try:
        there = list_checkpoints(folder)
        if step not in there:
            log.error("step %d, just saved, is not in %s: no older checkpoint is deleted", step, folder)
            return
        earlier = [older for older in there if older < step]
        kept = _kept(folder, [*earlier, step], config)
    except (OSError, CheckpointError) as error:
        log.warning("could not look for checkpoints to delete: %s", error)
        return
    for older in earlier:
        if older not in kept:
            remove(folder / folder_name(older))


def _kept(folder: Place, steps: list[int], config: SaveConfig) -> set[int]:
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


def remove(checkpoint: Place) -> None:
    """Delete a checkpoint that nothing needs any more; first of all, it does not count any more."""
    try:
        storage.replace(checkpoint / MARKER_FILE, checkpoint / UNFINISHED_FILE)
        _delete(checkpoint, storage.names(checkpoint))
    except (OSError, CheckpointError) as error:
        log.warning("could not delete the old checkpoint %s: %s", checkpoint, error)


def clean(folder: Place) -> None:
    """Remove what saves and deletions that were killed have left behind."""
    for path in _step_folders(folder).values():
        clean_step(path)


def clean_step(path: Place, *, token: str | None = None) -> None:
    """If a save or a deletion has left a step's folder unfinished, delete what does not belong to a committed
    checkpoint in it.

    Args:
        token: of the save whose leftovers these must be; another run's are let be. None: of any.
    """
    try:
        there = storage.names(path)
        if UNFINISHED_FILE not in there and _visible(there):
            return
        if token is not None and UNFINISHED_FILE in there and token_of(path) != token:
            return
        if MARKER_FILE not in there:
            _delete(path, there)
            return
        own = CheckpointReader(path).own_names
        _delete(path, [name for name in there if OURS.match(name) and name not in own])
    except (OSError, CheckpointError) as error:
        log.warning("could not tidy %s: %s", path, error)


def token_of(path: Place) -> str | None:
    """Of the save under way in a step's folder; None without one."""
    unfinished = path / UNFINISHED_FILE
    return storage.read_bytes(unfinished).decode(errors="replace") if storage.exists(unfinished) else None


def _delete(folder: Place, names: list[str]) -> None:
    """UNFINISHED last: as long as it is there, the others do not count. Then the folder, if it is empty."""
    for name in sorted(names, key=lambda name: name == UNFINISHED_FILE):
        if name == UNFINISHED_FILE:
            storage.flush(folder)
            left = storage.names(folder)
            if MARKER_FILE not in left and left != [UNFINISHED_FILE]:
                return  # something has come since: the next save deletes it
        storage.delete(folder / name)
    if MARKER_FILE not in storage.names(folder):
        storage.delete_folder(folder)
