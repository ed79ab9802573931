"""The one file that knows every room. It reads as a recipe: ranks, checks, rows, layers, engine, weights,
loop."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from llmtrain import files
from llmtrain.checkpoint.find import checkpoint_path, list_checkpoints, remove
from llmtrain.checkpoint.format import some
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.storage import Place, place_of
from llmtrain.checkpoint.write import Ranks
from llmtrain.data.manifest import verify
from llmtrain.errors import EXIT_FAILED, CheckpointError, ConfigError, DiskError, DivergedError, LLMTrainError
from llmtrain.files import FolderLock
from llmtrain.loader.batches import Batches
from llmtrain.loader.config import Verify
from llmtrain.loader.documents import documents_of
from llmtrain.loader.ledger import LEDGER_NAME, Attempt, LedgerWriter
from llmtrain.loader.open import OpenData, open_same
from llmtrain.loader.skipped import SKIPPED_NAME, PassedOver, SkippedWindow, read_skipped, write_skipped
from llmtrain.model.size import num_params
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.tracking.facts import record_start
from llmtrain.tracking.metrics import next_attempt, read_lines
from llmtrain.tracking.recorder import Recorder, RunRecorder, SilentRecorder
from llmtrain.tracking.run_data import find_plan
from llmtrain.tracking.wandb import node_sink, wandb_id
from llmtrain.train import determinism
from llmtrain.train.capsule import Capsules, keep, kept
from llmtrain.train.certificate import differences
from llmtrain.train.changes import Change, Changed, compare, sentences
from llmtrain.train.check import CHECKPOINT_BYTES_PER_PARAM, check_train
from llmtrain.train.collectives import keep_flight_record
from llmtrain.train.config import Intent, Precision, TrainRoot
from llmtrain.train.deadline import Deadline
from llmtrain.train.engine import Engine
from llmtrain.train.engines import open_engine
from llmtrain.train.heartbeat import Heartbeat
from llmtrain.train.held_out import held_out_sums
from llmtrain.train.loop import MFU_CONVENTION, Loop, Progress, RollBackError, StepPlace
from llmtrain.train.memory_tier import MemoryTier, folder_in
from llmtrain.train.optimizer import state_kinds
from llmtrain.train.placement import fresh_weights, place
from llmtrain.train.preflight import REPORT_NAME, check_before_meeting, run_preflight
from llmtrain.train.ranks import join_ranks
from llmtrain.train.retries import check_retries
from llmtrain.train.roll_call import RollCall
from llmtrain.train.run_folder import RunFolder, checkpoint_to_start_from, run_folder
from llmtrain.train.spikes import SpikeWatch, Verdict, write_spike
from llmtrain.train.start_up import StartUp
from llmtrain.train.state import CountedSource, host_memory
from llmtrain.train.stragglers import StragglerReport
from llmtrain.train.watchdog import HangLimits, Watchdog, prepare

log = logging.getLogger(__name__)

READ_TIMEOUT_SHARE = 0.8
"""Of the time that ranks wait for each other: a rank whose read hangs says so before the others give up."""

CHECK_ROWS = 8
"""Held-out rows of save.check_loss, or a micro batch's."""
LOSS_TOLERANCE = {Precision.fp32: 1e-5, Precision.bf16: 1e-2, Precision.fp16: 1e-2, None: 2e-2}
"""Largest relative difference after a resume, on any layout; None: in another precision."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """What rank 0 decided, and every rank follows."""

    attempt: int
    checkpoint: str | None
    data_hash: str
    token: str
    """Of this launch: what ranks of earlier ones left behind is not theirs."""
    accepted_change: bool
    """Whether the checkpoint was trained on other data, and the user said that is meant."""
    skipped: list[SkippedWindow]
    """Rows that the run passes over."""
    changed: list[Changed]
    """What a resume changes against the checkpoint."""


@dataclass(frozen=True)
class Run:
    """What stays the same in all attempts of these processes."""

    cfg: TrainRoot
    folder: RunFolder
    device: torch.device
    data: OpenData
    engine: Engine
    config_text: str
    command: Sequence[str]
    origin: dict[str, Any] = field(default_factory=dict)
    """Of rank 0, whose state a checkpoint stores: where its weights come from."""


def run_training(
    cfg: TrainRoot, *, start_up: StartUp, deadline: Deadline, config_text: str, command: Sequence[str]
) -> bool:
    """Train from whatever run.intent says to the end, or until `deadline`; return whether the run is over.

    Args:
        config_text: The resolved config as YAML, saved with the run.
        command: What the user typed, saved with the run.
    """
    with ExitStack() as stack:
        roll_call = stack.enter_context(RollCall(silence_s=cfg.train.start_up_silence_s, deadline=deadline))
        check_before_meeting(cfg.preflight)
        keep_flight_record()
        device = join_ranks(timeout_s=cfg.train.process_group_timeout_s)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        start_up.mark("ranks")
        deadline.leave_at_once(during_start=world_size == 1)
        folder = run_folder(cfg)
        stack.callback(_leave_ranks)
        preflight = run_preflight(cfg, cfg.preflight, device=device, gather=_gather)
        start_up.mark("preflight")
        start = _from_rank_0(lambda: _decide(cfg, folder, stack, world_size=world_size, device=device.type))
        reader = _open_whole(cfg, folder, start)
        if reader is not None and cfg.run.intent is not Intent.warm_start and _is_over(cfg, reader):
            return True
        heartbeat, watchdog = _watch_ranks(cfg, folder, start, device, stack)
        data = _together(lambda: open_same(cfg.data, seed=cfg.run.seed, expected=start.data_hash))
        _together(lambda: _verify_share(cfg, data, rank=rank, world_size=world_size))
        facts = determinism.facts(cfg.train.determinism, device)
        _check_alike(cfg, facts, reader)
        serving = stack.enter_context(ExitStack())
        on_disk = 0 if reader is None else reader.step
        memory = _open_memory(cfg, folder)
        if memory is not None:
            reader = _newer_in_memory(cfg, folder, memory, reader, start, serving)
            _check_alike(cfg, facts, reader)
        start_up.mark("checks")

        parallel = cfg.parallel
        groups = build_groups(
            Topology.of_world(
                world_size, pp_size=parallel.pp_size, cp_size=parallel.cp_size, tp_size=parallel.tp_size
            )
        )
        placement = place(cfg.model, parallel, groups, seq_len=cfg.data.seq_len, seed=cfg.run.seed)
        engine = open_engine(placement, device=device, train=cfg.train, optimizer=cfg.optimizer)
        engine.mark = heartbeat.mark
        heartbeat.work = f"pp_stage {groups.pp.rank}"
        progress = _load(cfg, engine, reader, data)
        progress.on_disk = min(on_disk, progress.step)
        serving.close()  # all have loaded
        batches = Batches(
            data.train,
            order=data.order,
            sizes=cfg.batch_sizes,
            micro_batch_rows=cfg.train.micro_batch_rows,
            dp_rank=groups.dp.rank,
            dp_size=groups.dp.size,
            prefetch_steps=cfg.data.prefetch_steps,
            pin_memory=device.type == "cuda",
            timeout_s=READ_TIMEOUT_SHARE * cfg.train.process_group_timeout_s,
            passed_over=PassedOver.of_windows(start.skipped),
        )
        stack.callback(batches.close)
        start_up.mark("model")
        if preflight is not None:
            _from_rank_0(lambda: preflight.write(folder.path / REPORT_NAME, attempt=start.attempt))
        run = Run(cfg, folder, device, data, engine, config_text, command, {"determinism": facts})
        recorder, ledger = _begin_attempt(run, start, progress, reader, stack)
        roll_call.on_leave = partial(_say_stopped, recorder, progress)
        if limit := deadline.describe():
            log.info("%s", limit)

        ranks = _ranks_that_save(cfg)
        saver = Saver(
            folder.checkpoints,
            ranks,
            cfg.save,
            memory=(memory.folder, memory.ranks(ranks.gather)) if memory and _has_room(cfg, memory) else None,
            allocate=partial(host_memory, device=device),
        )
        stack.callback(saver.leave)

        stack.push(roll_call.hold)
        capsules = None
        if rank == 0:
            source = None if reader is None else str(reader.path)
            capsules = Capsules(
                cfg,
                data,
                attempt=start.attempt,
                world_size=world_size,
                config_text=config_text,
                source=source,
            )
        stack.enter_context(kept(capsules, recorder))
        if watchdog is not None:
            watchdog.on_verdict = partial(keep, capsules, recorder, "hang")
        loop = Loop(
            cfg=cfg,
            engine=engine,
            batches=batches,
            held_out=data.held_out,
            progress=progress,
            recorder=recorder,
            ledger=ledger,
            save=partial(_save, run, start),
            saver=saver,
            watch=_watch(cfg, reader, start.skipped),
            tell_spike=partial(_tell_spike, run, batches, start.attempt),
            deadline=deadline,
            roll_call=roll_call,
            start_up=start_up,
            heartbeat=heartbeat,
            capsules=capsules,
            stragglers=_straggler_report(cfg, heartbeat, stack),
        )
        try:
            while True:
                try:
                    is_over = loop.run()
                    break
                except RollBackError as wish:
                    _roll_back(run, loop, memory, wish, attempt=start.attempt)
        except LLMTrainError as error:  # every rank has it
            if memory is not None and isinstance(error, DivergedError):
                memory.leave()  # it may be from just before: people go back further
            if rank != 0:
                sys.exit(EXIT_FAILED)  # rank 0 says why
            raise
        except Exception as error:
            if watchdog is not None:
                watchdog.explain(error)
            raise
        if memory is not None:
            memory.leave()
        return is_over


def _watch_ranks(
    cfg: TrainRoot, folder: RunFolder, start: Start, device: torch.device, stack: ExitStack
) -> tuple[Heartbeat, Watchdog | None]:
    """From here on a rank that stands still or falls is named by the others; until the first step is done the
    roll call listens, too."""
    timeout_s = cfg.train.hang_limit_s
    limits = HangLimits(timeout_s, READ_TIMEOUT_SHARE * cfg.train.process_group_timeout_s)
    heartbeat = Heartbeat(
        folder.ranks,
        token=start.token,
        attempt=start.attempt,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        is_exact=device.type == "cpu",
        every_s=limits.every_s if timeout_s else 1.0,
        stuck_s=timeout_s or None,
    )
    stack.enter_context(heartbeat)
    if not timeout_s:
        return heartbeat, None
    watchdog = Watchdog(
        heartbeat, limits, run_folder=folder.path, metrics=folder.metrics, backend=dist.get_backend()
    )
    return heartbeat, stack.enter_context(watchdog)


def _straggler_report(cfg: TrainRoot, heartbeat: Heartbeat, stack: ExitStack) -> StragglerReport | None:
    if heartbeat.rank != 0 or heartbeat.world_size == 1:
        return None
    report = StragglerReport(
        heartbeat.folder,
        token=heartbeat.token,
        world_size=heartbeat.world_size,
        slower_than=cfg.train.straggler_slower_than,
    )
    stack.callback(report.close)
    return report


def _begin_attempt(
    run: Run, start: Start, progress: Progress, reader: CheckpointReader | None, stack: ExitStack
) -> tuple[Recorder, LedgerWriter | None]:
    """Open what rank 0 writes, and say where this attempt begins."""
    cfg, rank, world_size = run.cfg, dist.get_rank(), dist.get_world_size()
    source = None if reader is None else str(reader.path)

    def open_recorder() -> Recorder:
        if rank != 0:
            return SilentRecorder()
        with files.atomic_write(run.folder.config, "w") as handle:
            handle.write(run.config_text)
        facts = record_start(
            run.folder.path,
            attempt=start.attempt,
            command_line=run.command,
            extra={
                "id": secrets.token_hex(8),
                "world_size": world_size,
                "device": _device_name(run.device),
                "from": source,
                "from_manifest_sha256": reader and reader.manifest_hash,
                "determinism": run.origin["determinism"],
            },
        )
        run_config = files.plain(cfg)
        plan, forecast, why_not = find_plan(run_config, world_size=world_size)
        run_recorder = stack.enter_context(
            RunRecorder(
                cfg.tracking,
                metrics=run.folder.metrics,
                attempt=start.attempt,
                start_step=progress.step,
                total_steps=progress.step + cfg.batch_sizes.walk(progress.position, cfg.wanted_rows)[0],
                run_name=cfg.run.name,
                run_config=run_config,
                forecast=forecast,
                wandb_run_id=None
                if reader is None or cfg.run.intent is Intent.warm_start
                else reader.state.get("wandb_id"),
            )
        )
        if cfg.run.plan is not None and plan is None:
            log.warning("%s", why_not)
        run.origin["code"] = {"git_commit": facts["git_commit"], "git_dirty": facts["git_dirty"]}
        run.origin["code"]["versions"] = facts["versions"]
        run.origin["attempt_id"] = facts["id"]
        run.origin["parent"] = None if reader is None else _parent(cfg, reader)
        run.origin["wandb_id"] = wandb_id(run.folder.path)
        return run_recorder

    def open_ledger() -> LedgerWriter | None:
        if rank != 0:
            return None
        sizes = cfg.batch_sizes
        ledger = LedgerWriter(
            run.folder.path / LEDGER_NAME,
            Attempt(
                attempt=start.attempt,
                step=progress.step,
                position=progress.position,
                world_size=world_size,
                micro_batch_rows=cfg.train.micro_batch_rows,
                seq_len=cfg.data.seq_len,
                seed=cfg.run.seed,
                starts=list(sizes.starts),
                sizes=list(sizes.sizes),
                data_hash=start.data_hash,
                accepted_change=start.accepted_change,
                dp_size=run.engine.placement.groups.dp.size,
                skipped=[[each.first, each.last] for each in start.skipped],
            ),
        )
        stack.callback(ledger.close)
        return ledger

    recorder = _together(open_recorder)
    if rank != 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        node = node_sink(
            cfg.tracking,
            run.folder.path,
            node=int(os.environ.get("GROUP_RANK", "0")),
            run_name=cfg.run.name,
            report=lambda text: log.info("W&B: %s", text),
        )
        if node is not None:
            stack.callback(node.finish)
    ledger = _together(open_ledger)
    has_peak = cfg.train.device_peak_tflops is not None
    recorder.event(
        "start" if progress.step == 0 else "resume",
        progress.step,
        position=progress.position,
        source=source,
        world_size=world_size,
        mfu_convention=MFU_CONVENTION if has_peak else None,
        device_peak_tflops=cfg.train.device_peak_tflops,
        device_peak_source=cfg.train.device_peak_source,
    )
    if changed := [each.record() for each in start.changed if each.change is not Change.safe]:
        recorder.event("config_changed", progress.step, changes=changed)
    if has_peak:
        log.info(
            "MFU counts %s FLOPs against %g TFLOP/s a device (%s)",
            *(MFU_CONVENTION, cfg.train.device_peak_tflops, cfg.train.device_peak_source),
        )
    return recorder, ledger


def _watch(cfg: TrainRoot, reader: CheckpointReader | None, skipped: list[SkippedWindow]) -> SpikeWatch:
    """As it was when the checkpoint was saved."""
    goes_on = reader is not None and cfg.run.intent is not Intent.warm_start
    return SpikeWatch.from_state(
        cfg.spikes, reader.state.get("spikes") if goes_on and reader is not None else None, skipped
    )


def _tell_spike(run: Run, batches: Batches, attempt: int, verdict: Verdict, at: StepPlace) -> None:
    """Rank 0 notes which documents the step had. Whatever goes wrong is said, and the run goes on."""
    if dist.get_rank() != 0:
        return
    try:
        positions = batches.positions(at.first, at.last)
        documents = documents_of(run.data, positions, packing=run.cfg.data.packing)
        facts = {"lr": at.lr, "attempt": attempt, "documents": documents}
        path = write_spike(run.folder.path, verdict, step=at.step, first=at.first, last=at.last, **facts)
        log.info("what step %d had in it: %s", at.step, path)
    except (LLMTrainError, OSError) as error:
        log.warning("whose documents step %d had cannot be said: %s", at.step, error)


def _roll_back(run: Run, loop: Loop, memory: MemoryTier | None, wish: RollBackError, *, attempt: int) -> None:
    """Have `loop` stand where it stood before what spiked, and pass over that from now on."""
    keep(loop.capsules, loop.recorder, "spike", wish)
    loop.heartbeat.mark("start_up")
    loop.saver.finish()
    if memory is not None:
        memory.forget()
    reader, windows = _go_back(run, wish, attempt=attempt)
    passed_over = PassedOver.of_windows(windows)
    progress = loop.progress
    vars(progress).update(vars(_load(run.cfg, run.engine, reader, run.data)))
    progress.on_disk = progress.step
    loop.batches.pass_over(passed_over)
    loop.watch = _watch(run.cfg, reader, windows)
    loop.start_up = None
    loop.recorder.event("rolled_back", progress.step, spike_step=wish.step, reason=str(wish))
    if loop.ledger is not None:
        loop.ledger.roll_back(step=progress.step, position=progress.position, skipped=passed_over)


def _go_back(
    run: Run, wish: RollBackError, *, attempt: int
) -> tuple[CheckpointReader | None, list[SkippedWindow]]:
    """Choose the checkpoint to go back to, and have the window noted before anything is undone.

    None: there is none from before the spike, and the run begins with its first weights again.
    """
    verdict = wish.verdict

    def note() -> tuple[str | None, list[SkippedWindow]]:
        path = run.folder.path / SKIPPED_NAME
        window = SkippedWindow(
            first=verdict.skip_first,
            last=verdict.skip_last,
            step=wish.step,
            attempt=attempt,
            reason=verdict.reason,
        )
        windows = [*read_skipped(path), window]
        write_skipped(path, windows)
        folder = run.folder.checkpoints
        saved = {step: checkpoint_path(folder, step) for step in list_checkpoints(folder)}
        before = [
            step
            for step, held in saved.items()
            if step < wish.step and _ends_before(held, verdict.skip_first)
        ]
        chosen = before[-run.cfg.spikes.rollback_checkpoints :][:1]
        for step, held in saved.items():  # of what is undone, or a restart would go on from there
            if not chosen or step > chosen[0]:
                remove(held)
        return (str(saved[chosen[0]]) if chosen else None), windows

    chosen, windows = _from_rank_0(note)
    return _first_or(run, chosen), windows


def _ends_before(checkpoint: Place, position: int) -> bool:
    """Whether it was saved before the row at `position` was taken; one that cannot be read is passed over."""
    try:
        return bool(CheckpointReader(checkpoint).state["position"] <= position)
    except CheckpointError as error:
        log.warning("not going back to a damaged checkpoint: %s", error)
        return False


def _first_or(run: Run, chosen: str | None) -> CheckpointReader | None:
    if chosen is not None:
        return _open_alike(place_of(chosen))
    if run.cfg.run.intent is not Intent.warm_start:
        return None
    assert run.cfg.run.init_from is not None, "checked by RunConfig"
    first = _from_rank_0(partial(checkpoint_to_start_from, run.cfg.run, run.folder))
    return None if first is None else _open_alike(first)


def _check_alike(cfg: TrainRoot, facts: dict[str, Any], reader: CheckpointReader | None) -> None:
    """At train.determinism=bitwise: that all ranks, and the checkpoint, are of machines that are alike."""
    everyones = cast(list[dict[str, Any]], _gather(facts))
    before = None
    if reader is not None and cfg.run.intent is not Intent.warm_start:
        before = reader.state.get("determinism")
    _from_rank_0(lambda: determinism.refuse_unlike(cfg.train.determinism, everyones, before))


def _say_stopped(recorder: Recorder, progress: Progress, reason: str) -> None:
    """Before the first step is done, where nothing is to be saved."""
    recorder.event("stopped", progress.step, signal=reason)


def _decide(cfg: TrainRoot, folder: RunFolder, stack: ExitStack, *, world_size: int, device: str) -> Start:
    """Rank 0's part: check everything, take the folder, and choose the checkpoint."""
    if folder.metrics.exists() and cfg.run.intent in (Intent.resume, Intent.fresh_or_resume):
        check_retries(read_lines(folder.metrics), max_same_failures=cfg.run.max_same_failures)
    before = check_train(cfg, world_size=world_size, device=device)
    before.raise_if_any()  # before the lock creates the folder
    stack.enter_context(FolderLock(folder.path))
    if cfg.save.folder is not None and isinstance(folder.checkpoints, Path):
        stack.enter_context(FolderLock(folder.checkpoints))
    found = check_train(cfg, world_size=world_size, device=device)
    found.raise_if_any()
    for fact in found.facts:
        log.info("%s", fact)
    for warning in found.warnings:
        log.warning("%s", warning)
    prepare(folder.ranks, world_size=world_size)
    return Start(
        attempt=next_attempt(folder.metrics),
        token=secrets.token_hex(8),
        checkpoint=None if found.checkpoint is None else str(found.checkpoint),
        data_hash=found.data_hash,
        accepted_change=found.accepted_change,
        skipped=read_skipped(folder.path / SKIPPED_NAME),
        changed=found.changed,
    )


