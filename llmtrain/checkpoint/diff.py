"""Where two checkpoints differ: settings, tensors, numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain import files
from llmtrain.checkpoint.inspect import find
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place
from llmtrain.progress import progress

COMPARE_ELEMENTS = 1 << 18
"""Compared at once, in float64."""
NOT_COMPARED = "made_by"
"""Of a state: where a checkpoint comes from, which is no difference of what it is."""


@dataclass(frozen=True)
class TensorDifference:
    kind: str
    name: str
    shape: list[int]
    num_elements: int
    num_unequal: int
    """Whose bits differ."""
    max_abs: float
    """Largest |a - b|; not a number where neither is finite."""
    relative_l2: float
    """|a - b| over |a|, both as lengths of vectors."""


@dataclass(frozen=True)
class Difference:
    a: str
    b: str
    steps: tuple[int, int]
    kinds: tuple[list[str], list[str]]
    state: list[tuple[str, Any, Any]]
    """(dotted name, a's value, b's) of what differs; None where it is absent."""
    only_in_a: list[str]
    """Tensors, as `kind name`."""
    only_in_b: list[str]
    shapes: list[tuple[str, list[int], list[int]]]
    types: list[tuple[str, str, str]]
    num_compared: int
    """Tensors of one shape in both."""
    num_elements: int
    """Of them."""
    tensors: list[TensorDifference] = field(default_factory=list)
    """Of them, those with other numbers; the largest `relative_l2` first."""

    @property
    def differs(self) -> bool:
        found = (self.state, self.only_in_a, self.only_in_b, self.shapes, self.types, self.tensors)
        return any(found) or self.steps[0] != self.steps[1]


def compare(path_a: Place, path_b: Place, *, state: bool) -> Difference:
    """Compare two checkpoints; every byte of both is compared with its hash on the way.

    Args:
        state: whether settings and position count, too.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    a, b = (CheckpointReader(find(path)) for path in (path_a, path_b))
    of_a, of_b = (
        dict.fromkeys((kind, name) for kind in each.kinds for name in each.shapes(kind)) for each in (a, b)
    )
    both = [key for key in of_a if key in of_b]
    shapes = [(key, a.shapes(key[0])[key[1]], b.shapes(key[0])[key[1]]) for key in both]
    alike = [key for key, mine, theirs in shapes if mine == theirs]
    types = [(key, a.dtype(*key).name, b.dtype(*key).name) for key in both]
    return Difference(
        a=str(a.path),
        b=str(b.path),
        steps=(a.step, b.step),
        kinds=(a.kinds, b.kinds),
        state=_states(a.state, b.state) if state else [],
        only_in_a=[" ".join(key) for key in of_a if key not in of_b],
        only_in_b=[" ".join(key) for key in of_b if key not in of_a],
        shapes=[(" ".join(key), [*mine], [*theirs]) for key, mine, theirs in shapes if mine != theirs],
        types=[(" ".join(key), mine, theirs) for key, mine, theirs in types if mine != theirs],
        num_compared=len(alike),
        num_elements=sum(math.prod(a.shapes(kind)[name]) for kind, name in alike),
        tensors=_tensors(a, b, alike),
    )


def _states(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    mine, theirs = (
        files.flatten({key: value for key, value in state.items() if key != NOT_COMPARED}) for state in (a, b)
    )
    names = sorted(mine.keys() | theirs.keys())
    return [(name, mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)]


def _tensors(a: CheckpointReader, b: CheckpointReader, keys: list[tuple[str, str]]) -> list[TensorDifference]:
    sizes = [math.prod(a.shapes(kind)[name]) for kind, name in keys]
    num_bytes = [
        size * (a.dtype(*key).itemsize + b.dtype(*key).itemsize)
        for key, size in zip(keys, sizes, strict=True)
    ]
    found = []
    with progress("diff", total=sum(num_bytes), unit="B") as advance:
        for (kind, name), size, read_bytes in zip(keys, sizes, num_bytes, strict=True):
            ours, theirs = a.read_flat(kind, name, 0, size), b.read_flat(kind, name, 0, size)
            if difference := _numbers(ours, theirs):
                found.append(TensorDifference(kind, name, [*a.shapes(kind)[name]], size, *difference))
            del ours, theirs  # before the next two are there
            advance(read_bytes)
    return sorted(found, key=lambda each: (not math.isnan(each.relative_l2), -each.relative_l2))


def _numbers(a: NDArray[Any], b: NDArray[Any]) -> tuple[int, float, float] | None:
    """(elements that are unequal, largest |a - b|, relative length of a - b); None if nothing differs."""
    as_bits = np.dtype(f"u{a.itemsize}") if a.dtype == b.dtype else None
    unequal, largest, squares, own_squares = 0, 0.0, 0.0, 0.0
    for start in range(0, a.size, COMPARE_ELEMENTS):
        x, y = a[start : start + COMPARE_ELEMENTS], b[start : start + COMPARE_ELEMENTS]
        differs = x != y if as_bits is None else x.view(as_bits) != y.view(as_bits)
        unequal += int(np.count_nonzero(differs))
        with np.errstate(invalid="ignore", over="ignore"):  # infinities and what is not a number are told
            own_squares += float(np.square(x, dtype=np.float64).sum())
            if differs.any():
                gaps = np.abs(x.astype(np.float64) - y.astype(np.float64))[differs]
                largest = float(np.maximum(largest, gaps.max()))  # unlike max(), keeps what is not a number
                squares += float(np.square(gaps).sum())
    if not unequal:
        return None
    if squares == 0.0:  # 0.0 and -0.0
        return unequal, largest, 0.0
    return unequal, largest, math.sqrt(squares / own_squares) if own_squares else math.inf
