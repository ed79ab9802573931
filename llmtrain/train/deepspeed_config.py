"""DeepSpeed's configuration, all of it: what changes numbers is written out, a user's own keys come on top.

Loads without torch or DeepSpeed: a check on a login node reads it.
"""

from __future__ import annotations

from typing import Any

from llmtrain.parallel.config import ParallelConfig
from llmtrain.train.config import Precision, TrainConfig


def deepspeed_config(train: TrainConfig, parallel: ParallelConfig, *, dp_size: int) -> dict[str, Any]:
    """Our keys with those of `parallel.deepspeed`. It accepts unknown top-level keys in silence: ours are
    held against its own readers by a test, the user's by parallel/deepspeed_keys.py.

    Args:
        dp_size: ranks that gradients are averaged over: dp x cp.
    """
    return _merged(_our_config(train, parallel, dp_size=dp_size), parallel.deepspeed)


def our_keys(train: TrainConfig, parallel: ParallelConfig) -> set[str]:
    """Dotted keys that a user may not give."""
    return set(_dotted(_our_config(train, parallel, dp_size=1)))


def _our_config(train: TrainConfig, parallel: ParallelConfig, *, dp_size: int) -> dict[str, Any]:
    rows = max([train.global_batch_rows, *(stage.rows for stage in train.batch_ramp)])
    gas = max(1, rows // (train.micro_batch_rows * dp_size))
    config: dict[str, Any] = {
        # The most; the engine says where each step ends. cp ranks count as more rows to DeepSpeed.
        "train_batch_size": train.micro_batch_rows * gas * dp_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": train.grad_clip,  # DeepSpeed clips at 1.0 when the key is absent
        "bf16": {"enabled": train.precision is Precision.bf16},
        "fp16": {"enabled": train.precision is Precision.fp16},
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": False,  # its races are in DeepSpeed's tracker: #5545, #7188, #8061
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,  # the loop logs; DeepSpeed stays quiet
        "wall_clock_breakdown": False,
    }
    if train.precision is not Precision.fp32:
        config["data_types"] = {
            "grad_accum_dtype": "fp32"
        }  # bf16 moved a norm by 0.2% over 128 micro batches
    if parallel.pp_size > 1:
        # Partitioned over tp, activations would be gathered again by every stage; under sequence
        # parallelism they are parts already.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return config


def _merged(ours: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = _merged(ours[key], value) if both else value
    return merged


def _dotted(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found
