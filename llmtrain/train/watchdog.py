"""Notices that this rank's main thread stands still, and has all ranks say where they stand, before the
collectives themselves give up.

A thread of every rank watches its own main thread, which may be deep in C++. Who stands still too long, or
meets an error, raises an alarm: a line in `<run>/ranks/alarm`, which every rank reads with each beat. Then
all write their stacks into their beats, and the lowest rank that lives reads all of them, judges
(train/autopsy.py), writes `<run>/hangs/<attempt>-<step>.json` and `.txt`, and tells metrics.jsonl. Then every
rank ends: a launcher starts them again, or another rank's.

What is slow and no hang: the first time of anything, which compiles; starting, saving and leaving, which the
disk may hold up: there a rank that stands still is named and left alone, unless it stands in a collective.
While a whole job is suspended nobody's time runs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from llmtrain import files
from llmtrain.errors import EXIT_FAILED, LLMTrainError
from llmtrain.tracking.beats import (
    Beat,
    process_state,
    read_beats,
    this_machine,
    write_in_place,
)
from llmtrain.tracking.black_box import box_path, with_box
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.train.autopsy import Condition, Verdict, judge
from llmtrain.train.collectives import flight_record
from llmtrain.train.heartbeat import Heartbeat, lines_of, stacks, stuck_path
from llmtrain.units import format_duration

log = logging.getLogger(__name__)

BEATS_A_TIMEOUT = 20
LEAVE_SHARE = 0.7
"""Of the time-out: an autopsy that takes longer, on a disk that does not answer, is given up."""
TIMES_LONGEST = 4
"""A phase may take so many times what it took at most so far, though that is past the time-out."""
PATIENT = ("start_up", "save", "leave")
NUM_PROBES = 8
NUM_CANDIDATES = 8
"""Ranks of which the lowest that lives judges; a rank above them does only if none of them is heard."""
PROBE_S = 1.0
ALARM, VERDICT = "alarm", "verdict"
NOTE_BYTES = 4096
SHOWN_FRAMES = 4


@dataclass(frozen=True)
class HangLimits:
    """How long a main thread may stand still."""

    timeout_s: float
    """In a step."""
    long_s: float
    """In something that is done for the first time, and in a collective while starting, saving or leaving."""

    @property
    def every_s(self) -> float:
        """Between two beats."""
        return min(1.0, self.timeout_s / BEATS_A_TIMEOUT)

    @property
    def settle_s(self) -> float:
        """Between two looks at all beats, of which the second must be another one if a rank lives."""
        return min(4.0, self.timeout_s / 4)


def prepare(folder: Path, *, world_size: int) -> None:
    """On rank 0, before any other looks there: files of earlier launches end here.

    Args:
        folder: `ranks` in the run's folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ALARM, VERDICT):
            write_in_place(folder / name, b"{}", NOTE_BYTES)
        for path in folder.glob("rank-*"):
            if int(path.stem[5:]) >= world_size:
                path.unlink()
                box_path(folder, int(path.stem[5:])).unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "%s: %s; a hang will be harder to explain, and training goes on", error.filename, error.strerror
        )


