from __future__ import annotations

import io
import logging
import sys

import pytest

from llmtrain import progress as progress_module
from llmtrain.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_last_line_with_amount_and_rate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llmtrain"), progress("scan", total=2048, unit="B") as advance:
        advance(2048)
    (line,) = caplog.messages
    assert line.startswith("scan: 2 KiB in ")
    assert line.endswith("/s")


def test_a_log_gets_lines_on_the_way_with_share_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="llmtrain"), progress("scan", total=8, unit="rows") as advance:
        for _ in range(3):
            advance(2)
    assert caplog.messages == [
        "scan: 50%, 4 rows in 12.0 s, 0.333 rows/s, 12.0 s left",
        "scan: 6 rows in 14.0 s, 0.429 rows/s",
    ]


def test_a_terminal_gets_a_bar_and_a_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("scan", total=4, unit="rows") as advance:
        advance(4)
    assert "scan" in terminal.getvalue()
    assert "4 rows in" in terminal.getvalue()


def test_quiet_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, logger="llmtrain"),
        progress("scan", total=4, unit="rows", quiet=True) as advance,
    ):
        advance(4)
    assert caplog.messages == []
