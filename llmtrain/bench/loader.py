"""The loader: order, rows, start-up with 100,000 shards, and how long a step waits for data."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackEntry,
    ShardEntry,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from llmtrain.data.pack import plan_rows, write_pack
from llmtrain.data.shards import ShardWriter
from llmtrain.loader.batches import Batches
from llmtrain.loader.dataset import Rows
from llmtrain.loader.order import rows_at

VOCAB_SIZE = 32_000
EOS_ID = 2
SEQ_LEN = 2048
MICRO_BATCH_ROWS = 8
MEAN_DOC_TOKENS = 800
SHARD_TOKENS = 4_000_000
COMPUTE_S = 0.05
"""Length of the pretended step behind which the next one is read."""


def run(config: BenchConfig) -> list[Row]:
    """Takes no options."""
    config.only_options()
    with tempfile.TemporaryDirectory() as name:
        return [
            _order(config.seed),
            *_reading(Path(name) / "rows", num_shards=config.scaled(4), seed=config.seed),
            _start_up(Path(name) / "many", num_shards=config.scaled(100_000)),
        ]


def _order(seed: int) -> Row:
    num_rows, num_asked = 10_000_000, 1024
    random = np.random.default_rng(seed)
    positions = random.integers(0, num_rows, num_asked)
    ours_s = _median_s(lambda: rows_at(positions, num_rows=num_rows, seed=seed, pack_hash="bench"), 100)
    rival_s = _median_s(lambda: random.permutation(num_rows), 3) / num_rows
    return Row(
        name=f"order of {num_asked} of {num_rows:,} rows; rival: numpy's permutation of all of them",
        value=ours_s / num_asked * 1e6,
        unit="µs/row",
        rival=rival_s * 1e6,
    )


def _reading(folder: Path, *, num_shards: int, seed: int) -> list[Row]:
    manifest = _write_data(folder, num_shards=num_shards, seed=seed)
    rows = Rows(folder, manifest, "train", SEQ_LEN)
    random = np.random.default_rng(seed)

    def read_ours() -> None:
        rows.read_many(random.integers(0, rows.num_rows, MICRO_BATCH_ROWS))

    maps = [np.memmap(folder / f"{shard.path}.bin", dtype="<u2", mode="r") for shard in manifest.shards]

    def read_windows() -> list[torch.Tensor]:
        """As nanoGPT's get_batch: random windows of memory maps, no document is told from the next."""
        tokens = maps[int(random.integers(len(maps)))]
        starts = random.integers(0, len(tokens) - SEQ_LEN - 1, MICRO_BATCH_ROWS).tolist()
        windows = (tokens[at : at + SEQ_LEN + 1].astype(np.int64) for at in starts)
        return [torch.from_numpy(window) for window in windows]

    def read_and_scan() -> None:
        """The same, then positions and segments by a loop over documents, as Megatron-LM does it."""
        windows = read_windows()
        for window in windows:
            positions, segments = torch.arange(SEQ_LEN), torch.zeros(SEQ_LEN, dtype=torch.int32)
            begin = 0
            for end in (window[:SEQ_LEN] == EOS_ID).nonzero().flatten().tolist():
                positions[end + 1 :] -= end + 1 - begin
                segments[end + 1 :] += 1
                begin = end + 1
        torch.stack([window[:-1] for window in windows])
        torch.stack([window[1:] for window in windows])

    batch_tokens = MICRO_BATCH_ROWS * SEQ_LEN / 1e6
    ours_s, rival_s, limit_s = (_median_s(work, 200) for work in (read_ours, read_and_scan, read_windows))
    batches = Batches(
        rows,
        seed=seed,
        global_batch_rows=8 * MICRO_BATCH_ROWS,
        micro_batch_rows=MICRO_BATCH_ROWS,
        dp_rank=0,
        dp_size=1,
    )
    waits: list[float] = []
    for step in range(30):
        began = time.perf_counter()
        batches.micro_batches(step * batches.global_batch_rows)
        waits.append(time.perf_counter() - began)
        time.sleep(COMPUTE_S)
    return [
        Row(
            name=f"rows of {SEQ_LEN} with document borders; rival: scan for EOS; limit: no borders",
            value=batch_tokens / ours_s,
            unit="M tokens/s",
            rival=batch_tokens / rival_s,
            limit=batch_tokens / limit_s,
        ),
        Row(
            name=f"data wait, {8 * batch_tokens:.2g} M tokens behind {COMPUTE_S * 1e3:.0f} ms; limit: 1%",
            value=statistics.median(waits[1:]) * 1e3,
            unit="ms",
            limit=COMPUTE_S * 1e3 / 100,
        ),
    ]


