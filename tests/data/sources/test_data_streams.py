"""Compressed files: what damage, wrong names and bombs become."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from llmtrain.data.document import BAD_REASONS, BadRecord, Document
from llmtrain.data.sources import streams
from llmtrain.data.sources.config import CorpusConfig, Format, TextUnit
from llmtrain.data.sources.read import plan_units, read_unit

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LINES = [f"line {number} " + "é日" * (number % 9) for number in range(400)]
TEXT = "\n".join(LINES).encode()

every_suffix = pytest.mark.parametrize("suffix", COMPRESS)


def found_in(path: Path, **changes: object) -> list[bytes | BadRecord]:
    """Text of every line, and every bad record."""
    values = {"name": "t", "format": Format.text, "text_unit": TextUnit.line, "paths": [str(path)]}
    cfg = CorpusConfig(**(values | changes))  # type: ignore[arg-type]
    return [
        record.text if isinstance(record, Document) else record
        for unit in plan_units(cfg, 1 << 20).units
        for _, records in read_unit(unit, cfg)
        for record in records
        if record is not None
    ]


def reason_in(path: Path, **changes: object) -> tuple[str, str]:
    (bad,) = [record for record in found_in(path, **changes) if isinstance(record, BadRecord)]
    assert bad.reason in BAD_REASONS
    return bad.reason, bad.detail


@every_suffix
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 16])
def test_several_members_read_as_one_text(
    tmp_path: Path, suffix: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "COMPRESSED_READ_BYTES", block_bytes)
    monkeypatch.setattr(streams, "STEP_BYTES", 100)
    monkeypatch.setattr(streams, "ZSTD_PIECE_BYTES", 3)
    path = tmp_path / f"a.txt{suffix}"
    parts = [TEXT[:1000], b"", TEXT[1000:1001], TEXT[1001:]]
    path.write_bytes(b"".join(COMPRESS[suffix](part) for part in parts))
    assert found_in(path) == [line.encode() for line in LINES]


@every_suffix
@pytest.mark.parametrize("inside", [*COMPRESS, "plain"])
def test_a_file_that_is_not_what_its_name_says_is_refused_by_its_first_bytes(
    tmp_path: Path, suffix: str, inside: str
) -> None:
    if inside == suffix:
        pytest.skip("that is right")
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[inside](TEXT) if inside in COMPRESS else TEXT)
    kind = streams.MAGIC[suffix][0]
    seen = streams.MAGIC[inside][0] if inside in COMPRESS else "something else"
    assert reason_in(path) == ("corrupt_archive", f"its name says {kind}, its first bytes say {seen}")


@every_suffix
def test_an_archive_without_its_suffix_is_one_bad_record_however_it_is_cut(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(COMPRESS[suffix](TEXT))
    cfg = CorpusConfig(name="t", format=Format.jsonl, paths=[str(path)])
    units = plan_units(cfg, 10).units
    assert [len(unit.slices) for unit in units] == [1]
    kind = streams.MAGIC[suffix][0]
    expected = ("corrupt_archive", f"it holds {kind}, so its name should end in {suffix}")
    assert reason_in(path) == expected


@every_suffix
@pytest.mark.parametrize("cut", [0, 1, 3, 12, -9, -1])
def test_an_archive_that_ends_too_early_keeps_what_came_before(tmp_path: Path, suffix: str, cut: int) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"whole\n") + COMPRESS[suffix](TEXT)[:cut])
    if cut == 0:
        assert found_in(path) == [b"whole"]
        return
    found = found_in(path)
    assert found[0] == b"whole"
    assert isinstance(found[-1], BadRecord)
    assert found[-1].reason == "truncated_archive"
    assert all(isinstance(line, bytes) and TEXT.find(line) >= 0 for line in found[1:-1])


@every_suffix
def test_an_empty_archive_file_was_cut(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.touch()
    assert reason_in(path) == ("truncated_archive", "an empty file")


@every_suffix
def test_flipped_bytes_are_bad_records_or_change_nothing(tmp_path: Path, suffix: str) -> None:
    packed = COMPRESS[suffix](TEXT)
    path = tmp_path / f"a.txt{suffix}"
    for place in range(0, len(packed), max(1, len(packed) // 60)):
        damaged = bytearray(packed)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        found = found_in(path)
        bad = [record for record in found if isinstance(record, BadRecord)]
        assert len(bad) == 1 or (not bad and len(found) == len(LINES))


def test_zeros_behind_gzip_and_xz_are_padding(tmp_path: Path) -> None:
    for suffix in (".gz", ".xz"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESS[suffix](b"one\n") + b"\0" * 64 + COMPRESS[suffix](b"two") + b"\0" * 8)
        assert found_in(path) == [b"one", b"two"]


def test_skippable_frames_of_zstd_are_skipped(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skippable + zstandard.compress(b"one") + skippable)
    assert found_in(path) == [b"one"]


def test_the_suffix_counts_in_any_case_and_before_the_query_of_a_url() -> None:
    assert streams.compression_of("A.JSONL.GZ") == ".gz"
    assert streams.compression_of("https://host/a.jsonl.zst?token=x.gz") == ".zst"
    assert streams.compression_of("https://host/a.gz/b.jsonl") == streams.PLAIN


def zstd_bomb(num_bytes: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    return (
        b"".join([compressor.compress(bytes(1 << 20)) for _ in range(num_bytes >> 20)]) + compressor.flush()
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("text_unit", [TextUnit.line, pytest.param(TextUnit.file, marks=pytest.mark.slow)])
def test_a_bomb_is_given_up_with_little_memory(tmp_path: Path, suffix: str, text_unit: TextUnit) -> None:
    path = tmp_path / f"a.txt{suffix}"
    size = 200 << 20
    if suffix == ".gz":
        packer = zlib.compressobj(wbits=31)
        path.write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush())
    elif suffix == ".xz":
        path.write_bytes(lzma.compress(bytes(size), preset=0))
    else:
        path.write_bytes(zstd_bomb(size) if suffix == ".zst" else bz2.compress(bytes(size), 1))
    tracemalloc.start()
    reason, detail = reason_in(path, text_unit=text_unit, max_document_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason == "zip_bomb"
    assert "more than 500 times as many; raise corpus.max_expansion if that is right" in detail
    assert peak < 100 << 20  # zstd's piece gives 32 MiB at worst, once here and once joined
    reason, _ = reason_in(path, text_unit=text_unit, max_document_bytes=1_000_000, max_expansion=1e9)
    assert reason == "absurd_length"


def test_an_archive_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    small = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 12}]
    packed = bytearray(lzma.compress(TEXT, filters=small))
    place = packed.index(b"\x21\x01")  # LZMA2 and the length of its properties; the dictionary's size follows
    packed[place + 2] = 36  # 1 GiB
    checksum = 12 + packed[12] * 4  # of the block's header, whose length in words stands first
    packed[checksum : checksum + 4] = zlib.crc32(packed[12:checksum]).to_bytes(4, "little")
    path = tmp_path / "a.txt.xz"
    path.write_bytes(packed)
    assert reason_in(path) == ("corrupt_archive", "Memory usage limit exceeded")
