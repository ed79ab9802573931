"""A checkpoint of another program, as what is done with it: which tensors are there, and their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.checkpoint.rewrite import Tensor
from llmtrain.errors import CheckpointError

Key = tuple[str, str]
"""Kind and canonical parameter name."""
Read = Callable[[Tensor], NDArray[Any]]
"""All of a tensor, in its shape, in memory that the next call takes over."""

NUMPY_TYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "<f4",  # numpy has no bf16, and this loses nothing
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "|i1",
    torch.uint64: "<u8",
    torch.uint32: "<u4",
    torch.uint16: "<u2",
    torch.uint8: "|u1",
    torch.bool: "|b1",
}


@dataclass(frozen=True)
class Found:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """In which it is written."""
    is_flat: bool = False
    """Whether it was saved without its shape."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == self.shape or (self.is_flat and math.prod(shape) == math.prod(self.shape))


@dataclass(frozen=True)
class Foreign:
    tensors: dict[Key, Found]
    fill: Callable[[Key, NDArray[Any]], None]
    """Fill the 1-D array with all of a tensor, flattened."""


def numpy_type(what: str, dtype: torch.dtype) -> np.dtype[Any]:
    """Raise CheckpointError where our format has none."""
    if dtype not in NUMPY_TYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in NUMPY_TYPES)
        raise CheckpointError(
            f"{what} is of type {dtype}, which a checkpoint of llmtrain cannot hold; it holds {known}"
        )
    return np.dtype(NUMPY_TYPES[dtype])
