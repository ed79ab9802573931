from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.partition import (
    PartitionFile,
    key_ranges,
    num_partitions_for,
    partition_bounds,
    partition_of,
    read_partition,
    stable_order,
    write_partitioned,
)
from llmtrain.errors import DataError

KEYS = st.lists(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 3)), max_size=60)


def payload_of(keys: list[int], first: int = 0) -> npt.NDArray[np.void]:
    payload = np.zeros(len(keys), dtype=[("document", "<i8"), ("source", "<i4")])
    payload["document"] = np.arange(first, first + len(keys))
    return payload


def write_all(folder: Path, units: list[list[int]], num_partitions: int) -> list[Path]:
    paths, first = [], 0
    for number, keys in enumerate(units):
        paths.append(folder / f"{number}.part")
        write_partitioned(paths[-1], np.array(keys, dtype=np.uint64), payload_of(keys, first), num_partitions)
        first += len(keys)
    return paths


@settings(max_examples=40, deadline=None)
@given(units=st.lists(KEYS, min_size=1, max_size=4), num_partitions=st.integers(1, 40))
def test_partitions_hold_every_record_once_in_order_of_its_key(
    tmp_path_factory: pytest.TempPathFactory, units: list[list[int]], num_partitions: int
) -> None:
    paths = write_all(tmp_path_factory.mktemp("parts"), units, num_partitions)
    read = [read_partition(paths, number) for number in range(num_partitions)]
    for number, records in enumerate(read):
        assert (partition_of(records["key"], num_partitions) == number).all()
    keys = [key for unit in units for key in unit]
    assert np.concatenate(read)[["key", "document"]].tolist() == sorted(
        zip(keys, range(len(keys)), strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(units=st.lists(KEYS, min_size=1, max_size=4), max_records=st.integers(1, 10))
def test_key_ranges_are_bounded_but_for_single_keys_and_never_split_a_key(
    tmp_path_factory: pytest.TempPathFactory, units: list[list[int]], max_records: int
) -> None:
    paths = write_all(tmp_path_factory.mktemp("parts"), units, 3)
    seen: list[int] = []
    for number in range(3):
        for keys in key_ranges(paths, number, max_records):
            found = keys.read()["key"]
            assert len(found) == keys.num_records
            assert len(found) <= max_records or len(set(found.tolist())) == 1
            blocks = list(keys.blocks(max_records))
            assert max(len(block) for block in blocks) <= max_records
            assert np.concatenate(blocks)["key"].tolist() == found.tolist()
            assert not seen or min(found.tolist()) > seen[-1]
            seen += sorted(found.tolist())
    assert seen == sorted(key for unit in units for key in unit)


@pytest.mark.parametrize("num_partitions", [1, 2, 3, 7, 1000, 65536])
def test_bounds_are_the_first_keys_of_their_partitions(num_partitions: int) -> None:
    bounds = partition_bounds(num_partitions)
    assert partition_of(bounds, num_partitions).tolist() == list(range(1, num_partitions))
    assert partition_of(bounds - np.uint64(1), num_partitions).tolist() == list(range(num_partitions - 1))


def test_equal_keys_keep_their_order() -> None:
    keys = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint64)
    assert (stable_order(keys) == np.argsort(keys, kind="stable")).all()


def test_partitions_grow_with_the_data_and_leave_room_for_the_work_on_them() -> None:
    assert num_partitions_for(0, 1 << 20) == 1
    assert num_partitions_for(1 << 18, 1 << 20) == 1
    assert num_partitions_for(1 << 20, 1 << 20) == 4


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = write_all(tmp_path, [[1, 2, 3]], 2)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="not a whole file of sorted records"):
        PartitionFile.open(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="delete it and run again"):
        read_partition([path], 0)
    path.write_bytes(whole[20:])
    with pytest.raises(DataError, match="bytes of records, but its footer says 60"):
        PartitionFile.open(path)


def test_reading_from_no_files_is_refused() -> None:
    with pytest.raises(DataError, match="no files of sorted records"):
        read_partition([], 0)
