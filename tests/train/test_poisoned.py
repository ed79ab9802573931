"""A poisoned batch is found, and withheld or passed over it leaves no trace: detector, engine, rows and
budget together, as a loop uses them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import poisoned_worker
import pytest
from data_folder import write_data_folder
from poisoned import poison
from poisoned_worker import POISONED_STEP, ROWS, SEQ_LEN, STEPS, WINDOW
from ranks import run_ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("poisoned")
    write_data_folder(folder / "clean", num_documents=800)  # less than an epoch is read
    shutil.copytree(folder / "clean", folder / "poisoned")
    poison(folder / "poisoned", seq_len=SEQ_LEN, first=WINDOW[0], last=WINDOW[1])
    script = Path(poisoned_worker.__file__)
    found: dict[str, Any] = run_ranks(script, str(folder / "clean"), str(folder / "poisoned"), num_ranks=1)[0]
    return found


def test_the_poisoned_batch_is_found_and_nothing_else(told: dict[str, Any]) -> None:
    found = {name: run["verdicts"] for name, run in told.items()}
    assert found.pop("skip") == [[POISONED_STEP, WINDOW[0], "skip", "loss", True]]
    assert found.pop("rollback") == [[POISONED_STEP, WINDOW[0], "rollback", "loss", True]]
    assert found == {"clean": [], "clean without": [], "poisoned without": [], "ignore": []}


def test_a_run_that_skips_or_rolls_back_ends_as_one_that_never_had_those_rows(told: dict[str, Any]) -> None:
    without = told["poisoned without"]
    for name in ("skip", "rollback"):
        assert told[name]["held_out"] == without["held_out"]
        assert told[name]["weights"] == without["weights"]
    losses = {name: {**run["losses"]} for name, run in told.items()}
    assert losses["skip"].pop(str(WINDOW[0])) > 2.0
    assert losses["skip"] == losses["rollback"] == losses["poisoned without"]
    assert told["ignore"]["weights"] != without["weights"], "the poison was none"
    assert [told[name]["steps"] for name in ("skip", "rollback")] == [STEPS, STEPS - 1]
    assert len(losses["rollback"]) == STEPS - 1
    assert WINDOW[1] < ROWS * STEPS


def test_it_ends_within_the_noise_of_the_clean_run_without_that_window(told: dict[str, Any]) -> None:
    """A row's last target is the next row's first token, so a few targets beside the window are poisoned,
    too."""
    noise = 0.02  # of the held-out loss, 0.97 nats; measured 0.0045
    assert told["skip"]["held_out"] == pytest.approx(told["clean without"]["held_out"], abs=noise)
    assert told["clean"]["held_out"] == pytest.approx(told["clean without"]["held_out"], abs=noise)