def _verify_share(cfg: TrainRoot, data: OpenData, *, rank: int, world_size: int) -> None:
    """Compare the contents of this rank's share of the shards with their hashes: all ranks read at once."""
    if cfg.data.verify is Verify.start:
        for name, manifest in data.manifests.items():
            share = replace(
                manifest,
                shards=manifest.table[rank::world_size],
                packs=manifest.packs if rank == 0 else [],
            )
            verify(data.folders[name], share, content=True)


def _open_memory(cfg: TrainRoot, folder: RunFolder) -> MemoryTier | None:
    """Where snapshots lie, if they are asked for."""
    if not cfg.save.memory_every_steps:
        return None
    own = _together(lambda: folder_in(Path(cfg.save.memory_folder), folder.path))
    return MemoryTier(own, rank=dist.get_rank(), gather=_gather)


def _has_room(cfg: TrainRoot, memory: MemoryTier) -> bool:
    lacking = memory.lacks_room(num_params(cfg.model) * CHECKPOINT_BYTES_PER_PARAM)
    if lacking and dist.get_rank() == 0:
        log.warning("no snapshots in memory: %s; make room, or set save.memory_folder", lacking)
    return lacking is None


def _newer_in_memory(
    cfg: TrainRoot,
    folder: RunFolder,
    memory: MemoryTier,
    reader: CheckpointReader | None,
    start: Start,
    serving: ExitStack,
) -> CheckpointReader | None:
    """The snapshot in memory, where it is newer than the checkpoint `reader` and of the attempt before."""
    goes_on = cfg.run.intent in (Intent.resume, Intent.fresh_or_resume)
    after = sys.maxsize if not goes_on else 0 if reader is None else reader.step

    def is_ours(snapshot: CheckpointReader) -> bool:
        try:
            last = files.read_json(folder.facts)["attempts"][-1]
        except (OSError, ValueError, KeyError, IndexError):
            last = {}
        is_left = snapshot.state["attempt_id"] == last.get("id")
        if not is_left and snapshot.manifest_hash != last.get("from_manifest_sha256"):
            log.warning("not using %s: not the last attempt of %s left it", snapshot.path, folder.path)
            return False
        changed = compare(cfg, step=snapshot.step, state=snapshot.state, data_hash=start.data_hash)
        if problems := sentences(changed, Change.forbidden):
            raise ConfigError(
                f"the snapshot in memory, {snapshot.path}, is newer than the disk, "
                f"and {'; '.join(problems)}: set them back, or rm -r {memory.folder} to go on without it"
            )
        for text in sentences(changed, Change.trajectory):
            log.warning("the snapshot in memory: %s", text)
        return True

    try:
        snapshot = memory.newest(after=after, is_ours=is_ours, stack=serving)
    except ConfigError:  # every rank has it
        if dist.get_rank() != 0:
            sys.exit(EXIT_FAILED)  # rank 0 says why
        raise
    if snapshot is None:
        return reader
    if dist.get_rank() == 0:
        log.info("going on from the snapshot in memory, newer than %s", reader.path if reader else "nothing")
    return _together(snapshot.open)


