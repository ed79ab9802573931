"""Constants of step time and memory, updated by what a team's own runs took.

What is fitted depends on how many runs there are, so that no run is explained by more constants than it can
tell of:

    1       one factor on all seconds; bytes added to the peak
    2, 3    that factor, and each constant held near the shipped one by the same ridge (RIDGE)
    4, ...  that factor, and each constant with a width of its own (WIDTHS): the maximum of the posterior

All of it is one minimisation over the logarithms of the constants, by Gauss-Newton steps:

      sum over runs       (log(measured / predicted) / noise)^2      NOISE; NOISE_OF_FEW with 2 or 3
    +                     (log factor / FACTOR_WIDTH)^2
    + sum over constants  (log(constant / shipped) / width)^2        beside the factor

On BLOOM's published runs, left out in turn, one factor took the mean error from 17.9% to 8.4%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.errors import DataError
from llmtrain.files import hash_json, plain, read_json, write_json
from llmtrain.planner.cost import architecture
from llmtrain.planner.cost import cluster as clusters
from llmtrain.planner.cost import layout as layouts
from llmtrain.planner.cost.architecture import Architecture, num_params
from llmtrain.planner.cost.candidates import DEFAULTS, Candidates, candidates
from llmtrain.planner.cost.cluster import Cluster
from llmtrain.planner.cost.costs import Costs, find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.cost.memory import PLACES, MemoryProgram, memory
from llmtrain.planner.cost.programs import Calibrated, generation_of
from llmtrain.planner.cost.step_time import Constants, step_time
from llmtrain.planner.interval import Interval, decades_between

FORMAT_VERSION = 1

WIDTHS: Mapping[str, float] = {
    "gemm_efficiency": 0.25,
    "attention_efficiency": 0.25,
    "memory_efficiency": 0.35,
    "launch_s": 0.5,
    "link_efficiency": 0.3,
    "node_efficiency": 0.3,
    "call_s": 0.5,
    "fixed_s": 1.0,
}
"""Constant -> standard deviation of its logarithm beside the common factor. Products, attention, memory and
launches: how far the programs of cost/programs.py, all fitted to published runs, lie apart (0.43 to 0.89,
0.45 to 0.87, 0.28 to 0.74, 0.3 to 0.9 ms). Links, network and calls: what placement and congestion do to
printed bandwidths; fixed seconds depend on the host: assumed, not measured."""
RIDGE = 0.15
"""Of each of them, when there are two or three runs: half of a typical width, for they can tell of one or
two."""
FACTOR_WIDTH = 0.5
"""Of the common factor: programs on other generations than their own are off by up to 1.6."""
NOISE = 0.05
"""Standard deviation of log(measured / predicted) that no constant can take away. vTrain's rows, left out in
turn, have 0.03 to 0.05."""
NOISE_OF_FEW = 0.10
"""The same with two or three runs, which could be met by constants that are far off: SPREAD, below."""

SPREAD, SPREAD_RUNS = 0.10, 4.0
"""Before any run tells: residuals' standard deviation once calibrated, and the number of runs that this
belief counts as. A mean error of 8.4% (BLOOM's, above) is a standard deviation of 0.105."""
MEMORY_SPREAD = 0.04
"""The same of the peak: 5% is the mean error of Megatron-LM's golden rows before calibration."""
WIDER_PER_DECADE = 0.10
"""Standard deviation that each power of ten outside of the calibrated runs adds, in quadrature. Assumed, not
measured."""
MOST_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A run that was measured."""

    name: str
    arch: Architecture
    layout: Layout
    cluster: Cluster
    step_s: float
    """Of a settled step."""
    peak_bytes: float | None
    """None: not known."""
    is_resident: bool = False
    """Whether peak_bytes is all that the process holds, as on a CPU; else what the allocator gave out."""
    is_first_rank: bool = False
    """Whether peak_bytes is of rank 0, the first of a pipeline, as in metrics.jsonl; else of the fullest
    rank."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a question lies from the runs that were calibrated on."""

    decades: float
    """Powers of ten outside, in the quantity that is furthest; one decade from none to some. 0: inside of
    all."""
    sentences: tuple[str, ...]
    """One for each quantity that is outside, the furthest first."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `llmtrain plan calibrate` learned; its file is this as JSON, with a hash."""

    program: str
    gpu: str
    precision: str
    runs: tuple[str, ...]
    method: str
    factor: float
    """Seconds over those of the shipped constants: the part common to all."""
    constants: Mapping[str, float]
    """Fields of Constants, the factor within."""
    memory_bytes: float
    """Added to the predicted peak; negative where it was too much."""
    is_resident: bool
    """Whether those lie outside of the allocator."""
    log_sd: float
    """Standard deviation of log(measured / predicted) seconds to expect of another run like these."""
    memory_log_sd: float
    ranges: Mapping[str, tuple[float, float]]
    """Quantity (`quantities_of`) -> least and largest among the runs."""

    def __post_init__(self) -> None:
        known = [each.name for each in fields(Constants)]
        if set(self.constants) != set(known):
            raise DataError(
                f"the calibration has constants {', '.join(sorted(self.constants))}, and this version "
                f"{', '.join(sorted(known))}; run `llmtrain plan calibrate` again"
            )
        numbers = [self.factor, self.memory_bytes, self.log_sd, self.memory_log_sd, *self.constants.values()]
        numbers += [each for pair in self.ranges.values() for each in pair]
        if not all(math.isfinite(each) for each in numbers) or self.factor <= 0 or not self.runs:
            raise DataError(
                "the calibration has numbers that are none, or no runs; run `llmtrain plan calibrate` again"
            )
        if self.log_sd <= 0 or self.memory_log_sd <= 0:
            raise DataError(
                f"the calibration has spreads log_sd={self.log_sd} and memory_log_sd={self.memory_log_sd}, "
                "not "
                "above 0"
            )

    def calibrated(self, *, decades: float = 0.0) -> Calibrated:
        """Constants and interval for a question `decades` away, in the form that `predict` takes."""
        half = _half_width(self.log_sd, len(self.runs), decades)
        base = Constants()
        values = {name: type(getattr(base, name))(value) for name, value in self.constants.items()}
        return Calibrated(
            constants=Constants(**values),
            log_low=-half,
            log_high=half,
            num_rows=len(self.runs),
            source=f"calibrated on {_names(self.runs)}",
            ranges={name: span for name, span in self.ranges.items() if name in CANDIDATES_KNOW},
        )

    def memory_program(self, shipped: MemoryProgram, *, decades: float = 0.0) -> MemoryProgram:
        """`shipped` with the bytes that were missing, and the interval for a question `decades` away."""
        half = _half_width(self.memory_log_sd, len(self.runs), decades)
        spread = (math.exp(-half), math.exp(half))
        if self.is_resident:
            return replace(shipped, context_bytes=shipped.context_bytes + self.memory_bytes, spread=spread)
        return replace(shipped, workspace_bytes=shipped.workspace_bytes + self.memory_bytes, spread=spread)

    def distance(self, arch: Architecture, layout: Layout, cluster: Cluster) -> Distance:
        """From the runs to a question."""
        outside: list[tuple[float, str]] = []
        if generation_of(cluster.gpu.name) != generation_of(self.gpu):
            outside.append((1.0, f"the GPU is {cluster.gpu.name}, and the runs' {self.gpu}"))
        if layout.precision != self.precision:
            outside.append((1.0, f"the precision is {layout.precision}, and the runs' {self.precision}"))
        for name, value in quantities_of(arch, layout, cluster).items():
            least, most = self.ranges.get(name, (value, value))
            decades = max(decades_between(value, most), decades_between(least, value))
            if decades:
                span = f"{least:g}" if least == most else f"{least:g} to {most:g}"
                outside.append((decades, f"{name}={value:g}, and the runs' {span}"))
        outside.sort(key=lambda each: -each[0])
        return Distance(
            decades=outside[0][0] if outside else 0.0, sentences=tuple(text for _, text in outside)
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """DataError where `value` is not what `files.plain` makes of one."""
        known = {each.name for each in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != known:
            given = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise DataError(f"a calibration has {', '.join(sorted(known))}, and this {given}")
        try:
            texts = {name: str(value[name]) for name in ("program", "gpu", "precision", "method")}
            numbers = {
                name: float(value[name]) for name in ("factor", "memory_bytes", "log_sd", "memory_log_sd")
            }
            made: dict[str, Any] = {
                **texts,
                **numbers,
                "runs": tuple(str(each) for each in value["runs"]),
                "constants": {str(name): float(number) for name, number in value["constants"].items()},
                "is_resident": bool(value["is_resident"]),
                "ranges": {
                    str(name): (float(low), float(high)) for name, (low, high) in value["ranges"].items()
                },
            }
            return cls(**made)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"a calibration with a value of a wrong kind: {error}") from error


def write_calibration(path: Path, calibration: Calibration) -> None:
    content = plain(calibration)
    write_json(path, {"format_version": FORMAT_VERSION, "sha256": hash_json(content), "calibration": content})


def read_calibration(path: Path) -> Calibration:
    """
    Raises:
        DataError: No such file, or one that is damaged, was changed by hand, or is of another version.
    """
    again = "run `llmtrain plan calibrate` again"
    if not path.is_file():
        raise DataError(f"no calibration {path}; `llmtrain plan calibrate run=FOLDER out={path}` writes one")
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; {again}") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version") if isinstance(content, dict) else None
        raise DataError(
            f"{path} has format_version={version}, and this version reads {FORMAT_VERSION}; {again}"
        )
    found: Any = content.get("calibration")
    if content.get("sha256") != hash_json(found):
        raise DataError(f"{path} is damaged or was changed by hand: its hash does not match; {again}")
    try:
        return Calibration.from_json(found)
    except DataError as error:
        raise DataError(f"{path}: {error}; {again}") from error


def quantities_of(arch: Architecture, layout: Layout, cluster: Cluster) -> dict[str, float]:
    """What a distance is measured in."""
    return {
        "num_params": float(num_params(arch)),
        "tokens": layout.micro_batch_rows * layout.seq_len / layout.cp,
        "seq_len": float(layout.seq_len),
        **{axis: float(getattr(layout, axis)) for axis in ("pp", "dp", "cp", "tp", "ep")},
        "num_nodes": float(math.ceil(layout.world_size / cluster.gpus_per_node)),
    }


CANDIDATES_KNOW = ("tokens", "seq_len", "pp", "dp", "cp", "tp", "ep")
"""Those of them that are columns of Candidates, too."""


def _names(runs: Sequence[str]) -> str:
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {', '.join(runs[:3])}{more}"


# -- the fit


@dataclass(frozen=True, kw_only=True)
class CalibratedRun:
    """One run before and after. Seconds and bytes; None where there is nothing to say."""

    name: str
    measured_s: float
    before_s: float
    after_s: float
    left_out_s: float | None
    """Calibrated on all others; None with one run."""
    measured_bytes: float | None
    before_bytes: float
    after_bytes: float
    left_out_bytes: float | None


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    calibration: Calibration
    runs: tuple[CalibratedRun, ...]
    before: Calibrated
    """The shipped constants."""
    step_s: tuple[Interval, ...]
    """80% intervals of another run like each."""


def calibrate(observations: Sequence[Observation], *, program: str = "llmtrain") -> CalibrationReport:
    """Update the shipped constants of `program` on the runs' GPU.

    Raises:
        ConfigError: The program is not known.
        DataError: No runs, two of one name, steps or peaks that are no sizes, or runs that differ in GPU or
    """
    _check(observations)
    runs = _Runs(observations, program)
    fitted = _fit(runs)
    before_s, before_bytes = runs.seconds(runs.shipped), runs.bytes(0.0)
    after_s, after_bytes = runs.seconds(fitted.constants), runs.bytes(fitted.memory_bytes)
    left_out_s, left_out_bytes = _left_out(runs)
    count = len(observations)
    told = left_out_s if count > 1 else after_s
    told_bytes = left_out_bytes if count > 1 else after_bytes
    residuals = np.log(runs.measured_s / told)
    known = np.isfinite(runs.measured_bytes)
    memory_residuals = np.log(runs.measured_bytes[known] / told_bytes[known])
    places = [quantities_of(each.arch, each.layout, each.cluster) for each in observations]
    calibration = Calibration(
        program=program,
        gpu=observations[0].cluster.gpu.name,
        precision=observations[0].layout.precision,
        runs=tuple(each.name for each in observations),
        method=fitted.method,
        factor=fitted.factor,
        constants={each.name: float(getattr(fitted.constants, each.name)) for each in fields(Constants)},
        memory_bytes=fitted.memory_bytes,
        is_resident=observations[0].is_resident,
        log_sd=_spread(residuals if count > 1 else residuals[:0], SPREAD),
        memory_log_sd=_spread(memory_residuals if count > 1 else memory_residuals[:0], MEMORY_SPREAD),
        ranges={name: (min(p[name] for p in places), max(p[name] for p in places)) for name in places[0]},
    )
    half = _half_width(calibration.log_sd, count, 0.0)
    return CalibrationReport(
        calibration=calibration,
        runs=tuple(
            CalibratedRun(
                name=each.name,
                measured_s=each.step_s,
                before_s=float(before_s[at]),
                after_s=float(after_s[at]),
                left_out_s=float(left_out_s[at]) if count > 1 else None,
                measured_bytes=each.peak_bytes,
                before_bytes=float(before_bytes[at]),
                after_bytes=float(after_bytes[at]),
                left_out_bytes=float(left_out_bytes[at]) if count > 1 else None,
            )
            for at, each in enumerate(observations)
        ),
        before=runs.before,
        step_s=tuple(
            Interval(low=float(s) * math.exp(-half), mid=float(s), high=float(s) * math.exp(half))
            for s in after_s
        ),
    )


def _check(observations: Sequence[Observation]) -> None:
    if not observations:
        raise DataError("no runs to calibrate on; give the folder of one, as in run=runs/demo")
    names = [each.name for each in observations]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the run {twice} is given twice; each run counts once")
    first = observations[0]
    for each in observations:
        if not (math.isfinite(each.step_s) and each.step_s > 0):
            raise DataError(f"{each.name}: step_s={each.step_s} is no time; leave the run out")
        if each.peak_bytes is not None and not (math.isfinite(each.peak_bytes) and each.peak_bytes > 0):
            raise DataError(f"{each.name}: peak_bytes={each.peak_bytes} is no size; leave the run out")
        if each.cluster.gpu.name != first.cluster.gpu.name or each.is_resident != first.is_resident:
            raise DataError(
                f"{each.name} ran on {each.cluster.gpu.name} and {first.name} on {first.cluster.gpu.name}; "
                "calibrate each kind of hardware by itself"
            )
        if each.layout.precision != first.layout.precision:
            raise DataError(
                f"{each.name} ran in {each.layout.precision} and {first.name} in {first.layout.precision}; "
                "calibrate each precision by itself: constants are parts of its peak"
            )


class _Runs:
    """Observations as columns, and what constants say about them."""

    def __init__(self, observations: Sequence[Observation], program: str) -> None:
        first = observations[0]
        self.observations = list(observations)
        self.program = program
        self.measured_s = np.array([each.step_s for each in observations])
        self.measured_bytes = np.array(
            [np.nan if each.peak_bytes is None else each.peak_bytes for each in observations], dtype=float
        )
        self.groups: list[tuple[np.ndarray, Costs, Candidates]] = []
        compiled = np.array([each.layout.compiled for each in observations])
        for is_compiled in np.unique(compiled):
            costs = find_costs(
                program,
                gpu_name=first.cluster.gpu.name,
                precision=first.layout.precision,
                is_compiled=bool(is_compiled),
            )
            members = np.flatnonzero(compiled == is_compiled)
            rows = [_columns(self.observations[at], costs.peak_precision) for at in members]
            c = candidates(**{name: np.array([row[name] for row in rows]) for name in rows[0]})
            self.groups.append((members, costs, c))
        self.before = self.groups[0][1].calibrated
        self.shipped = self.before.constants
        self.predicted_bytes = self._bytes()

    def without(self, left_out: int) -> _Runs:
        kept = [each for at, each in enumerate(self.observations) if at != left_out]
        return _Runs(kept, self.program)

    def seconds(self, constants: Constants) -> np.ndarray:
        found = np.empty(len(self.measured_s))
        for members, costs, c in self.groups:
            found[members] = step_time(c, costs.software, constants).total
        return found

    def bytes(self, added: float) -> np.ndarray:
        found: np.ndarray = self.predicted_bytes + added
        return found

    def _bytes(self) -> np.ndarray:
        found = np.empty(len(self.measured_s))
        for members, costs, c in self.groups:
            told = memory(c, costs.memory_program)
            for row, at in enumerate(members):
                each = self.observations[at]
                inside = told.on[PLACES[0]][row] if each.is_first_rank else told.allocated[row]
                outside = float(told.context[row]) if each.is_resident else 0.0
                slack = 1 + costs.memory_program.slack if each.is_resident else 1.0
                found[at] = float(inside) * slack + outside
        return found


def _columns(each: Observation, peak_precision: str) -> dict[str, float]:
    return {
        **DEFAULTS,
        **architecture.columns(each.arch),
        **layouts.columns(each.layout),
        **clusters.columns(each.cluster, peak_precision),
    }


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    constants: Constants
    factor: float
    memory_bytes: float
    method: str


def _fit(runs: _Runs) -> _Fitted:
    count = len(runs.measured_s)
    if count == 1:
        names, widths, method = [], np.empty(0), "one factor"
    elif count < 4:
        names, widths, method = list(WIDTHS), np.full(len(WIDTHS), RIDGE), "one factor and a ridge"
    else:
        names, widths, method = list(WIDTHS), np.array(list(WIDTHS.values())), "maximum of the posterior"
    noise = NOISE if count >= 4 else NOISE_OF_FEW
    all_widths = np.concatenate([[FACTOR_WIDTH if count > 1 else math.inf], widths])

    def constants_at(logs: np.ndarray) -> Constants:
        return _scaled(runs.shipped, float(logs[0]), dict(zip(names, logs[1:].tolist(), strict=True)))

    def residuals(logs: np.ndarray) -> np.ndarray:
        misfit = np.log(runs.measured_s / runs.seconds(constants_at(logs))) / noise
        return np.concatenate([misfit, logs / all_widths])

    best = _least_squares(residuals, np.zeros(1 + len(names)))
    known = np.isfinite(runs.measured_bytes)
    missing = (runs.measured_bytes - runs.predicted_bytes)[known]
    return _Fitted(
        constants=constants_at(best),
        factor=math.exp(float(best[0])),
        memory_bytes=float(missing.mean()) if len(missing) else 0.0,
        method=method,
    )


def _scaled(shipped: Constants, log_factor: float, logs: Mapping[str, float]) -> Constants:
    """All seconds times one factor, and each constant times its own: efficiencies and seconds the other way
    round."""
    changed = {}
    for name in WIDTHS:
        is_seconds = name.endswith("_s")
        log = logs.get(name, 0.0) + (log_factor if is_seconds else -log_factor)
        changed[name] = getattr(shipped, name) * math.exp(log)
    return replace(shipped, **changed)


def _least_squares(residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Gauss-Newton steps with a halving of those that do not help; the derivative by differences."""
    at: np.ndarray = start
    value = residuals(at)
    for _ in range(MOST_STEPS):
        step_size = 1e-5
        slopes = np.stack(
            [(residuals(at + step_size * unit) - value) / step_size for unit in np.eye(len(at))], axis=1
        )
        step: np.ndarray = np.clip(np.linalg.lstsq(slopes, -value, rcond=None)[0], -1.0, 1.0)
        for _ in range(30):
            there = residuals(at + step)
            if there @ there <= value @ value:
                break
            step = step / 2
        else:
            return at
        at, value = at + step, there
        if np.abs(step).max() < 1e-7:
            return at
    return at


def _left_out(runs: _Runs) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and bytes of each run after calibrating on all others."""
    seconds, num_bytes = runs.seconds(runs.shipped), runs.bytes(0.0)
    if len(runs.measured_s) == 1:
        return seconds, num_bytes
    for at in range(len(runs.measured_s)):
        fitted = _fit(runs.without(at))
        seconds[at] = runs.seconds(fitted.constants)[at]
        num_bytes[at] = runs.bytes(fitted.memory_bytes)[at]
    return seconds, num_bytes


# -- the interval


def _spread(residuals: np.ndarray, believed: float) -> float:
    """Standard deviation of residuals, with a belief that counts as SPREAD_RUNS runs."""
    squares = SPREAD_RUNS * believed**2 + float(residuals @ residuals)
    return math.sqrt(squares / (SPREAD_RUNS + len(residuals)))


def _half_width(log_sd: float, num_runs: int, decades: float) -> float:
    """Of an 80% interval of one more run: Student's t, the mean's own error, and the distance in
    quadrature."""
    sd = math.hypot(log_sd * math.sqrt(1 + 1 / num_runs), WIDER_PER_DECADE * decades)
    return student_90(SPREAD_RUNS + num_runs - 1) * sd


def student_90(freedom: float) -> float:
    """The 90% quantile of Student's t (Abramowitz & Stegun 1964, 26.7.5; to 0.002 from 4 degrees of freedom
    on)."""
    z = 1.2815515655446004
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
