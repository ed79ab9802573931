"""The settings that a run was started with, from its folder, for verbs that look at runs."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtrain.data.manifest import MANIFEST_NAME
from llmtrain.errors import DataError
from llmtrain.files import read_json
from llmtrain.train.config import TrainRoot
from llmtrain.train.run_folder import RunFolder


def run_config(folder: Path) -> TrainRoot:
    """Read `config.yaml` of a run folder as dataclasses.

    Raises:
        DataError: there is none, or another version of llmtrain wrote it.
    """
    path = RunFolder(folder).config
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the folder of a run, as in run=runs/demo")
    root = parsed(path.read_text(encoding="utf-8"), path)
    if root.data.folder is not None:
        root.data.folder = str(data_folder_of(Path(root.data.folder), folder))
    for source in root.data.sources.values():
        source.folder = str(data_folder_of(Path(source.folder), folder))
    return root


def parsed(text: str, path: Path) -> TrainRoot:
    """A run's `config.yaml` as dataclasses; `path` is where it comes from.

    Raises:
        DataError: another version of llmtrain wrote it.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainRoot), yaml.safe_load(text))
        root = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    assert isinstance(root, TrainRoot), f"{path} gives a {type(root).__name__}"
    return root


def data_folder_of(given: Path, run_folder: Path | None) -> Path:
    """A run's data folder, as it was given or relative to where the run was started.

    Raises:
        DataError: it is at neither.
    """
    candidates = [given]
    facts = None if run_folder is None else run_folder / "run.json"
    if facts is not None and facts.is_file():
        candidates += [Path(attempt["working_folder"]) / given for attempt in read_json(facts)["attempts"]]
    for candidate in candidates:
        if (candidate / MANIFEST_NAME).is_file():
            return candidate
    raise DataError(
        f"the run's data folder {given} is not at {' or '.join(map(str, dict.fromkeys(candidates)))}"
    )
