"""The process around torchrun: it ends with the status that ranks mean, and sees to its own connections."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.cli.launcher import _bound_silence

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RANK = """
import os, sys, time
from pathlib import Path
told = Path(os.environ["LLMTRAIN_EXIT_FILE"])
"""


def launch(folder: Path, body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Have the launcher run `body` as a module in place of torchrun, or, with arguments, below torchrun."""
    (folder / "ranks.py").write_text(RANK + body)
    words = [*arguments, str(folder / "ranks.py")] if "torch.distributed.run" in arguments else arguments
    return subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.launcher", *(words or ["ranks"])],
        env=os.environ | {"PYTHONPATH": f"{folder}:{os.getcwd()}"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('as torchrun does')", 1),
        ("told.write_text('75 SIGTERM')", 75),
        ("told.write_text('78'); raise ValueError('as torchrun does')", 78),
        ("told.write_text('0'); sys.exit(1)", 0),
    ],
)
def test_the_status_is_what_a_rank_wrote_or_else_the_launchers_own(
    tmp_path: Path, body: str, status: int
) -> None:
    done = launch(tmp_path, body)
    assert done.returncode == status, done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)


def test_ranks_that_left_for_another_machine_meet_again_and_then_end(tmp_path: Path) -> None:
    told = """
count = Path("count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
if len(count.read_text()) < 3:
    told.write_text("75 SIGTERM")
"""
    done = launch(tmp_path, f"os.chdir({str(tmp_path)!r})" + told, "--rejoin", "ranks")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "count").read_text() == "xxx"
    assert done.stderr.count("meeting those that are there") == 2


@pytest.mark.parametrize(
    "body",
    [
        "told.write_text('75 the time limit of run.time_limit_s')",
        "told.write_text('75 SIGTERM'); error = ValueError(); error.sigval = 15; raise error",
    ],
    ids=["time limit", "told itself"],
)
def test_who_left_for_good_does_not_meet_again(tmp_path: Path, body: str) -> None:
    done = launch(tmp_path, body, "--rejoin", "ranks")
    assert done.returncode == 75, done.stderr
    assert "meeting" not in done.stderr


def test_a_78_ends_torchrun_although_it_has_restarts_left(tmp_path: Path) -> None:
    body = f"""
with open({str(tmp_path / "starts")!r}, "a") as file:
    file.write("x")
if os.environ["LOCAL_RANK"] == "0":
    told.write_text("78")
    time.sleep(60)
else:
    time.sleep(60)
"""
    done = launch(tmp_path, body, *TORCHRUN, "--max-restarts", "9")
    assert done.returncode == 78, done.stderr
    assert (tmp_path / "starts").read_text() == "xx"


def test_a_sigterm_reaches_the_ranks_and_their_status_is_the_launchers(tmp_path: Path) -> None:
    body = f"""
import signal
def leave(*_):
    told.write_text("75 SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
Path({str(tmp_path)!r}, "ready" + os.environ["LOCAL_RANK"]).touch()
time.sleep(60)
"""
    (tmp_path / "ranks.py").write_text(RANK + body)
    command = [sys.executable, "-m", "llmtrain.cli.launcher", "--rejoin", *TORCHRUN, tmp_path / "ranks.py"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 75, text


def test_a_silence_that_is_no_number_is_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "", AGENT_SILENCE_S="5m")
    assert (done.returncode, done.stderr) == (
        2,
        "error: AGENT_SILENCE_S=5m must be a number of seconds, 1 or more\n",
    )


def test_connections_are_bounded_and_nothing_else_is_touched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            before = set(os.listdir("/proc/self/fd"))
            _bound_silence(7)
            assert set(os.listdir("/proc/self/fd")) == before
            for each in (one, other):
                assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
            one.sendall(b"still open")
            assert other.recv(10) == b"still open"
