"""Runs that start from checkpoints which `llmtrain checkpoint` has made of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from data_folder import Finished

from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.rewrite import average, newest_of, reshard
from llmtrain.convert.convert import Format, export, import_
from llmtrain.errors import EXIT_FAILED
from llmtrain.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Launcher


def losses(folder: Path) -> dict[int, float]:
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def test_a_run_goes_on_from_a_resharded_and_converted_checkpoint_as_from_the_original(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    original = finished.folder / "checkpoints" / "step-00000004"
    resharded = Path(reshard(original, tmp_path / "resharded", num_files=3).path)
    export(resharded, tmp_path / "dcp", to=Format.torch_dcp)
    import_(tmp_path / "dcp", tmp_path / "back", source_format=Format.torch_dcp, num_files=2)
    run = [f"run.folder={tmp_path / 'run'}", f"save.folder={tmp_path / 'back'}", "run.intent=resume"]
    status, text = launcher.run([*finished.arguments, *run])
    assert status == 0, text
    after = {step: loss for step, loss in losses(finished.folder).items() if step > 4}
    assert losses(tmp_path / "run") == after, "to the last bit"


def test_a_mean_starts_a_run_and_is_refused_as_something_to_resume(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    made = average(newest_of(finished.folder, 2), tmp_path / "mean", weights=None)
    start = [f"run.folder={tmp_path / 'run'}", "run.intent=warm_start", f"run.init_from={tmp_path / 'mean'}"]
    status, text = launcher.run([*finished.arguments, *start, f"train.total_tokens={3 * 8 * 32}"])
    assert status == 0, text
    first = losses(tmp_path / "run")[1]
    assert np.isfinite(first)
    assert first < losses(finished.folder)[1] - 0.5, "it has learnt something"
    parent = CheckpointReader(tmp_path / "run" / "checkpoints" / "step-00000003").state["parent"]
    assert parent["manifest_sha256"] == made.manifest_sha256
    resume = [f"run.folder={tmp_path / 'other'}", f"save.folder={tmp_path / 'mean'}", "run.intent=resume"]
    status, text = launcher.run([*finished.arguments, *resume, f"train.total_tokens={24 * 8 * 32}"])
    assert status == EXIT_FAILED, text
    assert "exp_avg" in text
