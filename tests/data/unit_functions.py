"""Units for tests of engines: at the top of a module that workers can import, as every unit function is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from llmtrain.errors import DataError


class Odd(Exception):
    """Needs more to be made again than what a pickle of an exception keeps."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def double(number: int) -> int:
    return 2 * number


def double_later(number: int) -> int:
    """The first units take longest, so that they finish last."""
    time.sleep(max(0.0, 0.2 - 0.05 * number))
    return 2 * number


def write(unit: tuple[str, int]) -> int:
    folder, number = unit
    Path(folder, f"{number}.txt").write_text(str(number * number))
    return number


def die_once(unit: tuple[str, int]) -> int:
    """Unit 3 kills its process the first time, when it has written half of what it has to."""
    folder, number = unit
    marker = Path(folder, f"died-{number}")
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(unit)


def die_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_five(number: int) -> int:
    if number == 5:
        raise DataError("unit 5 is bad: mend it")
    time.sleep(0.01)
    return number


def fail_oddly(number: int) -> int:
    raise Odd("a", "b")


def full_disk(number: int) -> int:
    raise OSError(28, "No space left on device", f"unit-{number}")


def shaky_disk(unit: str) -> str:
    """Fails once, as a file server does that was away for a moment."""
    marker = Path(unit)
    if not marker.exists():
        marker.touch()
        raise OSError(5, "Input/output error", unit)
    return "read"


def exit_politely(number: int) -> int:
    raise SystemExit(7)


def unpicklable(number: int) -> object:
    return lambda: number


def wait_for(unit: tuple[str, str]) -> int:
    """Say which process this is, and wait for a file."""
    said, awaited = map(Path, unit)
    said.write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return os.getpid()


def use_memory(num_bytes: int) -> int:
    return len(bytes(bytearray(num_bytes)))


def thread_settings(number: int) -> list[str | None]:
    return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")]


def where_am_i(number: int) -> str:
    return os.getcwd()