class Watchdog:
    """A context of the main thread, inside that of its heartbeat."""

    def __init__(
        self, heartbeat: Heartbeat, limits: HangLimits, *, run_folder: Path, metrics: Path, backend: str
    ) -> None:
        """
        Args:
            backend: nccl or gloo.
        """
        self.heartbeat, self.limits = heartbeat, limits
        self.folder, self.hangs, self.metrics = heartbeat.folder, run_folder / "hangs", metrics
        self.backend = backend
        self.on_verdict: Callable[[str], None] = lambda sentence: None
        """Called on the rank that judged, when all know."""
        self._links = links_up()
        self._listener = _listen()
        if self._listener is not None:
            heartbeat.address = self._listener.getsockname()[:2]
        self._is_over = threading.Event()
        self._has_begun = threading.Lock()
        """Held by the thread that leads this rank through its only autopsy."""
        self._heard: dict[str, Any] = {}
        self._warned_at = 0.0
        self._is_explained = False

    def __enter__(self) -> Self:
        if self.heartbeat.world_size > 1:
            self.heartbeat.on_beat = self._listen_for_alarm
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            self.explain(error)
        self._is_over.set()
        if self._listener is not None:
            self._listener.close()

    # -- the alarm

    def _watch(self) -> None:
        tick_s = self.limits.every_s
        still_s, marks, last = 0.0, -1, time.monotonic()
        while not self._is_over.wait(tick_s):
            now = time.monotonic()
            passed_s, last = min(now - last, 2 * tick_s), now  # no more where this process was stopped
            if self._is_explained:
                continue  # the main thread leaves with an error of its own
            if self._heard:
                self._end(str(self._heard["cause"]))
            if self.heartbeat.num_marks != marks:
                marks, still_s, self._warned_at = self.heartbeat.num_marks, 0.0, 0.0
                continue
            still_s += passed_s
            limit_s = self.limit_s()
            if still_s > limit_s:
                cause = (
                    f"rank {self.heartbeat.rank} has stood still for {still_s:.1f} s, at "
                    f"{self.heartbeat.beat().at}"
                )
                self._end(cause)
            elif still_s > max(self.limits.timeout_s, 2 * self._warned_at):
                self._warned_at = still_s
                log.warning(
                    "rank %d has been at %s for %s, %s",
                    *(self.heartbeat.rank, self.heartbeat.beat().at, format_duration(still_s)),
                    "; ".join(self._own_stack()),
                )

    def limit_s(self) -> float:
        """How long the main thread may stand still where it is now."""
        phase = self.heartbeat.phase
        if phase in PATIENT:
            waits = self.heartbeat.collectives.waiting() is not None
            return self.limits.long_s if waits else float("inf")
        longest_s = self.heartbeat.longest_s(phase)
        if longest_s is None:
            return self.limits.long_s
        usual_s = max(self.limits.timeout_s, TIMES_LONGEST * longest_s)
        return usual_s if self.heartbeat.world_size == 1 else min(usual_s, self.limits.long_s)

    def _listen_for_alarm(self) -> None:
        note = self._read_note(ALARM)
        if note:
            self._heard = note

    def explain(self, error: Exception) -> None:
        """Say how this rank ends. Does not return where another may be the cause: the run ends here."""
        own = not self.heartbeat.collectives.is_cause_of(error)
        if self._is_explained or (own and isinstance(error, LLMTrainError)):
            return  # every rank has it
        self._is_explained = True
        told = f"{type(error).__name__}: {error}"
        stack = lines_of(traceback.extract_tb(error.__traceback__))
        self.heartbeat.note_end("error" if own else "collective", told, stack)
        if self.heartbeat.world_size == 1:
            return
        cause = f"rank {self.heartbeat.rank} has met an error: {told}"
        if not own:
            self._end(cause)
            return
        with suppress(OSError):  # then the others find out by themselves
            self._write_note(ALARM, cause=cause)
        # Its own output says why it ends. Should it not get there, as in NCCL's last rites:
        _exit_after(self.limits.timeout_s)

    # -- the autopsy

    def _end(self, cause: str) -> None:
        """Explain, and end this process. Whoever comes second waits for the end here."""
        self._has_begun.acquire()
        _exit_after(self.limits.timeout_s)  # a pipe that nobody reads may hold the log up
        work = threading.Thread(target=self._explain_all, args=(cause,), name="autopsy", daemon=True)
        work.start()
        work.join(LEAVE_SHARE * self.limits.timeout_s)
        if work.is_alive():
            log.error(
                "rank %d: the autopsy takes too long, is the file system of %s there? %s; rank %d ends",
                *(self.heartbeat.rank, self.folder, cause, self.heartbeat.rank),
            )
        dump = threading.Thread(target=self._dump_flight_record, name="flight record", daemon=True)
        dump.start()  # torch may have to import a great deal for it
        dump.join(self.limits.settle_s)
        self.heartbeat.box.remove()
        logging.shutdown()
        os._exit(EXIT_FAILED)

    def _explain_all(self, cause: str) -> None:
        me = self.heartbeat
        if me.beat().end is None:
            log.error("%s; its main thread: %s", cause, "; ".join(self._own_stack()))
        else:
            log.error("%s", cause)
        try:
            me.say_all(links_down=sorted(self._links - links_up()))
            if not me.is_heard:
                log.error("rank %d cannot explain it: %s cannot be written", me.rank, self.folder)
                return
            if note := self._read_note(ALARM):
                cause = str(note["cause"])  # of who was first
            elif me.world_size > 1:
                self._write_note(ALARM, cause=cause)
            everyone = range(me.world_size)
            mine, lower = me.beat(), range(min(me.rank, NUM_CANDIDATES))
            # A thousand ranks that all read all beats would be too much for a file system.
            looked_at = everyone if me.rank == 0 else {*lower, *probed_ranks(mine)}
            before = self._look(looked_at)
            begin = time.monotonic()
            me.say_all(reached=probe(mine, before))
            time.sleep(max(0.0, self.limits.settle_s - (time.monotonic() - begin)))
            if me.rank != 0:
                if self._is_any_alive(before, self._look(lower)) and self._wait_for_verdict():
                    return
                before = self._look(everyone)
                time.sleep(self.limits.settle_s)
            after = self._look(everyone)
            after[me.rank] = me.beat()
            conditions = {rank: condition_of(rank, before, after, me.rank) for rank in everyone}
            after |= {
                rank: with_box(beat, self.folder)
                for rank, beat in after.items()
                if conditions[rank] is not Condition.alive and beat.machine == this_machine()
            }
            self._pronounce(
                judge(after, conditions, world_size=me.world_size, cause=cause), after, conditions
            )
        except OSError as error:
            log.error("rank %d cannot explain it: %s: %s", me.rank, error.filename, error.strerror)

    def _look(self, ranks: Collection[int]) -> dict[int, Beat]:
        return read_beats(self.folder, ranks, token=self.heartbeat.token)

    def _is_any_alive(self, before: Mapping[int, Beat], after: Mapping[int, Beat]) -> bool:
        """Whether one of the ranks below, which would judge, lives."""
        return any(
            condition_of(rank, before, after, self.heartbeat.rank) is Condition.alive
            and beat.end in (None, "collective")
            for rank, beat in after.items()
        )

    def _pronounce(
        self, verdict: Verdict, beats: Mapping[int, Beat], conditions: Mapping[int, Condition]
    ) -> None:
        name = f"{verdict.attempt}-{verdict.step}"
        text = verdict.text() + self._stuck_stacks(conditions)
        log.error("%s", text.rstrip())
        files.write_json(self.hangs / f"{name}.json", verdict.as_json())
        with files.atomic_write(self.hangs / f"{name}.txt", "w") as handle:
            handle.write(text)
        if self.metrics.exists():
            with MetricsFile(self.metrics, attempt=verdict.attempt) as metrics:
                metrics.write(
                    "event",
                    verdict.step,
                    what="hang",
                    error=verdict.sentence,
                    ranks=[odd.rank for odd in verdict.odd],
                    hosts=sorted({odd.host for odd in verdict.odd if odd.host}),
                    file=str(self.hangs / f"{name}.txt"),
                )
        for rank, beat in beats.items():
            if beat.machine == this_machine() and conditions[rank] is not Condition.alive:
                box_path(self.folder, rank).unlink(missing_ok=True)
        dead_hands = [
            [beat.machine, beat.pid, beat.born]
            for rank, beat in beats.items()
            if conditions[rank] in (Condition.stopped, Condition.stuck, Condition.in_kernel)
        ]
        if self.heartbeat.world_size > 1:
            self._write_note(VERDICT, sentence=verdict.sentence, kill=dead_hands)
        kill_here(dead_hands)
        self.on_verdict(verdict.sentence)

    def _wait_for_verdict(self) -> bool:
        """Whether another rank has judged in time."""
        limit = time.monotonic() + 2 * self.limits.settle_s
        while time.monotonic() < limit:
            if verdict := self._read_note(VERDICT):
                log.error("%s; rank %d ends", verdict["sentence"], self.heartbeat.rank)
                kill_here(verdict["kill"])
                return True
            time.sleep(self.limits.every_s / 2)
        return False

    def _dump_flight_record(self) -> None:
        try:
            content = flight_record(self.backend)
            if content is not None:
                folder = self.hangs / f"flight-{self.heartbeat.attempt}"
                with files.atomic_write(folder / f"rank_{self.heartbeat.rank}") as handle:
                    handle.write(content)
        except (RuntimeError, OSError) as error:
            log.error("rank %d: no record of the Flight Recorder: %s", self.heartbeat.rank, error)

    def _stuck_stacks(self, conditions: Mapping[int, Condition]) -> str:
        told = []
        for rank, condition in conditions.items():
            path = stuck_path(self.folder, rank)
            if condition is Condition.stuck and path.exists() and (text := path.read_text().strip()):
                told.append(f"\nrank {rank}, by a thread that needs no interpreter:\n{text}\n")
        return "".join(told)

    def _own_stack(self) -> list[str]:
        return stacks(self.heartbeat.main)[0][1][:-SHOWN_FRAMES:-1]

    # -- notes that all read

    def _write_note(self, name: str, **content: object) -> None:
        note = json.dumps({"token": self.heartbeat.token, **content}).encode()
        write_in_place(self.folder / name, note, NOTE_BYTES)

    def _read_note(self, name: str) -> dict[str, Any]:
        """Of this launch; empty if there is none, or it is being written."""
        try:
            note: dict[str, Any] = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return note if note.get("token") == self.heartbeat.token else {}


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (EXIT_FAILED,))
    timer.daemon = True
    timer.start()


