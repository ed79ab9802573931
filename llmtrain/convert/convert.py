"""Checkpoints to formats of others and back. What is of no format lies here: names, state, whole folders.

A converted checkpoint keeps our names and orientation of weights, and has the state of the run beside it in
llmtrain_state.json. With that file everything comes back, optimizer and position too. A checkpoint that lacks
it was written by another program: its weights are taken, and the state is that of a checkpoint of ours
(`like`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain import files
from llmtrain.checkpoint import storage
from llmtrain.checkpoint.format import some
from llmtrain.checkpoint.inspect import find
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.rewrite import (
    NOT_OF_A_MEAN,
    Made,
    Tensor,
    check_out,
    check_space,
    made_by,
    source_of,
    tensors_of,
    write_tensors,
)
from llmtrain.checkpoint.storage import Place
from llmtrain.convert import deepspeed_universal, torch_dcp
from llmtrain.convert.foreign import Foreign, Key
from llmtrain.errors import CheckpointError, ConfigError, LaunchError, LLMTrainError
from llmtrain.files import FolderLock
from llmtrain.progress import progress

STATE_NAME = "llmtrain_state.json"
STATE_FORMAT = "llmtrain state"
STATE_VERSION = 1


class Format(Enum):
    llmtrain = "llmtrain"
    torch_dcp = "torch_dcp"
    """torch.distributed.checkpoint."""
    deepspeed_universal = "deepspeed_universal"
    """What DeepSpeed's ds_to_universal writes and `load_universal` reads."""


