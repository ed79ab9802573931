"""What each level of train.determinism sets, promises and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from data_folder import train_arguments

from llmtrain.checkpoint.find import list_checkpoints
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.errors import EXIT_FAILED, ConfigError
from llmtrain.tracking.metrics import read_metrics
from llmtrain.train import determinism
from llmtrain.train.config import Determinism

if TYPE_CHECKING:
    from conftest import Launcher

SHOW = """
import json, os, sys, torch
from llmtrain.train import determinism
from llmtrain.train.config import Determinism
determinism.apply(Determinism[sys.argv[1]])
facts = determinism.facts(Determinism[sys.argv[1]], torch.device("cpu"))
print(json.dumps({
    "algorithms": torch.are_deterministic_algorithms_enabled(),
    "fill": torch.utils.deterministic.fill_uninitialized_memory,
    "benchmark": torch.backends.cudnn.benchmark,
    "cudnn": torch.backends.cudnn.deterministic,
    "facts": facts,
}))
"""
SET_BY_US = {*determinism.BITWISE}


def applied(level: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in SET_BY_US}
    return subprocess.run(
        [sys.executable, "-c", SHOW, level],
        capture_output=True,
        text=True,
        check=False,
        env=clean | environment,
    )


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


# what a level sets


@pytest.mark.parametrize(
    ("level", "deterministic", "fill", "environment"),
    [
        ("fast", False, True, {}),  # filling counts with deterministic algorithms alone
        ("reproducible", True, False, determinism.REPRODUCIBLE),
        ("bitwise", True, True, determinism.BITWISE),
    ],
)
def test_a_level_sets_what_the_table_says(
    level: str, deterministic: bool, fill: bool, environment: dict[str, str]
) -> None:
    done = applied(level)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["algorithms"], told["cudnn"], told["fill"]) == (deterministic, deterministic, fill)
    assert told["benchmark"] is False
    assert told["facts"]["level"] == level
    found = told["facts"]["environment"]
    assert {name: value for name, value in found.items() if name in SET_BY_US} == environment


def test_a_variable_of_the_users_stays_and_is_recorded() -> None:
    told = json.loads(applied("bitwise", NCCL_ALGO="Tree", OMP_NUM_THREADS="1").stdout)
    assert told["facts"]["environment"]["NCCL_ALGO"] == "Tree"
    assert told["facts"]["num_threads"] == 1
    done = applied("bitwise", CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert done.returncode != 0
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0 with train.determinism=bitwise: set it to :4096:8 or" in done.stderr


def test_an_operation_without_a_deterministic_form_is_named(torch_as_it_was: None) -> None:
    torch.use_deterministic_algorithms(True)
    named = r"train.determinism=reproducible: put_ has no deterministic form; .* train.determinism=fast"
    with pytest.raises(ConfigError, match=named), determinism.named_errors(Determinism.reproducible):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"^other$"), determinism.named_errors(Determinism.bitwise):
        raise RuntimeError("other")


# what bitwise refuses

FACTS = {
    "level": "bitwise",
    "num_threads": 4,
    "versions": {"torch": "2"},
    "environment": {"NCCL_ALGO": "Ring"},
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_threads": 8}, "num_threads 4 -> 8"),
        ({"versions": {"torch": "3"}}, "torch 2 -> 3"),
        (
            {"environment": {"NCCL_ALGO": "Tree", "MKL_CBWR": "AVX2"}},
            "NCCL_ALGO Ring -> Tree, MKL_CBWR None -> AVX2",
        ),
    ],
)
def test_bitwise_refuses_ranks_and_restarts_that_are_not_alike(change: dict[str, Any], told: str) -> None:
    other = FACTS | change
    with pytest.raises(ConfigError, match=f"rank 1 is not like rank 0: {told}; take hosts that are alike"):
        determinism.refuse_unlike(Determinism.bitwise, [FACTS, other], None)
    with pytest.raises(ConfigError, match=f"not where the checkpoint was made: {told}; set it back"):
        determinism.refuse_unlike(Determinism.bitwise, [other, other], FACTS)
    determinism.refuse_unlike(Determinism.reproducible, [FACTS, other], FACTS)
    determinism.refuse_unlike(Determinism.bitwise, [other], FACTS | {"level": "fast"})
    determinism.refuse_unlike(Determinism.bitwise, [FACTS, FACTS], FACTS)


def test_compiled_blocks_are_refused_at_bitwise(data: Path, tmp_path: Path) -> None:
    arguments = train_arguments(
        data, tmp_path / "run", "train.compile_blocks=true", "train.determinism=bitwise"
    )
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *arguments, "check_only=true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_FAILED
    assert "train.compile_blocks=true with train.determinism=bitwise: the compiler may choose" in done.stderr


# what a level promises


def numbers(run: Path) -> tuple[dict[int, tuple[float, float]], dict[tuple[str, str], bytes]]:
    """Loss and norm of every step, and the last checkpoint's tensors."""
    steps = {
        line["step"]: (line["loss"], line["grad_norm"])
        for line in read_metrics(run / "metrics.jsonl")
        if line["kind"] == "step"
    }
    reader = CheckpointReader(run / "checkpoints" / "step-00000012")
    tensors = {
        (kind, name): reader.read(kind, name).tobytes()
        for kind in reader.kinds
        for name in reader.shapes(kind)
    }
    return steps, tensors


