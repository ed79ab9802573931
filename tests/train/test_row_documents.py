"""From positions of a run to the documents in their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_folder import write_data_folder

from llmtrain.data.config import Packing
from llmtrain.data.shards import ShardReader
from llmtrain.loader.config import LoaderConfig, SourceConfig
from llmtrain.loader.documents import documents_of
from llmtrain.loader.open import OpenData, open_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_data_folder(folder / "one")
    write_data_folder(folder / "two", seed=1)
    return folder


def opened(folder: Path, packing: Packing) -> OpenData:
    sources = {name: SourceConfig(folder=str(folder / name), weight=1) for name in ("one", "two")}
    return open_data(LoaderConfig(sources=sources, seq_len=32, packing=packing, max_epochs=9), seed=3)


@pytest.mark.parametrize("packing", list(Packing))
def test_documents_are_those_whose_tokens_are_in_the_rows(folder: Path, packing: Packing) -> None:
    data = opened(folder, packing)
    positions = np.arange(40, 56)
    found = documents_of(data, positions, packing=packing)
    assert [each["position"] for each in found] == sorted(each["position"] for each in found)
    assert {each["data"] for each in found} == {"one", "two"}
    rows = data.train.read_many(data.order.rows_at(positions))
    for at, position in enumerate(positions.tolist()):
        own = [each for each in found if each["position"] == position]
        lengths = np.bincount(rows.segments[at])[: len(own)]
        assert [each["num_tokens"] for each in own] == lengths.tolist()
        start = 0
        for each in own:
            reader = ShardReader(folder / each["data"] / each["shard"])
            piece = rows.tokens[at, start : start + each["num_tokens"]].astype(np.uint16).tobytes()
            assert piece in reader.document(each["document"]).tobytes()
            shard = int(each["shard"][-1])
            assert each["id"] == f"train-{shard}-{each['document']}"
            assert (each["source"], each["path"], each["record"]) == ("chain", "", each["document"] + 1)
            start += each["num_tokens"]


@pytest.mark.parametrize(
    ("most", "num_rows", "per_row"), [(1000, 16, 99), (16, 16, 1), (35, 16, 2), (5, 5, 1)]
)
def test_there_are_no_more_than_asked_and_of_every_row_as_many(
    folder: Path, most: int, num_rows: int, per_row: int
) -> None:
    data = opened(folder, Packing.concat)
    every = documents_of(data, range(16), packing=Packing.concat)
    found = documents_of(data, range(16), packing=Packing.concat, max_documents=most)
    assert len(found) <= most
    expected = []
    for position in range(num_rows):
        expected += [each for each in every if each["position"] == position][:per_row]
    assert found == expected
    assert documents_of(data, [], packing=Packing.concat) == []


def test_a_shard_without_a_table_of_its_documents_has_numbers_alone(tmp_path: Path) -> None:
    write_data_folder(tmp_path)
    data = open_data(LoaderConfig(folder=str(tmp_path), seq_len=32), seed=0)
    for table in tmp_path.glob("shards/test/train-*.docs.parquet"):
        table.unlink()
    for each in documents_of(data, range(4), packing=Packing.concat):
        assert (each["id"], each["path"]) == (None, None)
        assert each["document"] >= 0
