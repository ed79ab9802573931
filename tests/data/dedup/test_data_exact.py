"""Exact duplicates, found partition by partition, against a dictionary in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.exact import exact_duplicates
from llmtrain.data.dedup.units import DOCUMENT, best_first
from llmtrain.data.engines.engine import Inline


def expected_duplicates(rows: Any, first: int) -> list[tuple[int, int, int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for at in best_first(rows).tolist():
        if rows["alive"][at]:
            content = (int(rows["content_high"][at]), int(rows["content_low"][at]))
            groups.setdefault(content, []).append(at)
    return sorted(
        (first + at, first + group[0], len(group))
        for group in groups.values()
        for at in group[1:]
        if not rows["is_previous"][at]
    )


@given(
    st.integers(0, 50),
    st.integers(1, 30),
    st.lists(st.integers(0, 50), max_size=3),
    st.sampled_from([512, 1024, 8192, 1 << 31]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_best_of_each_text_stays_whatever_the_units_and_partitions(
    new_folder: Any, made_up_documents: Any, cut_units: Any, small_tasks: Any,
    count: int, num_contents: int, cuts: list[int], partition_bytes: int,
) -> None:  # fmt: skip
    first = 2**33
    rows = made_up_documents(count, count, num_contents)
    with new_folder() as name:
        units = cut_units(Path(name), rows, [cut for cut in cuts if cut <= count], first=first)
        path = exact_duplicates(units, small_tasks(partition_bytes), Inline(), Path(name) / "exact")
        found = np.load(path).tolist()
    assert found == expected_duplicates(rows, first)


def test_the_order_of_the_documents_does_not_matter(
    new_folder: Any, tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    rows = made_up_documents(60, 7, 9)
    dropped = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(60)
        folder = tmp_path / str(seed)
        folder.mkdir()
        units = cut_units(folder, rows[order], [20, 31])
        found = np.load(exact_duplicates(units, small_tasks(4096), Inline(), folder / "exact"))
        dropped.append({(order[d], order[s], size) for d, s, size in found.tolist()})
    assert dropped[0]
    assert dropped[0] == dropped[1] == dropped[2]


@pytest.mark.parametrize("partition_bytes", [1024, 1 << 20])
@pytest.mark.parametrize("num_previous", [0, 3])
def test_all_documents_may_be_equal(
    tmp_path: Path, cut_units: Any, small_tasks: Any, partition_bytes: int, num_previous: int
) -> None:
    rows = np.zeros(300, dtype=DOCUMENT)
    rows["alive"] = True
    rows["id_low"] = np.arange(300)[::-1]
    rows["content_high"] = 2**64 - 1
    rows["content_low"][:100] = 7
    rows["is_previous"][20 : 20 + num_previous] = True
    units = cut_units(tmp_path, rows, [100])
    found = np.load(exact_duplicates(units, small_tasks(partition_bytes), Inline(), tmp_path / "exact"))
    assert found.tolist() == expected_duplicates(rows, 0)
    assert found["cluster_size"].max() == 200
    assert len(found) == 298 - max(0, num_previous - 1)


def test_no_documents_or_none_alive_give_an_empty_list(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    assert len(np.load(exact_duplicates([], small_tasks(1 << 20), Inline(), tmp_path / "none"))) == 0
    rows = made_up_documents(20, 1)
    rows["alive"] = False
    units = cut_units(tmp_path, rows, [0, 5])
    assert len(np.load(exact_duplicates(units, small_tasks(512), Inline(), tmp_path / "dead"))) == 0
