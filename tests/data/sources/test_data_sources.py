from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmtrain.data.document import BAD_REASONS, BadRecord, Document
from llmtrain.data.sources import files, streams
from llmtrain.data.sources.config import CorpusConfig, Format, TextUnit
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.errors import ConfigError, DataError

Found = list[tuple[str, int, int, bytes | str]]


def config(format_: Format, *paths: Path | str, **changes: Any) -> CorpusConfig:
    return CorpusConfig(name="test", format=format_, paths=[str(path) for path in paths], **changes)


def read(cfg: CorpusConfig, unit_bytes: int = 1 << 20) -> Found:
    """Every record: file, number in its file, position, and its text or the reason that it is bad."""
    found: Found = []
    before: dict[str, int] = {}
    for unit in plan_units(cfg, unit_bytes).units:
        for piece, records in read_unit(unit, cfg):
            number = before.get(piece.name, 0)
            for record in records:
                number += 1
                if isinstance(record, Document):
                    found.append((piece.name, number, record.position, record.text))
                elif isinstance(record, BadRecord):
                    found.append((piece.name, number, -1, record.reason))
            before[piece.name] = number
    return found


def texts_of(found: Found) -> list[bytes | str]:
    return [text for _, _, _, text in found]


LINES = [json.dumps({"text": f"text {number} " + "é" * (number % 7)}) for number in range(50)]
JSONL = ("\n".join(LINES[:30]) + "\n\n  \n" + "\n".join(LINES[30:])).encode()


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000])
def test_cutting_a_file_elsewhere_gives_the_same_records(tmp_path: Path, unit_bytes: int) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(JSONL)
    (tmp_path / "empty.jsonl").touch()
    cfg = config(Format.jsonl, tmp_path)
    whole = read(cfg)
    assert texts_of(whole) == [json.loads(line)["text"].encode() for line in LINES] * 2
    assert [number for _, number, _, _ in whole[:50]] == [*range(1, 31), *range(33, 53)]
    assert read(cfg, unit_bytes) == whole


