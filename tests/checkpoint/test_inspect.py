"""`llmtrain inspect checkpoint`: contents, the layout that wrote them, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.inspect import inspect_checkpoint
from llmtrain.checkpoint.write import ALONE, save_checkpoint
from llmtrain.cli.inspect_checkpoint import InspectCheckpointConfig, show
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import CheckpointError

STATE = {
    "tokens": 4096,
    "targets": 4000,
    "position": 8,
    "eval_loss": 2.5,
    "world_size": 8,
    "config": {
        "parallel": {"pp_size": 2, "cp_size": 1, "tp_size": 2, "zero_stage": 1, "engine": "deepspeed"},
        "train": {"precision": "bf16"},
    },
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (3, 5):
        pieces = [
            Piece("weight", "w", (4, 3), 0, np.zeros(12, np.float32)),
            Piece("weight", "b", (3,), 0, np.ones(3, np.float32)),
            Piece("exp_avg", "w", (4, 3), 0, np.zeros(12, np.float32)),
        ]
        save_checkpoint(
            tmp_path / "checkpoints", step=step, pieces=pieces, state=STATE, ranks=ALONE, config=SaveConfig()
        )
    return tmp_path


def test_the_newest_of_a_run_is_told_with_the_layout_that_wrote_it(run: Path) -> None:
    found = inspect_checkpoint(run, verify=True)
    assert (found.step, found.steps, found.problems) == (5, [3, 5], [])
    assert (
        found.facts["written by"] == "pp_size=2 cp_size=1 tp_size=2 dp_size=2 engine=deepspeed zero_stage=1"
    )
    names = ("tokens of the budget", "valid targets", "held-out loss", "precision")
    assert [found.facts[name] for name in names] == [4096, 4000, 2.5, "bf16"]
    assert "attempt" not in found.facts, "it is not there"
    exp_avg, weight = found.kinds
    assert (exp_avg.kind, exp_avg.num_elements) == ("exp_avg", 12)
    assert (weight.num_tensors, weight.num_elements, weight.num_bytes) == (2, 15, 60)
    assert (weight.largest, weight.largest_shape, weight.dtypes) == ("w", [4, 3], ["float32"])
    (file,) = found.files
    assert (file.path, file.num_pieces) == ("rank-00000.safetensors", 3)
    assert inspect_checkpoint(run / "checkpoints" / "step-00000003", verify=True).step == 3


def test_every_damaged_piece_is_named_and_the_exit_status_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "step-00000005" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # exp_avg
    content[-60] ^= 1  # b
    path.write_bytes(content)
    assert inspect_checkpoint(run, verify=False).problems == []
    with pytest.raises(SystemExit) as left:
        show(InspectCheckpointConfig(path=str(run)))
    assert left.value.code == 1
    told = capsys.readouterr().out
    assert f"{path} is damaged: weight b[0:3] at byte" in told
    assert f"{path} is damaged: exp_avg w[0:12] at byte" in told
    assert "1 files" in told
    assert "every byte compared with its hash: 1 damaged; beside it: step 3" in told
    with pytest.raises(SystemExit):
        show(InspectCheckpointConfig(path=str(run), format=OutputFormat.json))
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_a_whole_one_is_shown_and_json_has_all_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(InspectCheckpointConfig(path=str(run / "checkpoints"), verify=False))
    told = capsys.readouterr().out
    assert "sizes compared, contents not: 0 damaged" in told
    assert "there" in told
    show(InspectCheckpointConfig(path=str(run), format=OutputFormat.json))
    assert json.loads(capsys.readouterr().out)["kinds"][1]["kind"] == "weight"


def test_a_folder_without_a_checkpoint_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no finished checkpoint in .*; give path=RUN_FOLDER"):
        inspect_checkpoint(tmp_path, verify=True)
