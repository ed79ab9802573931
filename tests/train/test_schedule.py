"""Learning rates."""

from __future__ import annotations

import pytest

from llmtrain.train.config import DecayShape, ScheduleConfig, ScheduleKind
from llmtrain.train.schedule import learning_rate


def rate(tokens: int, cfg: ScheduleConfig, step_tokens: int = 10) -> float:
    return learning_rate(tokens, step_tokens=step_tokens, total_tokens=1000, peak=2.0, cfg=cfg)


def test_the_first_update_already_moves() -> None:
    assert rate(0, ScheduleConfig(warmup_tokens=100)) == pytest.approx(0.2)


def test_warm_up_ends_at_the_peak() -> None:
    cfg = ScheduleConfig(warmup_tokens=100)
    assert rate(90, cfg) == pytest.approx(2.0)
    assert rate(100, cfg) == pytest.approx(2.0)


def test_cosine_passes_its_middle_and_ends_at_the_floor() -> None:
    cfg = ScheduleConfig(floor_ratio=0.1)
    assert rate(500, cfg) == pytest.approx((2.0 + 0.2) / 2)
    assert rate(1000, cfg) == pytest.approx(0.2)
    assert rate(5000, cfg) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_linear() -> None:
    cfg = ScheduleConfig(kind=ScheduleKind.wsd, warmup_tokens=100, decay_tokens=200, floor_ratio=0.0)
    assert rate(100, cfg) == rate(799, cfg) == 2.0
    assert rate(900, cfg) == pytest.approx(1.0)
    assert rate(1000, cfg) == 0.0


def test_wsd_may_go_down_by_the_square_root() -> None:
    cfg = ScheduleConfig(
        kind=ScheduleKind.wsd, decay_tokens=400, floor_ratio=0.25, decay_shape=DecayShape.sqrt
    )
    assert rate(600, cfg) == 2.0
    assert rate(700, cfg) == pytest.approx(2.0 - 1.5 * 0.5)
    assert rate(1000, cfg) == pytest.approx(0.5)


def test_inverse_sqrt_falls_from_the_end_of_warm_up_to_the_floor_and_knows_no_end() -> None:
    cfg = ScheduleConfig(kind=ScheduleKind.inverse_sqrt, warmup_tokens=100, floor_ratio=0.1)
    assert rate(100, cfg) == pytest.approx(2.0)
    assert rate(400, cfg) == pytest.approx(1.0)
    assert rate(2500, cfg) == pytest.approx(0.4)
    assert rate(100_000, cfg) == pytest.approx(0.2)


def test_constant_is_the_peak() -> None:
    cfg = ScheduleConfig(kind=ScheduleKind.constant, warmup_tokens=100)
    assert rate(40, cfg) == pytest.approx(1.0)
    assert rate(100, cfg) == rate(999, cfg) == rate(5000, cfg) == 2.0


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_a_batch_ramp_does_not_stretch_the_schedule(kind: ScheduleKind) -> None:
    cfg = ScheduleConfig(kind=kind, warmup_tokens=100, decay_tokens=200 if kind is ScheduleKind.wsd else None)
    assert rate(600, cfg, step_tokens=10) == rate(600, cfg, step_tokens=200)
