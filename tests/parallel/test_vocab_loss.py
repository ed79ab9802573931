"""The cross entropy of a head split over 1, 2 and 4 ranks equals float64's in one process, gradients too."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

WORKER = Path(__file__).with_name("vocab_loss_worker.py")
ROWS = [1, 7, 36, 37, 100, None]
TARGETS = ["all", "some", "edges"]
LARGE = 40.0  # logits of some hundreds: exp of them is infinite in fp32
CASES: list[list[Any]] = [
    *(["float32", "some", rows, 1.0] for rows in ROWS),
    *(["float32", targets, 7, scale] for targets in TARGETS for scale in (1.0, LARGE)),
    ["float32", "sure", 7, 3.0],
    ["float32", "none", 7, 1.0],
    ["bfloat16", "some", 8, 1.0],
    ["bfloat16", "none", 8, 1.0],
]


@cache
def results(num_ranks: int) -> list[dict[str, Any]]:
    """Of every rank: what it says of each case. One start of the processes runs all of them."""
    return run_ranks(WORKER, json.dumps(CASES), num_ranks=num_ranks)


def told(num_ranks: int, *case: Any) -> list[dict[str, Any]]:
    return [rank[json.dumps(list(case))] for rank in results(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_chunks_do_not_change_loss_or_gradients(num_ranks: int, rows: int | None) -> None:
    for of_rank in told(num_ranks, "float32", "some", rows, 1.0):
        assert of_rank["loss"] == pytest.approx(of_rank["exact"], rel=1e-6)
        assert of_rank["grad_x_error"] < 1e-6
        assert of_rank["grad_head_error"] < 1e-6


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("scale", [1.0, LARGE])
def test_any_targets_and_large_logits_equal_float64(num_ranks: int, targets: str, scale: float) -> None:
    for of_rank in told(num_ranks, "float32", targets, 7, scale):
        assert of_rank["loss"] == pytest.approx(of_rank["exact"], rel=1e-6)
        # logits of hundreds have errors of 1e-5 in fp32, and torch's gradients have 1.2e-6 of it
        allowed = 1e-6 if scale == 1.0 else 3e-6
        assert of_rank["grad_x_error"] < allowed
        assert of_rank["grad_head_error"] < allowed


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_small_loss_is_not_lost_in_large_logits(num_ranks: int) -> None:
    for of_rank in told(num_ranks, "float32", "sure", 7, 3.0):
        assert of_rank["exact"] < 37 * 0.5
        assert of_rank["loss"] == pytest.approx(of_rank["exact"], rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_bf16_gradients_are_as_close_to_exact_as_those_of_one_process(num_ranks: int) -> None:
    for of_rank in told(num_ranks, "bfloat16", "some", 8, 1.0):
        assert of_rank["loss"] == pytest.approx(of_rank["exact"], rel=2e-3)  # logits are rounded to bf16
        assert of_rank["grad_head_error"] < 1.2 * of_rank["plain_grad_head_error"]
        # every rank rounds its part of the gradient of x to bf16, and so does their sum
        assert of_rank["grad_x_error"] < (1.2 if num_ranks == 1 else 1.5) * of_rank["plain_grad_x_error"]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_targets_the_loss_is_zero_and_so_are_the_gradients(num_ranks: int, dtype: str) -> None:
    for of_rank in told(num_ranks, dtype, "none", 7 if dtype == "float32" else 8, 1.0):
        assert of_rank["loss"] == of_rank["exact"] == 0.0
        assert of_rank["grad_x_error"] == of_rank["grad_head_error"] == 0.0


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_has_the_same_loss_with_gradients_and_without(num_ranks: int, case: list[Any]) -> None:
    ranks = told(num_ranks, *case)
    losses = {of_rank[kind] for of_rank in ranks for kind in ("loss", "without_grad")}
    assert len(losses) == 1
