"""Fields of records, and records made to cost much."""

from __future__ import annotations

import datetime
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.document import BadRecord, Document, Record
from llmtrain.data.sources import fields, library, rows
from llmtrain.data.sources.config import CorpusConfig, Format, TextUnit
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.errors import DataError


def read(cfg: CorpusConfig, unit_bytes: int = 1 << 20) -> list[Record]:
    return [
        record
        for unit in plan_units(cfg, unit_bytes).units
        for _, records in read_unit(unit, cfg)
        for record in records
    ]


def jsonl(path: Path, *lines: bytes, **changes: Any) -> list[Record]:
    path.write_bytes(b"\n".join(lines))
    return read(CorpusConfig(name="t", format=Format.jsonl, paths=[str(path)], **changes))


def test_fields_may_be_nested_and_a_name_with_a_dot_comes_first(tmp_path: Path) -> None:
    lines = [
        {"doc": {"body": "inner"}, "meta": {"url": "http://a", "n": 5, "tags": ["x", None]}},
        {"doc.body": "outer", "doc": {"body": "inner"}, "meta": 3},
        {"doc": {"body": "bare"}, "meta": {"url": None, "n": 2**70}},
    ]
    found = jsonl(
        tmp_path / "a.jsonl",
        *(json.dumps(line).encode() for line in lines),
        text_field="doc.body",
        url_field="meta.url",
        metadata_fields=["meta.n", "meta.tags", "meta.gone"],
    )
    assert found == [
        Document(b"inner", 0, None, "http://a", {"meta.n": "5", "meta.tags": '["x",null]'}),
        Document(b"outer", len(json.dumps(lines[0])) + 1, None),
        Document(
            b"bare", len(json.dumps(lines[0]) + json.dumps(lines[1])) + 2, None, None, {"meta.n": f"{2**70}"}
        ),
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (fields.MISSING, None),
        (None, None),
        ("a", "a"),
        ("\ud800", "\\ud800"),
        (True, "true"),
        (1.5, "1.5"),
        ({"a": [1]}, '{"a":[1]}'),
        (["\ud800"], "['\\ud800']"),
        (2**70, str(2**70)),
        (datetime.date(2024, 5, 18), "2024-05-18"),
    ],
)
def test_values_become_text(value: Any, expected: str | None) -> None:
    assert fields.as_text(value) == expected


def test_a_value_that_python_cannot_write_is_named() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "recursion" in (fields.as_text(deep) or "")


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "x": NaN}',
        b'{"text": "a", "x": -Infinity}',
        b'{"text": "a", "x": "\\ud800"}',
        b'{"text": "b", "text": "a"}',
        b'{"text": "a", "x": 123456789012345678901234567890}',
        b' {"text": "a"}\r',
        b'{"text": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_what_json_takes_is_taken(tmp_path: Path, line: bytes) -> None:
    (found,) = jsonl(tmp_path / "a.jsonl", line)
    assert found == Document(b"a", 0, None)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "x": ' + b"[" * 1100 + b"]" * 1100 + b"}",
        b'{"text": "a\x00b"}',
        b"{'text': 'a'}",
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "a",}',
        b"[" * 500_000,
        b'{"text": "' + b'\\"' * 2_000_000,
        b'{"a":' * 300_000,
    ],
)
def test_what_json_does_not_take_is_broken(tmp_path: Path, line: bytes) -> None:
    found = jsonl(tmp_path / "a.jsonl", line, b'{"text": "after"}')
    assert [getattr(record, "reason", None) for record in found] == ["broken_json", None]


