"""The grid's order is DeepSpeed's, its groups tile the ranks, and cuts of a pipeline are the best."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import ConfigError
from llmtrain.parallel.balance import balanced_cuts
from llmtrain.parallel.topology import AXES, Topology

GRIDS = [(2, 3, 1, 4), (4, 2, 1, 1), (1, 2, 2, 2), (2, 1, 2, 3)]


@pytest.mark.filterwarnings("default")  # DeepSpeed's own imports warn
@pytest.mark.parametrize(("pp", "dp", "tp"), [(2, 3, 4), (4, 2, 1), (1, 1, 8)])
def test_grid_order_is_deepspeeds(pp: int, dp: int, tp: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: PLC0415  it warns

    theirs = PipeModelDataParallelTopology(num_pp=pp, num_dp=dp, num_mp=tp)
    ours = Topology(pp_size=pp, dp_size=dp, tp_size=tp)
    for rank in range(ours.world_size):
        at = theirs.get_coord(rank)
        assert ours.coordinates(rank) == {"pp": at.pipe, "dp": at.data, "cp": 0, "tp": at.model}


@pytest.mark.parametrize("sizes", GRIDS)
def test_ranks_and_coordinates_are_each_others_inverse_and_tp_is_fastest(sizes: tuple[int, ...]) -> None:
    grid = Topology(**{f"{axis}_size": size for axis, size in zip(AXES, sizes, strict=True)})
    places = list(itertools.product(*map(range, sizes)))
    assert [tuple(grid.coordinates(rank).values())[::-1] for rank in range(grid.world_size)] == places
    for rank in range(grid.world_size):
        assert grid.rank_of(**grid.coordinates(rank)) == rank


@pytest.mark.parametrize("sizes", GRIDS)
def test_groups_along_any_axes_hold_every_rank_once_and_differ_there_alone(sizes: tuple[int, ...]) -> None:
    grid = Topology(**{f"{axis}_size": size for axis, size in zip(AXES, sizes, strict=True)})
    for count in range(1, 5):
        for axes in itertools.combinations(AXES, count):
            groups = grid.groups(*axes)
            assert sorted(itertools.chain(*groups)) == list(range(grid.world_size))
            for ranks in groups:
                assert ranks == sorted(ranks)
                places = [grid.coordinates(rank) for rank in ranks]
                assert {axis for axis in AXES if len({place[axis] for place in places}) > 1} <= set(axes)


def test_a_world_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"world_size=10 is not a multiple .* = 2 \* 1 \* 4 = 8; launch 8 or 16"
    ):
        Topology.of_world(10, pp_size=2, cp_size=1, tp_size=4)
    assert Topology.of_world(24, pp_size=2, cp_size=3, tp_size=2).dp_size == 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_no_other_cut_has_a_cheaper_slowest_stage(costs: list[int], num_stages: int) -> None:
    num_stages = min(num_stages, len(costs))

    def slowest(cuts: list[int]) -> int:
        return max(sum(costs[first:last]) for first, last in itertools.pairwise(cuts))

    cuts = balanced_cuts(costs, num_stages)
    assert cuts == sorted(set(cuts))
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(costs), num_stages + 1)
    every = itertools.combinations(range(1, len(costs)), num_stages - 1)
    assert slowest(cuts) == min(slowest([0, *inner, len(costs)]) for inner in every)
