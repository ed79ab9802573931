"""What to expect of a run: a step over all steps, with restarts, a price and the loss at the end."""

from __future__ import annotations

import math
from dataclasses import replace

from llmtrain.errors import ConfigError
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_non_embedding_params, num_params
from llmtrain.planner.calibrate import Calibration
from llmtrain.planner.cost.architecture import from_model_config
from llmtrain.planner.cost.cluster import THIS_MACHINE, Cluster
from llmtrain.planner.cost.costs import find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.memory import MemoryProgram
from llmtrain.planner.interval import Interval
from llmtrain.planner.loss.laws import forecast_loss
from llmtrain.planner.loss.repetition import repetition_factor
from llmtrain.planner.plan import Forecast, PlanFile
from llmtrain.planner.prediction import Prediction, predict

SECONDS_PER_HOUR = 3600.0


def forecast_of(
    prediction: Prediction,
    model: ModelConfig,
    *,
    cluster: Cluster,
    total_tokens: float,
    global_batch_tokens: int,
    unique_tokens: float | None,
) -> Forecast:
    """A step's prediction, over a whole run."""
    from_laws = forecast_loss(
        num_params=num_params(model),
        num_non_embedding_params=num_non_embedding_params(model),
        num_tokens=total_tokens,
        vocab_size=model.vocab_size,
    )
    repeats = 1.0
    if unique_tokens is not None and unique_tokens < total_tokens:
        repeats = repetition_factor(
            num_params=num_params(model), num_tokens=total_tokens, unique_tokens=unique_tokens
        )
    loss, nothing = from_laws.loss, math.log(model.vocab_size)
    train_s = prediction.step_s.scaled(total_tokens / global_batch_tokens)
    total_s = train_s.scaled(1 / cluster.goodput)
    gpu_hours = total_s.scaled(cluster.num_gpus / SECONDS_PER_HOUR)
    price = cluster.price_usd_per_gpu_hour
    return Forecast(
        step_s=prediction.step_s,
        tokens_per_s=prediction.tokens_per_s,
        train_s=train_s,
        total_s=total_s,
        gpu_hours=gpu_hours,
        usd=None if price is None else gpu_hours.scaled(price),
        goodput=cluster.goodput,
        loss=Interval(**{end: min(getattr(loss, end) * repeats, nothing) for end in ("low", "mid", "high")}),
        loss_law=from_laws.law,
        loss_decades_outside=from_laws.decades_outside,
        peak_bytes=prediction.peak_bytes,
        recorded_bytes=_recorded(prediction, cluster),
        mfu=prediction.mfu,
        time_parts=prediction.time,
        memory_parts=prediction.memory,
        memory_instants=prediction.instants,
        constants_from=(
            prediction.source
            if prediction.distance.decades is None
            else f"{prediction.source}; this run: {prediction.distance.text}"
        ),
    )


def forecast_run(plan: PlanFile, model: ModelConfig, layout: Layout, *, total_tokens: float) -> Forecast:
    """What the plan's cluster, program and laws say about any run, of the plan's own shape and layout or
    another.

    Raises:
        ConfigError: The layout is for another number of ranks than the plan's cluster has.
    """
    if layout.world_size != plan.cluster.num_gpus:
        raise ConfigError(
            f"the run has {layout.world_size} ranks and the plan's cluster {plan.cluster.num_gpus} GPUs; "
            "plan again with "
            "cluster.nodes and cluster.gpus_per_node as the run has them"
        )
    calibration = None if plan.calibration is None else Calibration.from_json(plan.calibration)
    prediction = predicted(model, layout, plan.cluster, plan.program, calibration)
    return forecast_of(
        prediction,
        model,
        cluster=plan.cluster,
        total_tokens=total_tokens,
        global_batch_tokens=layout.global_batch_tokens,
        unique_tokens=plan.unique_tokens,
    )


def _recorded(prediction: Prediction, cluster: Cluster) -> Interval:
    peak = prediction.peak_bytes
    if cluster.name == THIS_MACHINE:
        return peak
    return peak.scaled(sum(prediction.memory.values()) / peak.mid)


def predicted(
    model: ModelConfig, layout: Layout, cluster: Cluster, program: str, calibration: Calibration | None
) -> Prediction:
    if calibration is None:
        return predict(model, layout, cluster, program=program)
    distance = calibration.distance(from_model_config(model), layout, cluster)
    found = predict(
        model,
        layout,
        cluster,
        program=program,
        constants=calibration.calibrated(decades=distance.decades),
        memory_program=memory_program_of(
            cluster, program, layout.precision, calibration, decades=distance.decades
        ),
    )
    told = "; ".join(distance.sentences) or "inside of them"
    return replace(found, distance=replace(found.distance, decades=distance.decades, text=told))


def memory_program_of(
    cluster: Cluster, program: str, precision: str, calibration: Calibration | None, *, decades: float = 0.0
) -> MemoryProgram | None:
    if calibration is None:
        return None
    shipped = find_costs(program, gpu_name=cluster.gpu.name, precision=precision).memory_program
    return calibration.memory_program(shipped, decades=decades)
