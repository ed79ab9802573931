"""Before an elastic launch: every number of machines that may come must be able to share the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_folder import train_arguments, write_data_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))


def check(data: Path, run: Path, nodes: str, ranks: int, *more: str) -> tuple[int, str]:
    words = train_arguments(data, run, *more)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.elastic", nodes, str(ranks), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_an_odd_number_of_machines_that_cannot_share_the_batch_is_refused_by_name(
    data: Path, tmp_path: Path
) -> None:
    status, text = check(data, tmp_path / "run", "1:4", 1)  # global batch of 8 rows, micro batches of 2
    assert status == 2
    assert "error: NNODES=1:4: 3 machines of 1 ranks cannot share this run, 1, 2, 4 can; with 3, " in text
    assert "train.global_batch_rows=8" in text
    assert not (tmp_path / "run").exists()


def test_three_machines_are_welcome_where_they_divide_the_batch(data: Path, tmp_path: Path) -> None:
    more = ["train.global_batch_rows=24", "train.total_tokens=24576", "data.max_epochs=99"]
    status, text = check(data, tmp_path / "run", "1:4", 1, *more)
    assert status == 0, text
    assert "ok       nothing stands in the way of this run" in text


@pytest.mark.parametrize(
    ("nodes", "more", "message"),
    [
        ("4:2", [], "error: NNODES=4:2 must be MIN:MAX, the smaller number first"),
        (
            "1:2",
            ["parallel.world_size=2"],
            "error: parallel.world_size=2 with NNODES=1:2: an elastic run has as many ranks as come; set "
            "parallel.world_size=null",
        ),
        ("1:2", ["parallel.tp_size=4"], "1 machines of 2 ranks cannot share this run, 2 can; with 1, "),
    ],
)  # fmt: skip
def test_what_else_is_refused(data: Path, tmp_path: Path, nodes: str, more: list[str], message: str) -> None:
    status, text = check(data, tmp_path / "run", nodes, 2, *more)
    assert status == 2
    assert message in text