def _load(cfg: TrainRoot, engine: Engine, reader: CheckpointReader | None, data: OpenData) -> Progress:
    """Fill the engine with fresh weights or a checkpoint's, and say where the run stands."""
    if reader is None:
        engine.load(fresh_weights(engine.placement, seed=cfg.run.seed))
        return Progress(step=0, position=0)
    is_resume = cfg.run.intent is not Intent.warm_start
    num_updates = reader.state["num_optimizer_steps"] if is_resume else 0
    kinds = ("weight", *engine.state_kinds) if num_updates else ("weight",)
    for kind in kinds:
        shapes = {
            name: shape
            for name, shape in engine.placement.shapes.items()
            if kind == "weight" or kind in state_kinds(name, cfg.optimizer.kind)
        }
        reader.require(shapes, kinds=[kind])
    source = CountedSource(reader.read_into)
    engine.load(source, num_optimizer_steps=num_updates)
    _check_loaded(reader, source, engine, kinds)
    if not is_resume:
        return Progress(step=0, position=0)
    if engine.loss_scale is not None and reader.state["loss_scale"] is not None:
        engine.loss_scale = reader.state["loss_scale"]
    _check_loss(cfg, engine, data, reader)
    log.info("resumed from %s: step %d, %d rows consumed", reader.path, reader.step, reader.state["position"])
    return Progress(
        step=reader.step,
        position=reader.state["position"],
        targets=reader.state["targets"],
        owes_eval=_owes_eval(cfg, reader),
    )


