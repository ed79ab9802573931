"""`llmtrain plan calibrate`: constants of step time and memory from what own runs took."""

from __future__ import annotations

import glob
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtrain.cli.compose import run_verb
from llmtrain.errors import ConfigError, DataError
from llmtrain.model.config import ModelConfig
from llmtrain.planner.calibrate import (
    Calibration,
    CalibrationReport,
    Observation,
    calibrate,
    write_calibration,
)
from llmtrain.planner.cost.architecture import from_model_config, num_params
from llmtrain.planner.cost.cluster import CUSTOM, THIS_MACHINE, Cluster, ClusterConfig, resolve_cluster
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.programs import generation_of
from llmtrain.tracking.facts import cpu_name
from llmtrain.tracking.metrics import SETTLING_STEPS, Record
from llmtrain.tracking.run_data import RunData, as_number, read_run
from llmtrain.units import format_bytes, format_duration

CHECKPOINT_BYTES = 12
"""A weight, and two moments, in fp32: what a background save keeps a copy of."""


@dataclass(kw_only=True)
class PlanCalibrateConfig:
    cluster: ClusterConfig
    """What the runs ran on."""
    run: str | None = None
    """Folder of a run."""
    runs: Any = field(default_factory=list)  # Any: one value or a list of them
    """Run folders, folders of run folders, or patterns of them."""
    program: str = "llmtrain"
    out: str = "calibration.json"
    """What `llmtrain plan plan.calibration=FILE` reads."""

    @property
    def patterns(self) -> list[str]:
        given = [self.runs] if isinstance(self.runs, str) else [str(each) for each in self.runs or []]
        return [*([self.run] if self.run is not None else []), *given]

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ConfigError("give the folder of a run, run=runs/demo, or of several, runs=[runs/a,runs/b]")


def main() -> None:
    run_verb("plan_calibrate", PlanCalibrateConfig, run)


def run(cfg: PlanCalibrateConfig) -> None:
    runs = [read_run(folder) for folder in folders_of(cfg.patterns)]
    clusters: dict[int, Cluster] = {}
    observations = []
    for data in runs:
        ranks = ranks_of(data)
        if ranks not in clusters:
            clusters[ranks] = cluster_of(cfg.cluster, ranks)
        observations.append(observation_of(data, clusters[ranks]))
    names = [each.name for each in observations]
    observations = [
        each if names.count(each.name) == 1 else replace(each, name=str(data.folder))
        for each, data in zip(observations, runs, strict=True)
    ]
    report = calibrate(observations, program=cfg.program)
    write_calibration(Path(cfg.out), report.calibration)
    print(report_text(report))
    print(f"\nwritten: {cfg.out}; use it: llmtrain plan plan.calibration={cfg.out} ...")


def folders_of(patterns: Sequence[str]) -> list[Path]:
    """Run folders; a folder without metrics.jsonl stands for those below it. DataError for none."""
    found: list[Path] = []
    for pattern in patterns:
        matched = [Path(name) for name in sorted(glob.glob(pattern)) if Path(name).is_dir()]
        if not matched:
            raise DataError(f"no folder {pattern}; `llmtrain train` makes one for each run")
        for path in matched:
            inside = sorted(inner.parent for inner in path.rglob("metrics.jsonl"))
            if (path / "metrics.jsonl").exists():
                inside = [path]
            if not inside:
                raise DataError(f"{path} holds no run folder (none with metrics.jsonl)")
            found += inside
    return list(dict.fromkeys(found))


def ranks_of(data: RunData) -> int:
    """World size of the attempt whose steps count."""
    return int(_attempt_facts(data).get("world_size") or 1)


def cluster_of(cfg: ClusterConfig, num_ranks: int) -> Cluster:
    """The cluster with room for a run of `num_ranks`. On this machine all of them share it."""
    if cfg.name == THIS_MACHINE:
        return resolve_cluster(replace(cfg, gpus_per_node=cfg.gpus_per_node or num_ranks))
    cluster = resolve_cluster(cfg)
    if num_ranks > cluster.num_gpus:
        nodes = math.ceil(num_ranks / cluster.gpus_per_node)
        cluster = resolve_cluster(replace(cfg, nodes=nodes))
    return cluster


