"""The passes in order: scan, decide, then documents, or tokenize and pack. `run` reads top to bottom.

Every folder is keyed by the hash of its own settings and of its input, and every finished unit leaves a
file that says so. A run that was killed goes on where it was; a changed setting never meets stale
output. Keys after `verdicts` depend on the documents, not on how the scan was cut, so work units and
workers leave no trace in the output.
"""

from __future__ import annotations

import json
import logging
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from llmtrain.data.config import DataConfig, StopAfter
from llmtrain.data.content.config import ContentConfig, check_codes
from llmtrain.data.decide import check_previous, decide
from llmtrain.data.dedup.config import Survivor
from llmtrain.data.document import BAD_REASONS, SKIP_REASONS
from llmtrain.data.engines.engine import Engine, make_engine
from llmtrain.data.export import EXPORT_VERSION, DocumentsFile, ExportTask, export_documents
from llmtrain.data.facts import FACTS_NAME, put_totals, write_facts
from llmtrain.data.filters.chain import RULES
from llmtrain.data.flow import check_closes
from llmtrain.data.folder import (
    disk_full_explained,
    key_of,
    locked,
    read_done,
    remove_leftovers,
    write_done,
)
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackEntry,
    ShardEntry,
    TokenizerEntry,
    write_manifest,
)
from llmtrain.data.plan_packs import pack_funnel, plan_packs
from llmtrain.data.provenance import tool_version, versions
from llmtrain.data.scan import SCAN_VERSION, ScanTask, scan_unit
from llmtrain.data.shards import token_dtype
from llmtrain.data.signals import SignalsConfig, available, tools_for, warm_up
from llmtrain.data.sources import markup, python_docs
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.sources.read import plan_units
from llmtrain.data.sources.slices import Plan, Unit, file_digests
from llmtrain.data.tokenize import TOKENIZE_VERSION, TokenizeTask, tokenize_shard
from llmtrain.data.tokenizer import words
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.verdicts import SPLITS, Scanned, Verdicts, cut_at
from llmtrain.data.vocabulary import choose_tokenizer
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import (
    atomic_write,
    hash_file,
    hash_json,
    plain,
    read_json,
    write_json,
)
from llmtrain.progress import progress

log = logging.getLogger(__name__)

TEXT_OF_SOURCE = 0.22
"""First guess at text bytes a source byte of Python, measured on the packages of this project's
environment."""
SMALLEST_SHARD_BYTES, LARGEST_SHARD_BYTES, NUM_SHARDS_AIM = 8 << 20, 1 << 30, 64
DOCUMENTS_NAME = "documents.json"
INPUT_NAME = "input.json"


@dataclass(kw_only=True)
class Report:
    """What a run did, for people."""

    out: Path
    funnel: list[dict[str, Any]]
    manifest: Manifest | None = None
    """None: the run stopped before there were shards."""
    documents: list[DocumentsFile] = field(default_factory=list)
    """Parquet files of kept documents, where the run ended with them."""
    tokens: dict[str, int] = field(default_factory=dict)
    """By source, of all splits."""
    fertility: list[dict[str, Any]] = field(default_factory=list)
    """Documents, bytes, tokens and fallback tokens by source and language, of all splits."""
    peak_worker_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by pass."""
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """This process's, by pass; workers are not in it."""


