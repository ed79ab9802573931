"""Pipeline schedules: seconds and held micro batches in closed form, and a simulation that the forms are held
against.

Stages are numbered in the order of the model. `forward` and `backward` are one rank's seconds a micro batch,
over all its stages; a backward pass holds the gradients of inputs and, of its seconds, `weight` for those of
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE, DUAL_PIPE_V = range(4)
NAMES = ("one_f_one_b", "interleaved", "zero_bubble", "dual_pipe_v")
"""One forward, one backward in turn; the same with `vpp` chunks a rank (both Narayanan et al. 2021,
arXiv:2104.04473, section 2.2); ZB-H1, which puts gradients of weights where a rank would wait (Qi et al.
2023, arXiv:2401.10241); two chunks a rank, out and back (DeepSeek-AI 2024, arXiv:2412.19437), as DeepSpeed
0.19.8 runs it: gradients of weights stay within the backward pass."""


def bubble_s(
    schedule: np.ndarray,
    *,
    pp: np.ndarray,
    vpp: np.ndarray,
    forward: np.ndarray,
    backward: np.ndarray,
    weight: np.ndarray,
) -> np.ndarray:
    """Seconds of a step that a rank waits when all take equally long: what comes on top of micro batches
    times (forward + backward).

    | schedule | seconds | from |
    |---|---|---|
    | 1F1B | (pp - 1) (forward + backward) | arXiv:2104.04473, section 2.2.1 |
    | interleaved | the same / vpp | section 2.2.2; micro batches a multiple of pp |
    | zero bubble (H1) | (pp - 1) (forward + backward - 2 weight) | arXiv:2401.10241, table 2 |
    | DualPipeV | (pp - 1) (forward + backward) - pp / 2 forward | the simulation below |

    Zero bubble: weight at most half of backward. DeepSpeed's DualPipeV neither runs two passes at once nor
    defers gradients of weights, which the paper's (pp / 2 - 1) (F&B + B - 3 W) counts on; its row is for
    backward of 2 forward or more, and up to half a forward pass too short where they are equal.
    """
    each = np.stack(
        [
            (pp - 1) * (forward + backward),
            (pp - 1) * (forward + backward) / vpp,
            (pp - 1) * (forward + backward - 2 * weight),
            np.where(pp > 1, (pp - 1) * (forward + backward) - pp / 2 * forward, 0.0),
        ]
    )
    found: np.ndarray = np.take_along_axis(each, schedule[None].astype(int), axis=0)[0]
    return found


def held_micro_batches(
    schedule: np.ndarray, *, pp: np.ndarray, vpp: np.ndarray, num_micro_batches: np.ndarray, rank: np.ndarray
) -> np.ndarray:
    """The most micro batches whose activations a rank holds at once, in parts of what all its stages keep of
    one.

    1F1B: pp - rank. Interleaved: 2 (pp - rank - 1) + (vpp - 1) pp + 1 chunks of 1 / vpp (arXiv:2104.04473).
    ZB-H1: pp, until their gradients of weights are there. DualPipeV: 2 pp + 1 chunks of a half at most
    (arXiv:2412.19437, table 2: PP + 1). Never more than there are.
    """
    plain = pp - rank
    chunks = 2 * (pp - rank - 1) + (vpp - 1) * pp + 1
    each = np.stack([plain, chunks / vpp, pp + 0 * rank, pp + 0.5 + 0 * rank])
    found = np.take_along_axis(each, schedule[None].astype(int), axis=0)[0]
    fewest: np.ndarray = np.minimum(np.where(pp > 1, found, 1.0), num_micro_batches)
    return fewest


# -- simulation


@dataclass(frozen=True)
class Work:
    """One pass of one micro batch through one stage; `kind` is F, B (all of it, or gradients of inputs) or
    W."""

    kind: str
    stage: int
    micro_batch: int


Turn = tuple[Work, ...]
"""Work that a rank starts together, when what all of it needs has come, and whose results leave together."""


@dataclass(frozen=True)
class Simulated:
    makespan: float
    peak_held: tuple[int, ...]
    """Per rank: the most (stage, micro batch) pairs that have gone forward and not yet wholly come back."""


def simulate(orders: Sequence[Sequence[Turn]], seconds: Callable[[Work], float]) -> Simulated:
    """Run each rank's turns in its order, each as soon as what it needs is done; sending takes no time.

    Raises:
        ValueError: The orders wait for each other.
    """
    all_work = [work for order in orders for turn in order for work in turn]
    last_stage = max(work.stage for work in all_work)
    comes_back_with = "W" if any(work.kind == "W" for work in all_work) else "B"
    done: dict[Work, float] = {}
    clocks, heads = [0.0] * len(orders), [0] * len(orders)
    held, peak = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while heads[rank] < len(order):
                turn = order[heads[rank]]
                needs = [need for work in turn for need in _needs(work, last_stage) if need not in turn]
                if any(need not in done for need in needs):
                    break
                start = max([clocks[rank], *(done[need] for need in needs)])
                clocks[rank] = start + sum(seconds(work) for work in turn)
                for work in turn:
                    done[work] = clocks[rank]
                    held[rank] += (work.kind == "F") - (work.kind == comes_back_with)
                    peak[rank] = max(peak[rank], held[rank])
                heads[rank] += 1
                moved = True
    if any(head < len(order) for head, order in zip(heads, orders, strict=True)):
        raise ValueError("the orders of this schedule wait for each other")
    return Simulated(makespan=max(clocks), peak_held=tuple(peak))


def _needs(work: Work, last_stage: int) -> list[Work]:
    if work.kind == "F":
        return [Work("F", work.stage - 1, work.micro_batch)] if work.stage else []
    if work.kind == "W":
        return [Work("B", work.stage, work.micro_batch)]
    own = Work("F", work.stage, work.micro_batch)
    return [own] if work.stage == last_stage else [own, Work("B", work.stage + 1, work.micro_batch)]


def _in_turn(forward: list[Work], backward: list[Work], warm_up: int) -> list[Turn]:
    """`warm_up` forward passes, then one forward and one backward in turn, then what is left."""
    order: list[Turn] = [(work,) for work in forward[:warm_up]]
    for ahead, behind in zip(forward[warm_up:], backward, strict=False):
        order += [(ahead,), (behind,)]
    return order + [(work,) for work in backward[len(backward) - warm_up :]]


def one_f_one_b_order(rank: int, *, pp: int, num_micro_batches: int) -> list[Turn]:
    forward = [Work("F", rank, at) for at in range(num_micro_batches)]
    backward = [Work("B", rank, at) for at in range(num_micro_batches)]
    return _in_turn(forward, backward, min(pp - rank - 1, num_micro_batches))


def zero_bubble_order(rank: int, *, pp: int, num_micro_batches: int) -> list[Turn]:
    """ZB-H1 (arXiv:2401.10241, figure 3): 1F1B whose gradients of weights lag `rank` micro batches behind."""
    order: list[Turn] = []
    done = 0
    warm_up = min(pp - rank - 1, num_micro_batches)
    for at, turn in enumerate(one_f_one_b_order(rank, pp=pp, num_micro_batches=num_micro_batches)):
        order.append(turn)
        is_draining = at >= 2 * num_micro_batches - warm_up
        if turn[0].kind == "B" and (turn[0].micro_batch >= rank or is_draining):
            order.append((Work("W", rank, done),))
            done += 1
    return order + [(Work("W", rank, at),) for at in range(done, num_micro_batches)]


def interleaved_order(rank: int, *, pp: int, vpp: int, num_micro_batches: int) -> list[Turn]:
    """Megatron's: groups of pp micro batches pass through a rank's chunks in turn. num_micro_batches must be
    a multiple of pp."""
    total = num_micro_batches * vpp

    def at_turn(turn: int, *, is_forward: bool) -> Work:
        group, within = divmod(turn, pp * vpp)
        chunk = within // pp if is_forward else vpp - 1 - within // pp
        return Work("F" if is_forward else "B", chunk * pp + rank, group * pp + within % pp)

    forward = [at_turn(turn, is_forward=True) for turn in range(total)]
    backward = [at_turn(turn, is_forward=False) for turn in range(total)]
    return _in_turn(forward, backward, min(total, 2 * (pp - rank - 1) + (vpp - 1) * pp))


def dual_pipe_v_order(rank: int, *, pp: int, num_micro_batches: int) -> list[Turn]:
    """DeepSpeed 0.19.8, runtime/pipe/schedule.py DualPipeVSchedule: a forward and a backward pass whose
    results it sends together are one turn. num_micro_batches must be 2 pp or more."""
    order: list[Turn] = []
    stages = (rank, 2 * pp - 1 - rank)
    counts = {"F": [0, 0], "B": [0, 0]}

    def work(name: str) -> Work:
        kind, phase = name[0], int(name[1])
        counts[kind][phase] += 1
        return Work(kind, stages[phase], counts[kind][phase] - 1)

    def add(*turns: str, times: int = 1) -> None:
        for _ in range(times):
            order.extend(tuple(work(name) for name in turn.split("&")) for turn in turns)

    behind, steady = pp - rank - 1, num_micro_batches - 2 * pp + rank + 1
    add("F0", times=2 * behind)
    add("F0", "F1", times=rank + 1)
    add("B1", "F1", times=behind)
    if not behind:  # the last rank sends the first pair's results apart
        add("F0", "B1", "F1&B0")
        steady -= 1
    add("F0&B1", "F1&B0", times=steady)
    add("B1", "F1&B0", times=behind)
    add("B1", "B0", times=rank + 1)
    add("B0", times=behind)
    return order
