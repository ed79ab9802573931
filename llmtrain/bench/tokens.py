"""Tokens: encoding against SentencePiece, packing, order, start-up, and reading rows against other loaders.

Encoding is timed in CPU time of one thread on docstrings of a Python installation, or on `options.texts`, a
file of JSON lines with a field `text`; ids are compared with SentencePiece's own on those and on made-up
documents in 16 languages. Readers are timed warm and in turns on the same tokens. Rivals that are not
installed are left out (docs/dependencies.md says how to get them); `options.rivals=false` leaves all out.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.bench import _documents, _token_readers
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.data.config import Packing, TokenizerConfig, TokenizerModel
from llmtrain.data.document import Document
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackEntry,
    ShardEntry,
    ShardTable,
    TokenizerEntry,
    write_manifest,
)
from llmtrain.data.pack import plan_rows, write_plan
from llmtrain.data.shards import ShardWriter
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from llmtrain.data.tokenizer.tokenizer import Ids
from llmtrain.data.tokenizer.train import train_tokenizer
from llmtrain.data.tokenizer.words import WordEncoder
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.batches import Batches
from llmtrain.loader.dataset import Rows
from llmtrain.loader.mixture import Mixture, Source
from llmtrain.loader.order import rows_at

log = logging.getLogger(__name__)

TEXT_BYTES = 16_000_000
"""Text that encoding is timed on."""
TRAIN_BYTES = 4_000_000
NUM_DOCUMENTS = 20_000
"""Made-up documents whose ids are compared."""
BPE_VOCAB, UNIGRAM_VOCAB = 16_384, 4096
ENCODE_BYTES = 4 << 20
SEQ_LEN = 2048
MICRO_BATCH_ROWS = 8
MEAN_DOC_TOKENS = 800
VOCAB_SIZE = 32_000
EOS_ID = 2
SHARD_TOKENS = 8_000_000
NUM_SHARDS, MANY_SHARDS = 4, 100_000
REPEATS = 5
COMPUTE_S = 0.05
"""Length of the pretended step behind which the next one is read."""

Int64 = npt.NDArray[np.int64]


def run(config: BenchConfig) -> list[Row]:
    config.only_options("rivals", "texts")
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as name:
        folder = Path(name)
        texts = _texts(config)
        return [
            *_encoding_rows(texts, config, folder),
            _order_row(config.seed),
            *_packing_rows(config),
            *_reading_rows(folder, config),
            *_start_up_rows(folder / "many", config.scaled(MANY_SHARDS)),
        ]


# Encoding.


def _texts(config: BenchConfig) -> list[str]:
    """Documents of about TEXT_BYTES times the scale."""
    wanted = config.scaled(TEXT_BYTES, least=100_000)
    texts, num_bytes = [], 0
    for text in _all_texts(config.option("texts", "")):
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= wanted:
            break
    return texts


def _all_texts(path: str) -> Iterator[str]:
    if path:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path) as handle:
            for line in handle:
                yield json.loads(line)["text"]
        return
    corpus = CorpusConfig(name="python_docs", format=Format.python_docs)
    for unit in plan_units(corpus, 1 << 20, out=Path("unused")).units:
        for _, records in read_unit(unit, corpus):
            for record in records:
                if isinstance(record, Document):
                    yield record.text.decode(errors="ignore")


def _encoding_rows(texts: list[str], config: BenchConfig, folder: Path) -> list[Row]:
    made_up = _documents.documents(config.scaled(NUM_DOCUMENTS, least=100), seed=config.seed)
    sample = [*_head(texts, config.scaled(TRAIN_BYTES, least=50_000)), *made_up[: len(made_up) // 10]]
    vocab_size = BPE_VOCAB if config.scale >= 0.5 else 2048
    model = train_tokenizer(sample, TokenizerConfig(vocab_size=vocab_size))
    bpe = SentencePieceTokenizer(model)
    num_mb = sum(len(text.encode()) for text in texts) / 1e6
    batches = _batches(texts)
    _by_words(bpe, _batches(texts[:10]))  # compiles
    ours, theirs = _in_turns(lambda: _by_words(bpe, batches), lambda: _by_sentencepiece(bpe, texts))
    differing = sum(
        a != b
        for documents in (texts, made_up)
        for a, b in zip(
            _as_lists(_by_words(bpe, _batches(documents))), bpe.processor.encode(documents), strict=True
        )
    )
    unigram = SentencePieceTokenizer(
        train_tokenizer(
            _head(sample, config.scaled(500_000, least=50_000)),
            TokenizerConfig(vocab_size=min(vocab_size, UNIGRAM_VOCAB), model_type=TokenizerModel.unigram),
        )
    )
    own, plain = _in_turns(lambda: unigram.encode_batch(texts), lambda: _by_sentencepiece(unigram, texts))
    (folder / "bpe.model").write_bytes(model)
    (folder / "texts.json").write_text(json.dumps(texts))
    return [
        Row(name="bpe_docs_differing", value=differing, unit=f"of {len(texts) + len(made_up):,}", limit=0),
        Row(name="bpe_vs_sentencepiece", value=theirs / ours, unit="x", limit=6),
        Row(name="bpe_mb_per_s_core", value=num_mb / ours, unit="MB/s/core", rival=num_mb / theirs),
        Row(name="bpe_peak_mb", value=_peak_mb(_ENCODE, folder), unit="MB", limit=400),
        Row(name="unigram_vs_sentencepiece", value=plain / own, unit="x", limit=1),
        Row(name="unigram_mb_per_s_core", value=num_mb / own, unit="MB/s/core", rival=num_mb / plain),
    ]


def _head(texts: list[str], num_chars: int) -> list[str]:
    ends = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(ends, num_chars)) + 1]


Batch = tuple[npt.NDArray[np.uint8], Int64]


def _batches(texts: list[str]) -> list[Batch]:
    """Documents as pass 3 hands them over: ENCODE_BYTES of text at a time, back to back."""
    raw = [text.encode() for text in texts]
    batches: list[Batch] = []
    first = num_bytes = 0
    for at, each in enumerate(raw):
        num_bytes += len(each)
        if num_bytes >= ENCODE_BYTES or at + 1 == len(raw):
            part = raw[first : at + 1]
            offsets = np.cumsum([0, *(len(text) for text in part)], dtype=np.int64)
            batches.append((np.frombuffer(b"".join(part), dtype=np.uint8), offsets))
            first, num_bytes = at + 1, 0
    return batches


def _by_words(tokenizer: SentencePieceTokenizer, batches: list[Batch]) -> list[tuple[Ids, Int64]]:
    """With a store that starts empty."""
    encoder = WordEncoder(tokenizer)
    return [encoder.encode(text, offsets) for text, offsets in batches]


def _as_lists(encoded: list[tuple[Ids, Int64]]) -> list[list[int]]:
    """Ids of each document, without EOS."""
    found = []
    for ids, lengths in encoded:
        ends = np.cumsum([0, *lengths.tolist()])
        found += [ids[a : b - 1].tolist() for a, b in pairwise(ends)]
    return found


def _by_sentencepiece(tokenizer: SentencePieceTokenizer, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer.processor.encode(texts, num_threads=1)
    return ids


def _in_turns(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of each, the median of a few runs in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for work, seconds in zip((ours, theirs), taken, strict=True):
            began = time.process_time()
            work()
            seconds.append(time.process_time() - began)
    return statistics.median(taken[0]), statistics.median(taken[1])


_ENCODE = r"""
import json, re, sys
from pathlib import Path
import numpy as np
from llmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from llmtrain.data.tokenizer.words import WordEncoder
folder = Path(sys.argv[1])
encoder = WordEncoder(SentencePieceTokenizer.load(folder / "bpe.model"))
text = np.frombuffer("".join(json.loads((folder / "texts.json").read_text())).encode(), dtype=np.uint8)
for first in range(0, len(text), 4 << 20):
    part = text[first : first + (4 << 20)]
    part = np.frombuffer(part.tobytes().decode(errors="ignore").encode(), dtype=np.uint8)
    encoder.encode(part, np.array([0, len(part)]))
