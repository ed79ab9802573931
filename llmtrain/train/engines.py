"""Which engine a layout asks for. An engine's library is imported when it is asked for, and not before."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from llmtrain.parallel.config import EngineKind
from llmtrain.train.config import OptimizerConfig, Precision, TrainConfig
from llmtrain.train.engine import Engine
from llmtrain.train.placement import Placement

log = logging.getLogger(__name__)


def open_engine(
    placement: Placement, *, device: torch.device, train: TrainConfig, optimizer: OptimizerConfig
) -> Engine:
    """The engine with its model. Every rank calls this; weights are undefined until `load`."""
    parallel = placement.parallel
    if dist.get_rank() == 0:
        _warn_of_unheard(train.precision)
    if parallel.engine is EngineKind.accelerate:
        from llmtrain.train.accelerate_engine import AccelerateEngine  # noqa: PLC0415  0.5 s of imports

        return AccelerateEngine(placement, device=device, train=train, optimizer=optimizer)
    if parallel.pp_size > 1:
        from llmtrain.train.pipeline_engine import PipelineEngine  # noqa: PLC0415  DeepSpeed: 3 s of imports

        return PipelineEngine(placement, device=device, train=train, optimizer=optimizer)
    from llmtrain.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415  3 s of imports

    return DeepSpeedEngine(placement, device=device, train=train, optimizer=optimizer)


def _warn_of_unheard(precision: Precision) -> None:
    """Name what `accelerate launch` was asked for and the run's config does not say."""
    told = {
        name: value
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
        if (value := os.environ.get(f"ACCELERATE_USE_{name}", "false")).lower() == "true"
    }
    unheard = [f"ACCELERATE_USE_{name}={value}" for name, value in told.items()]
    mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in ("no", precision.name):
        unheard.append(f"ACCELERATE_MIXED_PRECISION={mixed_precision}")
    if unheard:
        log.warning(
            "%s has no effect: parallel.zero_stage and train.precision say how ranks share work",
            ", ".join(unheard),
        )