def observation_of(data: RunData, cluster: Cluster) -> Observation:
    """What a run says about step time and memory.

    Seconds are the median over settled steps of the last attempt that has some, without the wait for data;
    the peak is rank 0's.

    Raises:
        DataError: The run has no settled step, a step time that is no number, a setting that no layout says,
            or ran on something else than `cluster`.
    """
    facts = _attempt_facts(data)
    is_cpu = _check_hardware(data, facts, cluster)
    steps = _settled(data)
    seconds = [as_number(step.get("step_s")) for step in steps]
    if None in seconds or min(each for each in seconds if each is not None) <= 0:
        at = next(
            step["step"] for step, each in zip(steps, seconds, strict=True) if each is None or each <= 0
        )
        raise DataError(
            f"{data.folder}: step_s of step {at} is no time (metrics.jsonl was changed, or its writer is "
            "another program); leave the run out"
        )
    waits = [as_number(step.get("data_wait_s")) or 0.0 for step in steps]
    busy = statistics.median(
        each - wait for each, wait in zip(seconds, waits, strict=True) if each is not None
    )
    layout = layout_of(data, world_size=ranks_of(data))
    shape = data.setting("model")
    if not isinstance(shape, dict):
        raise DataError(f"{data.folder}: no model in its config.yaml, so its size is not known")
    arch = from_model_config(ModelConfig(**shape), name=data.name)
    peaks = [each for each in (as_number(step.get("mem_gib")) for step in steps) if each is not None]
    peak = max(peaks) * 2**30 if peaks else None
    if peak is not None and is_cpu and data.setting("save", "in_background") is not False:
        peak -= CHECKPOINT_BYTES * num_params(arch) / layout.world_size
    return Observation(
        name=data.name,
        arch=arch,
        layout=layout,
        cluster=cluster,
        step_s=busy,
        peak_bytes=peak,
        is_resident=is_cpu,
        is_first_rank=True,
    )


def layout_of(data: RunData, *, world_size: int) -> Layout:
    """The run's layout. DataError where it has a setting that Layout does not know."""

    def setting(group: str, name: str, default: Any) -> Any:
        value = data.setting(group, name)
        return default if value is None else value

    def count(group: str, name: str, default: int | None = None) -> int:
        value = setting(group, name, default)
        if not isinstance(value, int):
            raise DataError(f"{data.folder}: {group}.{name}={value} in its config.yaml is no number")
        return value

    every = count("train", "recompute_every", 0)
    if every > 1:
        raise DataError(
            f"{data.folder}: train.recompute_every={every}; costs are known for no block or every block, so "
            "calibrate on a run with 0 or 1"
        )
    pp, cp, tp = (count("parallel", f"{axis}_size", 1) for axis in ("pp", "cp", "tp"))
    rows = count("train", "micro_batch_rows")
    dp, left = divmod(world_size, pp * cp * tp)
    accum, more = divmod(count("train", "global_batch_rows"), rows * max(1, dp))
    if left or more or dp < 1 or accum < 1:
        raise DataError(
            f"{data.folder}: {world_size} ranks with pp, cp and tp of {pp}, {cp} and {tp}, and "
            f"{setting('train', 'global_batch_rows', None)} rows in micro batches of {rows}, is no layout"
        )
    schedule = str(setting("parallel", "pp_schedule", "one_f_one_b"))
    try:
        return Layout(
            seq_len=count("data", "seq_len"),
            pp=pp,
            vpp=2 if pp > 1 and schedule == "dual_pipe_v" else 1,
            dp=dp,
            cp=cp,
            tp=tp,
            zero_stage=count("parallel", "zero_stage", 1),
            micro_batch_rows=rows,
            grad_accum=accum,
            recompute=str(setting("train", "recompute", "full")) if every else "none",
            sequence_parallel=bool(setting("parallel", "sequence_parallel", False)),
            schedule=schedule,
            precision=str(setting("train", "precision", "fp32")),
            compiled=bool(setting("train", "compile_blocks", False)),
        )
    except ConfigError as error:
        raise DataError(f"{data.folder}: {error}") from error


def _settled(data: RunData) -> list[Record]:
    """Steps past the first few, of full batches, of the last attempt that has any."""
    begins = {attempt.number: attempt.begin_step for attempt in data.attempts}
    steps = [
        step
        for step in data.settled()
        if step["step"] > begins.get(step["attempt"], 0) + SETTLING_STEPS and _is_full(step, data)
    ]
    if not steps:
        done = len(data.of_kind("step"))
        raise DataError(
            f"{data.folder} has {done} steps and none that is settled: the first {SETTLING_STEPS} of each "
            "start warm caches up, and steps of a batch ramp are smaller; train longer"
        )
    last = steps[-1]["attempt"]
    return [step for step in steps if step["attempt"] == last]


