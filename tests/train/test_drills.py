"""kill -9 of one rank and of all, at any moment: the newest committed checkpoint loads, and the run ends as
if nothing had been.

Two drills: of arithmetic in place of a model (`drill_worker.py`), where the real code of checkpoints goes
through hundreds of kills in seconds, and of `llmtrain train`, which takes seconds to start.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import drill_worker
import numpy as np
import pytest
from data_folder import train_arguments, wait_for
from drill_worker import KINDS, NUM_LAYERS, NUM_ROWS, PEER_LOST, PHASES, Training

from llmtrain.checkpoint.find import checkpoint_path, list_checkpoints, newest_whole
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.errors import EXIT_FAILED
from llmtrain.tracking.metrics import read_lines
from llmtrain.train.deadline import EXIT_AGAIN

if TYPE_CHECKING:
    from conftest import Launcher

KILLED = -9
NUM_STEPS = 600
"""Of a real run: more than 20 attempts come to."""
VICTIMS = ([0], [1], [0, 1], [1, 0])
MUST_BE_HIT = PHASES[1:]
"""All but the start, in which a rank of the drill is for an instant."""


class Uninterrupted:
    """The run as it is without kills, in one process and without checkpoints, as far as somebody asks."""

    def __init__(self) -> None:
        self._training = Training(0, NUM_ROWS)
        self.losses: list[float] = []

    def compare(self, reader: CheckpointReader) -> None:
        """With one that is no older than the one before."""
        while len(self.losses) < reader.step:
            self.losses.append(self._training.step(len(self.losses), lambda sums: [sums]))
        assert len(self.losses) == reader.step
        for kind in KINDS:
            assert len(reader.shapes(kind)) == NUM_LAYERS
            for layer, expected in enumerate(self._training.held[kind]):
                found = reader.read(kind, f"layer.{layer}")
                assert found.tobytes() == expected.tobytes(), f"step {reader.step}: {kind} layer.{layer}"


class Drill:
    """A run that is killed again and again, and what must hold after each kill."""

    def __init__(self, folder: Path, errors: Path) -> None:
        self.folder = folder
        self.committed = 0
        self.uninterrupted = Uninterrupted()
        self._errors = errors
        with open(errors, "a") as handle:
            self._worker = subprocess.Popen(
                [sys.executable, drill_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=handle,
                text=True,
            )

    def close(self) -> None:
        self._worker.communicate()  # the end of its input is the end of it

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def attempt(
        self,
        *,
        victims: list[int],
        until: int | None = None,
        phase: str | None = None,
        delay_s: float = 0.0,
        die_at: int | None = None,
        border: int = NUM_ROWS // 2,
        in_background: bool = True,
    ) -> dict[str, Any]:
        """Start the run or go on with it, and kill `victims`: once rank 0 is in `phase` and after a delay, or
        at their `die_at`-th operation on files.

        Args:
            until: Steps; None for a run that only a kill ends.
            border: Rank 0 holds so many rows of each layer.
        """
        plan = {
            "folder": str(self.folder),
            "victims": victims,
            "until": until,
            "phase": phase,
            "delay_s": delay_s,
            "die_at": die_at,
            "border": border,
            "in_background": in_background,
        }
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self.folder.mkdir(exist_ok=True)
        self._worker.stdin.write(json.dumps(plan) + "\n")
        self._worker.stdin.flush()
        answer = self._worker.stdout.readline()
        assert answer, self._errors.read_text()
        told: dict[str, Any] = json.loads(answer)
        return told

    def kill(self, victims: list[int], **how: Any) -> dict[str, Any]:
        """An attempt that ends with a kill: nothing committed is lost, and what loads is right."""
        told = self.attempt(victims=victims, **how)
        first, *rest = victims
        for rank, status in enumerate(told["statuses"]):
            # The second of two victims may find out that the first is gone before it is killed.
            allowed = {KILLED} if rank == first else {KILLED, PEER_LOST} if rank in rest else {PEER_LOST}
            assert status in allowed, f"{how} {told}\n{self._errors.read_text()}"
        saved = [line["saved"] for line in self.lines() if "saved" in line]
        whole, damaged = newest_whole(self.checkpoints, verify=True)
        assert damaged == []
        if whole is None:
            assert self.committed == 0
            assert saved == []
            assert list_checkpoints(self.checkpoints) == []
        else:
            reader = CheckpointReader(whole)
            assert reader.step == list_checkpoints(self.checkpoints)[-1]
            assert reader.step >= max([self.committed, *saved]), "a committed step is lost"
            self.committed = reader.step
            self.uninterrupted.compare(reader)
        return told

    def finish(self) -> None:
        """Go on to the end, which is a few steps off: all is as without kills, and nothing else is left."""
        last = self.committed + 3
        told = self.attempt(victims=[], until=last)
        assert told["statuses"] == [0, 0], self._errors.read_text()
        reader = CheckpointReader(checkpoint_path(self.checkpoints, last))
        reader.verify()
        self.uninterrupted.compare(reader)
        lines = [line for line in self.lines() if "loss" in line]
        assert {line["step"] for line in lines} == set(range(1, last + 1))
        for line in lines:
            assert line["loss"] == self.uninterrupted.losses[line["step"] - 1]
        assert [path.name for path in self.checkpoints.iterdir()] == [reader.path.name]
        names = ["COMMITTED", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
        assert sorted(path.name for path in (self.checkpoints / reader.path.name).iterdir()) == names

    def lines(self) -> list[dict[str, Any]]:
        """Of the metrics: each is there or is not, whenever rank 0 was killed."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    drill = Drill(tmp_path / "run", tmp_path / "errors.txt")
    yield drill
    drill.close()


