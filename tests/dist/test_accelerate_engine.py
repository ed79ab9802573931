"""Accelerate's DDP and FSDP2 against plain PyTorch in one process, and what the engine relies on below it."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import accelerate_worker
import engine_worker
import numpy as np
import pytest
from ranks import run_ranks

from llmtrain.bench import ranks
from llmtrain.train.config import Precision
from llmtrain.train.engines import _warn_of_unheard

STAGES = (0, 2, 3)


@cache
def reference(family: str, optimizer: str = "adamw") -> dict[str, Any]:
    return engine_worker.reference(family, optimizer)


@cache
def results(num_ranks: int) -> dict[str, Any]:
    """One start of `num_ranks` processes runs every case."""
    cases: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        shared = {"engine": "accelerate", "zero_stage": stage, "micro": engine_worker.ROWS // num_ranks}
        cases[f"llama {stage}"] = shared | {"family": "llama"}
        # 2 micro batches a step, and 4 after the ramp; at one row on 4 ranks, as many as rows
        cases[f"gpt2 {stage}"] = shared | {"family": "gpt2", "micro": shared["micro"] // 2, "recompute": 2}
        cases[f"bf16 {stage}"] = shared | {"family": "llama", "precision": "bf16"}
    cases["muon 0"] = cases["llama 0"] | {"optimizer": "muon"}
    if num_ranks > 1:
        shared = {"engine": "accelerate", "cp_size": 2, "micro": engine_worker.ROWS // (num_ranks // 2)}
        for context in ("heads", "sequence"):
            for stage in (0, 3):
                cases[f"{context} {stage}"] = shared | {
                    "zero_stage": stage,
                    "context": context,
                    "family": "llama",
                }
        cases["bf16 sequence 0"] = cases["sequence 0"] | {"precision": "bf16"}
    told: dict[str, Any] = run_ranks(
        Path(engine_worker.__file__), json.dumps(cases), num_ranks=num_ranks, timeout_s=290
    )[0]
    return told


def assert_equal(told: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(told["loss"], expected["loss"], rtol=2e-6)
    np.testing.assert_allclose(told["grad_norm"], expected["grad_norm"], rtol=1e-5)
    # AdamW's first updates amplify the order of fp32 sums where a gradient is near zero
    np.testing.assert_allclose(told["checksum"], expected["checksum"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_number_of_ranks_equals_plain_pytorch(num_ranks: int, stage: int, family: str) -> None:
    """gpt2 with a tied embedding and every second block recomputed."""
    assert_equal(results(num_ranks)[f"{family} {stage}"], reference(family))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("context", ["heads", "sequence"])
def test_context_parallelism_equals_plain_pytorch(num_ranks: int, stage: int, context: str) -> None:
    assert_equal(results(num_ranks)[f"{context} {stage}"], reference("llama"))


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_under_ddp_equals_plain_pytorch(num_ranks: int) -> None:
    assert_equal(results(num_ranks)["muon 0"], reference("llama", "muon"))


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["bf16 0", "bf16 2", "bf16 3", "bf16 sequence 0"])
def test_bf16_stays_near_fp32(num_ranks: int, case: str) -> None:
    if num_ranks == 1 and "sequence" in case:
        pytest.skip("one rank has nobody to share a row with")
    told, expected = results(num_ranks)[case]["loss"], reference("llama")["loss"]
    # bf16 keeps 8 bits; measured 1.2e-3 at most over 10 steps
    np.testing.assert_allclose(told, expected, atol=2e-2)
    assert told != pytest.approx(expected, rel=1e-6), "nothing was computed in bf16"


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_held_out_sums_are_those_of_one_process(num_ranks: int) -> None:
    expected = results(1)["llama 0"]["held_out"]
    for case, told in results(num_ranks).items():
        if not case.startswith(("gpt2", "bf16", "muon")):
            assert told["held_out"] == pytest.approx(expected, rel=1e-5), case


def test_clipping_is_at_work_in_the_reference() -> None:
    assert min(reference("llama")["grad_norm"]) > engine_worker.CLIP, "a wrong norm would not be seen"


# -- below the engine


@cache
def looks() -> list[dict[str, Any]]:
    """What each of 3 ranks saw: new processes, for what they have imported is looked at."""
    command = [sys.executable, accelerate_worker.__file__]
    return ranks.run_ranks(command, num_ranks=3, timeout_s=240)


def test_a_run_goes_on_with_other_parts_of_the_same_numbers() -> None:
    losses = looks()[0]["goes_on_elsewhere"]
    for engines, told in losses.items():
        assert told == pytest.approx(losses["2 2"], rel=2e-6), engines


def test_each_rank_has_memory_for_its_rows_alone() -> None:
    held = [told["rows_held"] for told in looks()]
    assert [rank["keys"] for rank in held] == [2, 2, 0], "4 rows over 3 ranks, as torch.chunk does it"
    assert [rank["embedding"] for rank in held] == [32, 32, 32]
    assert [rank["whole"] for rank in held] == [[], [], []]


def test_gradients_travel_once_a_step_under_ddp_and_once_a_micro_batch_where_they_are_split() -> None:
    calls = looks()[0]["collectives"]
    assert calls["0 3"]["allreduce_"] == calls["0 1"]["allreduce_"] > 0
    for stage in (2, 3):
        once, thrice = (calls[f"{stage} {num}"]["_reduce_scatter_base_"] for num in (1, 3))
        assert thrice == 3 * once > 0


def test_stage_2_gathers_weights_once_a_micro_batch_and_stage_3_twice() -> None:
    calls = {name: told.get("_allgather_base_", 0) for name, told in looks()[0]["collectives"].items()}
    num_blocks = accelerate_worker.NARROW.num_layers
    num_units = num_blocks + 2  # the final norm; and what is left, embedding and head
    assert calls == {
        "0 1": 0,
        "0 3": 0,
        "2 1": num_units,
        "2 3": 3 * num_units,
        "3 1": num_units + num_blocks,
        "3 3": 3 * (num_units + num_blocks),
    }


@pytest.mark.parametrize("stage", ["0", "2"])
def test_gradients_of_micro_batches_are_added_up_in_fp32(stage: str) -> None:
    one, many = looks()[0]["norms_over_micro_batches"][stage]
    # 3, 5, 7 times a gradient of 8 bits does not fit 8 bits: sums in bf16 would be off by 1e-3
    assert many == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_a_load_after_an_evaluation_is_heard(stage: str) -> None:
    first, second, *in_one_engine = looks()[0]["held_out_after_a_load"][stage]
    assert in_one_engine == [first, second]
    assert first != second


def test_a_step_of_padding_alone_is_no_division_by_zero() -> None:
    assert looks()[0]["padding_alone"] == [0, 0]


def test_the_environment_is_neither_heard_nor_changed() -> None:
    """Every rank had ACCELERATE_USE_FSDP and ACCELERATE_DYNAMO_BACKEND set while the cases above ran."""
    for told in looks():
        assert set(told["environment_changed"]) <= {"TORCHINDUCTOR_CACHE_DIR"}, "torch sets it when imported"
        assert not told["threads_changed"]


def test_deepspeed_is_not_imported() -> None:
    assert not any(told["deepspeed_imported"] for told in looks())


def test_accelerate_still_needs_what_the_engine_does_for_it() -> None:
    """A failure here is good news: a workaround can go."""
    told = looks()[0]["accelerate_itself"]
    assert not told["hears of FSDP on a CPU"]
    assert told["weights"] > told["weights in the optimizer"] == 1, "addresses on the meta device are all 0"
    assert (told["reduces in"], told["loss in"]) == ("torch.bfloat16", "torch.bfloat16")
    assert "ACCELERATE_USE_FSDP" in told["writes"]


def test_what_accelerate_launch_was_told_in_vain_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    _warn_of_unheard(Precision.bf16)
    assert caplog.text == "", "the launcher always sets it"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    _warn_of_unheard(Precision.fp32)
    assert (
        "ACCELERATE_USE_FSDP=true, ACCELERATE_MIXED_PRECISION=bf16 has no effect: parallel.zero_stage and "
        "train.precision say how ranks share work" in caplog.text
    )