def condition_of(rank: int, before: Mapping[int, Beat], after: Mapping[int, Beat], me: int) -> Condition:
    """What became of a rank between two looks at its beat."""
    if rank not in after:
        return Condition.absent
    beat = after[rank]
    if rank == me or rank not in before or beat.alive > before[rank].alive:
        return Condition.alive
    if beat.machine != this_machine():
        return Condition.unheard
    state = process_state(beat.pid)
    if state is None or state[1] != beat.born or state[0] in "ZX":
        return Condition.gone
    return {"T": Condition.stopped, "t": Condition.stopped, "D": Condition.in_kernel}.get(
        state[0], Condition.stuck
    )


def kill_here(processes: list[list[Any]]) -> None:
    """End those of this machine that nobody else will: they are stopped or stuck, and hold memory, GPUs and
    ports.

    Args:
        processes: machine, process id and start of each, as in a beat.
    """
    for machine, pid, born in processes:
        state = process_state(pid) if machine == this_machine() and pid != os.getpid() else None
        if state is not None and state[1] == born:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def links_up() -> set[str]:
    """Network interfaces that have a carrier now."""
    return {name for name, link in psutil.net_if_stats().items() if link.isup}


def _listen() -> socket.socket | None:
    """A port where a connection shows that this host is reached; nobody needs to answer it."""
    master = os.environ.get("MASTER_ADDR")
    if master is None:
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((master, 9))  # sends nothing
            here = route.getsockname()[0]
        listener = socket.socket()
        listener.bind((here, 0))
        listener.listen(NUM_PROBES)
    except OSError:
        return None
    return listener


