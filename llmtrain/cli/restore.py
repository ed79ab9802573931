"""From a run folder or a checkpoint to a model and its tokenizer, for the verbs that only read weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.find import checkpoints_of, newest_checkpoint
from llmtrain.checkpoint.format import STEP_NAME
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place
from llmtrain.cli.run_config import data_folder_of
from llmtrain.data.manifest import Manifest, read_manifest
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.model.config import ModelConfig
from llmtrain.model.transformer import Transformer


class Precision(Enum):
    """Type of the weights and of the arithmetic."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(frozen=True)
class Restored:
    model: Transformer
    """In evaluation mode, without gradients."""
    tokenizer: Tokenizer
    checkpoint: Place
    run_folder: Path | None
    """None when the checkpoint does not lie in a run folder."""
    step: int
    state: dict[str, Any]
    """What the run saved beside its weights."""
    data_folder: Path
    manifest: Manifest


def load_transformer(
    path: Place,
    *,
    data_folder: Path | None = None,
    device: str | None = None,
    precision: Precision = Precision.fp32,
) -> Restored:
    """Load the newest whole checkpoint of a run folder, or one checkpoint; every byte is compared with its
    hash.

    Args:
        path: A run folder, its checkpoints/ folder, or one step's folder in it.
        data_folder: Where the run's data lies now; None takes the folder that the run names.
        device: None takes a GPU if there is one.

    Raises:
        ConfigError: no such device here.
        CheckpointError: nothing to load there, or damaged, or of another shape than its own config says.
        DataError: the data folder is gone, or holds another tokenizer than the run was trained with.
    """
    where = _pick_device(device)
    reader, run_folder = _open_checkpoint(path)
    folder = _find_data(reader, run_folder) if data_folder is None else data_folder
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / manifest.tokenizer.path)
    expected = reader.state["tokenizer_fingerprint"]
    if tokenizer.fingerprint != expected:
        raise DataError(
            f"{reader.path} was trained with the tokenizer of fingerprint {expected}, and {folder} holds "
            f"{tokenizer.fingerprint}; give the data folder of that run as data_folder=FOLDER"
        )
    return Restored(
        model=_read_weights(reader, device=where, precision=precision),
        tokenizer=tokenizer,
        checkpoint=reader.path,
        run_folder=run_folder,
        step=reader.step,
        state=reader.state,
        data_folder=folder,
        manifest=manifest,
    )


def load_weights(
    path: Place, *, device: str | None = None, precision: Precision = Precision.fp32
) -> tuple[Transformer, CheckpointReader]:
    """Like `load_transformer`, without tokenizer and data."""
    where = _pick_device(device)
    reader, _ = _open_checkpoint(path)
    return _read_weights(reader, device=where, precision=precision), reader


def _open_checkpoint(path: Place) -> tuple[CheckpointReader, Path | None]:
    if isinstance(path, Path) and not path.is_dir():
        raise CheckpointError(f"no folder {path}; give checkpoint=RUN_FOLDER, as in checkpoint=runs/demo")
    if STEP_NAME.fullmatch(path.name):
        reader = CheckpointReader(path)
        reader.verify()
        return reader, _run_of(path.absolute().parent) if isinstance(path, Path) else None
    checkpoints = checkpoints_of(path)
    newest = newest_checkpoint(checkpoints)
    if newest is None:
        raise CheckpointError(f"no finished checkpoint in {checkpoints}; has the run saved one yet?")
    if not isinstance(path, Path):
        return CheckpointReader(newest), None
    return CheckpointReader(newest), path if checkpoints != path else _run_of(path)


def _run_of(checkpoints: Path) -> Path | None:
    return checkpoints.parent if checkpoints.name == "checkpoints" else None


def _find_data(reader: CheckpointReader, run_folder: Path | None) -> Path:
    try:
        return data_folder_of(Path(reader.state["data_folder"]), run_folder)
    except DataError as error:
        raise DataError(
            f"{error}; it is needed for the tokenizer: give its place as data_folder=FOLDER"
        ) from None


def _pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device={name} cannot be used: {reason}; set device=cpu or leave it out"
        ) from error
    return device


def _read_weights(reader: CheckpointReader, *, device: torch.device, precision: Precision) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**reader.state["model"]))
    reader.require({name: weight.shape for name, weight in model.named_parameters()}, kinds=["weight"])
    dtype = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[precision]
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.from_numpy(reader.read("weight", name)))
    return model
