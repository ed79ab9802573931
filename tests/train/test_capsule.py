"""A failed step in an archive, and done again from it, without the data."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zstandard
from data_folder import Finished, train_arguments

from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.cli import capsule as cli_capsule
from llmtrain.cli import replay
from llmtrain.cli.restore import Precision
from llmtrain.cli.run_config import run_config
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.loader.dataset import Row
from llmtrain.loader.ledger import read_ledger
from llmtrain.loader.open import open_data
from llmtrain.tracking.metrics import read_metrics
from llmtrain.train import capsule as module
from llmtrain.train.capsule import Capsules, Scrubber, read_capsule
from llmtrain.train.config import Precision as TrainPrecision
from llmtrain.train.rerun import Rerun

if TYPE_CHECKING:
    from conftest import Launcher

SECRET = "planted-secret-0123456789"


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    return shutil.copytree(finished.folder, tmp_path / "run")


def recorded(run: Path, step: int) -> dict[str, Any]:
    lines = read_metrics(run / "metrics.jsonl")
    return next(line for line in lines if line["kind"] == "step" and line["step"] == step)


def capsules_of(run: Path, step: int) -> Capsules:
    """The writer as it stands when a run is in that step, with a config whose data is nowhere."""
    cfg = run_config(run)
    cfg = replace(cfg, run=replace(cfg.run, folder=str(run)))
    text = (run / "config.yaml").read_text().replace(str(cfg.data.folder), "/nowhere")
    assert "/nowhere" in text
    capsules = Capsules(
        cfg,
        open_data(cfg.data, seed=cfg.run.seed),
        attempt=1,
        world_size=1,
        config_text=text,
        source=None,
    )
    entry = next(each for each in read_ledger(run / "ledger.jsonl").steps if each.step == step)
    positions = np.arange(entry.first, entry.last + 1)
    capsules.begin_step(step, positions=positions)
    capsules.note(**{name: recorded(run, step)[name] for name in ("lr", "loss", "grad_norm")})
    return capsules


def written(run: Path, step: int) -> Path:
    """A capsule of a step that did not fail: what it gives again is known."""
    done = capsules_of(run, step).write("diverged", error="it did")
    assert done is not None
    assert done.left_out == []
    return done.path


def again(path: Path, **settings: Any) -> cli_capsule.ReplayedCapsule:
    return cli_capsule.replay_capsule(
        path, **{"checkpoint": None, "device": None, "precision": None, **settings}
    )


# what a capsule gives again


@pytest.mark.parametrize(("step", "weights_step"), [(3, 0), (5, 4), (11, 8)])
def test_a_step_is_done_again_without_the_data_and_the_run(run: Path, step: int, weights_step: int) -> None:
    path = written(run, step).rename(run.parent / "taken.tar.zst")
    record = recorded(run, step)
    shutil.rmtree(run)
    found = again(path)
    assert found.weights_step == weights_step
    assert found.again.loss == pytest.approx(record["loss"], abs=1e-5)  # the order of sums
    assert found.again.grad_norm == pytest.approx(record["grad_norm"], rel=1e-4)
    assert (found.recorded_loss, found.recorded_grad_norm) == (record["loss"], record["grad_norm"])
    assert found.again.first_non_finite is None
    assert found.left_out == []
    if step - 1 > weights_step:
        assert found.max_loss_difference is not None
        assert found.max_loss_difference < 1e-5
    assert len(found.rows) == 8
    assert [row.loss for row in found.rows] == sorted((row.loss for row in found.rows), reverse=True)
    mean = sum(row.loss * row.num_targets for row in found.rows) / found.again.num_valid
    assert mean == pytest.approx(found.again.loss, abs=1e-5)


@pytest.mark.parametrize(
    ("ranks", "overrides", "tolerance"),
    [
        (1, ["train.dropout=0.2", "optimizer.kind=muon", "parallel.zero_stage=0"], 1e-4),
        (2, ["train.precision=bf16", "model.family=gpt2", "model.max_positions=32"], 2e-2),
        (2, ["parallel.tp_size=2", "model.tie_embeddings=true"], 1e-5),
    ],
)
def test_other_runs_are_done_again_as_well(
    launcher: Launcher, data: Path, tmp_path: Path, ranks: int, overrides: list[str], tolerance: float
) -> None:
    run = tmp_path / "run"
    status, text = launcher.run(
        train_arguments(data, run, "train.total_tokens=1536", "save.every_steps=3", *overrides),
        num_ranks=ranks,
    )
    assert status == 0, text
    found = again(written(run, 6))
    assert found.weights_step == 3
    assert found.again.loss == pytest.approx(recorded(run, 6)["loss"], rel=tolerance)
    assert found.again.grad_norm == pytest.approx(recorded(run, 6)["grad_norm"], rel=10 * tolerance)


def test_the_capsule_holds_what_a_reader_asks_for(run: Path) -> None:
    (run / "ranks").mkdir(exist_ok=True)
    (run / "ranks" / "rank-00000.beat").write_text('{"phase": "backward"}')
    capsule = read_capsule(written(run, 11))
    facts = capsule.facts
    assert (facts.run, facts.step, facts.attempt, facts.why, facts.error) == (
        "test",
        11,
        1,
        "diverged",
        "it did",
    )
    assert {"git_commit", "versions", "command_line", "host"} <= facts.started.keys()
    assert [each.step for each in facts.steps] == [9, 10, 11]
    assert facts.checkpoint is not None
    assert facts.checkpoint["path"].endswith("step-00000008")
    reader = CheckpointReader(Path(facts.checkpoint["path"]))
    assert facts.checkpoint["manifest_sha256"] == reader.manifest_hash
    assert "peak_lr: 0.01" in capsule.text("config.yaml")
    assert capsule.text("ranks/rank-00000.beat") == '{"phase": "backward"}'
    assert json.loads(capsule.text("metrics.jsonl").splitlines()[-1])["kind"] == "event"
    assert json.loads(capsule.text("environment.json"))["OMP_NUM_THREADS"] == "1"
    assert capsule.array("rows/places.npy").tolist() == list(range(64, 88))
    documents = json.loads(capsule.text("documents.json"))
    assert {each["position"] for each in documents} == set(range(80, 88))


def test_the_verb_shows_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(run, 11)
    replay.show(replay.ReplayRoot(capsule=str(path), worst=2))
    text = capsys.readouterr().out
    record = recorded(run, 11)
    assert "capsule of step 11, attempt 1 of test: diverged: it did" in text
    assert "steps 9 to 10 done again: losses differ from the run's by at most" in text
    assert f"the run recorded {record['loss']:.6f}" in text
    assert f"the run recorded {record['grad_norm']:.6f}" in text
    assert all(f"\n  {group} " in text for group in ("embedding", "blocks.0", "blocks.1", "final_norm"))
    assert "first that is not finite: none, all is" in text
    assert text.count(" targets  row ") == 2
    assert re.search(r"\d+ tokens of train-\d-\d+ in shards/test/train-0000\d", text)
    replay.show(replay.ReplayRoot(capsule=str(path), format=OutputFormat.json, precision=Precision.bf16))
    told = json.loads(capsys.readouterr().out)
    assert told["again"]["loss"] == pytest.approx(record["loss"], abs=0.02)
    squares = sum(norm**2 for norm in told["again"]["group_norms"].values())
    assert squares == pytest.approx(told["again"]["grad_norm"] ** 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "run=None and step=None: give both, or capsule=FILE"),
        ({"run": "x"}, "run=x and step=None: give both"),
        ({"capsule": "x", "run": "y", "rank": 0}, "run=y, rank=0: a capsule is of one step of one run"),
    ],
)
def test_a_replay_of_nothing_or_of_two_things_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replay.ReplayRoot(**settings)


# what is not finite


def first_non_finite(run: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: Any, value: float) -> str:
    path, read = written(run, 5), module.Capsule.read

    def broken(self: module.Capsule, kind: str, tensor: str) -> Any:
        values = np.array(read(self, kind, tensor))
        if (kind, tensor) == ("weight", name):
            values[at] = value
        return values

    monkeypatch.setattr(module.Capsule, "read", broken)
    found = again(path).again.first_non_finite
    assert found is not None
    return found


def test_a_weight_that_is_not_finite_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = first_non_finite(run, monkeypatch, "blocks.1.mlp.w_down.weight", (3, 4), np.inf)
    assert told == "weight blocks.1.mlp.w_down.weight, before the step: 1 of 2,048 elements"


def rerun_of(capsule: module.Capsule, run: Path) -> Rerun:
    cfg = cli_capsule.parsed(capsule.text("config.yaml"), run)
    device = torch.device("cpu")
    return Rerun(cfg, capsule.read, num_optimizer_steps=4, precision=TrainPrecision.fp32, device=device)


def watched(rerun: Rerun, capsule: module.Capsule) -> str:
    batches = cli_capsule._batches(capsule, capsule.facts.steps[-1])
    found = rerun.step(batches, lr=0.0, updates=False, watches=True).first_non_finite
    assert found is not None
    return found


def test_the_module_the_micro_batch_and_the_row_are_named(run: Path) -> None:
    capsule = read_capsule(written(run, 5))
    rerun, calls = rerun_of(capsule, run), []

    def spoil(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        calls.append(1)
        if len(calls) != 3:
            return None
        spoiled = inputs[0].clone()
        spoiled[1, 7, 3] = torch.inf
        return (spoiled,)

    rerun.model.blocks["1"].mlp.register_forward_pre_hook(spoil)
    told, place = watched(rerun, capsule), capsule.array("rows/places.npy")[2 * 2 + 1]
    assert told.startswith("the output of blocks.1.mlp.w_")
    assert " in micro batch 2: " in told
    assert told.endswith(f"in row {place} of the run")


def test_a_gradient_that_is_not_finite_is_named(run: Path) -> None:
    capsule = read_capsule(written(run, 5))
    rerun = rerun_of(capsule, run)
    rerun.model.blocks["1"].mlp.w_up.weight.register_hook(lambda gradient: gradient * torch.inf)
    told = watched(rerun, capsule)
    assert told.startswith("the gradient of blocks.1.mlp.w_up.weight in micro batch 0: ")


# secrets


def test_no_secret_of_the_environment_is_in_a_capsule(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("NCCL_SECRET", SECRET)
    monkeypatch.setenv("MY_DIARY", f"in prose: {SECRET}")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    facts = json.loads((run / "run.json").read_text())
    facts["attempts"][-1]["command_line"] = (
        f"llmtrain train x={SECRET} save.folder=s3://me:{SECRET[:9]}@store/x"
    )
    (run / "run.json").write_text(json.dumps(facts))
    (run / "ranks").mkdir(exist_ok=True)
    (run / "ranks" / "rank-00000.stack").write_text(f"in f(key={SECRET!r})")
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write(
            json.dumps({"kind": "event", "step": 12, "attempt": 1, "what": "x", "text": SECRET}) + "\n"
        )
    capsules = capsules_of(run, 11)
    done = capsules.write("failed", error=RuntimeError(f"401 for key {SECRET}"))
    assert done is not None
    raw = done.path.read_bytes()
    whole = zstandard.ZstdDecompressor().stream_reader(raw).read()
    assert SECRET.encode() not in raw + whole
    assert b"me:planted-s" not in whole
    capsule = read_capsule(done.path)
    assert capsule.text("ranks/rank-00000.stack") == "in f(key='<WANDB_API_KEY>')"
    environment = json.loads(capsule.text("environment.json"))
    assert environment["NCCL_DEBUG"] == "INFO"
    assert not {"WANDB_API_KEY", "NCCL_SECRET", "MY_DIARY"} & environment.keys()
    assert capsule.facts.error == "RuntimeError: 401 for key <WANDB_API_KEY>"
    assert "s3://<user>@store/x" in capsule.facts.started["command_line"]


def test_short_values_are_no_secrets() -> None:
    assert Scrubber({"HF_TOKEN": "no", "API_KEY": "01234567"}).text("no 01234567") == "no <API_KEY>"


# bounds


def test_a_large_model_stays_where_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_WEIGHTS_BYTES", 1000)
    path = written(run, 11)
    assert not [name for name in read_capsule(path).members if name.startswith("checkpoint/")]
    there = again(path)
    assert there.again.loss == pytest.approx(recorded(run, 11)["loss"], abs=1e-5)
    moved = run.parent / "elsewhere"
    (run / "checkpoints").rename(moved)
    with pytest.raises(
        CheckpointError, match=r"too large for its capsule: give checkpoint=FOLDER, a copy of .*"
    ):
        again(path)
    assert again(path, checkpoint=str(moved / "step-00000008")).again == there.again
    assert "is not the checkpoint" not in caplog.text
    other = again(path, checkpoint=str(moved))
    assert other.weights_step == 12
    assert "step-00000012 is not the checkpoint that" in caplog.text
    assert "the weights are those of step 12, not of step 10" in caplog.text


def test_steps_since_the_checkpoint_and_rows_are_left_out_where_they_are_too_many(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS_BYTES", 4 * 32 * 8)
    done = capsules_of(run, 11).write("spike")
    assert done is not None
    found = again(done.path)
    assert found.left_out == ["the steps since the checkpoint: more than 1 KiB of rows"]
    assert found.weights_step == 8
    assert "the steps between are not in the capsule" in caplog.text
    monkeypatch.setattr(module, "MAX_ROWS_BYTES", 4 * 32 * 3)
    done = capsules_of(run, 11).write("spike")
    assert done is not None
    found = again(done.path)
    assert "rows: 5 of 8" in found.left_out
    assert len(found.rows) == 3


def test_a_run_that_fails_again_and_again_does_not_fill_the_disk(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_CAPSULES", 1)
    written(run, 11)
    written(run, 11)
    capsules = capsules_of(run, 10)
    assert capsules.write("failed") is None
    assert (capsules.num_written, capsules.num_failed) == (0, 1)
    assert "no capsule of step 10: DataError:" in caplog.text
    assert "has 1 already; move some away" in caplog.text


def test_between_steps_there_is_none(run: Path) -> None:
    capsules = capsules_of(run, 11)
    capsules.end_step()
    capsules.note(loss=1.0)
    assert capsules.write("failed") is None
    assert not (run / "capsules").exists()


class Broken:
    """Rows that cannot be read."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.go_on = threading.Event()

    def read_many(self, _rows: Any) -> Row:
        if self.error is not None:
            raise self.error
        self.go_on.wait()
        raise OSError("too late")


