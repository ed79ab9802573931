"""The bytes on disk: shards, packs, manifest."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    read_manifest,
    verify,
    write_manifest,
)
from llmtrain.data.pack import SPAN, num_targets, open_pack, plan_rows, write_pack
from llmtrain.data.shards import ShardReader, ShardWriter, token_dtype
from llmtrain.errors import DataError


def write_shard(
    prefix: Path, documents: list[list[int]], dtype: str = "uint16", vocab_size: int = 100
) -> Any:
    writer = ShardWriter(prefix, dtype, vocab_size)
    for document in documents:
        writer.add(np.array(document))
    return writer.close()


@pytest.mark.parametrize(("dtype", "code", "width"), [("uint16", 8, 2), ("int32", 4, 4)])
def test_the_index_has_megatrons_bytes(tmp_path: Path, dtype: str, code: int, width: int) -> None:
    result = write_shard(tmp_path / "s", [[1, 2, 3], [4], [5, 6]], dtype)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    expected += (
        struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 3 * width, 4 * width)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert (tmp_path / "s.idx").read_bytes() == expected
    tokens = (tmp_path / "s.bin").read_bytes()
    assert tokens == struct.pack("<6H" if width == 2 else "<6i", 1, 2, 3, 4, 5, 6)
    assert result.sha256 == hashlib.sha256(tokens).hexdigest()
    assert result.idx_sha256 == hashlib.sha256(expected).hexdigest()
    assert (result.num_documents, result.num_tokens, result.num_bytes) == (3, 6, 6 * width)


def test_uint16_ends_at_a_vocabulary_of_65499() -> None:
    assert [token_dtype(size) for size in (65_499, 65_500, 65_536)] == ["uint16", "int32", "int32"]


def test_a_reader_gives_back_documents_and_runs_of_tokens(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [5, 6]]
    write_shard(tmp_path / "s", documents)
    reader = ShardReader(tmp_path / "s")
    assert [reader.document(number).tolist() for number in range(3)] == documents
    assert reader.tokens(2, 3).tolist() == [3, 4, 5]
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
        with ShardWriter(tmp_path / "s", "uint16", 10) as writer:
            writer.add(np.array([1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_shard_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint16 or int32, not float32"):
        ShardWriter(tmp_path / "s", "float32", 10)
    with ShardWriter(tmp_path / "s", "uint16", 10) as writer:
        with pytest.raises(DataError, match=r"token ids 1\.\.10 of .* are outside the vocabulary of 10"):
            writer.add(np.array([1, 10]))
        with pytest.raises(DataError, match="have 0 to 0 tokens; a shard holds 1 to"):
            writer.add(np.array([], dtype=np.int64))
        with pytest.raises(DataError, match="would hold no document"):
            writer.close()


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s\.bin is missing; run `llmtrain data`"):
        ShardReader(tmp_path / "s")
    write_shard(tmp_path / "s", [[1, 2]])
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


LENGTHS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=4)


@given(LENGTHS, st.integers(2, 9))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_packing_loses_and_invents_no_token(shards: list[list[int]], seq_len: int) -> None:
    pack = plan_rows([np.array(part) for part in shards], seq_len)
    pairs = []
    for row in range(pack.num_rows):
        spans = pack.spans[pack.rows[row] : pack.rows[row + 1]]
        num_inputs = int(spans["length"].sum())
        assert num_inputs == seq_len or (row == pack.num_rows - 1 and 0 < num_inputs < seq_len)
        for span in spans:
            first = int(span["start"])
            pairs += [
                (int(span["shard"]), first + at)
                for at in range(int(span["length"]) - 1 + int(span["has_next"]))
            ]
    expected = []
    for shard, lengths in enumerate(shards):
        ends = np.cumsum(lengths) - 1
        expected += [(shard, token) for token in range(sum(lengths)) if token not in ends]
    assert (
        pairs == expected
    )  # each token with a next one in its document is an input with a target exactly once
    assert num_targets(pack.spans) == len(expected)


def test_spans_name_their_documents() -> None:
    pack = plan_rows([np.array([3, 2]), np.array([4])], 4)
    assert pack.rows.tolist() == [0, 2, 4, 5][: pack.num_rows + 1]
    assert pack.spans.tolist() == [(0, 0, 3, 0), (0, 3, 1, 1), (0, 4, 1, 0), (1, 0, 3, 1)]
    assert pack.spans.dtype == SPAN


def test_a_pack_without_documents_has_no_rows() -> None:
    pack = plan_rows([], 4)
    assert (pack.num_rows, len(pack.spans)) == (0, 0)


def test_a_pack_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    pack = plan_rows([np.array([3, 2, 7])], 4)
    entry = write_pack(tmp_path, "packs/seq4", "train", 4, pack)
    found = open_pack(tmp_path, entry)
    assert found.rows.tolist() == pack.rows.tolist()
    assert found.spans.tolist() == pack.spans.tolist()
    assert (entry.num_rows, entry.num_target_tokens) == (3, 9)
    with pytest.raises(DataError, match="does not fit its manifest entry"):
        open_pack(tmp_path, replace(entry, num_rows=2))
    (tmp_path / "packs/seq4/train.spans.npy").unlink()
    with pytest.raises(DataError, match=r"train\.spans\.npy is missing"):
        open_pack(tmp_path, entry)


@pytest.fixture
def data_folder(tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder with one shard and one pack, and its manifest."""
    result = write_shard(tmp_path / "shards/k/train-00000", [[1, 2, 3], [4, 5]])
    (tmp_path / "shards/k/train-00000.docs.parquet").write_bytes(b"lineage")
    (tmp_path / "shards/k/held_out.jsonl.zst").write_bytes(b"text")
    (tmp_path / "tokenizer/k").mkdir(parents=True)
    (tmp_path / "tokenizer/k/tokenizer.model").write_bytes(b"model")
    shard = ShardEntry(path="shards/k/train-00000", split="train", text_bytes=9, **vars(result))
    pack = write_pack(tmp_path, "packs/k/seq4", "train", 4, plan_rows([np.array([3, 2])], 4))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus="c",
        dtype="uint16",
        tokenizer=TokenizerEntry(
            path="tokenizer/k",
            kind="sentencepiece_bpe",
            vocab_size=100,
            fingerprint=hashlib.sha256(b"model").hexdigest(),
            eos_id=1,
            bos_id=None,
        ),
        shards=[shard],
        packs=[pack],
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
    (pack,) = manifest.packs
    changed = replace(pack, rows_sha256="0" * 64)
    assert replace(manifest, packs=[changed]).hash(4) != manifest.hash(4)
    assert replace(manifest, packs=[pack, replace(changed, seq_len=8)]).hash(4) == manifest.hash(4)


