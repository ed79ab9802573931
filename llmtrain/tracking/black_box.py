"""What a rank is at to the last instruction, in memory that outlives its process: a few numbers in /dev/shm,
which the rank changes at every mark and collective, and others on its machine read once it is dead or stands
still. Its beat may be a second old by then. No disk can hold a write to it up.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from dataclasses import replace
from pathlib import Path
from time import monotonic_ns

from llmtrain.tracking.beats import Beat, Collective

MEMORY = Path("/dev/shm")
KEPT = 512
"""Collectives."""
NUM_NAMES, NAME_BYTES = 256, 40
"""Of phases, kinds, groups and states: noted once, and then a number."""
_WHOSE = struct.Struct("=2q")
"""Process id and start."""
_ROWS = struct.Struct("=2q")
"""First row of the step, and how many."""
_PLACE = struct.Struct("=4q")
"""Step, micro-step, phase, and when it began: by time.monotonic_ns, which is one clock on a machine."""
_CALL = struct.Struct("=10q")
_STATE = struct.Struct("=q")
_ROWS_AT = _WHOSE.size
_PLACE_AT = _ROWS_AT + _ROWS.size
_CALLS_AT = _PLACE_AT + _PLACE.size
_NAMES_AT = _CALLS_AT + KEPT * _CALL.size
BOX_BYTES = _NAMES_AT + NUM_NAMES * NAME_BYTES
NO_PEER = -2


class BlackBox:
    """The writer's side. Without /dev/shm its memory is its process's own, and nobody reads it."""

    def __init__(self, folder: Path, rank: int, *, pid: int, born: int) -> None:
        """
        Args:
            folder: of the beats: one box for each rank there, however often the run starts.
            pid, born: as in a beat.
        """
        self.path: Path | None = box_path(folder, rank)
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.ftruncate(fd, BOX_BYTES)
                self._memory = mmap.mmap(fd, BOX_BYTES)
            finally:
                os.close(fd)
        except OSError:
            self.path, self._memory = None, mmap.mmap(-1, BOX_BYTES)
        self._memory[:] = bytes(BOX_BYTES)
        self._codes: dict[str, int] = {}
        _WHOSE.pack_into(self._memory, 0, pid, born)

    def note_rows(self, position: int, num_rows: int) -> None:
        _ROWS.pack_into(self._memory, _ROWS_AT, position, num_rows)

    def note_place(self, step: int, micro_step: int, phase: str, since_ns: int) -> None:
        _PLACE.pack_into(self._memory, _PLACE_AT, step, micro_step, self._code(phase), since_ns)

    def note_call(self, call: Collective) -> None:
        """Note one that begins."""
        code, peer = self._code, NO_PEER if call.peer is None else call.peer
        _CALL.pack_into(
            self._memory,
            _CALLS_AT + call.number % KEPT * _CALL.size,
            *(call.number, code(call.group), call.in_group, code(call.kind), call.elements, peer),
            *(call.step, call.micro_step, code(call.phase), code(call.state)),
        )

    def note_state(self, number: int, state: str) -> None:
        """Of a call that was noted."""
        at = _CALLS_AT + (number % KEPT + 1) * _CALL.size - _STATE.size
        _STATE.pack_into(self._memory, at, self._code(state))

    def remove(self) -> None:
        """Nobody needs it any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _code(self, name: str) -> int:
        found = self._codes.get(name)
        if found is None:
            found = self._codes[name] = min(len(self._codes), NUM_NAMES - 1)
            at = _NAMES_AT + found * NAME_BYTES
            self._memory[at : at + NAME_BYTES] = name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
        return found


def box_path(folder: Path, rank: int) -> Path:
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return MEMORY / f"llmtrain-{name}-{rank}.box"


def with_box(beat: Beat, folder: Path) -> Beat:
    """`beat` as its rank's box has it, if that is on this machine and of the same process."""
    try:
        memory = box_path(folder, beat.rank).read_bytes()
    except OSError:
        return beat
    if len(memory) != BOX_BYTES or _WHOSE.unpack_from(memory, 0) != (beat.pid, beat.born):
        return beat
    raw = [memory[at : at + NAME_BYTES] for at in range(_NAMES_AT, BOX_BYTES, NAME_BYTES)]
    names = [each.rstrip(b"\0").decode(errors="replace") for each in raw]
    step, micro_step, phase, since_ns = _PLACE.unpack_from(memory, _PLACE_AT)
    calls = []
    for each in _CALL.iter_unpack(memory[_CALLS_AT:_NAMES_AT]):
        number, group, in_group, kind, elements, peer, at_step, at_micro, at_phase, state = each
        if number:
            peer = None if peer == NO_PEER else peer
            what = number, names[group], in_group, names[kind], elements, peer
            calls.append(Collective(*what, at_step, at_micro, names[at_phase], names[state]))
    calls.sort()
    groups = dict(beat.groups)
    for call in calls:
        if call.group in groups:
            known = groups[call.group]
            groups[call.group] = known._replace(num_issued=max(known.num_issued, call.in_group))
    position, num_rows = _ROWS.unpack_from(memory, _ROWS_AT)
    return replace(
        beat,
        position=position,
        num_rows=num_rows,
        step=step,
        micro_step=micro_step,
        phase=names[phase],
        age_s=max(0.0, (monotonic_ns() - since_ns) * 1e-9),
        num_collectives=calls[-1].number if calls else beat.num_collectives,
        waiting=next((call for call in reversed(calls) if call.state == "waits"), None),
        last=calls,
        groups=groups,
    )
