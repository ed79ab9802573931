"""`llmtrain watch`: in a pseudo-terminal and in a pipe, until the run ends or the user leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from llmtrain.cli.watch import WatchConfig, watch
from llmtrain.errors import ConfigError, DataError
from llmtrain.tracking.metrics import MetricsFile

PROGRAM = "from llmtrain.cli.watch import main; main()"
LEAVES_SCREEN = "\x1b[?1049l"


def write_steps(folder, begin, end, *, attempt=1, at=None, ending=None):
    with MetricsFile(folder / "metrics.jsonl", attempt=attempt) as metrics:
        metrics.write("event", begin, what="resume" if begin else "start", time=at)
        for step in range(begin + 1, end + 1):
            metrics.write("step", step, loss=9 / step, tokens_per_s=1e4, step_s=1.0, grad_norm=1.0, time=at)
        if ending:
            metrics.write("event", end, what=ending)


def command(folder, *settings):
    return [sys.executable, "-c", PROGRAM, f"run={folder}", "refresh_s=0.1", *settings]


class Screen:
    """A process on a terminal of 100 x 40."""

    def __init__(self, arguments, cwd):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, words, timeout_s=60.0):
        """Read until `words` were written."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            assert time.monotonic() < deadline, f"no {words!r} in {self.text[-3000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 1 << 16).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert words in self.text, f"no {words!r} in {self.text[-3000:]!r}"

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def screens():
    opened = []

    def on_a_terminal(folder, *settings):
        opened.append(Screen(command(folder, *settings), folder))
        return opened[-1]

    yield on_a_terminal
    for screen in opened:
        screen.end()


def test_a_terminal_shows_the_run_as_it_goes_and_its_end(tmp_path, screens):
    write_steps(tmp_path, 0, 40)
    screen = screens(tmp_path)
    screen.wait_for("step 40 · ")
    screen.wait_for("throughput")
    with open(tmp_path / "metrics.jsonl", "ab") as handle:
        handle.write(b'{"kind": "step", "step": 41, "attempt": 1, "lo')
        handle.flush()
        time.sleep(0.3)
        handle.write(b'ss": 0.5}\n')
    screen.wait_for("step 41 · ")
    screen.wait_for("loss 0.5000")
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 41, what="finished")
    screen.wait_for(LEAVES_SCREEN)
    assert screen.process.wait(30) == 0
    assert any("\u2800" < character <= "\u28ff" for character in screen.text), "braille was drawn"
    screen.wait_for("finished")


def test_ctrl_c_leaves_and_gives_the_terminal_back(tmp_path, screens):
    write_steps(tmp_path, 0, 40)
    screen = screens(tmp_path)
    screen.wait_for("step 40 · ")
    screen.process.send_signal(signal.SIGINT)
    screen.wait_for(LEAVES_SCREEN)
    assert screen.process.wait(30) == 0
    assert "Traceback" not in screen.text


def test_a_run_that_has_not_begun_is_waited_for(tmp_path, screens):
    screen = screens(tmp_path)
    screen.wait_for("waiting for the first record")
    write_steps(tmp_path, 0, 3, ending="failed")
    screen.wait_for("failed: no reason recorded")
    assert screen.process.wait(30) == 1


def test_a_pipe_gets_plain_lines_until_the_end(tmp_path):
    write_steps(tmp_path, 0, 40)
    process = subprocess.Popen(
        command(tmp_path, "log_every_steps=5"), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first == f"{tmp_path.name} | step 40 | running | loss 0.2250 | 10k tokens/s | 0 ms left\n" or (
            first == f"{tmp_path.name} | step 40 | running | loss 0.2250 | 10k tokens/s\n"
        )
        write_steps(tmp_path, 38, 52, attempt=2, ending="finished")
        rest = process.stdout.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    lines = [line.partition(" ")[2] for line in rest.splitlines()]
    assert lines[0] == "step 38: resumed"
    assert [line.split(" | ")[0] for line in lines[1:-1]] == ["step 40", "step 45", "step 50"]
    assert lines[-1] == "step 52: finished"
    assert "\x1b" not in rest


def test_a_reader_that_leaves_ends_it_without_a_word(tmp_path):
    write_steps(tmp_path, 0, 40)
    process = subprocess.Popen(
        command(tmp_path, "log_every_steps=1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdout.readline()
        process.stdout.close()
        write_steps(tmp_path, 40, 60, attempt=2)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.mark.parametrize("ending", ["stopped", "failed", "diverged"])
def test_an_end_before_the_last_step_is_exit_status_1(tmp_path, capsys, ending):
    write_steps(tmp_path, 0, 5, ending=ending)
    with pytest.raises(SystemExit, match="1"):
        watch(WatchConfig(run=str(tmp_path)))
    assert f"step 5 | {ending}" in capsys.readouterr().out


def test_a_finished_run_is_told_in_one_line(tmp_path, capsys):
    write_steps(tmp_path, 0, 5, ending="finished")
    watch(WatchConfig(run=str(tmp_path)))
    assert capsys.readouterr().out.startswith(f"{tmp_path.name} | step 5 | finished | loss 1.8000")


def test_with_restarts_a_stop_is_not_the_end(tmp_path):
    write_steps(tmp_path, 0, 5, ending="stopped")
    process = subprocess.Popen(
        command(tmp_path, "restarts=true"), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    try:
        assert "stopped: by a signal" in process.stdout.readline()
        write_steps(tmp_path, 5, 10, attempt=2, ending="finished")
        assert "step 10: finished" in process.stdout.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_a_silent_run_is_said_to_be_once(tmp_path):
    write_steps(tmp_path, 0, 5, at=time.time() - 1000)
    os.utime(tmp_path / "metrics.jsonl", (time.time() - 1000, time.time() - 1000))
    process = subprocess.Popen(
        command(tmp_path, "silent_after_s=900"), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    try:
        assert "silent for 16:" in process.stdout.readline()
        at = time.time() - 950
        with MetricsFile(tmp_path / "metrics.jsonl", attempt=1) as metrics:
            metrics.write("step", 10, loss=1.0, time=at)
        os.utime(tmp_path / "metrics.jsonl", (at, at))
        assert " step 10 | loss 1.0000" in process.stdout.readline()
        assert process.stdout.readline().startswith("silent for 15:")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_no_folder_is_an_error_that_says_where_to_look(tmp_path):
    with pytest.raises(DataError, match=r"no run folder .*/none; `llmtrain status folder=.*` lists"):
        watch(WatchConfig(run=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh_s": 0}, r"refresh_s=0 and silent_after_s=300.0 must be above 0 seconds"),
        ({"log_every_steps": 0}, r"log_every_steps=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WatchConfig(run="x", **settings)
