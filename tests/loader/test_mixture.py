"""Shares of a mixture are exact, and a position says all."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import ConfigError
from llmtrain.loader.mixture import Mixture, Source, _counts
from llmtrain.loader.order import Locality, rows_at

SIZES = {"web": 1000, "code": 300, "math": 70}


def mixture(
    stages: list[tuple[int, dict[str, float]]],
    *,
    caps: dict[str, int] | None = None,
    block_rows: int = 64,
    seed: int = 3,
    redistribute: bool = False,
    locality: Locality | None = None,
) -> Mixture:
    sources = [
        Source(name=name, num_rows=size, hash=name * 3, max_rows=(caps or {}).get(name))
        for name, size in SIZES.items()
    ]
    return Mixture(
        sources, stages, seed=seed, block_rows=block_rows, redistribute=redistribute, locality=locality
    )


WEIGHTS = st.lists(st.floats(0, 1) | st.integers(0, 1000), min_size=1, max_size=7).filter(
    lambda w: sum(w) > 0
)


@given(WEIGHTS, st.integers(0, 2**62))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_counts_add_up_and_stay_near_the_shares(weights: list[float], num_rows: int) -> None:
    parts = [Fraction(weight) for weight in weights]
    counts = _counts(parts, num_rows)
    assert sum(counts) == num_rows
    for weight, count in zip(parts, counts, strict=True):
        assert abs(count - num_rows * weight / sum(parts)) < 2
    following = _counts(parts, num_rows + 1)
    assert [b - a for a, b in zip(counts, following, strict=True)].count(1) == 1
    assert min(b - a for a, b in zip(counts, following, strict=True)) == 0 or len(weights) == 1


def test_every_position_follows_from_those_before_it() -> None:
    """The closed form against counting: a source's rows come in turn, none left out, none twice."""
    stages = [(0, {"web": 0.7, "code": 0.25, "math": 0.05}), (500, {"web": 1, "math": 1}), (777, {"code": 1})]
    order = mixture(stages)
    end = 777 + 7 * 64  # a block is exact as a whole
    source, index = order.locate(np.arange(end))
    seen: Counter[int] = Counter()
    per_block = [
        list(group) for _, group in itertools.groupby(range(end), key=lambda at: block_at(stages, at))
    ]
    for block in per_block:
        for number in range(3):
            own = sorted(int(index[at]) for at in block if source[at] == number)
            assert own == list(range(seen[number], seen[number] + len(own)))
            seen[number] += len(own)
    given = order.rows_by_source(end)
    assert [given[name] for name in SIZES] == [seen[number] for number in range(3)]


def block_at(stages: list[tuple[int, dict[str, float]]], position: int) -> tuple[int, int]:
    first = max(first for first, _ in stages if first <= position)
    return first, (position - first) // 64


@given(st.integers(0, 2**40), st.integers(1, 400))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_shares_are_within_one_block_of_the_request_anywhere(first: int, count: int) -> None:
    weights = {"web": 0.61, "code": 0.3, "math": 0.09}
    order = mixture([(0, weights)])
    source, _ = order.locate(first + np.arange(count))
    for number, name in enumerate(SIZES):
        assert abs((source == number).sum() - count * weights[name]) <= 64 + 2


def test_one_position_is_the_same_alone_and_among_others() -> None:
    order = mixture([(0, {"web": 0.5, "code": 0.5}), (300, {"math": 0.1, "web": 0.9})])
    at = np.random.default_rng(0).integers(0, 2000, (5, 40))
    rows = order.rows_at(at)
    assert rows.shape == at.shape
    assert rows.ravel().tolist() == [int(order.rows_at(np.array([p]))[0]) for p in at.ravel().tolist()]


def test_an_epoch_of_a_source_holds_each_of_its_rows_once() -> None:
    order = mixture([(0, {"web": 0.5, "math": 0.5})])
    rows = order.rows_at(np.arange(400))
    offset = SIZES["web"] + SIZES["code"]
    of_math = rows[rows >= offset]
    assert len(of_math) == 200
    for epoch in range(2):
        part = of_math[epoch * 70 : (epoch + 1) * 70]  # blocks shuffle inside, so only counts are exact
        assert set(part.tolist()) <= set(range(offset, offset + 70))
    source, index = order.locate(np.arange(400))
    exact = order.rows_at(np.arange(400))[(source == 2) & (index < 70)]
    assert sorted(exact.tolist()) == list(range(offset, offset + 70))


def test_no_weights_are_weights_by_rows() -> None:
    order = mixture([(0, {})])
    assert order.rows_by_source(1370) == SIZES


def test_one_source_is_the_order_of_its_rows() -> None:
    alone = Mixture([Source(name="a", num_rows=50, hash="h")], [(0, {})], seed=7, block_rows=8)
    at = np.arange(200)
    assert np.array_equal(alone.rows_at(at), rows_at(at, num_rows=50, seed=7, pack_hash="h"))


def test_a_cap_that_would_be_passed_is_told_with_its_source() -> None:
    order = mixture([(0, {"web": 0.9, "math": 0.1})], caps={"math": 140})
    assert order.check(1400) == []
    [problem] = order.check(2000)
    assert "source math would give 200 rows, 2.86 epochs of its 70, and its max_epochs allows 140" in problem
    assert "data.sources.math.max_epochs" in problem


