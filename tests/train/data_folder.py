"""A small data folder in the real formats, without a tokenizer: words of a Markov chain, so that a model
can learn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from llmtrain import files
from llmtrain.data.config import Packing
from llmtrain.data.manifest import FORMAT_VERSION, Manifest, ShardEntry, TokenizerEntry, write_manifest
from llmtrain.data.pack import write_plan
from llmtrain.data.shards import ShardWriter

VOCAB_SIZE = 64
EOS = 1


def write_data_folder(folder: Path, *, seq_len: int = 32, num_documents: int = 200, seed: int = 0) -> Path:
    """Two shards of training documents, one of held-out ones, and a pack of each for `seq_len`."""
    random = np.random.default_rng(seed)
    following = random.integers(2, VOCAB_SIZE, (VOCAB_SIZE, 2))
    shards, packs, lengths = [], [], {"train": [], "held_out": []}
    for split, number, count in (
        ("train", 0, num_documents // 2),
        ("train", 1, num_documents - num_documents // 2),
        ("held_out", 0, max(4, num_documents // 10)),
    ):
        path = f"shards/test/{split}-{number:05d}"
        writer = ShardWriter(folder / path, "uint16", VOCAB_SIZE, eos_id=EOS)
        shard_lengths = []
        for _ in range(count):
            document = [int(random.integers(2, VOCAB_SIZE))]
            for _ in range(int(random.integers(3, 60))):
                document.append(int(following[document[-1], random.integers(0, 2)]))
            writer.add(np.array([*document, EOS], dtype=np.uint16))
            shard_lengths.append(len(document) + 1)
        result = writer.close()
        names = [f"{split}-{number}-{at}" for at in range(count)]
        columns = {
            "id": names,
            "source": ["chain"] * count,
            "path": [""] * count,
            "record": list(range(1, count + 1)),
        }
        pq.write_table(pa.table(columns), folder / f"{path}.docs.parquet")
        lengths[split].append(np.array(shard_lengths))
        shards.append(ShardEntry(path=path, split=split, text_bytes=result.num_tokens * 4, **vars(result)))
    for split, parts in lengths.items():
        for strategy in Packing:
            relative = f"packs/test/seq{seq_len}-{strategy.name}"
            packs.append(write_plan(folder, relative, split, seq_len, strategy, parts))
    with files.atomic_write(folder / "tokenizer/test/tokenizer.model") as handle:
        handle.write(b"not a real tokenizer")
    with files.atomic_write(folder / "held_out.jsonl.zst") as handle:
        handle.write(zstandard.compress(b""))
    write_manifest(
        folder,
        Manifest(
            format_version=FORMAT_VERSION,
            corpus="test",
            dtype="uint16",
            tokenizer=TokenizerEntry(
                path="tokenizer/test",
                kind="sentencepiece_bpe",
                vocab_size=VOCAB_SIZE,
                fingerprint=files.hash_file(folder / "tokenizer/test/tokenizer.model"),
                eos_id=EOS,
                bos_id=None,
            ),
            shards=shards,
            packs=packs,
            funnel=[],
            config={},
            config_hash="",
            versions={},
            held_out_text="held_out.jsonl.zst",
            tool_version="test",
        ),
    )
    return folder


def train_arguments(data: Path, run: Path, *overrides: str) -> list[str]:
    """Arguments of `llmtrain train` for a tiny model on that folder: 12 steps of 8 rows."""
    settings = {
        "run.name": "test",
        "run.folder": run,
        "data.folder": data,
        "data.seq_len": 32,
        "model.vocab_size": VOCAB_SIZE,
        "model.d_model": 32,
        "model.num_layers": 2,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_width": 64,
        "train.total_tokens": 12 * 8 * 32,
        "train.global_batch_rows": 8,
        "train.micro_batch_rows": 2,
        "save.every_steps": 4,
        "train.eval_every_steps": 6,
        "optimizer.peak_lr": 0.01,
        "schedule.warmup_tokens": 512,
        "tracking.wandb": "off",
        "preflight.enabled": "false",  # has tests of its own, and takes a second of every start
    }
    return ["train", *(f"{key}={value}" for key, value in settings.items()), *overrides]


def wait_for(claim: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return once `claim` holds."""
    limit = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


@dataclass
class Finished:
    """A run that ended by itself, and the arguments that started it."""

    folder: Path
    arguments: list[str]
