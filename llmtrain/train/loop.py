"""What happens in a step, in reading order."""

from __future__ import annotations

import logging
import math
import resource
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch

from llmtrain.errors import DivergedError
from llmtrain.loader.batches import Batches, held_out_batches
from llmtrain.loader.dataset import Rows
from llmtrain.model.size import flops_per_token
from llmtrain.tracking.recorder import Recorder
from llmtrain.train.config import TrainRoot
from llmtrain.train.engine import Engine
from llmtrain.train.schedule import learning_rate
from llmtrain.train.start_up import StartUp

log = logging.getLogger(__name__)

MFU_CONVENTION = "causal"
"""FLOPs a token as Megatron-LM counts them: 6 per matrix weight, and half the attention square."""


class SaveFunction(Protocol):
    def __call__(self, *, step: int, position: int) -> None: ...


@dataclass
class Progress:
    """Where a run is. `position` is the loader's whole state."""

    step: int
    """Optimizer updates done."""
    position: int
    """Rows consumed."""


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGUSR1 on any rank; polled once a step, so that every rank leaves after
    the same one."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


def train(
    cfg: TrainRoot,
    engine: Engine,
    batches: Batches,
    held_out: Rows,
    progress: Progress,
    recorder: Recorder,
    save: SaveFunction,
    stop: StopSignal,
    start_up: StartUp,
) -> None:
    """Run from `progress` until train.total_tokens are consumed, or to the end of the step after a stop
    signal.

    Args:
        recorder: Where metrics go; on ranks other than 0 it writes nothing.

    Raises:
        DivergedError: a loss or gradient norm that is not finite.
        CheckpointError: a save that failed; earlier checkpoints are untouched.
    """
    seq_len, rows_per_step = cfg.data.seq_len, cfg.train.global_batch_rows
    device_flops = (cfg.train.device_peak_tflops or math.nan) * 1e12 * engine.dp_size
    token_flops = flops_per_token(cfg.model, seq_len, convention=MFU_CONVENTION)
    first_step = progress.step + 1
    stopping = False
    while progress.position * seq_len < cfg.train.total_tokens and not stopping:
        step_start = time.perf_counter()
        lr = learning_rate(
            progress.position * seq_len,
            step_tokens=cfg.step_tokens,
            total_tokens=cfg.train.total_tokens,
            peak=cfg.optimizer.peak_lr,
            cfg=cfg.schedule,
        )
        micro_batches = batches.micro_batches(progress.position)
        data_wait_s = time.perf_counter() - step_start
        result = engine.train_step(micro_batches, lr=lr)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            recorder.event("diverged", progress.step + 1, loss=result.loss, grad_norm=result.grad_norm, lr=lr)
            raise DivergedError(
                f"loss={result.loss} and gradient norm={result.grad_norm} at step "
                f"{progress.step + 1}, lr={lr:.3g}, "
                f"rows {progress.position} to {progress.position + rows_per_step - 1}; the newest "
                "checkpoint is "
                f"older: resume with a lower optimizer.peak_lr"
            )
        progress.step += 1
        progress.position += rows_per_step
        step_s = time.perf_counter() - step_start
        mfu = cfg.step_tokens / step_s * token_flops / device_flops
        recorder.step(
            progress.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=progress.position * seq_len,
            position=progress.position,
            num_valid=result.num_valid,
            tokens_per_s=cfg.step_tokens / step_s,
            step_s=step_s,
            data_wait_s=data_wait_s,
            mem_gib=peak_memory_gib(engine.device),
            mfu=None if math.isnan(mfu) else mfu,
        )
        if progress.step == first_step:
            start_up.mark("first step")
            log.info("%s", start_up.summary())
            recorder.event("first_step", progress.step, start_up_s=start_up.seconds())
        stopping = engine.any_rank(stop.name is not None)
        done = progress.position * seq_len >= cfg.train.total_tokens
        if done or _due(progress.step, cfg.train.eval_every_steps):
            evaluate(cfg, engine, held_out, progress, recorder)
        if done or stopping or _due(progress.step, cfg.train.save_every_steps):
            save_start = time.perf_counter()
            save(step=progress.step, position=progress.position)
            recorder.checkpoint(progress.step, save_s=time.perf_counter() - save_start)
    if stopping:
        recorder.event("stopped", progress.step, signal=stop.name)
        log.warning(
            "stopped by a signal after step %d; the same command with run.intent=resume goes on",
            progress.step,
        )
    else:
        recorder.event("finished", progress.step)


def evaluate(
    cfg: TrainRoot,
    engine: Engine,
    held_out: Rows,
    progress: Progress,
    recorder: Recorder,
) -> None:
    """Record the held-out loss over train.eval_rows rows of the held-out split."""
    start = time.perf_counter()
    batches = held_out_batches(
        held_out,
        micro_batch_rows=cfg.train.micro_batch_rows,
        dp_rank=engine.rank,
        dp_size=engine.dp_size,
        max_rows=cfg.train.eval_rows,
    )
    loss_sum, num_valid = engine.held_out_sums(batches)
    recorder.evaluation(
        progress.step,
        eval_loss=loss_sum / max(1, num_valid),
        eval_targets=num_valid,
        eval_s=time.perf_counter() - start,
    )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
