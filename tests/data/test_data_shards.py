"""The bytes on disk: shards, packs, manifest."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from llmtrain.data.config import Packing
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    ShardEntry,
    ShardTable,
    TokenizerEntry,
    block_problems,
    read_manifest,
    verify,
    write_manifest,
)
from llmtrain.data.pack import write_plan
from llmtrain.data.shards import ShardIndex, ShardReader, ShardWriter, idx_bytes, token_dtype
from llmtrain.errors import DataError

EOS = 9


def write_shard(
    prefix: Path, documents: list[list[int]], dtype: str = "uint16", vocab_size: int = 100
) -> Any:
    """Documents of these tokens, and EOS after each."""
    writer = ShardWriter(prefix, dtype, vocab_size, eos_id=EOS)
    for document in documents:
        writer.add(np.array([*document, EOS]))
    return writer.close()


@pytest.mark.parametrize(("dtype", "code", "width"), [("uint16", 8, 2), ("int32", 4, 4)])
def test_the_index_has_megatrons_bytes(tmp_path: Path, dtype: str, code: int, width: int) -> None:
    result = write_shard(tmp_path / "s", [[1, 2], [], [5]], dtype)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    expected += (
        struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 3 * width, 4 * width)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert (tmp_path / "s.idx").read_bytes() == expected
    tokens = (tmp_path / "s.bin").read_bytes()
    assert tokens == struct.pack("<6H" if width == 2 else "<6i", 1, 2, EOS, EOS, 5, EOS)
    assert result.sha256 == hashlib.sha256(tokens).hexdigest()
    assert result.idx_sha256 == hashlib.sha256(expected).hexdigest()
    assert (result.num_documents, result.num_tokens, result.num_bytes) == (3, 6, 6 * width)
    assert (result.max_id, result.num_eos) == (EOS, 3)
    sums = (tmp_path / "s.sums").read_bytes()
    assert sums == struct.pack("<Q", xxhash.xxh3_64_intdigest(tokens))
    assert result.sums_xxh3_128 == xxhash.xxh3_128_hexdigest(sums)


def test_sums_are_of_each_mib_however_the_tokens_were_added(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 9, 2**20 + 5, dtype=np.uint16)  # two blocks and ten bytes
    tokens[[99, 700_000, -1]] = EOS
    for name, cuts in (("one", [0, len(tokens)]), ("three", [0, 100, 700_001, len(tokens)])):
        writer = ShardWriter(tmp_path / name, "uint16", 10, eos_id=EOS)
        for begin, end in pairwise(cuts):
            writer.add(tokens[begin:end])
        writer.close()
        content = tokens.tobytes()
        expected = [
            xxhash.xxh3_64_intdigest(content[at : at + 2**20]) for at in range(0, len(content), 2**20)
        ]
        assert np.fromfile(tmp_path / f"{name}.sums", dtype="<u8").tolist() == expected


def test_pointers_are_right_past_two_and_four_gib() -> None:
    """Three documents of the largest size, 24 GiB of int32 in all: only the index is made."""
    lengths = np.array([2**31 - 1, 5, 2**31 - 1, 7], dtype=np.int64)
    index = idx_bytes(lengths, "int32")
    pointers = struct.unpack("<4q", index[34 + 16 : 34 + 16 + 32])
    assert pointers == (0, 4 * (2**31 - 1), 4 * (2**31 + 4), 4 * (2**32 + 3))


def test_an_index_past_four_gib_is_read_without_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "s.idx").write_bytes(idx_bytes(np.array([2**31 - 1, 5, 2**31 - 1, 7]), "int32"))
    index = ShardIndex(tmp_path / "s.idx")
    assert index.num_tokens == 2**32 + 10
    assert [index.document_at(at) for at in (0, 2**31 - 2, 2**31 - 1, 2**31 + 4, 2**32 + 3)] == [
        0,
        0,
        1,
        2,
        3,
    ]
    assert index.starts().tolist() == [0, 2**31 - 1, 2**31 + 4, 2**32 + 3]


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")]
)
def test_every_integer_type_of_megatron_is_read(tmp_path: Path, code: int, dtype: str) -> None:
    tokens = np.array([3, 1, 9, 4, 9], dtype=dtype)
    width = tokens.itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 2, 2)  # two sequences of one document
    index += struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 3 * width) + struct.pack("<2q", 0, 2)
    (tmp_path / "s.idx").write_bytes(index)
    tokens.tofile(tmp_path / "s.bin")
    reader = ShardReader(tmp_path / "s")
    assert [reader.document(number).tolist() for number in range(2)] == [[3, 1, 9], [4, 9]]


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "s.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 7, 0, 1) + bytes(8))
    (tmp_path / "s.bin").write_bytes(b"")
    with pytest.raises(DataError, match="has version 1 and dtype code 7; known: 1, with"):
        ShardReader(tmp_path / "s")


def test_uint16_ends_at_a_vocabulary_of_65499() -> None:
    assert [token_dtype(size) for size in (65_499, 65_500, 65_536)] == ["uint16", "int32", "int32"]


def test_a_reader_gives_back_documents_and_runs_of_tokens(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [[1, 2], [], [5]])
    reader = ShardReader(tmp_path / "s")
    assert [reader.document(number).tolist() for number in range(3)] == [[1, 2, EOS], [EOS], [5, EOS]]
    assert reader.tokens(1, 4).tolist() == [2, EOS, EOS, 5]
    assert (reader.num_documents, reader.num_tokens, reader.doc_lengths.tolist()) == (3, 6, [3, 1, 2])
    assert [reader.document_at(token) for token in range(6)] == [0, 0, 0, 1, 2, 2]


def test_a_document_can_be_traced_to_its_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [[1], [2]])
    table = pa.table({"id": ["aa", "bb"], "source": ["x", "y"], "path": ["f", "g"], "record": [1, 9]})
    pq.write_table(table, tmp_path / "s.docs.parquet")
    lineage = ShardReader(tmp_path / "s").lineage(1)
    assert (lineage.document_id, lineage.source, lineage.path, lineage.record) == ("bb", "y", "g", 9)


def test_an_unfinished_shard_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path / "s", "uint16", 10, eos_id=EOS) as writer:
            writer.add(np.array([1, EOS]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_shard_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint16 or int32, not float32"):
        ShardWriter(tmp_path / "s", "float32", 10, eos_id=EOS)
    with ShardWriter(tmp_path / "s", "uint16", 10, eos_id=EOS) as writer:
        with pytest.raises(DataError, match=r"token ids 1\.\.10 of .* are outside the vocabulary of 10"):
            writer.add(np.array([1, 10]))
        with pytest.raises(DataError, match="have 0 to 0 tokens; a shard holds 1 to"):
            writer.add(np.array([], dtype=np.int64))
        with pytest.raises(DataError, match=r"document 1 of those given to .* ends in id 4, not in EOS, 9"):
            writer.add_many(np.array([1, EOS, 4]), np.array([2, 1]))
        with pytest.raises(DataError, match="would hold no document"):
            writer.close()
    with (
        ShardWriter(tmp_path / "s", "uint16", 70_000, eos_id=65_536) as writer,
        pytest.raises(
            DataError, match=r"id 65536 of .* does not fit into uint16, which ends at 65535; write"
        ),
    ):
        writer.add(np.array([1, 65_536]))  # as uint16 it would be 0


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s\.bin is missing; run `llmtrain data`"):
        ShardReader(tmp_path / "s")
    write_shard(tmp_path / "s", [[1]])
    with pytest.raises(DataError, match=r"are outside its 2"):
        ShardReader(tmp_path / "s").tokens(1, 2)
    index = (tmp_path / "s.idx").read_bytes()
    damages = {
        b"x" + index[1:]: "is not a shard index",
        index[:9] + b"\x02" + index[10:]: "has version 2 and dtype code 8",
        index[:-1]: "has 61 bytes, 1 documents need 62",
    }
    for damaged, message in damages.items():
        (tmp_path / "s.idx").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            ShardReader(tmp_path / "s")
    (tmp_path / "s.idx").write_bytes(index)
    (tmp_path / "s.bin").write_bytes(b"\x01\x00")
    with pytest.raises(DataError, match="has 2 bytes, its index says 4"):
        ShardReader(tmp_path / "s")


@pytest.fixture
def data_folder(tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder with one shard and one pack, and its manifest."""
    result = write_shard(tmp_path / "shards/k/train-00000", [[1, 2], [4]])
    (tmp_path / "shards/k/train-00000.docs.parquet").write_bytes(b"lineage")
    (tmp_path / "shards/k/held_out.jsonl.zst").write_bytes(b"text")
    (tmp_path / "tokenizer/k").mkdir(parents=True)
    (tmp_path / "tokenizer/k/tokenizer.model").write_bytes(b"model")
    shard = ShardEntry(path="shards/k/train-00000", split="train", text_bytes=9, **vars(result))
    lengths = [np.array([3, 2])]
    packs = [
        write_plan(tmp_path, f"packs/k/{kind.name}", "train", 4, kind, lengths)
        for kind in (Packing.concat, Packing.best_fit)
    ]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus="c",
        dtype="uint16",
        tokenizer=TokenizerEntry(
            path="tokenizer/k",
            kind="sentencepiece_bpe",
            vocab_size=100,
            fingerprint=hashlib.sha256(b"model").hexdigest(),
            eos_id=EOS,
            bos_id=None,
        ),
        shards=[shard],
        packs=packs,
        funnel=[],
        config={},
        config_hash="",
        versions={},
        held_out_text="shards/k/held_out.jsonl.zst",
        tool_version="0",
    )
    write_manifest(tmp_path, manifest)
    return tmp_path, manifest


