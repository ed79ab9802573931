"""The order of all documents, found piece by piece, against one sort in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.arrays import Chunk, merge_by_document, open_array
from llmtrain.data.dedup.standing import STANDING, standings
from llmtrain.data.dedup.units import DUPLICATE, RowWriter, best_first
from llmtrain.data.engines.engine import Inline
from llmtrain.errors import DataError


@given(st.integers(0, 60), st.lists(st.integers(0, 60), max_size=4), st.sampled_from([1024, 4096, 1 << 31]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_standing_is_the_place_in_the_order_of_best_first(
    new_folder: Any, made_up_documents: Any, cut_units: Any, small_tasks: Any,
    count: int, cuts: list[int], partition_bytes: int,
) -> None:  # fmt: skip
    rows = made_up_documents(count, seed=count)
    with new_folder() as name:
        units = cut_units(Path(name), rows, [cut for cut in cuts if cut <= count], first=2**33)
        paths = standings(units, small_tasks(partition_bytes), Inline(), Path(name) / "standing")
        found = np.concatenate([np.load(path) for path in paths])
    expected = np.empty(count, dtype=np.uint64)
    expected[best_first(rows)] = np.arange(count)
    assert found.dtype == STANDING
    assert found.tolist() == expected.tolist()


def test_a_finished_order_is_not_made_again(
    tmp_path: Path, made_up_documents: Any, cut_units: Any, small_tasks: Any
) -> None:
    class Counting(Inline):
        num_tasks = 0

        def map(self, function: Callable[[Any], Any], units: Any) -> Any:
            self.num_tasks += len(units)
            return super().map(function, units)

    rows = made_up_documents(40, seed=1)
    units = cut_units(tmp_path, rows, [11, 20])
    engine = Counting()
    folder = tmp_path / "standing"
    paths = standings(units, small_tasks(2048), engine, folder)
    before, num_tasks = [path.read_bytes() for path in paths], engine.num_tasks
    assert standings(units, small_tasks(2048), engine, folder) == paths
    assert engine.num_tasks == num_tasks
    assert not list(folder.glob("work-*"))
    paths[1].unlink()
    standings(units, small_tasks(1 << 20), engine, folder)
    assert engine.num_tasks > num_tasks
    assert [path.read_bytes() for path in paths] == before


def test_lists_are_merged_by_document_range_by_range(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    documents = draw.permutation(200)[:120] + 2**33
    rows = np.zeros(120, dtype=DUPLICATE)
    rows["document"], rows["survivor"] = documents, documents + 1
    parts = [np.sort(part, order="document") for part in np.split(rows, [0, 50, 51, 90])]
    with RowWriter(tmp_path / "all.npy", DUPLICATE) as writer:
        for part in parts:
            writer.append(part)
    table = open_array(tmp_path / "all.npy", DUPLICATE)
    bounds = [0, 0, 50, 51, 90, 120]
    chunks = [Chunk(table, start, end) for start, end in itertools.pairwise(bounds)]
    with RowWriter(tmp_path / "merged.npy", DUPLICATE) as writer:
        merge_by_document(chunks, [(2**33 + at, 2**33 + at + 7) for at in range(0, 200, 7)], writer)
    assert np.load(tmp_path / "merged.npy").tolist() == np.sort(rows, order="document").tolist()


def test_a_table_of_other_rows_or_none_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros(3, dtype=np.int32))
    with pytest.raises(
        DataError, match=r"other.npy holds int32 of shape \(3,\), not rows of .*another version"
    ):
        open_array(tmp_path / "other.npy", DUPLICATE)
    (tmp_path / "no.npy").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"no.npy cannot be read as a table .*delete it and run again"):
        open_array(tmp_path / "no.npy", DUPLICATE)
