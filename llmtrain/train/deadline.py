"""When a run must leave, whoever says so: a signal, Slurm's time limit, or the user's own.

Built before anything slow is imported, and asked in every phase: while the run starts, while it waits for
data, at each step, and inside evaluations. A save that is under way is finished: it is a transaction. No
torch.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import psutil

from llmtrain.units import format_duration

EXIT_AGAIN = 75
"""EX_TEMPFAIL of <sysexits.h>: the run is not over, and the same command goes on with it."""
EXIT_NEVER = 78
"""EX_CONFIG: the same command would fail again."""
EXIT_FILE = "LLMTRAIN_EXIT_FILE"
"""Names a file for the exit status that is meant: torchrun gives its own in place of its ranks'."""
LEAVE_SHARE = 0.5
"""Of the time that a job has at its start, at most so much is kept for leaving."""
SAVE_MARGIN = 1.5
"""A save is begun if so many times the longest one so far is left."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class Deadline:
    """Made on the main thread. A signal is remembered however often it comes: Slurm's scancel and torchrun
    each send a SIGTERM. Only Ctrl-C a second time ends the process at once."""

    def __init__(self, *, end: float = math.inf, watch_signals: bool = True) -> None:
        """
        Args:
            end: of the job that this process is part of, Unix seconds.
        """
        self._signal: str | None = None
        self._began = psutil.Process().create_time()
        self._end = end
        self._whose = "of the job"
        self._leave_s = 0.0
        self._is_starting = False
        if watch_signals:
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def set_limits(self, *, time_limit_s: float | None, leave_before_s: float) -> None:
        """Once the settings are known.

        Args:
            time_limit_s: The user's, from the start of the process; None: none.
            leave_before_s: So long before an end the run leaves.
        """
        if time_limit_s is not None and self._began + time_limit_s < self._end:
            self._end, self._whose = self._began + time_limit_s, "of run.time_limit_s"
        self._leave_s = min(leave_before_s, LEAVE_SHARE * max(0.0, self._end - self._began))

    def reason(self) -> str | None:
        """Why the run must leave now; None: it may go on."""
        if self._signal is not None:
            return self._signal
        if self.remaining_s() < self._leave_s:
            return f"the time limit {self._whose}"
        return None

    def is_due(self) -> bool:
        return self.reason() is not None

    def remaining_s(self) -> float:
        """Seconds until whoever set the limit ends the process; infinite where nobody did."""
        return self._end - time.time()

    def has_time_for(self, save_s: float) -> bool:
        """Whether a save may be begun, of which the longest so far took `save_s`."""
        return self.remaining_s() > SAVE_MARGIN * save_s

    def describe(self) -> str | None:
        """The limit, for the log."""
        if math.isinf(self._end):
            return None
        return (
            f"this process ends in {format_duration(max(0.0, self.remaining_s()))} by the time limit "
            f"{self._whose}; the run saves and leaves {format_duration(self._leave_s)} before"
        )

    def leave_at_once(self, *, during_start: bool) -> None:
        """Whether a signal ends the process where it stands: right for one process that starts, which has
        nothing to save. Of many, the roll call tells all."""
        self._is_starting = during_start
        if during_start and self._signal is not None:
            raise SystemExit(leave_with(EXIT_AGAIN))

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = self._signal or signal.Signals(number).name
        if self._is_starting:
            raise SystemExit(leave_with(EXIT_AGAIN))


def leave_with(status: int, why: str | None = None, *, environment: Mapping[str, str] = os.environ) -> int:
    """Tell whoever launched this rank the `status` that is meant, and why; return the one to exit with.

    Under torchrun that is 0 for a run that shall go on later: torchrun would call anything else a failure,
    and end the other ranks in the middle of leaving.
    """
    told = environment.get(EXIT_FILE)
    if told and environment.get("LOCAL_RANK", "0") == "0":
        Path(told).write_text(f"{status} {why or ''}".strip() + "\n", encoding="utf-8")
    return 0 if status == EXIT_AGAIN and "TORCHELASTIC_RUN_ID" in environment else status
