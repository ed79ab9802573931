"""DeepSpeed itself, on two ranks: every rule about it has its reason, and what else our engine relies on.

Where a test fails after an upgrade, DeepSpeed has changed: look whether the rule that it names can go.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from ranks import run_ranks

from llmtrain.parallel.compatibility import RULES
from llmtrain.parallel.config import EngineKind

WORKER = Path(__file__).with_name("rules_worker.py")  # not imported: it imports DeepSpeed, which warns
Test = TypeVar("Test", bound=Callable[..., None])

supported: set[str] = set()


def supports(rule: str) -> Callable[[Test], Test]:
    """The test shows why a rule of compatibility.py is one."""
    supported.add(rule)
    return lambda test: test


@cache
def told() -> list[dict[str, Any]]:
    """What each rank saw; one start of two processes runs every case."""
    ranks: list[dict[str, Any]] = run_ranks(WORKER, num_ranks=2)
    return ranks


def seen(case: str) -> Any:
    """By rank 0."""
    return told()[0][case]


def test_every_combination_that_deepspeed_forbids_is_run_here() -> None:
    about_deepspeed = {
        rule.name for rule in RULES if rule.kind == "combination" and rule.engine is EngineKind.deepspeed
    }
    assert about_deepspeed == supported


@supports("pipeline_with_zero_2_or_3")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_pipeline_refuses_zero_2_and_3(stage: int) -> None:
    for rank in told():
        message = "AssertionError: ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism"
        assert rank[f"pipeline/{stage}"] == message


@supports("pipeline_with_zero_0")
def test_the_pipeline_clips_by_the_norm_of_a_stage_at_zero_0_and_of_all_at_zero_1() -> None:
    expected = seen("reference/sgd")["loss"]
    np.testing.assert_allclose(seen("pipeline/1")["loss"], expected, rtol=1e-5)
    wrong = seen("pipeline/0")["loss"]
    assert wrong[0] == pytest.approx(expected[0], rel=1e-5), "before the first update all is equal"
    assert wrong[-1] < expected[-1] - 0.05, "each stage's norm is smaller than the whole: it moves further"


@supports("few_micro_batches_for_dual_pipe_v")
def test_dual_pipe_v_wants_two_micro_batches_a_stage_at_every_step() -> None:
    for rank in told():
        assert rank["dual_pipe_v/enough"] > 0
        at_start = "AssertionError: DualPipeV needs gradient_accumulation_steps >= 2 * 2, got 3"
        assert rank["dual_pipe_v/too few"] == at_start
        at_a_step = "ValueError: DualPipeV needs at least 2 * 2 micro-batches, got 3"
        assert rank["dual_pipe_v/too few later"] == at_a_step


@supports("half_precision_with_zero_0")
def test_bf16_at_zero_0_is_a_step_ahead() -> None:
    expected, at_0, at_1 = seen("reference/adamw"), seen("bf16/adamw/0"), seen("bf16/adamw/1")
    steps = len(expected["loss"])
    assert (at_0["counts"], at_1["counts"]) == ([steps + 1], [steps])
    # bf16 keeps 8 bits
    np.testing.assert_allclose(at_1["loss"], expected["loss"], atol=2e-3)
    np.testing.assert_allclose(at_1["norm"], expected["norm"], atol=2e-3)
    np.testing.assert_allclose(at_0["norm"][0], expected["norm"][0], atol=2e-3)
    assert at_0["loss"][1] > expected["loss"][1] + 0.01, "the first update is a second's: too small"


@supports("fp16_off_cuda")
def test_fp16_is_taken_or_refused_as_the_cpu_has_it() -> None:
    refusal = "ValueError: Type fp16 is not supported on your device."
    assert seen("fp16 where the CPU has none") == refusal
    assert seen("fp16") in ("", refusal)


@supports("muon_at_zero_3")
def test_zero_3_hands_the_optimizer_flat_pieces() -> None:
    assert seen("shapes")["shapes"] == [[32]], "half of 8 x 8"
    assert seen("shapes")["muon"].startswith("ValueError: Muon only supports 2D parameters")


def test_zero_1_in_fp32_equals_plain_pytorch() -> None:
    """So the other cases differ by what they are about."""
    np.testing.assert_allclose(seen("fp32/sgd/1")["loss"], seen("reference/sgd")["loss"], rtol=1e-5)
    np.testing.assert_allclose(seen("fp32/sgd/1")["norm"], seen("reference/sgd")["norm"], rtol=1e-5)


def test_unknown_keys_are_taken_in_silence_but_in_checked_sections() -> None:
    assert seen("keys")["stage"] == 0
    assert seen("keys")["clip"] == 1.0, "the default when the key is absent"
    assert "stagee\n  Extra inputs are not permitted" in seen("keys")["in a checked section"]


@pytest.mark.parametrize(("stage", "kept"), [(0, "both"), (1, "last"), (2, "last"), (3, "both")])
def test_of_two_backwards_before_a_step_zero_1_and_2_keep_the_last(stage: int, kept: str) -> None:
    distance = dict(seen(f"two backwards/{stage}"))
    assert distance.pop(kept) < 1e-5
    assert min(distance.values()) > 1.0


def test_ranks_that_share_positions_are_data_parallel_ranks_to_deepspeed() -> None:
    for rank in told():
        assert rank["context/none/1"]["once"] < 1e-5


@pytest.mark.parametrize(("stage", "factor"), [(0, "twice"), (1, "twice"), (2, "twice"), (3, "once")])
def test_an_mpu_with_sequence_parallel_ranks_multiplies_gradients_below_zero_3(
    stage: int, factor: str
) -> None:
    for rank in told():
        assert rank[f"context/mpu/{stage}"][factor] < 1e-5


@pytest.mark.parametrize(
    ("stage", "what"), [(0, "own twice"), (1, "own twice"), (2, "own twice"), (3, "once")]
)
def test_sequence_parallel_size_in_the_config_sums_no_gradients_below_zero_3(stage: int, what: str) -> None:
    for rank in told():
        assert rank[f"context/mesh/{stage}"][what] < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_a_tensor_parallel_weight_without_its_mark_is_left_out_of_the_norm(stage: int) -> None:
    marked, unmarked = seen(f"tensor/marked/{stage}"), seen(f"tensor/unmarked/{stage}")
    assert marked["norm"] == pytest.approx(marked["whole"], rel=1e-5)
    assert unmarked["norm"] == pytest.approx(unmarked["without rank 1's half"], rel=1e-5)
    assert unmarked["norm"] < 0.9 * unmarked["whole"]
