"""Numbers on their way between an engine's memory and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from llmtrain.checkpoint.format import FlatSource, Piece
from llmtrain.errors import CheckpointError

FILL_THREADS = 4


class OnDevice:
    """An fp32 tensor on a GPU, for a checkpoint: `checkpoint.format.Elsewhere`."""

    ndim, dtype, itemsize = 1, np.dtype(np.float32), 4

    def __init__(self, held: torch.Tensor) -> None:
        self._held = held
        self.size = held.numel()
        self.nbytes = self.itemsize * self.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = self._held.cpu().numpy()
        return array

    def __getitem__(self, part: slice) -> OnDevice:
        return OnDevice(self._held[part])

    def copy_into(self, into: np.ndarray[Any, Any]) -> None:
        torch.from_numpy(into).copy_(self._held)


def host_memory(num_bytes: int, *, device: torch.device) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Where copies of a state on `device` go: pinned for a GPU, which then writes there without a detour."""
    buffer: np.ndarray[Any, np.dtype[np.uint8]] = torch.empty(
        num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda"
    ).numpy()
    return buffer


def for_checkpoint(held: torch.Tensor) -> np.ndarray[Any, Any] | OnDevice:
    """The numbers of a 1-D tensor, in fp32, copied as late as can be."""
    held = held.detach().float()
    return held.numpy() if held.device.type == "cpu" else OnDevice(held)


class CountedSource:
    """A FlatSource that remembers what it has filled: no weight stays as it was in silence."""

    def __init__(self, source: FlatSource) -> None:
        self._source = source
        self._filled: dict[tuple[str, str], list[tuple[int, int]]] = {}

    def __call__(self, kind: str, name: str, start: int, into: np.ndarray[Any, Any]) -> None:
        self._source(kind, name, start, into)
        self._filled.setdefault((kind, name), []).append((start, start + into.size))

    def count(self, pieces: Iterable[Piece]) -> dict[str, int]:
        """Elements by kind of `pieces`, this rank's.

        Raises:
            CheckpointError: one of them was not filled.
        """
        counts: dict[str, int] = {}
        for piece in pieces:
            end = piece.start + piece.values.size
            ranges = self._filled.get((piece.kind, piece.name), [])
            if not any(first <= piece.start and end <= last for first, last in ranges):
                raise CheckpointError(
                    f"{piece.kind} {piece.name}[{piece.start}:{end}] was not loaded: a fault in llmtrain, "
                    "which stops here rather than train with what was there before"
                )
            counts[piece.kind] = counts.get(piece.kind, 0) + piece.values.size
        return counts


def fill(held: torch.Tensor, source: FlatSource, kind: str, name: str, start: int) -> None:
    """Fill a 1-D fp32 tensor, in place where it lies in host memory."""
    held = held.detach()
    if held.device.type == "cpu" and held.is_contiguous():
        source(kind, name, start, held.numpy())
    else:
        values = np.empty(held.numel(), np.float32)
        source(kind, name, start, values)
        held.copy_(torch.from_numpy(values))


def fill_all(fragments: Iterable[tuple[str, str, int, torch.Tensor]], source: FlatSource) -> None:
    """`fill` each (kind, name, start, held), several at once: one thread neither reads nor hashes as fast as
    memory takes it."""
    with ThreadPoolExecutor(FILL_THREADS) as pool:
        for _ in pool.map(lambda f: fill(f[3], source, *f[:3]), fragments):
            pass
