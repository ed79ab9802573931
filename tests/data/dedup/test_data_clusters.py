from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.clusters import check_fixed_point, connect
from llmtrain.data.dedup.units import RowWriter
from llmtrain.data.dedup.verify import PAIR
from llmtrain.errors import DataError

NUM_DOCUMENTS = 300


def write_pairs(folder: Path, files: list[list[tuple[int, int]]]) -> list[Path]:
    paths = []
    for number, pairs in enumerate(files):
        paths.append(folder / f"{number}.npy")
        with RowWriter(paths[-1], PAIR) as writer:
            rows = np.zeros(len(pairs), dtype=PAIR)
            rows["low"], rows["high"] = [min(pair) for pair in pairs], [max(pair) for pair in pairs]
            writer.append(rows)
    return paths


DOCUMENTS = st.one_of(st.integers(0, NUM_DOCUMENTS - 1), st.integers(60, 70))
PAIRS = st.lists(st.tuples(DOCUMENTS, DOCUMENTS).filter(lambda pair: pair[0] != pair[1]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(files=st.lists(PAIRS, min_size=1, max_size=3))
def test_components_are_those_of_a_search_over_sets(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[int, int]]]
) -> None:
    found = connect(write_pairs(tmp_path_factory.mktemp("pairs"), files), NUM_DOCUMENTS)
    members: dict[int, set[int]] = {}
    for one, other in (pair for pairs in files for pair in pairs):
        both = members.get(one, {one}) | members.get(other, {other})
        members.update(dict.fromkeys(both, both))
    documents = [document for _, window in found.windows() for document in window.tolist()]
    assert documents == sorted(members)
    clusters: dict[int, set[int]] = {}
    for document, number in zip(documents, found.component.tolist(), strict=True):
        clusters.setdefault(number, set()).add(document)
    expected = {frozenset(both) for both in members.values()}
    assert {frozenset(both) for both in clusters.values()} == expected
    assert sorted(clusters) == list(range(found.num_components))


def test_a_chain_in_the_worst_order_is_one_component(tmp_path: Path) -> None:
    """Joined from its far end, each pair hangs the whole chain below a new root."""
    num = 200_000
    pairs = np.zeros(num - 1, dtype=PAIR)
    pairs["low"], pairs["high"] = np.arange(num - 2, -1, -1), np.arange(num - 1, 0, -1)
    with RowWriter(tmp_path / "0.npy", PAIR) as writer:
        writer.append(pairs)
    found = connect([tmp_path / "0.npy"], num)
    assert (found.num_components, found.num_nodes) == (1, num)


def test_clusters_that_are_not_final_stop_the_run(tmp_path: Path) -> None:
    paths = write_pairs(tmp_path, [[(0, 1), (1, 2), (5, 9)]])
    found = connect(paths, 10)
    check_fixed_point(found, paths, 3)
    wrong = replace(found, component=np.array([0, 0, 2, 1, 1]), num_components=3)
    with pytest.raises(
        DataError, match="not final: 1 pairs lie across two of them, and 3 were found where 2"
    ):
        check_fixed_point(wrong, paths, 3)
    with pytest.raises(DataError, match="delete the folder of near-duplicates and run again"):
        check_fixed_point(replace(found, component=np.zeros(5, dtype=np.int64), num_components=1), paths, 3)