def _start_up(folder: Path, *, num_shards: int) -> Row:
    """From the folder's name to rows that can be read; the manifest is real, its shards do not exist."""
    shards = [_shard_entry(number, np.zeros(1, dtype=np.int64)) for number in range(num_shards)]
    pack = write_pack(
        folder, f"packs/seq{SEQ_LEN}", "train", SEQ_LEN, plan_rows([np.array([SEQ_LEN])], SEQ_LEN)
    )
    write_manifest(folder, _manifest(shards, [pack]))
    taken_s = _median_s(lambda: Rows(folder, read_manifest(folder), "train", SEQ_LEN), 3)
    return Row(
        name=f"start-up with {num_shards:,} shards; limit: our promise", value=taken_s, unit="s", limit=1.0
    )


def _write_data(folder: Path, *, num_shards: int, seed: int) -> Manifest:
    random = np.random.default_rng(seed)
    shards, lengths = [], []
    for number in range(num_shards):
        doc_lengths = random.geometric(1 / MEAN_DOC_TOKENS, SHARD_TOKENS // MEAN_DOC_TOKENS).astype(np.int64)
        writer = ShardWriter(folder / f"shards/train-{number:05d}", "uint16", VOCAB_SIZE)
        token_ids = random.integers(EOS_ID + 1, VOCAB_SIZE, int(doc_lengths.sum()), dtype=np.uint16)
        token_ids[np.cumsum(doc_lengths) - 1] = EOS_ID
        writer.add_many(token_ids, doc_lengths)
        writer.close()
        lengths.append(doc_lengths)
        shards.append(_shard_entry(number, doc_lengths))
    pack = write_pack(folder, f"packs/seq{SEQ_LEN}", "train", SEQ_LEN, plan_rows(list(lengths), SEQ_LEN))
    return _manifest(shards, [pack])


def _shard_entry(number: int, doc_lengths: npt.NDArray[np.int64]) -> ShardEntry:
    num_tokens = int(doc_lengths.sum())
    return ShardEntry(
        path=f"shards/train-{number:05d}",
        split="train",
        num_documents=len(doc_lengths),
        num_tokens=num_tokens,
        num_bytes=2 * num_tokens,
        sha256=f"{number:064x}",
        idx_sha256=f"{number:064x}",
        xxh3_128=f"{number:032x}",
        text_bytes=4 * num_tokens,
    )


def _manifest(shards: list[ShardEntry], packs: list[PackEntry]) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus="bench",
        dtype="uint16",
        tokenizer=TokenizerEntry(
            path="tokenizer",
            kind="sentencepiece_bpe",
            vocab_size=VOCAB_SIZE,
            fingerprint="",
            eos_id=EOS_ID,
            bos_id=None,
        ),
        shards=shards,
        packs=packs,
        funnel=[],
        config={},
        config_hash="",
        versions={},
        held_out_text="held_out.jsonl.zst",
        tool_version="",
    )


def _median_s(work: Callable[[], object], num_repeats: int) -> float:
    """Median seconds of a call, after one that warms up."""
    taken = []
    for _ in range(num_repeats + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
