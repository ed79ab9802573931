"""Which rank the others wait for at every step, from the seconds that ranks spend outside of collectives.

On a CPU those are the seconds of the work. On a GPU the host only launches it, and what a slow one does to
its rank cannot be told from waiting for others; what remains there are waits for data.

Rank 0 reads the ranks' beats, in a thread: ranks tell them in any case, and training waits for nothing.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.tracking.beats import Beat, read_beats
from llmtrain.train.heartbeat import STEP_PHASES

log = logging.getLogger(__name__)

MIN_STEPS = 5
"""Of a window, on every rank: fewer are longer looked at."""
PATIENCE = 3
"""Windows in a row in which a rank is slow before it is called a straggler."""


@dataclass(frozen=True)
class Pace:
    """A rank's seconds in a step, a mean over a window."""

    host: str
    work: str
    is_exact: bool
    num_steps: int
    own_s: dict[str, float]
    """By phase, outside of collectives."""
    waited_s: float
    """Inside of them."""

    @property
    def data_s(self) -> float:
        return self.own_s["data"]

    @property
    def compute_s(self) -> float:
        return sum(self.own_s.values()) - self.data_s

    @property
    def weighed_s(self) -> float:
        """What ranks are compared by."""
        return sum(self.own_s.values()) if self.is_exact else self.data_s

    @property
    def step_s(self) -> float:
        return sum(self.own_s.values()) + self.waited_s


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    slower: float
    """Than the median of the ranks that do the same work: 0.3 is 30% more seconds in a step."""
    phase: str
    """Where most of these seconds go."""


def paces(before: Mapping[int, Beat], after: Mapping[int, Beat]) -> dict[int, Pace]:
    """By rank; empty until every rank has done MIN_STEPS between two looks at its beat."""
    found = {}
    for rank, now in after.items():
        then = before.get(rank)
        num_steps = 0 if then is None or then.attempt != now.attempt else now.num_steps - then.num_steps
        if then is None or num_steps < MIN_STEPS:
            return {}

        def mean(name: str, phase: str, then: Beat = then, now: Beat = now, steps: int = num_steps) -> float:
            spent: float = getattr(now, name).get(phase, 0.0) - getattr(then, name).get(phase, 0.0)
            return spent / steps

        found[rank] = Pace(
            host=now.host,
            work=now.work,
            is_exact=now.is_exact,
            num_steps=num_steps,
            own_s={phase: mean("seconds", phase) for phase in STEP_PHASES},
            waited_s=sum(mean("waited", phase) for phase in STEP_PHASES),
        )
    return found


def slowness(found: Mapping[int, Pace]) -> dict[int, float]:
    """Rank -> how much slower it is than the median of those that do the same work, of which there are
    others."""
    slower = {}
    for work in {pace.work for pace in found.values()}:
        peers = {rank: pace for rank, pace in found.items() if pace.work == work}
        if len(peers) < 2:
            continue
        usual = statistics.median_low(pace.weighed_s for pace in peers.values())
        step_s = statistics.median_low(pace.step_s for pace in peers.values())
        for rank, pace in peers.items():
            whole = usual if pace.is_exact else step_s
            slower[rank] = (pace.weighed_s - usual) / whole if whole > 0 else 0.0
    return slower


def record_of(found: Mapping[int, Pace]) -> dict[str, Any]:
    """Fields of a `ranks` record. Those of computing are None where they cannot be measured."""
    slower = slowness(found)
    slowest = max(slower or found, key=lambda rank: slower.get(rank, found[rank].weighed_s))
    data = {rank: pace.data_s for rank, pace in found.items()}
    compute = [pace.compute_s for pace in found.values()]
    is_exact = all(pace.is_exact for pace in found.values())
    return {
        "num_steps": min(pace.num_steps for pace in found.values()),
        "slowest_rank": slowest,
        "slowest_host": found[slowest].host,
        "slower": slower.get(slowest),
        "compute_s_max": max(compute) if is_exact else None,
        "compute_s_median": statistics.median(compute) if is_exact else None,
        "data_s_max": max(data.values()),
        "data_slowest_rank": max(data, key=lambda rank: data[rank]),
        "wait_s_median": statistics.median(pace.waited_s for pace in found.values()) if is_exact else None,
    }


def straggler_in(found: Mapping[int, Pace], rank: int) -> Straggler:
    """What is known about a slow rank."""
    pace = found[rank]
    peers = [other for other in found.values() if other.work == pace.work]
    excess = {
        phase: pace.own_s[phase] - statistics.median_low(other.own_s[phase] for other in peers)
        for phase in (STEP_PHASES if pace.is_exact else ("data",))
    }
    return Straggler(rank, pace.host, slowness(found)[rank], max(excess, key=lambda phase: excess[phase]))


class StragglerReport:
    """Rank 0's. `look` at every tracking interval, and `take` what was found."""

    def __init__(self, folder: Path, *, token: str, world_size: int, slower_than: float) -> None:
        """
        Args:
            folder: of the beats.
            slower_than: a straggler is slower than the median by more than this share.
        """
        self.folder, self.token, self.world_size = folder, token, world_size
        self.slower_than = slower_than
        self._before: dict[int, Beat] = {}
        self._slow_windows: dict[int, int] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="straggler report")
        self._looking: Future[dict[int, Beat]] | None = None

    def look(self) -> None:
        """Begin to read every rank's beat."""
        if self._looking is None and self.world_size > 1:
            self._looking = self._reader.submit(
                read_beats, self.folder, range(self.world_size), token=self.token
            )

    def take(self) -> tuple[dict[str, Any], list[Straggler]] | None:
        """Fields of a `ranks` record, and ranks that have become stragglers; None if there is nothing new."""
        if self._looking is None or not self._looking.done():
            return None
        beats, self._looking = self._looking.result(), None
        if len(beats) < self.world_size:
            return None
        found = paces(self._before, beats)
        if not found:
            if not self._before or any(
                beats[rank].attempt != beat.attempt for rank, beat in self._before.items()
            ):
                self._before = beats
            return None
        self._before = beats
        return record_of(found), self._new_stragglers(found)

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _new_stragglers(self, found: Mapping[int, Pace]) -> list[Straggler]:
        slow = {rank for rank, slower in slowness(found).items() if slower > self.slower_than}
        self._slow_windows = {rank: self._slow_windows.get(rank, 0) + 1 for rank in slow}
        new = [straggler_in(found, rank) for rank in sorted(slow) if self._slow_windows[rank] == PATIENCE]
        for each in new:
            log.warning(
                "rank %d on %s is %.0f%% slower than the median of the ranks that do the same, most of it in "
                "%s, for %d reports in a row: all others wait for it at every step",
                *(each.rank, each.host, 100 * each.slower, each.phase, PATIENCE),
            )
        return new
