"""Rows read from shards equal rows built token by token from the documents."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.data.config import Packing
from llmtrain.data.manifest import PackEntry, read_manifest
from llmtrain.data.pack import SPAN, write_rows
from llmtrain.errors import DataError
from llmtrain.loader.config import Verify
from llmtrain.loader.dataset import MAX_OPEN_SHARDS, NO_TARGET, Row, Rows

EOS_ID = 2


def slow_rows(documents: list[list[int]], seq_len: int) -> list[dict[str, list[int]]]:
    """Lay documents back to back, one token at a time, and cut. The reference for every array of a row."""
    rows: list[dict[str, list[int]]] = []
    row: dict[str, list[int]] = {"tokens": [], "targets": [], "positions": [], "segments": []}
    for document in documents:
        for at, token in enumerate(document):
            if len(row["tokens"]) == seq_len:
                rows.append(row)
                row = {"tokens": [], "targets": [], "positions": [], "segments": []}
            begins = at == 0 or not row["tokens"]
            last = row["segments"][-1] if row["segments"] else -1
            row["segments"].append(last + 1 if begins else last)
            row["positions"].append(0 if begins else row["positions"][-1] + 1)
            row["tokens"].append(token)
            row["targets"].append(document[at + 1] if at + 1 < len(document) else NO_TARGET)
    if any(target != NO_TARGET for target in row["targets"]):
        rows.append(row)
    for row in rows[-1:]:
        missing = seq_len - len(row["tokens"])
        row["tokens"] += [EOS_ID] * missing
        row["targets"] += [NO_TARGET] * missing
        row["positions"] += list(range(missing))
        row["segments"] += [row["segments"][-1] + 1] * missing
    return rows


def as_lists(row: Row) -> dict[str, list[int]]:
    return {
        "tokens": row.tokens.tolist(),
        "targets": row.targets.tolist(),
        "positions": row.positions.tolist(),
        "segments": row.segments.tolist(),
    }


def test_rows_equal_the_slow_reference(corpus) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)
    expected = slow_rows(corpus.documents["train"], 16)
    assert rows.num_rows == len(expected)
    assert [as_lists(rows.read(at)) for at in range(rows.num_rows)] == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    doc_lengths=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=4),
    seq_len=st.integers(2, 40),
    dtype=st.sampled_from(["uint16", "int32"]),
    data=st.data(),
)
def test_rows_equal_the_slow_reference_for_any_documents(
    tmp_path_factory: pytest.TempPathFactory, make_corpus, doc_lengths, seq_len, dtype, data
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = make_corpus(folder, doc_lengths, seq_len=seq_len, dtype=dtype)
    expected = slow_rows(corpus.documents["train"], seq_len)
    if not expected:
        with pytest.raises(DataError, match="has no row; prepare more text, or choose a smaller seq_len"):
            Rows(corpus.folder, corpus.manifest, "train", seq_len)
        return
    rows = Rows(corpus.folder, corpus.manifest, "train", seq_len)
    asked = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=20))
    block = rows.read_many(np.array(asked))
    for at, row in enumerate(asked):
        one = Row(block.tokens[at], block.targets[at], block.positions[at], block.segments[at])
        assert as_lists(one) == expected[row]


def test_every_pair_of_every_document_comes_once_per_epoch(corpus) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)
    block = rows.read_many(np.arange(rows.num_rows))
    counts = block.targets != NO_TARGET
    found = Counter(zip(block.tokens[counts].tolist(), block.targets[counts].tolist(), strict=True))
    pairs: Counter[tuple[int, int]] = Counter()
    for document in corpus.documents["train"]:
        pairs.update(itertools.pairwise(document))
    assert found == pairs
    assert counts.sum() == rows.num_target_tokens == sum(len(each) - 1 for each in corpus.documents["train"])


def test_arrays_have_the_types_that_torch_wants(corpus) -> None:
    row = Rows(corpus.folder, corpus.manifest, "train", 16).read(0)
    assert [row.tokens.dtype, row.targets.dtype, row.positions.dtype] == [np.int64] * 3
    assert row.segments.dtype == np.int32


def odd_pack(folder: Path, spans: list[tuple[int, int, int, int]], counts: list[int]) -> PackEntry:
    """A plan of these spans, so many a row."""
    hashes = write_rows(folder / "packs/odd", "train", [(np.array(counts), np.array(spans, dtype=SPAN))])
    return PackEntry(
        path="packs/odd",
        split="train",
        seq_len=16,
        strategy="best_fit",
        num_rows=len(counts),
        num_target_tokens=0,
        num_padding=0,
        num_cut_documents=0,
        num_long_documents=0,
        **hashes,
    )


@pytest.mark.parametrize("packing", [Packing.best_fit, Packing.padded])
def test_rows_of_a_plan_hold_every_pair_once_and_pad_the_rest(corpus, packing: Packing) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16, packing)
    block = rows.read_many(np.arange(rows.num_rows))
    counts = block.targets != NO_TARGET
    found = Counter(zip(block.tokens[counts].tolist(), block.targets[counts].tolist(), strict=True))
    pairs: Counter[tuple[int, int]] = Counter()
    for document in corpus.documents["train"]:
        pairs.update(itertools.pairwise(document))
    assert found == pairs
    entry = corpus.manifest.pack("train", 16, packing.name)
    padding = sum(
        int((block.segments[at] == block.segments[at, -1]).sum())
        for at in range(rows.num_rows)
        if (block.targets[at][block.segments[at] == block.segments[at, -1]] == NO_TARGET).all()
        and set(block.tokens[at][block.segments[at] == block.segments[at, -1]].tolist()) == {EOS_ID}
    )
    assert padding >= entry.num_padding > 0  # documents of EOS alone look like padding, too


def test_packs_that_are_not_back_to_back_are_read_too(corpus) -> None:
    """Another packer may put any spans of any shards in a row, and stop a span inside a document."""
    spans = [(1, 100, 9, 0), (0, 2, 5, 1), (2, 0, 2, 1), (0, 7, 16, 1)]
    entry = odd_pack(corpus.folder, spans, [3, 1])
    rows = Rows(corpus.folder, replace(corpus.manifest, packs=[entry]), "train", 16, Packing.best_fit)
    documents = corpus.documents["train"]
    by_shard = [list(itertools.chain(*part)) for part in (documents[:7], documents[7:12], documents[12:])]
    row = rows.read(0)
    assert row.tokens.tolist() == [*by_shard[1][100:109], *by_shard[0][2:7], *by_shard[2][0:2]]
    assert row.targets.tolist() == [
        *by_shard[1][101:109], NO_TARGET, *by_shard[0][3:8], *by_shard[2][1:3]
    ]  # fmt: skip
    assert row.positions.tolist() == [*range(9), *range(5), *range(2)]
    assert row.segments.tolist() == [0] * 9 + [1] * 5 + [2] * 2


def test_hash_follows_the_tokens_and_not_packs_of_other_lengths(corpus) -> None:
    manifest = corpus.manifest
    base = Rows(corpus.folder, manifest, "train", 16).hash
    wider = replace(manifest.packs[0], seq_len=32, path="elsewhere")
    assert Rows(corpus.folder, replace(manifest, packs=[wider, *manifest.packs]), "train", 16).hash == base
    other_shard = [replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:]]
    assert Rows(corpus.folder, replace(manifest, shards=other_shard), "train", 16).hash != base
    by_fit = Rows(corpus.folder, manifest, "train", 16, Packing.best_fit).hash
    assert by_fit != base
    other_pack = [replace(pack, spans_sha256="0" * 64) for pack in manifest.packs]
    assert (
        Rows(corpus.folder, replace(manifest, packs=other_pack), "train", 16, Packing.best_fit).hash != by_fit
    )


def test_start_up_opens_no_shard_and_takes_under_a_second_for_100_000(tmp_path: Path, big_manifest) -> None:
    """10^12 tokens; the files of the shards do not exist."""
    big_manifest(tmp_path, num_shards=100_000)
    tracemalloc.start()
    began = time.perf_counter()
    rows = Rows(tmp_path, read_manifest(tmp_path), "train", 2000)
    took_s = time.perf_counter() - began
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 1.0
    assert held_bytes < 40e6  # a row of the table is 145 bytes
    assert peak_bytes < 100e6
    assert rows.num_rows == 500_000_000
    with pytest.raises(DataError, match=r"train-99999\.idx cannot be read: No such file"):
        rows.read(499_999_999)


def num_open_shards(folder: Path) -> int:
    """Shards under `folder` that this process has open. A descriptor may vanish while we look."""
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(target.startswith(str(folder)) and target.endswith(".bin") for target in targets)


def test_few_files_stay_open_however_many_shards_are_read(make_corpus) -> None:
    corpus = make_corpus("many", [[20, 12]] * (MAX_OPEN_SHARDS + 30), seq_len=32)
    rows = Rows(corpus.folder, corpus.manifest, "train", 32)
    expected = slow_rows(corpus.documents["train"], 32)
    for at in np.random.default_rng(0).permutation(np.repeat(np.arange(rows.num_rows), 2)).tolist():
        assert as_lists(rows.read(at)) == expected[at]
    assert num_open_shards(corpus.folder) == MAX_OPEN_SHARDS
    del rows
    assert num_open_shards(corpus.folder) == 0


def test_sources_of_a_mixture_share_the_limit_of_open_files(make_corpus) -> None:
    corpus = make_corpus("many", [[20, 12]] * 30, seq_len=32)
    rows = Rows(corpus.folder, corpus.manifest, "train", 32, max_open=5)
    rows.read_many(np.arange(rows.num_rows))
    assert num_open_shards(corpus.folder) == 5


def test_too_many_open_files_are_told_as_that(corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)

    def refuse(*_args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"Too many open files; raise the limit of open files \(ulimit -n\)"):
        rows.read(3)


def test_shard_that_vanished_is_named_with_the_row(corpus) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)
    path = corpus.folder / "shards/train-00001.bin"
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}, needed for row 9, cannot be read: No such file"):
        rows.read(9)


def test_shard_cut_short_while_it_is_open_is_an_error_and_not_a_signal(corpus) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)
    rows.read(9)
    path = corpus.folder / "shards/train-00001.bin"
    os.truncate(path, 100)
    message = rf"{path}, needed for row 9, has 100 bytes, the manifest says {159 * 2}"
    with pytest.raises(DataError, match=message):
        rows.read(9)


def test_token_outside_the_vocabulary_is_found_before_the_model_sees_it(corpus) -> None:
    path = corpus.folder / "shards/train-00000.bin"
    content = np.fromfile(path, dtype="<u2")
    content[3] = 40_000
    content.tofile(path)
    message = rf"{path}, needed for row 0, is damaged: its tokens 0 to 17 are from \d+ to 40000, the vocab"
    with pytest.raises(DataError, match=message):
        Rows(corpus.folder, corpus.manifest, "train", 16).read(0)


def test_row_out_of_range_is_refused(corpus) -> None:
    rows = Rows(corpus.folder, corpus.manifest, "train", 16)
    for row in (-1, rows.num_rows):
        with pytest.raises(DataError, match=rf"rows \[{row}\] asked, it has 0 to {rows.num_rows - 1}"):
            rows.read(row)


def test_damaged_packs_are_refused(corpus) -> None:
    def read(spans: list[tuple[int, int, int, int]]) -> Row:
        manifest = replace(corpus.manifest, packs=[odd_pack(corpus.folder, spans, [len(spans)])])
        return Rows(corpus.folder, manifest, "train", 16, Packing.best_fit).read(0)

    with pytest.raises(DataError, match="row 0 names tokens 0 to 9 of shard 3, which does not have them"):
        read([(3, 0, 9, 0)])
    with pytest.raises(DataError, match="row 0 names tokens 155 to 160 of shard 1, which does not have them"):
        read([(1, 155, 5, 0)])
    for spans in ([(0, 0, 17, 0)], [(0, 0, 9, 0), (0, 9, 8, 0)], [(0, 0, 0, 0)]):
        with pytest.raises(DataError, match=r"row 0 has more than 16 tokens, or an empty span"):
            read(spans)


@pytest.fixture
def big_shard(make_corpus):
    """A shard of three blocks, with bytes changed in the last."""
    corpus = make_corpus("big", [[1000] * 1300], seq_len=512)
    path = corpus.folder / "shards/train-00000.bin"
    content = bytearray(path.read_bytes())
    content[2 * 2**20 + 99] ^= 1
    path.write_bytes(content)
    return corpus


DAMAGE = (
    r"train-00000\.bin is damaged between byte 2,097,152 and 3,145,728: the block's xxh3_64 is \w{16}, its"
)


def test_damage_is_found_at_the_first_row_that_touches_it(big_shard) -> None:
    rows = Rows(big_shard.folder, big_shard.manifest, "train", 512, verify=Verify.touch)
    per_block = 2**20 // 2 // 512
    for row in (0, per_block, 2 * per_block - 2):
        rows.read(row)
    for row in (2 * per_block - 1, 2 * per_block, 2 * per_block + 100):  # the first needs its target there
        with pytest.raises(DataError, match=DAMAGE):
            rows.read(row)
    assert Rows(big_shard.folder, big_shard.manifest, "train", 512).read(2 * per_block)  # verify=none


def test_damage_is_found_when_a_shard_is_opened(big_shard) -> None:
    rows = Rows(big_shard.folder, big_shard.manifest, "train", 512, verify=Verify.open)
    with pytest.raises(DataError, match=DAMAGE):
        rows.read(0)


def test_damaged_sums_are_told_from_damaged_tokens(corpus) -> None:
    path = corpus.folder / "shards/train-00000.sums"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    rows = Rows(corpus.folder, corpus.manifest, "train", 16, verify=Verify.touch)
    with pytest.raises(DataError, match=r"train-00000\.sums is damaged: its xxh3_128 is"):
        rows.read(0)
    rows.read(20)  # of another shard
