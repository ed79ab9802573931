from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from near_corpus import rows_of, write_tables

from llmtrain.data.dedup.units import (
    DUPLICATE,
    RowWriter,
    Table,
    best_first,
    gather_documents,
    gather_signatures,
    read_units,
    write_units,
)
from llmtrain.errors import DataError


@pytest.mark.parametrize("num_chosen", [0, 1, 5, 3000, 20_000])
def test_rows_gathered_from_many_files_are_those_of_the_documents(tmp_path: Path, num_chosen: int) -> None:
    draw = np.random.default_rng(num_chosen)
    rows = rows_of(20_000, rank=draw.random(20_000))
    signed = draw.integers(0, 2**32, (20_000, 112)).astype(np.uint32)  # 9 MB: several stretches a file
    units = write_tables(tmp_path, rows, signed, cuts=(1, 1, 9000, 17_000))
    chosen = np.sort(draw.choice(20_000, num_chosen, replace=False))
    assert (gather_documents(units, chosen) == rows[chosen]).all()
    assert (gather_signatures(units, chosen, 112) == signed[chosen]).all()


def test_the_list_of_units_reads_back(tmp_path: Path) -> None:
    units = write_tables(tmp_path, rows_of(5), np.zeros((5, 4), dtype=np.uint32), cuts=(2,))
    write_units(tmp_path / "units.json", units)
    assert read_units(tmp_path / "units.json") == units


@pytest.mark.parametrize("shape", [(), (3,)])
def test_rows_written_in_blocks_are_an_ordinary_npy_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    blocks = [np.arange(num * max(1, sum(shape)), dtype="<u4").reshape(num, *shape) for num in (4, 0, 7)]
    with RowWriter(tmp_path / "rows.npy", np.dtype("<u4"), shape) as writer:
        for block in blocks:
            writer.append(block)
        assert not (tmp_path / "rows.npy").exists()
    assert (np.load(tmp_path / "rows.npy") == np.concatenate(blocks)).all()
    table = Table.open(tmp_path / "rows.npy", 11)
    assert (table.read(2, 9) == np.concatenate(blocks)[2:9]).all()
    with RowWriter(tmp_path / "none.npy", DUPLICATE):
        pass
    assert np.load(tmp_path / "none.npy").dtype == DUPLICATE


def test_a_table_that_was_cut_or_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros(10, dtype="<i8"))
    with pytest.raises(DataError, match=r"80 bytes of rows and says shape \(10,\).*expected 9 rows"):
        Table.open(path, 9)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"holds 79 bytes of rows and says shape .* which is 80 bytes"):
        Table.open(path, 10)
    path.write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be read as a table"):
        Table.open(path, None)
    with pytest.raises(DataError, match="delete it and run again"):
        Table.open(tmp_path / "missing.npy", None)


def test_the_best_is_of_an_earlier_run_then_high_in_rank_then_small_in_id() -> None:
    rows = rows_of(
        5,
        is_previous=[False, False, False, True, False],
        rank=[2, 5, 5, 0, 5],
        id_high=[0, 1, 1, 9, 0],
        id_low=[0, 7, 3, 9, 9],
    )
    assert best_first(rows).tolist() == [3, 4, 2, 1, 0]
