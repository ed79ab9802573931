"""Small data folders, written by the data room's own writers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.config import Packing
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackEntry,
    ShardEntry,
    TokenizerEntry,
    write_manifest,
)
from llmtrain.data.pack import write_plan
from llmtrain.data.shards import ShardWriter

EOS_ID = 2
VOCAB_SIZE = 1000


@dataclass
class Corpus:
    """A data folder, and the documents in it as plain lists: the truth that tests compare with."""

    folder: Path
    manifest: Manifest
    documents: dict[str, list[list[int]]]
    """Split → documents in shard order, EOS last."""


def make_manifest(
    shards: list[ShardEntry], packs: list[PackEntry], *, dtype: str = "uint16", vocab_size: int = VOCAB_SIZE
) -> Manifest:
    tokenizer = TokenizerEntry(
        path="tokenizer",
        kind="sentencepiece_bpe",
        vocab_size=vocab_size,
        fingerprint="f" * 64,
        eos_id=EOS_ID,
        bos_id=None,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus="test",
        dtype=dtype,
        tokenizer=tokenizer,
        shards=shards,
        packs=packs,
        funnel=[],
        config={},
        config_hash="",
        versions={},
        held_out_text="held_out.jsonl.zst",
        tool_version="test",
    )


def write_corpus(
    folder: Path,
    doc_lengths: Sequence[Sequence[int]],
    *,
    seq_len: int,
    dtype: str = "uint16",
    split: str = "train",
    seed: int = 0,
) -> Corpus:
    """Write a shard of random tokens for each list of document lengths (EOS counted), and packs."""
    random = np.random.default_rng(seed)
    documents: list[list[int]] = []
    shards: list[ShardEntry] = []
    for number, lengths in enumerate(doc_lengths):
        path = f"shards/{split}-{number:05d}"
        writer = ShardWriter(folder / path, dtype, VOCAB_SIZE, eos_id=EOS_ID)
        first = len(documents)
        for length in lengths:
            documents.append([*random.integers(3, VOCAB_SIZE, length - 1).tolist(), EOS_ID])
            writer.add(np.array(documents[-1]))
        result = writer.close()
        of_shard = range(first, len(documents))
        lineage: dict[str, list[Any]] = {
            "id": [f"doc-{at}" for at in of_shard],
            "source": [f"source-{number}" for _ in of_shard],
            "path": [f"{number}.jsonl" for _ in of_shard],
            "record": [at - first + 1 for at in of_shard],
        }
        pq.write_table(pa.table(lineage), folder / f"{path}.docs.parquet")
        shards.append(ShardEntry(path=path, split=split, text_bytes=3 * result.num_tokens, **vars(result)))
    parts = [np.array(lengths) for lengths in doc_lengths]
    packs = [
        write_plan(folder, f"packs/seq{seq_len}-{strategy.name}", split, seq_len, strategy, parts)
        for strategy in Packing
    ]
    manifest = make_manifest(shards, packs, dtype=dtype)
    write_manifest(folder, manifest)
    return Corpus(folder=folder, manifest=manifest, documents={split: documents})


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Three shards, 25 short documents and one of many rows; 40 full rows of 16 tokens and a short one."""
    return write_corpus(
        tmp_path, [[7, 30, 2, 16, 1, 50, 3], [100, 9, 9, 40, 1], [5, 17, 33, 250, 4, 64]], seq_len=16
    )


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    def make(name: str, *args: Any, **settings: Any) -> Corpus:
        return write_corpus(tmp_path / name, *args, **settings)

    return make


@pytest.fixture
def big_manifest() -> Callable[..., Manifest]:
    def make(folder: Path, *, num_shards: int) -> Manifest:
        """Shards that do not exist, ten million tokens each, and a pack of them."""
        shards = [
            ShardEntry(
                path=f"shards/train-{number:05d}",
                split="train",
                num_documents=10_000,
                num_tokens=10_000_000,
                num_bytes=20_000_000,
                max_id=VOCAB_SIZE - 1,
                num_eos=10_000,
                sha256=f"{number:064x}",
                idx_sha256=f"{number:064x}",
                xxh3_128=f"{number:032x}",
                sums_xxh3_128=f"{number:032x}",
                text_bytes=40_000_000,
            )
            for number in range(num_shards)
        ]
        pack = PackEntry(
            path="",
            split="train",
            seq_len=2000,
            strategy="concat",
            num_rows=5000 * num_shards,
            num_target_tokens=9_990_000 * num_shards,
            num_padding=0,
            num_cut_documents=0,
            num_long_documents=0,
        )
        manifest = make_manifest(shards, [pack])
        write_manifest(folder, manifest)
        return manifest

    return make
