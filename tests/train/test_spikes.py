"""What is a spike, what is done about it, and that a resumed watch judges as one that never stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.errors import ConfigError
from llmtrain.loader.skipped import SkippedWindow
from llmtrain.train.spike_config import SpikeAction, SpikeConfig
from llmtrain.train.spikes import SpikeWatch, Verdict, write_spike

ROWS = 8
Steps = Iterable[tuple[float, float]]


def config(**settings: Any) -> SpikeConfig:
    values = {"on_spike": SpikeAction.skip, "on_non_finite": SpikeAction.skip, "window_steps": 32}
    return SpikeConfig(**(values | {"warmup_steps": 16} | settings))


def ordinary(num_steps: int, seed: int = 0, *, level: float = 3.0) -> list[tuple[float, float]]:
    """Losses around a level, and norms whose logarithm is normal."""
    random = np.random.default_rng(seed)
    losses = level + 0.02 * random.standard_normal(num_steps)
    norms = np.exp(0.2 * random.standard_normal(num_steps))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def judged(watch: SpikeWatch, steps: Steps, *, first_step: int = 1) -> list[Verdict]:
    return [
        watch.judge(step=step, first=(step - 1) * ROWS, last=step * ROWS - 1, loss=loss, grad_norm=norm)
        for step, (loss, norm) in enumerate(steps, start=first_step)
    ]


def acted(verdicts: Iterable[Verdict]) -> dict[int, str]:
    """Number, from 1, of each step that is not passed in silence, and what was done."""
    return {
        number: verdict.action.name
        for number, verdict in enumerate(verdicts, start=1)
        if verdict.action is not SpikeAction.ignore
    }


# -- what is a spike


@pytest.mark.parametrize(
    ("spike", "quantity"), [((4.0, 1.0), "loss"), ((3.0, 40.0), "grad_norm"), ((4.0, 40.0), "loss")]
)
def test_a_jump_of_loss_or_norm_is_a_spike(spike: tuple[float, float], quantity: str) -> None:
    watch = SpikeWatch(config())
    assert acted(judged(watch, ordinary(40))) == {}
    [verdict] = judged(watch, [spike], first_step=41)
    assert verdict.action is SpikeAction.skip
    assert not verdict.updates
    assert verdict.quantity == quantity
    assert verdict.z is not None
    assert verdict.z > 8
    assert verdict.median == pytest.approx(3.0 if quantity == "loss" else 1.0, rel=0.1)
    assert f"{quantity}={verdict.value:.4g} is" in verdict.reason


def test_only_rises_count() -> None:
    watch = SpikeWatch(config())
    assert acted(judged(watch, [*ordinary(40), (0.5, 1e-4), (3.0, 0.0)])) == {}


def test_nothing_is_a_spike_in_the_warm_up() -> None:
    watch = SpikeWatch(config(warmup_steps=20))
    wild = [(11.0 - step / 2 + 5 * (step % 7 == 0), 10.0 ** (step % 4)) for step in range(20)]
    assert acted(judged(watch, wild)) == {}


def early_training(num_steps: int, seed: int) -> Iterator[tuple[float, float]]:
    """A loss that falls as a power of the step and norms that fall with it, with heavy tails (Student's t of
    5 degrees of freedom)."""
    random = np.random.default_rng(seed)
    for step in range(1, num_steps + 1):
        loss = 2.5 + 8.5 * step**-0.35 + 0.02 * random.standard_t(5)
        norm = (1 + 20 * step**-0.7) * math.exp(0.2 * random.standard_t(5))
        yield loss, norm


def test_early_training_raises_few_false_alarms_with_the_defaults() -> None:
    """10,000 steps of which none is a spike; a run's beginning is 10 times among them."""
    alarms = 0
    for seed in range(10):
        watch = SpikeWatch(SpikeConfig(on_spike=SpikeAction.skip, budget=10**9))
        alarms += len(acted(judged(watch, early_training(1000, seed))))
    assert alarms <= 5, "tails as heavy as these make a false alarm in 2,000 steps at most"


def test_losses_that_hardly_differ_make_no_spike_of_noise() -> None:
    watch = SpikeWatch(config())
    still = [(3.0, 1.0)] * 40
    assert acted(judged(watch, [*still, (3.05, 1.2), (3.0, 1.0)])) == {}
    assert acted(judged(watch, [(3.09, 1.0)], first_step=43)) == {1: "skip"}


def test_a_spike_does_not_hide_the_next() -> None:
    """A mean and a deviation that followed the first would let the second pass."""
    watch = SpikeWatch(config())
    steps = [*ordinary(40), (9.0, 900.0), *ordinary(3, 1), (4.0, 1.0), *ordinary(3, 2), (4.0, 1.0)]
    assert acted(judged(watch, steps)) == {41: "skip", 45: "skip", 49: "skip"}


