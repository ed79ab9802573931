"""DeepSpeed's configuration.

What changes numbers is written out, but for one default: in bf16, gradients of micro batches are added up in
bf16 (data_types.grad_accum_dtype), which moved a gradient norm by 0.2% over 128 of them.
"""

from __future__ import annotations

from typing import Any

from llmtrain.parallel.config import ParallelConfig
from llmtrain.train.config import Precision, TrainConfig


def deepspeed_config(train: TrainConfig, parallel: ParallelConfig, *, dp_size: int) -> dict[str, Any]:
    """Keys are checked by a test against DeepSpeed's own readers: it accepts unknown top-level keys in
    silence."""
    rows = max([train.global_batch_rows, *(stage.rows for stage in train.batch_ramp)])
    return {
        "train_batch_size": rows,  # the most; the engine says where each step ends
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": rows // (train.micro_batch_rows * dp_size),
        "gradient_clipping": train.grad_clip,  # DeepSpeed clips at 1.0 when the key is absent
        "bf16": {"enabled": train.precision is Precision.bf16},
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
