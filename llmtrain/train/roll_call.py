"""While a run starts: who has come, and whether everybody still lives.

Between the launch and the first step ranks wait for each other in collectives that a dead rank never joins,
NCCL's for ten minutes, without a word about whom they wait for. Here each rank says every second, through the
store at which ranks meet, that it lives. Rank 0 listens to all, rank 1 to rank 0. Who is not heard for
`silence_s` is named on every rank, and the run ends. A rank that has to leave says so here, and all do:
nothing is lost before the first step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from llmtrain.errors import EXIT_FAILED
from llmtrain.train.deadline import EXIT_AGAIN, Deadline, leave_with

log = logging.getLogger(__name__)

BEAT_S = 1.0
REMIND_S = 30.0
"""How often rank 0 says whom it waits for."""
LEAVE_POLL_S = 0.05
ALONE_S = 10.0
"""A rank that has to leave, and finds no place where ranks meet for so long, leaves alone."""
LAST_WORDS_S = 3.0
"""What the other ranks get to read who is lost before the store goes with rank 0."""


class RollCall:
    """A context for the start of a run; does nothing for one process, or with silence_s=0."""

    def __init__(self, *, silence_s: float, deadline: Deadline | None = None) -> None:
        self.silence_s = silence_s
        self.deadline = deadline
        self.on_leave: Callable[[str], None] = lambda reason: None
        """Told why all leave because one must."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._is_over = threading.Event()
        self._is_leaving = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        """Rank -> its last word, and when it was new."""

    def __enter__(self) -> Self:
        if self.silence_s > 0 and self.world_size > 1:
            threading.Thread(target=self._run, name="roll call", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold()
        self.end()

    def hold(self, *_: object) -> None:
        """While all leave, an error says only that another rank has left already: wait for the exit."""
        if self._is_leaving.is_set():
            time.sleep(2 * LAST_WORDS_S)

    def end(self) -> None:
        """Every rank has taken its first step: from here on collectives tell."""
        self._is_over.set()

    def _run(self) -> None:
        try:
            if (store := self._connect()) is None:
                return
        except (dist.DistError, RuntimeError):
            return  # ranks do not meet at all: joining the group says why
        me = f"{socket.gethostname()}, process {os.getpid()}"
        reminded = time.monotonic()
        for number in range(10**9):
            if self._is_over.is_set():
                return
            try:
                store.set(f"beat/{self.rank}", f"{number} {me}")
                if store.check(["lost"]):
                    self._leave(store.get("lost").decode())
                self._leave_together(store)
                lost = self._listen(store)
            except (dist.DistError, RuntimeError):
                if self._is_leaving.is_set():
                    os._exit(leave_with(EXIT_AGAIN))
                if not self._is_over.wait(BEAT_S):
                    self._leave("rank 0, which keeps the store where ranks meet, is gone")
                return
            if lost:
                store.set("lost", lost)
                time.sleep(LAST_WORDS_S)
                self._leave(lost)
            if self.rank == 0 and time.monotonic() - reminded > REMIND_S:
                reminded = time.monotonic()
                if missing := [rank for rank in range(self.world_size) if rank not in self._heard]:
                    log.warning(
                        "waiting for %d of %d ranks: %s", len(missing), self.world_size, some(missing)
                    )
            self._is_over.wait(BEAT_S)

    def _connect(self) -> Store | None:
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if not self._wait_for(place):
            return None
        client = TCPStore(*place, is_master=False, timeout=timedelta(seconds=600))
        return PrefixStore(f"roll call {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)

    def _wait_for(self, place: tuple[str, int]) -> bool:
        """Until somebody listens there: rank 0, which may have been ended before it came. False: the start is
        over."""
        due_since = None
        while not self._is_over.is_set():
            # refused, or no answer: not there yet, which is what we wait for
            with contextlib.suppress(OSError), socket.create_connection(place, timeout=BEAT_S):
                return True
            reason = self.deadline.reason() if self.deadline is not None else None
            if reason is not None:
                due_since = due_since or time.monotonic()
                if time.monotonic() - due_since > ALONE_S:
                    log.warning("%s, and nobody is at %s:%d: rank %d leaves", reason, *place, self.rank)
                    logging.shutdown()
                    os._exit(leave_with(EXIT_AGAIN))
            self._is_over.wait(BEAT_S)
        return False

    def _listen(self, store: Store) -> str | None:
        """A sentence about a rank that has come and is not heard any more."""
        whom = {0: range(self.world_size), 1: range(1)}.get(self.rank, range(0))
        now = time.monotonic()
        for rank in whom:
            if not store.check([f"beat/{rank}"]):
                continue  # not here yet
            word = store.get(f"beat/{rank}").decode()
            before, since = self._heard.get(rank, ("", now))
            if word != before:
                self._heard[rank] = (word, now)
            elif now - since > self.silence_s:
                who = word.partition(" ")[2]
                return (
                    f"rank {rank} ({who}) has not been heard for {self.silence_s:g} s while the run was "
                    "starting: it died, or hangs; its own output says why"
                )
        return None

    def _leave_together(self, store: Store) -> None:
        """If a rank has to leave, once all know. Rank 0, which may keep the store, is the last."""
        reason = self.deadline.reason() if self.deadline is not None else None
        if reason is not None and not store.check(["leave"]):
            store.set("leave", f"{reason} on rank {self.rank}")
        if not store.check(["leave"]) or self._is_over.is_set():
            return
        self._is_leaving.set()
        why = store.get("leave").decode()
        if self.rank == 0:
            log.warning("%s while the run was starting: all ranks leave, and nothing was done", why)
            self.on_leave(why)
        status = leave_with(EXIT_AGAIN)
        store.set(f"leaves/{self.rank}", "")
        limit = time.monotonic() + LAST_WORDS_S
        everyone = [f"leaves/{rank}" for rank in range(self.world_size)]
        while not store.check(everyone) and time.monotonic() < limit:
            time.sleep(LEAVE_POLL_S)
        if self.rank == 0:
            time.sleep(LEAVE_POLL_S * 5)
        logging.shutdown()
        os._exit(status)

    def _leave(self, why: str) -> None:
        """The main thread waits for ranks that will not come; nothing but an exit reaches it there."""
        if self._is_over.is_set():
            return
        log.error("%s; rank %d ends", why, self.rank)
        logging.shutdown()
        os._exit(EXIT_FAILED)


def some(ranks: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, ranks[:most]))
    return shown if len(ranks) <= most else f"{shown} and {len(ranks) - most} more"
