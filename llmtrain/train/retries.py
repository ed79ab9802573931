"""When starting again is no use: the same failure at the same step, several times in a row. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llmtrain.errors import LLMTrainError

FAILURES = ("failed", "diverged", "hang")
"""Events that say why an attempt ended, besides those that say that it ended well."""
GOOD_ENDS = ("finished", "stopped", "rolled_back")
SILENT = "it ended without a word: killed from outside, or out of memory"


class SameFailureError(LLMTrainError):
    """The run has used up run.max_same_failures."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    step: int
    """The last one that was done."""
    why: str

    @property
    def kind(self) -> tuple[int, str]:
        """Equal for the same failure: numbers in the text are process ids, ports and seconds."""
        return self.step, re.sub(r"\d+", "#", self.why)


def endings(records: Iterable[dict[str, Any]]) -> list[Failure | None]:
    """Of each attempt, in order; None for one that ended well, or that never did a step and said nothing.

    Args:
        records: of metrics.jsonl, all of them (`tracking.metrics.read_lines`).
    """
    found: dict[int, Failure | None] = {}
    steps: dict[int, int] = {}
    for record in records:
        attempt = record["attempt"]
        if record["kind"] == "step":
            steps[attempt] = record["step"]
            found[attempt] = Failure(record["step"], SILENT)
        elif record["kind"] != "event":
            continue
        elif record["what"] in GOOD_ENDS:
            found[attempt] = None
        elif record["what"] in FAILURES:
            why = str(record.get("error") or record["what"])
            found[attempt] = Failure(steps.get(attempt, record["step"]), why)
        elif record["what"] in ("start", "resume"):
            found[attempt] = None
    return [found[attempt] for attempt in sorted(found)]


def check_retries(records: Iterable[dict[str, Any]], *, max_same_failures: int) -> None:
    """
    Args:
        max_same_failures: so many attempts in a row may end alike; 0: any number.

    Raises:
        SameFailureError: they have.
    """
    last = endings(records)[::-1]
    if not last or last[0] is None or max_same_failures == 0:
        return
    newest = last[0]
    same = list(takewhile(lambda each: each is not None and each.kind == newest.kind, last))
    if len(same) >= max_same_failures:
        raise SameFailureError(
            f"the last {len(same)} attempts ended alike after step {newest.step}: {newest.why}; the run does "
            f"not start again (run.max_same_failures={max_same_failures}). Mend it, and give "
            f"run.max_same_failures={len(same) + 1} for one more attempt, or 0 for any number"
        )
