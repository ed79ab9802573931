"""What happens in a step, in reading order."""

from __future__ import annotations

import logging
import math
import resource
import signal
import time
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist

from llmtrain.checkpoint.saver import Saver
from llmtrain.errors import DivergedError, LLMTrainError
from llmtrain.loader.batches import Batches, StepBatches, held_out_batches
from llmtrain.loader.ledger import LedgerWriter
from llmtrain.loader.open import MixedRows
from llmtrain.model.size import flops_per_token
from llmtrain.tracking.recorder import Recorder
from llmtrain.train.config import TrainRoot
from llmtrain.train.engine import Engine
from llmtrain.train.ranks import agree
from llmtrain.train.roll_call import RollCall
from llmtrain.train.schedule import learning_rate
from llmtrain.train.start_up import StartUp

log = logging.getLogger(__name__)

MFU_CONVENTION = "causal"
"""FLOPs a token as Megatron-LM counts them: 6 per matrix weight, and half the attention square."""


class SaveFunction(Protocol):
    def __call__(self, progress: Progress, *, eval_loss: float | None, in_memory: bool) -> None: ...


@dataclass
class Progress:
    """Where a run is. `position` is the loader's whole state."""

    step: int
    """Optimizer updates done."""
    position: int
    """Rows consumed."""
    on_disk: int = 0
    """Step of the checkpoint that the run could go on from without what is in memory."""


class StopSignal:
    """Set by SIGTERM, SIGINT, SIGUSR1, SIGHUP or SIGQUIT on any rank. Ranks agree on it once a step, so that
    all leave after the same one. The same signal a second time does what it does to any process.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


class Agreement(IntEnum):
    """What a rank brings to the start of a step; the highest of all ranks decides for all."""

    go_on = 0
    stop = 1
    failed = 2


class RankFailedError(LLMTrainError):
    """A rank could not go on; the message is its own, with its number, on every rank."""


def train(
    cfg: TrainRoot,
    engine: Engine,
    batches: Batches,
    held_out: MixedRows,
    progress: Progress,
    recorder: Recorder,
    ledger: LedgerWriter | None,
    save: SaveFunction,
    saver: Saver,
    stop: StopSignal,
    start_up: StartUp,
    roll_call: RollCall,
) -> None:
    """Run from `progress` until train.total_tokens are consumed, or a rank has a stop signal or an error.

    Args:
        recorder: Where metrics go; on ranks other than 0 it writes nothing. It keeps its errors for us.
        ledger: Where rank 0 notes each step's rows; None on the others.
        save: Begins a checkpoint of where the run stands; `saver` says what became of it.

    Raises:
        DivergedError: a loss or gradient norm that is not finite.
        CheckpointError: a save that failed; earlier checkpoints are untouched.
        RankFailedError: a row that could not be read, or a metric that could not be written, on any rank.
    """
    seq_len, sizes, groups = cfg.data.seq_len, cfg.batch_sizes, engine.placement.groups
    device_flops = (cfg.train.device_peak_tflops or math.nan) * 1e12 * dist.get_world_size()
    token_flops = flops_per_token(cfg.model, seq_len, convention=MFU_CONVENTION)
    first_step = progress.step + 1
    last_saved = progress.on_disk
    while progress.position * seq_len < cfg.train.total_tokens:
        step_start = time.perf_counter()
        rows_per_step = sizes.rows_at(progress.position)
        step_tokens = rows_per_step * seq_len
        _record_saved(saver, recorder)
        failure, data = _kept_failure(recorder, ledger, saver), StepBatches([], 0)
        try:
            data = batches.step(progress.position)
        except LLMTrainError as error:
            failure = error
        data_wait_s = time.perf_counter() - step_start
        wish = Agreement.failed if failure else Agreement.stop if stop.name else Agreement.go_on
        agreed, tokens_hash = agree(groups, engine.device, level=wish, tokens_hash=data.tokens_hash)
        if agreed == Agreement.failed:
            raise RankFailedError(_whose_failure(failure))
        if agreed == Agreement.stop:
            break
        lr = learning_rate(
            progress.position * seq_len,
            step_tokens=step_tokens,
            total_tokens=cfg.train.total_tokens,
            peak=cfg.optimizer.peak_lr,
            cfg=cfg.schedule,
        )
        result = engine.train_step(data.micro_batches, lr=lr)
        if ledger is not None:  # a step that diverged, too: it is the one that people look at
            first = progress.position
            ledger.step(
                progress.step + 1, first=first, last=first + rows_per_step - 1, tokens_hash=tokens_hash
            )
        if result.is_skipped:
            recorder.event("overflow", progress.step + 1, loss_scale=engine.loss_scale)
            log.warning(
                "step %d: the gradient overflowed in fp16, so nothing was updated; the loss scale is %g now",
                *(progress.step + 1, engine.loss_scale),
            )
        elif not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            recorder.event("diverged", progress.step + 1, loss=result.loss, grad_norm=result.grad_norm, lr=lr)
            raise DivergedError(
                f"loss={result.loss} and gradient norm={result.grad_norm} at step {progress.step + 1}, "
                f"lr={lr:.3g}, row positions {progress.position} to {progress.position + rows_per_step - 1}; "
                f"start again with a lower optimizer.peak_lr, or resume with one from the newest checkpoint"
            )
        progress.step += 1
        progress.position += rows_per_step
        step_s = time.perf_counter() - step_start
        mfu = step_tokens / step_s * token_flops / device_flops
        recorder.step(
            progress.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=progress.position * seq_len,
            position=progress.position,
            num_valid=result.num_valid,
            tokens_per_s=step_tokens / step_s,
            step_s=step_s,
            data_wait_s=data_wait_s,
            mem_gib=peak_memory_gib(engine.device),
            mfu=None if math.isnan(mfu) else mfu,
        )
        if progress.step == first_step:
            start_up.mark("first step")
            saver.reserve(engine.pieces())  # an optimizer may have no state before
            roll_call.end()
            log.info("%s", start_up.summary())
            recorder.event("first_step", progress.step, start_up_s=start_up.seconds())
        done = progress.position * seq_len >= cfg.train.total_tokens
        eval_loss = None
        if done or _due(progress.step, cfg.train.eval_every_steps):
            eval_loss = evaluate(cfg, engine, held_out, progress, recorder)
        if done:
            saver.finish()
        if done or _due(progress.step, cfg.save.every_steps):
            _save(save, engine, progress, recorder, ledger, saver, eval_loss)
            last_saved = progress.step
        elif saver.has_memory and _due(progress.step, cfg.save.memory_every_steps):
            _save(save, engine, progress, recorder, ledger, saver, eval_loss, in_memory=True)
    is_over = progress.position * seq_len >= cfg.train.total_tokens
    if last_saved < progress.step:
        saver.finish()
        _save(save, engine, progress, recorder, ledger, saver, None)
    saver.finish()
    _record_saved(saver, recorder)
    if is_over:
        recorder.event("finished", progress.step)
    else:
        recorder.event("stopped", progress.step, signal=stop.name)
        log.warning("stopped by a signal after step %d; run.intent=resume goes on from there", progress.step)
    if failure := _kept_failure(recorder, ledger, saver):
        raise failure


def _save(
    save: SaveFunction,
    engine: Engine,
    progress: Progress,
    recorder: Recorder,
    ledger: LedgerWriter | None,
    saver: Saver,
    eval_loss: float | None,
    *,
    in_memory: bool = False,
) -> None:
    """Save, if every rank could note what it did: what a checkpoint says was done is in the ledger, also
    after a power cut."""
    if ledger is not None:
        ledger.sync()
    saver.settle()
    _raise_together(engine, _kept_failure(recorder, ledger, saver))
    save(progress, eval_loss=eval_loss, in_memory=in_memory)


def _record_saved(saver: Saver, recorder: Recorder) -> None:
    for saved in saver.take_saved():
        seconds = {"save_s": saved.save_s, "wait_s": saved.wait_s, "copy_s": saved.copy_s}
        if saved.in_memory:
            recorder.event("snapshot", saved.step, **seconds)
        else:
            recorder.checkpoint(saved.step, **seconds)


def _raise_together(engine: Engine, mine: LLMTrainError | None) -> None:
    """Raise RankFailedError on every rank if one has a failure."""
    level = Agreement.failed if mine else Agreement.go_on
    agreed, _ = agree(engine.placement.groups, engine.device, level=level, tokens_hash=0)
    if agreed == Agreement.failed:
        raise RankFailedError(_whose_failure(mine))


def _kept_failure(recorder: Recorder, ledger: LedgerWriter | None, saver: Saver) -> LLMTrainError | None:
    return recorder.failure or (None if ledger is None else ledger.failure) or saver.failure


def _whose_failure(mine: LLMTrainError | None) -> str:
    """The failures of all ranks, each with its number."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if mine is None else str(mine))
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)


