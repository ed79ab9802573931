"""A token leads back to the bytes of the document that it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.config import PackConfig, ShardsConfig
from llmtrain.data.document import normalize
from llmtrain.data.manifest import Manifest, read_manifest
from llmtrain.data.pack import open_plan
from llmtrain.data.pipeline import run
from llmtrain.data.shards import ShardReader
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.data.trace import TraceConfig, as_json, trace
from llmtrain.errors import ConfigError, DataError

RARE = "Here stand \u2581 and 🙂 and e\u0300 and \u0152 among others. "


@pytest.fixture
def texts_by_record(texts: list[str]) -> list[str]:
    return [*texts[:30], RARE + texts[99], *texts[30:60]]


@pytest.fixture
def folder(
    write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts_by_record: list[str]
) -> Path:
    """Several shards a split, and packs of two lengths."""
    cfg = jsonl_config(
        write_jsonl(texts_by_record),
        shards=ShardsConfig(text_bytes=8000),
        pack=PackConfig(seq_lens=[64, 96]),
    )
    run(cfg, quiet=True)
    return Path(cfg.out)


def shards_of(manifest: Manifest) -> list[Any]:
    shards = manifest.split_shards("train")
    assert len(shards) > 2
    return shards


def test_every_token_of_a_split_leads_to_its_bytes_and_they_add_up(
    folder: Path, texts_by_record: list[str]
) -> None:
    manifest = read_manifest(folder)
    num_tokens = sum(shard.num_tokens for shard in shards_of(manifest))
    found = trace(TraceConfig(folder=str(folder), token=0, length=num_tokens))
    assert sum(run.num_tokens for run in found) == num_tokens
    assert len(found) == sum(shard.num_documents for shard in manifest.split_shards("train"))
    for traced in found:
        original = normalize(texts_by_record[traced.record - 1])
        assert traced.text == original
        assert (traced.byte_start, traced.byte_end) == (0, len(original.encode()))
        assert (traced.char_start, traced.char_end) == (0, len(original))
        assert traced.is_exact
        assert traced.path.endswith("texts.jsonl")


def test_single_tokens_tile_a_document(folder: Path) -> None:
    whole = next(
        run
        for run in trace(TraceConfig(folder=str(folder), token=0, length=10**6))
        if run.text.startswith(normalize(RARE))
    )
    text = whole.text.encode()
    at = 0
    for number in range(whole.num_tokens):
        [one] = trace(TraceConfig(folder=str(folder), shard=whole.shard, token=whole.token + number))
        assert (one.document_id, one.token_in_document) == (whole.document_id, number)
        assert one.byte_start == at
        at = one.byte_end
        assert text[: one.byte_start].decode(errors="ignore").endswith(one.before)
        assert text[: one.byte_end].decode(errors="ignore") == whole.text[: one.char_end]
    assert at == len(text)
    assert one.text == ""  # EOS


def test_a_token_of_a_split_is_the_same_by_shard_number_name_and_path(folder: Path) -> None:
    shards = shards_of(read_manifest(folder))
    before = shards[0].num_tokens
    [by_split] = trace(TraceConfig(folder=str(folder), token=before + 7))
    name = Path(shards[1].path).name
    for shard in ("1", name, shards[1].path, f"{folder}/{shards[1].path}.bin", f"{name}.idx"):
        assert trace(TraceConfig(folder=str(folder), shard=shard, token=7)) == [by_split]


def test_a_row_of_a_pack_shows_each_of_its_documents(folder: Path) -> None:
    manifest = read_manifest(folder)
    for seq_len in (64, 96):
        entry = manifest.pack("train", seq_len)
        plan = open_plan(folder, manifest, entry)
        for row in range(0, entry.num_rows, 7):
            found = trace(TraceConfig(folder=str(folder), row=row, seq_len=seq_len))
            spans, _ = plan.spans(np.array([row]))
            shards = manifest.split_shards("train")
            assert [(run.shard, run.token, run.num_tokens) for run in found] == [
                (shards[number].path, start, length) for number, start, length, _ in spans.T.tolist()
            ]


def test_a_position_inside_a_row_is_one_token_of_it(folder: Path) -> None:
    row = trace(TraceConfig(folder=str(folder), row=3, seq_len=64))
    tokens = [run.token + at for run in row for at in range(run.num_tokens)]
    for position in (0, 20, 63):
        [one] = trace(TraceConfig(folder=str(folder), row=3, seq_len=64, token=position))
        assert one.token == tokens[position]
    [*runs] = trace(TraceConfig(folder=str(folder), row=3, seq_len=64, token=60, length=50))
    assert sum(run.num_tokens for run in runs) == 4  # the row ends


def test_the_bytes_of_pieces_are_what_decoding_gives(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in [*texts[:20], RARE, "é\u0300 日本 \x00", "a\u2581\u2581b \ufdd0\ufdd1\ufdd2 \u2581"]:
        assert b"".join(tokenizer.pieces(tokenizer.encode(text))) == text.encode()
    assert tokenizer.pieces(np.array([tokenizer.eos_id])) == [b""]


def test_a_tokenizer_that_loses_text_is_told(folder: Path) -> None:
    """As if the document had been longer than its tokens say."""
    shard = shards_of(read_manifest(folder))[0]
    path = folder / f"{shard.path}.docs.parquet"
    table = pq.read_table(path)
    longer = pa.array(np.asarray(table.column("text_bytes")) + 1)
    pq.write_table(table.set_column(table.column_names.index("text_bytes"), "text_bytes", longer), path)
    assert not trace(TraceConfig(folder=str(folder), shard="0", token=0))[0].is_exact


def test_a_trace_is_plain_json_values(folder: Path) -> None:
    [one] = as_json(trace(TraceConfig(folder=str(folder), token=5)))
    assert all(isinstance(value, str | int | bool) for value in one.values())
    assert one["document_id"] == ShardReader(folder / one["shard"]).lineage(one["document"]).document_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"nothing to trace: give token=POSITION \(with shard= or split=\), or row=NUMBER"),
        ({"row": 1, "shard": "0"}, "row=1 is a row of a split's pack, which has no shard=0; leave one out"),
        ({"token": -1}, "token=-1 must be at least 0"),
        ({"row": -2}, "row=-2 must be at least 0"),
        ({"token": 0, "length": 0}, "length=0 must lie in 1..1048576"),
    ],
)
def test_a_request_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TraceConfig(folder="x", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": 10**9}, r"token=1,000,000,000 is past the end: split train has [\d,]+ tokens"),
        ({"token": 10**9, "shard": "0"}, r"is past the end: shard train-00000 has [\d,]+ tokens"),
        ({"token": 0, "shard": "99"}, r"shard=99 is past the last: split train has shards 0 to \d+"),
        ({"token": 0, "shard": "train-0000"}, "unknown shard 'train-0000'; did you mean 'train-0000"),
        ({"token": 0, "split": "trian"}, "unknown split 'trian'; did you mean 'train'"),
        ({"token": 0, "split": "trian", "shard": "0"}, "unknown split 'trian'; did you mean 'train'"),
        ({"row": 0}, r"split train has packs of seq_len \[64, 96\]; give seq_len= one of them"),
        ({"row": 10**6, "seq_len": 64}, r"row=1,000,000 is past the end: the pack of split train with seq"),
        ({"row": 0, "seq_len": 64, "token": 64}, r"token=64 is past the end: row 0 has 64 tokens"),
        ({"row": 0, "seq_len": 65}, "no pack of split 'train' has seq_len=65"),
        ({"row": 0, "split": "trian"}, "the manifest has no pack of split 'trian'"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        trace(TraceConfig(folder=str(folder), **settings))


def test_a_shard_without_lineage_is_an_error(folder: Path) -> None:
    shard = shards_of(read_manifest(folder))[0]
    (folder / f"{shard.path}.docs.parquet").unlink()
    with pytest.raises(DataError, match=r"docs\.parquet is missing; run `llmtrain data` again"):
        trace(TraceConfig(folder=str(folder), shard="0", token=0))
