"""What a step measures: gradient norms by group against plain PyTorch, memory against arithmetic."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_worker
import grad_groups_worker
import numpy as np
import pytest
import torch
from ranks import run_ranks

from llmtrain.model.transformer import Transformer
from llmtrain.train.measures import GIB, GradientSquares, Memory, groups_of, memory_of, storages

WORKER = Path(grad_groups_worker.__file__)
STEPS = grad_groups_worker.STEPS
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero {stage}, 1 rank": (1, {"zero_stage": stage}) for stage in range(4)},
    **{f"zero {stage}, 2 ranks": (2, {"zero_stage": stage}) for stage in range(4)},
    "zero 3, small weights stay whole": (2, {"zero_stage": 3, "deepspeed": {}}),
    "zero 3, many parts": (2, {"zero_stage": 3, "deepspeed": {}}),
    "muon, zero 1": (2, {"zero_stage": 1, "optimizer": "muon"}),
    "bf16, zero 1": (2, {"zero_stage": 1, "precision": "bf16"}),
    "bf16, zero 2": (2, {"zero_stage": 2, "precision": "bf16"}),
    "fp16, zero 2": (2, {"zero_stage": 2, "precision": "fp16"}),
    "tp 2, zero 0": (2, {"zero_stage": 0, "tp_size": 2}),
    "tp 2, zero 1": (2, {"zero_stage": 1, "tp_size": 2, "sequence_parallel": True}),
    "tp 2, zero 3, tied": (2, {"family": "gpt2", "zero_stage": 3, "tp_size": 2}),
    "cp 2, zero 2": (2, {"zero_stage": 2, "cp_size": 2}),
    "accelerate, 1 rank": (1, {"zero_stage": 0, "engine": "accelerate"}),
    "accelerate, ddp": (2, {"zero_stage": 0, "engine": "accelerate"}),
    "accelerate, fsdp2": (2, {"zero_stage": 3, "engine": "accelerate"}),
    "pp 2": (2, {"zero_stage": 1, "pp_size": 2}),
    "pp 2, tied": (2, {"family": "gpt2", "zero_stage": 1, "pp_size": 2}),
    "pp 2, bf16": (2, {"zero_stage": 1, "pp_size": 2, "precision": "bf16"}),
    "pp 2, dual": (2, {"zero_stage": 1, "pp_size": 2, "pp_schedule": "dual_pipe_v", "micro": 2}),
}
ZERO_3 = {
    "zero 3, small weights stay whole": "stage3_param_persistence_threshold",
    "zero 3, many parts": "sub_group_size",
}
for name, key in ZERO_3.items():
    CASES[name][1]["deepspeed"] = {"zero_optimization": {key: 1000}}
KINDS = ("embedding", "attention", "mlp", "norm", "head")
THIRDS = {"blocks_first": (0,), "blocks_middle": (1, 2), "blocks_last": (3,)}
"""Of the four blocks of these models."""
NUM_MASTERS = 2
"""Matrices, which decay, and vectors: the optimizer's two groups."""


@cache
def results(num_ranks: int) -> list[dict[str, Any]]:
    """Of every rank. One start of `num_ranks` processes runs every case: imports are most of the time."""
    cases = {
        name: {"family": "llama", "micro": 4, **case}
        for name, (ranks, case) in CASES.items()
        if ranks == num_ranks
    }
    # DeepSpeed's pipelines come last: they leave hooks that other engines would meet.
    cases = dict(sorted(cases.items(), key=lambda item: "pp" in item[0]))
    return run_ranks(WORKER, json.dumps(cases), num_ranks=num_ranks)


