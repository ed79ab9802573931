"""Two ranks that train, save, are killed and go on: the real Saver, CheckpointReader and newest_whole, and
arithmetic in place of a model, so that a start takes milliseconds.

This process imports everything and starts attempts: it forks the ranks of each, kills the ones that it is
told to, and says in which phase they died. A rank notes its phase in memory that it shares with this process,
so that is what it was to the last instruction. Phases of a save are told apart by the files that are opened
and deleted, which an audit hook hears of, whatever code does it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import newest_whole
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.write import Ranks

PHASES = ("starting", "loading", "training", "saving", "committing", "deleting")
STARTING, LOADING, TRAINING, SAVING, COMMITTING, DELETING = range(len(PHASES))
NUM_LAYERS, NUM_ROWS, NUM_COLUMNS = 3, 16, 2048
KINDS = ("weight", "momentum")
PEER_LOST, DAMAGED = 7, 3
"""Exit statuses."""
AIM_S = 0.5
"""So long a kill waits for its phase: there may be nothing to load, or nothing to delete."""
SETTLE_S = 20.0
"""A rank whose peer is dead must have left by then."""

Gather = Callable[[object], list[object]]
Pair = tuple[socket.socket, socket.socket]


class Training:
    """Rows [first, last) of every layer. The numbers of a row do not depend on who else holds which."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        rows = np.arange(NUM_LAYERS * NUM_ROWS, dtype=np.float32).reshape(NUM_LAYERS, NUM_ROWS, 1)
        columns = np.linspace(-1, 1, NUM_COLUMNS, dtype=np.float32)
        weight = np.cos(rows[:, first:last] + columns)
        self.held = {"weight": weight, "momentum": np.zeros_like(weight)}

    def step(self, number: int, gather: Gather) -> float:
        """Take step `number`, and return a loss that every row of every rank enters."""
        weight, momentum = self.held["weight"], self.held["momentum"]
        sums = [float(row.sum()) for row in weight.reshape(-1, NUM_COLUMNS)]
        loss = math.fsum(value for of_rank in gather(sums) for value in of_rank)
        noise = np.sin(np.arange(NUM_COLUMNS, dtype=np.float32) * np.float32(number % 97))
        momentum *= np.float32(0.9)
        momentum += np.float32(0.1) * weight + noise * np.float32(math.tanh(loss))
        weight -= np.float32(0.01) * momentum
        return loss

    def pieces(self) -> Iterator[Piece]:
        shape = (NUM_ROWS, NUM_COLUMNS)
        for kind in KINDS:
            for layer, values in enumerate(self.held[kind]):
                yield Piece(kind, f"layer.{layer}", shape, self.first * NUM_COLUMNS, values.reshape(-1))

    def load(self, reader: CheckpointReader) -> None:
        for piece in self.pieces():
            reader.read_into(piece.kind, piece.name, piece.start, piece.values)


class Watch:
    """What a rank is at, and the end of it at a certain operation on files."""

    def __init__(self, phases: mmap.mmap, rank: int, *, die_at: int | None) -> None:
        self._phases, self._rank, self._die_at = phases, rank, die_at
        self._saved_step = -1
        self._count = 0

    def set(self, phase: int) -> None:
        self._phases[self._rank] = phase

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Of a file that is opened to be written, of names that come, change or go."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path = arguments[0]
        else:
            return
        match = re.search(r"step-(\d+)", str(path))
        if match is None:
            return
        step, name = int(match[1]), Path(str(path)).name
        if event == "open" and "safetensors" in name:
            self._saved_step = step
            self.set(SAVING)
        elif event == "open" and ("manifest" in name or "COMMITTED" in name):
            self.set(COMMITTING)
        elif step < self._saved_step:
            self.set(DELETING)
        self._count += 1
        if self._count == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rmdir" and step < self._saved_step:
            self.set(TRAINING)