def _open_whole(cfg: TrainRoot, folder: RunFolder, start: Start) -> CheckpointReader | None:
    """The checkpoint to start from, once every byte of it has been compared with its hash: by all ranks, each
    a share of the files."""
    damaged: dict[Place, str] = {}
    chosen = start.checkpoint
    while chosen is not None:
        reader = _open_alike(place_of(chosen))
        own = _together(partial(_damage, reader, rank=dist.get_rank(), world_size=dist.get_world_size()))
        problems = [problem for of_rank in _gather(own) for problem in cast(list[str], of_rank)]
        if not problems:
            return reader
        damaged[reader.path] = some(problems)
        older = _from_rank_0(partial(checkpoint_to_start_from, cfg.run, folder, damaged=damaged))
        chosen = None if older is None else str(older)
    return None


def _is_trained(cfg: TrainRoot, reader: CheckpointReader) -> bool:
    return bool(reader.state["tokens"] >= cfg.train.total_tokens)


def _owes_eval(cfg: TrainRoot, reader: CheckpointReader) -> bool:
    """Whether an evaluation that is still asked for was not finished there; the last one always is."""
    is_asked_for = cfg.train.eval_every_steps > 0 or _is_trained(cfg, reader)
    return bool(reader.state.get("owes_eval")) and is_asked_for