@pytest.mark.parametrize("caps", [{"math": 140}, {"math": 35, "code": 300}, {"math": 1}])
def test_what_has_run_dry_goes_to_the_others(caps: dict[str, int]) -> None:
    weights = {"web": 0.6, "code": 0.3, "math": 0.1}
    order = mixture([(0, weights), (1500, {"web": 0.5, "math": 0.5})], caps=caps, redistribute=True)
    given: Counter[int] = Counter()
    end = order._parts[-1].first + 64 * 20  # a block is exact as a whole
    source, index = order.locate(np.arange(end))
    for at in range(end):
        given[int(source[at])] += 1
    for number, name in enumerate(SIZES):
        assert given[number] == order.rows_by_source(end)[name]
        assert given[number] <= caps.get(name, end)
        own = np.sort(index[source == number])
        assert np.array_equal(own, np.arange(len(own)))
    assert given[2] == caps["math"]
    assert order.check(end) == []


def test_a_run_longer_than_all_caps_together_is_told() -> None:
    caps = {"web": 100, "code": 100, "math": 100}
    order = mixture([(0, {})], caps=caps, redistribute=True)
    assert order.check(300) == []
    assert any("max_epochs allows 100" in problem for problem in order.check(400))


def test_everything_that_decides_the_order_is_in_the_hash() -> None:
    stages = [(0, {"web": 0.5, "code": 0.5})]
    hashes = {
        mixture(stages).hash,
        mixture([(0, {"web": 0.6, "code": 0.4})]).hash,
        mixture([*stages, (10, {"web": 1})]).hash,
        mixture(stages, caps={"web": 10}, redistribute=True).hash,
        mixture(stages, block_rows=65).hash,
        mixture(stages, caps={"web": 11}, redistribute=True).hash,
        mixture(stages, locality=Locality(group_rows=4, window_groups=2)).hash,
    }
    assert len(hashes) == 7
    assert mixture(stages).hash == mixture(stages).hash


def test_what_changes_no_row_is_not_in_the_hash() -> None:
    stages = [(0, {"web": 0.5, "code": 0.5})]
    same = [
        mixture([(0, {"web": 3, "code": 3})]),
        mixture([(0, {"code": 1, "web": 1, "math": 0})]),
        mixture(stages, caps={"web": 10}),
        mixture(stages, redistribute=True),
    ]
    at = np.arange(1000)
    for other in same:
        assert other.hash == mixture(stages).hash
        assert (other.rows_at(at) == mixture(stages).rows_at(at)).all()


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown source of a mixture 'wbe'; did you mean 'web'"):
        mixture([(0, {"wbe": 1})])
    for weights in ({"web": -1.0, "code": 2.0}, {"web": 0.0}):
        with pytest.raises(ConfigError, match="must not be negative, nor all of them 0"):
            mixture([(0, weights)])
    for firsts in ([], [1], [0, 5, 5], [0, 9, 3]):
        with pytest.raises(ConfigError, match="the first must be 0, each after the other"):
            mixture([(first, {"web": 1}) for first in firsts])


# Two levels.


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 63, 64, 65, 100, 129])
def test_two_levels_are_a_bijection(num_rows: int) -> None:
    for group_rows, window_groups in itertools.product((1, 3, 8, 200), (1, 2, 5)):
        order = {
            "num_rows": num_rows, "seed": 4, "pack_hash": "h",
            "locality": Locality(group_rows=group_rows, window_groups=window_groups),
        }  # fmt: skip
        for epoch in range(3):
            rows = rows_at(epoch * num_rows + np.arange(num_rows), **order)
            assert sorted(rows.tolist()) == list(range(num_rows))


def test_a_window_reads_few_groups_and_mixes_them() -> None:
    locality = Locality(group_rows=100, window_groups=8)
    rows = rows_at(np.arange(10_000), num_rows=10_000, seed=1, pack_hash="h", locality=locality)
    for first in range(0, 9_600, 800):
        window = rows[first : first + 800]
        assert len(np.unique(window // 100)) <= 16  # turned, so each group straddles two hundreds
        assert abs(np.corrcoef(window[:-1], window[1:])[0, 1]) < 0.2
    firsts = rows[::800]
    assert len(np.unique(firsts // 1000)) > 5
    again = rows_at(10_000 + np.arange(10_000), num_rows=10_000, seed=1, pack_hash="h", locality=locality)
    assert (rows == again).sum() < 30
    assert not set(rows[-100:].tolist()) & set(again[-100:].tolist())


@pytest.mark.parametrize("position", [0, 1, 100, 777])
def test_what_was_taken_is_counted_without_what_was_passed_over(position: int) -> None:
    order = mixture([(0, {"web": 3, "code": 1}), (300, {"code": 1, "math": 1})])
    passed_over = [(10, 49), (290, 320), (770, 780)]
    owners, _ = order.locate(np.arange(max(1, position)))
    kept = [at for at in range(position) if not any(first <= at <= last for first, last in passed_over)]
    expected = {
        name: int((owners[kept] == number).sum()) if kept else 0 for number, name in enumerate(order.names)
    }
    assert order.taken(position, passed_over) == expected
    asked = {"web": 0.75, "code": 0.25} if position < 300 else {"code": 0.5, "math": 0.5}
    assert order.asked_at(position) == {"web": 0.0, "code": 0.0, "math": 0.0} | asked
