"""This rank's heart: what its main thread is at, told once a second in `<run>/ranks/rank-00003.beat`.

A mark changes memory of this process alone, so that no disk can hold training up; a thread writes. What a
file says of a process that was killed is therefore up to a second old.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import IO, Literal, Protocol, Self

from llmtrain.tracking.beats import Beat, beat_path, own_start, this_machine, write_beat
from llmtrain.tracking.black_box import KEPT, BlackBox
from llmtrain.train import collectives
from llmtrain.train.collectives import Collectives

log = logging.getLogger(__name__)

Phase = Literal[
    "start_up", "data", "agree", "forward", "backward", "exchange", "update", "record", "evaluate", "save",
    "leave",
]  # fmt: skip
"""agree: ranks tell each other small things. exchange: between pipeline stages. record: what rank 0 notes."""
STEP_PHASES = ("data", "agree", "forward", "backward", "exchange", "update", "record")
MAIN_FRAMES = 60
OTHER_FRAMES = 12
"""Of a stack, the innermost."""


class Mark(Protocol):
    """Says what the main thread begins."""

    def __call__(self, phase: Phase, *, micro_step: int = 0) -> None: ...


def no_mark(phase: Phase, *, micro_step: int = 0) -> None:
    """For an engine that nobody watches."""


class Heartbeat:
    """Made on the main thread. A context: it beats inside."""

    def __init__(
        self,
        folder: Path,
        *,
        token: str,
        attempt: int,
        rank: int,
        world_size: int,
        is_exact: bool = True,
        every_s: float = 1.0,
        stuck_s: float | None = None,
    ) -> None:
        """
        Args:
            folder: `ranks` in the run's folder.
            token: of this launch, the same on all ranks.
            is_exact: whether the main thread does the work: false on GPUs.
            stuck_s: after so long without a beat, Python's stacks are written to `rank-00003.stuck` by a
                thread that needs no interpreter; None: never. A process has one such thread.
        """
        self.folder = folder
        self.token, self.attempt = token, attempt
        self.rank, self.world_size = rank, world_size
        self.work = ""
        self.address: tuple[str, int] | None = None
        self.on_beat: Callable[[], None] = lambda: None
        """Called by the thread that writes, after it has."""
        self._host, self._pid, self._born = socket.gethostname(), os.getpid(), own_start()
        self.box = BlackBox(folder, rank, pid=self._pid, born=self._born)
        self.collectives = Collectives(self._place, self.box)
        self.every_s = every_s
        self._stuck_s, self._stuck_file = stuck_s, self._open_stuck(stuck_s)
        self._is_exact = is_exact
        self.main = threading.get_ident()
        # What the other threads read together is replaced together.
        self._at: tuple[Phase, int, int, int] = ("start_up", 0, 0, monotonic_ns())
        self._rows = (0, 0)
        self.num_marks = 0
        self._waited_before = 0
        self._spent_ns: dict[str, int] = {}
        self._waited_ns: dict[str, int] = {}
        self._longest_ns: dict[str, int] = {}
        self._num_steps = 0
        self._whole: tuple[int, dict[str, int], dict[str, int]] = 0, {}, {}
        """Steps done, and what they took."""
        self._alive = 0
        self._end: str | None = None
        self._error: str | None = None
        self._last_words: dict[str, object] = {}
        self._is_over = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_broken = False

    # -- what the main thread says

    def begin_step(self, step: int, *, position: int, num_rows: int) -> None:
        """
        Args:
            step: from 1.
            position: its first row.
        """
        self._rows = position, num_rows
        self.box.note_rows(position, num_rows)
        self._go_to("data", step, 0)
        self._num_steps += 1
        self._whole = self._num_steps - 1, dict(self._spent_ns), dict(self._waited_ns)

    def mark(self, phase: Phase, *, micro_step: int = 0) -> None:
        """Say what begins, in the step that is under way."""
        self._go_to(phase, self._at[1], micro_step)

    def _go_to(self, phase: Phase, step: int, micro_step: int) -> None:
        now = monotonic_ns()
        before, _, _, since = self._at
        waited = self.collectives.waited_ns
        inside = waited - self._waited_before
        self._waited_before = waited
        if before in self._spent_ns:  # the first time it compiles
            self._longest_ns[before] = max(self._longest_ns.get(before, 0), now - since)
        self._spent_ns[before] = self._spent_ns.get(before, 0) + now - since - inside
        self._waited_ns[before] = self._waited_ns.get(before, 0) + inside
        self._at = phase, step, micro_step, now
        self.box.note_place(step, micro_step, phase, now)
        self.num_marks += 1

    def _place(self) -> tuple[int, int, str]:
        phase, step, micro_step, _ = self._at
        return step, micro_step, phase

    def note_end(
        self,
        how: Literal["well", "error", "collective"],
        error: str | None = None,
        stack: Sequence[str] | None = None,
    ) -> None:
        """Write at once how this rank ends. The first word holds.

        Args:
            stack: of the error, the innermost line last.
        """
        if self._end is None:
            self._end, self._error = how, error
            if stack is not None:
                self._last_words["stacks"] = [("main thread", list(stack))]
            self.write()

    # -- what is told

    @property
    def phase(self) -> Phase:
        return self._at[0]

    def longest_s(self, phase: Phase) -> float | None:
        """The longest time between two marks in `phase`, but for its first one; None before that is over."""
        return self._longest_ns.get(phase, 0) * 1e-9 if phase in self._spent_ns else None

    def beat(self) -> Beat:
        phase, step, micro_step, since = self._at
        found = self.collectives.waiting()
        tells_all = bool(self._last_words)
        num_steps, spent_ns, waited_ns = self._whole
        beat = Beat(
            token=self.token,
            attempt=self.attempt,
            rank=self.rank,
            world_size=self.world_size,
            host=self._host,
            machine=this_machine(),
            pid=self._pid,
            born=self._born,
            work=self.work,
            alive=self._alive,
            every_s=self.every_s,
            step=step,
            micro_step=micro_step,
            phase=phase,
            age_s=(monotonic_ns() - since) * 1e-9,
            num_marks=self.num_marks,
            position=self._rows[0],
            num_rows=self._rows[1],
            num_collectives=self.collectives.count,
            waiting=None if found is None else found[0],
            waiting_s=0.0 if found is None else found[1],
            seconds={phase: round(spent * 1e-9, 6) for phase, spent in spent_ns.items()},
            waited={phase: round(spent * 1e-9, 6) for phase, spent in waited_ns.items()},
            num_steps=num_steps,
            is_exact=self._is_exact,
            groups=self.collectives.groups(with_ranks=tells_all),
            last=self.collectives.last(KEPT) if tells_all else self.collectives.last(),
            end=self._end,
            error=self._error,
            address=self.address,
        )
        vars(beat).update(self._last_words)
        return beat

    def say_all(self, **more: object) -> None:
        """From now on tell stacks and the members of groups, too, and `more`: fields of Beat."""
        if self._end is None:
            self._last_words["stacks"] = stacks(self.main)
        self._last_words |= more
        self.write()

    @property
    def is_heard(self) -> bool:
        """Whether what it tells is written."""
        return not self._is_broken

    def write(self) -> None:
        """Tell it now. A folder that cannot be written is said once, and training goes on."""
        with self._writing:
            self._alive += 1
            try:
                write_beat(beat_path(self.folder, self.rank), self.beat())
                self._is_broken = False
            except OSError as error:
                if not self._is_broken:
                    log.warning(
                        "rank %d cannot tell what it is at, %s: %s; a hang will be harder to explain, and "
                        "training goes on",
                        *(self.rank, error.filename, error.strerror),
                    )
                self._is_broken = True

    # -- its life

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):  # writing says so
            self.folder.mkdir(parents=True, exist_ok=True)
        self.collectives.install()
        self.write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.note_end("well")
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(timeout=self.every_s)
        if self._stuck_file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stuck_file.close()
        self.collectives.remove()
        self.box.remove()

    def _run(self) -> None:
        while not self._is_over.wait(self.every_s):
            if self._stuck_file is not None and self._stuck_s is not None:
                faulthandler.dump_traceback_later(self._stuck_s, file=self._stuck_file)
            self.write()
            self.on_beat()

    def _open_stuck(self, stuck_s: float | None) -> IO[str] | None:
        if stuck_s is None:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(stuck_path(self.folder, self.rank), "w", encoding="utf-8")
        except OSError:
            return None


def stuck_path(folder: Path, rank: int) -> Path:
    return beat_path(folder, rank).with_suffix(".stuck")


def stacks(main: int) -> list[tuple[str, list[str]]]:
    """(thread, its lines, the innermost last) of every Python thread of this process; the one with ident
    `main` first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda each: each[0] != main):
        if ident == threading.get_ident():
            continue
        most = MAIN_FRAMES if ident == main else OTHER_FRAMES
        name = "main thread" if ident == main else names.get(ident, f"thread {ident}")
        found.append((name, lines_of(traceback.extract_stack(frame))[-most:]))
    return found


def lines_of(stack: traceback.StackSummary) -> list[str]:
    """One for each frame, but for those that only listen."""
    return [
        f"{where.filename}:{where.lineno} in {where.name}: {where.line}"
        for where in stack
        if where.filename != collectives.__file__
    ]
