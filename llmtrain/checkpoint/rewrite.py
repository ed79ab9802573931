"""Other checkpoints out of checkpoints, tensor by tensor: in another number of files, in one, or their mean.

Memory is that of one tensor. Each is read whole, so that the hash of every byte is compared on the way, and
is handed to the writer in as many parts as there are files that take one. The result is a checkpoint like any
other, saved as one transaction; its state says under `made_by` what it was made of.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain import files
from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import checkpoint_path, checkpoints_of, list_checkpoints
from llmtrain.checkpoint.format import MARKER_FILE, STEP_NAME, UNFINISHED_FILE, Elsewhere, Piece
from llmtrain.checkpoint.inspect import find
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place, Url
from llmtrain.checkpoint.write import write_checkpoint
from llmtrain.errors import CheckpointError, ConfigError, unknown_name
from llmtrain.progress import progress
from llmtrain.units import format_bytes

MEAN_ELEMENTS = 1 << 18
"""Summed at once, in float64."""
ALL_KINDS = "all"
NOT_OF_A_MEAN = {"eval_loss": None, "check_loss": None}
"""What a state says of weights, and a mean of weights does not have."""
SAME_FOR_A_MEAN = ("model", "tokenizer_fingerprint")
"""What the states of checkpoints must agree on: else the mean is of no model."""


@dataclass(frozen=True)
class Tensor:
    """A whole one, of a checkpoint to be written."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


Fill = Callable[[Tensor, NDArray[Any]], None]
"""Fill the 1-D array with all of a tensor, flattened."""


@dataclass(frozen=True)
class Made:
    """A checkpoint that was written."""

    path: str
    step: int
    manifest_sha256: str
    num_files: int
    num_tensors: int
    num_bytes: int
    kinds: list[str]


class Later:
    """Numbers that are asked for when they are written: `checkpoint.format.Elsewhere`."""

    ndim = 1

    def __init__(self, size: int, dtype: np.dtype[Any], get: Callable[[], NDArray[Any]]) -> None:
        self.size = size
        self.dtype = dtype
        self.itemsize = dtype.itemsize
        self.nbytes = size * dtype.itemsize
        self._get = get

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._get()

    def __getitem__(self, part: slice) -> Elsewhere:
        return Later(len(range(*part.indices(self.size))), self.dtype, lambda: self._get()[part])

    def copy_into(self, into: NDArray[Any]) -> None:
        into[:] = self._get()


# -- what is asked for


def reshard(path: Place, out: Place, *, num_files: int) -> Made:
    """The same tensors and state in `num_files` files of as many bytes each, to within an element.

    Raises:
        ConfigError: a number of files that cannot be, or an `out` that something lies in.
        CheckpointError: no checkpoint there, a damaged one, or `out` could not be written.
    """
    return _copy("reshard", path, out, num_files=num_files, kinds=ALL_KINDS)


def merge(path: Place, out: Place, *, kinds: str) -> Made:
    """One file with whole tensors, which any reader of safetensors finds in their shapes.

    Args:
        kinds: one kind, as `weight`; `all`: every kind that is there.

    Raises:
        ConfigError: a kind that is not there, or an `out` that something lies in.
        CheckpointError: as `reshard`.
    """
    return _copy("merge", path, out, num_files=1, kinds=kinds)


