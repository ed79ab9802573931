"""Tensors to save, pieces of them, and ranks that are threads."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.write import Ranks

TENSORS = {
    "embedding.weight": np.arange(60, dtype=np.float32).reshape(12, 5),
    "blocks.0.mlp.w_up.weight": np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3),
    "final_norm.weight": np.ones(5, dtype=np.float32),
    "scale": np.array(2.5, dtype=np.float64),
    "nothing": np.zeros((0, 4), dtype=np.float32),
}


class Threads:
    """`world_size` ranks as threads of this process; what they gather goes through JSON."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=20)
        self._slots: list[str] = [""] * world_size

    def run(self, work: Callable[[int, dict[str, Any]], Any]) -> list[Any]:
        """Call work(rank, arguments of save_checkpoint) on all; returns what each returned or raised."""
        outcomes: list[Any] = [None] * self.world_size

        def run_rank(rank: int) -> None:
            def gather(value: object) -> list[object]:
                self._slots[rank] = json.dumps(value)
                self._barrier.wait()
                gathered = [json.loads(slot) for slot in self._slots]
                self._barrier.wait()
                return gathered

            arguments = {"ranks": Ranks(rank, self.world_size, gather)}
            try:
                outcomes[rank] = work(rank, arguments)
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


def whole(
    tensors: dict[str, np.ndarray] = TENSORS, *, plus: float = 0.0, kind: str = "weight"
) -> list[Piece]:
    return [Piece(kind, name, value.shape, 0, value.reshape(-1) + plus) for name, value in tensors.items()]


def cut(value: np.ndarray, kind: str, name: str, borders: list[int]) -> list[Piece]:
    """The flattened tensor in pieces between these borders."""
    flat = value.reshape(-1)
    ends = [0, *sorted(borders), flat.size]
    return [Piece(kind, name, value.shape, a, flat[a:b]) for a, b in itertools.pairwise(ends)]


def halves(rank: int) -> Iterator[Piece]:
    """Rank 0 and 1 of 2: each holds one half of every tensor."""
    for name, value in TENSORS.items():
        yield cut(value, "weight", name, [value.size // 2])[rank]
