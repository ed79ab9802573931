"""What a run does when something goes wrong while it runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from data_folder import train_arguments, wait_for, write_data_folder

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import checkpoint_path, list_checkpoints, newest_checkpoint
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.write import ALONE, save_checkpoint
from llmtrain.errors import EXIT_FAILED
from llmtrain.files import FolderLock
from llmtrain.loader.ledger import LEDGER_NAME, contradictions, read_ledger
from llmtrain.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Finished, Launcher


def test_a_run_records_its_config_commit_versions_and_command(finished: Finished) -> None:
    attempt = json.loads((finished.folder / "run.json").read_text())["attempts"][0]
    assert {"git_commit", "versions", "command_line", "host", "world_size"} <= attempt.keys()
    assert attempt["versions"]["torch"]
    assert "peak_lr: 0.01" in (finished.folder / "config.yaml").read_text()


def test_every_step_is_recorded_once_with_its_units(finished: Finished) -> None:
    steps = [line for line in read_metrics(finished.folder / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_wait_s", "mem_gib"} <= steps[
        0
    ].keys()
    assert "mfu" not in steps[0], "no peak was given: MFU must be left out"
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [line["position"] for line in steps] == [8 * step for step in range(1, 13)]
    assert all(8 * 32 / 2 < line["num_valid"] < 8 * 32 for line in steps), "documents end in every batch"
    assert [line["tokens"] for line in steps] == list(accumulate(line["num_valid"] for line in steps))
    for line in steps:
        assert line["tokens_per_s"] == pytest.approx(line["num_valid"] / line["step_s"])


def test_mfu_is_told_when_a_peak_is_named(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    status, text = launcher.run(
        train_arguments(
            data,
            tmp_path / "run",
            "train.device_peak_tflops=0.1",
            "train.device_peak_source=guess",
            "train.total_tokens=512",
        )
    )
    assert status == 0, text
    step = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step")
    assert 0 < step["mfu"] < 1
    assert "MFU counts causal FLOPs against 0.1 TFLOP/s a device (guess)" in text


def test_gpt2_trains_and_goes_on_elsewhere(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    """The same losses from one process to the end, and from two ranks with ZeRO-3 after the eighth step."""
    gpt2 = ["model.family=gpt2", "model.max_positions=32", "model.tie_embeddings=true"]
    gpt2 += ["run.intent=fresh_or_resume", "schedule.kind=constant"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder, ranks, more in (
        (whole, 1, []),
        (parted, 1, ["train.total_tokens=2048"]),
        (parted, 2, ["parallel.zero_stage=3"]),
    ):
        status, text = launcher.run(train_arguments(data, folder, *gpt2, *more), num_ranks=ranks)
        assert status == 0, text
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]
        for folder in (whole, parted)
    ]
    assert len(losses[0]) == 12
    assert losses[0][-1] < losses[0][0] - 0.3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_trains(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    status, text = launcher.run(train_arguments(data, tmp_path / "run", "train.precision=bf16"), num_ranks=2)
    assert status == 0, text
    last = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"][-1]
    assert last["loss"] < 3.2


def test_a_wrong_world_size_is_refused(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    status, text = launcher.run(train_arguments(data, tmp_path / "run", "parallel.world_size=4"), num_ranks=2)
    assert status == EXIT_FAILED
    assert text.count("parallel.world_size=4, but 2 ranks were launched") == 1, "one rank speaks for all"


def test_a_taken_port_is_named(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        status, text = launcher.run(train_arguments(data, tmp_path / "run"), **where)
    assert status == EXIT_FAILED
    assert f"the rendezvous port is in use: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in text


def test_ranks_that_never_come_are_named(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    where = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    arguments = train_arguments(data, tmp_path / "run", "train.process_group_timeout_s=2")
    status, text = launcher.run(arguments, **where)
    assert status == EXIT_FAILED
    assert "ranks could not meet at MASTER_ADDR=127.0.0.1" in text


def test_a_second_run_in_the_same_folder_is_refused(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"):
        status, text = launcher.run(train_arguments(data, tmp_path / "run"))
    assert status == EXIT_FAILED
    assert "is being written by" in text


def test_a_diverged_run_stops_and_keeps_its_checkpoint(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(
        data, tmp_path / "run", "optimizer.peak_lr=1e30", "train.grad_clip=0", "save.every_steps=1"
    )
    status, text = launcher.run(arguments)
    assert status == EXIT_FAILED
    assert "start again with a lower optimizer.peak_lr, resume with one from" in text
    events = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "event"]
    diverged = next(event["step"] for event in events if event["what"] == "diverged")
    steps = read_ledger(tmp_path / "run" / LEDGER_NAME).steps
    assert steps[-1].step == diverged, "the step that one wants to look at is not in the ledger"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_stops_the_run_with_its_name_and_loses_nothing(
    launcher: Launcher, data: Path, small_disk: Path
) -> None:
    folder = small_disk / "run"
    arguments = train_arguments(
        data, folder, "train.total_tokens=500000", "data.max_epochs=99", "save.every_steps=1"
    )
    run = launcher.start(arguments)
    wait_for(lambda: len(list_checkpoints(folder / "checkpoints")) == 2 if folder.exists() else False)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as handle:
        while run.processes[0].is_alive():
            handle.write(bytes(4096))
    assert run.wait() == EXIT_FAILED, run.text()
    assert "No space left on device" in run.text()
    assert str(folder) in run.text()
    filler.unlink()
    kept = newest_checkpoint(folder / "checkpoints")
    assert kept is not None, "the checkpoints from before are gone"
    status, text = launcher.run(
        [*arguments, "run.intent=resume", "train.total_tokens=1", "schedule.warmup_tokens=0"]
    )
    assert status == 0, text
    assert f"start: step {CheckpointReader(kept).step} from" in text


def damaged(finished: Finished, folder: Path) -> Path:
    """Copy the finished run; return the rank file of its newest checkpoint."""
    shutil.copytree(finished.folder, folder)
    return folder / "checkpoints/step-00000012/rank-00000.safetensors"


@pytest.mark.parametrize("how", ["flipped byte", "missing file"])
def test_a_damaged_checkpoint_ends_the_start_and_is_passed_over_when_told(
    finished: Finished, launcher: Launcher, tmp_path: Path, how: str
) -> None:
    piece = damaged(finished, tmp_path / "run")
    if how == "missing file":
        piece.unlink()
    else:
        content = bytearray(piece.read_bytes())
        content[len(content) // 2] ^= 4
        piece.write_bytes(content)
    arguments = [*finished.arguments, f"run.folder={tmp_path / 'run'}", "run.intent=resume"]
    status, text = launcher.run(arguments)
    assert status == EXIT_FAILED
    assert str(piece) in text
    assert "run.fallback=true goes back to step-00000008, or put a copy of the damaged one there" in text
    status, text = launcher.run([*arguments, "run.fallback=true"])
    assert status == 0, text
    assert f"run.fallback=true: not using a damaged checkpoint: {piece}" in text
    assert f"run.fallback=true: going back to {tmp_path / 'run/checkpoints/step-00000008'}" in text
    assert "step 8, 64 rows consumed" in text


def test_weights_that_are_not_those_of_the_recorded_loss_are_refused(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    """Whole to the last byte, and wrong: two rows of a matrix changed places, as a wrong slice would do."""
    shutil.copytree(finished.folder, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    reader = CheckpointReader(checkpoint_path(folder, 8))
    shutil.rmtree(checkpoint_path(folder, 12))
    pieces = []
    for kind in reader.kinds:
        for name, shape in reader.shapes(kind).items():
            values = reader.read(kind, name)
            if (kind, name) == ("weight", "blocks.0.attention.wv.weight"):
                values[[0, 1]] = values[[1, 0]]
            pieces.append(Piece(kind, name, shape, 0, values.reshape(-1)))
    save_checkpoint(folder, step=8, pieces=pieces, state=reader.state, ranks=ALONE, config=SaveConfig())
    arguments = [*finished.arguments, f"run.folder={tmp_path / 'run'}", "run.intent=resume"]
    status, text = launcher.run(arguments)
    assert status == EXIT_FAILED
    assert "the weights are not those that were saved; save.check_loss=false goes on all the same" in text
    status, text = launcher.run([*arguments, "save.check_loss=false"])
    assert status == 0, text


def test_a_shard_that_changed_is_found_at_the_start(launcher: Launcher, tmp_path: Path) -> None:
    data = write_data_folder(tmp_path / "data")
    shard = data / "shards/test/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    status, text = launcher.run(train_arguments(data, tmp_path / "run"), num_ranks=2)
    assert status == EXIT_FAILED
    assert str(shard) in text


@pytest.mark.slow
def test_each_job_of_a_multirun_has_its_own_folder(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    arguments = train_arguments(
        data, tmp_path / "sweep", "train.total_tokens=512", "optimizer.peak_lr=0.01,0.001"
    )
    arguments = [argument for argument in arguments if argument != "optimizer.peak_lr=0.01"]
    status, text = launcher.run([*arguments, "-m"])
    assert status == 0, text
    rates = [
        next(
            line["lr"]
            for line in read_metrics(tmp_path / "sweep" / job / "metrics.jsonl")
            if line["kind"] == "step"
        )
        for job in ("0", "1")
    ]
    assert rates[0] == pytest.approx(10 * rates[1])


def test_a_rank_that_cannot_read_its_rows_ends_the_run_with_one_message(
    launcher: Launcher, tmp_path: Path
) -> None:
    data = write_data_folder(tmp_path / "data")
    arguments = train_arguments(
        data, tmp_path / "run", "train.total_tokens=500000", "data.max_epochs=999", "train.eval_every_steps=0"
    )
    run = launcher.start(arguments, num_ranks=2)
    wait_for(lambda: len(list_checkpoints(tmp_path / "run" / "checkpoints")) > 0)
    for shard in (data / "shards/test").glob("train-*.bin"):
        shard.write_bytes(b"")  # the open file itself becomes too short
    assert run.wait() == EXIT_FAILED, run.text()
    assert run.text().count("error: rank ") == 1, run.text()
    assert "needed for row" in run.text()
    events = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "event"]
    assert "needed for row" in next(event["error"] for event in events if event["what"] == "failed")


def test_a_rank_that_cannot_read_held_out_rows_ends_the_run_with_one_message(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Rank 1's part of the evaluation is damaged; rank 0 must say so, and not die of a lost connection."""
    data = write_data_folder(tmp_path / "data")
    shard = next((data / "shards/test").glob("held_out-*.bin"))
    content = bytearray(shard.read_bytes())
    content[-80:-78] = b"\xff\xff"  # no id of the vocabulary
    shard.write_bytes(content)
    arguments = train_arguments(
        data, tmp_path / "run", "data.verify=none", "train.eval_every_steps=2", "save.every_steps=1"
    )
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == EXIT_FAILED
    assert text.count("error: rank ") == 1, text
    assert "65535" in text
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [1]


