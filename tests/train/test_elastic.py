"""A run that is killed and started again on other numbers of ranks, over a mixture, with a ramp: the ledger
proves that it is the same run."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from data_folder import train_arguments, wait_for, write_data_folder

from llmtrain.cli import inspect_ledger
from llmtrain.loader.ledger import LEDGER_NAME, contradictions, read_ledger
from llmtrain.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Launcher

ROWS = 24
SEQ_LEN = 32


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "web": write_data_folder(folder / "web", num_documents=300),
        "books": write_data_folder(folder / "books", num_documents=120, seed=1),
    }


def mixture_arguments(sources: dict[str, Path], run: Path, *overrides: str, steps: int = 24) -> list[str]:
    """`steps` steps with 12 rows in the first third and 24 after; weights that change after the half."""
    named = ", ".join(f"{name}: {{folder: {folder}}}" for name, folder in sources.items())
    tokens = (steps // 3 * 12 + (steps - steps // 3) * ROWS) * SEQ_LEN
    stages = (
        "[{from_tokens: 0, weights: {web: 3, books: 1}}, "
        f"{{from_tokens: {tokens // 2}, weights: {{web: 1, books: 1}}}}]"
    )
    return train_arguments(
        sources["web"],
        run,
        "data.folder=null",
        f"+data.sources={{{named}}}",
        f"data.stages={stages}",
        "data.block_rows=64",
        "data.max_epochs=99",
        f"train.total_tokens={tokens}",
        f"train.batch_ramp=[{{until_tokens: {steps // 3 * 12 * SEQ_LEN}, rows: 12}}]",
        f"train.global_batch_rows={ROWS}",
        "train.micro_batch_rows=1",
        "save.every_steps=4",
        "train.eval_every_steps=0",
        "run.intent=fresh_or_resume",
        *overrides,
    )


def steps_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [line for line in read_metrics(path) if line["kind"] == "step"] if path.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(
    launcher: Launcher, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    status, text = launcher.run(mixture_arguments(sources, folder, "train.micro_batch_rows=4"))
    assert status == 0, text
    return folder


def num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def num_unsaved(folder: Path) -> int:
    """Steps that were done after the newest checkpoint."""
    last = {"step": 0, "checkpoint": 0}
    for line in read_metrics(folder / "metrics.jsonl"):
        last[line["kind"]] = line["step"]
    return last["step"] - last["checkpoint"]


def drill(launcher: Launcher, arguments: list[str], folder: Path, worlds: list[int], seed: int) -> int:
    """Start on each number of ranks in turn, with kill -9 at a random moment of each but the last; the first
    time with steps to lose. Returns how many were alive to be killed.
    """
    moments, kills = random.Random(seed), 0
    for number, world_size in enumerate(worlds):
        if number == len(worlds) - 1:
            status, text = launcher.run(arguments, num_ranks=world_size)
            assert status == 0, text
            break
        run = launcher.start(arguments, num_ranks=world_size)
        begun, more = num_lines(folder), moments.randint(3, 9)
        wait_for(
            lambda run=run, begun=begun, more=more, number=number: (
                not run.processes[0].is_alive()
                or (num_lines(folder) > begun + more and (number or num_unsaved(folder) >= 2))
            )
        )
        time.sleep(moments.uniform(0.0, 0.1) if number else 0.0)
        kills += run.processes[0].is_alive()
        run.kill()
    return kills


def same_run(folder: Path, whole: Path) -> None:
    """The ledger of `folder` is whole, and names the same rows and tokens as that of `whole`."""
    ledger, other = read_ledger(folder / LEDGER_NAME), read_ledger(whole / LEDGER_NAME)
    assert list(contradictions(ledger)) == []
    ours = [(step.step, step.first, step.last, step.hash) for step in ledger.surviving()]
    assert ours == [(step.step, step.first, step.last, step.hash) for step in other.surviving()]
    losses = [[line["loss"] for line in steps_of(each)] for each in (folder, whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)  # other sums over ranks


def test_the_mixture_is_told_as_it_came_out_and_as_it_was_asked(uninterrupted: Path) -> None:
    told = [line for line in read_metrics(uninterrupted / "metrics.jsonl") if line["kind"] == "mixture"]
    assert [line["step"] for line in told] == [10, 20]
    assert [line["asked_web"] for line in told] == [0.75, 0.5]
    for line in told:
        assert line["share_web"] + line["share_books"] == pytest.approx(1)
        assert line["share_web"] == pytest.approx(0.7, abs=0.1)  # on the way from 0.75 to 0.5


def test_a_killed_run_on_4_then_2_then_3_ranks_is_the_run_on_one(
    launcher: Launcher, sources: dict[str, Path], uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    kills = drill(launcher, mixture_arguments(sources, folder), folder, [4, 2, 3, 1], seed=4)
    assert kills == 3
    same_run(folder, uninterrupted)
    ledger = read_ledger(folder / LEDGER_NAME)
    assert [attempt.world_size for attempt in ledger.attempts] == [4, 2, 3, 1]
    assert len(ledger.steps) > len(ledger.surviving()), "no kill cost a step: the drill shows too little"
    assert {step.last - step.first + 1 for step in ledger.surviving()} == {12, 24}


@pytest.mark.slow
def test_a_run_killed_20_times_on_changing_ranks_is_the_run_on_one(
    launcher: Launcher, sources: dict[str, Path], tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    status, text = launcher.run(mixture_arguments(sources, whole, "train.micro_batch_rows=4", steps=120))
    assert status == 0, text
    worlds = [random.Random(1).choice([1, 2, 3, 4, 6]) for _ in range(20)]
    worlds = [4, 2, 3, *worlds[3:], 2]
    kills = drill(launcher, mixture_arguments(sources, folder, steps=120), folder, worlds, seed=1)
    assert kills >= 12
    same_run(folder, whole)


def test_a_resume_on_other_data_is_refused_and_noted_when_it_is_meant(
    launcher: Launcher, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    more = {**sources, "code": write_data_folder(tmp_path / "code", num_documents=60, seed=2)}
    short = mixture_arguments(sources, folder, "train.total_tokens=4608")
    status, text = launcher.run(short)
    assert status == 0, text
    further = mixture_arguments(more, folder, "data.stages=[]")
    status, text = launcher.run(further)
    assert status != 0
    assert "is not what step 10 was trained on" in text
    assert "data.accept_changed=true" in text
    status, text = launcher.run([*further, "data.accept_changed=true"])
    assert status == 0, text
    assert "data.accept_changed=true: going on at row 144" in text
    ledger = read_ledger(folder / LEDGER_NAME)
    assert [attempt.accepted_change for attempt in ledger.attempts] == [False, True]
    assert ledger.attempts[0].data_hash != ledger.attempts[1].data_hash
    assert list(contradictions(ledger)) == []
    inspect_ledger.show(inspect_ledger.InspectLedgerConfig(run=str(folder), recompute=True))
    told = capsys.readouterr().out
    assert "attempt 2 went on with other data after step 10, as data.accept_changed=true asked" in told
    num_read_again = len(ledger.surviving()) - 10
    assert f"{num_read_again} steps were read again and compared" in told, "those of the old data are not"
    status, text = launcher.run([*further, "train.total_tokens=20000"])
    assert status == 0, text
    assert [attempt.accepted_change for attempt in read_ledger(folder / LEDGER_NAME).attempts][2] is False
