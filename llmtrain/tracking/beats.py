"""Beats: what each rank of a run says about itself once a second, one small file a rank.

`<run>/ranks/rank-00003.beat` is one JSON object, filled up with spaces to whole blocks and written in place,
so that a reader on another machine, who opens it anew each time, sees the newest one: a shared file system
may remember for half a minute under which name which file lies, but not what an open one holds. A reader that
meets a writer finds a torn object, and reads again. Clocks of machines are never compared: ages are counted
by the clock of the rank itself.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.units import format_duration

BLOCK_BYTES = 16384
"""More than a beat with its last collectives is; stacks are appended once, when something is wrong."""
TORN_S = 0.05
"""Between two tries to read a file that is being written."""
NAME = re.compile(r"rank-(\d+)\.beat")
RANKS_NAME = "ranks"
"""The folder of a run in which they are."""
LIVES_S = 60.0
"""A process that wrote so lately lives: it writes every second, and a shared file system may be late."""


class Collective(NamedTuple):
    """One call of a collective, or of a send or a receive."""

    number: int
    """Among all of this rank's, from 1."""
    group: str
    """Its group's name, which is the same on all of its ranks."""
    in_group: int
    """Among this rank's in that group, from 1. A send or a receive does not count: it has the number before
    it."""
    kind: str
    elements: int
    """That this rank brought."""
    peer: int | None
    """Global rank at the other end, of a send or a receive."""
    step: int
    micro_step: int
    phase: str
    state: str
    """waits, issued (it goes on without this rank waiting for it), returned or failed."""

    @property
    def is_between_two(self) -> bool:
        return self.peer is not None

    @property
    def signature(self) -> tuple[str, int | None]:
        """What must be equal on all ranks of the group, as must be the step."""
        return self.kind, self.elements if self.kind in EQUAL_ON_ALL else None


EQUAL_ON_ALL = {"all_reduce", "reduce", "broadcast", "all_gather_single", "reduce_scatter_single"}
"""Kinds of which each rank brings as many elements."""


class Group(NamedTuple):
    """A group of ranks, as one of them sees it."""

    size: int
    num_issued: int
    """Collectives, by this rank."""
    label: str
    """tp, pp, ...; else its name."""
    ranks: list[int] | None = None
    """Global ranks; written when something is wrong."""


@dataclass
class Beat:
    """A rank at the moment of writing."""

    token: str
    """Of this launch: files of others are not read."""
    attempt: int
    rank: int
    world_size: int
    host: str
    machine: str
    """Equal where process ids mean the same: a boot of a machine and its space of process ids."""
    pid: int
    born: int
    """Start of the process in clock ticks since boot: another process may get the same pid."""
    work: str
    """Ranks of the same work take the same time: the pipeline stage."""
    alive: int
    """Goes up by one with each writing."""
    every_s: float
    """Seconds between two."""
    step: int
    """Under way, from 1; 0: before the first."""
    micro_step: int
    """From 1; 0: outside of micro batches."""
    phase: str
    age_s: float
    """Since the phase began, or since its last mark."""
    num_marks: int
    position: int
    """Row at which the step begins."""
    num_rows: int
    """Of the step, over all ranks."""
    num_collectives: int
    waiting: Collective | None
    """The collective that the main thread is inside of, or None."""
    waiting_s: float
    num_steps: int
    """Done since the start of this process."""
    seconds: dict[str, float]
    """By phase, until the last of these was done, outside of collectives."""
    waited: dict[str, float]
    """The same, inside of them."""
    is_exact: bool
    """Whether `seconds` are those of the work: on a GPU the host only launches it."""
    groups: dict[str, Group]
    last: list[Collective]
    """The newest collectives of the main thread, the oldest first."""
    end: str | None = None
    """well, error, or collective: an error that came out of one, so others may be its cause."""
    error: str | None = None
    stacks: list[tuple[str, list[str]]] = field(default_factory=list)
    """(thread, its lines), the main thread first; written when something is wrong."""
    links_down: list[str] = field(default_factory=list)
    """Network interfaces that had a carrier at the start, and have none then."""
    address: tuple[str, int] | None = None
    """Where a connection shows that this host can be reached."""
    reached: dict[str, bool] = field(default_factory=dict)
    """Rank -> whether it could be reached, then."""

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def at(self) -> str:
        """'step 7, micro-step 2, backward'."""
        micro = f", micro-step {self.micro_step}" if self.micro_step else ""
        return f"step {self.step}{micro}, {self.phase}"


