"""The loss of held-out rows, by all ranks together."""

from __future__ import annotations

from itertools import islice

from llmtrain.errors import LLMTrainError
from llmtrain.loader.batches import held_out_batches, num_held_out_batches
from llmtrain.loader.open import MixedRows
from llmtrain.train.config import TrainRoot
from llmtrain.train.deadline import Deadline
from llmtrain.train.engine import Engine
from llmtrain.train.ranks import Agreement, agree, failure_of_all

PART_BATCHES = 32
"""Of a rank: between two of them all agree whether to leave."""


def held_out_sums(
    engine: Engine,
    held_out: MixedRows,
    cfg: TrainRoot,
    *,
    max_rows: int | None,
    deadline: Deadline | None = None,
) -> tuple[float, int] | None:
    """Loss sum in nats and number of targets of rows spread over the held-out split: the same for any layout.

    Args:
        deadline: where it comes on any rank, nothing is found: None.

    Raises:
        RankFailedError: a row that could not be read, on any rank.
    """
    failures: list[LLMTrainError] = []
    groups = engine.placement.groups
    batches = held_out_batches(
        held_out,
        micro_batch_rows=cfg.train.micro_batch_rows,
        dp_rank=groups.dp.rank,
        dp_size=groups.dp.size,
        max_rows=max_rows,
        on_failure=failures.append,
    )
    num_batches = num_held_out_batches(
        held_out, micro_batch_rows=cfg.train.micro_batch_rows, dp_size=groups.dp.size, max_rows=max_rows
    )
    loss_sum, num_valid = 0.0, 0
    for done in range(0, num_batches, PART_BATCHES):
        of_part = engine.held_out_sums(islice(batches, min(PART_BATCHES, num_batches - done)))
        loss_sum, num_valid = loss_sum + of_part[0], num_valid + of_part[1]
        wish = Agreement.stop if deadline is not None and deadline.is_due() else Agreement.go_on
        wish = Agreement.failed if failures else wish
        agreed, _ = agree(groups, engine.device, level=wish)
        if agreed == Agreement.failed:
            raise failure_of_all(failures[0] if failures else None)
        if agreed == Agreement.stop and done + PART_BATCHES < num_batches:
            return None
    return loss_sum, num_valid
