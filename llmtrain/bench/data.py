"""Text to shards: megabytes of text a second and core, pass by pass.

One process does everything, so CPU time divided by cores is its own CPU time. Kernels are compiled
before. The text is what the corpus python_docs draws; the same documents as JSONL and JSONL.gz show what
other input costs.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.data.config import DataConfig
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.pipeline import Report
from llmtrain.data.pipeline import run as prepare
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME, Tokenizer
from llmtrain.data.tokenizer.words import WordEncoder
from llmtrain.files import read_json

TEXT_BYTES = 40_000_000
PROMISED_MB_PER_S = 10.0
"""Text a second and core of the whole step but SentencePiece's training."""
UNIT = "MB/s/core"
NOT_OURS = ("train tokenizer", "compile")


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as name:
        folder = Path(name)
        cap = config.scaled(TEXT_BYTES, least=2_000_000)
        docs = CorpusConfig(
            name="python_docs", format=Format.python_docs, max_text_bytes=cap, draw_seed=config.seed
        )  # fmt: skip
        _prepare(docs, folder / "warm")  # compiles, and fills the page cache
        shutil.rmtree(folder / "warm")
        from_docs = _prepare(docs, folder / "docs")
        texts = list(_texts(folder / "docs"))
        plain, packed = folder / "texts.jsonl", folder / "texts.jsonl.gz"
        lines = [json.dumps({"text": text.decode()}, ensure_ascii=False).encode() + b"\n" for text in texts]
        plain.write_bytes(b"".join(lines))
        packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=6))
        jsonl = CorpusConfig(name="jsonl", format=Format.jsonl, paths=[str(plain)])
        from_jsonl = _prepare(jsonl, folder / "jsonl")
        tokenizer = Tokenizer.load(folder / "docs" / from_docs.manifest.tokenizer.path)
        return [
            _whole(from_docs, "python_docs"),
            _whole(from_jsonl, "jsonl"),
            *_passes(from_docs, "python_docs"),
            *_passes(from_jsonl, "jsonl"),
            _gzip_row(packed, plain.stat().st_size),
            _encode_row(tokenizer, texts),
        ]


def _prepare(corpus: CorpusConfig, out: Path) -> Report:
    engine = EngineConfig(kind=EngineKind.inline)
    return prepare(
        DataConfig(corpus=corpus, engine=engine, out=str(out), max_quarantine_share=1.0), quiet=True
    )


def _texts(out: Path) -> Iterator[bytes]:
    for path in sorted((out / "docs").rglob("*.arrow")):
        with pa.memory_map(str(path)) as handle:
            yield from pa.ipc.open_file(handle).read_all().column("text").to_pylist()


def _text_mb(report: Report, name: str) -> float:
    """Text that went into the pass, in MB (10^6 bytes)."""
    if name == "train tokenizer":
        facts = read_json(report.out / report.manifest.tokenizer.path / FACTS_NAME)
        return float(facts["num_sample_bytes"]) / 1e6
    by_pass = {entry["pass"]: entry for entry in report.manifest.funnel}
    into = "tokenize" if name == "pack" else name
    return float(by_pass[into]["in"]["bytes"]) / 1e6


def _whole(report: Report, corpus: str) -> Row:
    """Everything from planning to the manifest but training the tokenizer, over the text that was scanned."""
    seconds = sum(cpu for name, cpu in report.cpu_seconds.items() if name not in NOT_OURS)
    name = f"{corpus}: the whole step but training the tokenizer; limit: the promise"
    return Row(name=name, value=_text_mb(report, "scan") / seconds, unit=UNIT, limit=PROMISED_MB_PER_S)


def _passes(report: Report, corpus: str) -> list[Row]:
    passes = ("scan", "decide", "train tokenizer", "tokenize", "pack")
    return [
        Row(name=f"{corpus}: {name}", value=_text_mb(report, name) / report.cpu_seconds[name], unit=UNIT)
        for name in passes
    ]


def _gzip_row(packed: Path, num_bytes: int) -> Row:
    corpus = CorpusConfig(name="jsonl", format=Format.jsonl, paths=[str(packed)])

    def read() -> None:
        for unit in plan_units(corpus, 1 << 30).units:
            for _, records in read_unit(unit, corpus):
                for _ in records:
                    pass

    raw = packed.read_bytes()
    ours, bare = _seconds(read), _seconds(lambda: zlib.decompress(raw, wbits=31))
    return Row(
        name="jsonl.gz: read and parse; limit: zlib alone",
        value=num_bytes / 1e6 / ours,
        unit=UNIT,
        limit=num_bytes / 1e6 / bare,
    )


def _encode_row(tokenizer: Tokenizer, texts: list[bytes]) -> Row:
    num_bytes = sum(map(len, texts))
    decoded = [text.decode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    joined = np.frombuffer(b"".join(texts), dtype=np.uint8)
    ours = _seconds(lambda: WordEncoder(tokenizer).encode(joined, offsets))
    theirs = _seconds(lambda: tokenizer.processor.encode(decoded, num_threads=1))
    return Row(
        name="encode, equal ids; rival: SentencePiece, one thread",
        value=num_bytes / 1e6 / ours,
        unit=UNIT,
        rival=num_bytes / 1e6 / theirs,
    )


def _seconds(work: Callable[[], object]) -> float:
    """CPU time of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started
