"""Process groups along the axes of the grid. Made once, and handed to who needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from llmtrain.parallel.topology import Topology


@dataclass(frozen=True)
class Axis:
    """This rank's place among the ranks it talks with."""

    rank: int
    size: int
    ranks: tuple[int, ...]
    """Their global ranks, in order."""
    group: dist.ProcessGroup | None
    """None where the axis has one rank: there is nobody to talk with."""


@dataclass(frozen=True)
class Groups:
    topology: Topology
    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    data: Axis
    """dp x cp: the ranks that hold the same weights and see other tokens. ZeRO splits state over them."""
    replica: Axis
    """pp x cp x tp: the ranks that work on the same rows."""


def build_groups(topology: Topology) -> Groups:
    """Every rank calls this, in the same order as every other collective."""

    def axis(*axes: str) -> Axis:
        mine = Axis(0, 1, (dist.get_rank(),), None)
        for ranks in topology.groups(*axes):
            if len(ranks) == 1:
                continue
            # of all ranks, also of those outside it
            group = dist.new_group(ranks, group_desc=" x ".join(axes))
            if dist.get_rank() in ranks:
                mine = Axis(ranks.index(dist.get_rank()), len(ranks), tuple(ranks), group)
        return mine

    assert topology.world_size == dist.get_world_size(), f"{topology} and {dist.get_world_size()} ranks"
    return Groups(
        topology=topology,
        pp=axis("pp"),
        dp=axis("dp"),
        cp=axis("cp"),
        tp=axis("tp"),
        data=axis("dp", "cp"),
        replica=axis("pp", "cp", "tp"),
    )


def split_axis(axis: Axis, size: int) -> Axis:
    """This rank's place among each `size` neighbours of `axis`. Every rank calls this."""
    if size == 1:
        return Axis(0, 1, (dist.get_rank(),), None)
    everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, axis.ranks)
    mine = axis
    for ranks in sorted(set(everyone)):
        for first in range(0, len(ranks), size):
            some = ranks[first : first + size]
            group = dist.new_group(list(some))
            if dist.get_rank() in some:
                mine = Axis(some.index(dist.get_rank()), size, some, group)
    return mine
