"""Processes that do not outlive whoever started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "LLMTRAIN_PARENT_PID"
"""Environment variable with the process id of whoever starts ranks and is not to be outlived."""
PR_SET_PDEATHSIG = 1
"""prctl's option number: <linux/prctl.h>."""


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends; exit if it already has.

    Signals to the parent's process group do not reach ranks in sessions of their own, as torchrun's are.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT_VARIABLE, str(os.getppid())) != str(os.getppid()):  # before we asked
        sys.exit("the process that started this rank has ended")
