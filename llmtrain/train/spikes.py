"""Which steps spike, and what is done about each: a judgement of two numbers that every rank agrees on.

A loss is held against the losses of the last steps: by how many robust standard deviations (1.4826 times the
median absolute deviation from the median) it stands above their median; a gradient norm by its logarithm.
Only rises count. What is a spike is not compared with later: one that is would hide the next.

The published rules that this one is made from: OLMo's optimizer withholds an update when loss or norm is 6
standard deviations above the mean of 128 steps (OLMo-core, skip_step_optimizer.py). Mean and deviation follow
every spike that they contain, and a single nan silences them for the whole window; the median and its
deviation do not. ZClip (arXiv:2504.02507) holds the norm against a moving mean, and clips it; a norm's
logarithm is nearer to normal than the norm. PaLM (arXiv:2204.02311, section 5.1) went back about 100 steps
and passed over 200 to 500 batches. The same batches did no harm to other weights, so no batch need be bad.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.loader.skipped import SkippedWindow
from llmtrain.train.spike_config import SpikeAction, SpikeConfig

SPIKES_NAME = "spikes"
"""Folder of a run with a file for each spike."""
MIN_LOSS_DEVIATION = 0.01
"""Nats. Losses that hardly differ would make a spike of any noise. Assumed, not measured."""
MIN_LOG_NORM_DEVIATION = 0.05
"""5% of a norm. Assumed, not measured."""
MIN_NORM = 1e-30
"""A norm of 0, of a step of padding, has no logarithm."""
MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution: 1 / 0.6745, its upper quartile."""
UPDATES = (SpikeAction.ignore, SpikeAction.warn)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done about a step."""

    action: SpikeAction
    """`ignore`: there is nothing to do."""
    reason: str = ""
    """A sentence without its full stop; empty if there is nothing to say."""
    quantity: str | None = None
    """loss or grad_norm."""
    value: float | None = None
    median: float | None = None
    z: float | None = None
    """None where a value is not finite."""
    skip_first: int
    """With `rollback`: the first row that is passed over from now on."""
    skip_last: int

    @property
    def updates(self) -> bool:
        """Whether the weights may take the step."""
        return self.action in UPDATES


@dataclass(frozen=True)
class Intervention:
    """An update withheld, or a rollback."""

    step: int
    first: int
    """Of the spiking step's rows, or of those that are passed over."""
    is_rollback: bool