@pytest.mark.parametrize("num_kills", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_of_one_or_all_ranks_loses_nothing(drill: Drill, num_kills: int) -> None:
    """Every save deletes the checkpoint before. Half of the kills aim at a phase, half hit what they hit; the
    ranks hold other parts at every start."""
    luck = random.Random(num_kills)
    hits: Counter[str] = Counter()
    while hits.total() < num_kills or min(hits[phase] for phase in MUST_BE_HIT) < num_kills // 30:
        phase = luck.choice(MUST_BE_HIT) if luck.random() < 0.5 else None
        told = drill.kill(
            luck.choice(VICTIMS),
            phase=phase,
            delay_s=luck.uniform(0, 0.002 if phase else 0.1),
            border=luck.randint(1, NUM_ROWS - 1),
            in_background=luck.random() < 0.5,
        )
        hits[told["phase"]] += 1
        assert hits.total() < 2 * num_kills, f"phases that kills do not hit: {hits}"
    drill.finish()
    assert drill.committed > num_kills // 4, "the kills left no time to train"
    print(f"{hits.total()} kills: {dict(hits)}; {drill.committed + 3} steps")


@pytest.mark.parametrize(("rank", "num_operations"), [(0, 20), (1, 2)])
def test_kill_9_before_each_file_operation_of_two_saves_loses_nothing(
    drill: Drill, rank: int, num_operations: int
) -> None:
    """From a folder with one checkpoint on, which the first save deletes; rank 1 only opens its file."""
    drill.attempt(victims=[], until=1)
    start = drill.folder.rename(drill.folder.with_name("start"))
    for die_at in range(1, 100):
        shutil.copytree(start, drill.folder)
        drill.committed, drill.uninterrupted = 1, Uninterrupted()
        drill.kill([rank], die_at=die_at, in_background=False)
        has_saved_twice = drill.committed >= 3
        drill.finish()
        shutil.rmtree(drill.folder)
        if has_saved_twice:
            assert die_at > num_operations, "operations were not heard of"
            return
    pytest.fail("no end of operations")


def test_a_second_run_in_one_folder_is_refused_and_the_first_goes_on(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    endless = ("train.total_tokens=2000000", "data.max_epochs=999", "run.intent=fresh_or_resume")
    arguments = train_arguments(data, folder, *endless, "save.every_steps=1")
    first = launcher.start(arguments)
    wait_for(lambda: len(list_checkpoints(folder / "checkpoints")) > 1)
    facts = {name: (folder / name).read_bytes() for name in ("run.json", "config.yaml")}
    status, text = launcher.run([*arguments, "optimizer.peak_lr=0.5"])
    assert status == EXIT_FAILED
    assert f"{folder} is being written by pid {first.processes[0].pid} on " in text
    assert {name: (folder / name).read_bytes() for name in facts} == facts
    steps_done = max(line["step"] for line in _steps(folder))
    wait_for(lambda: max(list_checkpoints(folder / "checkpoints")) > steps_done + 2)
    first.signal(signal.SIGTERM)
    assert first.wait() == EXIT_AGAIN, first.text()
    assert {line["attempt"] for line in _lines(folder)} == {1}


@pytest.mark.slow
def test_kill_9_of_one_or_all_of_two_ranks_in_training_ends_bit_equal(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    """Half of the kills at any moment from the start on, half while it saves at every step."""
    layout = (
        "parallel.tp_size=2",
        "train.eval_every_steps=0",
        f"train.total_tokens={NUM_STEPS * 8 * 32}",
        "data.max_epochs=99",
        "train.process_group_timeout_s=20",  # a rank that is killed before they meet is waited for so long
    )
    status, text = launcher.run(
        train_arguments(data, tmp_path / "whole", *layout, f"save.every_steps={NUM_STEPS}"), num_ranks=2
    )
    assert status == 0, text
    folder = tmp_path / "run"
    saved = folder / "checkpoints"
    arguments = train_arguments(
        data,
        folder,
        *layout,
        *("save.every_steps=1", "save.keep_last=1", "run.intent=fresh_or_resume"),
        "run.max_same_failures=0",  # kills may well come at one step three times
    )
    luck, committed, kills = random.Random(20), 0, 0

    def has_saved_after(step: int) -> bool:
        return max(list_checkpoints(saved), default=0) > step

    while kills < 20:
        run = launcher.start(arguments, num_ranks=2)
        if kills % 2:
            wait_for(partial(has_saved_after, committed))
        time.sleep(luck.uniform(0.0, 0.4 if kills % 2 else 4.0))
        victims = luck.choice(VICTIMS)
        assert run.processes[victims[0]].is_alive(), run.text()
        for rank in victims:
            run.processes[rank].kill()
        for process in run.processes:
            process.join(timeout=60)
            assert not process.is_alive(), f"a rank waits for a dead one:\n{run.text()}"
        kills += 1
        whole, damaged = newest_whole(saved, verify=True)
        assert damaged == []
        told = [line["step"] for line in _lines(folder) if line["kind"] == "checkpoint"]
        found = 0 if whole is None else CheckpointReader(whole).step
        assert found >= max([committed, *told]), "a committed step is lost"
        committed = found
    assert committed > 20
    status, text = launcher.run(arguments, num_ranks=2)
    assert status == 0, text
    expected = {line["step"]: line["loss"] for line in _steps(tmp_path / "whole")}
    assert {line["step"] for line in _steps(folder)} == set(expected) == set(range(1, NUM_STEPS + 1))
    for line in _steps(folder):
        assert line["loss"] == expected[line["step"]], f"step {line['step']} of attempt {line['attempt']}"
    ours, theirs = (
        CheckpointReader(checkpoint_path(of / "checkpoints", NUM_STEPS))
        for of in (folder, tmp_path / "whole")
    )
    assert ours.kinds == theirs.kinds == ["exp_avg", "exp_avg_sq", "weight"]
    for kind in theirs.kinds:
        for name in theirs.shapes(kind):
            assert np.array_equal(ours.read(kind, name), theirs.read(kind, name)), f"{kind} {name}"
    print(f"{kills} kills over {committed} steps")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Every line of a step, those that were done again included."""
    return [line for line in _lines(folder) if line["kind"] == "step"]
