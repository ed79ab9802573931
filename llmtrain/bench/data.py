"""Text to documents and shards: speed a core, memory and scaling, beside datatrove where it is installed.

One process does everything, so CPU time divided by cores is its own CPU time; kernels are compiled before.
The text is what the corpus python_docs draws; the same documents as JSONL are what both sides read. The rival
is datatrove with its defaults (`pip install llmtrain[rivals]`); its rates come from fewer documents, drawn
evenly from the same ones, because it is slow. `options.rival=false` leaves it out.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from llmtrain.bench import _datatrove
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.cli.compose import conf_folder
from llmtrain.data.config import DataConfig, StopAfter
from llmtrain.data.content.config import ContentConfig, LanguageConfig, PiiConfig
from llmtrain.data.dedup.config import DedupConfig, NearConfig
from llmtrain.data.dedup.minhash import signatures
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.filters.chain import dropped_by
from llmtrain.data.filters.config import EditsConfig, RulesConfig
from llmtrain.data.manifest import Manifest
from llmtrain.data.pipeline import Report, signals_config
from llmtrain.data.pipeline import run as prepare
from llmtrain.data.signals import Tools, joined, measure_batch
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.data.text.words import split_words
from llmtrain.data.tokenize import ENCODERS
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME
from llmtrain.files import read_json

log = logging.getLogger(__name__)

TEXT_BYTES = 40_000_000
RIVAL_BYTES = 1_500_000
"""Text that datatrove's filters and signatures are timed on."""
DEDUP_BYTES = 40_000_000
"""Text of the four stages, for both."""
SCALING_BYTES = 400_000_000
BATCH_BYTES = 4 << 20
REPEATS = 3
UNIT = "MB/s/core"
NOT_OURS = ("train tokenizer", "compile")
PROMISED = {
    "shards": 10.0,
    "end_to_end": 15.0,
    "signals": 100.0,
    "minhash": 100.0,
    "dedup": 50.0,
    "scaling": 1.85,
}
WORKER_MB = 600.0
START_S = 5.0


def run(config: BenchConfig) -> list[Row]:
    config.only_options("rival")
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as name:
        folder = Path(name)
        cap = config.scaled(TEXT_BYTES, least=2_000_000)
        docs = CorpusConfig(
            name="python_docs", format=Format.python_docs, max_text_bytes=cap, draw_seed=config.seed
        )  # fmt: skip
        _prepare(docs, folder / "warm")  # compiles, and fills the page cache
        shutil.rmtree(folder / "warm")
        from_docs = _prepare(docs, folder / "docs")
        texts = [text for text in _texts(folder / "docs") if text]
        plain = _write_jsonl(folder / "texts.jsonl", texts)
        jsonl = CorpusConfig(name="jsonl", format=Format.jsonl, paths=[str(plain)])
        rows = [
            *_signal_rows(texts),
            *_minhash_rows(texts),
            *_end_to_end_rows(jsonl, folder),
            *_scaling_rows(texts, folder, config.scaled(SCALING_BYTES, least=2_000_000)),
            _start_row(folder),
        ]
        if config.option("rival", True):
            rows += _rival_rows(texts, rows, folder, config)
        from_jsonl = _prepare(jsonl, folder / "jsonl")
        packed = folder / "texts.jsonl.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=6))
        return [
            *rows,
            _whole(from_docs, "python_docs"),
            _whole(from_jsonl, "jsonl"),
            *_passes(from_docs, "python_docs"),
            *_passes(from_jsonl, "jsonl"),
            _gzip_row(packed, plain.stat().st_size),
        ]


# Settings and texts.


def all_presets() -> tuple[EditsConfig, RulesConfig]:
    """gopher_quality, gopher_repetition, c4_paper and fineweb_paper together, as one would type them."""
    edits: dict[str, Any] = {}
    rules: dict[str, Any] = {}
    for name in ("fineweb_paper", "gopher_quality", "gopher_repetition", "c4_paper"):
        preset = yaml.safe_load((conf_folder() / "rules" / f"{name}.yaml").read_text(encoding="utf-8"))
        edits |= preset.get("edits", {})
        rules |= preset.get("rules", {})
    return EditsConfig(**edits), RulesConfig(**rules)