def probe(mine: Beat, beats: Mapping[int, Beat]) -> dict[str, bool]:
    """Whether other hosts can be reached from here: those of ranks that are missed, of rank 0, and of the
    next ones."""
    targets: dict[str, tuple[int, tuple[str, int]]] = {}
    for rank in probed_ranks(mine):
        address = beats[rank].address if rank in beats else None
        if address is not None and mine.address is not None and address[0] != mine.address[0]:
            targets.setdefault(address[0], (rank, address))
        if len(targets) == NUM_PROBES:
            break
    if not targets:
        return {}
    with ThreadPoolExecutor(len(targets)) as pool:
        reached = pool.map(lambda target: _reaches(target[1]), targets.values())
    return {str(rank): found for (rank, _), found in zip(targets.values(), reached, strict=True)}


def probed_ranks(mine: Beat) -> list[int]:
    """Ranks whose hosts are asked for, the most telling first."""
    group = None if mine.waiting is None else mine.groups.get(mine.waiting.group)
    missed = [] if group is None else list(group.ranks or ())[:NUM_PROBES]
    stride = max(1, mine.world_size // NUM_PROBES)
    around = [(mine.rank + each) % mine.world_size for each in range(1, mine.world_size, stride)]
    nearest = [(mine.rank + each) % mine.world_size for each in range(1, min(mine.world_size, NUM_PROBES))]
    return list(dict.fromkeys([*missed, 0, *nearest, *around]))


def _reaches(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=PROBE_S).close()
    except OSError:
        return False
    return True
