"""Any restart, the same run."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from data_folder import Finished, train_arguments, wait_for, write_data_folder

from llmtrain.checkpoint.find import list_checkpoints, newest_checkpoint
from llmtrain.checkpoint.inspect import inspect_checkpoint
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.errors import EXIT_FAILED
from llmtrain.files import hash_file
from llmtrain.tracking.metrics import read_lines, read_metrics
from llmtrain.train.deadline import EXIT_AGAIN

if TYPE_CHECKING:
    from conftest import Launcher


def losses(folder: Path) -> dict[int, float]:
    return {
        line["step"]: line["loss"]
        for line in read_metrics(folder / "metrics.jsonl")
        if line["kind"] == "step"
    }


def stopped_after(finished: Finished, step: int, folder: Path) -> list[str]:
    """Make `folder` what a kill right after the checkpoint of `step` would have left; return arguments to
    go on."""
    shutil.copytree(finished.folder, folder)
    for later in list_checkpoints(folder / "checkpoints"):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (folder / "metrics.jsonl").write_text("".join(kept))
    return [*finished.arguments, f"run.folder={folder}", "run.intent=resume"]


def test_fp32_losses_after_a_resume_are_bit_equal(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    arguments = stopped_after(finished, 4, tmp_path / "run")
    status, text = launcher.run(arguments)
    assert status == 0, text
    assert losses(tmp_path / "run") == losses(finished.folder)
    attempts = {line["attempt"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert attempts == {1, 2}


@pytest.mark.parametrize(
    ("num_ranks", "stage", "micro"),
    [(2, 1, 4), (2, 0, 1), (2, 3, 2), (1, 2, 8)],
)
def test_a_resume_on_another_layout_continues_the_same_run(
    finished: Finished, launcher: Launcher, tmp_path: Path, num_ranks: int, stage: int, micro: int
) -> None:
    arguments = stopped_after(finished, 8, tmp_path / "run")
    status, text = launcher.run(
        [*arguments, f"parallel.zero_stage={stage}", f"train.micro_batch_rows={micro}"], num_ranks=num_ranks
    )
    assert status == 0, text
    continued, whole = losses(tmp_path / "run"), losses(finished.folder)
    assert continued.keys() == whole.keys()
    # other sums, other order of fp32 additions
    np.testing.assert_allclose(list(continued.values()), list(whole.values()), rtol=1e-5)


def test_checkpoints_behind_a_url_continue_the_same_run(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    there = f"local://{tmp_path}/store"  # an fsspec file system, not the path that folders take
    arguments = [*finished.arguments, f"run.folder={tmp_path / 'run'}", f"save.folder={there}"]
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == 0, text
    assert f"checkpoints of 242 KiB in {there}" in text
    assert not (tmp_path / "run" / "checkpoints").exists()
    newest = tmp_path / "store" / "step-00000012"
    shutil.rmtree(newest)
    status, text = launcher.run([*arguments, "run.intent=resume"], num_ranks=2)
    assert status == 0, text
    assert f"resumed from {there}/step-00000008" in text
    first, again = (
        {
            line["step"]: line["loss"]
            for line in read_lines(tmp_path / "run" / "metrics.jsonl")
            if line["kind"] == "step" and line["attempt"] == attempt
        }
        for attempt in (1, 2)
    )
    assert set(again) == {9, 10, 11, 12}
    assert again == {step: first[step] for step in again}
    found = inspect_checkpoint(tmp_path / "run", verify=True)
    assert (found.path, found.steps[-1], found.problems) == (f"{there}/step-00000012", 12, [])
    status, text = launcher.run([*arguments[:-1], f"save.folder={there}", f"run.folder={tmp_path / 'other'}"])
    assert status == EXIT_FAILED
    assert f"run.intent=fresh, but {there} holds a run already" in text


def test_checkpoints_of_different_layouts_hold_equal_weights(
    finished: Finished, launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(data, tmp_path / "run", "parallel.zero_stage=3")
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == 0, text
    ours, theirs = (
        CheckpointReader(folder / "checkpoints" / "step-00000012")
        for folder in (tmp_path / "run", finished.folder)
    )
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name in theirs.tensors:
            np.testing.assert_allclose(
                ours.read(kind, name), theirs.read(kind, name), rtol=1e-3, atol=2e-5, err_msg=f"{kind} {name}"
            )


def test_warm_start_takes_weights_only(finished: Finished, launcher: Launcher, tmp_path: Path) -> None:
    arguments = [
        *finished.arguments,
        f"run.folder={tmp_path / 'run'}",
        "run.intent=warm_start",
        f"run.init_from={finished.folder}",
    ]
    status, text = launcher.run(arguments)
    assert status == 0, text
    warm, cold = losses(tmp_path / "run"), losses(finished.folder)
    assert set(warm) == set(cold)
    assert warm[1] < 0.8 * cold[1], "the weights of the other run were not taken"
    attempt = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"][0]
    assert attempt["from"].endswith("step-00000012")
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    state = CheckpointReader(newest).state
    parent = state["parent"]
    assert (parent["checkpoint"], parent["step"], parent["intent"]) == (attempt["from"], 12, "warm_start")
    assert parent["manifest_sha256"] == CheckpointReader(Path(parent["checkpoint"])).manifest_hash
    assert parent["changed"]["run.intent"] == ["fresh", "warm_start"]
    assert state["code"]["git_commit"] == attempt["git_commit"]
    newest = newest_checkpoint(finished.folder / "checkpoints")
    assert newest is not None
    assert CheckpointReader(newest).state["parent"] is None, "it began with fresh weights"


def test_sigterm_saves_and_leaves_at_the_same_step_on_every_rank(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(data, tmp_path / "run", "train.total_tokens=200000", "data.max_epochs=99")
    run = launcher.start(arguments, num_ranks=2)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 3)
    run.processes[1].terminate()  # one rank is told; both must leave
    assert run.wait() == EXIT_AGAIN, run.text()
    last = max(losses(tmp_path / "run"))
    path = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert CheckpointReader(path).step == last
    assert f"stopped by SIGTERM after step {last}; run.intent=resume goes on from step {last}" in run.text()


@pytest.mark.slow
def test_kill_9_at_20_random_moments_loses_no_committed_step(
    finished: Finished, launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    """Saves at every step, so that many of the kills fall into one."""
    folder = tmp_path / "run"
    arguments = train_arguments(
        data, folder, "save.every_steps=1", "run.intent=fresh_or_resume", "train.eval_every_steps=0"
    )
    moments = random.Random(20)
    committed, kills = 0, 0
    while kills < 20:
        run = launcher.start(arguments)
        begun = len(_lines(folder))
        limit = time.monotonic() + 60
        while run.processes[0].is_alive() and len(_lines(folder)) <= begun and time.monotonic() < limit:
            time.sleep(0.005)  # imports are over once the attempt has written a line
        time.sleep(moments.uniform(0.0, 0.12))
        alive = run.processes[0].is_alive()
        run.kill()
        kills += alive
        steps = [line["step"] for line in _lines(folder) if line["kind"] == "checkpoint"]
        newest = newest_checkpoint(folder / "checkpoints")
        found = 0 if newest is None else CheckpointReader(newest).step
        assert found >= max(steps, default=0), "a save that was reported is gone"
        assert found >= committed, "a committed step was lost"
        committed = found
        if not alive:
            assert run.processes[0].exitcode == 0, run.text()
            assert losses(folder) == losses(finished.folder)
            shutil.rmtree(folder)
            committed = 0
    status, text = launcher.run(arguments)
    assert status == 0, text
    assert losses(folder) == losses(finished.folder), "the losses are not those of the uninterrupted run"


def _lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []


def test_bf16_losses_after_a_resume_are_bit_equal(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    settings = ("train.precision=bf16", "save.keep_last=9")
    whole = train_arguments(data, tmp_path / "whole", *settings)
    status, text = launcher.run(whole, num_ranks=2)
    assert status == 0, text
    arguments = stopped_after(Finished(tmp_path / "whole", whole), 8, tmp_path / "run")
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == 0, text
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(finished: Finished, launcher: Launcher) -> None:
    before = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    status, text = launcher.run([*finished.arguments, "run.intent=resume"])
    assert status == 0, text
    assert "nothing to do: the run has consumed 3072 of 3072 tokens" in text
    after = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    before.pop(finished.folder / ".lock", None)
    after.pop(finished.folder / ".lock", None)
    assert after == before


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    arguments = [*finished.arguments, f"run.folder={tmp_path / 'run'}", "run.intent=fresh_or_resume"]
    status, text = launcher.run(arguments)
    assert status == EXIT_FAILED
    assert "tells of a checkpoint of step 12, and" in text


def test_a_warm_start_with_another_tokenizer_is_refused(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    other = write_data_folder(tmp_path / "data")
    path = other / "manifest.json"
    manifest = json.loads(path.read_text())
    (other / "tokenizer/test/tokenizer.model").write_bytes(b"another")
    manifest["tokenizer"]["fingerprint"] = hash_file(other / "tokenizer/test/tokenizer.model")
    path.write_text(json.dumps(manifest))
    status, text = launcher.run(
        [
            *finished.arguments,
            f"run.folder={tmp_path / 'run'}",
            f"data.folder={other}",
            "run.intent=warm_start",
            f"run.init_from={finished.folder}",
        ]
    )
    assert status == EXIT_FAILED
    assert "is not the one that run.init_from was trained with" in text
