"""What happens in a step, in reading order."""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Protocol

import torch
import torch.distributed as dist

from llmtrain.checkpoint.saver import Saver
from llmtrain.errors import DivergedError, LLMTrainError
from llmtrain.loader.batches import Batches, GaveUpError, StepBatches, held_out_batches, num_held_out_batches
from llmtrain.loader.ledger import LedgerWriter
from llmtrain.loader.open import MixedRows
from llmtrain.model.size import flops_per_token
from llmtrain.tracking.recorder import Recorder
from llmtrain.train.capsule import Capsules
from llmtrain.train.config import TrainRoot
from llmtrain.train.deadline import Deadline
from llmtrain.train.determinism import named_errors
from llmtrain.train.engine import Engine, StepResult
from llmtrain.train.heartbeat import Heartbeat
from llmtrain.train.ranks import agree
from llmtrain.train.roll_call import RollCall
from llmtrain.train.schedule import learning_rate
from llmtrain.train.spike_config import SpikeAction
from llmtrain.train.spikes import SpikeWatch, Verdict
from llmtrain.train.start_up import StartUp
from llmtrain.train.stragglers import StragglerReport

log = logging.getLogger(__name__)

MFU_CONVENTION = "causal"
"""FLOPs a token as Megatron-LM counts them: 6 per matrix weight, and half the attention square."""
WHAT_IS_DONE = {
    SpikeAction.ignore: "nothing is done about it",
    SpikeAction.warn: "the run trains on it",
    SpikeAction.skip: "its update is withheld",
    SpikeAction.rollback: "the run goes back and passes over it",
    SpikeAction.stop: "the run ends",
}
EVAL_PART_BATCHES = 32
"""Of a rank: between two of them all agree whether to leave."""


class TellSpike(Protocol):
    def __call__(self, verdict: Verdict, *, step: int, first: int, last: int, lr: float) -> None: ...


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
    owes_eval: bool = False
    """The evaluation after `step` was not finished: the run had to leave. Whoever goes on does it first."""


class Agreement(IntEnum):
    """What a rank brings to the start of a step; the highest of all ranks decides for all."""

    go_on = 0
    stop = 1
    failed = 2


class RollBackError(Exception):
    """The run goes back to an earlier checkpoint, on every rank, and passes over what it was told."""

    def __init__(self, verdict: Verdict, *, step: int) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict
        self.step = step
        """That spiked."""


