"""One record, every reader: metrics.jsonl first, then the console and W&B. Ranks other than 0 get the silent
twin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.console import Console
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.wandb import WandbSink


class Recorder(Protocol):
    """What the loop tells. Fields are metrics.jsonl's; one that is None is left out."""

    def step(self, step: int, **fields: object) -> None: ...

    def evaluation(self, step: int, **fields: object) -> None: ...

    def checkpoint(self, step: int, **fields: object) -> None: ...

    def event(self, what: str, step: int, **fields: object) -> None: ...


class SilentRecorder:
    """For ranks whose numbers rank 0 reports."""

    def step(self, step: int, **fields: object) -> None: ...

    def evaluation(self, step: int, **fields: object) -> None: ...

    def checkpoint(self, step: int, **fields: object) -> None: ...

    def event(self, what: str, step: int, **fields: object) -> None: ...


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
    ) -> None:
        self._metrics = MetricsFile(metrics, attempt=attempt)
        self._console = Console(total_steps, start_step=start_step, log_every_steps=cfg.log_every_steps)
        self._step = start_step
        self._wandb: WandbSink | None = None
        if cfg.wandb is not WandbMode.off:
            self._wandb = WandbSink(
                cfg,
                run_folder=metrics.parent,
                run_name=run_name,
                run_config=run_config,
                report=self._wandb_says,
            )

    def step(self, step: int, **fields: object) -> None:
        self._step = step
        self._console.step(self._write("step", step, fields))

    def evaluation(self, step: int, **fields: object) -> None:
        self._console.evaluation(self._write("eval", step, fields))

    def checkpoint(self, step: int, **fields: object) -> None:
        self._metrics.sync()
        self._write("checkpoint", step, fields)
        self._console.event(f"step {step}: checkpoint saved in {fields['save_s']:.2f} s")

    def event(self, what: str, step: int, **fields: object) -> None:
        self._write("event", step, {"what": what, **fields})

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.event("failed", self._step, error=f"{type(error).__name__}: {error}")
        if self._wandb is not None:
            self._wandb.finish()
        self._console.close()
        self._metrics.close()

    def _write(self, kind: str, step: int, fields: Mapping[str, object]) -> dict[str, Any]:
        record = self._metrics.write(kind, step, **fields)
        if self._wandb is not None:
            self._wandb.log(record)
        return record

    def _wandb_says(self, text: str) -> None:
        self._metrics.write("event", self._step, what="wandb", text=text)
        self._console.event(f"W&B: {text}")