def average(paths: Sequence[Place], out: Place, *, weights: Sequence[float] | None) -> Made:
    """The mean of the weights of several checkpoints of one model, summed in float64; no optimizer state.

    Its state is that of the newest, without the losses that were measured there.

    Args:
        weights: of each; what counts is their proportion. None: all alike.

    Raises:
        ConfigError: fewer than two, one twice, `weights` that make no mean, or an `out` that something lies
            in.
        CheckpointError: models or tensors that differ, a damaged checkpoint, numbers that are not finite, or
            `out` could not be written.
    """
    check_out(out)
    readers = [CheckpointReader(find(path)) for path in paths]
    shares = _shares(readers, weights)
    newest = max(readers, key=lambda reader: reader.step)
    tensors = tensors_of(newest, ["weight"])
    if not tensors:
        raise CheckpointError(
            f"{newest.path} has no weights, only {', '.join(newest.kinds)}; a mean is of weights"
        )
    for reader in readers:
        _check_alike(newest, reader, tensors)
    sources = [
        source_of(reader) | {"weight": share} for reader, share in zip(readers, shares.tolist(), strict=True)
    ]
    verify_all(readers)
    return write_tensors(
        out,
        step=newest.step,
        tensors=tensors,
        fill=partial(_fill_mean, readers=readers, shares=shares),
        num_files=1,
        state=newest.state | NOT_OF_A_MEAN | made_by("average", sources),
        title="average",
    )


def newest_of(path: Place, last: int) -> list[Place]:
    """The `last` newest checkpoints of a run folder or a folder of checkpoints, oldest first.

    Raises:
        CheckpointError: there are not so many.
    """
    folder = checkpoints_of(path)
    steps = list_checkpoints(folder)
    if not 2 <= last <= len(steps):
        held = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
        raise CheckpointError(
            f"last={last}, and {folder} holds {held}; a mean takes at least 2 and at most what is there"
        )
    return [checkpoint_path(folder, step) for step in steps[-last:]]


def _copy(command: str, path: Place, out: Place, *, num_files: int, kinds: str) -> Made:
    check_out(out)
    reader = CheckpointReader(find(path))
    if kinds != ALL_KINDS and kinds not in reader.kinds:
        raise ConfigError(f"{reader.path}: {unknown_name('kinds', kinds, [*reader.kinds, ALL_KINDS])}")

    def fill(tensor: Tensor, into: NDArray[Any]) -> None:
        reader.read_into(tensor.kind, tensor.name, 0, into)

    return write_tensors(
        out,
        step=reader.step,
        tensors=tensors_of(reader, reader.kinds if kinds == ALL_KINDS else [kinds]),
        fill=fill,
        num_files=num_files,
        state=reader.state | made_by(command, [source_of(reader)], before=reader.state.get("made_by")),
        title=command,
    )


# -- how it is written


def write_tensors(
    out: Place,
    *,
    step: int,
    tensors: Sequence[Tensor],
    fill: Fill,
    num_files: int,
    state: dict[str, Any],
    title: str,
) -> Made:
    """Write a checkpoint in `out` whose tensors are filled one after the other.

    Raises:
        ConfigError: a number of files that cannot be.
        CheckpointError: `fill` has failed, or the disk.
    """
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    check_space(out, num_bytes)
    plan = spread(tensors, num_files)
    with progress(title, total=num_bytes, unit="B") as advance:
        whole = _Whole(fill, max((tensor.num_bytes for tensor in tensors), default=0))

        def get(tensor: Tensor, start: int, length: int) -> NDArray[Any]:
            advance(length * tensor.dtype.itemsize)
            return whole.part(tensor, start, length)

        def pieces(cuts: Sequence[Cut]) -> Iterable[Piece]:
            for tensor, start, length in cuts:
                later = Later(length, tensor.dtype, partial(get, tensor, start, length))
                yield Piece(tensor.kind, tensor.name, tensor.shape, start, later)

        path = write_checkpoint(
            out,
            step=step,
            files=[pieces(cuts) for cuts in plan],
            state=state,
            config=SaveConfig(keep_last=1 << 30),
        )
    reader = CheckpointReader(path)
    return Made(
        path=str(path),
        step=step,
        manifest_sha256=reader.manifest_hash,
        num_files=num_files,
        num_tensors=len(tensors),
        num_bytes=reader.num_bytes,
        kinds=reader.kinds,
    )


