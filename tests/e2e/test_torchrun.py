"""Under the real torchrun: a stop saves, a kill leaves nothing behind, a mistake is said once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from data_folder import train_arguments, wait_for, write_data_folder

from llmtrain.checkpoint.find import newest_checkpoint
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.errors import EXIT_FAILED
from llmtrain.tracking.metrics import read_metrics
from llmtrain.train.deadline import EXIT_AGAIN

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """launch/single_node.sh with two ranks in the middle of a run that would last for minutes."""
    data, run = write_data_folder(tmp_path / "data"), tmp_path / "run"
    arguments = train_arguments(
        data, run, "train.total_tokens=9000000", "data.max_epochs=9999", "train.eval_every_steps=0"
    )
    process = subprocess.Popen(
        [REPOSITORY / "launch" / "single_node.sh", *arguments[1:]],
        env=os.environ | {"NPROC": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: newest_checkpoint(run / "checkpoints") is not None)
        yield process, run
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def last_step(run: Path) -> int:
    return max(line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step")


def test_sigterm_to_torchrun_saves_the_last_step(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, run = started
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_AGAIN
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert CheckpointReader(newest).step == last_step(run)
    assert [line.get("what") for line in read_metrics(run / "metrics.jsonl")][-1] == "stopped"


def test_ranks_die_with_a_torchrun_that_is_killed(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, _ = started
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 2
    process.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    training = [rank for rank in alive if "llmtrain.cli.main" in " ".join(rank.cmdline())]
    assert not training, "a rank trains on without its launcher"
    assert gone


def test_a_mistake_is_said_once_before_any_rank_starts(tmp_path: Path) -> None:
    arguments = train_arguments(tmp_path / "nowhere", tmp_path / "run")
    done = subprocess.run(
        [REPOSITORY / "launch" / "single_node.sh", *arguments[1:]],
        env=os.environ | {"NPROC": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_FAILED
    assert done.stderr.startswith(f"error: data folder {tmp_path / 'nowhere'} does not exist")
    assert done.stderr.count("error:") == 1
