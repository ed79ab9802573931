"""`llmtrain train` over a poisoned window: what is withheld or passed over leaves no trace, in one process,
on two ranks, and across restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from data_folder import train_arguments, write_data_folder
from poisoned import poison

from llmtrain import files
from llmtrain.loader.ledger import LEDGER_NAME, contradictions, read_ledger
from llmtrain.loader.skipped import SKIPPED_NAME, SkippedWindow, read_skipped, write_skipped
from llmtrain.tracking.metrics import read_lines, read_metrics

if TYPE_CHECKING:
    from conftest import Launcher

ROWS, STEPS, BAD_STEP = 8, 45, 33
WINDOW = (BAD_STEP - 1) * ROWS, BAD_STEP * ROWS - 1


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data_folder(tmp_path_factory.mktemp("poisoned"), num_documents=800)
    poison(folder, seq_len=32, first=WINDOW[0], last=WINDOW[1])
    return folder


def arguments(data: Path, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    return train_arguments(
        data,
        run,
        f"train.total_tokens={steps * ROWS * 32}",
        "schedule.kind=constant",
        "save.every_steps=10",
        "train.eval_every_steps=0",
        "data.verify=none",
        "run.intent=fresh_or_resume",
        "spikes.window_steps=32",
        "spikes.warmup_steps=16",
        *more,
    )


def of_steps(run: Path, name: str) -> dict[int, float]:
    steps = (line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step")
    return {line["step"]: line[name] for line in steps}


def losses(run: Path) -> dict[int, float]:
    return of_steps(run, "loss")


def events(run: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line.get("what") == what]


@pytest.fixture(scope="module")
def without(launcher: Launcher, poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that passes over the window from the beginning, because its file says so."""
    run = tmp_path_factory.mktemp("runs") / "without"
    run.mkdir()
    write_skipped(
        run / SKIPPED_NAME, [SkippedWindow(first=WINDOW[0], last=WINDOW[1], step=0, attempt=0, reason="test")]
    )
    status, text = launcher.run(arguments(poisoned, run))
    assert status == 0, text
    assert len(losses(run)) == STEPS - 1
    return run


def test_a_rollback_ends_as_a_run_that_never_had_those_rows(
    launcher: Launcher, poisoned: Path, without: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, text = launcher.run(arguments(poisoned, run, "spikes.on_spike=rollback"), num_ranks=1)
    assert status == 0, text
    (spike,), (back,) = events(run, "spike"), events(run, "rolled_back")
    assert (spike["step"], spike["action"], spike["first"], spike["last"]) == (BAD_STEP, "rollback", *WINDOW)
    assert (back["step"], back["spike_step"]) == (30, BAD_STEP)
    assert losses(run) == losses(without), "to the last bit"
    assert of_steps(run, "tokens") == of_steps(without, "tokens")
    assert [(each.first, each.last) for each in read_skipped(run / SKIPPED_NAME)] == [WINDOW]
    ledger = read_ledger(run / LEDGER_NAME)
    assert list(contradictions(ledger)) == []
    assert ledger.skipped_rows() == ROWS
    (told,) = (run / "spikes").iterdir()
    documents = files.read_json(told)["documents"]
    assert {each["position"] for each in documents} == set(range(WINDOW[0], WINDOW[1] + 1))
    assert all(each["source"] == "chain" and each["id"].startswith("train-") for each in documents)


def test_two_ranks_decide_alike_and_a_restart_between_changes_nothing(
    launcher: Launcher, poisoned: Path, without: Path, tmp_path: Path
) -> None:
    """Cut right after the rollback, in another layout, and resumed to the end."""
    run = tmp_path / "run"
    parts = (BAD_STEP + 1, 2), (STEPS, 1)
    for steps, ranks in parts:
        status, text = launcher.run(
            arguments(poisoned, run, "spikes.on_spike=rollback", steps=steps), num_ranks=ranks
        )
        assert status == 0, text
    assert len(events(run, "rolled_back")) == 1
    assert losses(run) == pytest.approx(losses(without), rel=1e-5)
    assert list(contradictions(read_ledger(run / LEDGER_NAME))) == []


def test_a_skipped_step_updates_nothing_and_is_told(
    launcher: Launcher, poisoned: Path, without: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, text = launcher.run(arguments(poisoned, run, "spikes.on_spike=skip"))
    assert status == 0, text
    found = losses(run)
    assert found.pop(BAD_STEP) > 1.5 * found[BAD_STEP - 1]
    assert list(found.values()) == list(losses(without).values()), "to the last bit"
    learned = of_steps(run, "tokens")
    assert learned.pop(BAD_STEP) == learned[BAD_STEP - 1], "nothing was learned from it"
    assert list(learned.values()) == list(of_steps(without, "tokens").values())
    withheld = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line.get("withheld")]
    assert withheld == [BAD_STEP]
    assert f"step {BAD_STEP}, rows {WINDOW[0]} to {WINDOW[1]}: grad_norm=" in text


def test_stop_ends_the_run_with_what_it_saw(launcher: Launcher, poisoned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, text = launcher.run(arguments(poisoned, run, "spikes.on_spike=stop"))
    assert status == 2, text
    assert f"error: step {BAD_STEP}, rows {WINDOW[0]} to {WINDOW[1]}: grad_norm=" in text
    assert max(losses(run)) == BAD_STEP - 1
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["what"] == "failed"


def test_without_a_checkpoint_before_it_a_rollback_begins_again(
    launcher: Launcher, poisoned: Path, without: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, text = launcher.run(arguments(poisoned, run, "spikes.on_spike=rollback", "save.every_steps=40"))
    assert status == 0, text
    assert events(run, "rolled_back")[0]["step"] == 0
    assert losses(run) == losses(without)