def evaluate(
    cfg: TrainRoot,
    engine: Engine,
    held_out: MixedRows,
    progress: Progress,
    recorder: Recorder,
) -> float:
    """Record and return the held-out loss over train.eval_rows rows of the held-out split.

    Raises:
        RankFailedError: a row that could not be read, on any rank.
    """
    start = time.perf_counter()
    loss_sum, num_valid = held_out_sums(engine, held_out, cfg, max_rows=cfg.train.eval_rows)
    eval_loss = loss_sum / max(1, num_valid)
    recorder.evaluation(
        progress.step,
        eval_loss=eval_loss,
        eval_targets=num_valid,
        eval_s=time.perf_counter() - start,
    )
    return eval_loss


def held_out_sums(
    engine: Engine, held_out: MixedRows, cfg: TrainRoot, *, max_rows: int | None
) -> tuple[float, int]:
    """Loss sum in nats and number of targets of rows spread over the held-out split: the same for any layout.

    Raises:
        RankFailedError: a row that could not be read, on any rank.
    """
    failures: list[LLMTrainError] = []
    batches = held_out_batches(
        held_out,
        micro_batch_rows=cfg.train.micro_batch_rows,
        dp_rank=engine.placement.groups.dp.rank,
        dp_size=engine.placement.groups.dp.size,
        max_rows=max_rows,
        on_failure=failures.append,
    )
    sums = engine.held_out_sums(batches)
    _raise_together(engine, failures[0] if failures else None)
    return sums


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
