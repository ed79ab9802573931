"""The launch scripts of one machine with real ranks on its CPU; tests/hosts has those of several."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from data_folder import train_arguments, wait_for, write_data_folder

from llmtrain.checkpoint.find import newest_checkpoint
from llmtrain.loader.ledger import LEDGER_NAME, read_ledger
from llmtrain.tracking.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
DDP = ("parallel.engine=accelerate", "parallel.zero_stage=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    own = {"NPROC": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [REPOSITORY / "launch" / script, *arguments],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(script: str, *arguments: str, **environment: str) -> tuple[int, str]:
    process = start(script, *arguments, **environment)
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]


def num_ranks(run: Path) -> list[int]:
    return [attempt.world_size for attempt in read_ledger(run / LEDGER_NAME).attempts]


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks under launch/single_node.sh, with DDP."""
    run = tmp_path_factory.mktemp("single") / "run"
    status, text = launch("single_node.sh", *train_arguments(data, run, *DDP)[1:])
    assert status == 0, text
    assert num_ranks(run) == [2]
    return run


@pytest.mark.slow
def test_elastic_on_one_machine_is_the_same_run(data: Path, single: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = train_arguments(data, tmp_path / "run", *DDP)[1:]
    meet = {"NNODES": "1:1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    status, text = launch("elastic.sh", *words, **meet)
    assert status == 0, text
    assert losses(tmp_path / "run") == losses(single)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [DDP, ("parallel.engine=deepspeed", "parallel.zero_stage=1")])
def test_accelerate_starts_either_engine(
    data: Path, single: Path, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    status, text = launch("accelerate.sh", *train_arguments(data, run, *engine)[1:])
    assert status == 0, text
    assert num_ranks(run) == [2]
    if engine == DDP:
        assert losses(run) == losses(single)
    assert losses(run) == pytest.approx(losses(single), rel=1e-5)
    assert "has no effect" not in text


@pytest.mark.slow
def test_one_gpu_is_one_rank(data: Path, single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, text = launch("one_gpu.sh", *train_arguments(data, run, *DDP)[1:])
    assert status == 0, text
    assert num_ranks(run) == [1]
    assert losses(run) == pytest.approx(losses(single), rel=1e-5)


@pytest.mark.slow
def test_accelerate_told_to_leave_saves_and_ends_with_75(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ("train.total_tokens=9000000", "data.max_epochs=9999", "train.eval_every_steps=0")
    process = start("accelerate.sh", *train_arguments(data, run, *DDP, *long)[1:])
    try:
        wait_for(lambda: newest_checkpoint(run / "checkpoints") is not None, timeout_s=120)
    finally:
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in lines if line["kind"] == "checkpoint"][-1] == steps[-1]
    assert "Traceback" not in text
