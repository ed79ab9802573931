"""Batches for one rank: its rows are arithmetic on the run's position, so any layout reads the same rows.

The step that begins at position p consumes the next `sizes.rows_at(p)` rows of the order, but for those that
the run passes over (loader/skipped.py). Data-parallel
rank r takes the r-th of dp_size equal parts, micro batch by micro batch. Nothing else is state: a resumed
run needs p alone, and may change dp_size and micro_batch_rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmtrain.errors import ConfigError, DataError, LLMTrainError
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.dataset import NO_TARGET, Row
from llmtrain.loader.ledger import MASK_64, hash_rows
from llmtrain.loader.skipped import PassedOver

GIVE_UP_POLL_S = 0.2
NOTHING = PassedOver()
NO_ROW = -1
"""In `Batch.rows`: a row that only fills up the batch, all of it masked."""


CLOSE_TIMEOUT_S = 10.0
"""A read that hangs longer, on a file system that went away, is left to its fate."""
READ_TIMEOUT_S = 1800.0
"""A read that takes longer is an error. Network file systems hang for minutes when a server fails over."""


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
    places: npt.NDArray[np.int64] | None = None
    """Of the rows in the run, from 0; None for rows outside of one, such as held-out ones."""

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU copies from while it computes."""
        return replace(
            self,
            tokens_BS=self.tokens_BS.pin_memory(),
            targets_BS=self.targets_BS.pin_memory(),
            positions_BS=self.positions_BS.pin_memory(),
            segments_BS=self.segments_BS.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens_BS=self.tokens_BS.to(device, non_blocking=True),
            targets_BS=self.targets_BS.to(device, non_blocking=True),
            positions_BS=self.positions_BS.to(device, non_blocking=True),
            segments_BS=self.segments_BS.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class StepBatches:
    """What one rank feeds to one step."""

    micro_batches: list[Batch]
    tokens_hash: int
    """Of this rank's rows; the sum over ranks, modulo 2^64, is the step's (loader/ledger.py)."""


class Order(Protocol):
    """Which row is at which position of a run."""

    def rows_at(self, positions: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]: ...

    def taken(self, position: int, passed_over: Iterable[tuple[int, int]] = ()) -> dict[str, int]: ...

    def asked_at(self, position: int) -> dict[str, float]: ...


class RowReader(Protocol):
    """What reads rows."""

    num_rows: int
    seq_len: int

    def read_many(self, rows: npt.NDArray[np.integer[Any]]) -> Row: ...


class GaveUpError(Exception):
    """A read that was under way when nobody wanted it any more."""


class Batches:
    """This rank's micro batches of every step.

    A thread reads: while a step computes, the next `prefetch_steps`. An error in it is raised, with its
    traceback, by the call that asks for that step, and so is that a read takes longer than `timeout_s`. Call
    `close` before the process ends: a thread that is still inside torch when the interpreter goes aborts the
    process.
    """

    def __init__(
        self,
        rows: RowReader,
        *,
        order: Order,
        sizes: BatchSizes,
        micro_batch_rows: int,
        dp_rank: int,
        dp_size: int,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
        timeout_s: float = READ_TIMEOUT_S,
        passed_over: PassedOver = NOTHING,
    ) -> None:
        for size in sizes.sizes:
            check_split(global_batch_rows=size, micro_batch_rows=micro_batch_rows, dp_size=dp_size)
        assert 0 <= dp_rank < dp_size, f"{dp_rank=} is outside {dp_size=}"
        self.rows = rows
        self.order = order
        self.sizes = sizes
        self.micro_batch_rows = micro_batch_rows
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.prefetch_steps = prefetch_steps
        self.pin_memory = pin_memory
        self.timeout_s = timeout_s
        self._passed_over = passed_over
        self._ahead: dict[int, Future[StepBatches]] = {}
        """By the position of the step; in the order in which they are read."""
        self._wake = threading.Condition()
        self._queue: deque[tuple[int, Future[StepBatches]]] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def pass_over(self, passed_over: PassedOver) -> None:
        """From now on take no row of these; what was read ahead is forgotten."""
        self._passed_over = passed_over
        self._forget()

    def span(self, position: int) -> tuple[int, int]:
        """Position of the first and of the last row of the step that a run takes when it stands at
        `position`. Where rows are passed over, fewer than all between them are the step's."""
        spans = self._passed_over.step_spans(position, self.sizes)
        return spans[0][0], spans[-1][1]

    def shares(self, position: int) -> dict[str, tuple[float, float]]:
        """By source, when a run stands at `position`: share of the rows that it has given so far, and the
        share that is asked of it from there on."""
        taken = self.order.taken(position, self._passed_over.ranges)
        total = max(1, sum(taken.values()))
        asked = self.order.asked_at(position)
        return {name: (count / total, asked[name]) for name, count in taken.items()}

    def positions(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Of all rows of the step that takes `first` to `last`."""
        return self._passed_over.positions_between(first, last)

    def step(self, position: int, *, give_up: Callable[[], bool] = lambda: False) -> StepBatches:
        """This rank's part of the step that a run takes when it stands at `position`.

        Args:
            give_up: asked now and then during a long read: whether nobody wants it any more.

        Raises:
            DataError: A shard is missing or damaged; the message names the row and the file. A read that
                does not come back.
            GaveUpError: `give_up` said so.
        """
        if position not in self._ahead:
            self._forget()  # the run begins, or jumped
            self._enqueue(position, 1)
        read = self._ahead.pop(position)
        limit = time.monotonic() + self.timeout_s
        while not wait([read], timeout=min(GIVE_UP_POLL_S, max(0.0, limit - time.monotonic()))).done:
            if give_up():
                raise GaveUpError(f"the step at row {position:,} is not wanted any more")
            if time.monotonic() >= limit:
                raise DataError(
                    f"reading the step at row {position:,} has not come back after {self.timeout_s:g} s; is "
                    "the file system of the data there? The thread that reads is still waiting for it"
                )
        found = read.result()
        self._enqueue(self.span(position)[1] + 1, self.prefetch_steps)
        return found

    def _read(self, position: int) -> StepBatches:
        first = self._passed_over.next_position(position)
        places = self._passed_over.positions(first, self.sizes.rows_at(first))
        mine = np.array_split(places, self.dp_size)[self.dp_rank].reshape(-1, self.micro_batch_rows)
        micro_batches, total = [], 0
        for at in mine:
            rows = self.order.rows_at(at)
            block = self.rows.read_many(rows)
            total += hash_rows(at, block.tokens)
            batch = replace(to_batch(block, rows), places=at)
            micro_batches.append(batch.pinned() if self.pin_memory else batch)
        return StepBatches(micro_batches, total & MASK_64)

    def _enqueue(self, position: int, steps: int) -> None:
        """Have the thread read so many steps from `position` on, those that are not under way."""
        with self._wake:
            for _ in range(steps):
                if position not in self._ahead:
                    self._ahead[position] = Future()
                    self._queue.append((position, self._ahead[position]))
                position = self.span(position)[1] + 1
            self._wake.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="read rows ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                position, future = self._queue.popleft()
            try:
                future.set_result(self._read(position))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

    def _forget(self) -> None:
        with self._wake:
            self._queue.clear()
            self._ahead.clear()

    def close(self) -> None:
        """Wait for the read that is under way, and forget it."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_TIMEOUT_S)
        self._thread = None
        self._forget()


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
    rows: RowReader,
    *,
    micro_batch_rows: int,
    dp_rank: int,
    dp_size: int,
    max_rows: int | None = None,
    on_failure: Callable[[LLMTrainError], None] | None = None,
) -> Iterator[Batch]:
    """Yield this rank's part of `max_rows` rows spread evenly over the split (None: all of it), in order.

    Spread, because neighbours are pieces of the same few documents. Each row is on one rank only.

    Every rank gets the same number of batches of the same shape, so collectives in the forward stay in
    step: where the rows run out, rows that are masked as a whole fill up.

    Args:
        on_failure: takes what went wrong with a read, and a masked batch stands in, for ranks that must stay
            in step until they can agree to stop. None: it is raised.
    """
    num_rows = _num_held_out_rows(rows, max_rows)
    rows_at_once = micro_batch_rows * dp_size
    for first in range(0, num_rows, rows_at_once):
        numbers = first + dp_rank * micro_batch_rows + np.arange(micro_batch_rows)
        is_real = numbers < num_rows
        chosen = np.minimum(numbers, num_rows - 1) * rows.num_rows // max(1, num_rows)
        try:
            block = rows.read_many(chosen)
        except LLMTrainError as error:
            if on_failure is None:
                raise
            on_failure(error)
            block, is_real = _blank(micro_batch_rows, rows.seq_len), np.zeros_like(is_real)
        block.targets[~is_real] = NO_TARGET
        yield to_batch(block, np.where(is_real, chosen, NO_ROW))


def num_held_out_batches(
    rows: RowReader, *, micro_batch_rows: int, dp_size: int, max_rows: int | None
) -> int:
    """How many batches `held_out_batches` yields on every rank."""
    return -(-_num_held_out_rows(rows, max_rows) // (micro_batch_rows * dp_size))


def _num_held_out_rows(rows: RowReader, max_rows: int | None) -> int:
    return rows.num_rows if max_rows is None else min(max_rows, rows.num_rows)


def _blank(num_rows: int, seq_len: int) -> Row:
    positions = np.broadcast_to(np.arange(seq_len), (num_rows, seq_len)).copy()
    tokens = np.zeros_like(positions)
    return Row(tokens, tokens.copy(), positions, tokens.astype(np.int32))


def to_batch(block: Row, rows: npt.NDArray[np.int64]) -> Batch:
    """Wrap rows that were read; `rows` are their numbers."""
    return Batch(
        tokens_BS=torch.from_numpy(block.tokens),
        targets_BS=torch.from_numpy(block.targets),
        positions_BS=torch.from_numpy(block.positions),
        segments_BS=torch.from_numpy(block.segments),
        num_valid=int((block.targets != NO_TARGET).sum()),
        rows=rows,
    )
