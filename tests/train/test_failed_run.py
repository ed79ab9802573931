"""What a run that failed leaves: a capsule that does the step again, and in no file a secret."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard
from data_folder import train_arguments, write_data_folder

from llmtrain.cli.capsule import replay_capsule
from llmtrain.errors import EXIT_FAILED
from llmtrain.tracking.metrics import read_metrics
from llmtrain.train.capsule import read_capsule

if TYPE_CHECKING:
    from conftest import Launcher

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedByATestOfOurs",
    "AWS_SECRET_ACCESS_KEY": "planted+secret/of+a+test",
    "DATABASE_PASSWORD": "planted-password-of-a-test",
}


@pytest.fixture(scope="module")
def failed(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that diverged on two ranks, and what it printed."""
    run = tmp_path_factory.mktemp("failed") / "run"
    arguments = train_arguments(
        data,
        run,
        *("optimizer.peak_lr=1e30", "train.grad_clip=0", "save.every_steps=1", "save.in_background=false"),
        "tracking.wandb=offline",
    )
    status, text = launcher.run(arguments, num_ranks=2, **SECRETS)
    assert status == EXIT_FAILED, text
    return run, text


def test_a_diverged_step_is_done_again_from_its_capsule(failed: tuple[Path, str]) -> None:
    run, text = failed
    events = {line["what"]: line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "event"}
    event = events["capsule"]
    assert event["why"] == "diverged"
    assert event["num_left_out"] == 0, text
    path = run / "capsules" / event["file"]
    assert event["num_bytes"] == path.stat().st_size
    assert f"`llmtrain replay capsule={path}` does the step again" in text
    found = replay_capsule(path, checkpoint=None, device=None, precision=None)
    assert found.step == event["step"] == events["diverged"]["step"]
    assert found.weights_step == found.step - 1
    assert found.error is not None
    assert found.error.startswith("DivergedError: loss=")
    assert found.again.first_non_finite is not None
    assert "blocks." in found.again.first_non_finite


def test_no_file_of_a_run_holds_a_secret_of_its_environment(failed: tuple[Path, str]) -> None:
    run, text = failed
    seen = set()
    for path in (path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".zst":
            content += zstandard.ZstdDecompressor().stream_reader(content).read()
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{path} holds {name}"
        seen.add(path.suffix or path.name)
    assert {".wandb", ".zst", ".yaml", ".jsonl", ".json", ".lock"} <= seen, (
        "not all kinds of files were there"
    )
    assert not [name for name, value in SECRETS.items() if value in text]


def test_a_step_that_could_not_be_read_leaves_a_capsule_too(launcher: Launcher, tmp_path: Path) -> None:
    data = write_data_folder(tmp_path / "data")
    for shard in (data / "shards/test").glob("train-*.bin"):
        content = bytearray(shard.read_bytes())
        content[:2] = b"\xff\xff"  # no id of the vocabulary
        shard.write_bytes(content)
    run = tmp_path / "run"
    status, text = launcher.run(
        train_arguments(data, run, "data.verify=none", "train.total_tokens=13056", "data.max_epochs=9")
    )
    assert status == EXIT_FAILED, text
    [path] = (run / "capsules").iterdir()
    facts = read_capsule(path).facts
    assert facts.why == "failed"
    assert facts.error is not None
    assert "65535" in facts.error
    assert any(each.startswith("rows: DataError") for each in facts.left_out)
