"""The order of rows is a bijection, spread evenly, and never changes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain import rng
from llmtrain.errors import DataError
from llmtrain.loader.order import MAX_ROWS, permute, rows_at

HASH = "0123abcd"


def row_at(position: int, **order: object) -> int:
    return int(rows_at(np.array([position]), **order)[0])


def test_every_row_comes_once_for_all_sizes_up_to_2000() -> None:
    for num_rows in range(1, 2001):
        rows = permute(np.arange(num_rows, dtype=np.uint64), num_rows=num_rows, key=rng.key(7, num_rows))
        assert np.array_equal(np.sort(rows), np.arange(num_rows)), num_rows


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, MAX_ROWS),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 2**62),
    count=st.integers(1, 300),
)
def test_positions_of_one_epoch_never_share_a_row_at_any_size(
    num_rows: int, seed: int, start: int, count: int
) -> None:
    positions = start + np.arange(count)
    rows = rows_at(positions, num_rows=num_rows, seed=seed, pack_hash=HASH)
    assert rows.min() >= 0
    assert rows.max() < num_rows
    seen = set(zip((positions // num_rows).tolist(), rows.tolist(), strict=True))
    assert len(seen) == count


def test_order_is_the_one_it_always_was() -> None:
    """If this fails, a resumed run reads other rows than it would have: do not update the numbers."""
    golden = {
        10: [9, 7, 4, 0, 1, 2, 3, 5],
        1_000_003: [830011, 520478, 844404, 658688, 246642, 989553, 486382, 973174],
        2**48: [
            192306280362088,
            230310642310140,
            31573917487591,
            121059301794390,
            110585765358570,
            168269900937663,
            167010485514816,
            233967096367853,
        ],
    }
    for num_rows, rows in golden.items():
        assert rows_at(np.arange(8), num_rows=num_rows, seed=42, pack_hash=HASH).tolist() == rows
    late = rows_at(5 * 1_000_003 + np.arange(4), num_rows=1_000_003, seed=42, pack_hash=HASH)
    assert late.tolist() == [373444, 581821, 943605, 525571]


def test_each_epoch_seed_and_pack_has_its_own_order() -> None:
    at = np.arange(1000)
    orders = [
        rows_at(at, num_rows=1000, seed=1, pack_hash=HASH),
        rows_at(at + 1000, num_rows=1000, seed=1, pack_hash=HASH),
        rows_at(at, num_rows=1000, seed=2, pack_hash=HASH),
        rows_at(at, num_rows=1000, seed=1, pack_hash="other"),
    ]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10  # 1 expected of two random orders


def test_one_position_equals_many_in_any_shape() -> None:
    at = np.arange(40).reshape(5, 8)
    rows = rows_at(at, num_rows=17, seed=3, pack_hash=HASH)
    assert rows.shape == at.shape
    assert [row_at(p, num_rows=17, seed=3, pack_hash=HASH) for p in range(40)] == rows.ravel().tolist()


@pytest.mark.parametrize("num_rows", [3, 5])
def test_every_order_of_few_rows_is_equally_likely(num_rows: int) -> None:
    num_keys = 1000
    found = Counter(
        tuple(permute(np.arange(num_rows, dtype=np.uint64), num_rows=num_rows, key=rng.key(at)).tolist())
        for at in range(num_keys)
    )
    assert_uniform(list(found.values()), num_cells=math.factorial(num_rows))


def test_row_of_a_position_is_uniform_over_keys() -> None:
    rows = [row_at(at, num_rows=50, seed=at, pack_hash=HASH) for at in range(2000)]
    assert_uniform(np.bincount(rows).tolist(), num_cells=50)


def test_neighbours_in_position_are_not_neighbours_in_rows() -> None:
    rows = rows_at(np.arange(100_000), num_rows=100_000, seed=9, pack_hash=HASH)
    steps = np.diff(rows) % 100_000
    assert_uniform(np.bincount(steps // 1000, minlength=100).tolist(), num_cells=100)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 5 / math.sqrt(len(rows))
    assert_uniform(np.bincount(rows[:20_000] // 1000, minlength=100).tolist(), num_cells=100)


def assert_uniform(counts: list[int], *, num_cells: int) -> None:
    """Chi-squared within 5 standard deviations of its mean; the keys are fixed, so this never flickers."""
    expected = sum(counts) / num_cells
    chi_squared = sum((count - expected) ** 2 for count in counts) / expected
    chi_squared += (num_cells - len(counts)) * expected
    freedom = num_cells - 1
    assert (chi_squared - freedom) / math.sqrt(2 * freedom) < 5


@pytest.mark.parametrize("num_rows", [0, -1, 2**48 + 1])
def test_impossible_sizes_are_refused(num_rows: int) -> None:
    with pytest.raises(
        DataError, match=rf"num_rows={num_rows} cannot be put in order; it must have 1 to 2\^48"
    ):
        row_at(0, num_rows=num_rows, seed=0, pack_hash=HASH)


def reference(index: int, *, num_rows: int, key: int) -> int:
    """The same network in Python's integers, from its description alone."""

    def mix(value: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = ((value ^ (value >> shift)) * factor) % 2**64
        return value ^ (value >> 31)

    bits = max(6, (num_rows - 1).bit_length())
    keys = [mix((key + number * 0x9E3779B97F4A7C15) % 2**64) for number in range(1, 9)]
    while True:
        widths = [bits // 2, bits - bits // 2]
        left, right = divmod(index, 2 ** widths[1])
        for round_key in keys:
            left, right = right, left ^ (mix((right + round_key) % 2**64) % 2 ** widths[0])
            widths.reverse()
        index = left * 2 ** widths[1] + right
        if index < num_rows:
            return index


@pytest.mark.parametrize(
    "num_rows", [1, 2, 63, 64, 65, 127, 1000, 2**31 + 1, 2**32, 2**47 + 3, 2**48 - 1, 2**48]
)
def test_rows_are_those_of_the_network_in_exact_integers(num_rows: int) -> None:
    drawn = np.random.default_rng(num_rows % 2**32)
    indexes = drawn.integers(0, num_rows, 20)
    key = rng.key(num_rows)
    found = permute(indexes.astype(np.uint64), num_rows=num_rows, key=key).tolist()
    assert found == [reference(at, num_rows=num_rows, key=key) for at in indexes.tolist()]


def test_sizes_around_powers_of_two_are_bijections() -> None:
    for size in (2**k + d for k in range(11, 18) for d in (-1, 0, 1)):
        rows = permute(np.arange(size, dtype=np.uint64), num_rows=size, key=rng.key(size))
        assert np.array_equal(np.sort(rows), np.arange(size)), size


NUM_ROWS, NUM_ORDERS = 997, 400


def statistics_of(orders: np.ndarray) -> dict[str, float]:
    """How far a set of orders [orders, rows] is from random, in standard deviations, by several measures."""

    def deviations(counts: np.ndarray) -> float:
        expected = counts.sum() / counts.size
        freedom = counts.size - 1
        return float((((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom))

    num_orders, num_rows = orders.shape
    cells = (orders * 16) // num_rows
    pairs = cells[:, :-1] * 16 + cells[:, 1:]  # the serial test: cells of neighbours
    apart = cells[:, :-8] * 16 + cells[:, 8:]
    across = cells[:-1] * 16 + cells[1:]  # the same place in the next order
    places = np.zeros((16, 16))
    np.add.at(places, ((np.arange(num_rows) * 16 // num_rows)[None, :].repeat(num_orders, 0), cells), 1)
    half = num_rows // 2
    inversions = (orders[:, :half] > orders[:, half : 2 * half]).sum()
    fixed = (orders == np.arange(num_rows)).sum()
    return {
        "place": deviations(places),
        "neighbours": deviations(np.bincount(pairs.ravel(), minlength=256)),
        "eight apart": deviations(np.bincount(apart.ravel(), minlength=256)),
        "next order": deviations(np.bincount(across.ravel(), minlength=256)),
        "inversions": (inversions - num_orders * half / 2) / math.sqrt(num_orders * half / 4),
        "fixed points": (fixed - num_orders) / math.sqrt(num_orders),
    }


@pytest.mark.parametrize("kind", ["keys", "epochs"])
def test_orders_are_as_random_as_numpys_permutations(kind: str) -> None:
    """The same measures of as many permutations of numpy's: both lie within the same bound."""
    at = np.arange(NUM_ROWS)
    ours = np.stack(
        [
            rows_at(at, num_rows=NUM_ROWS, seed=number, pack_hash=HASH)
            if kind == "keys"
            else rows_at(number * NUM_ROWS + at, num_rows=NUM_ROWS, seed=5, pack_hash=HASH)
            for number in range(NUM_ORDERS)
        ]
    )
    drawn = np.random.default_rng(3)
    numpys = np.stack([drawn.permutation(NUM_ROWS) for _ in range(NUM_ORDERS)])
    for name, value in statistics_of(numpys).items():
        assert abs(value) < 4.5, ("numpy", name, value)
    for name, value in statistics_of(ours).items():
        assert abs(value) < 4.5, (name, value)


def test_the_measures_of_randomness_see_a_weak_order() -> None:
    """Rows shifted by a random amount: every row in every place, and no shuffle at all."""
    drawn = np.random.default_rng(4)
    shifted = (np.arange(NUM_ROWS) + drawn.integers(0, NUM_ROWS, (NUM_ORDERS, 1))) % NUM_ROWS
    assert statistics_of(shifted)["neighbours"] > 100