def test_a_new_level_is_a_spike_for_so_many_steps_as_the_warm_up_has() -> None:
    watch = SpikeWatch(config(on_spike=SpikeAction.skip, budget=99))
    verdicts = judged(watch, [*ordinary(40), *ordinary(60, 1, level=5.0)])
    assert list(acted(verdicts)) == list(range(41, 57))
    assert acted(judged(watch, [(7.0, 1.0)], first_step=101)) == {1: "skip"}, "of the new level it is one"


def test_a_watch_that_begins_again_takes_what_comes_for_ordinary() -> None:
    """At the start of another data mixture."""
    watch = SpikeWatch(config())
    judged(watch, ordinary(40))
    watch.begin_again()
    assert acted(judged(watch, ordinary(30, 1, level=5.0), first_step=41)) == {}
    assert acted(judged(watch, [(7.0, 1.0)], first_step=71)) == {1: "skip"}


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.inf), (math.inf, math.nan), (3.0, math.nan)])
def test_what_is_not_finite_is_found_in_the_first_step_and_enters_nothing(bad: tuple[float, float]) -> None:
    watch = SpikeWatch(config())
    assert acted(judged(watch, [bad, *ordinary(40), bad])) == {1: "skip", 42: "skip"}
    assert all(math.isfinite(value) for value in watch.state()["loss"]["values"])
    assert acted(judged(watch, [(4.0, 1.0)], first_step=43)) == {1: "skip"}


# -- what is done


@pytest.mark.parametrize("action", [SpikeAction.skip, SpikeAction.rollback, SpikeAction.stop])
def test_every_action_is_the_one_that_was_asked_for(action: SpikeAction) -> None:
    spiked = judged(SpikeWatch(config(on_spike=action)), [*ordinary(40), (4.0, 1.0)])
    assert acted(spiked) == {41: action.name}
    broken = judged(SpikeWatch(config(on_non_finite=action)), [(math.nan, 1.0)])
    assert acted(broken) == {1: action.name}
    assert not broken[0].updates
    assert broken[0].reason == "loss=nan"


def test_a_warning_lets_the_step_through_and_is_not_said_again_at_once() -> None:
    watch = SpikeWatch(config(on_spike=SpikeAction.warn, cooldown_steps=10))
    verdicts = judged(watch, [*ordinary(40), *[(4.0, 1.0)] * 12, *ordinary(20, 1)])
    assert acted(verdicts) == {41: "warn", 51: "warn"}
    assert all(verdict.updates for verdict in verdicts)


def test_with_ignore_nothing_is_looked_for_but_what_is_not_finite() -> None:
    watch = SpikeWatch(config(on_spike=SpikeAction.ignore))
    assert acted(judged(watch, [*ordinary(40), (99.0, 1.0), (math.nan, 1.0)])) == {42: "skip"}


def test_a_budget_that_is_used_up_stops_the_run_and_comes_back_with_time() -> None:
    steps = ordinary(200)
    for spiky in (40, 50, 60, 170):
        steps[spiky - 1] = (4.0, 1.0)
    watch = SpikeWatch(config(budget=2, budget_steps=100))
    verdicts = judged(watch, steps)
    assert acted(verdicts) == {40: "skip", 50: "skip", 60: "stop", 170: "skip"}
    assert "spikes.budget=2 in spikes.budget_steps=100 is used up, at steps 40, 50" in verdicts[59].reason
    none = judged(SpikeWatch(config(budget=0)), [(math.nan, 1.0)])
    assert acted(none) == {1: "stop"}


def test_a_spike_soon_after_a_rollback_is_withheld_instead() -> None:
    steps = ordinary(100)
    for spiky in (40, 60, 69, 70):
        steps[spiky - 1] = (4.0, 1.0)
    verdicts = judged(SpikeWatch(config(on_spike=SpikeAction.rollback, cooldown_steps=30)), steps)
    assert acted(verdicts) == {40: "rollback", 60: "skip", 69: "skip", 70: "rollback"}
    assert "no rollback so soon after that of step 40" in verdicts[59].reason


@pytest.mark.parametrize(("before", "first"), [(0, 40), (2, 38), (99, 0)])
def test_a_rollback_passes_over_the_rows_of_the_spike_and_of_as_many_steps_before_as_asked(
    before: int, first: int
) -> None:
    watch = SpikeWatch(config(on_spike=SpikeAction.rollback, rollback_steps_before=before))
    verdict = judged(watch, [*ordinary(40), (4.0, 1.0)])[-1]
    assert (verdict.skip_first, verdict.skip_last) == (first * ROWS, 41 * ROWS - 1)


# -- state