def told(name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = results(CASES[name][0])[rank][name]
    return found


@cache
def expected(family: str) -> list[dict[str, float]]:
    """By step of a plain PyTorch run: norms by group before clipping."""
    clipped: list[dict[str, float]] = []

    def watch(step: int, model: Transformer, _: torch.optim.AdamW) -> None:
        squares = {
            name: float(weight.grad.double().pow(2).sum())
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }

        def norm(*parts: str) -> float:
            return math.sqrt(
                sum(square for name, square in squares.items() if any(part in name for part in parts))
            )

        found = {
            "embedding": norm("embedding."),
            "attention": norm(".attention."),
            "mlp": norm(".mlp."),
            "norm": norm("_norm."),
            "head": norm("head."),
            **{group: norm(*(f"blocks.{at}." for at in blocks)) for group, blocks in THIRDS.items()},
            "all": norm(""),
        }
        clipped.append(found)

    norms = engine_worker.reference(family, watch=watch)["grad_norm"]
    assert all(norm > engine_worker.CLIP for norm in norms[:STEPS]), "these steps clip"
    return [
        {group: value * norm / found["all"] for group, value in found.items() if value}
        for norm, found in zip(norms[:STEPS], clipped, strict=False)
    ]


@pytest.mark.parametrize("name", CASES)
def test_norms_by_group_equal_plain_pytorch(name: str) -> None:
    case = CASES[name][1]
    # bf16 keeps 8 bits, fp16 11; test_engine_parity has the same bound
    rtol = 3e-2 if "precision" in case else 1e-5
    steps = 1 if "optimizer" in case else STEPS  # Muon's second step is another
    for found, wanted in zip(
        told(name)["grad_norms"][:steps], expected(case.get("family", "llama")), strict=False
    ):
        wanted = {group: value for group, value in wanted.items() if group != "all"}
        assert found.keys() == wanted.keys()
        np.testing.assert_allclose([found[group] for group in wanted], list(wanted.values()), rtol=rtol)


@pytest.mark.parametrize("name", CASES)
def test_squares_of_kinds_add_up_to_the_whole_norm(name: str) -> None:
    for whole, found in zip(told(name)["grad_norm"], told(name)["grad_norms"], strict=True):
        assert sum(found.get(kind, 0.0) ** 2 for kind in KINDS) == pytest.approx(whole**2, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_step_says_only_what_it_knows(name: str) -> None:
    assert told(name)["unmeasured"] == [None, None]
    norm, found, is_withheld = told(name)["withheld"]
    assert is_withheld
    assert sum(found.get(kind, 0.0) ** 2 for kind in KINDS) == pytest.approx(norm**2, rel=1e-9)
    assert told(name)["broken"] is None


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == 2])
def test_all_ranks_know_the_same_norms(name: str) -> None:
    assert told(name, 1)["grad_norms"] == told(name)["grad_norms"]


def test_every_weight_is_of_one_kind_and_a_block_in_one_third() -> None:
    for num_layers in range(1, 9):
        thirds = [groups_of(f"blocks.{index}.mlp_norm.weight", num_layers) for index in range(num_layers)]
        assert {kind for kind, _ in thirds} == {"norm"}
        order = [list(THIRDS).index(third) for _, third in thirds]
        assert order == sorted(order) == [2 - place for place in reversed(order)], "the same from both ends"
        if num_layers >= 3:
            sizes = [order.count(place) for place in range(3)]
            assert max(sizes) - min(sizes) <= 1
    assert groups_of("blocks.1.attention.wo.bias", 3) == ("attention", "blocks_middle")
    assert groups_of("position_embedding.weight", 3) == ("embedding",)
    assert groups_of("final_norm.bias", 3) == ("norm",)


# -- memory


def num_elements(*, at_most: float = math.inf) -> int:
    """Of all weights of the model that have at most so many."""
    with torch.device("meta"):
        numels = [weight.numel() for weight in Transformer(engine_worker.MODELS["llama"]).parameters()]
    return sum(numel for numel in numels if numel <= at_most)


def num_weights() -> int:
    with torch.device("meta"):
        return len(list(Transformer(engine_worker.MODELS["llama"]).parameters()))


