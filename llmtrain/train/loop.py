"""What happens in a step, in reading order."""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from llmtrain.checkpoint.saver import Saver
from llmtrain.errors import DivergedError, LLMTrainError
from llmtrain.loader.batches import Batches, GaveUpError, StepBatches
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
from llmtrain.train.held_out import held_out_sums
from llmtrain.train.ranks import Agreement, agree, failure_of_all, warn_once
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


class TellSpike(Protocol):
    def __call__(self, verdict: Verdict, at: StepPlace) -> None: ...


class SaveFunction(Protocol):
    def __call__(self, loop: Loop, *, eval_loss: float | None, in_memory: bool) -> None: ...


@dataclass
class Progress:
    """Where a run is. `position` is the loader's whole state."""

    step: int
    """Optimizer updates done."""
    position: int
    """Rows consumed."""
    targets: int = 0
    """Valid targets that the weights have learned from, of all ranks."""
    on_disk: int = 0
    """Step of the checkpoint that the run could go on from without what is in memory."""
    owes_eval: bool = False
    """The evaluation after `step` was not finished: the run had to leave. Whoever goes on does it first."""


@dataclass(frozen=True)
class StepPlace:
    """Of a step that is about to be taken, or is under way."""

    step: int
    first: int
    """Positions of its rows."""
    last: int
    num_rows: int
    lr: float


class RollBackError(Exception):
    """The run goes back to an earlier checkpoint, on every rank, and passes over what it was told."""

    def __init__(self, verdict: Verdict, *, step: int) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict
        self.step = step
        """That spiked."""


class StepJudge:
    """Asks the watch about one step, once: by the engine, or after its update."""

    def __init__(self, watch: SpikeWatch, at: StepPlace) -> None:
        self._watch = watch
        self._about = {"step": at.step, "first": at.first, "last": at.last}
        self.verdict: Verdict | None = None

    def __call__(self, loss: float, grad_norm: float) -> bool:
        """Whether the weights may take the step."""
        self.verdict = self._watch.judge(**self._about, loss=loss, grad_norm=grad_norm)
        return self.verdict.updates