class _Whole:
    """The tensor that was asked for last, whole, in memory that the next one takes over.

    So the writer must be done with one part before it asks for the next, as `write_checkpoint` is.
    """

    def __init__(self, fill: Fill, most_bytes: int) -> None:
        self._fill = fill
        self._buffer = np.empty(most_bytes, np.uint8)
        self._tensor: Tensor | None = None
        self._thread = threading.get_ident()

    def part(self, tensor: Tensor, start: int, length: int) -> NDArray[Any]:
        assert threading.get_ident() == self._thread, "two threads would share one buffer"
        values: NDArray[Any] = self._buffer[: tensor.num_bytes].view(tensor.dtype)
        if self._tensor is not tensor:
            self._tensor = None
            self._fill(tensor, values)
            self._tensor = tensor
        return values[start : start + length]


Cut = tuple[Tensor, int, int]
"""A tensor, and where a part of it begins in the flattened tensor and how long it is."""


def spread(tensors: Sequence[Tensor], num_files: int) -> list[list[Cut]]:
    """What each file holds: one after the other, cut where a file is full.

    Raises:
        ConfigError: more files than there are elements.
    """
    num_elements = sum(tensor.num_elements for tensor in tensors)
    if not 1 <= num_files <= max(1, num_elements):
        raise ConfigError(
            f"num_files={num_files} must be at least 1, and at most {num_elements:,}: the elements "
            "that there are to spread"
        )
    total = sum(tensor.num_bytes for tensor in tensors)
    plan: list[list[Cut]] = [[] for _ in range(num_files)]
    file = at = 0  # the file that is being filled, and bytes before the tensor
    for tensor in tensors:
        start = 0
        while True:
            border = total * (file + 1) // num_files
            room = -((at - border) // tensor.dtype.itemsize)  # elements that begin before the border
            end = tensor.num_elements if file == num_files - 1 else min(tensor.num_elements, room)
            end = max(start, end)
            if start < end or not tensor.num_elements:
                plan[file].append((tensor, start, end - start))
            start = end
            if start == tensor.num_elements:
                break
            file += 1
        at += tensor.num_bytes
    return plan


def tensors_of(reader: CheckpointReader, kinds: Iterable[str]) -> list[Tensor]:
    return [
        Tensor(kind, name, shape, reader.dtype(kind, name))
        for kind in kinds
        for name, shape in reader.shapes(kind).items()
    ]


def verify_all(readers: Sequence[CheckpointReader]) -> None:
    """Compare every byte with its hash, for what is then read in parts, which have none.

    Raises:
        CheckpointError: the first that differs.
    """
    with progress("verify", total=sum(reader.num_bytes for reader in readers), unit="B") as advance:
        for reader in readers:
            for at, (_, num_bytes, _) in enumerate(reader.files()):
                for problem in reader.problems_of(at):
                    raise CheckpointError(problem)
                advance(num_bytes)


# -- checks and notes


def check_out(out: Place) -> None:
    """A folder of its own: nothing lies in it but what a killed command has left.

    Raises:
        ConfigError: it is no such folder.
    """
    parts = out.text.split("/") if isinstance(out, Url) else out.absolute().parts
    if any(STEP_NAME.fullmatch(part) for part in parts):
        raise ConfigError(f"out={out} is in or is the folder of one step; name one that holds such folders")
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder that is not there yet")
    there = [name for name in storage.names(out) if not name.startswith(".") and not _is_left(out, name)]
    if there:
        raise ConfigError(
            f"out={out} holds {', '.join(there[:4])}{', ...' if len(there) > 4 else ''}; name a folder that "
            "is empty or not there yet"
        )


def _is_left(out: Place, name: str) -> bool:
    """Whether it is a step's folder without a checkpoint: of a save that was killed. The next removes it."""
    if not STEP_NAME.fullmatch(name):
        return False
    inside = [each for each in storage.names(out / name) if not each.startswith(".")]
    return not inside or (UNFINISHED_FILE in inside and MARKER_FILE not in inside)


def check_space(out: Place, num_bytes: int) -> None:
    """Raise CheckpointError if the disk of `out` does not have so much left."""
    if isinstance(out, Path) and (free := files.free_bytes(out)) < num_bytes:
        raise CheckpointError(
            f"out={out} needs {format_bytes(num_bytes)}, and {format_bytes(free)} are free there; make room, "
            "or name a folder on another disk"
        )


def source_of(reader: CheckpointReader) -> dict[str, Any]:
    return {
        "checkpoint": str(reader.path),
        "step": reader.step,
        "manifest_sha256": reader.manifest_hash,
    }


def made_by(
    command: str, sources: list[dict[str, Any]], *, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The note of a state: which command, from which checkpoints, and what these were made by."""
    note = {"command": f"checkpoint {command}", "sources": sources}
    return {"made_by": note if before is None else note | {"before": dict(before)}}


# -- the mean


def _shares(readers: Sequence[CheckpointReader], weights: Sequence[float] | None) -> NDArray[np.float64]:
    if len(readers) < 2:
        raise ConfigError(
            f"a mean of {len(readers)} checkpoint is none; name at least two, as in paths=[A,B]"
        )
    for at, reader in enumerate(readers):
        for earlier in readers[:at]:
            if reader.manifest_hash == earlier.manifest_hash:
                raise ConfigError(
                    f"{reader.path} and {earlier.path} are the same checkpoint; to let one count "
                    "more, set weights"
                )
    shares = np.ones(len(readers)) if weights is None else np.array(weights, np.float64)
    if len(shares) != len(readers):
        raise ConfigError(
            f"weights has {len(shares)} numbers for {len(readers)} checkpoints; give one for each"
        )
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ConfigError(f"weights={shares.tolist()} must not be negative, nor all of them 0")
    return shares


def _check_alike(one: CheckpointReader, other: CheckpointReader, tensors: Sequence[Tensor]) -> None:
    """Raise CheckpointError that names the first difference of two models."""
    both = f"{one.path} and {other.path} are not of one model"
    for key in SAME_FOR_A_MEAN:
        mine, theirs = (files.flatten(reader.state.get(key), key) for reader in (one, other))
        for name in dict.fromkeys([*mine, *theirs]):
            if mine.get(name) != theirs.get(name):
                raise CheckpointError(f"{both}: {name} is {mine.get(name)} and {theirs.get(name)}")
    shapes = other.shapes("weight")
    if extra := sorted(shapes.keys() - {tensor.name for tensor in tensors}):
        raise CheckpointError(f"{both}: only the second has {extra[0]}")
    for tensor in tensors:
        if tensor.name not in shapes:
            raise CheckpointError(f"{both}: only the first has {tensor.name}")
        if shapes[tensor.name] != tensor.shape:
            raise CheckpointError(
                f"{both}: {tensor.name} has shape {list(tensor.shape)} and {list(shapes[tensor.name])}"
            )
        if tensor.dtype.kind != "f" or (found := other.dtype("weight", tensor.name)) != tensor.dtype:
            types = tensor.dtype if tensor.dtype.kind != "f" else f"{tensor.dtype} and {found}"
            raise CheckpointError(f"{both}: {tensor.name} is of type {types}; need one kind of float")


def _fill_mean(
    tensor: Tensor, into: NDArray[Any], *, readers: Sequence[CheckpointReader], shares: NDArray[np.float64]
) -> None:
    for start in range(0, into.size, MEAN_ELEMENTS):
        part = into[start : start + MEAN_ELEMENTS]
        total = np.zeros(part.size, np.float64)
        for reader, share in zip(readers, shares, strict=True):
            total += share * reader.read_flat("weight", tensor.name, start, part.size).astype(np.float64)
        part[:] = total / shares.sum()  # after the sum: the mean of equal numbers is that number
        if not np.isfinite(part).all():
            at = start + int(np.argmin(np.isfinite(part)))
            raise CheckpointError(
                f"the mean of weight {tensor.name} is {into[at]} at element {at}; leave out the checkpoint "
                "that is not finite there"
            )
