"""The process grid (pp, dp, cp, tp), tp fastest: which rank stands where, who talks with whom. stdlib only.

The order is Megatron's and DeepSpeed's: tensor-parallel ranks, which talk most, are neighbours on a node.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from llmtrain.errors import ConfigError

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class Topology:
    pp_size: int = 1
    """Pipeline: stages of consecutive layers."""
    dp_size: int = 1
    """Data: other rows."""
    cp_size: int = 1
    """Context: other positions of the same rows."""
    tp_size: int = 1
    """Tensor: other parts of the same matrices."""

    @classmethod
    def of_world(cls, world_size: int, *, pp_size: int, cp_size: int, tp_size: int) -> Topology:
        """The grid in which data parallelism takes what the other axes leave.

        Raises:
            ConfigError: `world_size` is not a multiple of their product.
        """
        each = pp_size * cp_size * tp_size
        if world_size < 1 or world_size % each:
            fits = sorted({max(1, world_size // each) * each, (world_size // each + 1) * each})
            raise ConfigError(
                f"world_size={world_size} is not a multiple of parallel.pp_size * cp_size * tp_size = "
                f"{pp_size} * {cp_size} * {tp_size} = {each}; launch {' or '.join(map(str, fits))} ranks, or "
                "lower one of them"
            )
        return cls(pp_size=pp_size, dp_size=world_size // each, cp_size=cp_size, tp_size=tp_size)

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, f"{axis}_size") for axis in AXES}

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes.values())

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of a global rank on every axis."""
        assert 0 <= rank < self.world_size, f"{rank=} is outside {self.world_size=}"
        at = {}
        for axis in reversed(AXES):
            rank, at[axis] = divmod(rank, self.sizes[axis])
        return at

    def rank_of(self, **at: int) -> int:
        """Global rank at these coordinates; an axis that is not named is 0."""
        rank = 0
        for axis in AXES:
            rank = rank * self.sizes[axis] + at.get(axis, 0)
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """Global ranks that differ on `axes` alone, a list each, ascending; together they are every rank."""
        others = [axis for axis in AXES if axis not in axes]
        fixed = itertools.product(*(range(self.sizes[axis]) for axis in others))
        return [
            [
                self.rank_of(**dict(zip(others, place, strict=True)), **dict(zip(axes, along, strict=True)))
                for along in itertools.product(*(range(self.sizes[axis]) for axis in axes))
            ]
            for place in fixed
        ]