def cut_after(run: Path, step: int, into: Path) -> Path:
    """What a kill after that step's checkpoint would have left."""
    shutil.copytree(run, into)
    for later in list_checkpoints(into / "checkpoints"):
        if later > step:
            shutil.rmtree(into / "checkpoints" / f"step-{later:08d}")
    return into


@pytest.mark.parametrize("level", [pytest.param("reproducible", marks=pytest.mark.slow), "bitwise"])
def test_two_runs_and_a_restart_have_the_same_bits(
    launcher: Launcher, data: Path, tmp_path: Path, level: str
) -> None:
    def go(run: Path, *more: str) -> Path:
        settings = [
            "save.keep_last=9",
            f"train.determinism={level}",
            "train.precision=bf16",
            "train.dropout=0.1",
        ]
        status, text = launcher.run(train_arguments(data, run, *settings, *more), num_ranks=2)
        assert status == 0, text
        return run

    first = go(tmp_path / "first")
    again = go(tmp_path / "again")
    cut = go(cut_after(first, 4, tmp_path / "cut"), "run.intent=resume")
    assert numbers(again) == numbers(first)
    assert numbers(cut) == numbers(first)


ONE_PROCESS = ("save.keep_last=9", "parallel.engine=accelerate", "parallel.zero_stage=0")


def alone(data: Path, run: Path, *overrides: str, threads: int) -> tuple[int, str]:
    """A process of its own: a fork of one that has torch has the threads of that."""
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *train_arguments(data, run, *ONE_PROCESS, *overrides)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_two_runs_on_several_threads_have_the_same_bits(data: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        status, text = alone(data, tmp_path / name, "train.determinism=bitwise", threads=2)
        assert status == 0, text
    cut = cut_after(tmp_path / "first", 4, tmp_path / "cut")
    status, text = alone(data, cut, "train.determinism=bitwise", "run.intent=resume", threads=2)
    assert status == 0, text
    assert numbers(tmp_path / "again") == numbers(tmp_path / "first") == numbers(cut)


@pytest.fixture(scope="module")
def bitwise(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("bitwise") / "run"
    status, text = launcher.run(train_arguments(data, run, *ONE_PROCESS, "train.determinism=bitwise"))
    assert status == 0, text
    return run


def test_the_level_and_what_it_rests_on_are_recorded(bitwise: Path) -> None:
    [attempt] = json.loads((bitwise / "run.json").read_text())["attempts"]
    state = CheckpointReader(bitwise / "checkpoints" / "step-00000012").state
    assert attempt["determinism"] == state["determinism"]
    assert state["determinism"]["level"] == "bitwise"
    assert state["determinism"]["num_threads"] == 1
    assert state["determinism"]["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        state["determinism"]["versions"]["torch"] == torch.__version__
    )


@pytest.mark.slow
def test_a_bitwise_run_does_not_go_on_with_other_threads(data: Path, bitwise: Path, tmp_path: Path) -> None:
    cut = cut_after(bitwise, 8, tmp_path / "cut")
    status, text = alone(data, cut, "train.determinism=bitwise", "run.intent=resume", threads=2)
    assert status == EXIT_FAILED
    assert "this is not where the checkpoint was made: num_threads 1 -> 2; set it back, or" in text
    status, text = alone(data, cut, "train.determinism=reproducible", "run.intent=resume", threads=2)
    assert status == 0, text
    assert "resuming with train.determinism=reproducible, which was bitwise" in text
    for step, (loss, _) in numbers(cut)[0].items():
        assert loss == pytest.approx(numbers(bitwise)[0][step][0], rel=1e-5)  # the order of sums


def test_a_bitwise_run_does_not_go_on_in_another_layout(
    launcher: Launcher, data: Path, bitwise: Path, tmp_path: Path
) -> None:
    cut = cut_after(bitwise, 8, tmp_path / "cut")
    arguments = train_arguments(data, cut, *ONE_PROCESS, "run.intent=resume", "train.micro_batch_rows=4")
    status, text = launcher.run([*arguments, "train.determinism=bitwise"])
    assert status == EXIT_FAILED
    assert "train.micro_batch_rows=4, but step 8 was trained with 2, and train.determinism=bitwise" in text
    status, text = launcher.run(arguments)
    assert status == 0, text
