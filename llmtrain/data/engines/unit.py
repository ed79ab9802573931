"""One work unit on a worker: what it gave or how it failed, and the most memory that the worker ever used.

Every engine sends back the same `Outcome`, so an error of a unit reaches the user in the same way whoever ran
it.
"""

from __future__ import annotations

import pickle
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
"""Environment of a worker: there is one for each core, so threads of its libraries would only fight."""
SHOWN_UNIT_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Outcome:
    number: int
    result: Any = None  # Any: whatever the function returns
    error: Exception | None = None
    trace: str = ""
    """The worker's traceback, when there is an error."""
    peak_bytes: int

    def result_or_raise(self) -> Any:
        if self.error is not None:
            raise self.error from WorkerTraceback(self.trace)
        return self.result


class WorkerTraceback(Exception):
    """Where on the worker an error came from, shown as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_unit(function: Callable[[Any], Any], unit: Any, number: int) -> Outcome:
    """Call `function(unit)`. An error becomes part of the outcome; what ends the process still does."""
    try:
        return Outcome(number=number, result=function(unit), peak_bytes=peak_bytes())
    except Exception as error:
        return Outcome(
            number=number, error=portable(error), trace=traceback.format_exc(), peak_bytes=peak_bytes()
        )


def portable(error: Exception) -> Exception:
    """`error`, or when it does not survive being pickled, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def name_of(function: Callable[..., Any], unit: object, number: int, num_units: int) -> str:
    """A unit as messages call it."""
    shown = repr(unit)
    if len(shown) > SHOWN_UNIT_CHARS:
        shown = shown[:SHOWN_UNIT_CHARS] + "..."
    name = getattr(function, "__name__", repr(function))
    return f"unit {number} of {num_units} of {name}, {shown}"


def peak_bytes() -> int:
    """The most memory that this process ever had resident.

    Linux counts it by program in /proc (VmHWM); `ru_maxrss`, used elsewhere, also remembers the process that
    started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def limit_threads() -> None:
    """Leave this worker one thread to compute with, in libraries that are loaded and have a call for it."""
    arrow = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.set_cpu_count(1)