def _is_over(cfg: TrainRoot, reader: CheckpointReader) -> bool:
    """Whether nothing is left to train or to evaluate; the run's folder stays as it is then."""
    is_over = _is_trained(cfg, reader) and not _owes_eval(cfg, reader)
    if is_over and dist.get_rank() == 0:
        consumed = (reader.state["tokens"], cfg.train.total_tokens)
        log.info("nothing to do: the run has consumed %d of %d tokens", *consumed)
    return is_over


def _damage(reader: CheckpointReader, *, rank: int, world_size: int) -> list[str]:
    num_files = len(reader.files())
    return [problem for at in range(rank, num_files, world_size) for problem in reader.problems_of(at)]


def _open_alike(path: Place) -> CheckpointReader:
    """The checkpoint that every rank sees at `path`, if it is one and the same."""

    def open_it() -> CheckpointReader:
        try:
            return CheckpointReader(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; rank 0 has opened it, so this host ({socket.gethostname()}) sees another folder: "
                "all must see the same run.folder"
            ) from error

    reader = _together(open_it)
    hashes = cast(list[str], _gather(reader.manifest_hash))

    def compare() -> None:
        if others := [f"rank {at}: {found[:12]}" for at, found in enumerate(hashes) if found != hashes[0]]:
            raise CheckpointError(
                f"{path} is not the same on all ranks: rank 0 has a manifest of sha256 {hashes[0][:12]}, "
                f"{some(others)}; all must see the same run.folder"
            )

    _from_rank_0(compare)
    return reader


