"""Why a layout does not fit a device, and the smallest change after which it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmtrain.errors import ConfigError
from llmtrain.planner.cost.candidates import FULL, NO_RECOMPUTE, SELECTIVE, Candidates
from llmtrain.planner.cost.memory import COMPONENTS, GIB, INSTANTS, PLACES, MemoryProgram, memory


@dataclass(frozen=True, kw_only=True)
class Excess:
    """Why a layout does not fit, and what would."""

    component: str
    """The largest at the fullest instant."""
    component_bytes: float
    instant: str
    place: str
    """Which rank of a pipeline: first, middle, last."""
    over_bytes: float
    """Upper end of the interval, less the capacity; negative when it fits."""
    change: str | None
    """The smallest that fits, as settings: "recompute=full"; None when none of those tried does."""
    changed_bytes: float | None
    """Upper end of the interval after that change."""

    def __str__(self) -> str:
        size = f"{self.component_bytes / GIB:.1f} GiB at its fullest instant, {self.instant}"
        largest = f"the largest term is {self.component}, {size}"
        if self.over_bytes <= 0:
            return f"fits with {-self.over_bytes / GIB:.1f} GiB to spare; {largest}"
        over = f"{self.over_bytes / GIB:.1f} GiB too much on the pipeline's {self.place} rank; {largest}"
        if self.change is None or self.changed_bytes is None:
            return f"{over}; no change of micro batch, recomputation, ZeRO stage, tp or pp makes it fit"
        return f"{over}; {self.change} would fit, with {self.changed_bytes / GIB:.1f} GiB"


def explain_excess(c: Candidates, program: MemoryProgram, row: int, capacity_bytes: float) -> Excess:
    """Why row `row` needs more than `capacity_bytes` of a device, and the smallest change after which it does
    not.

    What counts is `Memory.high`, so that a layout that is said to fit does. Changes are tried one at a time,
    the one that costs the least speed first, then each on top of those before: half the micro batch with
    twice the accumulation, sequence parallelism, recomputation, the next ZeRO stages, twice the tp ranks,
    twice the pp ranks, both taken from dp.

    Raises:
        ConfigError: The capacity is not above 0.
    """
    if not capacity_bytes > 0:
        raise ConfigError(f"capacity_bytes={capacity_bytes} must be above 0: the memory of one device")
    one = c.rows(np.array([row]))
    found = memory(one, program)
    largest = max(COMPONENTS, key=lambda name: float(getattr(found, name)[0]))
    over = float(found.high[0]) - capacity_bytes
    change, after = None, None
    if over > 0:
        for name, changed in _changes(one, program):
            after = float(memory(changed, program).high[0])
            if after <= capacity_bytes:
                change = name
                break
    return Excess(
        component=largest,
        component_bytes=float(getattr(found, largest)[0]),
        instant=INSTANTS[int(found.instant[0])],
        place=PLACES[int(found.place[0])],
        over_bytes=over,
        change=change,
        changed_bytes=after if change else None,
    )


def _changes(c: Candidates, program: MemoryProgram) -> Iterator[tuple[str, Candidates]]:
    """(Settings, candidate): single changes of `c`, then more and more of them together."""
    steps = ("micro_batch", "sequence_parallel", "selective", "full", "zero_stage", "tp", "pp")
    for step in steps:
        settings = _changed(c, program, step)
        if settings:
            yield _as_text(settings), replace(c, **_as_columns(settings))
    together: dict[str, float] = {}
    reached = c
    for _ in range(64):  # micro batch 2**20 at most, tp and pp as far as they divide
        moved = False
        for step in steps:
            settings = _changed(reached, program, step)
            if settings:
                moved, together = True, together | settings
                reached = replace(reached, **_as_columns(settings))
                yield _as_text(together), reached
        if not moved:
            return


def _changed(c: Candidates, program: MemoryProgram, step: str) -> dict[str, float]:
    """What a step sets; empty where it cannot be taken."""

    def of(name: str) -> float:
        return float(getattr(c, name)[0])

    if step == "micro_batch":
        can = of("micro_batch") >= 2 and of("micro_batch") % 2 == 0
        return {step: of(step) / 2, "grad_accum": of("grad_accum") * 2} if can else {}
    if step == "sequence_parallel":
        return {step: 1.0} if of("tp") > 1 and not of(step) else {}
    if step == "selective":
        return {"recompute": SELECTIVE} if of("recompute") == NO_RECOMPUTE else {}
    if step == "full":
        return {"recompute": FULL} if of("recompute") != FULL else {}
    if step == "zero_stage":
        higher = [stage for stage in program.zero_stages if stage > of(step) and (stage < 2 or of("pp") == 1)]
        return {step: float(higher[0])} if higher and of("dp") * of("cp") > 1 else {}
    dp = of("dp")
    can = dp % 2 == 0 and (dp / 2 * of("cp")) % of("ep") == 0
    if step == "tp":
        can = can and of("num_heads") % (2 * of("tp")) == 0 and 2 * of("tp") <= of("gpus_per_node")
    else:
        can = can and of("num_layers") >= 2 * of("pp") * of("vpp") and of("zero_stage") < 2
    return {step: 2 * of(step), "dp": dp / 2, "grad_accum": 2 * of("grad_accum")} if can else {}


_SETTINGS = {"micro_batch": "micro_batch_rows"}
_RECOMPUTES = {float(NO_RECOMPUTE): "none", float(SELECTIVE): "selective", float(FULL): "full"}


def _as_text(settings: Mapping[str, float]) -> str:
    def value(name: str, number: float) -> str:
        if name == "recompute":
            return _RECOMPUTES[float(number)]
        return "true" if name == "sequence_parallel" else f"{number:.0f}"

    return ", ".join(
        f"{_SETTINGS.get(name, name)}={value(name, number)}" for name, number in settings.items()
    )


def _as_columns(settings: Mapping[str, float]) -> dict[str, np.ndarray]:
    return {name: np.array([float(number)]) for name, number in settings.items()}
