"""A drill: a run that is told to leave again and again, at any moment, ends as if nobody had."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from data_folder import train_arguments, wait_for, write_data_folder
from ranks import free_port

from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.loader.ledger import LEDGER_NAME, contradictions, read_ledger
from llmtrain.tracking.metrics import read_lines, read_metrics
from llmtrain.train.deadline import EXIT_AGAIN, EXIT_NEVER, SIGNALS

if TYPE_CHECKING:
    from conftest import Launcher, Run

EVAL_EVERY = 7
LONGEST_S = 3.0
"""That an attempt has, at most, from its fork or from its first step before it is told."""


UNHEARD = {130, *(-each for each in SIGNALS)}


def arguments_of(data: Path, run: Path, num_steps: int) -> list[str]:
    return train_arguments(
        data,
        run,
        f"train.total_tokens={num_steps * 8 * 32}",
        "data.max_epochs=9999",
        f"train.eval_every_steps={EVAL_EVERY}",
        "save.every_steps=20",
        "schedule.kind=constant",
        "run.intent=fresh_or_resume",
    )


def outcomes(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses of all steps, and of all evaluations."""
    records = read_metrics(run / "metrics.jsonl")
    return {
        kind: [(record["step"], record[name]) for record in records if record["kind"] == kind]
        for kind, name in (("step", "loss"), ("eval", "eval_loss"))
    }


def is_unheard(process: Any, output: Path) -> bool:
    """Whether a signal came before the rank listened, and ended it as it ends any process; of Ctrl-C in the
    fork server's own code the status is 1."""
    spoken = output.read_text().strip() if output.exists() else ""
    interrupted = process.exitcode == 1 and (not spoken or spoken.endswith("KeyboardInterrupt"))
    return process.exitcode in UNHEARD or interrupted


def wait(run: Run) -> int:
    """As torchrun does: where a signal came before a rank listened, and ended it, the others are told."""
    limit = time.monotonic() + 120
    while any(process.is_alive() for process in run.processes):
        assert time.monotonic() < limit, run.text()
        if any(
            is_unheard(process, output) for process, output in zip(run.processes, run.outputs, strict=True)
        ):
            for process in run.processes:
                process.terminate()
        time.sleep(0.2)
    return run.wait()


def num_steps_of(run: Path) -> int:
    """Lines of the metrics that tell of a step."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "step"') if metrics.exists() else 0


def wait_for_a_step(folder: Path, run: Run) -> None:
    done = num_steps_of(folder)
    wait_for(lambda: num_steps_of(folder) > done or not run.processes[0].is_alive())


def drill(
    launcher: Launcher, data: Path, folder: Path, *, num_signals: int, num_steps: int, num_ranks: int
) -> None:
    whole, told = folder / "whole", folder / "told"
    status, text = launcher.run(arguments_of(data, whole, num_steps), num_ranks=num_ranks)
    assert status == 0, text
    draw = random.Random(num_signals)
    sent = 0
    while True:
        run = launcher.start(arguments_of(data, told, num_steps), num_ranks=num_ranks)
        if sent < num_signals:
            if sent % 2 == 0:
                wait_for_a_step(told, run)
            time.sleep(draw.uniform(0.0, LONGEST_S))
            number = draw.choice(SIGNALS)
            whom = draw.choice([run.processes, [draw.choice(run.processes)]])  # Slurm tells all, a person one
            for process in whom:
                if process.is_alive():
                    os.kill(process.pid, number)
            sent += 1
        status = wait(run)
        if status == 0:
            break
        for process, output in zip(run.processes, run.outputs, strict=True):
            assert process.exitcode == EXIT_AGAIN or is_unheard(process, output), run.text()
        assert sent <= num_signals, run.text()
    assert outcomes(told) == outcomes(whole), "to the last bit"
    assert list(contradictions(read_ledger(told / LEDGER_NAME))) == []
    stops = [line for line in read_lines(told / "metrics.jsonl") if line.get("what") == "stopped"]
    assert stops
    assert all(line["signal"].startswith(tuple(each.name for each in SIGNALS)) for line in stops)


def test_signals_at_any_moment_change_nothing(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    drill(launcher, data, tmp_path, num_signals=4, num_steps=150, num_ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_40_signals_at_any_moment_change_nothing(
    launcher: Launcher, data: Path, tmp_path: Path, num_ranks: int
) -> None:
    drill(launcher, data, tmp_path, num_signals=40, num_steps=1500, num_ranks=num_ranks)


def test_the_last_evaluation_is_made_up_for(launcher: Launcher, tmp_path: Path) -> None:
    data, folder = write_data_folder(tmp_path / "data", num_documents=20_000), tmp_path / "run"
    arguments = [*arguments_of(data, folder, 10), "train.eval_rows=1500", "train.micro_batch_rows=1"]
    run = launcher.start(arguments, num_ranks=2)
    wait_for(lambda: num_steps_of(folder) == 10 or not run.processes[0].is_alive())
    run.signal(signal.SIGTERM)
    assert run.wait() == EXIT_AGAIN, run.text()
    assert [step for step, _ in outcomes(folder)["eval"]] == [7]
    for says in ("resumed from", "nothing to do"):
        status, text = launcher.run(arguments, num_ranks=2)
        assert status == 0, text
        assert says in text
        assert [step for step, _ in outcomes(folder)["eval"]] == [7, 10]
    assert [line["what"] for line in read_lines(folder / "metrics.jsonl") if "what" in line][-1] == "finished"
    last = CheckpointReader(folder / "checkpoints/step-00000010").state
    assert (last["eval_loss"], last["owes_eval"]) == (outcomes(folder)["eval"][-1][1], False)


def test_a_rank_that_is_to_leave_and_meets_nobody_leaves(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    """The others were ended before they listened."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = arguments_of(data, tmp_path / "run", 10)
    run = launcher.start(arguments, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", **place)
    status = Path(f"/proc/{run.processes[0].pid}/status")
    is_sigterm_caught = 1 << signal.SIGTERM - 1
    wait_for(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & is_sigterm_caught != 0)
    run.signal(signal.SIGTERM)
    assert run.wait() == EXIT_AGAIN, run.text()
    assert f"SIGTERM, and nobody is at 127.0.0.1:{place['MASTER_PORT']}: rank 1 leaves" in run.text()


def test_a_time_limit_saves_and_leaves(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*arguments_of(data, run, 100_000), "run.leave_before_s=2"]
    ends = str(round(time.time() + 12))
    status, text = launcher.run(arguments, num_ranks=2, SLURM_JOB_END_TIME=ends)
    assert status == EXIT_AGAIN, text
    assert time.time() < int(ends)
    last: dict[str, Any] = read_metrics(run / "metrics.jsonl")[-1]
    assert (last["what"], last["signal"]) == ("stopped", "the time limit of the job")
    assert last["saved_step"] == last["step"] > 0


def test_the_same_failure_three_times_is_the_last(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*arguments_of(data, run, 40), "optimizer.peak_lr=1e30"]
    for _ in range(3):
        status, text = launcher.run(arguments)
        assert status == 2, text
    status, text = launcher.run(arguments)
    assert status == EXIT_NEVER, text
    assert "the last 3 attempts ended alike after step" in text
    status, text = launcher.run([*arguments, "run.max_same_failures=0"])
    assert status == 2, text
