"""What DeepSpeed is told of the grid.

It knows two directions: ranks that hold other parts of a model ("model parallel": tp here) and ranks that
hold the same and are averaged over ("data parallel": dp x cp here). Context-parallel ranks are data-parallel
ranks to it: told of a sequence axis, DeepSpeed 0.19.8 multiplies gradients by its size at ZeRO 0-2.

Its norm of the gradient counts a parameter on every rank where it is marked, and an unmarked one on tp
rank 0 alone.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.groups import Groups


def mark_for_norm(parameter: Tensor, *, counts_here: bool) -> None:
    """Say whether this tp rank's part of `parameter` enters the norm: each element does once."""
    parameter.tensor_model_parallel = counts_here  # type: ignore[attr-defined]


class Mpu:
    """The adapter, for `deepspeed.initialize(mpu=...)` and `zero.Init(mpu=...)`. Names are DeepSpeed's."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        alone = None
        if groups.tp.group is None or groups.data.group is None:
            for rank in range(dist.get_world_size()):  # DeepSpeed wants a group where an axis has one rank
                group = dist.new_group([rank])
                alone = group if rank == dist.get_rank() else alone
        self._tp, self._data = groups.tp.group or alone, groups.data.group or alone

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tp

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data