@pytest.fixture
def hanging() -> Iterator[Broken]:
    rows = Broken(None)
    yield rows
    rows.go_on.set()


def test_rows_that_cannot_be_read_are_named_and_the_rest_is_there(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    capsules = capsules_of(run, 11)
    capsules.data = replace(capsules.data, train=Broken(OSError("no such disk")))  # type: ignore[arg-type]
    done = capsules.write("failed")
    assert done is not None
    assert done.left_out == read_capsule(done.path).facts.left_out
    assert [each.partition(":")[0] for each in done.left_out] == ["rows", "documents.json"]
    assert "not in it: rows: OSError: no such disk; documents.json: " in caplog.text
    assert "checkpoint/weight/embedding.weight.npy" in read_capsule(done.path).members
    with pytest.raises(DataError, match="holds no rows, for rows: OSError: no such disk"):
        again(done.path)


def test_rows_that_changed_since_are_named(run: Path) -> None:
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step" and line["step"] == 11:
            line["hash"] = "0" * 16
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = capsules_of(run, 11).write("failed")
    assert done is not None
    [told] = done.left_out
    assert told.startswith("rows as the step read them: their hash was 0000000000000000, and is ")


def test_a_file_system_that_hangs_does_not_hold_the_run(
    run: Path, hanging: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    capsules = capsules_of(run, 11)
    capsules.data = replace(capsules.data, train=hanging)  # type: ignore[arg-type]
    assert capsules.write("hang", time_limit_s=0.1) is None
    assert "no capsule of step 11: TimeoutError: not done after 0.1 s" in caplog.text


def test_when_the_time_is_up_the_rest_is_left_out(run: Path) -> None:
    done = capsules_of(run, 11).write("failed", time_limit_s=-0.5)
    assert done is not None
    left_out = read_capsule(done.path).facts.left_out
    assert left_out
    assert all(each.endswith("the time was up") for each in left_out)


def test_a_disk_that_refuses_is_told_and_not_raised(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "capsules").write_text("a file where the folder should be")
    assert capsules_of(run, 11).write("failed", error=ValueError("x")) is None
    assert "no capsule of step 11: " in caplog.text


# damage


def test_a_damaged_capsule_is_refused(run: Path) -> None:
    path = written(run, 5)
    with pytest.raises(DataError, match="cannot be read as a capsule: FileNotFoundError"):
        again(run / "nowhere.tar.zst")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as a capsule"):
        again(path)


def test_tokens_that_are_not_those_of_the_hash_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capsule = read_capsule(written(run, 5))
    steps = [replace(capsule.facts.steps[0], hash="0" * 16)]
    capsule.facts.steps = steps
    monkeypatch.setattr(cli_capsule, "read_capsule", lambda path: capsule)
    with pytest.raises(
        DataError, match=r"is damaged: the tokens of step 5 have the hash .*, not 0000000000000000"
    ):
        again(capsule.path)


def test_a_capsule_of_another_format_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(run, 5)
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    with pytest.raises(DataError, match="has capsule format_version=1, and this llmtrain reads 2"):
        again(path)


def test_a_capsule_without_a_checkpoint_asks_for_one(run: Path) -> None:
    marker = run / "checkpoints" / "step-00000008"
    for each in marker.iterdir():
        if each.is_file() and each.name.startswith("manifest"):
            each.write_text("{}")
    done = capsules_of(run, 11).write("failed")
    assert done is not None
    with pytest.raises(CheckpointError, match="names no checkpoint, for the checkpoint: CheckpointError"):
        again(done.path)