def _check_loaded(
    reader: CheckpointReader, source: CountedSource, engine: Engine, kinds: Sequence[str]
) -> None:
    """Every element of `kinds` is on the rank that answers for it."""
    pieces = (piece for piece in engine.pieces() if piece.kind in kinds)
    counts = cast(list[dict[str, int]], _gather(_together(lambda: source.count(pieces))))

    def compare() -> None:
        for kind in kinds:
            loaded, there = sum(of_rank.get(kind, 0) for of_rank in counts), reader.num_elements(kind)
            if loaded != there:
                raise CheckpointError(
                    f"{reader.path} has {there} elements of {kind}, and {loaded} were loaded: a fault in "
                    "llmtrain, which stops here rather than train with what was there before"
                )

    _from_rank_0(compare)


def _parent(cfg: TrainRoot, reader: CheckpointReader) -> dict[str, Any]:
    """The checkpoint that this attempt began with, and the settings that differ from its own."""
    return {
        "checkpoint": str(reader.path),
        "step": reader.step,
        "manifest_sha256": reader.manifest_hash,
        "intent": cfg.run.intent.name,
        "changed": differences(reader.state["config"], files.plain(cfg)),
    }


def _check_loss(cfg: TrainRoot, engine: Engine, data: OpenData, reader: CheckpointReader) -> None:
    """Compare the loss of a few held-out rows with what the checkpoint says of them: right weights in the
    wrong places would train on without a word."""
    told = reader.state.get("check_loss")
    if not cfg.save.check_loss or told is None or reader.state["data_hash"] != data.hash:
        return
    *expected, max_rows = told
    sums = held_out_sums(engine, data.held_out, cfg, max_rows=max_rows)
    assert sums is not None, "without a deadline"
    loss_sum, num_valid = sums
    bound = LOSS_TOLERANCE[cfg.train.precision if _precision(reader) == cfg.train.precision.name else None]

    def compare() -> None:
        if num_valid != expected[1] or not math.isclose(loss_sum, expected[0], rel_tol=bound):
            raise CheckpointError(
                f"{reader.path} says that {expected[1]} targets of held-out rows have a loss of "
                f"{expected[0] / max(1, expected[1]):.7g}, and after loading it is "
                f"{loss_sum / max(1, num_valid):.7g} of {num_valid}, further off than {bound:g}: the weights "
                "are not those that were saved; save.check_loss=false goes on all the same"
            )

    _from_rank_0(compare)
    log.info("after loading, the loss of %d held-out targets is what the checkpoint says", num_valid)