def run(cfg: DataConfig, *, quiet: bool = False) -> Report:
    """Turn a corpus into shards, packs and a manifest in `cfg.out`; or, as `cfg.stop_after` says, into
    documents or verdicts only.

    Raises:
        DataError: nothing to read, too many bad records, nothing left, no space, a vocabulary that does
        not fit; `cfg.out` cannot be written. LaunchError: another process is writing the folder.
    """
    check(cfg)
    signals = replace(signals_config(cfg), files=_content_files(cfg.content, cfg.edits.bad_words_file))
    identifier = tools_for(signals).identifier
    if cfg.rules.languages is not None and identifier is not None:
        check_codes(cfg.rules.languages, identifier.codes, "rules.languages")
    out = Path(cfg.out)
    times: dict[str, tuple[float, float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        yield
        times[name] = (time.monotonic() - wall, time.process_time() - cpu)

    with disk_full_explained(out), locked(out), make_engine(cfg.engine) as engine:
        remove_leftovers(out)
        engine.share(out)
        with timed("compile"):
            _warm_up(cfg, signals)
        with timed("scan"):
            scanned = _scan(cfg, out, signals, engine, quiet=quiet)
        with timed("decide"):
            verdicts, decided = decide(cfg, out, scanned, engine, quiet=quiet)
        report = Report(out=out, funnel=decided["funnel"])
        if cfg.stop_after is StopAfter.documents:
            with timed("write documents"):
                report.documents = _export(cfg, engine, verdicts, decided, quiet=quiet)
        if cfg.stop_after is StopAfter.pack:
            with timed("train tokenizer"):
                tokenizer = choose_tokenizer(cfg.tokenizer, verdicts, decided, quiet=quiet)
            with timed("tokenize"):
                tokenized = _tokenize(cfg, engine, verdicts, decided, tokenizer, quiet=quiet)
            with timed("pack"):
                packs = plan_packs(cfg.pack, out, tokenized.shards)
            report.manifest = _manifest(cfg, decided, tokenizer, tokenized, packs)
            report.funnel = report.manifest.funnel
            report.tokens, report.fertility = tokenized.tokens, tokenized.fertility
            write_manifest(out, report.manifest)
        report.peak_worker_bytes = engine.peak_worker_bytes()
        report.seconds = {name: wall for name, (wall, _) in times.items()}
        report.cpu_seconds = {name: cpu for name, (_, cpu) in times.items()}
        _write_facts(cfg, report, verdicts)
    return report


NEEDED = {
    "language": "content.language.enabled=true",
    "language_score": "content.language.enabled=true",
    "quality": "content.quality.model=FILE",
    "url_blocked": "content.urls.block=[FILE]",
    "num_contaminated_ngrams": "content.decontamination.sets=[...]",
}
"""What gives a signal, where it is not `measure`."""


def check(cfg: DataConfig) -> None:
    """Refuse, before any work, rules whose signals nobody measures, and indexes of earlier runs that do not
    compare.

    Raises:
        ConfigError: names the rule and the setting that it needs. DataError: an index of dedup.previous that
        is not there, or does not compare.
    """
    known = available(signals_config(cfg))
    for rule in RULES:
        bound = getattr(cfg.rules, rule.setting)
        for name in rule.signals:
            if bound is not None and name not in known:
                raise ConfigError(
                    f"rules.{rule.setting}={bound} needs the signal {name}: set "
                    f"{NEEDED.get(name, 'measure=true')}, or rules.{rule.setting}=null"
                )
    if cfg.dedup.survivor is Survivor.quality and "quality" not in known:
        raise ConfigError(
            "dedup.survivor=quality needs the signal quality: set content.quality.model=FILE, or another "
            "survivor"
        )
    if Path(cfg.out).resolve() in (Path(name).resolve() for name in cfg.dedup.previous):
        raise ConfigError(
            f"dedup.previous names out={cfg.out} itself, so every document would be a copy of its own; give "
            "another out=FOLDER, and name the folders of earlier runs"
        )
    check_previous(cfg.dedup)
    if cfg.stop_after is StopAfter.pack and cfg.tokenizer.path is not None:
        load_tokenizer(Path(cfg.tokenizer.path), eos_id=cfg.tokenizer.given_eos_id)


def _write_facts(cfg: DataConfig, report: Report, verdicts: Verdicts) -> None:
    """Write `facts.json`: what `llmtrain report` draws. Not part of the output: it holds times."""
    facts: dict[str, Any] = read_json(verdicts.folder / FACTS_NAME)
    text_bytes = {entry["pass"]: entry["in"]["bytes"] for entry in report.funnel if "bytes" in entry["in"]}
    text_bytes["write documents"] = report.funnel[1]["kept"]["bytes"]
    facts["stages"] = [
        {"name": name, "seconds": seconds, "bytes": text_bytes.get(name)}
        for name, seconds in report.seconds.items()
    ]
    facts["funnel"] = report.funnel
    facts |= {"stop_after": cfg.stop_after.name, "config": cfg.deciding(), "versions": versions()}
    reasons = {**BAD_REASONS, **SKIP_REASONS}
    if bad := {name: drop for name, drop in report.funnel[0]["dropped"].items() if name in reasons}:
        facts["quarantine"] = bad
    put_totals(facts.get("sources", []), "tokens", report.tokens)
    if report.fertility:
        facts["fertility"] = report.fertility
    write_facts(report.out, facts)


# Pass 1.


def _scan(
    cfg: DataConfig, out: Path, signals: SignalsConfig, engine: Engine, *, quiet: bool
) -> Scanned:  # fmt: skip
    plan = plan_units(cfg.corpus, cfg.engine.unit_bytes, out=out)
    key = key_of(
        version=SCAN_VERSION,
        corpus=plain(cfg.corpus),
        input=plan.fingerprint,
        unit_bytes=cfg.engine.unit_bytes,
        unicode=unicodedata.unidata_version,
        signals=plain(signals),
    )
    summaries: list[dict[str, Any]] = []
    input_bytes = [sum(piece.num_bytes for piece in unit.slices) for unit in plan.units]
    total, by_text = _expected_bytes(cfg.corpus, sum(input_bytes))
    with progress("scan", total=total, unit="B", quiet=quiet) as advance:
        while len(summaries) < len(plan.units) and (
            wave := _next_wave(cfg.corpus, plan, summaries, input_bytes)
        ):
            tasks = [
                ScanTask(unit=unit, corpus=cfg.corpus, signals=signals, out=out, key=key) for unit in wave
            ]
            for summary in engine.map(scan_unit, tasks):
                advance(summary["text_bytes"] if by_text else input_bytes[len(summaries)])
                summaries.append(summary)
    scanned = Scanned(key=key, units=plan.units[: len(summaries)], summaries=summaries)
    if cfg.corpus.max_text_bytes is not None:
        scanned = cut_at(scanned, out, cfg.corpus.max_text_bytes)
    return replace(scanned, input_hash=_write_input(out, plan, scanned))


def signals_config(cfg: DataConfig) -> SignalsConfig:
    """What of the settings decides the text and the signals of a document."""
    near = cfg.dedup.near
    return SignalsConfig(
        edits=cfg.edits,
        measure=cfg.measure,
        content=cfg.content,
        num_permutations=near.num_permutations if near.enabled else 0,
        shingle_words=near.shingle_words,
        lines=replace(cfg.dedup.lines, max_removed_share=None),  # a bound, which decide applies
        ngrams=replace(cfg.dedup.ngrams, max_share=0.0),  # the same
    )


def _content_files(content: ContentConfig, bad_words: str | None) -> dict[str, str]:
    """Hashes of the models and lists that the settings name: they decide documents and signals."""
    named = [
        content.language.model,
        content.quality.model,
        bad_words,
        *content.urls.block,
        *content.urls.words,
    ]
    named += [*content.urls.substrings, *(one.path for one in content.decontamination.sets)]
    named += [
        one.dataset for one in content.decontamination.sets if one.dataset and Path(one.dataset).exists()
    ]
    found: dict[str, str] = {}
    for name in filter(None, named):
        path = Path(name)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        try:
            found |= {str(file): hash_file(file) for file in files}
        except OSError as error:
            raise DataError(
                f"{name}, which the settings of content or edits name, cannot be read: {error}"
            ) from error
    return found


def _write_input(out: Path, plan: Plan, scanned: Scanned) -> str:
    """List the files that were read, with their sizes and hashes. Returns the hash of the list.

    A data set of the `datasets` library is named by its own fingerprint.
    """
    digests = file_digests(scanned.units, (summary["digests"] for summary in scanned.summaries))
    sizes = {entry[0]: entry[1] for entry in plan.fingerprint if isinstance(entry, list)}
    last = (len(scanned.units) - 1, scanned.last_slice) if scanned.last else (len(scanned.units), 0)
    names = {
        piece.name
        for unit in scanned.units
        for place, piece in enumerate(unit.slices)
        if (unit.number, place) <= last
    }
    files = [
        {"name": name, "bytes": sizes.get(name), "xxh3_128": digests[name]}
        for name in sorted(names & digests.keys())
    ]
    listing = {"files": files} if files else {"fingerprint": plan.fingerprint}
    rows = (json.dumps(row, sort_keys=True, ensure_ascii=False) for row in next(iter(listing.values())))
    with atomic_write(out / INPUT_NAME, "w") as handle:
        handle.write(f'{{"{next(iter(listing))}": [\n' + ",\n".join(rows) + "\n]}\n")
    return hash_json(listing)


def _expected_bytes(corpus: CorpusConfig, input_bytes: int) -> tuple[float, bool]:
    """What the scan's progress counts up to, and whether that is text (a corpus with a cap) or input."""
    if corpus.max_text_bytes is None:
        return input_bytes, False
    return min(corpus.max_text_bytes, TEXT_OF_SOURCE * input_bytes), True


def _next_wave(
    corpus: CorpusConfig, plan: Plan, summaries: list[dict[str, Any]], input_bytes: list[int]
) -> list[Unit]:
    """Units to scan next: all, or as many as should fill up the cap. Units are in the order of the draw."""
    done = len(summaries)
    if corpus.max_text_bytes is None:
        return plan.units[done:]
    text_bytes = sum(summary["text_bytes"] for summary in summaries)
    wanted = corpus.max_text_bytes - text_bytes
    if wanted <= 0:
        return []
    share = text_bytes / max(1, sum(input_bytes[:done])) if text_bytes else TEXT_OF_SOURCE
    ahead = np.cumsum(input_bytes[done:])
    return plan.units[done : done + int(np.searchsorted(ahead, wanted / share)) + 1]


# Pass 3, either way.


def _export(
    cfg: DataConfig, engine: Engine, verdicts: Verdicts, decided: dict[str, Any], *, quiet: bool
) -> list[DocumentsFile]:
    """Write the kept documents as Parquet, and last `documents.json`, which lists them."""
    key = key_of(version=EXPORT_VERSION, documents=decided["documents_digest"], settings=plain(cfg.documents))
    tasks = [
        ExportTask(verdicts=verdicts, zstd_level=cfg.documents.zstd_level,
        path=f"documents/{key}/{split}-{number:05d}.parquet", split=split,
                   first=first, last=last)
        for split in SPLITS
        for number, (first, last) in enumerate(verdicts.runs(split, cfg.documents.file_bytes))
    ]  # fmt: skip
    files = []
    with progress("documents", total=sum(decided["text_bytes"].values()), unit="B", quiet=quiet) as advance:
        for summary in engine.map(export_documents, tasks):
            files.append(DocumentsFile(**summary["file"]))
            advance(files[-1].text_bytes)
    listing = {
        "files": [asdict(file) for file in files],
        "funnel": _totals_only(decided["funnel"]),
        "config": cfg.deciding(),
        "input_hash": decided["input_hash"],
        "versions": versions(),
    }
    write_json(verdicts.out / DOCUMENTS_NAME, listing)
    return files


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    folder: str
    """Relative to the data folder."""
    shards: list[ShardEntry]
    held_out_text: str
    num_checked: int
    num_differing: int
    fertility: list[dict[str, Any]]
    """Documents, bytes, tokens and fallback tokens by source and language."""

    @property
    def tokens(self) -> dict[str, int]:
        """By source."""
        total: Counter[str] = Counter()
        for row in self.fertility:
            total[row["source"]] += row["num_tokens"]
        return dict(sorted(total.items()))


def _tokenize(
    cfg: DataConfig, engine: Engine, verdicts: Verdicts, decided: dict[str, Any], tokenizer: TokenizerEntry,
    *, quiet: bool,
) -> Tokenized:  # fmt: skip
    total = sum(decided["text_bytes"].values())
    key = key_of(
        version=TOKENIZE_VERSION, documents=decided["documents_digest"], tokenizer=tokenizer.fingerprint,
        shards=asdict(cfg.shards), language=plain(cfg.content.language),
    )  # fmt: skip
    folder = f"shards/{key}"
    shard_bytes = cfg.shards.text_bytes or min(
        max(total // NUM_SHARDS_AIM, SMALLEST_SHARD_BYTES), LARGEST_SHARD_BYTES
    )
    tasks = [
        TokenizeTask(
            verdicts=verdicts,
            prefix=f"{folder}/{split}-{number:05d}",
            split=split,
            first=first,
            last=last,
            tokenizer=verdicts.out / tokenizer.path,
        )
        for split in SPLITS
        for number, (first, last) in enumerate(verdicts.runs(split, shard_bytes))
    ]
    summaries = []
    with progress("tokenize", total=total, unit="B", quiet=quiet) as advance:
        for summary in engine.map(tokenize_shard, tasks):
            advance(summary["shard"]["text_bytes"])
            summaries.append(summary)
    held_out_text = f"{folder}/held_out.jsonl.zst"
    done = verdicts.out / f"{folder}/held_out.json"
    if read_done(done) is None:
        _write_held_out_text(verdicts, verdicts.out / held_out_text, decided["num_documents"]["held_out"])
        write_done(done, {}, [verdicts.out / held_out_text])
    return Tokenized(
        folder=folder,
        shards=[ShardEntry(**summary["shard"]) for summary in summaries],
        held_out_text=held_out_text,
        num_checked=sum(summary["checked"] for summary in summaries),
        num_differing=sum(summary["differing"] for summary in summaries),
        fertility=_sum_fertility(summary["fertility"] for summary in summaries),
    )


def _sum_fertility(shards: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Sums of all shards by source and language."""
    total: dict[tuple[str, str | None], Counter[str]] = {}
    for row in chain.from_iterable(shards):
        counts = {name: value for name, value in row.items() if name not in ("source", "language")}
        total.setdefault((row["source"], row["language"]), Counter()).update(counts)
    order = sorted(total, key=lambda key: (key[0], key[1] or ""))
    return [{"source": source, "language": language, **total[source, language]} for source, language in order]


def _write_held_out_text(verdicts: Verdicts, path: Path, num_documents: int) -> None:
    """Write id and text of every held-out document, for comparisons with gzip and xz."""
    rows = verdicts.rows("held_out", 0, num_documents)
    with (
        atomic_write(path) as target,
        zstandard.ZstdCompressor(level=3).stream_writer(target, closefd=False) as writer,
    ):
        for part, (text, offsets), _ in verdicts.documents(rows):
            for digest, (start, end) in zip(part.column("id").to_pylist(), pairwise(offsets), strict=True):
                document = {"id": digest.hex(), "text": text[start:end].tobytes().decode()}
                writer.write(f"{json.dumps(document, ensure_ascii=False)}\n".encode())


# Pass 4.


def _manifest(
    cfg: DataConfig,
    decided: dict[str, Any],
    tokenizer: TokenizerEntry,
    tokenized: Tokenized,
    packs: list[PackEntry],
) -> Manifest:
    config = cfg.deciding()
    shards = tokenized.shards
    counts = {"documents": sum(s.num_documents for s in shards), "bytes": sum(s.text_bytes for s in shards)}
    num_tokens = sum(shard.num_tokens for shard in shards)
    tokenize_funnel = {
        "pass": "tokenize",
        "in": {name: decided["funnel"][-1]["kept"][name] for name in ("documents", "bytes")},
        "kept": {**counts, "tokens": num_tokens},
        "dropped": {},
        "checked_documents": tokenized.num_checked,
        "differing_documents": tokenized.num_differing,
    }
    funnel = [
        *_totals_only(decided["funnel"]),
        tokenize_funnel,
        *(pack_funnel(pack, shards) for pack in packs),
    ]
    for entry in funnel:
        check_closes(entry)
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=cfg.corpus.name,
        dtype=token_dtype(tokenizer.vocab_size),
        tokenizer=tokenizer,
        shards=shards,
        packs=packs,
        funnel=funnel,
        config=config,
        config_hash=hash_json(config),
        input_hash=decided["input_hash"],
        versions=versions(),
        held_out_text=tokenized.held_out_text,
        tool_version=tool_version(),
    )


def _totals_only(funnel: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the sums by source: those are in the folder of the verdicts."""
    return [{name: value for name, value in entry.items() if name != "sources"} for entry in funnel]


def _warm_up(cfg: DataConfig, signals: SignalsConfig) -> None:
    """Compile the kernels, or load them, before workers start."""
    warm_up(signals)
    if cfg.corpus.format is Format.warc:
        markup.extraction_work(b"<p>")
    python_docs.extract([b'"""a"""\n# b\n'])
    words.warm_up()
