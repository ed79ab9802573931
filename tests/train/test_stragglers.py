"""Seconds by rank and phase, and who is slower than the others. A rank that is really slow is in
tests/dist/test_hangs.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from test_watchdog import beat_of

from llmtrain.tracking.beats import Beat, beat_path, write_beat
from llmtrain.train.stragglers import (
    MIN_STEPS,
    PATIENCE,
    Pace,
    StragglerReport,
    paces,
    record_of,
    slowness,
    straggler_in,
)


def beats(
    steps: int, forward_s: list[float], data_s: list[float] | None = None, **changes: object
) -> dict[int, Beat]:
    """After so many steps, of which each took rank r forward_s[r], and as long as the slowest together."""
    data_s = data_s or [0.0] * len(forward_s)
    longest = max(map(sum, zip(forward_s, data_s, strict=True)))
    return {
        rank: beat_of(
            rank,
            num_steps=steps,
            seconds={"forward": steps * own, "data": steps * data},
            waited={"backward": steps * (longest - own - data)},
            alive=steps,
            **changes,
        )
        for rank, (own, data) in enumerate(zip(forward_s, data_s, strict=True))
    }


def found(forward_s: list[float], data_s: list[float] | None = None, **changes: object) -> dict[int, Pace]:
    return paces(beats(10, forward_s, data_s, **changes), beats(20, forward_s, data_s, **changes))


def test_seconds_are_those_of_the_window() -> None:
    before = beats(10, [9.0, 9.0])
    after = {
        rank: beat_of(rank, num_steps=20, seconds={"forward": 90.0 + 10 * own}, waited={})
        for rank, own in enumerate((1.0, 1.3))
    }
    record = record_of(paces(before, after))
    assert record["compute_s_max"] == pytest.approx(1.3)
    assert record["compute_s_median"] == pytest.approx(1.15)
    assert (record["slowest_rank"], record["slowest_host"], record["num_steps"]) == (1, "node1", 10)
    assert record["slower"] == pytest.approx(0.3)


def test_a_window_waits_for_enough_steps_of_every_rank() -> None:
    assert paces(beats(10, [1.0, 1.0]), beats(10 + MIN_STEPS - 1, [1.0, 1.0])) == {}
    assert paces({}, beats(10, [1.0])) == {}
    assert paces(beats(10, [1.0]), beats(20, [1.0], attempt=2)) == {}, "another attempt begins anew"


def test_waiting_for_others_is_not_slowness() -> None:
    slower = slowness(found([1.0, 1.0, 1.5, 1.0]))
    assert slower[2] == pytest.approx(0.5)
    assert [slower[rank] for rank in (0, 1, 3)] == pytest.approx([0, 0, 0])
    assert record_of(found([1.0, 1.0, 1.5, 1.0]))["wait_s_median"] == pytest.approx(0.5)


def test_ranks_are_compared_with_those_of_the_same_work() -> None:
    """The last pipeline stage has the head: it takes longer, and is no straggler."""
    paced = found([1.0, 1.0, 2.0, 2.0])
    mixed = {rank: replace(pace, work=f"pp_stage {rank // 2}") for rank, pace in paced.items()}
    assert set(slowness(mixed).values()) == {0.0}
    alone = {rank: replace(pace, work=str(rank)) for rank, pace in paced.items()}
    assert slowness(alone) == {}
    assert record_of(alone)["slower"] is None


def test_where_only_launches_are_measured_waits_for_data_are_what_is_told() -> None:
    paced = found([1.0, 1.0, 9.0], [0.0, 0.5, 0.0], is_exact=False)
    record = record_of(paced)
    assert record["compute_s_max"] is None
    assert record["wait_s_median"] is None
    assert (record["data_s_max"], record["data_slowest_rank"]) == (pytest.approx(0.5), 1)
    assert slowness(paced) == pytest.approx({0: 0.0, 1: 0.5 / 9, 2: 0.0})
    assert straggler_in(paced, 1).phase == "data"


def test_a_rank_is_called_a_straggler_once_after_a_few_windows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = StragglerReport(tmp_path, token="t", world_size=3, slower_than=0.2)
    told = []
    for window in range(PATIENCE + 3):
        for rank, beat in beats(10 * window, [1.0, 1.0, 1.3], [0.0, 0.0, 0.1]).items():
            write_beat(beat_path(tmp_path, rank), beat)
        report.look()
        assert report._looking is not None
        report._looking.result(30)
        with caplog.at_level(logging.WARNING):
            told.append(report.take())
        assert report.take() is None
    assert told[0] is None, "a first look is no window"
    stragglers = [found and found[1] for found in told[1:]]
    assert [len(each) for each in stragglers] == [int(at == PATIENCE - 1) for at in range(PATIENCE + 2)]
    straggler = stragglers[PATIENCE - 1][0]
    assert (straggler.rank, straggler.phase) == (2, "forward")
    assert straggler.slower == pytest.approx(0.4)
    assert "rank 2 on node2 is 40% slower than the median" in caplog.text
    assert "most of it in forward, for 3 reports in a row" in caplog.text
    report.close()


def test_a_rank_without_a_beat_makes_no_report(tmp_path: Path) -> None:
    report = StragglerReport(tmp_path, token="t", world_size=2, slower_than=0.2)
    write_beat(beat_path(tmp_path, 0), beats(10, [1.0])[0])
    report.look()
    assert report._looking is not None
    report._looking.result(30)
    assert report.take() is None
    report.close()
