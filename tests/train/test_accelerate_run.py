"""`llmtrain train` without DeepSpeed: whole runs, and runs that change the engine on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from data_folder import train_arguments

from llmtrain.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Finished, Launcher

DDP = ("parallel.engine=accelerate", "parallel.zero_stage=0")
FSDP2 = ("parallel.engine=accelerate", "parallel.zero_stage=2")
FSDP3 = ("parallel.engine=accelerate", "parallel.zero_stage=3")
DEEPSPEED = ("parallel.engine=deepspeed", "parallel.zero_stage=2")


def step_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]


def held_out_losses(folder: Path) -> list[float]:
    return [line["eval_loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "eval"]


def test_ddp_trains_like_deepspeed(
    launcher: Launcher, data: Path, tmp_path: Path, finished: Finished
) -> None:
    status, text = launcher.run(train_arguments(data, tmp_path / "run", *DDP), num_ranks=2)
    assert status == 0, text
    expected = step_losses(finished.folder)
    assert len(expected) == 12
    assert expected[-1] < expected[0] - 0.5
    assert step_losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    held_out = held_out_losses(finished.folder)
    assert len(held_out) == 2
    assert held_out_losses(tmp_path / "run") == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize("stage", [FSDP2, FSDP3])
def test_bf16_trains(launcher: Launcher, data: Path, tmp_path: Path, stage: tuple[str, str]) -> None:
    arguments = train_arguments(data, tmp_path / "run", *stage, "train.precision=bf16")
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == 0, text
    assert step_losses(tmp_path / "run")[-1] < 3.2


@pytest.fixture(scope="module")
def whole(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of 12 steps at a constant rate, in one process under DeepSpeed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, text = launcher.run(train_arguments(data, folder, *DEEPSPEED, "schedule.kind=constant"))
    assert status == 0, text
    losses = step_losses(folder)
    assert len(losses) == 12
    return losses


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        ((1, DEEPSPEED), (2, FSDP3)),
        pytest.param((2, DEEPSPEED), (1, DDP), marks=pytest.mark.slow),
        pytest.param((2, FSDP2), (1, DEEPSPEED), marks=pytest.mark.slow),
        ((1, DDP), (2, DEEPSPEED)),
    ],
    ids=["deepspeed-fsdp", "deepspeed-ddp", "fsdp-deepspeed", "ddp-deepspeed"],
)
def test_a_run_goes_on_under_another_engine_on_other_ranks(
    launcher: Launcher,
    data: Path,
    tmp_path: Path,
    whole: list[float],
    begins: tuple[int, tuple[str, str]],
    goes_on: tuple[int, tuple[str, str]],
) -> None:
    same = ["run.intent=fresh_or_resume", "schedule.kind=constant"]
    for (ranks, engine), more in ((begins, ["train.total_tokens=2048"]), (goes_on, [])):  # 8 steps, then 4
        arguments = train_arguments(data, tmp_path / "run", *same, *engine, *more)
        status, text = launcher.run(arguments, num_ranks=ranks)
        assert status == 0, text
    assert step_losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)
