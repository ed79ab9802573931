"""Log set-up for the command line: rank 0 speaks, the others only warn, and each line says which rank it
is."""

from __future__ import annotations

import logging
import os
import sys


def global_rank() -> int:
    """The rank that torchrun gave this process; 0 outside it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started; 1 outside it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def setup_logging() -> None:
    """Send log lines to standard error: INFO on rank 0, WARNING on the others."""
    rank = global_rank()
    prefix = f"[rank {rank}] " if world_size() > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("llmtrain").setLevel(logging.INFO if rank == 0 else logging.WARNING)