def test_no_checkpoint_is_saved_of_steps_that_the_ledger_could_not_note(
    launcher: Launcher, data: Path, small_disk: Path, tmp_path: Path
) -> None:
    """The ledger alone is on the disk that is full."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LEDGER_NAME).symlink_to(small_disk / LEDGER_NAME)
    with open(small_disk / "filler", "wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(bytes(4096))
    status, text = launcher.run(train_arguments(data, folder, "save.every_steps=1"), num_ranks=2)
    assert status == EXIT_FAILED
    assert text.count("ledger.jsonl cannot be written: No space left on device") == 1, text
    assert list_checkpoints(folder / "checkpoints") == []
    (small_disk / "filler").unlink()
    status, text = launcher.run(train_arguments(data, folder, "run.intent=fresh_or_resume"), num_ranks=2)
    assert status == 0, text
    assert list(contradictions(read_ledger(folder / LEDGER_NAME))) == []


def test_a_resume_needs_no_room_for_checkpoints_that_are_there(
    launcher: Launcher, data: Path, small_disk: Path
) -> None:
    folder = small_disk / "run"
    arguments = train_arguments(data, folder, "train.total_tokens=2048")
    status, text = launcher.run(arguments)
    assert status == 0, text
    with (small_disk / "filler").open("wb") as handle:
        handle.write(bytes(shutil.disk_usage(small_disk).free - 450_000))  # one more fits
    status, text = launcher.run([*arguments, "run.intent=resume", "train.total_tokens=2304"])
    assert status == 0, text


def test_copies_that_do_not_fit_into_the_host_are_refused(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    status, text = launcher.run(train_arguments(data, tmp_path / "run"), LOCAL_WORLD_SIZE="1000000000")
    assert status == EXIT_FAILED
    assert "save.in_background=true copies the state of this host's 1000000000 of 1 ranks, " in text
    assert not (tmp_path / "run").exists()
