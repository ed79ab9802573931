"""Attention over positions spread over 1, 2 and 4 ranks equals attention over whole rows in float64."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from llmtrain.model.attend import attend, document_mask
from llmtrain.parallel.context import (
    attend_over_heads,
    attend_over_sequence,
    chunk_products,
    kv_repeats,
    own_chunks,
    own_mask,
    own_positions,
)
from llmtrain.parallel.groups import Axis

WORKER = Path(__file__).with_name("context_worker.py")
KINDS = ["heads", "sequence"]
HEADS = [(4, 1), (4, 2), (4, 4), (8, 2), (12, 3)]
"""12 heads of 3 on 2 ranks: one key/value head serves heads of both, the others do not."""
DOCUMENTS = ["many", "one", "short"]


def case(kind: str, num_rows: int, heads: tuple[int, int], **others: Any) -> dict[str, Any]:
    return {"kind": kind, "num_rows": num_rows, "num_heads": heads[0], "num_kv_heads": heads[1], **others}


CASES = [
    *(case(kind, rows, heads) for kind in KINDS for rows in (1, 2) for heads in HEADS),
    *(case(kind, 2, (4, 2), documents=documents) for kind in KINDS for documents in DOCUMENTS),
    *(case("heads_causal", 2, heads, documents="one") for heads in HEADS),
    *(case("sequence", 2, (4, 2), queries_at_once=some) for some in (1, 4, 5, 100)),
    *(case(kind, 2, heads, dtype="bfloat16") for kind in KINDS for heads in HEADS),
]


@cache
def results(num_ranks: int) -> list[dict[str, Any]]:
    """Of every rank: its errors in each case, over the largest exact element, and those of a model. One start
    of the processes runs all of them."""
    return run_ranks(WORKER, json.dumps(CASES), num_ranks=num_ranks)


def axis_of(rank: int, size: int) -> Axis:
    """For what needs a place and says nothing."""
    return Axis(rank, size, tuple(range(size)), None)


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", range(len(CASES)), ids=[" ".join(map(str, each.values())) for each in CASES])
def test_outputs_and_gradients_equal_those_of_one_process(num_ranks: int, at: int) -> None:
    for of_rank in (rank["attention"][at] for rank in results(num_ranks)):
        for name in ("out", "grad_q", "grad_k", "grad_v"):
            if CASES[at].get("dtype") == "bfloat16":
                assert of_rank[name] < 1e-2, name  # attention in one process is up to 9e-3 away in bf16
            else:
                assert of_rank[name] < 2e-6, name  # attention in one process is up to 7e-7 away in fp32


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["kept", "recomputed"])
def test_a_model_over_ranks_has_the_loss_and_gradients_of_one_process(
    num_ranks: int, kind: str, recompute: str
) -> None:
    for of_rank in results(num_ranks):
        told = of_rank["model"][f"{kind} {recompute}"]
        assert told["loss"] == pytest.approx(told["exact"], rel=1e-6)
        assert told["grad_error"] < 2e-6  # norm of the difference of all gradients, fp32


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_ring_works_on_every_visible_pair_of_chunks_once(size: int) -> None:
    done = Counter(
        pair for rank, step in product(range(size), range(size)) for pair in chunk_products(rank, step, size)
    )
    visible = [(query, key) for query in range(2 * size) for key in range(query + 1)]
    assert done == Counter(visible)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_ranks_have_equally_many_chunk_products_at_every_step_of_the_ring(size: int) -> None:
    for step in range(size):
        numbers = {len(chunk_products(rank, step, size)) for rank in range(size)}
        assert numbers == {3 if step == 0 else 2}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("zigzag", [False, True])
def test_ranks_hold_every_position_once(size: int, zigzag: bool) -> None:
    places_BS = torch.arange(2 * 16).view(2, 16)
    parts = [own_positions(places_BS, axis_of(rank, size), zigzag=zigzag) for rank in range(size)]
    assert all(part.shape == (2, 16 // size) for part in parts)
    together = torch.cat(parts, dim=1)
    assert torch.equal(together.sort(dim=1).values, places_BS)
    assert torch.equal(together, places_BS) == (size == 1 or not zigzag)


def test_the_zigzag_gives_a_rank_an_early_and_a_late_chunk() -> None:
    places_BS = torch.arange(16)[None]
    assert own_positions(places_BS, axis_of(1, 4), zigzag=True).tolist() == [[2, 3, 12, 13]]
    assert own_positions(places_BS, axis_of(1, 4), zigzag=False).tolist() == [[4, 5, 6, 7]]
    assert [own_chunks(rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ranks_mask_is_its_rows_of_the_document_mask(size: int, dtype: torch.dtype) -> None:
    segments_BS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 4, [0] * 16]).int()
    whole = document_mask(segments_BS, dtype)
    for rank in range(size):
        mine = own_mask(segments_BS, dtype, axis_of(rank, size))
        assert mine.dtype == dtype
        assert torch.equal(mine[:, 0], own_positions(whole[:, 0], axis_of(rank, size), zigzag=True))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("heads", [*HEADS, (24, 6), (24, 8)])
def test_repeated_key_value_heads_are_those_that_the_query_heads_of_a_rank_need(
    size: int, heads: tuple[int, int]
) -> None:
    num_heads, num_kv_heads = heads
    repeats = kv_repeats(num_heads, num_kv_heads, size)
    sent = [head for head in range(num_kv_heads) for _ in range(repeats)]
    assert len(sent) % size == 0
    for rank in range(size):
        queries = range(rank * num_heads // size, (rank + 1) * num_heads // size)
        mine = sent[rank * len(sent) // size : (rank + 1) * len(sent) // size]
        served = [mine[at * len(mine) // len(queries)] for at in range(len(queries))]
        assert served == [query * num_kv_heads // num_heads for query in queries]
    assert repeats == 1 or num_kv_heads % size, "heads that divide evenly are sent once"


def test_positions_that_do_not_make_equal_chunks_are_refused() -> None:
    with pytest.raises(AssertionError, match="12 positions do not make 8 equal chunks"):
        own_positions(torch.zeros(1, 12), axis_of(0, 4), zigzag=True)


def test_the_ring_refuses_to_go_without_a_mask() -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(AssertionError, match="the ring needs the mask of this rank's queries"):
        attend_over_sequence(q, q, q, None, True, axis=axis_of(0, 1))
    with pytest.raises(AssertionError, match="the mask says who sees whom"):
        attend_over_sequence(q, q, q, torch.zeros(1, 1, 4, 4), True, axis=axis_of(0, 1))


def test_one_rank_attends_over_heads_without_an_exchange() -> None:
    q, k, v = (torch.randn(1, heads, 8, 4) for heads in (4, 2, 2))
    out = attend_over_heads(q, k, v, None, True, axis=axis_of(0, 1), attend=attend)
    assert torch.equal(out, attend(q, k, v, None, True))
