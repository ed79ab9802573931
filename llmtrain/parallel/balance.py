"""Where a list of layers is cut into pipeline stages: so that the slowest stage is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_cuts(costs: Sequence[float], num_stages: int) -> list[int]:
    """Indices [0, ..., len(costs)] of the cuts: stage i has layers [cuts[i], cuts[i + 1]), at least one.

    The largest stage's cost is the least possible, and of the ways to reach that, the later stages, which
    hold fewer activations in flight, get the more. O(len(costs)^2 * num_stages).
    """
    num = len(costs)
    assert 1 <= num_stages <= num, f"{num_stages=} of {num} layers"
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [[0.0] + [float("inf")] * num for _ in range(num_stages + 1)]
    best[0] = [0.0] + [float("inf")] * num
    cut = [[0] * (num + 1) for _ in range(num_stages + 1)]
    for stage in range(1, num_stages + 1):
        best[stage][0] = float("inf")
        for end in range(stage, num + 1):
            for start in range(stage - 1, end):
                worst = max(best[stage - 1][start], total[end] - total[start])
                if worst < best[stage][end]:
                    best[stage][end], cut[stage][end] = worst, start
    cuts = [num]
    for stage in range(num_stages, 0, -1):
        cuts.append(cut[stage][cuts[-1]])
    return cuts[::-1]