@dataclass(kw_only=True)
class Loop:
    """A rank's part of a run: what it trains with, whom it tells, and who may end it."""

    cfg: TrainRoot
    engine: Engine
    batches: Batches
    held_out: MixedRows
    progress: Progress
    recorder: Recorder
    """Where metrics go; on ranks other than 0 it writes nothing. It keeps its errors for us."""
    ledger: LedgerWriter | None
    """Where rank 0 notes each step's rows; None on the others."""
    save: SaveFunction
    """Begins a checkpoint of where the run stands; `saver` says what became of it."""
    saver: Saver
    watch: SpikeWatch
    tell_spike: TellSpike
    """Notes whose documents a step had that is not like the ones before."""
    deadline: Deadline
    roll_call: RollCall
    start_up: StartUp | None
    """None where the ranks have taken steps before, and went back."""
    heartbeat: Heartbeat
    """Told what this rank is at."""
    capsules: Capsules | None
    """What rank 0 tells of each step, for a capsule of one that fails; None on the others."""
    stragglers: StragglerReport | None
    """Of rank 0, where there are others."""

    def __post_init__(self) -> None:
        seq_len = self.cfg.data.seq_len
        self._device_flops = (self.cfg.train.device_peak_tflops or math.nan) * 1e12 * dist.get_world_size()
        self._token_flops = flops_per_token(self.cfg.model, seq_len, convention=MFU_CONVENTION)
        self._stage_starts = [-(-stage.from_tokens // seq_len) for stage in self.cfg.data.stages]

    def run(self) -> bool:
        """Train from `progress` until train.total_tokens are consumed, a rank has to leave, or one has an
        error; return whether the run is over.

        Raises:
            DivergedError: a loss or gradient norm that is not finite, or a spike, where that is to end the
                run.
            RollBackError: one that is to be passed over.
            CheckpointError: a save that failed; earlier checkpoints are untouched.
            RankFailedError: a row that could not be read, or a metric that could not be written, on any rank.
        """
        self._first_step = self.progress.step + 1
        self._last_saved = self.progress.on_disk
        self._longest_save_s = 0.0
        if self.progress.owes_eval:
            eval_loss = self._evaluate()
            if eval_loss is not None and self._is_trained():  # the checkpoint of the end says so
                self._save(eval_loss)
        while not self._is_trained():
            start = time.perf_counter()
            at = self._begin_step()
            data, tokens_hash = self._take_rows()
            if data is None:
                break
            data_wait_s = time.perf_counter() - start
            result = self._update(at, data, tokens_hash)
            self._end_step(at, result, step_s=time.perf_counter() - start, data_wait_s=data_wait_s)
        return self._leave()

    def _is_trained(self) -> bool:
        """Whether no row is left to take; the last ones may be passed over."""
        first, _ = self.batches.span(self.progress.position)
        return first * self.cfg.data.seq_len >= self.cfg.train.total_tokens

    def _begin_step(self) -> StepPlace:
        """Say what is about to be done to those who would tell of a failure."""
        step, seq_len = self.progress.step + 1, self.cfg.data.seq_len
        first, last = self.batches.span(self.progress.position)
        num_rows = self.cfg.batch_sizes.rows_at(first)
        lr = learning_rate(
            first * seq_len,
            step_tokens=num_rows * seq_len,
            total_tokens=self.cfg.train.total_tokens,
            peak=self.cfg.optimizer.peak_lr,
            cfg=self.cfg.schedule,
        )
        self.heartbeat.begin_step(step, position=first, num_rows=num_rows)
        if self.capsules is not None:
            self.capsules.begin_step(step, positions=self.batches.positions(first, last))
            self.capsules.note(lr=lr)
        return StepPlace(step, first, last, num_rows, lr)

    def _take_rows(self) -> tuple[StepBatches | None, int]:
        """This rank's part of the step, and the hash of all parts; None where all are to leave."""
        self._tell_saved()
        failure, data = self._kept_failure(), StepBatches([], 0)
        try:
            data = self.batches.step(self.progress.position, give_up=self.deadline.is_due)
        except GaveUpError:
            pass
        except LLMTrainError as error:
            failure = error
        self.heartbeat.mark("agree")
        is_due = self.deadline.is_due()
        wish = Agreement.failed if failure else Agreement.stop if is_due else Agreement.go_on
        groups, device = self.engine.placement.groups, self.engine.device
        agreed, tokens_hash = agree(groups, device, level=wish, tokens_hash=data.tokens_hash)
        if agreed == Agreement.failed:
            raise failure_of_all(failure)
        return (None if agreed == Agreement.stop else data), tokens_hash

    def _update(self, at: StepPlace, data: StepBatches, tokens_hash: int) -> StepResult:
        """Have the weights take the step, unless the watch is against it, and note which rows it had."""
        if any(self.progress.position <= start <= at.last for start in self._stage_starts):
            self.watch.begin_again()
        judge = StepJudge(self.watch, at)
        with named_errors(self.cfg.train.determinism):
            result = self.engine.train_step(
                data.micro_batches,
                lr=at.lr,
                judge=judge if self.watch.cfg.withholds else None,
                measure=self._tells_memory(at.step) or _due(at.step, self.cfg.tracking.log_every_steps),
            )
        if self.capsules is not None:
            self.capsules.note(loss=result.loss, grad_norm=result.grad_norm)
        if judge.verdict is None and not result.is_skipped:
            judge(result.loss, result.grad_norm)
        self.heartbeat.mark("record")
        if self.ledger is not None:  # a step that diverged, too: it is the one that people look at
            self.ledger.step(
                at.step, first=at.first, last=at.last, tokens_hash=tokens_hash, withheld=result.is_withheld
            )
        if result.is_skipped:
            self.recorder.event("overflow", at.step, loss_scale=self.engine.loss_scale)
            warn_once(
                log,
                "step %d: the gradient overflowed in fp16, so nothing was updated; the loss scale is %g now",
                *(at.step, self.engine.loss_scale),
            )
        elif judge.verdict is not None and judge.verdict.reason:
            self.tell_spike(judge.verdict, at)
            self._obey(judge.verdict, at, result)
        if self.capsules is not None:
            self.capsules.end_step()
        return result

    def _obey(self, verdict: Verdict, at: StepPlace, result: StepResult) -> None:
        """Say what is not like the steps before; raise where the run does not simply go on."""
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        if not is_finite and verdict.action is SpikeAction.stop:
            self.recorder.event("diverged", at.step, loss=result.loss, grad_norm=result.grad_norm, lr=at.lr)
            raise DivergedError(
                f"loss={result.loss} and gradient norm={result.grad_norm} at step {at.step}, lr={at.lr:.3g}, "
                f"row positions {at.first} to {at.last}; start again with a lower optimizer.peak_lr, resume "
                "with one from the newest checkpoint, or pass over such steps: spikes.on_non_finite=skip or "
                "rollback"
            )
        self.recorder.event(
            "spike",
            at.step,
            action=verdict.action.name,
            reason=verdict.reason,
            first=at.first,
            last=at.last,
            quantity=verdict.quantity,
            value=verdict.value,
            median=verdict.median,
            z=verdict.z,
        )
        warn_once(
            log,
            "step %d, rows %d to %d: %s; %s",
            *(at.step, at.first, at.last, verdict.reason, WHAT_IS_DONE[verdict.action]),
        )
        if verdict.action is SpikeAction.rollback:
            raise RollBackError(verdict, step=at.step)
        if verdict.action is SpikeAction.stop:
            raise DivergedError(
                f"step {at.step}, rows {at.first} to {at.last}: {verdict.reason}; the run ends "
                "(spikes.on_spike, spikes.on_non_finite and spikes.budget say when)"
            )

    def _end_step(self, at: StepPlace, result: StepResult, *, step_s: float, data_wait_s: float) -> None:
        """Record the step, and evaluate and save where that is due after it."""
        progress, recorder, cfg = self.progress, self.recorder, self.cfg
        progress.step, progress.position = at.step, at.last + 1
        if not (result.is_skipped or result.is_withheld):
            progress.targets += result.num_valid
        mfu = at.num_rows * cfg.data.seq_len / step_s * self._token_flops / self._device_flops
        peak_gib = peak_memory_gib(self.engine.device)
        recorder.step(
            at.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=at.lr,
            tokens=progress.targets,
            position=progress.position,
            num_valid=result.num_valid,
            tokens_per_s=result.num_valid / step_s,
            step_s=step_s,
            data_wait_s=data_wait_s,
            withheld=True if result.is_withheld else None,
            mem_gib=peak_gib,
            mfu=None if math.isnan(mfu) else mfu,
        )
        if at.step == self._first_step and self.start_up is not None:
            self._end_start_up(self.start_up)
        self._tell_of_ranks()
        if _due(at.step, cfg.tracking.log_every_steps):
            self._tell_mixture()
            if result.grad_norms:
                recorder.record("grads", at.step, **result.grad_norms)
        if (
            self._tells_memory(at.step)
            and result.memory
            and (parts := result.memory.fields(peak_gib=peak_gib))
        ):
            recorder.record("memory", at.step, **parts)
        eval_loss = None
        if self._is_trained() or _due(at.step, cfg.train.eval_every_steps):
            eval_loss = self._evaluate()
        self.heartbeat.mark("save")
        is_over = self._is_over()
        if is_over:
            self.saver.finish()
        if is_over or _due(at.step, cfg.save.every_steps):
            self._save(eval_loss)
        elif self.saver.has_memory and _due(at.step, cfg.save.memory_every_steps):
            self._save(eval_loss, in_memory=True)

    def _end_start_up(self, start_up: StartUp) -> None:
        start_up.mark("first step")
        self.saver.reserve(self.engine.pieces())  # an optimizer may have no state before
        self.roll_call.end()
        self.deadline.leave_at_once(during_start=False)
        log.info("%s", start_up.summary())
        self.recorder.event("first_step", self.progress.step, start_up_s=start_up.seconds())

    def _tells_memory(self, step: int) -> bool:
        return step == self._first_step or _due(step, self.cfg.train.eval_every_steps)

    def _tell_of_ranks(self) -> None:
        if self.stragglers is None:
            return
        if _due(self.progress.step, self.cfg.tracking.log_every_steps):
            self.stragglers.look()
        if found := self.stragglers.take():
            self.recorder.record("ranks", self.progress.step, **found[0])
            for each in found[1]:
                self.recorder.event("straggler", self.progress.step, **vars(each))

    def _tell_mixture(self) -> None:
        """Of several sources: the share of rows that each has given so far, and what is asked of it now."""
        shares = self.batches.shares(self.progress.position)
        if len(shares) > 1:
            fields = {f"share_{name}": taken for name, (taken, _) in shares.items()}
            fields |= {f"asked_{name}": asked for name, (_, asked) in shares.items()}
            self.recorder.record("mixture", self.progress.step, **fields)

    def _evaluate(self) -> float | None:
        """Record and return the held-out loss over train.eval_rows rows of the held-out split; None if the
        run has to leave before that is known.

        Raises:
            RankFailedError: a row that could not be read, on any rank.
        """
        self.heartbeat.mark("evaluate")
        start = time.perf_counter()
        max_rows = self.cfg.train.eval_rows
        sums = held_out_sums(self.engine, self.held_out, self.cfg, max_rows=max_rows, deadline=self.deadline)
        self.progress.owes_eval = sums is None
        if sums is None:
            return None
        loss_sum, num_valid = sums
        eval_loss = loss_sum / max(1, num_valid)
        self.recorder.evaluation(
            self.progress.step,
            eval_loss=eval_loss,
            eval_targets=num_valid,
            eval_s=time.perf_counter() - start,
        )
        return eval_loss

    def _save(self, eval_loss: float | None, *, in_memory: bool = False) -> None:
        """Save, if every rank could note what it did: what a checkpoint says was done is in the ledger, also
        after a power cut."""
        if self.ledger is not None:
            self.ledger.sync()
        self.saver.settle()
        failure = self._kept_failure()
        if self._worst(Agreement.failed if failure else Agreement.go_on) == Agreement.failed:
            raise failure_of_all(failure)
        self.save(self, eval_loss=eval_loss, in_memory=in_memory)
        if not in_memory:
            self._last_saved = self.progress.step

    def _tell_saved(self) -> None:
        """Tell what was saved since."""
        for saved in self.saver.take_saved():
            seconds = {"save_s": saved.save_s, "wait_s": saved.wait_s, "copy_s": saved.copy_s}
            if saved.in_memory:
                self.recorder.event("snapshot", saved.step, **seconds)
            else:
                self.recorder.checkpoint(saved.step, **seconds)
                self._longest_save_s = max(self._longest_save_s, saved.save_s)

    def _is_over(self) -> bool:
        return self._is_trained() and not self.progress.owes_eval

    def _leave(self) -> bool:
        """Save what is not saved, if there is time, and say how it ends; return whether the run is over."""
        self.heartbeat.mark("leave")
        if self.capsules is not None:
            self.capsules.end_step()
        if self._last_saved < self.progress.step:
            self.saver.finish()
            self._tell_saved()
            has_time = self.deadline.has_time_for(self._longest_save_s)  # rank 0 knows how long saves took
            if self._worst(Agreement.go_on if has_time else Agreement.stop) == Agreement.go_on:
                self._save(None)
        self.saver.finish()
        self._tell_saved()
        if self._is_over():
            self.recorder.event("finished", self.progress.step)
        else:
            self._say_stopped()
        if failure := self._kept_failure():
            raise failure
        return self._is_over()

    def _say_stopped(self) -> None:
        """With the reason of the first rank that has one."""
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, self.deadline.reason())
        reason = next(reason for reason in reasons if reason is not None)
        step, saved = self.progress.step, self._last_saved
        self.recorder.event("stopped", step, signal=reason, saved_step=saved)
        too_late = f": a save may take {self._longest_save_s:.0f} s, and less is left"
        warn_once(
            log,
            "stopped by %s after step %d; run.intent=resume goes on from step %d%s",
            *(reason, step, saved, "" if saved == step else too_late),
        )

    def _worst(self, mine: Agreement) -> int:
        return agree(self.engine.placement.groups, self.engine.device, level=mine)[0]

    def _kept_failure(self) -> LLMTrainError | None:
        """Of what this rank wrote beside training."""
        of_ledger = None if self.ledger is None else self.ledger.failure
        return self.recorder.failure or of_ledger or self.saver.failure


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