class SpikeWatch:
    """Judges every step in turn. Every rank has one and comes to the same verdicts."""

    def __init__(self, cfg: SpikeConfig) -> None:
        self.cfg = cfg
        self._loss = _History(cfg, cfg.loss_z, MIN_LOSS_DEVIATION)
        self._log_norm = _History(cfg, cfg.grad_norm_z, MIN_LOG_NORM_DEVIATION)
        self._firsts: deque[int] = deque(maxlen=cfg.rollback_steps_before + 1)
        self._interventions: list[Intervention] = []
        self._warned_step: int | None = None

    @classmethod
    def from_state(
        cls, cfg: SpikeConfig, state: dict[str, Any] | None, skipped: Iterable[SkippedWindow] = ()
    ) -> SpikeWatch:
        """The watch as it was when `state` was taken, and as it is right after a rollback to that.

        Args:
            state: None: of a run that had no watch, or has not begun.
            skipped: the run's. A rollback forgets the step that led to it, and these do not: they count on
                the budget.
        """
        watch = cls(cfg)
        if state is not None:
            watch._loss.fill(**state["loss"])
            watch._log_norm.fill(**state["log_norm"])
            watch._firsts.extend(state["firsts"])
            watch._interventions = [Intervention(**each) for each in state["interventions"]]
            watch._warned_step = state["warned_step"]
        for window in skipped:
            known = Intervention(window.step, window.first, is_rollback=True)
            if known not in watch._interventions:
                watch._interventions.append(known)
        return watch

    def state(self) -> dict[str, Any]:
        """All of it as plain JSON, for the checkpoint."""
        return {
            "loss": self._loss.state(),
            "log_norm": self._log_norm.state(),
            "firsts": list(self._firsts),
            "interventions": [asdict(each) for each in self._interventions],
            "warned_step": self._warned_step,
        }

    def begin_again(self) -> None:
        """Forget what losses were like: from here on they are of other data, and may be of another size."""
        self._loss.fill([], [])
        self._log_norm.fill([], [])

    def judge(self, *, step: int, first: int, last: int, loss: float, grad_norm: float) -> Verdict:
        """
        Args:
            step: its number, from 1.
            first: position of its first row.
            last: of its last row.
            loss: mean over its targets, on the weights before its update.
            grad_norm: before clipping.
        """
        self._firsts.append(first)
        about: dict[str, Any] = {"skip_first": self._firsts[0], "skip_last": last}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            name, value = ("grad_norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            about |= {"quantity": name, "value": value}
            return self._decide(self.cfg.on_non_finite, f"{name}={value}", step, first, about)
        if self.cfg.on_spike is SpikeAction.ignore:
            return Verdict(action=SpikeAction.ignore, **about)
        loss_rise = self._loss.take(loss)
        norm_rise = self._log_norm.take(math.log(max(grad_norm, MIN_NORM)))
        if loss_rise is None and norm_rise is None:
            return Verdict(action=SpikeAction.ignore, **about)
        if loss_rise is not None:
            name, value, (median, z) = "loss", loss, loss_rise
        else:
            assert norm_rise is not None, "one of them is"
            name, value, median, z = "grad_norm", grad_norm, math.exp(norm_rise[0]), norm_rise[1]
        about |= {"quantity": name, "value": value, "median": median, "z": z}
        reason = (
            f"{name}={value:.4g} is {z:.1f} deviations above the median of the steps before, {median:.4g}"
        )
        return self._decide(self.cfg.on_spike, reason, step, first, about)

    def _decide(
        self, action: SpikeAction, reason: str, step: int, first: int, about: dict[str, Any]
    ) -> Verdict:
        cfg = self.cfg
        if action is SpikeAction.warn:
            if self._warned_step is not None and step < self._warned_step + cfg.cooldown_steps:
                return Verdict(action=SpikeAction.ignore, **about)
            self._warned_step = step
        if action in (SpikeAction.skip, SpikeAction.rollback):
            recent = [each for each in self._interventions if each.step > step - cfg.budget_steps]
            if len(recent) >= cfg.budget:
                reason += (
                    f"; spikes.budget={cfg.budget} in spikes.budget_steps={cfg.budget_steps} is used up, at "
                    f"steps {', '.join(str(each.step) for each in recent) or 'none'}"
                )
                return Verdict(action=SpikeAction.stop, reason=reason, **about)
            rollbacks = [each.step for each in recent if each.is_rollback]
            if action is SpikeAction.rollback and rollbacks and step < max(rollbacks) + cfg.cooldown_steps:
                action = SpikeAction.skip
                reason += f"; no rollback so soon after that of step {max(rollbacks)}"
            is_rollback = action is SpikeAction.rollback
            begins = about["skip_first"] if is_rollback else first
            self._interventions = [*recent, Intervention(step, begins, is_rollback)]
        return Verdict(action=action, reason=reason, **about)


class _History:
    """Values of one quantity that were no spikes, and those that were since the last that was none."""

    def __init__(self, cfg: SpikeConfig, threshold: float, min_deviation: float) -> None:
        self._warmup_steps = cfg.warmup_steps
        self._threshold = threshold
        self._min_deviation = min_deviation
        self._values: deque[float] = deque(maxlen=cfg.window_steps)
        self._spikes: list[float] = []

    def take(self, value: float) -> tuple[float, float] | None:
        """Remember a value; of one that spikes, tell the median and by how many deviations it is above."""
        if len(self._values) >= self._warmup_steps:
            median = statistics.median(self._values)
            mad = statistics.median(abs(each - median) for each in self._values)
            z = (value - median) / max(MAD_TO_DEVIATION * mad, self._min_deviation)
            if z > self._threshold:
                self._spikes.append(value)
                if len(self._spikes) >= self._warmup_steps:
                    self.fill(self._spikes, [])
                return median, z
        self._spikes.clear()
        self._values.append(value)
        return None

    def fill(self, values: Sequence[float], spikes: Sequence[float]) -> None:
        newest = list(values)  # of another window's length, perhaps
        self._values.clear()
        self._values.extend(newest)
        self._spikes = list(spikes)

    def state(self) -> dict[str, list[float]]:
        return {"values": list(self._values), "spikes": list(self._spikes)}


def write_spike(folder: Path, verdict: Verdict, *, step: int, first: int, last: int, **facts: Any) -> Path:
    """Write what is known of a spike into the run folder; a spike that comes again after a restart is the
    same file.

    Args:
        facts: more of it, as JSON takes it: attempt, learning rate, documents.
    """
    path = folder / SPIKES_NAME / f"step-{step:06d}-row-{first}.json"
    told = {**asdict(verdict), "action": verdict.action.name, "value": _plain(verdict.value)}
    files.write_json(path, {"step": step, "first": first, "last": last, **told, **facts})
    return path


def _plain(value: float | None) -> float | str | None:
    """JSON has no nan."""
    return value if value is None or math.isfinite(value) else str(value)
