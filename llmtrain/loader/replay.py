"""What a step of a run read, from its ledger and its data: rows, ranks, and the tokens again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import DataError
from llmtrain.loader.config import LoaderConfig
from llmtrain.loader.ledger import LEDGER_NAME, Attempt, Int64, Ledger, Step, hash_rows, read_ledger
from llmtrain.loader.open import OpenData, open_data

CHUNK_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A row that a step read, and where it was fed to the model."""

    position: int
    rank: int
    micro_batch: int
    """Its number among the rank's, from 0."""
    global_row: int
    """What `OpenData.train` calls it."""
    source: str
    row: int
    """Its number in the source's pack."""


class PastRun:
    """A run's ledger, with the data that it read."""

    def __init__(self, folder: Path, cfg: LoaderConfig, *, seed: int) -> None:
        """
        Args:
            cfg: the run's own data settings.

        Raises:
            DataError: there is no ledger, or the data is not what the ledger names.
        """
        self.folder = folder
        self.cfg = cfg
        self.ledger: Ledger = read_ledger(folder / LEDGER_NAME)
        self.data: OpenData = open_data(cfg, seed=seed)
        last = self.ledger.attempts[-1] if self.ledger.attempts else None
        if last is not None and last.data_hash != self.data.hash:
            raise DataError(
                f"the data is not what {folder} read last: hash {self.data.hash[:12]}, the ledger has "
                f"{last.data_hash[:12]}; put the old data back where the run's config names it"
            )

    def step(
        self, number: int, *, position: int | None = None, attempt: int | None = None
    ) -> tuple[Step, Attempt]:
        """The step (counted from 1) as it was done last, and the attempt that did it.

        Args:
            position: of a row that it took: after a rollback two steps of one number have other rows.
            attempt: that did it.
        """
        step, start = self.ledger.last_of(number, position=position, attempt=attempt)
        if start.data_hash != self.data.hash:
            raise DataError(
                f"step {number} of {self.folder} read other data, before a change that was accepted: hash "
                f"{start.data_hash[:12]}, now {self.data.hash[:12]}"
            )
        return step, start

    def rows_of(
        self,
        number: int,
        *,
        rank: int | None = None,
        micro_batch: int | None = None,
        position: int | None = None,
        attempt: int | None = None,
    ) -> list[StepRow]:
        """The rows of a step in its order, or those of one rank, or those of one micro batch of the ranks.

        Args:
            position: as in `step`, as is `attempt`.

        Raises:
            DataError: the ledger has no such step, or the step no such rank or micro batch.
        """
        step, start = self.step(number, position=position, attempt=attempt)
        positions = self.positions_of(step)
        num_ranks = start.dp_size or start.world_size
        per_rank = len(positions) // num_ranks
        num_micro = per_rank // start.micro_batch_rows
        if rank is not None and not 0 <= rank < num_ranks:
            raise DataError(f"rank={rank}: step {number} was done by ranks 0 to {num_ranks - 1}")
        if micro_batch is not None and not 0 <= micro_batch < num_micro:
            raise DataError(
                f"micro_batch={micro_batch}: in step {number} each rank had micro batches 0 to "
                f"{num_micro - 1}"
            )
        found = []
        for at, (place, global_row) in enumerate(
            zip(positions.tolist(), self.data.order.rows_at(positions).tolist(), strict=True)
        ):
            of_rank, in_rank = divmod(at, per_rank)
            source, row = self.data.train.place(global_row)
            found.append(
                StepRow(
                    position=place,
                    rank=of_rank,
                    micro_batch=in_rank // start.micro_batch_rows,
                    global_row=global_row,
                    source=source,
                    row=row,
                )
            )
        return [
            each for each in found if rank in (None, each.rank) and micro_batch in (None, each.micro_batch)
        ]

    def positions_of(self, step: Step) -> Int64:
        """Of the step's rows in the run: what is passed over in between is not among them."""
        for start in self.ledger.attempts:
            if (start.attempt, start.part) == (step.attempt, step.part):
                return start.passed_over.positions_between(step.first, step.last)
        raise AssertionError(f"read_ledger has looked for the start of {step}")

    def recomputed(self, step: Step) -> int:
        """The hash of the step's tokens, read again."""
        total, positions = 0, self.positions_of(step)
        for first in range(0, len(positions), CHUNK_ROWS):
            some = positions[first : first + CHUNK_ROWS]
            total += hash_rows(some, self.data.train.read_many(self.data.order.rows_at(some)).tokens)
        return total % 2**64

    def of_this_data(self, steps: list[Step]) -> list[Step]:
        """Those that read the data as it is now; not those before a change that was accepted."""
        same = {entry.attempt for entry in self.ledger.attempts if entry.data_hash == self.data.hash}
        return [step for step in steps if step.attempt in same]

    def other_tokens(self, steps: list[Step]) -> Iterator[str]:
        """Of each of these steps: a sentence if its tokens are not what the ledger noted, else \"\"."""
        for step in steps:
            found = f"{self.recomputed(step):016x}"
            told = f"step {step.step}, rows {step.first:,} to {step.last:,}: its tokens have the hash {found}"
            yield "" if found == step.hash else f"{told}, the ledger says {step.hash}"
