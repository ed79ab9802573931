"""A withheld step changes nothing, in any layout: the run goes on as one that never saw that batch."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import withheld_worker
from ranks import run_ranks

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 0": (2, {"zero_stage": 0}),
    "zero 1, the first step": (2, {"zero_stage": 1, "withheld": [0]}),
    "zero 2": (2, {"zero_stage": 2}),
    "zero 3, two steps": (2, {"zero_stage": 3, "withheld": [1, 2]}),
    "zero 2, tp 2": (2, {"zero_stage": 2, "tp_size": 2}),
    "pp 2, tied": (2, {"zero_stage": 1, "pp_size": 2, "family": "gpt2"}),
    "bf16, zero 1": (2, {"zero_stage": 1, "precision": "bf16"}),
    "fp16, zero 2": (2, {"zero_stage": 2, "precision": "fp16"}),
    "ddp": (2, {"engine": "accelerate", "zero_stage": 0}),
    "zero 0, not finite": (2, {"zero_stage": 0, "blown": "gradient"}),
    "zero 3, not finite": (2, {"zero_stage": 3, "blown": "gradient"}),
    "ddp, not finite": (2, {"engine": "accelerate", "zero_stage": 0, "blown": "loss"}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero {stage}, one rank": (1, {"zero_stage": stage}) for stage in range(4)},
    **{
        f"zero {stage}, one rank, not finite": (1, {"zero_stage": stage, "blown": "loss"}) for stage in (0, 3)
    },
    **{
        f"accelerate {stage}, one rank": (1, {"engine": "accelerate", "zero_stage": stage})
        for stage in (0, 3)
    },
    **{f"bf16, zero {stage}": (2, {"zero_stage": stage, "precision": "bf16"}) for stage in (2, 3)},
    **{
        f"bf16, zero {stage}, not finite": (
            2,
            {"zero_stage": stage, "precision": "bf16", "blown": "gradient"},
        )
        for stage in (1, 2, 3)
    },
    **{f"zero {stage}, tp 2": (2, {"zero_stage": stage, "tp_size": 2}) for stage in (0, 1, 3)},
    "tp 2, sequence parallel, not finite": (
        2,
        {"family": "gpt2", "zero_stage": 1, "tp_size": 2, "sequence_parallel": True, "blown": "loss"},
    ),
    "zero 2, cp 2": (2, {"zero_stage": 2, "cp_size": 2, "context": "sequence"}),
    "pp 2, bf16": (2, {"zero_stage": 1, "pp_size": 2, "precision": "bf16"}),
    "pp 2, fp16": (2, {"zero_stage": 1, "pp_size": 2, "precision": "fp16"}),
    "pp 2, dual": (2, {"zero_stage": 1, "pp_size": 2, "pp_schedule": "dual_pipe_v"}),
    "fp16, zero 3": (2, {"zero_stage": 3, "precision": "fp16"}),
    "muon, ddp": (2, {"engine": "accelerate", "zero_stage": 0, "optimizer": "muon"}),
    "muon, zero 2": (2, {"zero_stage": 2, "optimizer": "muon"}),
    "zero 2, not finite": (2, {"zero_stage": 2, "blown": "loss"}),
    "pp 2, not finite": (2, {"zero_stage": 1, "pp_size": 2, "blown": "loss"}),
    "fsdp2": (2, {"engine": "accelerate", "zero_stage": 3}),
    "fsdp2, not finite": (2, {"engine": "accelerate", "zero_stage": 2, "blown": "loss"}),
}
IS_SLOW = dict.fromkeys(CASES, False) | dict.fromkeys(MORE, True)
EVERY = CASES | MORE


@cache
def results(num_ranks: int, *, is_slow: bool) -> list[dict[str, Any]]:
    """What each rank says. One start of `num_ranks` processes runs every case: imports are most of the
    time."""
    cases = {
        name: {"family": "llama", "micro": 2, **case}
        for name, (ranks, case) in EVERY.items()
        if ranks == num_ranks and IS_SLOW[name] == is_slow
    }
    cases = dict(sorted(cases.items(), key=lambda item: "pp" in item[0]))
    return run_ranks(Path(withheld_worker.__file__), json.dumps(cases), num_ranks=num_ranks, timeout_s=500)


@pytest.fixture(
    params=[
        *CASES,
        *(pytest.param(name, marks=pytest.mark.slow) for name in MORE),
    ]
)
def told(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of one case, what each rank says."""
    name: str = request.param
    return [of_rank[name] for of_rank in results(EVERY[name][0], is_slow=IS_SLOW[name])]


def test_a_withheld_step_changes_nothing_and_the_run_ends_as_one_without_it(
    told: list[dict[str, Any]],
) -> None:
    for of_rank in told:
        assert of_rank["unchanged"] == of_rank["withheld"], "pieces, counters and loss scale, bit by bit"
        assert any(of_rank["withheld"])
        assert not any(of_rank["skipped"])
        assert not any(of_rank["withheld_alone"])
        assert of_rank["num_pieces"] > 0
        assert of_rank["ends_alike"]
        assert of_rank["losses"] == of_rank["losses_alone"]


def test_a_run_that_goes_back_behind_the_step_in_the_same_process_ends_alike(
    told: list[dict[str, Any]],
) -> None:
    assert all(of_rank["ends_alike_after_going_back"] for of_rank in told)


def test_the_judge_is_asked_once_a_step_with_what_the_step_tells_and_on_every_rank_alike(
    told: list[dict[str, Any]],
) -> None:
    first = told[0]
    assert len(first["asked"]) == withheld_worker.STEPS
    assert str(first["asked"]) == str(first["told"]), "nan is not equal to itself"
    assert all(str(of_rank["asked"]) == str(first["asked"]) for of_rank in told)
    for (loss, norm), is_withheld in zip(first["asked"], first["withheld"], strict=True):
        if not is_withheld:
            assert 4 < loss < 5
            assert 0 < norm < 2


@pytest.mark.parametrize("name", [name for name in CASES if "not finite" in name])
def test_what_blows_up_is_told_as_not_finite(name: str) -> None:
    told = results(2, is_slow=False)[0][name]
    for (loss, norm), is_withheld in zip(told["told"], told["withheld"], strict=True):
        assert math.isfinite(norm) != is_withheld
        assert math.isfinite(loss) or is_withheld