def be_a_rank(rank: int, plan: dict[str, Any], watch: Watch, gather: Gather, gather_saves: Gather) -> int:
    """An attempt, as `llmtrain train` makes one. Returns the exit status."""
    folder = Path(plan["folder"])
    watch.set(LOADING)
    found: list[Any] = [None, []]
    if rank == 0:
        path, damaged = newest_whole(folder / "checkpoints", verify=True)
        found = [path and str(path), damaged]
    (path, damaged), _ = gather(found)
    if damaged:
        print("damaged:", *damaged, sep="\n", file=sys.stderr)
        return DAMAGED
    border = plan["border"]
    training = Training(*((0, border) if rank == 0 else (border, NUM_ROWS)))
    step = 0
    if path is not None:
        reader = CheckpointReader(Path(path))
        training.load(reader)
        step = reader.step
        assert gather(step) == [step, step]
    watch.set(TRAINING)
    config = SaveConfig(keep_last=1, in_background=plan["in_background"])
    saver = Saver(folder / "checkpoints", Ranks(rank, 2, gather_saves), config)
    with open(folder / "metrics.jsonl", "a", buffering=1) as metrics:

        def note(**line: Any) -> None:
            if rank == 0:
                metrics.write(json.dumps(line) + "\n")  # one write call: a line is there or is not

        try:
            while plan["until"] is None or step < plan["until"]:
                loss = training.step(step, gather)
                step += 1
                note(step=step, loss=loss)
                saver.save(step, training.pieces(), {"step": step})
                for saved in saver.take_saved():
                    note(saved=saved.step)
                    if not plan["in_background"]:
                        watch.set(TRAINING)
            saver.finish()
        finally:
            saver.leave()
        for saved in saver.take_saved():
            note(saved=saved.step)
    return 0


class Line:
    """A gather of two ranks over a socket."""

    def __init__(self, rank: int, end: socket.socket) -> None:
        self._rank, self._end = rank, end
        self.is_lost = False

    def __call__(self, value: object) -> list[object]:
        content = json.dumps(value).encode()
        try:
            self._end.sendall(len(content).to_bytes(4, "little") + content)
            other = json.loads(self._receive(int.from_bytes(self._receive(4), "little")))
        except ConnectionError:
            self.is_lost = True
            raise
        return [value, other] if self._rank == 0 else [other, value]

    def _receive(self, num_bytes: int) -> bytes:
        content = b""
        while len(content) < num_bytes:
            part = self._end.recv(num_bytes - len(content))
            if not part:
                raise ConnectionError("the other rank is gone")
            content += part
        return content


def fork_rank(rank: int, plan: dict[str, Any], phases: mmap.mmap, lines: list[Pair]) -> int:
    """The process of a rank, which never returns from here."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for pair in lines:
            pair[1 - rank].close()  # or nobody notices that the other rank is gone
        own = [Line(rank, pair[rank]) for pair in lines]
        watch = Watch(phases, rank, die_at=plan["die_at"] if rank in plan["victims"] else None)
        sys.addaudithook(watch.hear)
        try:
            status = be_a_rank(rank, plan, watch, *own)
        except Exception:
            if any(line.is_lost for line in own):
                status = PEER_LOST
            else:
                traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def attempt(plan: dict[str, Any]) -> dict[str, Any]:
    """Fork two ranks and do to them what `plan` says.

    Returns:
        How each ended, and the phase in which a victim died; of rank 1, what rank 0 was at.
    """
    phases = mmap.mmap(-1, 2)
    lines = [socket.socketpair(), socket.socketpair()]  # training's, and the saver's
    ranks = [fork_rank(rank, plan, phases, lines) for rank in range(2)]
    for pair in lines:
        for end in pair:
            end.close()
    statuses: list[int | None] = [None, None]

    def look() -> None:
        for rank, child in enumerate(ranks):
            if statuses[rank] is None:
                pid, status = os.waitpid(child, os.WNOHANG)
                statuses[rank] = os.waitstatus_to_exitcode(status) if pid else None

    def kill(rank: int) -> None:
        look()  # a process that is gone may have left its number to another one
        if statuses[rank] is None:
            os.kill(ranks[rank], signal.SIGKILL)

    if plan["victims"] and plan["die_at"] is None:
        limit = time.monotonic() + AIM_S
        while plan["phase"] not in (None, PHASES[phases[0]]) and time.monotonic() < limit:
            time.sleep(0.0001)
        time.sleep(plan["delay_s"])
        for rank in plan["victims"]:
            kill(rank)
    phase = PHASES[phases[0]]
    limit = time.monotonic() + SETTLE_S
    while None in statuses:
        look()
        time.sleep(0.0005)
        if plan["victims"] and time.monotonic() > limit:
            hung = [rank for rank, status in enumerate(statuses) if status is None]
            for rank in hung:
                kill(rank)
            sys.exit(f"rank {hung} waits for a dead one: {plan}")
    if 0 in plan["victims"]:
        phase = PHASES[phases[0]]  # as it was at its last instruction
    return {"statuses": statuses, "phase": phase}


if __name__ == "__main__":
    for told in sys.stdin:
        print(json.dumps(attempt(json.loads(told))), flush=True)
