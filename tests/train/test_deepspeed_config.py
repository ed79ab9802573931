"""DeepSpeed accepts unknown keys in silence, so every key we write must be one that it reads."""

from __future__ import annotations

import pytest

from llmtrain.parallel.config import ParallelConfig
from llmtrain.train.config import Precision, TrainConfig
from llmtrain.train.deepspeed_config import deepspeed_config, our_keys


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("default")  # DeepSpeed's own imports warn
def test_deepspeed_reads_back_what_we_mean(stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: PLC0415  slow, and warns

    train = TrainConfig(
        total_tokens=1, global_batch_rows=24, micro_batch_rows=3, grad_clip=0.25, precision=Precision.bf16
    )
    ours = deepspeed_config(train, ParallelConfig(zero_stage=stage, pp_size=2), dp_size=1)
    theirs = DeepSpeedConfig(ours)
    assert theirs.train_batch_size == 24
    assert theirs.train_micro_batch_size_per_gpu == 3
    assert theirs.gradient_accumulation_steps == 8
    assert theirs.gradient_clipping == 0.25
    assert theirs.zero_optimization_stage == stage
    assert theirs.zero_config.overlap_comm is False
    assert theirs.bfloat16_config.enabled
    assert not theirs.float16_config.enabled
    assert theirs.grad_accum_dtype == "fp32"
    assert theirs.pipeline["pipe_partitioned"] is theirs.pipeline["grad_partitioned"] is False
    assert theirs.zero_allow_untested_optimizer
    assert theirs.steps_per_print == 2**62
    assert theirs.wall_clock_breakdown is False
    known = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "bf16",
        "fp16",
        "data_types",
        "pipeline",
        "zero_allow_untested_optimizer",
        "steps_per_print",
        "wall_clock_breakdown",
    }
    assert ours.keys() == known, "read it back above, too"


def test_clipping_can_be_switched_off() -> None:
    train = TrainConfig(total_tokens=1, global_batch_rows=1, micro_batch_rows=1, grad_clip=0.0)
    assert deepspeed_config(train, ParallelConfig(), dp_size=1)["gradient_clipping"] == 0.0


def test_a_users_keys_come_on_top_and_ours_are_not_theirs_to_give() -> None:
    train = TrainConfig(total_tokens=1, global_batch_rows=8, micro_batch_rows=2)
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    parallel = ParallelConfig(zero_stage=2, deepspeed=extra)
    config = deepspeed_config(train, parallel, dp_size=2)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2
    assert {"zero_optimization.stage", "wall_clock_breakdown"} <= our_keys(train, parallel)
    assert "zero_optimization.reduce_bucket_size" not in our_keys(train, parallel)