@pytest.mark.parametrize("block_bytes", [1, 3, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compression_and_read_size_change_no_record(
    tmp_path: Path, suffix: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "READ_BYTES", block_bytes)
    monkeypatch.setattr(streams, "COMPRESSED_READ_BYTES", block_bytes)
    half = len(JSONL) // 2
    if suffix == ".gz":  # two members back to back
        packed = gzip.compress(JSONL[:half]) + gzip.compress(JSONL[half:])
    elif suffix == ".zst":
        packed = zstandard.compress(JSONL[:half]) + zstandard.compress(JSONL[half:])
    else:
        packed = JSONL
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    found = read(config(Format.jsonl, tmp_path / f"a.jsonl{suffix}"), unit_bytes=50)
    assert texts_of(found) == [json.loads(line)["text"].encode() for line in LINES]
    assert [position for _, _, position, _ in found][:2] == [0, len(LINES[0]) + 1]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "a', "broken_json", "Unterminated string"),
        (b'{"text": "\xff"}', "invalid_utf8", "0xff"),
        (b'{"text": "\\ud800"}', "invalid_utf8", "half a surrogate pair"),
        (b'{"body": "a", "id": 3}', "missing_field", "no field 'text'; fields: body, id"),
        (b'["a"]', "wrong_type", "a JSON value of type list, not an object"),
        (b'{"text": 5}', "wrong_type", "field 'text' is of type int, not text"),
        (b"[" * 100_000, "broken_json", "recursion"),
        (b'{"text": "' + b"x" * 3000 + b'"}', "absurd_length", "a line of 3,012 bytes"),
    ],
)
def test_a_bad_line_is_set_apart_with_its_number(
    tmp_path: Path, line: bytes, reason: str, detail: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    limit = 400 if reason == "absurd_length" else 1_000_000
    cfg = config(Format.jsonl, tmp_path / "a.jsonl", max_document_bytes=limit)
    assert [(number, text) for _, number, _, text in read(cfg)] == [(1, b"one"), (2, reason), (3, b"two")]
    assert reason in BAD_REASONS
    (unit,) = plan_units(cfg, 1 << 20).units
    ((_, records),) = read_unit(unit, cfg)
    (bad,) = [record for record in records if isinstance(record, BadRecord)]
    assert detail in bad.detail


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("format_", [Format.jsonl, Format.text])
def test_a_truncated_archive_gives_what_came_before_and_one_bad_record(
    tmp_path: Path, suffix: str, format_: Format
) -> None:
    compress: Callable[[bytes], bytes] = gzip.compress if suffix == ".gz" else zstandard.compress
    first, second = compress(b'{"text": "one"}\n'), compress(JSONL)
    path = tmp_path / f"a.jsonl{suffix}"
    for damaged, reason in ((second[:-9], "truncated_archive"), (b"no archive", "corrupt_archive")):
        path.write_bytes(first + damaged)
        found = read(config(format_, path, text_unit=TextUnit.line))
        assert texts_of(found)[0] == (b"one" if format_ is Format.jsonl else b'{"text": "one"}')
        assert texts_of(found)[-1] == reason
        assert texts_of(read(config(Format.text, path))) == [reason]


def test_zeros_behind_a_gzip_member_are_padding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL) + b"\0" * 99)
    assert len(read(config(Format.jsonl, tmp_path))) == len(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(b"\0" * 99)
    assert texts_of(read(config(Format.jsonl, tmp_path))) == ["corrupt_archive"]


def test_zstd_frames_with_a_long_window_are_read(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(JSONL) + compressor.flush())
    assert len(read(config(Format.jsonl, tmp_path))) == len(LINES)


def test_a_long_line_is_not_read_again_by_every_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0
    read_block = streams.SliceBytes.read

    def counted(raw: streams.SliceBytes) -> bytes:
        nonlocal num_read
        block = read_block(raw)
        num_read += len(block)
        return block

    monkeypatch.setattr(streams.SliceBytes, "read", counted)
    monkeypatch.setattr(streams, "READ_BYTES", 50)
    (tmp_path / "a.txt").write_bytes(b"x" * 10_000 + b"\nlast")
    cfg = config(Format.text, tmp_path / "a.txt", text_unit=TextUnit.line)
    assert texts_of(read(cfg, unit_bytes=50)) == [b"x" * 10_000, b"last"]
    assert num_read < 40_000


def test_a_byte_order_mark_does_not_break_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert texts_of(read(config(Format.jsonl, tmp_path / "a.jsonl"))) == [b"one"]


def test_a_source_field_names_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "from": "web"}\n{"text": "y"}\n')
    cfg = config(Format.jsonl, tmp_path / "a.jsonl", source_field="from")
    (unit,) = plan_units(cfg, 1 << 20).units
    ((piece, records),) = read_unit(unit, cfg)
    assert [record.source for record in records if isinstance(record, Document)] == ["web", None]
    assert piece.source == "a"


@pytest.mark.parametrize(
    ("text_unit", "expected"),
    [
        (TextUnit.file, [(1, 0, b"a\nb\n\n \nc\n")]),
        (TextUnit.line, [(1, 0, b"a"), (2, 2, b"b"), (5, 7, b"c")]),
        (TextUnit.block, [(1, 0, b"a\nb"), (2, 7, b"c")]),
    ],
)
def test_plain_text_is_cut_as_asked(
    tmp_path: Path, text_unit: TextUnit, expected: list[tuple[int, int, bytes]]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nb\n\n \nc\n")
    found = read(config(Format.text, tmp_path / "a.txt", text_unit=text_unit), unit_bytes=3)
    assert [(number, position, text) for _, number, position, text in found] == expected


@pytest.mark.parametrize("text_unit", list(TextUnit))
def test_absurd_lengths_of_plain_text_are_bad_records(tmp_path: Path, text_unit: TextUnit) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100 + b"\n\nshort")
    found = texts_of(
        read(config(Format.text, tmp_path / "a.txt", text_unit=text_unit, max_document_bytes=50))
    )
    assert found == (["absurd_length"] if text_unit is TextUnit.file else ["absurd_length", b"short"])