def test_a_manifest_is_read_back_as_it_was_written(data_folder: tuple[Path, Manifest]) -> None:
    folder, manifest = data_folder
    assert read_manifest(folder) == manifest
    verify(folder, manifest, content=True)


def test_the_manifests_hash_is_that_of_the_tokens(data_folder: tuple[Path, Manifest]) -> None:
    _, manifest = data_folder
    assert replace(manifest, versions={"a": "b"}, funnel=[{}]).hash(4) == manifest.hash(4)
    other = replace(manifest.shards[0], sha256="0" * 64)
    assert replace(manifest, shards=[other]).hash(4) != manifest.hash(4)
    pack = manifest.packs[1]
    changed = replace(pack, rows_sha256="0" * 64)
    assert replace(manifest, packs=[changed]).hash(4, "best_fit") != manifest.hash(4, "best_fit")
    others = [*manifest.packs, replace(changed, seq_len=8)]
    assert replace(manifest, packs=others).hash(4, "best_fit") == manifest.hash(4, "best_fit")
    assert manifest.hash(4, "best_fit") != manifest.hash(4)


def test_an_unknown_pack_lists_the_known(data_folder: tuple[Path, Manifest]) -> None:
    _, manifest = data_folder
    assert manifest.pack("train", 4).num_rows == 1
    with pytest.raises(DataError, match=r"there are \[4\].*pack.seq_lens=\[4,8\]"):
        manifest.pack("train", 8)
    with pytest.raises(DataError, match=r"no pack of split 'test'; splits: \['train'\]"):
        manifest.pack("test", 4)
    with pytest.raises(
        DataError,
        match=r"strategy padded; .*'best_fit', 'concat'.*pack.strategies=\[best_fit,concat,padded\]",
    ):
        manifest.pack("train", 4, "padded")


