"""Where the time before the first step went."""

from __future__ import annotations

import os
import time

import psutil

from llmtrain.units import format_duration


class StartUp:
    """Marks moments since the command was typed. Under torchrun that is when torchrun itself started."""

    def __init__(self) -> None:
        process = psutil.Process()
        if "TORCHELASTIC_RUN_ID" in os.environ and (parent := process.parent()) is not None:
            self._parts: list[tuple[str, float]] = [
                ("torchrun", process.create_time() - parent.create_time())
            ]
        else:
            self._parts = []
        self._last = process.create_time()

    def mark(self, what: str) -> None:
        """Say that everything since the mark before was `what`."""
        now = time.time()
        self._parts.append((what, now - self._last))
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by part, in order, and their sum as `total`."""
        return {what: round(spent, 3) for what, spent in self._parts} | {
            "total": round(sum(spent for _, spent in self._parts), 3)
        }

    def summary(self) -> str:
        """'12.1 s to the end of the first step = torchrun 2.1 s + ... + DeepSpeed 4.0 s (33%) + ...'."""
        total = sum(spent for _, spent in self._parts)
        parts = " + ".join(
            f"{what} {format_duration(spent)} ({spent / total:.0%})" for what, spent in self._parts
        )
        return f"{format_duration(total)} from the command to the end of the first step = {parts}"
