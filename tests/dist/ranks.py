"""Start a script as 1 to 4 gloo ranks, and collect what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llmtrain.bench import ranks
from llmtrain.bench.ranks import free_port

__all__ = ["REPOSITORY", "free_port", "run_ranks"]

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(script: Path, *arguments: str, num_ranks: int, timeout_s: float = 240.0) -> list[Any]:
    """The JSON that each rank printed as its last line."""
    command = [sys.executable, str(script), *arguments]
    return ranks.run_ranks(command, num_ranks=num_ranks, timeout_s=timeout_s)
