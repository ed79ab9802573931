"""Seconds of collectives against sums by hand and nccl-tests."""

from dataclasses import replace

import numpy as np
import pytest

from llmtrain.planner.cost import collectives
from llmtrain.planner.cost.calibration import read_rows

ONE = np.ones(1)
A100 = collectives.Links(
    gpus_per_node=8 * ONE,
    link_bytes_s=300e9 * collectives.LINK_EFFICIENCY * ONE,
    node_bytes_s=100e9 * ONE,
)
FREE = replace(A100, call_s=0.0)


def seconds(collective, num_bytes, links=A100, *, size, stride=1):
    return float(collective(num_bytes * ONE, links, size=size * ONE, stride=stride * ONE)[0])


def test_nccl_all_reduces_are_predicted_within_8_percent():
    table = read_rows("nccl_all_reduce.csv")
    is_a100 = table["gpu"] == "a100"
    predicted = collectives.all_reduce_s(
        table["bytes"][is_a100], A100, size=table["n_gpus"][is_a100], stride=ONE
    )
    error = np.abs(predicted / (table["time_us"][is_a100] * 1e-6) - 1)
    assert len(error) == 77
    assert np.median(error) < 0.08
    assert np.quantile(error, 0.9) < 0.25


def test_ring_of_one_node_is_the_sum_by_hand():
    found = seconds(collectives.all_reduce_s, 1e9, size=8)
    by_hand = collectives.CALL_S + 2 * 7 * collectives.HOP_S + 2 * 7 / 8 * 1e9 / (300e9 * 0.71)
    assert found == pytest.approx(by_hand)
    assert seconds(collectives.all_gather_s, 1e9, size=8) == pytest.approx(found / 2)


def test_a_group_over_two_nodes_has_all_cards_of_its_node():
    """tp=16 on nodes of 8: one ring, which alone uses a node's network."""
    wire = 2 * 15 / 16 * 1e9 / 100e9
    assert seconds(collectives.all_reduce_s, 1e9, FREE, size=16) == pytest.approx(wire, rel=0.01)


@pytest.mark.parametrize(("tp", "on_each_node"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_groups_of_an_axis_share_the_cards_of_a_node(tp, on_each_node):
    """Data-parallel groups of 32 at stride tp: tp of them run at once on every node."""
    links, size, stride = FREE, 32 * ONE, tp * ONE
    assert collectives.ranks_per_node(links, size=size, stride=stride)[0] == on_each_node
    assert collectives.ring_bytes_s(links, size=size, stride=stride)[0] == pytest.approx(100e9 / tp)


def test_far_strides_leave_one_rank_a_node():
    assert collectives.ring_bytes_s(FREE, size=4 * ONE, stride=64 * ONE)[0] == pytest.approx(100e9 / 8)


def test_a_group_that_fits_a_node_does_not_use_the_network():
    slow = replace(A100, node_bytes_s=1.0 * ONE)
    assert seconds(collectives.all_reduce_s, 1e9, slow, size=8) < 0.01
    assert seconds(collectives.all_reduce_s, 1e9, slow, size=4, stride=2) < 0.01
    assert seconds(collectives.all_reduce_s, 1e9, slow, size=4, stride=4) > 1e6


@pytest.mark.parametrize(
    "collective", [collectives.all_reduce_s, collectives.all_gather_s, collectives.all_to_all_s]
)
def test_more_bytes_take_longer_and_one_rank_none(collective):
    sizes = np.logspace(2, 11, 40)
    for size, stride in [(2, 1), (8, 1), (16, 1), (16, 8), (64, 2)]:
        found = collective(sizes, A100, size=size * ONE, stride=stride * ONE)
        assert (np.diff(found) > 0).all()
    assert seconds(collective, 1e9, size=1) == 0


def test_more_nodes_take_longer():
    found = [seconds(collectives.all_reduce_s, 1e8, size=size) for size in (2, 4, 8, 16, 64, 512)]
    assert found == sorted(found)


def test_all_to_all_splits_bytes_between_links_and_network():
    # 16 ranks on two nodes: 7/16 stay, 8/16 leave over the rank's eighth of the cards
    found = seconds(collectives.all_to_all_s, 1.6e9, FREE, size=16)
    assert found == pytest.approx(max(0.7e9 / (300e9 * 0.71), 0.8e9 / (100e9 / 8)))
    half = collectives.all_to_all_s(1.6e9 * ONE, FREE, size=16 * ONE, stride=ONE, outside_share=0.5)
    assert half[0] == pytest.approx(found / 2)


def test_neighbours_on_other_nodes_send_over_a_share_of_the_cards():
    inside = collectives.send_s(1e8 * ONE, FREE, stride=4 * ONE)[0]
    outside = collectives.send_s(1e8 * ONE, FREE, stride=8 * ONE)[0]
    assert inside == pytest.approx(1e8 / (300e9 * 0.71))
    assert outside == pytest.approx(1e8 / (100e9 / 8))
