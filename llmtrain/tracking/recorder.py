"""One record: into metrics.jsonl, which W&B and others read, and to the console. Ranks other than 0 get the
silent twin."""

from __future__ import annotations

import contextlib
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from llmtrain.errors import DiskError, LLMTrainError
from llmtrain.planner.plan import Forecast
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.console import Console
from llmtrain.tracking.metrics import SETTLING_STEPS, MetricsFile, read_lines
from llmtrain.tracking.wandb import WandbSink

KEPT_STEPS = 2048
"""The latest, of which the medians held against a plan are."""


class Recorder(Protocol):
    """What the loop tells. Fields are metrics.jsonl's; one that is None is left out."""

    failure: LLMTrainError | None
    """Why metrics.jsonl could not be written, once it could not. Kept, not raised: a rank that leaves in the
    middle of a step leaves the others waiting, so the loop asks at the start of each."""

    def step(self, step: int, **fields: object) -> None: ...

    def evaluation(self, step: int, **fields: object) -> None: ...

    def checkpoint(self, step: int, *, save_s: float, wait_s: float, copy_s: float) -> None: ...

    def record(self, kind: str, step: int, **fields: object) -> None: ...

    def event(self, what: str, step: int, **fields: object) -> None: ...


class SilentRecorder:
    """For ranks whose numbers rank 0 reports."""

    failure: LLMTrainError | None = None

    def step(self, step: int, **fields: object) -> None: ...

    def evaluation(self, step: int, **fields: object) -> None: ...

    def checkpoint(self, step: int, *, save_s: float, wait_s: float, copy_s: float) -> None: ...

    def record(self, kind: str, step: int, **fields: object) -> None: ...

    def event(self, what: str, step: int, **fields: object) -> None: ...