class StepJudge:
    """Asks the watch about one step, once: by the engine, or after its update."""

    def __init__(self, watch: SpikeWatch, step: int, first: int, last: int) -> None:
        self._watch = watch
        self._about = {"step": step, "first": first, "last": last}
        self.verdict: Verdict | None = None

    def __call__(self, loss: float, grad_norm: float) -> bool:
        """Whether the weights may take the step."""
        self.verdict = self._watch.judge(**self._about, loss=loss, grad_norm=grad_norm)
        return self.verdict.updates


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
    watch: SpikeWatch,
    deadline: Deadline,
    start_up: StartUp | None,
    roll_call: RollCall,
    tell_spike: TellSpike,
    capsules: Capsules | None,
    heartbeat: Heartbeat,
    stragglers: StragglerReport | None,
) -> bool:
    """Run from `progress` until train.total_tokens are consumed, a rank has to leave, or one has an error.

    Returns whether the run is over.

    Args:
        recorder: Where metrics go; on ranks other than 0 it writes nothing. It keeps its errors for us.
        ledger: Where rank 0 notes each step's rows; None on the others.
        save: Begins a checkpoint of where the run stands; `saver` says what became of it.
        heartbeat: Told what this rank is at.
        stragglers: Of rank 0, where there are others.
        start_up: None where the ranks have taken steps before, and went back.
        tell_spike: notes whose documents a step had that is not like the ones before.
        capsules: what rank 0 tells of each step, for a capsule of one that fails; None on the others.

    Raises:
        DivergedError: a loss or gradient norm that is not finite, or a spike, where that is to end the run.
        RollBackError: one that is to be passed over.
        CheckpointError: a save that failed; earlier checkpoints are untouched.
        RankFailedError: a row that could not be read, or a metric that could not be written, on any rank.
    """
    seq_len, sizes, groups = cfg.data.seq_len, cfg.batch_sizes, engine.placement.groups
    device_flops = (cfg.train.device_peak_tflops or math.nan) * 1e12 * dist.get_world_size()
    token_flops = flops_per_token(cfg.model, seq_len, convention=MFU_CONVENTION)
    first_step = progress.step + 1
    last_saved = progress.on_disk
    longest_save_s = 0.0
    stage_starts = [-(-stage.from_tokens // seq_len) for stage in cfg.data.stages]

    def is_trained() -> bool:
        """Whether no row is left to take; the last ones may be passed over."""
        return batches.span(progress.position)[0] * seq_len >= cfg.train.total_tokens

    if progress.owes_eval:
        heartbeat.mark("evaluate")
        eval_loss = evaluate(cfg, engine, held_out, progress, recorder, deadline)
        if is_trained() and not progress.owes_eval:  # the checkpoint of the end says so
            _save(save, engine, progress, recorder, ledger, saver, eval_loss)
            last_saved = progress.step
    while not is_trained():
        step_start = time.perf_counter()
        first, last = batches.span(progress.position)
        rows_per_step = sizes.rows_at(first)
        step_tokens = rows_per_step * seq_len
        heartbeat.begin_step(progress.step + 1, position=first, num_rows=rows_per_step)
        longest_save_s = max(longest_save_s, _record_saved(saver, recorder))
        if capsules is not None:
            capsules.begin_step(progress.step + 1, positions=batches.positions(first, last))
        failure, data = _kept_failure(recorder, ledger, saver), StepBatches([], 0)
        try:
            data = batches.step(progress.position, give_up=deadline.is_due)
        except GaveUpError:
            pass
        except LLMTrainError as error:
            failure = error
        data_wait_s = time.perf_counter() - step_start
        heartbeat.mark("agree")
        wish = Agreement.failed if failure else Agreement.stop if deadline.is_due() else Agreement.go_on
        agreed, tokens_hash = agree(groups, engine.device, level=wish, tokens_hash=data.tokens_hash)
        if agreed == Agreement.failed:
            raise RankFailedError(_whose_failure(failure))
        if agreed == Agreement.stop:
            break
        lr = learning_rate(
            first * seq_len,
            step_tokens=step_tokens,
            total_tokens=cfg.train.total_tokens,
            peak=cfg.optimizer.peak_lr,
            cfg=cfg.schedule,
        )
        if any(progress.position <= start <= last for start in stage_starts):
            watch.begin_again()
        judge = StepJudge(watch, progress.step + 1, first, last)
        if capsules is not None:
            capsules.note(lr=lr)
        tells_memory = progress.step + 1 == first_step or _due(progress.step + 1, cfg.train.eval_every_steps)
        with named_errors(cfg.train.determinism):
            result = engine.train_step(
                data.micro_batches,
                lr=lr,
                judge=judge if watch.cfg.withholds else None,
                measure=tells_memory or _due(progress.step + 1, cfg.tracking.log_every_steps),
            )
        if capsules is not None:
            capsules.note(loss=result.loss, grad_norm=result.grad_norm)
        if judge.verdict is None and not result.is_skipped:
            judge(result.loss, result.grad_norm)
        heartbeat.mark("record")
        if ledger is not None:  # a step that diverged, too: it is the one that people look at
            ledger.step(
                progress.step + 1,
                first=first,
                last=last,
                tokens_hash=tokens_hash,
                withheld=result.is_withheld,
            )
        if result.is_skipped:
            recorder.event("overflow", progress.step + 1, loss_scale=engine.loss_scale)
            log.warning(
                "step %d: the gradient overflowed in fp16, so nothing was updated; the loss scale is %g now",
                *(progress.step + 1, engine.loss_scale),
            )
        elif judge.verdict is not None and judge.verdict.reason:
            tell_spike(judge.verdict, step=progress.step + 1, first=first, last=last, lr=lr)
            _obey(judge.verdict, recorder, result, step=progress.step + 1, first=first, last=last, lr=lr)
        if capsules is not None:
            capsules.end_step()
        progress.step += 1
        progress.position = last + 1
        step_s = time.perf_counter() - step_start
        mfu = step_tokens / step_s * token_flops / device_flops
        peak_gib = peak_memory_gib(engine.device)
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
            withheld=True if result.is_withheld else None,
            mem_gib=peak_gib,
            mfu=None if math.isnan(mfu) else mfu,
        )
        if progress.step == first_step and start_up is not None:
            start_up.mark("first step")
            saver.reserve(engine.pieces())  # an optimizer may have no state before
            roll_call.end()
            deadline.leave_at_once(during_start=False)
            log.info("%s", start_up.summary())
            recorder.event("first_step", progress.step, start_up_s=start_up.seconds())
        if stragglers is not None:
            _report_stragglers(cfg, stragglers, progress, recorder)
        if _due(progress.step, cfg.tracking.log_every_steps):
            _tell_mixture(batches, progress, recorder)
            if result.grad_norms:
                recorder.record("grads", progress.step, **result.grad_norms)
        if tells_memory and result.memory and (parts := result.memory.fields(peak_gib=peak_gib)):
            recorder.record("memory", progress.step, **parts)
        eval_loss = None
        if is_trained() or _due(progress.step, cfg.train.eval_every_steps):
            heartbeat.mark("evaluate")
            eval_loss = evaluate(cfg, engine, held_out, progress, recorder, deadline)
        heartbeat.mark("save")
        done = is_trained() and not progress.owes_eval
        if done:
            saver.finish()
        if done or _due(progress.step, cfg.save.every_steps):
            _save(save, engine, progress, recorder, ledger, saver, eval_loss)
            last_saved = progress.step
        elif saver.has_memory and _due(progress.step, cfg.save.memory_every_steps):
            _save(save, engine, progress, recorder, ledger, saver, eval_loss, in_memory=True)
    heartbeat.mark("leave")
    if capsules is not None:
        capsules.end_step()
    if last_saved < progress.step:
        saver.finish()
        longest_save_s = max(longest_save_s, _record_saved(saver, recorder))
        if _all_have_time(engine, deadline, longest_save_s):
            _save(save, engine, progress, recorder, ledger, saver, None)
            last_saved = progress.step
    saver.finish()
    _record_saved(saver, recorder)
    is_over = is_trained() and not progress.owes_eval
    if is_over:
        recorder.event("finished", progress.step)
    else:
        reason = _reason_of_all(deadline)
        recorder.event("stopped", progress.step, signal=reason, saved_step=last_saved)
        too_late = f": a save may take {longest_save_s:.0f} s, and less is left"
        log.log(
            logging.WARNING if dist.get_rank() == 0 else logging.DEBUG,
            "stopped by %s after step %d; run.intent=resume goes on from step %d%s",
            *(reason, progress.step, last_saved, "" if last_saved == progress.step else too_late),
        )
    if failure := _kept_failure(recorder, ledger, saver):
        raise failure
    return is_over


def _obey(
    verdict: Verdict, recorder: Recorder, result: StepResult, *, step: int, first: int, last: int, lr: float
) -> None:
    """Say what is not like the steps before; raise where the run does not simply go on."""
    is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    if not is_finite and verdict.action is SpikeAction.stop:
        recorder.event("diverged", step, loss=result.loss, grad_norm=result.grad_norm, lr=lr)
        raise DivergedError(
            f"loss={result.loss} and gradient norm={result.grad_norm} at step {step}, lr={lr:.3g}, row "
            f"positions {first} to {last}; start again with a lower optimizer.peak_lr, resume with one from "
            "the newest checkpoint, or pass over such steps: spikes.on_non_finite=skip or rollback"
        )
    recorder.event(
        "spike",
        step,
        action=verdict.action.name,
        reason=verdict.reason,
        first=first,
        last=last,
        quantity=verdict.quantity,
        value=verdict.value,
        median=verdict.median,
        z=verdict.z,
    )
    log.log(
        logging.WARNING if dist.get_rank() == 0 else logging.DEBUG,
        "step %d, rows %d to %d: %s; %s",
        *(step, first, last, verdict.reason, WHAT_IS_DONE[verdict.action]),
    )
    if verdict.action is SpikeAction.rollback:
        raise RollBackError(verdict, step=step)
    if verdict.action is SpikeAction.stop:
        raise DivergedError(
            f"step {step}, rows {first} to {last}: {verdict.reason}; the run ends (spikes.on_spike, "
            "spikes.on_non_finite and spikes.budget say when)"
        )


def _report_stragglers(
    cfg: TrainRoot, stragglers: StragglerReport, progress: Progress, recorder: Recorder
) -> None:
    if _due(progress.step, cfg.tracking.log_every_steps):
        stragglers.look()
    if found := stragglers.take():
        recorder.record("ranks", progress.step, **found[0])
        for each in found[1]:
            recorder.event("straggler", progress.step, **vars(each))


def _tell_mixture(batches: Batches, progress: Progress, recorder: Recorder) -> None:
    """Of several sources: the share of rows that each has given so far, and what is asked of it now."""
    shares = batches.shares(progress.position)
    if len(shares) > 1:
        fields = {f"share_{name}": taken for name, (taken, _) in shares.items()}
        fields |= {f"asked_{name}": asked for name, (_, asked) in shares.items()}
        recorder.record("mixture", progress.step, **fields)


def _all_have_time(engine: Engine, deadline: Deadline, save_s: float) -> bool:
    """Whether every rank can still save; rank 0 knows how long saves took."""
    level = Agreement.go_on if deadline.has_time_for(save_s) else Agreement.stop
    agreed, _ = agree(engine.placement.groups, engine.device, level=level, tokens_hash=0)
    return agreed == Agreement.go_on


def _reason_of_all(deadline: Deadline) -> str:
    """Why the run leaves: of the first rank that has a reason."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, deadline.reason())
    return next(reason for reason in reasons if reason is not None)


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


def _record_saved(saver: Saver, recorder: Recorder) -> float:
    """Tell what was saved; return the most seconds that one on the disk took."""
    longest_s = 0.0
    for saved in saver.take_saved():
        seconds = {"save_s": saved.save_s, "wait_s": saved.wait_s, "copy_s": saved.copy_s}
        if saved.in_memory:
            recorder.event("snapshot", saved.step, **seconds)
        else:
            recorder.checkpoint(saved.step, **seconds)
            longest_s = max(longest_s, saved.save_s)
    return longest_s


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
    deadline: Deadline,
) -> float | None:
    """Record and return the held-out loss over train.eval_rows rows of the held-out split; None if the run
    has to leave before that is known.

    Raises:
        RankFailedError: a row that could not be read, on any rank.
    """
    start = time.perf_counter()
    sums = held_out_sums(engine, held_out, cfg, max_rows=cfg.train.eval_rows, deadline=deadline)
    progress.owes_eval = sums is None
    if sums is None:
        return None
    loss_sum, num_valid = sums
    eval_loss = loss_sum / max(1, num_valid)
    recorder.evaluation(
        progress.step,
        eval_loss=eval_loss,
        eval_targets=num_valid,
        eval_s=time.perf_counter() - start,
    )
    return eval_loss


def held_out_sums(
    engine: Engine,
    held_out: MixedRows,
    cfg: TrainRoot,
    *,
    max_rows: int | None,
    deadline: Deadline | None = None,
) -> tuple[float, int] | None:
    """Loss sum in nats and number of targets of rows spread over the held-out split: the same for any layout.

    Args:
        deadline: where it comes on any rank, nothing is found: None.

    Raises:
        RankFailedError: a row that could not be read, on any rank.
    """
    failures: list[LLMTrainError] = []
    groups = engine.placement.groups
    batches = held_out_batches(
        held_out,
        micro_batch_rows=cfg.train.micro_batch_rows,
        dp_rank=groups.dp.rank,
        dp_size=groups.dp.size,
        max_rows=max_rows,
        on_failure=failures.append,
    )
    num_batches = num_held_out_batches(
        held_out, micro_batch_rows=cfg.train.micro_batch_rows, dp_size=groups.dp.size, max_rows=max_rows
    )
    loss_sum, num_valid = 0.0, 0
    for done in range(0, num_batches, EVAL_PART_BATCHES):
        of_part = engine.held_out_sums(islice(batches, min(EVAL_PART_BATCHES, num_batches - done)))
        loss_sum, num_valid = loss_sum + of_part[0], num_valid + of_part[1]
        wish = Agreement.stop if deadline is not None and deadline.is_due() else Agreement.go_on
        wish = Agreement.failed if failures else wish
        agreed, _ = agree(groups, engine.device, level=wish, tokens_hash=0)
        if agreed == Agreement.failed:
            raise RankFailedError(_whose_failure(failures[0] if failures else None))
        if agreed == Agreement.stop and done + EVAL_PART_BATCHES < num_batches:
            return None
    return loss_sum, num_valid


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