WRITERS = {
    Format.torch_dcp: torch_dcp.write,
    Format.deepspeed_universal: deepspeed_universal.write,
}
OPENERS = {
    Format.torch_dcp: torch_dcp.open_foreign,
    Format.deepspeed_universal: deepspeed_universal.open_foreign,
}


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written in a format of others."""

    path: str
    step: int
    num_tensors: int
    num_bytes: int
    kinds: list[str]


def export(path: Place, out: Path, *, to: Format) -> Exported:
    """Write a checkpoint of ours as one of another program. `out` is there whole or not at all.

    Raises:
        ConfigError: an `out` that something lies in.
        CheckpointError: no checkpoint there, a damaged one, or `out` could not be written.
    """
    check_out(out)
    if storage.names(out):
        raise ConfigError(f"out={out} is not empty; name a folder that is not there yet")
    reader = CheckpointReader(find(path))
    tensors = tensors_of(reader, reader.kinds)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    check_space(out, num_bytes)
    note: dict[str, Any] = {
        "format": STATE_FORMAT,
        "format_version": STATE_VERSION,
        "step": reader.step,
        "state": reader.state
        | made_by(f"convert to={to.name}", [source_of(reader)], before=reader.state.get("made_by")),
        "tensors": {kind: {} for kind in reader.kinds},
    }
    # Of the tensor on its way: a writer is done with one before it asks for the next.
    buffer = np.empty(max((tensor.num_bytes for tensor in tensors), default=0), np.uint8)
    try:
        with progress("convert", total=num_bytes, unit="B") as advance, _whole_folder(out) as unfinished:

            def read(tensor: Tensor) -> NDArray[Any]:
                values: NDArray[Any] = buffer[: tensor.num_bytes].view(tensor.dtype)
                reader.read_into(tensor.kind, tensor.name, 0, values)
                advance(tensor.num_bytes)
                note["tensors"][tensor.kind][tensor.name] = {
                    "shape": [*tensor.shape],
                    "xxh3_128": _hash(values),
                }
                return values.reshape(tensor.shape)

            num_updates = reader.state.get("num_optimizer_steps", 0)
            WRITERS[to](unfinished, tensors, read, step=reader.step, num_updates=num_updates)
            files.write_json(unfinished / STATE_NAME, note | {"sha256": files.hash_json(note)})
    except LLMTrainError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer tells of a full disk by either
        raise CheckpointError(f"could not write {out}: {error}; nothing is left of it") from error
    return Exported(str(out), reader.step, len(tensors), num_bytes, reader.kinds)


def import_(
    path: Path,
    out: Place,
    *,
    source_format: Format,
    like: Place | None = None,
    prefix: str | None = None,
    trust_pickle: bool = False,
    num_files: int = 1,
) -> Made:
    """Write what another program has saved as a checkpoint of ours.

    Args:
        like: a checkpoint of ours, of the same model, whose state the new one takes; needed where `path` has
            no llmtrain_state.json. Then only weights are taken.
        prefix: what stands before the name of a weight in torch_dcp; None tries `model.` and nothing.
        trust_pickle: whether files may run code of their authors where they hold more than numbers.

    Raises:
        ConfigError: a setting that is missing or has no effect, or an `out` that something lies in.
        CheckpointError: tensors that are missing, not of this model or damaged, or `out` could not be
            written.
    """
    check_out(out)
    expected = _expected(path, like)
    foreign = OPENERS[source_format](path, prefix=prefix, trust_pickle=trust_pickle)
    tensors = _matched(path, foreign, expected.shapes)
    origin: dict[str, Any] = {"checkpoint": str(path), "format": source_format.name}

    def fill(tensor: Tensor, into: NDArray[Any]) -> None:
        key = (tensor.kind, tensor.name)
        foreign.fill(key, into)
        if expected.hashes is not None and _hash(into) != expected.hashes[key]:
            raise CheckpointError(
                f"{path}: {' '.join(key)} does not have the numbers that llmtrain wrote: it is damaged, or "
                f"was changed, and then {STATE_NAME} beside it is not its state; to take the weights all the "
                "same, delete that file and name like=RUN"
            )

    return write_tensors(
        out,
        step=expected.step,
        tensors=tensors,
        fill=fill,
        num_files=num_files,
        state=expected.state
        | made_by(
            f"convert source_format={source_format.name}",
            [origin, *expected.sources],
            before=expected.state.get("made_by"),
        ),
        title="convert",
    )


@dataclass(frozen=True)
class _Expected:
    shapes: dict[Key, tuple[int, ...]]
    step: int
    state: dict[str, Any]
    sources: list[dict[str, Any]]
    """Where the state is from."""
    hashes: dict[Key, str] | None
    """xxh3_128 of every tensor, where llmtrain wrote it."""


def _expected(path: Path, like: Place | None) -> _Expected:
    told = path / STATE_NAME
    if told.exists() and like is not None:
        raise ConfigError(
            f"{told} says everything that like={like} would; leave like out, or delete that file"
        )
    if like is not None:
        reader = CheckpointReader(find(like))
        shapes = {("weight", name): shape for name, shape in reader.shapes("weight").items()}
        state = {key: value for key, value in reader.state.items() if key != "made_by"} | NOT_OF_A_MEAN
        return _Expected(shapes, reader.step, state, [source_of(reader)], None)
    if not told.exists():
        raise ConfigError(
            f"{path} has no {STATE_NAME}, so llmtrain did not write it; name a checkpoint of the same model, "
            "whose configuration it shall have, as like=RUN"
        )
    note = _read_note(told)
    if note.get("format") != STATE_FORMAT or note.get("format_version") != STATE_VERSION:
        raise CheckpointError(
            f"{told} has format={note.get('format')} format_version={note.get('format_version')}, and this "
            f"llmtrain reads {STATE_FORMAT} {STATE_VERSION}"
        )
    tensors = {
        (kind, name): tensor for kind, by_name in note["tensors"].items() for name, tensor in by_name.items()
    }
    return _Expected(
        shapes={key: tuple(tensor["shape"]) for key, tensor in tensors.items()},
        step=note["step"],
        state=note["state"],
        sources=[],
        hashes={key: tensor["xxh3_128"] for key, tensor in tensors.items()},
    )


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = files.read_json(path)
        told = note.pop("sha256", None)
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if told != files.hash_json(note):
        raise CheckpointError(
            f"{path} has sha256 {files.hash_json(note)} without its own, and says {told}: it is damaged, or "
            "was changed; to take the weights all the same, delete it and name like=RUN"
        )
    return note


def _hash(values: NDArray[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(values.view(np.uint8).data)


def _matched(path: Path, foreign: Foreign, expected: dict[Key, tuple[int, ...]]) -> list[Tensor]:
    kinds = {kind for kind, _ in expected}
    there = {key: found for key, found in foreign.tensors.items() if key[0] in kinds}
    problems = [f"{' '.join(key)} is missing" for key in expected if key not in there]
    problems += [f"{' '.join(key)} is not part of this model" for key in there if key not in expected]
    problems += [
        f"{' '.join(key)} has shape {[*there[key].shape]}, the model needs {[*shape]}"
        for key, shape in expected.items()
        if key in there and not there[key].fits(shape)
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the model: {some(problems)}")
    return [Tensor(*key, shape, there[key].dtype) for key, shape in expected.items()]


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends without an error, else vanishes. What a
    process that was killed has left of it, the next one removes."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        with FolderLock(unfinished) as lock:
            _empty(unfinished, besides=lock.path)
            yield unfinished
            for folder in sorted({path.parent for path in unfinished.rglob("*")}):
                files.fsync_folder(folder)
            unfinished.replace(out)  # over an empty one, too
            (out / lock.path.name).unlink()  # now: before, another process could take the folder for its own
            files.fsync_folder(out.parent)
    except LaunchError:  # it is another one's
        raise
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _empty(folder: Path, *, besides: Path) -> None:
    for path in folder.iterdir():
        if path != besides:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