@pytest.mark.parametrize("part", [b"[],", b"{},", b"1,", b'"",'])
def test_a_line_that_would_take_much_memory_is_not_parsed(tmp_path: Path, part: bytes) -> None:
    line = b'{"text": "a", "x": [' + part * (9_000_000 // len(part)) + b"0]}"
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    cfg = CorpusConfig(name="t", format=Format.jsonl, paths=[str(path)])
    (found,) = read(cfg)
    assert isinstance(found, BadRecord)
    assert (found.reason, found.num_bytes) == ("absurd_nesting", len(line))
    assert "parsed, they take over 20 times as much memory" in found.detail


def test_a_long_text_full_of_brackets_is_a_text(tmp_path: Path) -> None:
    text = '[],{}\\"' * 1_000_000
    (found,) = jsonl(tmp_path / "a.jsonl", json.dumps({"text": text}).encode())
    assert found == Document(text.encode(), 0, None)


@pytest.mark.parametrize("format_", [Format.jsonl, Format.text])
def test_a_line_of_hundreds_of_megabytes_is_not_held(tmp_path: Path, format_: Format) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as handle:
        handle.write(b'{"text": "')
        handle.seek(200 << 20)
        handle.write(b'"}\n{"text": "after"}\n')
    cfg = CorpusConfig(
        name="t",
        format=format_,
        paths=[str(path)],
        max_document_bytes=1_000_000,
        text_unit=TextUnit.file if format_ is Format.jsonl else TextUnit.line,
    )
    tracemalloc.start()
    found = read(cfg, unit_bytes=16 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    first, last = found
    assert isinstance(first, BadRecord)
    assert (first.reason, first.num_bytes) == ("absurd_length", (200 << 20) + 2)
    assert isinstance(last, Document)
    assert peak < 30 << 20


# Tables.


def parquet(path: Path, table: pa.Table, cfg: dict[str, Any] | None = None, **settings: Any) -> list[Record]:
    pq.write_table(table, path, **settings)
    return read(CorpusConfig(name="t", format=Format.parquet, paths=[str(path)], **(cfg or {})))


def test_columns_may_be_nested_and_carry_url_and_metadata(tmp_path: Path) -> None:
    table = pa.table(
        {
            "doc": [{"body": "one", "n": 1}, {"body": "two", "n": None}, None],
            "url": ["http://a", None, "c"],
            "day": [datetime.date(2024, 5, 18), None, None],
            "tags": [["x"], [], None],
        }
    )
    cfg = {"text_field": "doc.body", "url_field": "url", "metadata_fields": ["doc.n", "day", "tags"]}
    assert parquet(tmp_path / "a.parquet", table, cfg) == [
        Document(b"one", 0, None, "http://a", {"doc.n": "1", "day": "2024-05-18", "tags": '["x"]'}),
        Document(b"two", 1, None, None, {"tags": "[]"}),
        BadRecord("wrong_type", 0, "column 'doc.body' is null"),
    ]


@pytest.mark.parametrize("name", ["doc.gone", "doc.body.more", "gone.body"])
def test_a_nested_column_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"has no column '{name}'; columns: doc. Set corpus.text_field"):
        parquet(tmp_path / "a.parquet", pa.table({"doc": [{"body": "one"}]}), {"text_field": name})


def test_a_table_that_repeats_a_long_text_a_thousand_times_is_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "EXPANSION_FLOOR_BYTES", 1 << 20)
    table = pa.table({"text": ["ab" * 5000] * 3000})
    found = parquet(tmp_path / "a.parquet", table, {"max_expansion": 2.0})
    assert len(found) == 3000
    assert [getattr(record, "reason", "good") for record in found] == ["good"] * 104 + ["zip_bomb"] * 2896
    found = parquet(tmp_path / "a.parquet", table, {"max_expansion": 1e9})
    assert all(isinstance(record, Document) for record in found)


def test_empty_row_groups_and_tables_have_no_records(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    empty, full = pa.table({"text": pa.array([], pa.string())}), pa.table({"text": ["one", "two"]})
    assert parquet(path, empty) == []
    with pq.ParquetWriter(path, full.schema) as writer:
        for table in (empty, full, empty, full, empty):
            writer.write_table(table)
    cfg = CorpusConfig(name="t", format=Format.parquet, paths=[str(path)])
    texts = [record.text for record in read(cfg, 1) if isinstance(record, Document)]
    assert texts == [b"one", b"two"] * 2


def test_no_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two", None], "n": [1, 2, 3]}), path)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    cfg = CorpusConfig(name="t", format=Format.parquet, paths=[str(path)])
    whole = read(cfg)
    num_damaged = 0
    for place in range(len(content) - 8 - footer, len(content)):
        for flip in (0x01, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            try:
                found = read(cfg)
            except DataError as error:  # names of columns that are not what they were
                found = [BadRecord("wrong_type", 0, str(error))]
            num_damaged += found != whole
    assert num_damaged > footer / 4


# Data sets that are streamed.


@pytest.mark.filterwarnings("ignore")  # the library warns about its own dependencies
def test_a_streamed_data_set_is_read_shard_by_shard(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for shard in range(3):
        lines = [{"text": f"{shard} {number}", "meta": {"url": "u"}} for number in range(100)]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = CorpusConfig(
        name="t",
        format=Format.datasets,
        dataset="json",
        dataset_files=[str(tmp_path / f"{shard}.jsonl") for shard in range(3)],
        streaming=True,
        url_field="meta.url",
    )
    plan = plan_units(cfg, 1000)
    assert [piece.name for unit in plan.units for piece in unit.slices] == [
        f"json/train#{shard}/3" for shard in range(3)
    ]
    found = [record for record in read(cfg) if isinstance(record, Document)]
    assert [record.text.decode() for record in found] == [
        f"{shard} {number}" for shard in range(3) for number in range(100)
    ]
    assert [record.position for record in found] == [*range(100)] * 3
    assert {record.url for record in found} == {"u"}
    with pytest.raises(DataError, match=r"has no column 'body'; columns: text, meta"):
        read(CorpusConfig(**(vars(cfg) | {"text_field": "body", "url_field": None})))


@pytest.mark.filterwarnings("ignore")  # the library warns about its own dependencies
def test_a_damaged_shard_is_a_bad_record_and_the_rest_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    library._cached_dataset.cache_clear()
    (tmp_path / "0.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "1.jsonl").write_text('{"text": "two"}\n{"text": \n')
    cfg = CorpusConfig(
        name="t",
        format=Format.datasets,
        dataset="json",
        dataset_files=[str(tmp_path / f"{shard}.jsonl") for shard in range(2)],
        streaming=True,
    )
    found = read(cfg)
    assert found[0] == Document(b"one", 0, None)
    assert isinstance(found[-1], BadRecord)
    assert found[-1].reason == "corrupt_archive"
