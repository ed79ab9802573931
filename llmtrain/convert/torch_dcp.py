"""Checkpoints of torch.distributed.checkpoint (DCP), in one process and without a process group.

Keys are those of `{"model": {name: ...}, "optim": {"state": {name: {"step": ..., "exp_avg": ...}}}}`, so that
`dcp.load` fills such a dictionary: `model.<name>`, `optim.state.<name>.<kind>`.

DCP's list of contents, `.metadata`, is a pickle. It is read by an unpickler that knows nothing but the
classes that DCP itself puts there; the tensors are read with weights_only.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llmtrain.checkpoint.rewrite import Tensor
from llmtrain.convert.foreign import Foreign, Found, Key, Read, numpy_type
from llmtrain.errors import CheckpointError, ConfigError

METADATA = ".metadata"
MODEL, OPTIM = "model", "optim.state"
OF_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict"},
}
"""Module -> what of it `.metadata` may name, besides torch.Size and torch's types."""


def write(folder: Path, tensors: list[Tensor], read: Read, *, step: int, num_updates: int) -> None:
    """Write `tensors` below `folder`, one at a time.

    Raises:
        CheckpointError: a tensor that could not be read.
        OSError: the disk.
    """
    by_key = {_key(tensor.kind, tensor.name): tensor for tensor in tensors}
    contents: dict[str, Any] = {MODEL: {}, "optim": {"state": {}}}
    for tensor in tensors:
        # On the meta device: DCP plans with shapes and types, and asks for numbers when it writes them.
        dtype = torch.from_numpy(np.empty(0, tensor.dtype)).dtype
        planned = torch.empty(tensor.shape, dtype=dtype, device="meta")
        if tensor.kind == "weight":
            contents[MODEL][tensor.name] = planned
        else:
            of_parameter = contents["optim"]["state"].setdefault(
                tensor.name, {"step": torch.tensor(float(num_updates))}
            )
            of_parameter[tensor.kind] = planned

    class Planner(DefaultSavePlanner):
        def lookup_object(self, index: Any) -> Any:
            tensor = by_key.get(index.fqn)
            return super().lookup_object(index) if tensor is None else torch.from_numpy(read(tensor))

    # A file for each tensor: what goes into one file, DCP keeps until that is closed. Nothing is read ahead.
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1, per_thread_copy_ahead=0)
    with _alone():
        save(contents, storage_writer=writer, planner=Planner(), no_dist=True)


def open_foreign(path: Path, *, prefix: str | None, trust_pickle: bool) -> Foreign:
    """What is in the folder with .metadata: weights, and what our `write` has put beside them.

    Raises:
        ConfigError: no such checkpoint there.
        CheckpointError: a file that cannot be read, or names classes that are not DCP's and is not trusted.
    """
    if not (path / METADATA).is_file():
        raise ConfigError(f"path={path} is no checkpoint of torch_dcp: {METADATA} is not there")
    reader = _Reader(path, trust_pickle=trust_pickle)
    stored = {
        key: found
        for key, found in reader.metadata.state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata)
    }
    if prefix is None:
        prefix = f"{MODEL}." if any(key.startswith(f"{MODEL}.") for key in stored) else ""
    keys: dict[Key, str] = {}
    for stored_key in stored:
        if stored_key.startswith(f"{OPTIM}."):
            name, _, kind = stored_key.removeprefix(f"{OPTIM}.").rpartition(".")
            if kind != "step":
                keys[kind, name] = stored_key
        elif stored_key.startswith(prefix) and not stored_key.startswith("optim."):
            keys["weight", stored_key.removeprefix(prefix)] = stored_key
    tensors = {
        key: Found(tuple(found.size), numpy_type(stored_key, found.properties.dtype))
        for key, stored_key in keys.items()
        for found in [stored[stored_key]]
    }

    def fill(key: Key, into: NDArray[Any]) -> None:
        # As a float32 tensor where it is bf16 there: DCP converts while it copies.
        target = torch.from_numpy(into).view(tensors[key].shape)
        with _alone():
            load({keys[key]: target}, storage_reader=reader, no_dist=True)

    return Foreign(tensors, fill)


def _key(kind: str, name: str) -> str:
    return f"{MODEL}.{name}" if kind == "weight" else f"{OPTIM}.{name}.{kind}"


class _Reader(FileSystemReader):
    """Reads `.metadata` once, and no class that DCP does not put there."""

    def __init__(self, path: Path, *, trust_pickle: bool) -> None:
        super().__init__(path)
        with open(path / METADATA, "rb") as handle:
            try:
                loaded = (pickle.Unpickler if trust_pickle else _Unpickler)(handle).load()
            except CheckpointError as error:
                raise CheckpointError(
                    f"{path / METADATA} names {error}, which DCP does not put there; reading it could run "
                    "code of its author. If you trust it, set trust_pickle=true"
                ) from error
            except Exception as error:  # a pickle that is cut or garbled raises anything
                raise CheckpointError(
                    f"{path / METADATA} cannot be read: {type(error).__name__}: {error}"
                ) from error
        if not isinstance(loaded, Metadata):
            raise CheckpointError(f"{path / METADATA} holds a {type(loaded).__name__}, not DCP's metadata")
        self.metadata = loaded
        if getattr(self.metadata, "storage_meta", None) is None:
            self.metadata.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if of_torch or name in OF_METADATA.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"{module}.{name}")


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that there is one process, and with errors that say what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:  # which is no Exception
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointError | OSError):
            raise cause from None
        raise CheckpointError(f"torch.distributed.checkpoint: {type(cause).__name__}: {cause}") from error