def _precision(reader: CheckpointReader) -> str:
    precision: str = reader.state["config"]["train"]["precision"]
    return precision


def _ranks_that_save(cfg: TrainRoot) -> Ranks:
    """Over a group of their own: a thread talks while training does. Every rank calls this."""
    world_size = dist.get_world_size()
    timeout = timedelta(seconds=cfg.train.process_group_timeout_s)
    group = None
    if world_size > 1:
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc="save")
    return Ranks(dist.get_rank(), world_size, partial(_gather, group=group))


def _save(run: Run, start: Start, loop: Loop, *, eval_loss: float | None, in_memory: bool) -> None:
    """Begin a checkpoint of where `loop` stands."""
    cfg, engine, data, progress = run.cfg, run.engine, run.data, loop.progress
    state = _state(cfg, engine, data, start, progress, eval_loss=eval_loss) | run.origin
    state["spikes"] = loop.watch.state()
    if cfg.save.check_loss and not in_memory:
        sums = held_out_sums(engine, data.held_out, cfg, max_rows=CHECK_ROWS)
        assert sums is not None, "without a deadline"
        state["check_loss"] = [*sums, CHECK_ROWS]
        loop.heartbeat.mark("save")
    loop.saver.save(progress.step, engine.pieces(), state, in_memory=in_memory)


