"""The order of rows: a keyed bijection per epoch, so that a position alone says which row it is.

Position p of a run is index p % num_rows of epoch p // num_rows, and the epoch's key turns that index into
a row. No list is shuffled or stored; any position costs the same, in any order, on any machine.

The bijection is a Feistel network on the smallest power of two that holds num_rows, with splitmix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 5) as round function;
an image outside the range is mapped again until it falls inside (cycle walking; Black and Rogaway 2002,
"Ciphers with arbitrary finite domains", section 3), less than twice on average. It is a shuffle, not a
cipher to keep secrets with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain import rng
from llmtrain.errors import DataError

MAX_ROWS = 2**48
NUM_ROUNDS = 8
"""Even, so that halves of unequal width end where they began."""
MIN_BITS = 6
"""With narrower halves, 8 rounds do not reach every order of 5 rows equally often (chi-squared over 6,000
keys: 36 standard deviations above its mean with 3 bits, 2.2 with 4, within 1 with 5 or more)."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = 2**64 - 1

Uint64 = npt.NDArray[np.uint64]


def rows_at(
    positions: npt.NDArray[np.integer[Any]], *, num_rows: int, seed: int, pack_hash: str
) -> npt.NDArray[np.int64]:
    """Return the row of each position, in the shape of `positions`; an epoch holds each row once.

    Args:
        positions: Rows consumed before this one since the run began; from 0 to 2^63 - 1.
        num_rows: Rows of the pack, 1 to 2^48.
        seed: The run's.
        pack_hash: Of what decides the rows' content: other rows, another order.
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise DataError(f"a pack of num_rows={num_rows} cannot be put in order; it must have 1 to 2^48")
    at = np.asarray(positions, dtype=np.int64)
    epochs, indexes = np.divmod(at, num_rows)
    rows = np.empty(at.shape, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        of_epoch = epochs == epoch
        key = rng.key(seed, "order", pack_hash, epoch)
        rows[of_epoch] = permute(indexes[of_epoch].astype(np.uint64), num_rows=num_rows, key=key)
    return rows


def permute(indexes: Uint64, *, num_rows: int, key: int) -> Uint64:
    """Map indexes below `num_rows` one to one onto 0 .. num_rows - 1, by the 64-bit `key`."""
    num_bits = max(MIN_BITS, (num_rows - 1).bit_length())
    round_keys = [_mix_int((key + (number + 1) * _GOLDEN) & _MASK_64) for number in range(NUM_ROUNDS)]
    rows = _feistel(indexes, num_bits, round_keys)
    outside = np.flatnonzero(rows >= num_rows)
    while outside.size:
        rows[outside] = _feistel(rows[outside], num_bits, round_keys)
        outside = outside[rows[outside] >= num_rows]
    return rows


def _feistel(values: Uint64, num_bits: int, round_keys: list[int]) -> Uint64:
    """A bijection of the numbers of `num_bits` bits. Halves of unequal width swap their widths each round."""
    left_bits, right_bits = num_bits // 2, num_bits - num_bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for round_key in round_keys:
        left, right = right, left ^ (rng.mix(right + np.uint64(round_key)) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix_int(value: int) -> int:
    return int(rng.mix(np.array([value], dtype=np.uint64))[0])
