"""A rank that dies while a run starts ends the run soon, and every other rank says which it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import REPOSITORY, free_port

from llmtrain.errors import EXIT_FAILED
from llmtrain.train.roll_call import some

WORKER = Path(__file__).with_name("roll_call_worker.py")
SILENCE_S = 3


def start(fates: str) -> list[subprocess.Popen[str]]:
    ranks = range(fates.count(",") + 1)
    shared = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), fates, str(SILENCE_S)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]


def outcome(processes: list[subprocess.Popen[str]], *, but: int | None) -> list[tuple[int, str]]:
    """Status and output of every rank but one, each within 30 s."""
    deadline = time.monotonic() + 40
    told = []
    try:
        for rank, process in enumerate(processes):
            if rank != but:
                text, _ = process.communicate(timeout=deadline - time.monotonic())
                told.append((process.returncode, text))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return told


@pytest.mark.parametrize("fate", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_rank_that_dies_or_hangs_is_named_by_all_others(fate: str) -> None:
    told = outcome(start(f"waits,{fate},waits"), but=1)
    for status, text in told:
        assert status == EXIT_FAILED, text
        assert "rank 1 (" in text, text
        assert f"has not been heard for {SILENCE_S} s while the run was starting" in text


def test_that_rank_0_dies_is_said_by_all_others() -> None:
    for status, text in outcome(start("dies,waits,waits"), but=0):
        assert status == EXIT_FAILED, text
        assert "rank 0, which keeps the store where ranks meet, is gone" in text


def test_ranks_that_work_longer_than_the_silence_are_left_alone() -> None:
    for status, text in outcome(start("works,works"), but=None):
        assert status == 0, text


def test_a_long_list_of_ranks_is_cut() -> None:
    assert some([3, 5]) == "3, 5"
    assert some(list(range(20))) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
