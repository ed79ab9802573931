"""Muon, the same numbers in every layout: against plain PyTorch in one process, and over a change of
layout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import engine_worker
import numpy as np
import pytest
from ranks import run_ranks

RESUME_WORKER = Path(__file__).with_name("muon_worker.py")
Case = dict[str, Any]

LAYOUTS: dict[str, tuple[int, Case]] = {
    "zero 0, one process": (1, {"zero_stage": 0, "micro": 4}),
    "zero 1, one process": (1, {"zero_stage": 1, "micro": 4}),
    "zero 0, dp 2": (2, {"zero_stage": 0, "micro": 2}),
    "zero 1, dp 2": (2, {"zero_stage": 1, "micro": 2}),
    "zero 2, dp 2, gpt2": (2, {"zero_stage": 2, "micro": 2, "family": "gpt2"}),
    "accelerate, dp 2": (2, {"zero_stage": 0, "micro": 2, "engine": "accelerate"}),
    "tp 2, sp": (2, {"zero_stage": 0, "micro": 4, "tp_size": 2, "sequence_parallel": True}),
    "cp 2": (2, {"zero_stage": 2, "micro": 4, "cp_size": 2, "context": "sequence"}),
    "pp 2, gpt2": (2, {"zero_stage": 1, "micro": 4, "pp_size": 2, "family": "gpt2"}),
    "tp 4 with 2 key/value heads": (4, {"zero_stage": 1, "micro": 4, "tp_size": 4}),
    "dp 2, tp 2, zero 0": (4, {"zero_stage": 0, "micro": 2, "tp_size": 2}),
    "dp 2, tp 2, zero 2": (4, {"zero_stage": 2, "micro": 2, "tp_size": 2, "sequence_parallel": True}),
    "pp 2, tp 2": (4, {"zero_stage": 1, "micro": 4, "pp_size": 2, "tp_size": 2}),
    "pp 2, dp 2": (4, {"zero_stage": 1, "micro": 2, "pp_size": 2}),
}
"""Name -> (ranks, what engine_worker is told). Pipelines last: see test_layouts."""

BF16 = {
    "bf16, zero 1": {"zero_stage": 1, "micro": 2},
    "bf16, zero 2": {"zero_stage": 2, "micro": 2},
    "bf16, pp 2": {"zero_stage": 1, "micro": 4, "pp_size": 2},
}

RESUMED: dict[str, Case] = {
    "zero 1, bf16": {"zero_stage": 1, "precision": "bf16"},
    "zero 2": {"zero_stage": 2},
    "zero 0": {"zero_stage": 0},
    "tp 2": {"zero_stage": 1, "tp_size": 2, "sequence_parallel": True},
    "pp 2": {"zero_stage": 1, "pp_size": 2},
}
"""Each goes on from its own state, and in fp32 from that of the one before it."""


@cache
def results(num_ranks: int) -> dict[str, Any]:
    """One start of `num_ranks` processes runs every case: DeepSpeed's import is most of the time."""
    cases = {
        name: {"family": "llama", "optimizer": "muon", **case}
        for name, (ranks, case) in LAYOUTS.items()
        if ranks == num_ranks
    }
    if num_ranks == 2:
        half = {
            name: {"family": "llama", "optimizer": "muon", "precision": "bf16"} | BF16[name] for name in BF16
        }
        cases = dict(sorted((cases | half).items(), key=lambda item: "pp" in item[0]))
    told: dict[str, Any] = run_ranks(Path(engine_worker.__file__), json.dumps(cases), num_ranks=num_ranks)[0]
    return told


@cache
def reference(family: str) -> dict[str, Any]:
    return engine_worker.reference(family, "muon")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if ranks == 4 else name
        for name, (ranks, _) in LAYOUTS.items()
    ],
)
def test_a_layout_equals_plain_pytorch(name: str) -> None:
    num_ranks, case = LAYOUTS[name]
    told, expected = results(num_ranks)[name], reference(case.get("family", "llama"))
    # As close as AdamW's (measured: 2e-7 in both). Newton-Schulz multiplies rounding in the gradient by up to
    # 3.4445^5 = 485, but only along directions whose singular values are next to nothing in the gradient.
    np.testing.assert_allclose(told["loss"], expected["loss"], rtol=2e-6)
    np.testing.assert_allclose(told["grad_norm"], expected["grad_norm"], rtol=2e-6)
    # measured: 2e-5 at most, and AdamW's weights differ from Muon's by 0.5 to 1
    np.testing.assert_allclose(told["checksum"], expected["checksum"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BF16)
def test_bf16_stays_near_fp32(name: str) -> None:
    told = results(2)[name]
    # bf16 keeps 8 bits (measured: losses 6e-5, norms 3e-3)
    np.testing.assert_allclose(told["loss"], reference("llama")["loss"], rtol=1e-3)
    np.testing.assert_allclose(told["grad_norm"], reference("llama")["grad_norm"], rtol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_would_show_a_wrong_norm_and_a_wrong_optimizer(family: str) -> None:
    adamw = engine_worker.reference(family)
    assert max(reference(family)["grad_norm"]) > engine_worker.CLIP, "nothing is clipped"
    assert np.abs(np.subtract(adamw["loss"], reference(family)["loss"])).max() > 1e-3


@cache
def stopped_and_resumed() -> dict[str, Any]:
    told: dict[str, Any] = run_ranks(RESUME_WORKER, json.dumps(RESUMED), num_ranks=2)[0]
    return told


@pytest.mark.parametrize("name", [name for name in RESUMED if "precision" not in RESUMED[name]])
def test_many_small_exchanges_equal_plain_pytorch(name: str) -> None:
    """The resume worker exchanges a few matrices at a time; its first steps are the reference's."""
    steps = engine_worker.RAMP_STEPS
    told = stopped_and_resumed()[name]["loss"][:steps]
    np.testing.assert_allclose(told, reference("llama")["loss"][:steps], rtol=2e-6)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_on_the_same_layout_is_bit_equal(name: str) -> None:
    told = stopped_and_resumed()[name]
    assert told["own"] == told["loss"][-len(told["own"]) :]
    assert told["own_state_is_equal"]


@pytest.mark.parametrize("name", [name for name in RESUMED if "precision" not in RESUMED[name]][1:])
def test_a_resume_on_another_layout_goes_on_alike(name: str) -> None:
    told = stopped_and_resumed()[name]
    # other sums, other order of fp32 additions
    np.testing.assert_allclose(told["other"], told["loss"][-len(told["other"]) :], rtol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_matrices_of_blocks_have_a_momentum_and_all_else_has_adamws_state(name: str) -> None:
    kinds = stopped_and_resumed()[name]["kinds"]
    assert len(kinds) == 4 * 9 + 3
    for weight, found in kinds.items():
        is_matrix = weight.startswith("blocks.") and "norm" not in weight
        assert found == (["momentum", "weight"] if is_matrix else ["exp_avg", "exp_avg_sq", "weight"]), weight