print(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
"""


def _peak_mb(script: str, folder: Path) -> float:
    """Peak memory of a process that runs `script`."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1]) * 1024 / 1e6


# Order and packs.


def _order_row(seed: int) -> Row:
    num_rows, num_asked = 10_000_000, 1024
    random = np.random.default_rng(seed)
    positions = random.integers(0, num_rows, num_asked)
    ours = _median_s(lambda: rows_at(positions, num_rows=num_rows, seed=seed, pack_hash="bench"), 100)
    return Row(name="order_us_per_row", value=ours / num_asked * 1e6, unit="µs/row", limit=0.3)


def _packing_rows(config: BenchConfig) -> list[Row]:
    num_documents = config.scaled(1_000_000, least=10_000)
    lengths = np.random.default_rng(config.seed).geometric(1 / MEAN_DOC_TOKENS, num_documents)
    taken = _median_s(lambda: plan_rows(lengths, SEQ_LEN, Packing.best_fit), REPEATS)
    counts, *_ = plan_rows(lengths, SEQ_LEN, Packing.best_fit)
    padding = 1 - lengths.sum() / (len(counts) * SEQ_LEN)
    return [
        Row(
            name="packing_mdocs_per_s", value=num_documents / taken / 1e6, unit="M documents/s/core", limit=1
        ),
        Row(name="packing_padding_percent", value=100 * padding, unit="% of positions"),
    ]


# Reading.


def _reading_rows(folder: Path, config: BenchConfig) -> list[Row]:
    manifest, lengths = _write_data(folder / "data", config)
    rows = Rows(folder / "data", manifest, "train", SEQ_LEN)
    random = np.random.default_rng(config.seed)
    chosen = [random.integers(0, rows.num_rows - 1, MICRO_BATCH_ROWS) for _ in range(50)]
    batch_tokens = MICRO_BATCH_ROWS * SEQ_LEN

    def ours() -> None:
        for each in chosen:
            rows.read_many(each)

    block = rows.read_many(chosen[0])
    arrays: list[npt.NDArray[Any]] = [block.tokens, block.targets, block.positions, block.segments]

    def copies() -> None:
        for _ in chosen:
            for array in arrays:
                array.copy()

    rate, limit = (batch_tokens * len(chosen) / _median_s(work, REPEATS) / 1e6 for work in (ours, copies))
    found = [
        Row(name="loader_mtokens_per_s", value=rate, unit="M tokens/s/core", limit=50),
        Row(name="loader_vs_memcpy", value=rate / limit, unit="x", limit=0.5),
        _wait_row(rows, config.seed),
    ]
    if config.option("rivals", True):
        found += _rival_rows(folder, manifest, lengths, chosen, rows)
    return found


def _rival_rows(
    folder: Path, manifest: Manifest, lengths: list[Int64], chosen: list[Int64], rows: Rows
) -> list[Row]:
    """Times of the rivals over ours for the same rows: above 1, ours is faster. Theirs give tokens alone."""
    prefixes = [folder / "data" / shard.path for shard in manifest.shards]
    tokens = np.concatenate([np.fromfile(f"{prefix}.bin", dtype="<u2") for prefix in prefixes])
    num_rows = len(tokens) // SEQ_LEN
    table = tokens[: num_rows * SEQ_LEN].reshape(num_rows, SEQ_LEN)
    makers: dict[str, tuple[str, Callable[[], _token_readers.ReadRows]]] = {
        "reads_vs_megatron": (
            "megatron",
            lambda: _token_readers.megatron(list(zip(prefixes, lengths, strict=True)), SEQ_LEN),
        ),
        "reads_vs_mds": ("streaming", lambda: _token_readers.mds(folder / "mds", table)),
        "reads_vs_litdata": ("litdata", lambda: _token_readers.litdata(folder / "lit", table)),
    }
    found = []
    for name, (package, make) in makers.items():
        if importlib.util.find_spec(package) is None:
            log.warning("%s is left out: %s is not installed (docs/dependencies.md)", name, package)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            theirs = make()
            assert np.array_equal(theirs(chosen[0]), rows.read_many(chosen[0]).tokens), (
                f"{package} reads otherwise"
            )

            def read_theirs(read: _token_readers.ReadRows = theirs) -> None:
                for each in chosen:
                    read(each)

            def read_ours() -> None:
                for each in chosen:
                    rows.read_many(each)

            ratios = [_median_s(read_theirs, 1) / _median_s(read_ours, 1) for _ in range(2 * REPEATS)]
        found.append(Row(name=name, value=statistics.median(ratios), unit="x", limit=1))
    return found


def _wait_row(rows: Rows, seed: int) -> Row:
    source = Source(name="bench", num_rows=rows.num_rows, hash=rows.hash)
    size = 8 * MICRO_BATCH_ROWS
    batches = Batches(
        rows,
        order=Mixture([source], [(0, {})], seed=seed, block_rows=4096),
        sizes=BatchSizes.of([], size),
        micro_batch_rows=MICRO_BATCH_ROWS,
        dp_rank=0,
        dp_size=1,
    )
    waits: list[float] = []
    for step in range(20):
        began = time.perf_counter()
        batches.step(step * size)
        waits.append(time.perf_counter() - began)
        time.sleep(COMPUTE_S)
    batches.close()
    share = statistics.median(waits[1:]) / COMPUTE_S
    return Row(name="data_wait_percent", value=100 * share, unit="% of a 50 ms step", limit=1)


# Start-up.

_START = r"""
import re, sys, time
from pathlib import Path
from llmtrain.data.manifest import read_manifest
from llmtrain.loader.dataset import Rows
folder = Path(sys.argv[1])
began = time.perf_counter()
rows = Rows(folder, read_manifest(folder), "train", 2048)
rows.read_many(__import__("numpy").array([0]))
taken = time.perf_counter() - began
assert "torch" not in sys.modules
peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]  # ru_maxrss knows the parent's
print(taken, int(peak) * 1024 / 1e6)
"""


def _start_up_rows(folder: Path, num_shards: int) -> list[Row]:
    """From the folder's name to the first row, in a new process: ten million tokens a shard, of which one
    shard is there."""
    entries = _write_shard(folder, 0, np.random.default_rng(0))[0]
    table = ShardTable.of([entries])
    records = np.repeat(table.records, num_shards)
    records["num_tokens"] = 10_000_000
    records[0] = table.records[0]
    num_tokens = int(records["num_tokens"].sum())
    pack = PackEntry(
        path="", split="train", seq_len=SEQ_LEN, strategy="concat", num_rows=num_tokens // SEQ_LEN,
        num_target_tokens=0, num_padding=0, num_cut_documents=0, num_long_documents=0,
    )  # fmt: skip
    write_manifest(folder, _manifest(ShardTable(table.folder, table.splits, records), [pack]))
    figures = []
    for _ in range(REPEATS):
        done = subprocess.run(
            [sys.executable, "-c", _START, str(folder)], capture_output=True, text=True, check=True
        )
        figures.append([float(word) for word in done.stdout.split()])
    seconds, megabytes = (statistics.median(column) for column in zip(*figures, strict=True))
    return [
        Row(name="loader_startup_s", value=seconds, unit=f"s for {num_tokens:.1e} tokens", limit=1),
        Row(name="loader_startup_mb", value=megabytes, unit="MB, the whole process", limit=200),
    ]


# Data to read.


def _write_data(folder: Path, config: BenchConfig) -> tuple[Manifest, list[Int64]]:
    random = np.random.default_rng(config.seed)
    written = [_write_shard(folder, number, random) for number in range(config.scaled(NUM_SHARDS))]
    entries, lengths = [entry for entry, _ in written], [own for _, own in written]
    pack = write_plan(folder, "packs", "train", SEQ_LEN, Packing.concat, lengths)
    return _manifest(ShardTable.of(entries), [pack]), lengths


def _write_shard(folder: Path, number: int, random: np.random.Generator) -> tuple[ShardEntry, Int64]:
    lengths = random.geometric(1 / MEAN_DOC_TOKENS, SHARD_TOKENS // MEAN_DOC_TOKENS).astype(np.int64)
    lengths[-1] += -int(lengths.sum()) % SEQ_LEN  # so that no row lies in two shards, for the rivals
    path = f"shards/train-{number:05d}"
    with ShardWriter(folder / path, "uint16", VOCAB_SIZE, eos_id=EOS_ID) as writer:
        token_ids = random.integers(EOS_ID + 1, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
        token_ids[np.cumsum(lengths) - 1] = EOS_ID
        writer.add_many(token_ids, lengths)
        result = writer.close()
    return ShardEntry(path=path, split="train", text_bytes=4 * result.num_tokens, **vars(result)), lengths


def _manifest(shards: ShardTable, packs: list[PackEntry]) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus="bench",
        dtype="uint16",
        tokenizer=TokenizerEntry(
            path="tokenizer", kind="sentencepiece_bpe", vocab_size=VOCAB_SIZE, fingerprint="", eos_id=EOS_ID,
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
    )  # fmt: skip


def _median_s(work: Callable[[], object], num_repeats: int) -> float:
    """Median seconds of a call, after one that warms up."""
    taken = []
    for _ in range(num_repeats + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