def _config(corpus: CorpusConfig, out: Path, **settings: Any) -> DataConfig:
    engine = EngineConfig(kind=EngineKind.inline)
    return DataConfig(corpus=corpus, engine=engine, out=str(out), max_quarantine_share=1.0, **settings)


def _prepare(corpus: CorpusConfig, out: Path, **settings: Any) -> Report:
    ENCODERS.clear()  # a run of its own would find none
    return prepare(_config(corpus, out, **settings), quiet=True)


def _texts(out: Path) -> Iterator[bytes]:
    for path in sorted((out / "docs").rglob("*.arrow")):
        with pa.memory_map(str(path)) as handle:
            yield from pa.ipc.open_file(handle).read_all().column("text").to_pylist()


def _write_jsonl(path: Path, texts: list[bytes]) -> Path:
    with open(path, "wb") as handle:
        for number, text in enumerate(texts):
            document = {"id": str(number), "text": text.decode()}
            handle.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
    return path


def _batches(texts: list[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for text in texts:
        batch.append(text)
        num_bytes += len(text)
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _mb(texts: list[bytes]) -> float:
    return sum(map(len, texts)) / 1e6


def _best(work: Callable[[], object]) -> float:
    """CPU seconds of this process, the least of a few runs."""
    return min(_seconds(work) for _ in range(REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


# Kernels.


def _signal_rows(texts: list[bytes]) -> list[Row]:
    edits, rules = all_presets()
    corpus = CorpusConfig(name="bench", format=Format.python_docs)
    tools = Tools(signals_config(_config(corpus, Path("unused"), edits=edits, rules=rules)))

    def work() -> None:
        for batch in _batches(texts):
            columns = measure_batch(list(batch), [None] * len(batch), tools).columns
            for _ in dropped_by(columns, rules):
                pass

    work()
    return [
        Row(
            name="signals_and_rules: clean, all signals, C4 edits, all rules",
            value=_mb(texts) / _best(work),
            unit=UNIT,
        )
    ]


def _minhash_rows(texts: list[bytes]) -> list[Row]:
    batches = [joined(batch) for batch in _batches(texts)]
    near = NearConfig()

    def work() -> None:
        for text, offsets in batches:
            signatures(split_words(text, offsets), near.num_permutations, near.shingle_words)

    def split() -> None:
        for text, offsets in batches:
            split_words(text, offsets)

    work()
    return [
        Row(name="minhash_signatures: words and 112 permutations", value=_mb(texts) / _best(work), unit=UNIT),
        Row(name="words alone", value=_mb(texts) / _best(split), unit=UNIT),
    ]


# The pipeline.


def _everything(corpus: CorpusConfig, out: Path) -> DataConfig:
    edits, rules = all_presets()
    return _config(
        corpus,
        out,
        edits=edits,
        rules=replace(rules, languages=["en"], min_language_score=0.65),
        content=ContentConfig(
            language=LanguageConfig(enabled=True), pii=PiiConfig(email="<EMAIL>", ip_address="<IP_ADDRESS>")
        ),
        dedup=DedupConfig(near=NearConfig(enabled=True), max_source_removal=None),
        stop_after=StopAfter.documents,
    )


def _end_to_end_rows(jsonl: CorpusConfig, folder: Path) -> list[Row]:
    """JSONL to kept documents as Parquet with every preset, language, private data and near-duplicates on."""
    best: Report | None = None
    for number in range(REPEATS):
        report = prepare(_everything(jsonl, folder / f"all-{number}"), quiet=True)
        if best is None or _cpu(report) < _cpu(best):
            best = report
        shutil.rmtree(folder / f"all-{number}")
    assert best is not None
    text_mb = best.funnel[0]["in"]["bytes"] / 1e6
    parts = [
        Row(name=f"end to end: {name}", value=text_mb / best.cpu_seconds[name], unit=UNIT)
        for name in ("scan", "decide", "write documents")
    ]
    whole = Row(
        name="end_to_end_mb_per_s_core", value=text_mb / _cpu(best), unit=UNIT, limit=PROMISED["end_to_end"]
    )
    return [whole, *parts]


def _cpu(report: Report) -> float:
    return sum(cpu for name, cpu in report.cpu_seconds.items() if name != "compile")


def _scaling_rows(texts: list[bytes], folder: Path, num_bytes: int) -> list[Row]:
    """The scan with one and with two processes, wall time, and the memory of the largest."""
    several = folder / "several"
    several.mkdir()
    copies = max(1, round(num_bytes / sum(map(len, texts))))
    for copy in range(copies):
        _write_jsonl(several / f"{copy}.jsonl", texts)
    corpus = CorpusConfig(name="several", format=Format.jsonl, paths=[str(several)])
    walls: dict[int, float] = {}
    peak = 0
    for _ in range(2):
        for workers in (1, 2):
            cfg = replace(
                _everything(corpus, folder / "scaling"),
                engine=EngineConfig(kind=EngineKind.local, workers=workers, unit_bytes=8 << 20),
                stop_after=StopAfter.decide,
                dedup=DedupConfig(exact=False, near=NearConfig(enabled=True), max_source_removal=None),
            )
            report = prepare(cfg, quiet=True)
            shutil.rmtree(folder / "scaling")
            walls[workers] = min(walls.get(workers, float("inf")), report.seconds["scan"])
            peak = max(peak, report.peak_worker_bytes)
    rows = [Row(name="scan_worker_peak_mb", value=peak / 1e6, unit="MB", limit=WORKER_MB)]
    if len(os.sched_getaffinity(0)) < 2:
        log.warning("scaling_2_workers needs two cores and is left out: this process may use one")
        return rows
    return [
        Row(name="scaling_2_workers", value=walls[1] / walls[2], unit="x", limit=PROMISED["scaling"]),
        Row(
            name="two bare loops at once, against one: what the machine gives",
            value=_bare_scaling(),
            unit="x",
        ),
        *rows,
    ]


_LOOP = """
import time
started, total = time.monotonic(), 0
for number in range(30_000_000):
    total += number
print(time.monotonic() - started)
"""


def _bare_scaling() -> float:
    """How much more two processes get done than one, when nothing but the cores can hold them up."""

    def slowest(count: int) -> float:
        started = [
            subprocess.Popen([sys.executable, "-c", _LOOP], stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        return max(float(process.communicate()[0]) for process in started)

    alone = min(slowest(1) for _ in range(REPEATS))
    return 2 * alone / min(slowest(2) for _ in range(REPEATS))


_START = """
import time
started = time.monotonic()
from llmtrain.bench.data import start
start()
print(time.monotonic() - started)
"""


def start() -> None:
    """Import and load every kernel of a scan, as a first unit does."""
    edits, rules = all_presets()
    cfg = _everything(CorpusConfig(name="bench", format=Format.python_docs), Path("unused"))
    tools = Tools(signals_config(replace(cfg, edits=edits, rules=rules)))
    measure_batch([b"Some text.\nAnd some more.", "caf\u00e9 \u65e5\u672c".encode()], [None, None], tools)


def _start_row(folder: Path) -> Row:
    """A process that finds its kernels compiled on disk; the first run of all compiles them."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "numba")}
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", _START], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    log.info("first use compiles for %.0f s, once on a machine", seconds[0])
    return Row(
        name="start with compiled kernels, imports included", value=seconds[1], unit="s", limit=START_S
    )


# datatrove.


def _rival_rows(texts: list[bytes], rows: list[Row], folder: Path, config: BenchConfig) -> list[Row]:
    if not _datatrove.is_installed():
        log.warning("datatrove is not installed, so its rows are left out; pip install llmtrain[rivals]")
        return []
    ours = {row.name.partition(":")[0]: row.value for row in rows}
    sample = [text.decode() for text in _sample(texts, config.scaled(RIVAL_BYTES, least=200_000))]
    sample_mb = sum(len(text.encode()) for text in sample) / 1e6
    filters = sample_mb / _datatrove.filter_seconds(sample)
    minhash = sample_mb / _datatrove.signature_seconds(sample)
    some = list(_sample(texts, config.scaled(DEDUP_BYTES, least=500_000)))
    ours_s, theirs_s = _dedup_seconds(some, folder)
    return [
        Row(
            name="signals_and_rules; rival: its Gopher, C4 and FineWeb filters",
            value=ours["signals_and_rules"],
            unit=UNIT,
            rival=filters,
        ),
        Row(
            name="minhash; rival: its signatures", value=ours["minhash_signatures"], unit=UNIT, rival=minhash
        ),
        Row(
            name="dedup, JSONL to kept documents, wall",
            value=_mb(some) / ours_s,
            unit="MB/s",
            rival=_mb(some) / theirs_s,
        ),
        Row(
            name="signals_vs_datatrove",
            value=ours["signals_and_rules"] / filters,
            unit="x",
            limit=PROMISED["signals"],
        ),
        Row(
            name="minhash_vs_datatrove",
            value=ours["minhash_signatures"] / minhash,
            unit="x",
            limit=PROMISED["minhash"],
        ),
        Row(name="dedup_vs_datatrove", value=theirs_s / ours_s, unit="x", limit=PROMISED["dedup"]),
    ]


def _sample(texts: list[bytes], num_bytes: int) -> Iterator[bytes]:
    """Every n-th text, so that they come to about `num_bytes`."""
    step = max(1, round(sum(map(len, texts)) / num_bytes))
    yield from texts[::step]


def _dedup_seconds(texts: list[bytes], folder: Path) -> tuple[float, float]:
    """Wall seconds from JSONL to the kept documents, ours and theirs, one process each."""
    source = folder / "dedup-in"
    source.mkdir()
    path = _write_jsonl(source / "texts.jsonl", texts)
    corpus = CorpusConfig(name="dedup", format=Format.jsonl, paths=[str(path)])
    ours = []
    dedup = DedupConfig(
        exact=False, near=NearConfig(enabled=True), max_source_removal=None, write_index=False
    )
    for number in range(REPEATS):
        out = folder / f"dedup-{number}"
        report = _prepare(corpus, out, measure=False, dedup=dedup, stop_after=StopAfter.documents)
        ours.append(sum(seconds for name, seconds in report.seconds.items() if name != "compile"))
    theirs, num_kept = _datatrove.dedup_seconds(path, folder / "dedup-rival")
    kept = sum(file.num_documents for file in report.documents)
    log.info("near-duplicates: of %d documents we keep %d, datatrove %d", len(texts), kept, num_kept)
    return min(ours), theirs


# Shards.


def _manifest(report: Report) -> Manifest:
    assert report.manifest is not None, "the run ended with shards"
    return report.manifest


def _text_mb(report: Report, name: str) -> float:
    """Text that went into the pass, in MB (10^6 bytes)."""
    if name == "train tokenizer":
        facts = read_json(report.out / _manifest(report).tokenizer.path / FACTS_NAME)
        return float(facts["num_sample_bytes"]) / 1e6
    by_pass = {entry["pass"]: entry for entry in report.funnel}
    into = "tokenize" if name == "pack" else name
    return float(by_pass[into]["in"]["bytes"]) / 1e6


def _whole(report: Report, corpus: str) -> Row:
    """Everything from planning to the manifest but training the tokenizer, over the text that was scanned."""
    seconds = sum(cpu for name, cpu in report.cpu_seconds.items() if name not in NOT_OURS)
    name = f"{corpus}: the whole step but training the tokenizer; limit: the promise"
    return Row(name=name, value=_text_mb(report, "scan") / seconds, unit=UNIT, limit=PROMISED["shards"])


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
