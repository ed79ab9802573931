"""What a config, a file, a cluster or a user can get wrong. Each error also inherits the closest built-in.

A message says what is wrong, the values, and what to do, with config names as the user types them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 2
"""Exit status for everything a user can mend. 1 is left to bugs, 130 to Ctrl-C."""


class LLMTrainError(Exception):
    """Base of every error that is not a bug in llmtrain. The command line prints its message, and exits
    with 2."""


class ConfigError(LLMTrainError, ValueError):
    """A setting that cannot be right, found before work starts."""


class DataError(LLMTrainError, ValueError):
    """Text, shards, packs or a tokenizer that are missing, damaged, or do not fit the run."""


class CheckpointError(LLMTrainError, RuntimeError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


class DivergedError(LLMTrainError, ArithmeticError):
    """A loss or gradient that is not finite."""


class LaunchError(LLMTrainError, OSError):
    """Processes that could not be started or could not meet: a taken port, a wrong world size."""


class DiskError(LLMTrainError, OSError):
    """A file that could not be written while a run was on: a full disk, a file system that went away."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message for an unknown `name`: the nearest known one first, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}"
        if hint
        else (f"unknown {kind} {name!r}; known: {', '.join(names)}")
    )