DAMAGE = {
    "shards/k/train-00000.bin": "is damaged between byte 0 and 1,048,576: the block's xxh3_64 is",
    "shards/k/train-00000.sums": "is damaged: its xxh3_128 is",
    "shards/k/train-00000.idx": "is damaged: its sha256 is",
    "packs/k/best_fit/train.rows.npy": "is damaged: its sha256 is",
    "packs/k/best_fit/train.spans.npy": "is damaged: its sha256 is",
    "tokenizer/k/tokenizer.model": "is damaged: its sha256 is",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_flipped_byte_or_a_missing_file_is_named(name: str, data_folder: tuple[Path, Manifest]) -> None:
    folder, manifest = data_folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    verify(folder, manifest, content=False)
    with pytest.raises(DataError, match=rf"{name} {DAMAGE[name]}") as error:
        verify(folder, manifest, content=True)
    assert "run the command that made it again (`llmtrain data` or `llmtrain data import`)" in str(
        error.value
    )
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing, but the manifest names it"):
        verify(folder, manifest, content=False)


def test_a_shard_of_another_size_is_named(data_folder: tuple[Path, Manifest]) -> None:
    folder, manifest = data_folder
    (folder / "shards/k/train-00000.bin").write_bytes(b"\x00" * 12)
    with pytest.raises(DataError, match="has 12 bytes, the manifest says 10"):
        verify(folder, manifest, content=False)


def test_damage_far_in_a_shard_is_told_by_its_bytes(tmp_path: Path) -> None:
    tokens = np.full(2**20 + 5, 3, dtype=np.uint16)
    tokens[-1] = EOS
    with ShardWriter(tmp_path / "s", "uint16", 10, eos_id=EOS) as writer:
        writer.add(tokens)
        writer.close()
    content = bytearray((tmp_path / "s.bin").read_bytes())
    content[2**20 + 17] ^= 1
    content[2**21 + 1] ^= 1
    (tmp_path / "s.bin").write_bytes(content)
    [problem] = block_problems(tmp_path / "s.bin", tmp_path / "s.sums")
    assert "is damaged between byte 1,048,576 and 2,097,152" in problem
    assert problem.endswith("1 more blocks of it are damaged, too.")


def test_shards_are_columns_that_give_entries(data_folder: tuple[Path, Manifest]) -> None:
    _, manifest = data_folder
    [entry] = manifest.shards
    rows = [
        replace(entry, path=f"shards/k/{split}-{number:05d}", split=split, num_tokens=10 * number + at)
        for at, split in enumerate(("train", "held_out"))
        for number in range(3)
    ]
    table = ShardTable.of(rows)
    assert list(table) == rows
    assert (len(table), table[4], list(table[1::2])) == (6, rows[4], rows[1::2])
    assert table.records["num_tokens"].tolist() == [0, 10, 20, 1, 11, 21]
    assert list(table.split("held_out")[1:]) == rows[4:]
    assert list(table.split("nothing")) == []
    assert table[::-1] != table
    with pytest.raises(IndexError):
        table[6]


def test_shards_lie_in_one_folder_and_are_numbered(data_folder: tuple[Path, Manifest]) -> None:
    _, manifest = data_folder
    second = replace(manifest.shards[0], path="shards/k/train-00002")
    with pytest.raises(
        DataError, match=r"shard 1 is at shards/k/train-00002, but shard files are named shards/k/train-00001"
    ):
        ShardTable.of([manifest.shards[0], second])


def test_a_damaged_table_of_shards_is_named(data_folder: tuple[Path, Manifest]) -> None:
    folder, manifest = data_folder
    [table] = folder.glob("shards-*.npy")
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"{table} is damaged: its sha256 is"):
        read_manifest(folder)
    table.unlink()
    with pytest.raises(DataError, match=rf"{table} is missing, but the manifest names it"):
        read_manifest(folder)
    write_manifest(folder, replace(manifest, shards=[replace(manifest.shards[0], text_bytes=8)]))
    assert len(list(folder.glob("shards-*.npy"))) == 1
    assert read_manifest(folder).shards[0].text_bytes == 8


def test_a_manifest_that_cannot_be_read_says_what_to_do(data_folder: tuple[Path, Manifest]) -> None:
    folder, _ = data_folder
    with pytest.raises(DataError, match=r"nowhere does not exist; run `llmtrain data`"):
        read_manifest(folder / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest.json; run `llmtrain data`"):
        read_manifest(folder / "shards")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))
    with pytest.raises(DataError, match="format_version=99, this llmtrain reads 2"):
        read_manifest(folder)
    path.write_text(f'{{"format_version": {FORMAT_VERSION}}}')
    with pytest.raises(DataError, match=r"is damaged .*delete it and run `llmtrain data` again"):
        read_manifest(folder)