def spiky(num_steps: int, seed: int) -> list[tuple[float, float]]:
    random = np.random.default_rng(seed)
    steps = ordinary(num_steps, seed)
    for at in random.integers(20, num_steps, num_steps // 8).tolist():
        steps[at] = [(4.0, 1.0), (3.0, 80.0), (math.nan, 1.0), (3.2, 1.0)][int(random.integers(4))]
    return steps


@pytest.mark.parametrize("action", list(SpikeAction))
@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_watch_judges_as_one_that_never_stopped(action: SpikeAction, seed: int) -> None:
    """Stopped after every step, through the text of a checkpoint."""
    cfg = config(on_spike=action, budget=6, budget_steps=60, cooldown_steps=7, rollback_steps_before=3)
    steps = spiky(160, seed)
    steps[90:120] = ordinary(30, seed, level=4.5)  # a new level in between
    whole = SpikeWatch(cfg)
    verdicts = judged(whole, steps)
    watch, again = SpikeWatch(cfg), []
    for number, step in enumerate(steps, start=1):
        again += judged(watch, [step], first_step=number)
        watch = SpikeWatch.from_state(cfg, json.loads(json.dumps(watch.state())))
    assert str(again) == str(verdicts)
    assert watch.state() == whole.state()
    assert len(acted(verdicts)) >= (1 if action is SpikeAction.ignore else 3)


def test_after_a_rollback_a_process_that_stayed_and_one_that_came_anew_judge_alike() -> None:
    """Both begin with the checkpoint's state and the file of windows; the checkpoint knows nothing of the
    rollback, and the budget must not forget it."""
    cfg = config(on_spike=SpikeAction.rollback, budget=1, cooldown_steps=0)
    watch = SpikeWatch(cfg)
    judged(watch, ordinary(40))
    saved = json.loads(json.dumps(watch.state()))
    verdict = judged(watch, [*ordinary(4, 1), (4.0, 1.0)], first_step=41)[-1]
    assert verdict.action is SpikeAction.rollback
    window = SkippedWindow(
        first=verdict.skip_first, last=verdict.skip_last, step=45, attempt=1, reason=verdict.reason
    )
    stayed = SpikeWatch.from_state(cfg, saved, [window])
    judged(stayed, ordinary(4, 1), first_step=41)
    came = SpikeWatch.from_state(cfg, json.loads(json.dumps(stayed.state())), [window])
    for each in (stayed, came):
        [again] = judged(each, [(4.0, 1.0)], first_step=45)
        assert again.action is SpikeAction.stop
    assert stayed.state() == came.state()
    forgot = SpikeWatch.from_state(cfg, saved)
    [verdict] = judged(forgot, [(4.0, 1.0)], first_step=45)
    assert verdict.action is SpikeAction.rollback, "without the file it would go round for ever"


def test_a_shorter_window_keeps_the_newest_steps() -> None:
    watch = SpikeWatch(config(window_steps=64))
    judged(watch, ordinary(50))
    newest = watch.state()["loss"]["values"][-32:]
    assert SpikeWatch.from_state(config(), watch.state()).state()["loss"]["values"] == newest


# -- settings and files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_non_finite": SpikeAction.warn}, r"spikes.on_non_finite=warn: .* choose skip, rollback or stop"),
        ({"on_non_finite": SpikeAction.ignore}, "spikes.on_non_finite=ignore"),
        ({"loss_z": 0.0}, "spikes.loss_z=0.0 must be finite and above 0"),
        ({"grad_norm_z": math.inf}, "spikes.grad_norm_z=inf"),
        ({"warmup_steps": 8}, "need 16 <= spikes.warmup_steps <= spikes.window_steps, got 8 and 128"),
        ({"window_steps": 32}, "got 64 and 32"),
        ({"budget": -1}, "spikes.budget=-1 must be at least 0"),
        ({"budget_steps": 0}, "spikes.budget_steps=0 must be at least 1"),
        ({"cooldown_steps": -1}, "spikes.cooldown_steps=-1"),
        ({"rollback_checkpoints": 0}, "spikes.rollback_checkpoints=0 must be at least 1"),
        ({"rollback_steps_before": -1}, "spikes.rollback_steps_before=-1"),
    ],
)
def test_a_setting_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpikeConfig(**settings)


def test_the_defaults_ask_nothing_of_an_engine() -> None:
    assert not SpikeConfig().withholds
    assert not SpikeConfig(on_spike=SpikeAction.stop).withholds
    assert SpikeConfig(on_non_finite=SpikeAction.skip).withholds
    assert SpikeConfig(on_spike=SpikeAction.rollback).withholds


def test_a_spike_has_a_file_with_its_step_and_rows(tmp_path: Path) -> None:
    watch = SpikeWatch(config())
    [verdict] = judged(watch, [(math.nan, 1.0)], first_step=123)
    path = write_spike(tmp_path, verdict, step=123, first=976, last=983, lr=0.001, documents=[])
    assert path == tmp_path / "spikes" / "step-000123-row-976.json"
    assert json.loads(path.read_text()) == {
        "action": "skip",
        "documents": [],
        "first": 976,
        "last": 983,
        "lr": 0.001,
        "median": None,
        "quantity": "loss",
        "reason": "loss=nan",
        "skip_first": 976,
        "skip_last": 983,
        "step": 123,
        "value": "nan",
        "z": None,
    }
    assert (
        path.read_text()
        == write_spike(tmp_path, verdict, step=123, first=976, last=983, lr=0.001, documents=[]).read_text()
    )
    assert len(list((tmp_path / "spikes").iterdir())) == 1
