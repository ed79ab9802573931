"""Which engine a layout asks for. An engine's library is imported when it is asked for, and not before."""

from __future__ import annotations

import torch

from llmtrain.parallel.config import EngineKind
from llmtrain.train.config import OptimizerConfig, TrainConfig
from llmtrain.train.engine import Engine
from llmtrain.train.placement import Placement


def open_engine(
    placement: Placement, *, device: torch.device, train: TrainConfig, optimizer: OptimizerConfig
) -> Engine:
    """The engine with its model. Every rank calls this; weights are undefined until `load`."""
    parallel = placement.parallel
    if parallel.engine is EngineKind.accelerate:
        from llmtrain.train.accelerate_engine import AccelerateEngine  # noqa: PLC0415  0.5 s of imports

        return AccelerateEngine(placement, device=device, train=train, optimizer=optimizer)
    if parallel.pp_size > 1:
        from llmtrain.train.pipeline_engine import PipelineEngine  # noqa: PLC0415  DeepSpeed: 3 s of imports

        return PipelineEngine(placement, device=device, train=train, optimizer=optimizer)
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415  3 s of imports

    return DeepSpeedEngine(placement, device=device, train=train, optimizer=optimizer)
