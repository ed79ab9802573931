"""Hostile input, made up by Hypothesis: no reader raises, nothing vanishes, and the cut changes nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.data.document import BAD_REASONS, SKIP_REASONS, BadRecord, Document, Record, Skipped
from llmtrain.data.sources import slices, streams
from llmtrain.data.sources.config import CorpusConfig, Extraction, Format, TextUnit
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.data.sources.slices import file_digests
from llmtrain.errors import DataError

Numbered = list[tuple[str, int, Record]]

ENDS_A_FILE = {"corrupt_archive", "truncated_archive", "unreadable_file", "zip_bomb"}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}

quick = settings(max_examples=200, derandomize=True, deadline=None)
long = settings(
    max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)


def read(content: bytes, name: str, cfg: dict[str, Any], unit_bytes: int) -> tuple[Numbered, dict[str, str]]:
    """Every record with its file and number, and the hashes of the files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        settings = CorpusConfig(name="t", paths=[str(path)], **cfg)
        numbered: Numbered = []
        digests: list[list[str | None]] = []
        plan = plan_units(settings, unit_bytes)
        for unit in plan.units:
            digests.append([])
            for piece, records in read_unit(unit, settings):
                numbered += [
                    (Path(piece.name).name, len(numbered) + at, one) for at, one in enumerate(records)
                ]
                digests[-1].append(records.digest)
        hashes = file_digests(plan.units, digests)
        return numbered, {Path(name).name: digest for name, digest in hashes.items()}


def check_records(found: Numbered) -> None:
    for _, _, record in found:
        if isinstance(record, Skipped):
            assert record.reason in SKIP_REASONS
        elif isinstance(record, BadRecord):
            assert record.reason in BAD_REASONS
            assert record.detail.encode(errors="backslashreplace")
        elif isinstance(record, Document):
            assert isinstance(record.text, bytes)
            for text in (record.source, record.url, *(record.metadata or {}).values()):
                assert text is None or isinstance(text.encode(), bytes)


# Lines.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["text", "a", "b", "a.b", "url"])
objects = st.dictionaries(names, json_values | st.dictionaries(names, json_values, max_size=2), max_size=4)
good_lines = objects.map(lambda value: json.dumps(value).encode())
raw_lines = objects.map(lambda value: json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))