def beat_path(folder: Path, rank: int) -> Path:
    """
    Args:
        folder: `ranks` in the run's folder.
    """
    return folder / f"rank-{rank:05d}.beat"


def write_beat(path: Path, beat: Beat) -> None:
    """In place, and closed, which sends it to a shared file system.

    Raises:
        OSError: it cannot be written.
    """
    write_in_place(path, json.dumps(vars(beat), separators=(",", ":")).encode(), BLOCK_BYTES)


def write_in_place(path: Path, content: bytes, block_bytes: int) -> None:
    """With spaces up to whole blocks, and to the end of what was there before.

    Raises:
        OSError: it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        num_blocks = -(-len(content) // block_bytes)
        os.pwrite(fd, content.ljust(max(num_blocks * block_bytes, os.fstat(fd).st_size)), 0)
    finally:
        os.close(fd)


def read_beat(path: Path, *, token: str | None = None, tries: int = 3) -> Beat | None:
    """The beat in `path`; None if there is none, it is of another launch than `token`, or it is no beat."""
    for attempt in range(tries):
        if attempt:
            time.sleep(TORN_S)
        try:
            told = json.loads(path.read_bytes())
            if token is not None and told["token"] != token:
                return None
            return _beat_of(told)
        except OSError:
            return None
        except (ValueError, KeyError, TypeError):
            continue
    return None


def read_beats(folder: Path, ranks: Iterable[int], *, token: str) -> dict[int, Beat]:
    """Those of this launch that are there."""
    found = {rank: read_beat(beat_path(folder, rank), token=token) for rank in ranks}
    return {rank: beat for rank, beat in found.items() if beat is not None}


@dataclass(frozen=True)
class Pulse:
    """Rank 0 of a run, as its file has it."""

    age_s: float
    """Seconds since it was written, by the clock of the file system."""
    at: str
    """Where the rank was then."""
    for_s: float
    """How long it had been there."""

    @property
    def words(self) -> str:
        if self.age_s > LIVES_S:
            return f"rank 0 wrote last {format_duration(self.age_s)} ago, at {self.at}"
        return f"rank 0 lives, at {self.at}, for {format_duration(self.for_s + self.age_s)}"


def pulse_of(run: Path, *, attempt: int, now: float) -> Pulse | None:
    """None where that attempt's rank 0 has written nothing, or has left."""
    path = beat_path(run / RANKS_NAME, 0)
    beat = read_beat(path)
    if beat is None or beat.attempt != attempt or beat.end is not None:
        return None
    try:
        age_s = max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None
    return Pulse(age_s, beat.at, beat.age_s)


def _beat_of(told: dict[str, Any]) -> Beat:
    known = {each.name for each in fields(Beat)}
    values = {name: value for name, value in told.items() if name in known}
    values["groups"] = {name: Group(*group) for name, group in values["groups"].items()}
    values["last"] = [Collective(*each) for each in values["last"]]
    values["waiting"] = values["waiting"] and Collective(*values["waiting"])
    values["stacks"] = [(name, list(lines)) for name, lines in values["stacks"]]
    values["address"] = values["address"] and (values["address"][0], int(values["address"][1]))
    return Beat(**values)


@cache
def this_machine() -> str:
    """See `Beat.machine`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: a host's name is all there is
        return socket.gethostname()


def process_state(pid: int) -> tuple[str, int] | None:
    """(state, start) of a process of this machine, as proc(5) has them: R, S, D (in the kernel), T (stopped),
    Z (dead), and ticks since boot. None: there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    after_name = text.rpartition(")")[2].split()
    return after_name[0], int(after_name[19])


def own_start() -> int:
    found = process_state(os.getpid())
    return 0 if found is None else found[1]
