"""Any split of one global batch into dp x accumulation x micro batches, over any number of pipeline stages,
has the loss and the gradients of the whole batch, however uneven the valid targets are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import splits_worker
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

ROWS = 8
WORKER = Path(splits_worker.__file__)


def splits(num_ranks: int) -> list[tuple[int, int]]:
    """Every (pp, micro batch rows) of ROWS rows on so many ranks."""
    found = []
    for pp in (1, 2, 4):
        if num_ranks % pp == 0:
            per_rank = ROWS // (num_ranks // pp)
            found += [(pp, micro) for micro in range(1, per_rank + 1) if per_rank % micro == 0]
    return found


@st.composite
def batches(draw: st.DrawFn, num_ranks: int) -> list[dict[str, Any]]:
    """Every split, each with numbers of valid targets of its own: rows and whole ranks without any, too."""
    some = st.lists(st.sampled_from([0, 0, 1, 5, 23]), min_size=ROWS, max_size=ROWS).filter(any)
    family = st.sampled_from(["llama", "gpt2"])
    return [
        {"pp": pp, "micro": micro, "valid": draw(some), "family": draw(family)}
        for pp, micro in splits(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@settings(  # an example is a start of the ranks, with every split in it
    max_examples=1,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_split_has_the_loss_and_gradients_of_the_whole_batch(num_ranks: int, data: st.DataObject) -> None:
    cases = data.draw(batches(num_ranks))
    for case, told in zip(cases, run_ranks(WORKER, json.dumps(cases), num_ranks=num_ranks)[0], strict=True):
        assert told["num_valid"] > 0, case
        assert told["loss"] == pytest.approx(told["expected"], rel=2e-6), case
        worst = max(told["worst"], key=told["worst"].get)
        assert told["worst"][worst] < 1e-5, (case, worst, told["worst"][worst])
