"""Saving while training goes on: the state is copied to host memory, and a thread writes the copy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Elsewhere, Piece
from llmtrain.checkpoint.storage import Place
from llmtrain.checkpoint.write import Ranks, save_checkpoint
from llmtrain.errors import CheckpointError
from llmtrain.units import format_bytes

log = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes: of every piece in a buffer."""
PAGE_BYTES = 4096
COPY_THREADS = 4
"""One does not fill a memory bus."""
COPY_BYTES = 16 << 20
"""That one of them copies at once."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk, or a snapshot in memory."""

    step: int
    save_s: float
    """From the call to the commit."""
    wait_s: float
    """Of them, training waited for the checkpoint before to be written."""
    copy_s: float
    """And for its own state to be copied; without a background, for all of it."""
    in_memory: bool = False
    """No: a snapshot that lives as long as the host."""


class Saver:
    """One a rank. All ranks save the same steps; each writes its own pieces."""

    def __init__(
        self,
        folder: Place,
        ranks: Ranks,
        config: SaveConfig,
        *,
        memory: tuple[Place, Ranks] | None = None,
        allocate: Callable[[int], NDArray[np.uint8]] = lambda num_bytes: np.empty(num_bytes, np.uint8),
    ) -> None:
        """
        Args:
            ranks: how they talk. With `in_background` a thread does: over a group that nobody else uses.
            memory: where snapshots go that only live as long as the host, and who shares that folder.
            allocate: so many bytes of host memory for copies of the state.
        """
        self._folder = folder
        self._ranks = ranks
        self._config = config
        self._allocate = allocate
        self._buffer = np.empty(0, np.uint8)
        self.has_memory = memory is not None
        """Whether snapshots are asked for: the same on all ranks at all times."""
        self.memory = memory
        """None also after a snapshot that failed, which a rank's thread learns at its own moment."""
        self._reservation: threading.Thread | None = None
        self._copiers = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="copy")
        self._writer: threading.Thread | None = None
        self._saved: list[Saved] = []
        self.failure: CheckpointError | None = None
        """Of a save in the background, which has failed on every rank, or of `reserve` on this one."""

    def save(
        self, step: int, pieces: Iterable[Piece], state: dict[str, Any], *, in_memory: bool = False
    ) -> None:
        """Begin to save, and return when training may go on. At most one save is under way.

        Args:
            in_memory: whether to save a snapshot in memory. One that fails is told and the last: it costs
                nothing that is on the disk.

        Raises:
            CheckpointError: on every rank, if this save or, in the background, the one before has failed.
        """
        start = time.perf_counter()
        self._wait(None)
        if in_memory and self.memory is None:  # as on every rank, now that the one before is over
            return
        waited = time.perf_counter()

        def write(own: Iterable[Piece]) -> float:
            if in_memory:
                self._save_in_memory(step, own, state)
            else:
                save_checkpoint(
                    self._folder, step=step, pieces=own, state=state, ranks=self._ranks, config=self._config
                )
            return time.perf_counter()

        def note(copied: float, end: float) -> None:
            if not in_memory or self.memory is not None:
                self._saved.append(Saved(step, end - start, waited - start, copied - waited, in_memory))

        if not self._config.in_background:
            end = write(pieces)
            note(end, end)
            return
        copies = self._copy(pieces)
        copied = time.perf_counter()

        def run() -> None:
            try:
                note(copied, write(copies))
            except CheckpointError as error:
                self.failure = error
            except Exception as error:  # of the ranks' talk: one that died, or a time that ran out
                self.failure = CheckpointError(f"could not save step {step}: {type(error).__name__}: {error}")

        # a daemon: a disk that never answers must not keep the process from ending
        self._writer = threading.Thread(target=run, name=f"save step {step}", daemon=True)
        self._writer.start()

    def _save_in_memory(self, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        assert self.memory is not None, "the caller asks"
        (folder, ranks), newest = self.memory, SaveConfig(keep_last=1)
        try:
            save_checkpoint(folder, step=step, pieces=pieces, state=state, ranks=ranks, config=newest)
        except CheckpointError as error:  # on every rank
            self.memory = None
            if ranks.rank == 0:
                log.warning("no more snapshots in memory: %s", error)

    def finish(self) -> None:
        """Wait for the save under way, for as long as the settings allow the end of a run.

        Raises:
            CheckpointError: it has failed, or is not over.
        """
        self._wait(self._config.exit_wait_s)

    def _wait(self, limit_s: float | None) -> None:
        self.settle()
        if self._writer is not None:
            self._writer.join(limit_s)
            if self._writer.is_alive():
                self.failure = CheckpointError(
                    f"the {self._writer.name} is not over after save.exit_wait_s={limit_s:g} s; the run ends "
                    "without it, and the checkpoints before it are untouched"
                )
            self._writer = None
        if self.failure is not None:
            raise self.failure

    def leave(self) -> None:
        """Wait for the save under way, on the way out of a run that has another error to tell."""
        with suppress(CheckpointError):
            self.finish()

    def take_saved(self) -> list[Saved]:
        """Those on the disk since the last call."""
        saved = []
        while self._saved:  # the writer may add one meanwhile
            saved.append(self._saved.pop(0))
        return saved

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Begin to get the memory for copies of `pieces`, which takes longer than copying does: pages are
        found, and pinned for a GPU."""
        if self._config.in_background:
            offsets = _offsets(list(pieces))

            def get() -> None:
                try:
                    self._buffer = self._allocate(int(offsets[-1]))
                    self._buffer[::PAGE_BYTES] = 0
                except Exception as error:  # of whoever allocates: numpy, torch, CUDA
                    self.failure = CheckpointError(
                        f"no {format_bytes(int(offsets[-1]))} of host memory for copies of this rank's "
                        f"state: {type(error).__name__}: {error}; save.in_background=false needs none"
                    )

            self._reservation = threading.Thread(target=get, name="first host memory", daemon=True)
            self._reservation.start()

    def settle(self) -> None:
        """Wait for `reserve`: whether it has failed, here alone, is in `failure` then."""
        if self._reservation is not None:
            self._reservation.join()
            self._reservation = None

    def _copy(self, pieces: Iterable[Piece]) -> list[Piece]:
        """`pieces` with values of their own, in one buffer that is used again."""
        own = list(pieces)
        offsets = _offsets(own)
        if self._buffer.nbytes < offsets[-1]:
            self._buffer = self._allocate(int(offsets[-1]))
        copies = []
        parts: list[tuple[NDArray[Any], NDArray[Any] | Elsewhere]] = []
        for piece, offset in zip(own, offsets[:-1].tolist(), strict=True):
            into = self._buffer[offset : offset + piece.values.nbytes].view(piece.values.dtype)
            at_once = max(1, COPY_BYTES // piece.values.itemsize)
            cuts = range(0, into.size, at_once)
            parts += [(into[at : at + at_once], piece.values[at : at + at_once]) for at in cuts]
            copies.append(replace(piece, values=into))
        list(self._copiers.map(_copy_part, parts))
        return copies


def _offsets(pieces: list[Piece]) -> NDArray[np.int64]:
    """Where each begins in a buffer, and where the last ends."""
    sizes = [-(-piece.values.nbytes // ALIGNMENT) * ALIGNMENT for piece in pieces]
    return np.cumsum([0, *sizes], dtype=np.int64)


def _copy_part(part: tuple[NDArray[Any], NDArray[Any] | Elsewhere]) -> None:
    into, values = part
    if isinstance(values, np.ndarray):
        np.copyto(into, values)
    else:
        values.copy_into(into)