def _is_full(step: Record, data: RunData) -> bool:
    """Whether a step has train.global_batch_rows rows: it began after the batch ramp."""
    ramp = data.setting("train", "batch_ramp") or []
    if not ramp:
        return True
    begin = step["position"] - data.setting("train", "global_batch_rows")
    return bool(begin * data.setting("data", "seq_len") >= max(stage["until_tokens"] for stage in ramp))


def _attempt_facts(data: RunData) -> dict[str, Any]:
    steps = data.of_kind("step")
    last = steps[-1]["attempt"] if steps else None
    return next((attempt.facts for attempt in data.attempts if attempt.number == last), {})


def _check_hardware(data: RunData, facts: dict[str, Any], cluster: Cluster) -> bool:
    """Whether the run was on a CPU. DataError where it was not on `cluster`'s device."""
    device, gpu = str(facts.get("device") or ""), cluster.gpu.name
    wants_cpu = generation_of(gpu) == "cpu"
    is_cpu = device == "cpu" if device else wants_cpu
    hint = "name the cluster that the runs ran on, as in cluster=h100_sxm_8x"
    if is_cpu != wants_cpu and gpu != CUSTOM:
        raise DataError(f"{data.folder} ran on {device}, and cluster={cluster.name} has {gpu}; {hint}")
    if is_cpu:
        told, here = facts.get("cpu"), cpu_name()
        if told is not None and told != here and cluster.name == THIS_MACHINE:
            raise DataError(
                f"{data.folder} ran on {told}, and this machine, which was measured, is {here}; calibrate "
                "where the run was"
            )
    elif device and gpu != CUSTOM and _kind(gpu) not in re.sub(r"[^a-z0-9]", "", device.lower()):
        raise DataError(f"{data.folder} ran on {device}, and cluster={cluster.name} has {gpu}; {hint}")
    return is_cpu


def _kind(gpu: str) -> str:
    """What drivers write for a GPU of the table: h100_sxm is an "NVIDIA H100 80GB HBM3", rtx_4090 an "... RTX
    4090"."""
    words = gpu.lower().split("_")
    return "".join(words[:2]) if words[0] == "rtx" else words[0]


# -- what is printed


def report_text(report: CalibrationReport) -> str:
    width = max(len(each.name) for each in report.runs)
    lines = [f"{'run'.ljust(width)}  {'':8}{'measured':>11}{'before':>20}{'after':>20}{'left out':>20}"]
    for each in report.runs:
        told = (each.before_s, each.after_s, each.left_out_s)
        cells = [_cell(value, each.measured_s, format_duration) for value in told]
        lines.append(
            f"{each.name.ljust(width)}  {'step':8}{format_duration(each.measured_s):>11}{''.join(cells)}"
        )
        if each.measured_bytes is None:
            lines.append(f"{''.ljust(width)}  {'memory':8}{'not told':>11}")
            continue
        told = (each.before_bytes, each.after_bytes, each.left_out_bytes)
        cells = [_cell(value, each.measured_bytes, format_bytes) for value in told]
        lines.append(
            f"{''.ljust(width)}  {'memory':8}{format_bytes(int(each.measured_bytes)):>11}{''.join(cells)}"
        )
    lines += ["", *_learned(report.calibration, report)]
    return "\n".join(lines)


def _cell(value: float | None, measured: float, shown: Any) -> str:
    if value is None:
        return f"{'-':>20}"
    text = shown(int(value)) if shown is format_bytes else shown(value)
    return f"{f'{text} {value / measured - 1:+.1%}':>20}"


def _learned(calibration: Calibration, report: CalibrationReport) -> list[str]:
    shipped = vars(report.before.constants)
    changed = [
        f"{name} {float(shipped[name]):.3g} -> {value:.3g}"
        for name, value in calibration.constants.items()
        if not math.isclose(float(shipped[name]), value, rel_tol=1e-3)
    ]
    after = calibration.calibrated()
    least = "leaving each out in turn" if len(calibration.runs) > 1 else "a belief, for one run cannot tell"
    ranges = ", ".join(
        f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
        for name, (low, high) in calibration.ranges.items()
    )
    return [
        f"{calibration.method}: all seconds x {calibration.factor:.3f}; "
        + (", ".join(changed) or "no constant moved"),
        f"memory: {calibration.memory_bytes / 2**20:+,.0f} MiB beside what was predicted",
        f"step time of another run like these: 80% within {math.exp(after.log_low) - 1:+.0%} to "
        f"{math.exp(after.log_high) - 1:+.0%} ({least})",
        f"calibrated for: {calibration.gpu} in {calibration.precision}, {ranges}",
    ]
