"""Batches for one rank: its rows are arithmetic on the run's position, so any layout reads the same rows.

The step that begins at position p consumes rows p .. p + global_batch_rows - 1 of the order. Data-parallel
rank r takes the r-th of dp_size equal parts, micro batch by micro batch. Nothing else is state: a resumed
run needs p alone, and may change dp_size and micro_batch_rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.loader.dataset import NO_TARGET, Row, Rows
from llmtrain.loader.order import rows_at

NO_ROW = -1
"""In `Batch.rows`: a row that only fills up the batch, all of it masked."""


CLOSE_TIMEOUT_S = 10.0
"""A read that hangs longer, on a file system that went away, is left to its fate."""


@dataclass(frozen=True)
class Batch:
    """What one rank feeds to one forward."""

    tokens_BS: Tensor
    """int64."""
    targets_BS: Tensor
    """int64; -100 where there is no target."""
    positions_BS: Tensor
    """int64; from 0 in each segment."""
    segments_BS: Tensor
    """int32; tokens of one row attend to each other only inside a segment. Padding has its own."""
    num_valid: int
    """Targets that count."""
    rows: npt.NDArray[np.int64]
    """Row numbers in the pack, or NO_ROW."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens_BS=self.tokens_BS.to(device, non_blocking=True),
            targets_BS=self.targets_BS.to(device, non_blocking=True),
            positions_BS=self.positions_BS.to(device, non_blocking=True),
            segments_BS=self.segments_BS.to(device, non_blocking=True),
        )


class Batches:
    """This rank's micro batches of every step, and of the held-out rows.

    While a step computes, a thread reads the next one; an error in it is raised by the call that asks for
    that step. Call `close` before the process ends: a thread that is still inside torch when the interpreter
    goes aborts the process.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        dp_rank: int,
        dp_size: int,
        prefetch: bool = True,
    ) -> None:
        check_split(global_batch_rows=global_batch_rows, micro_batch_rows=micro_batch_rows, dp_size=dp_size)
        assert 0 <= dp_rank < dp_size, f"{dp_rank=} is outside {dp_size=}"
        self.rows = rows
        self.seed = seed
        self.global_batch_rows = global_batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.prefetch = prefetch
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._thread: threading.Thread | None = None

    def micro_batches(self, position: int) -> list[Batch]:
        """This rank's micro batches of the step that begins at row `position`, in their order.

        Raises:
            DataError: A shard is missing or damaged; the message names the row and the file.
        """
        ready, self._next = self._next, None
        batches = ready[1].result() if ready is not None and ready[0] == position else self._read(position)
        if self.prefetch:
            self._next = self._read_in_background(position + self.global_batch_rows)
        return batches

    def _read(self, position: int) -> list[Batch]:
        per_rank = self.global_batch_rows // self.dp_size
        first = position + self.dp_rank * per_rank
        rows = self._order(np.arange(first, first + per_rank))
        return [
            _to_batch(self.rows.read_many(part), part) for part in rows.reshape(-1, self.micro_batch_rows)
        ]

    def _order(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return rows_at(positions, num_rows=self.rows.num_rows, seed=self.seed, pack_hash=self.rows.hash)

    def _read_in_background(self, position: int) -> tuple[int, Future[list[Batch]]]:
        future: Future[list[Batch]] = Future()

        def run() -> None:
            try:
                future.set_result(self._read(position))
            except Exception as error:  # raised where the result is asked for
                future.set_exception(error)

        self._thread = threading.Thread(target=run, name=f"read rows from {position}", daemon=True)
        self._thread.start()
        return position, future

    def close(self) -> None:
        """Wait for the read that is under way, and forget it."""
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_TIMEOUT_S)
        self._thread = self._next = None


def check_split(*, global_batch_rows: int, micro_batch_rows: int, dp_size: int) -> None:
    """Raise ConfigError unless the global batch is a whole number of micro batches on every rank."""
    rows_at_once = micro_batch_rows * dp_size
    if min(global_batch_rows, micro_batch_rows, dp_size) < 1 or global_batch_rows % rows_at_once:
        raise ConfigError(
            f"train.global_batch_rows={global_batch_rows} is not a positive multiple of "
            f"train.micro_batch_rows times data-parallel ranks, "
            f"{micro_batch_rows} * {dp_size} = {rows_at_once}; change one of them"
        )


def held_out_batches(
    rows: Rows, *, micro_batch_rows: int, dp_rank: int, dp_size: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's part of `max_rows` rows spread evenly over the split (None: all of it), in order.

    Spread, because neighbours are pieces of the same few documents. Each row is on one rank only.

    Every rank gets the same number of batches of the same shape, so collectives in the forward stay in
    step: where the rows run out, rows that are masked as a whole fill up.
    """
    num_rows = rows.num_rows if max_rows is None else min(max_rows, rows.num_rows)
    rows_at_once = micro_batch_rows * dp_size
    for first in range(0, num_rows, rows_at_once):
        numbers = first + dp_rank * micro_batch_rows + np.arange(micro_batch_rows)
        is_real = numbers < num_rows
        chosen = np.minimum(numbers, num_rows - 1) * rows.num_rows // max(1, num_rows)
        block = rows.read_many(chosen)
        block.targets[~is_real] = NO_TARGET
        yield _to_batch(block, np.where(is_real, chosen, NO_ROW))


def _to_batch(block: Row, rows: npt.NDArray[np.int64]) -> Batch:
    return Batch(
        tokens_BS=torch.from_numpy(block.tokens),
        targets_BS=torch.from_numpy(block.targets),
        positions_BS=torch.from_numpy(block.positions),
        segments_BS=torch.from_numpy(block.segments),
        num_valid=int((block.targets != NO_TARGET).sum()),
        rows=rows,
    )
