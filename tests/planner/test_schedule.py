"""Closed forms of pipeline schedules against their simulation."""

import itertools

import numpy as np
import pytest

from llmtrain.planner.cost import schedule

RATIOS = [(1.0, 2.0), (1.0, 3.0), (2.0, 4.5), (0.7, 1.4)]
"""Seconds of a rank's forward and backward pass of a micro batch."""


def bubble(kind, *, pp, vpp=1, forward, backward, weight=0.0):
    found = schedule.bubble_s(
        np.array([float(kind)]),
        pp=np.array([float(pp)]),
        vpp=np.array([float(vpp)]),
        forward=np.array([forward]),
        backward=np.array([backward]),
        weight=np.array([weight]),
    )
    return found[0]


def held(kind, *, pp, vpp=1, num_micro_batches):
    found = schedule.held_micro_batches(
        np.full(pp, float(kind)),
        pp=np.full(pp, float(pp)),
        vpp=np.full(pp, float(vpp)),
        num_micro_batches=np.full(pp, float(num_micro_batches)),
        rank=np.arange(pp, dtype=float),
    )
    return found.tolist()


def waited(orders, *, num_micro_batches, forward, backward, weight=0.0, stages=1):
    """Seconds on top of a rank's own work, and what each rank held, in micro batches."""
    seconds = {"F": forward / stages, "B": (backward - weight) / stages, "W": weight / stages}
    found = schedule.simulate(orders, lambda work: seconds[work.kind])
    peak = [count / stages for count in found.peak_held]
    return found.makespan - num_micro_batches * (forward + backward), peak


@pytest.mark.parametrize(("pp", "num_micro_batches"), [*itertools.product([1, 2, 3, 4, 8], [1, 2, 3, 8, 17])])
def test_1f1b_waits_and_holds_as_simulated(pp, num_micro_batches):
    orders = [
        schedule.one_f_one_b_order(rank, pp=pp, num_micro_batches=num_micro_batches) for rank in range(pp)
    ]
    for forward, backward in [*RATIOS, (1.0, 1.0), (2.0, 1.0)]:
        seconds, peak = waited(
            orders, num_micro_batches=num_micro_batches, forward=forward, backward=backward
        )
        form = bubble(schedule.ONE_F_ONE_B, pp=pp, forward=forward, backward=backward)
        assert form == pytest.approx(seconds, abs=1e-9)
        assert held(schedule.ONE_F_ONE_B, pp=pp, num_micro_batches=num_micro_batches) == peak


@pytest.mark.parametrize(("pp", "vpp", "rounds"), [*itertools.product([2, 3, 4, 6], [2, 3, 4], [1, 2, 4])])
def test_interleaving_waits_and_holds_as_simulated(pp, vpp, rounds):
    num = rounds * pp
    orders = [schedule.interleaved_order(rank, pp=pp, vpp=vpp, num_micro_batches=num) for rank in range(pp)]
    for forward, backward in [*RATIOS, (1.0, 1.0)]:
        seconds, peak = waited(orders, num_micro_batches=num, forward=forward, backward=backward, stages=vpp)
        form = bubble(schedule.INTERLEAVED, pp=pp, vpp=vpp, forward=forward, backward=backward)
        assert form == pytest.approx(seconds, abs=1e-9)
        assert held(schedule.INTERLEAVED, pp=pp, vpp=vpp, num_micro_batches=num) == pytest.approx(peak)


@pytest.mark.parametrize(("pp", "times"), [*itertools.product([2, 3, 4, 6], [2, 3, 5])])
def test_zero_bubble_waits_and_holds_as_simulated(pp, times):
    num = times * pp
    orders = [schedule.zero_bubble_order(rank, pp=pp, num_micro_batches=num) for rank in range(pp)]
    for forward, backward, weight in [(1.0, 2.0, 1.0), (1.0, 2.0, 0.8), (1.0, 2.5, 1.0), (1.0, 1.6, 0.8)]:
        seconds, peak = waited(
            orders, num_micro_batches=num, forward=forward, backward=backward, weight=weight
        )
        form = bubble(schedule.ZERO_BUBBLE, pp=pp, forward=forward, backward=backward, weight=weight)
        assert form == pytest.approx(seconds, abs=1e-9)
        assert held(schedule.ZERO_BUBBLE, pp=pp, num_micro_batches=num) == peak


@pytest.mark.parametrize(("pp", "extra"), [*itertools.product([2, 3, 4, 6, 8], [0, 1, 3, 9])])
def test_dual_pipe_v_waits_and_holds_as_simulated(pp, extra):
    num = 2 * pp + extra
    orders = [schedule.dual_pipe_v_order(rank, pp=pp, num_micro_batches=num) for rank in range(pp)]
    for forward, backward in RATIOS:
        seconds, peak = waited(orders, num_micro_batches=num, forward=forward, backward=backward, stages=2)
        form = bubble(schedule.DUAL_PIPE_V, pp=pp, vpp=2, forward=forward, backward=backward)
        assert form == pytest.approx(seconds, abs=1e-9)
        assert held(schedule.DUAL_PIPE_V, pp=pp, vpp=2, num_micro_batches=num) == peak
    seconds, _ = waited(orders, num_micro_batches=num, forward=1.0, backward=1.0, stages=2)
    form = bubble(schedule.DUAL_PIPE_V, pp=pp, vpp=2, forward=1.0, backward=1.0)
    assert 0 <= seconds - form <= 0.5 + 1e-9


def test_without_a_pipeline_nothing_waits():
    for kind in range(len(schedule.NAMES)):
        assert bubble(kind, pp=1, vpp=2, forward=1.0, backward=2.0, weight=1.0) == 0
        assert held(kind, pp=1, vpp=2, num_micro_batches=7) == [1]


def test_dual_pipe_v_order_is_deepspeeds():
    deepspeed = pytest.importorskip("deepspeed.runtime.pipe.schedule")
    names = {"ForwardPass": "F", "BackwardPass": "B"}
    for pp, num in [(2, 4), (3, 7), (4, 8), (4, 13)]:
        for rank in range(pp):
            theirs = []
            for commands in deepspeed.DualPipeVSchedule(num, pp, rank):
                for command in commands:
                    if type(command).__name__ in names:
                        stage = rank if command.phase == 0 else 2 * pp - 1 - rank
                        theirs.append((names[type(command).__name__], stage, command.buffer_id % num))
            ours = schedule.dual_pipe_v_order(rank, pp=pp, num_micro_batches=num)
            assert [(work.kind, work.stage, work.micro_batch) for turn in ours for work in turn] == theirs


def test_orders_that_wait_for_each_other_are_refused():
    first, second = schedule.Work("F", 0, 0), schedule.Work("F", 1, 0)
    with pytest.raises(ValueError, match="wait for each other"):
        schedule.simulate([[(schedule.Work("B", 0, 0),), (first,)], [(second,)]], lambda _: 1.0)