def check_memory(name: str, *, weights: float, gradients: float, optimizer: float) -> None:
    """Of every rank and step, in bytes."""
    wanted = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    for rank in range(CASES[name][0]):
        for found in told(name, rank)["memory"]:
            assert found == wanted, (rank, found, wanted)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_where_every_rank_holds_everything(num_ranks: int) -> None:
    whole = 4 * num_elements()
    steps = 4 * num_weights()  # torch counts each weight's updates in a tensor
    for name in {1: ("zero 0, 1 rank", "accelerate, 1 rank"), 2: ("zero 0, 2 ranks",)}[num_ranks]:
        check_memory(name, weights=whole, gradients=whole, optimizer=2 * whole + steps)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_memory_where_gradients_and_optimizer_are_split(zero_stage: int, num_ranks: int) -> None:
    whole, name = 4 * num_elements(), f"zero {zero_stage}, {num_ranks} rank{'s' * (num_ranks > 1)}"
    # 9 norms of 32 elements are cut in the middle of the fifth: both ranks hold its gradient whole
    at_the_cut = 4 * 16 if num_ranks == 2 else 0
    check_memory(
        name,
        weights=whole,
        gradients=whole / num_ranks + at_the_cut,
        optimizer=3 * whole / num_ranks + 4 * NUM_MASTERS,
    )


@pytest.mark.parametrize(
    ("name", "at_most"),
    [("zero 3, 1 rank", 0), ("zero 3, 2 ranks", math.inf), ("zero 3, small weights stay whole", 1000)],
)
def test_memory_where_weights_are_split_but_for_small_ones(name: str, at_most: float) -> None:
    """Up to 100,000 elements is small to DeepSpeed; on one rank the part is the whole."""
    whole, num_ranks = 4 * num_elements(), CASES[name][0]
    check_memory(
        name,
        weights=whole / num_ranks + 4 * num_elements(at_most=at_most),
        gradients=whole / num_ranks,
        optimizer=3 * whole / num_ranks + 4 * NUM_MASTERS,
    )


def test_memory_in_bf16_and_of_fsdp2() -> None:
    elements = num_elements()
    adamw = 12 * elements / 2 + 4 * NUM_MASTERS
    # At ZeRO-1 every rank keeps the whole gradient, added up in fp32, beside that of the last micro batch.
    check_memory("bf16, zero 1", weights=2 * elements, gradients=(4 + 2) * elements, optimizer=adamw)
    check_memory("bf16, zero 2", weights=2 * elements, gradients=4 * elements / 2, optimizer=adamw)
    part, steps = 4 * elements / 2, 4 * num_weights()
    check_memory("accelerate, fsdp2", weights=part, gradients=part, optimizer=2 * part + steps)


def test_components_and_the_rest_are_the_peak() -> None:
    parts = Memory(weights=GIB, gradients=GIB // 2, optimizer=3 * GIB).fields(peak_gib=5.25)
    assert parts == {"weights_gib": 1.0, "gradients_gib": 0.5, "optimizer_gib": 3.0, "rest_gib": 0.75}


def test_components_that_were_not_there_at_once_are_left_out() -> None:
    assert Memory(weights=GIB, gradients=GIB, optimizer=3 * GIB).fields(peak_gib=4.5) == {}


def test_memory_that_tensors_share_is_counted_once() -> None:
    flat, other = torch.zeros(100), torch.zeros(10)
    views = [flat[:50], flat[50:].view(5, 10), None, torch.zeros(0)]
    device = torch.device("cpu")
    found = memory_of(weights=views, optimizer=[other, flat], gradient_bytes=7, device=device)
    assert found == Memory(weights=400, gradients=7, optimizer=40)
    elsewhere = torch.zeros(8, device="meta")
    assert storages([elsewhere, other], device) == {other.untyped_storage().data_ptr(): 40}


def test_a_gradient_that_is_not_all_there_has_no_norms() -> None:
    placement: Any = SimpleNamespace(
        model=SimpleNamespace(num_layers=1),
        shapes={"head.weight": (2, 3)},
        groups=SimpleNamespace(topology=SimpleNamespace(world_size=1)),
    )
    for numel, wanted in ((6, {"head": 2.5}), (5, None)):
        squares = GradientSquares(placement, torch.device("cpu"))
        squares.add("head.weight", torch.ones(numel))
        assert squares.norms(2.5) == wanted
    assert squares.norms(math.nan) is None