@st.composite
def damaged(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few flipped, cut out or put in."""
    content = bytearray(draw(source))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        match draw(st.integers(0, 2)):
            case 0:
                content[place : place + draw(st.integers(0, 9))] = b""
            case 1:
                content[place:place] = draw(st.binary(max_size=6))
            case _:
                content[place : place + 1] = bytes([draw(st.integers(0, 255))])
    return bytes(content)


any_lines = st.lists(
    good_lines
    | raw_lines
    | damaged(good_lines)
    | st.binary(max_size=30)
    | st.sampled_from(
        [b"", b" ", b"\r", b"[" * 3000, b'{"text":"' + b"x" * 700 + b'"}', b'{"text":"\\ud800"}']
    ),
    max_size=12,
).map(b"\n".join)
line_settings = st.fixed_dictionaries(
    {"format": st.just(Format.jsonl), "max_document_bytes": st.sampled_from([20, 100, 1_000_000])},
    optional={
        "text_field": st.sampled_from(["text", "a", "a.b"]),
        "source_field": st.sampled_from(["a", "a.b"]),
        "url_field": st.just("url"),
        "metadata_fields": st.just(["a", "b", "a.b"]),
    },
) | st.fixed_dictionaries(
    {
        "format": st.just(Format.text),
        "text_unit": st.sampled_from(TextUnit),
        "max_document_bytes": st.sampled_from([5, 60, 1_000_000]),
    }
)
sizes = st.integers(1, 40) | st.just(1 << 20)
steps = st.sampled_from([1, 2, 7, 64, 1 << 16])


def lines_are_accounted_for(
    content: bytes, cfg: dict[str, Any], unit_bytes: int, step: int, suffix: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("READ_BYTES", "COMPRESSED_READ_BYTES", "STEP_BYTES", "ZSTD_PIECE_BYTES"):
            patch.setattr(streams, name, step)
        patch.setattr(slices, "HASH_CHUNK_BYTES", 32)
        cut, cut_hash = read(content, "a.txt", cfg, unit_bytes)
        packed, packed_hash = read(COMPRESS[suffix](content), f"a.txt{suffix}", cfg, unit_bytes)
        patch.undo()
        patch.setattr(slices, "HASH_CHUNK_BYTES", 32)
        whole, whole_hash = read(content, "a.txt", cfg, 1 << 30)
    check_records(whole)
    assert cut == whole
    assert cut_hash == whole_hash
    assert packed_hash.keys() == {f"a.txt{suffix}"}
    if streams.compression_inside(content[: streams.MAGIC_BYTES]) == streams.PLAIN:
        assert [record for _, _, record in packed] == [record for _, _, record in whole]
        if cfg["format"] is Format.jsonl or cfg["text_unit"] is TextUnit.line:
            assert len(whole) == len(content.split(b"\n")) - (content.endswith(b"\n") or not content)


lines_of_any_kind = given(
    content=any_lines, cfg=line_settings, unit_bytes=sizes, step=steps, suffix=st.sampled_from(list(COMPRESS))
)
test_every_line_is_accounted_for_and_no_cut_changes_a_record = quick(
    lines_of_any_kind(lines_are_accounted_for)
)
test_every_line_is_accounted_for_at_length = pytest.mark.slow(
    long(lines_of_any_kind(lines_are_accounted_for))
)


# Archives.


def archives_end_in_records(content: bytes, suffix: str, cfg: dict[str, Any], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COMPRESSED_READ_BYTES", "STEP_BYTES"):
            patch.setattr(streams, name, step)
        found, hashes = read(content, f"a.txt{suffix}", cfg, 1 << 20)
        hashed = slices.hash_bytes(content).hex()
    check_records(found)
    assert hashes == {f"a.txt{suffix}": hashed}
    ends = [one for _, _, one in found if isinstance(one, BadRecord) and one.reason in ENDS_A_FILE]
    assert len(ends) <= 1
    whole, _ = read(content, f"a.txt{suffix}", cfg, 1 << 20)
    assert whole == found or ends  # how much comes out before damage follows the size of steps


@st.composite
def archives(draw: st.DrawFn) -> tuple[bytes, str]:
    suffix = draw(st.sampled_from([name for name in COMPRESS if name]))
    inside = draw(st.sampled_from([suffix, suffix, suffix, *COMPRESS]))
    members = draw(st.lists(any_lines | st.integers(1, 5000).map(bytes), min_size=1, max_size=3))
    return draw(damaged(st.just(b"".join(COMPRESS[inside](member) for member in members)))), suffix


archives_of_any_kind = given(archive=archives(), cfg=line_settings, step=st.sampled_from([1, 7, 1 << 16]))


def archive_ends_in_records(archive: tuple[bytes, str], cfg: dict[str, Any], step: int) -> None:
    archives_end_in_records(*archive, cfg, step)


test_any_archive_ends_in_records = quick(archives_of_any_kind(archive_ends_in_records))
test_any_archive_ends_in_records_at_length = pytest.mark.slow(
    long(archives_of_any_kind(archive_ends_in_records))
)


# Tables.


@st.composite
def tables(draw: st.DrawFn) -> tuple[bytes, int]:
    texts = draw(st.lists(st.none() | st.text(max_size=30), max_size=25))
    extra = draw(st.sampled_from([pa.array(range(len(texts))), pa.array([{"b": "x"}] * len(texts))]))
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string()), "a": extra}),
        sink,
        row_group_size=draw(st.integers(1, 9)),
        compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        use_dictionary=draw(st.booleans()),
        write_page_checksum=draw(st.booleans()),
    )
    return sink.getvalue(), len(texts)


@st.composite
def damaged_tables(draw: st.DrawFn) -> tuple[bytes, int, bool]:
    content, num_rows = draw(tables())
    changed = draw(damaged(st.just(content)))
    return changed, num_rows, changed != content


def rows_are_accounted_for(table: tuple[bytes, int, bool], cfg: dict[str, Any], unit_bytes: int) -> None:
    content, num_rows, is_damaged = table
    settings = {"format": Format.parquet, "metadata_fields": ["a"]} | cfg
    try:
        found, hashes = read(content, "a.parquet", settings, unit_bytes)
    except DataError:  # the columns that it names are not there
        assert is_damaged
        return
    check_records(found)
    assert (found, hashes) == read(content, "a.parquet", settings, 1 << 30)
    if not is_damaged:
        assert len(found) == num_rows


tables_of_any_kind = given(
    table=damaged_tables(),
    cfg=st.sampled_from([{}, {"max_document_bytes": 20}, {"max_expansion": 1.0}]),
    unit_bytes=sizes,
)
test_every_row_is_accounted_for = quick(tables_of_any_kind(rows_are_accounted_for))
test_every_row_is_accounted_for_at_length = pytest.mark.slow(long(tables_of_any_kind(rows_are_accounted_for)))


# Web archives.

html = st.text(max_size=40).map(str.encode) | st.binary(max_size=40)
tags = st.sampled_from(
    [b"<html>", b"<body>", b"<p>", b"</p>", b"<div ", b">", b"<!--", b"<script>", b"<table>", b"'"]
)
pages = st.lists(html | tags, max_size=8).map(b"".join)
header_lines = st.lists(
    st.sampled_from(
        [
            b"Content-Type: text/html",
            b"Content-Type: text/plain; charset=utf-16",
            b"Content-Type: text/html; charset=\xff",
            b"Content-Type: image/png",
            b"Content-Encoding: gzip",
            b"Content-Encoding: br",
            b"Content-Encoding: deflate",
            b"Transfer-Encoding: chunked",
            b":",
        ]
    )
    | st.binary(max_size=12),
    max_size=4,
)


@st.composite
def warc_records(draw: st.DrawFn) -> bytes:
    body = draw(pages)
    body = draw(st.sampled_from([bytes, gzip.compress, lambda it: b"%x\r\n%s\r\n0\r\n\r\n" % (len(it), it)]))(
        body
    )
    status = draw(st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 404 x", b"HTTP/2 200", b"", b"\x00"]))
    kind = draw(st.sampled_from([b"response", b"conversion", b"request", b"warcinfo", b"nonsense", b""]))
    if kind == b"response":
        body = b"\r\n".join([status, *draw(header_lines), b"", body])
    length = draw(st.sampled_from([len(body)] * 9 + [0, len(body) + 5, len(body) - 1, -1, 10**20]))
    content_type = {b"response": b"application/http"}.get(kind, b"text/plain")
    head = [
        b"WARC/1.0",
        b"WARC-Type: " + kind,
        b"WARC-Target-URI: " + draw(st.sampled_from([b"<http://a/>", b"\xff", b""])),
        b"WARC-Date: " + draw(st.sampled_from([b"2024-05-18T01:58:10Z", b"\xff", b"never"])),
        b"Content-Type: " + content_type,
        b"Content-Length: %d" % length,
        *draw(header_lines),
    ]
    return b"\r\n".join([*head, b"", body, b"", b""])


def web_archives_end_in_records(
    content: bytes, name: str, extraction: Extraction, max_document_bytes: int, step: int
) -> None:
    cfg = {"format": Format.warc, "extraction": extraction, "max_document_bytes": max_document_bytes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "COMPRESSED_READ_BYTES", step)
        patch.setattr(streams, "READ_BYTES", step)
        packed = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
        found, hashes = read(packed, name, cfg, 1)
        assert hashes == {name: slices.hash_bytes(packed).hex()}
    check_records(found)
    if streams.compression_inside(content[: streams.MAGIC_BYTES]) == streams.PLAIN:
        plain, _ = read(content, "a.warc", cfg, 1)
        assert [record for _, _, record in found] == [record for _, _, record in plain]


web_archives_of_any_kind = given(
    content=damaged(st.lists(warc_records() | pages, max_size=4).map(b"".join)),
    name=st.sampled_from(["a.warc", "a.warc.gz"]),
    extraction=st.sampled_from([Extraction.resiliparse, Extraction.raw_text]),
    max_document_bytes=st.sampled_from([30, 1_000_000]),
    step=st.sampled_from([1, 50, 1 << 16]),
)
test_any_web_archive_ends_in_records = quick(web_archives_of_any_kind(web_archives_end_in_records))
test_any_web_archive_ends_in_records_at_length = pytest.mark.slow(
    long(web_archives_of_any_kind(web_archives_end_in_records))
)