class Replay:
    """Steps that an earlier attempt did after the checkpoint and that are done again: the losses must agree.

    On the same layout in fp32 they agree to the last bit; another layout adds in another order.
    """

    def __init__(self, metrics: Path, *, start_step: int) -> None:
        lines = read_lines(metrics) if metrics.exists() else []
        self._before = {
            line["step"]: line["loss"]
            for line in lines
            if line["kind"] == "step" and line["step"] > start_step
        }
        self._first = start_step + 1
        self._differences: list[float] = []

    def compare(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Note one step; with the last one that was done before, return the verdict."""
        before = self._before.get(record["step"])
        if before is None or record["loss"] is None:
            return None
        self._differences.append(abs(record["loss"] - before))
        if record["step"] != max(self._before):
            return None
        return {
            "first_step": self._first,
            "num_steps": len(self._differences),
            "max_loss_difference": max(self._differences),
        }

    def sentence(self, verdict: Mapping[str, Any]) -> str:
        """The verdict for people."""
        worst = verdict["max_loss_difference"]
        how = "equal to the last bit" if worst == 0 else f"different by at most {worst:.2g}"
        steps = f"steps {verdict['first_step']} to {verdict['first_step'] + verdict['num_steps'] - 1}"
        return f"{steps} were done before the restart and again now: losses {how}"


class RunRecorder:
    """Rank 0's recorder; use it as a context."""

    def __init__(
        self,
        cfg: TrackingConfig,
        *,
        metrics: Path,
        attempt: int,
        start_step: int,
        total_steps: int,
        run_name: str,
        run_config: Mapping[str, Any],
        forecast: Forecast | None = None,
        wandb_run_id: str | None = None,
    ) -> None:
        """
        Args:
            wandb_run_id: of the checkpoint that the run goes on from; None for a run that begins.
            forecast: what the run's plan says about it: a `plan` record beside what was measured, at the
                start, at every evaluation and at the end.
        """
        self._forecast = forecast
        self._first_settled = start_step + 1 + SETTLING_STEPS
        self._step_s: deque[float] = deque(maxlen=KEPT_STEPS)
        self._peak_gib = 0.0
        self._eval_loss: object = None
        self._replay = Replay(metrics, start_step=start_step)
        self._metrics = MetricsFile(metrics, attempt=attempt)
        self._console = Console(total_steps, start_step=start_step, log_every_steps=cfg.log_every_steps)
        self._step = start_step
        self.failure: LLMTrainError | None = None
        self._wandb: WandbSink | None = None
        if cfg.wandb is not WandbMode.off:
            self._wandb = WandbSink(
                cfg,
                metrics,
                attempt=attempt,
                run_id=wandb_run_id,
                run_name=run_name,
                run_config=run_config,
                report=self._wandb_says,
            )
        self._hold_against_plan()

    def step(self, step: int, **fields: object) -> None:
        self._step = step
        record = self._write("step", step, fields)
        self._console.step(record)
        if step >= self._first_settled and isinstance(step_s := fields.get("step_s"), float):
            self._step_s.append(step_s)
        if isinstance(mem_gib := fields.get("mem_gib"), float):
            self._peak_gib = max(self._peak_gib, mem_gib)
        if verdict := self._replay.compare(record):
            self.event("replayed", step, **verdict)
            self._console.event(self._replay.sentence(verdict))

    def evaluation(self, step: int, **fields: object) -> None:
        self._console.evaluation(self._write("eval", step, fields))
        self._eval_loss = fields.get("eval_loss")
        self._hold_against_plan()

    def checkpoint(self, step: int, *, save_s: float, wait_s: float, copy_s: float) -> None:
        self._write("checkpoint", step, {"save_s": save_s, "wait_s": wait_s, "copy_s": copy_s})
        stall_s = wait_s + copy_s
        self._console.event(
            f"step {step}: checkpoint saved in {save_s:.2f} s, for {stall_s:.2f} s of which training waited"
        )

    def record(self, kind: str, step: int, **fields: object) -> None:
        self._write(kind, step, fields)

    def event(self, what: str, step: int, **fields: object) -> None:
        self._write("event", step, {"what": what, **fields})

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.event("failed", self._step, error=f"{type(error).__name__}: {error}")
            self._hold_against_plan()
            if self._wandb is not None:
                self._wandb.finish()
        finally:
            self._console.close()
            self._metrics.close()

    def _write(self, kind: str, step: int, fields: Mapping[str, object]) -> dict[str, Any]:
        """Write one record and return it. After a first failure metrics.jsonl is left alone."""
        record: dict[str, Any] = {"kind": kind, "step": step, **fields}
        if self.failure is None:
            try:
                record = self._metrics.write(kind, step, **fields)
                if kind == "checkpoint":
                    self._metrics.sync()
            except OSError as error:
                self.failure = DiskError(
                    f"{self._metrics.path} cannot be written at step {step}: {error.strerror}; make room "
                    f"and resume, the checkpoints so far are whole"
                )
        if self._wandb is not None:
            self._wandb.relay()
        return record

    def _hold_against_plan(self) -> None:
        """A record of each planned interval with what was measured so far."""
        plan = self._forecast
        if plan is None:
            return
        intervals = {
            "step_s": plan.step_s,
            "mem_gib": plan.recorded_bytes.scaled(1 / 2**30),
            "eval_loss": plan.loss,
        }
        fields: dict[str, object] = {
            f"{name}_{end}": getattr(interval, end)
            for name, interval in intervals.items()
            for end in ("low", "mid", "high")
        }
        if self._step_s:
            fields["step_s"] = statistics.median(self._step_s)
            fields["step_s_over_plan"] = statistics.median(self._step_s) / plan.step_s.mid
        if self._peak_gib:
            fields["mem_gib"] = self._peak_gib
            fields["mem_over_plan"] = self._peak_gib / intervals["mem_gib"].mid
        if isinstance(self._eval_loss, float):
            fields["eval_loss"] = self._eval_loss
        self._write("plan", self._step, fields)

    def _wandb_says(self, text: str) -> None:
        self._console.event(f"W&B: {text}")
        if self.failure is None:
            with contextlib.suppress(OSError):  # the next record of the run itself will say it
                self._metrics.write("event", self._step, what="wandb", text=text)