def test_names_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, format_ in enumerate((Format.jsonl, Format.parquet)):
        path = folder / os.fsdecode(b"b\xff%d" % number)
        lines = b'{"text": "one", "from": "\\ud800"}\n{"text": "two", "from": ["a"]}\n'
        path.write_bytes(lines)
        if format_ is Format.parquet:
            names = pa.array([b"\xffb", b"ok"]).cast(pa.string(), safe=False)
            with open(path, "wb") as handle:
                pq.write_table(pa.table({"text": ["one", "two"], "from": names}), handle)
        cfg = config(format_, folder, source_field="from")
        (unit,) = plan_units(cfg, 1 << 20).units
        ((piece, records),) = read_unit(unit, cfg)
        assert piece.name == f"{folder}/b\\xff{number}".replace("\\xff", "\\udcff")
        expected = ["\\ud800", '["a"]'] if format_ is Format.jsonl else ["\\xffb", "ok"]
        assert [record.source for record in records if isinstance(record, Document)] == expected
        path.unlink()


def test_a_damaged_row_group_counts_every_row_that_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [f"row {number} " + "x" * 200 for number in range(20)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=5, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    found = read(config(Format.parquet, path))
    lost: list[bytes | str] = ["corrupt_archive"] * 5
    assert texts_of(found) == [*(r.encode() for r in rows[:5]), *lost, *(r.encode() for r in rows[10:])]
    assert [number for _, number, _, _ in found] == list(range(1, 21))


def test_row_groups_of_parquet_are_read_in_order(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(20)]
    table = pa.table({"text": [*rows[:7], None, *rows[8:]], "other": list(range(20))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=6)
    cfg = config(Format.parquet, tmp_path / "*.parquet")
    whole = read(cfg)
    assert texts_of(whole) == [
        *(row.encode() for row in rows[:7]),
        "wrong_type",
        *(row.encode() for row in rows[8:]),
    ]
    assert [number for _, number, _, _ in whole] == list(range(1, 21))
    assert read(cfg, unit_bytes=1) == whole
    assert len(plan_units(cfg, 1).units) == 4


def test_parquet_with_other_columns_names_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "size": [3]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no column 'text'; columns: body, size. Set corpus.text_field"):
        read(config(Format.parquet, tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"column 'size' of .* holds int64, not text"):
        read(config(Format.parquet, tmp_path / "a.parquet", text_field="size"))
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has 2 columns 'text'; rename all but one"):
        read(config(Format.parquet, tmp_path / "a.parquet"))


def test_a_file_that_is_no_parquet_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert texts_of(read(config(Format.parquet, tmp_path / "a.parquet"))) == ["corrupt_archive"]


def test_globs_and_folders_name_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "in/deep/c.txt"):
        (tmp_path / name).write_text(name)
    found = files.find_files([str(tmp_path / "*.txt"), str(tmp_path), str(tmp_path / "**/c.txt")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "b.txt", "in/deep/c.txt"]


def test_a_file_counts_once_whatever_its_names_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b[1].txt").touch()
    Path("a.txt").symlink_to("b[1].txt")
    assert files.find_files(["b[1].txt", str(tmp_path / "b*"), "./a.txt"]) == [tmp_path / "b[1].txt"]
    assert files.find_files(["b[1].txt", "./a.txt"]) == [Path("a.txt")]


def test_hidden_files_and_our_own_are_no_input(tmp_path: Path) -> None:
    for name in (".git/x", "in/.hidden", "in/a.txt", "out/.lock", "out/manifest.json", "out/shards/k/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "out/text.txt").touch()
    for pattern in (str(tmp_path), str(tmp_path / "**")):
        found = files.find_files([pattern], out=tmp_path / "out")
        assert found == [tmp_path / "in/a.txt", tmp_path / "out/text.txt"]


def test_a_path_that_matches_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"corpus.paths: '.*none\*.jsonl' matches no file \(looked from /"):
        files.find_files([str(tmp_path / "none*.jsonl")])
    with pytest.raises(DataError, match=r"empty' is a folder without files"):
        files.find_files([str(tmp_path / "empty")])


@pytest.mark.filterwarnings("ignore")  # the library warns about its own dependencies
def test_data_sets_of_the_library_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [f"row {number}" for number in range(30)]
    datasets.Dataset.from_dict({"text": rows, "n": list(range(30))}).save_to_disk(tmp_path / "saved")
    cfg = CorpusConfig(
        name="t", format=Format.datasets, dataset=str(tmp_path / "saved"), dataset_on_disk=True
    )
    whole = read(cfg)
    assert texts_of(whole) == [row.encode() for row in rows]
    assert read(cfg, unit_bytes=40) == whole
    with pytest.raises(DataError, match=r"has no column 'body'; columns: text, n"):
        read(CorpusConfig(**(vars(cfg) | {"text_field": "body"})))
    with pytest.raises(DataError, match=r"column 'n' of data set .* holds int64, not text"):
        read(CorpusConfig(**(vars(cfg) | {"text_field": "n"})))
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    splits.save_to_disk(tmp_path / "splits")
    cfg = CorpusConfig(**(vars(cfg) | {"dataset": str(tmp_path / "splits")}))
    assert texts_of(read(cfg)) == [b"a"]
    with pytest.raises(
        DataError, match=r"has no split 'test'; set corpus.dataset_split to one of \['train'\]"
    ):
        read(CorpusConfig(**(vars(cfg) | {"dataset_split": "test"})))
    with pytest.raises(DataError, match=r"data set .*nowhere' cannot be opened"):
        read(CorpusConfig(**(vars(cfg) | {"dataset": str(tmp_path / "nowhere")})))


@pytest.mark.filterwarnings("ignore")  # the library warns about its own dependencies
def test_data_sets_are_built_from_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    cfg = CorpusConfig(
        name="t", format=Format.datasets, dataset="json", dataset_files=[str(tmp_path / "a.jsonl")]
    )  # fmt: skip
    assert texts_of(read(cfg)) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": Format.jsonl}, r"corpus=jsonl needs corpus.paths, as in `llmtrain data corpus=jsonl"),
        (
            {"format": Format.python_docs, "paths": ["a"]},
            "corpus.paths has no effect with corpus.format=python_docs",
        ),
        ({"format": Format.datasets}, "corpus=datasets needs corpus.dataset"),
        ({"format": Format.text, "paths": ["a"], "max_text_bytes": 5}, "corpus.max_text_bytes has no effect"),
        ({"format": Format.python_docs, "max_text_bytes": 0}, "corpus.max_text_bytes=0 must be at least 1"),
        (
            {"format": Format.python_docs, "max_document_bytes": 0},
            "corpus.max_document_bytes=0 must be at least 1",
        ),
        (
            {"format": Format.python_docs, "max_expansion": 0.5},
            "corpus.max_expansion=0.5 must be at least 1",
        ),
        (
            {"format": Format.warc, "paths": ["a"], "url_field": "url"},
            "corpus.url_field has no effect with corpus.format=warc; leave it out",
        ),
        (
            {"format": Format.jsonl, "paths": ["a"], "streaming": True},
            "corpus.streaming=true is for corpus.format=datasets",
        ),
    ],
)
def test_settings_of_a_corpus_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorpusConfig(name="x", **settings)
