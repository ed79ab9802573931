"""The console: what a log and a terminal show, and that a terminal may go away."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap

import pytest

from llmtrain.tracking.console import Console


def record(step, **fields):
    return {"step": step, "loss": 8 / step, "lr": 3e-4, "tokens_per_s": 12_345.0, "step_s": 0.02, **fields}


class Gone(io.StringIO):
    """A terminal that goes away after some writes."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_log_gets_the_first_and_the_last_step_and_every_interval():
    out = io.StringIO()
    with Console(25, log_every_steps=10, stream=out) as console:
        for step in range(1, 26):
            console.step(record(step))
    shown = [line.split(" | ")[0].split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert shown == ["step 1/25 4%", "step 10/25 40%", "step 20/25 80%", "step 25/25 100%"]


def test_a_line_says_loss_rate_and_time_left():
    out = io.StringIO()
    with Console(100, stream=out) as console:
        console.step(record(1, mfu=0.31))
    line = out.getvalue()
    for fact in ("loss 8.0000", "lr 3.00e-04", "12.3k tok/s", "20 ms/step", "MFU 31.0%", " left"):
        assert fact in line
    assert "\x1b" not in line


def test_absent_figures_are_left_out_and_a_loss_that_is_not_finite_is_said():
    out = io.StringIO()
    with Console(100, stream=out) as console:
        console.step({"step": 1, "loss": None})
    assert "loss not finite" in out.getvalue()
    assert "MFU" not in out.getvalue()
    assert "tok/s" not in out.getvalue()


def test_the_first_step_after_a_resume_is_shown():
    out = io.StringIO()
    with Console(100, start_step=43, log_every_steps=50, stream=out) as console:
        console.step(record(44))
        console.step(record(45))
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["44/100"]


def test_evaluations_and_events_are_shown_at_once():
    out = io.StringIO()
    with Console(100, stream=out) as console:
        console.evaluation({"step": 20, "eval_loss": 3.25, "eval_bits_per_byte": 1.5})
        console.evaluation({"step": 30, "eval_loss": None})
        console.event("step 20: checkpoint saved")
    assert "step 20: held-out loss 3.2500, 1.5000 bits per byte" in out.getvalue()
    assert "step 30: held-out loss not finite" in out.getvalue()
    assert "step 20: checkpoint saved" in out.getvalue()


@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_shows_one_line_that_fits_its_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    with Console(600, stream=out, is_terminal=True) as console:
        console.step(record(600, mfu=0.31))
    last = out.getvalue().replace("\x1b[2K", "\n").splitlines()[-2]
    assert "step 600/600" in last
    assert "loss 0.0133" in last
    assert "left" in last
    assert ("MFU 31.0%" in last) == (columns == 160)


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("writes", [0, 1, 3, 6])
def test_a_terminal_that_goes_away_ends_the_display_and_nothing_else(is_terminal, writes, caplog):
    stdout, stderr = sys.stdout, sys.stderr
    with Console(100, log_every_steps=1, stream=Gone(writes), is_terminal=is_terminal) as console:
        for step in range(1, 10):
            console.event("something")
            console.step(record(step))
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert caplog.text.count("the terminal is gone") == 1
    assert "training goes on without a display" in caplog.text


def test_a_closed_stream_is_no_error(caplog):
    out = io.StringIO()
    console = Console(100, stream=out)
    out.close()
    console.step(record(1))
    console.close()
    console.event("after the end")
    assert "the terminal is gone" in caplog.text


def test_log_lines_go_above_the_live_line_and_logging_is_given_back():
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with Console(100, stream=out, is_terminal=True) as console:
            console.step(record(1))
            assert handler.stream is not out
            root.warning("look out")
        assert handler.stream is out
    finally:
        root.removeHandler(handler)
    assert "look out\n" in out.getvalue()


def test_a_program_whose_reader_leaves_ends_with_status_0():
    program = textwrap.dedent("""
        import sys
        from llmtrain.tracking.console import Console
        with Console(2000, log_every_steps=1) as console:
            for step in range(1, 2001):
                console.step({"step": step, "loss": 1.0})
        print("done")
    """)
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program], stderr=write, stdout=subprocess.PIPE) as process:
        os.close(write)
        os.read(read, 100)
        os.close(read)
        assert process.stdout.read() == b"done\n"
    assert process.returncode == 0
