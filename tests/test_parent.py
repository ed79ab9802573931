"""Ranks whose starter is gone."""

from __future__ import annotations

import os
import subprocess
import sys

from llmtrain.parent import PARENT_VARIABLE

CHILD = """
import sys
from llmtrain.parent import end_with_parent
end_with_parent()
print("begun", flush=True)
sys.stdin.read()
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    read, write = os.pipe()  # the child would wait for us: we never close our end before it has ended
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdin=read, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        assert parent.stdout.read() == "", "its end closes the last writer of the pipe"
    os.close(read)
    os.close(write)


def test_a_child_whose_parent_ended_before_it_asked_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {PARENT_VARIABLE: "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "the process that started this rank has ended\n")