def _state(
    cfg: TrainRoot,
    engine: Engine,
    data: OpenData,
    start: Start,
    progress: Progress,
    *,
    eval_loss: float | None,
) -> dict[str, Any]:
    """What a resume needs beside tensors, and what tells a reader how these weights came to be."""
    return {
        "position": progress.position,
        "tokens": progress.position * cfg.data.seq_len,  # of the budget: input positions
        "targets": progress.targets,
        "eval_loss": eval_loss,
        "owes_eval": progress.owes_eval,
        "num_optimizer_steps": engine.num_optimizer_steps,
        "loss_scale": engine.loss_scale,
        "attempt": start.attempt,
        "config": files.plain(cfg),
        "model": files.plain(cfg.model),
        "data_folder": str(next(iter(data.folders.values()))),
        "data_hash": start.data_hash,
        "tokenizer_fingerprint": data.manifest.tokenizer.fingerprint,
        "world_size": dist.get_world_size(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def _together(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank. If it fails on any, every rank leaves, and rank 0 says why."""
    result, failure = None, None
    try:
        result = work()
    except LLMTrainError as error:
        failure = error
    except OSError as error:
        failure = DiskError(f"{error.filename}: {error.strerror}")
    texts = _gather(None if failure is None else str(failure))
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if failures:
        if dist.get_rank() != 0:
            sys.exit(EXIT_FAILED)
        raise failure if failure is not None and len(failures) == 1 else LLMTrainError("; ".join(failures))
    return cast(Result, result)


def _from_rank_0(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 alone and give its result to every rank."""
    told = [_together(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(told, src=0)
    return cast(Result, told[0])


def _gather(value: object, *, group: dist.ProcessGroup | None = None) -> list[object]:
    if dist.get_world_size() == 1:
        return [value]
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