def test_an_unknown_row_length_lists_the_known(data_folder: tuple[Path, Manifest]) -> None:
    _, manifest = data_folder
    assert manifest.pack("train", 4).num_rows == 1
    with pytest.raises(DataError, match=r"there are \[4\].*pack.seq_lens=\[4,8\]"):
        manifest.pack("train", 8)
    with pytest.raises(DataError, match=r"no pack of split 'test'; splits: \['train'\]"):
        manifest.pack("test", 4)


def test_a_flipped_byte_or_a_missing_file_is_named(data_folder: tuple[Path, Manifest]) -> None:
    folder, manifest = data_folder
    names = [
        "shards/k/train-00000.bin",
        "shards/k/train-00000.idx",
        "packs/k/seq4/train.rows.npy",
        "packs/k/seq4/train.spans.npy",
        "tokenizer/k/tokenizer.model",
    ]
    for name in names:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        verify(folder, manifest, content=False)
        with pytest.raises(
            DataError, match=rf"{name} is damaged: its (sha256|xxh3_128) is \w+, the manifest says"
        ):
            verify(folder, manifest, content=True)
        (folder / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing, but the manifest names it"):
            verify(folder, manifest, content=False)
        (folder / name).write_bytes(whole)
    (folder / names[0]).write_bytes(b"\x00" * 12)
    with pytest.raises(DataError, match="has 12 bytes, the manifest says 10"):
        verify(folder, manifest, content=False)


def test_a_manifest_that_cannot_be_read_says_what_to_do(data_folder: tuple[Path, Manifest]) -> None:
    folder, _ = data_folder
    with pytest.raises(DataError, match=r"nowhere does not exist; run `llmtrain data`"):
        read_manifest(folder / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest.json; run `llmtrain data`"):
        read_manifest(folder / "shards")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(DataError, match="format_version=99, this llmtrain reads 1"):
        read_manifest(folder)
    path.write_text('{"format_version": 1}')
    with pytest.raises(DataError, match=r"is damaged .*delete it and run `llmtrain data` again"):
        read_manifest(folder)
