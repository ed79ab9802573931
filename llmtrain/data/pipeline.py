"""The passes in order: scan, decide, tokenize, pack. `run` reads top to bottom.

Every folder is keyed by the hash of its own settings and of its input, and every finished unit leaves a
file that says so. A run that was killed goes on where it was; a changed setting never meets stale
output. Keys from `verdicts` on depend on the documents, not on how the scan was cut, so work units and
workers leave no trace in the output.
"""

from __future__ import annotations

import errno
import json
import logging
import platform
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from llmtrain.data.config import DataConfig, TokenizerConfig
from llmtrain.data.decide import DECIDE_VERSION, split_order
from llmtrain.data.engines.engine import Engine, make_engine
from llmtrain.data.folder import read_done, remove_leftovers, write_done
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackEntry,
    ShardEntry,
    TokenizerEntry,
    write_manifest,
)
from llmtrain.data.pack import plan_rows, write_pack
from llmtrain.data.scan import SCAN_VERSION, ScanTask, scan_unit
from llmtrain.data.shards import ShardReader, token_dtype
from llmtrain.data.sources import python_docs
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.data.sources.read import plan_units
from llmtrain.data.sources.slices import Plan, Unit
from llmtrain.data.text import kernels
from llmtrain.data.tokenize import TOKENIZE_VERSION, TokenizeTask, texts_of, tokenize_shard
from llmtrain.data.tokenizer import words
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME, MODEL_NAME, Tokenizer
from llmtrain.data.tokenizer.train import KIND, TRAIN_VERSION, train_tokenizer
from llmtrain.data.verdicts import (
    SPLITS,
    Scanned,
    check_closes,
    check_quarantine,
    digests,
    draw,
    load_bad_records,
    load_signals,
    scan_funnel,
    write_verdicts,
)
from llmtrain.errors import DataError, LaunchError
from llmtrain.files import FolderLock, atomic_write, free_bytes, hash_file, hash_json
from llmtrain.progress import progress

log = logging.getLogger(__name__)

KEY_LETTERS = 16
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TEXT_OF_SOURCE = 0.22
"""First guess at text bytes a source byte of Python, measured on the packages of this project's
environment."""
EXACTNESS_PROBE = "a  b\t\n c\uff11\ufb01 "
"""What tokenizers that normalise or trim do not give back: runs of white space, compatibility characters."""
SMALLEST_SHARD_BYTES, LARGEST_SHARD_BYTES, NUM_SHARDS_AIM = 8 << 20, 1 << 30, 64


@dataclass(kw_only=True)
class Report:
    """What a run did, for people."""

    out: Path
    manifest: Manifest
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by pass."""
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """This process's, by pass; workers are not in it."""


def run(cfg: DataConfig, *, quiet: bool = False) -> Report:
    """Turn a corpus into shards, packs and a manifest in `cfg.out`.

    Raises:
        DataError: nothing to read, too many bad records, nothing left, no space, a vocabulary that does
        not fit; `cfg.out` cannot be written. LaunchError: another process is writing the folder.
    """
    out = Path(cfg.out)
    report_times: dict[str, tuple[float, float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        yield
        report_times[name] = (time.monotonic() - wall, time.process_time() - cpu)

    with _disk_full_explained(out), _locked(out):
        remove_leftovers(out)
        engine = make_engine(cfg.engine)
        with timed("compile"):
            _warm_up()
        with timed("scan"):
            scanned = _scan(cfg, out, engine, quiet=quiet)
        with timed("decide"):
            verdicts_folder, decided = _decide(cfg, out, scanned)
        with timed("train tokenizer"):
            tokenizer_entry = _tokenizer(
                cfg.tokenizer, out, scanned.key, verdicts_folder, decided, quiet=quiet
            )
        with timed("tokenize"):
            tokenized = _tokenize(
                cfg, out, engine, scanned.key, verdicts_folder, decided, tokenizer_entry, quiet=quiet
            )
        with timed("pack"):
            packs = _pack(cfg, out, tokenized)
        manifest = _manifest(cfg, decided, tokenizer_entry, tokenized, packs)
        write_manifest(out, manifest)
    return Report(
        out=out,
        manifest=manifest,
        seconds={name: wall for name, (wall, _) in report_times.items()},
        cpu_seconds={name: cpu for name, (_, cpu) in report_times.items()},
    )


# Pass 1.


def _scan(cfg: DataConfig, out: Path, engine: Engine, *, quiet: bool) -> Scanned:
    plan = plan_units(cfg.corpus, cfg.engine.unit_bytes, out=out)
    key = _key(
        version=SCAN_VERSION,
        corpus=cfg.deciding()["corpus"],
        input=plan.fingerprint,
        unit_bytes=cfg.engine.unit_bytes,
        unicode=unicodedata.unidata_version,
    )
    summaries: list[dict[str, Any]] = []
    input_bytes = [sum(piece.num_bytes for piece in unit.slices) for unit in plan.units]
    total, by_text = _expected_bytes(cfg.corpus, sum(input_bytes))
    with progress("scan", total=total, unit="B", quiet=quiet) as advance:
        while len(summaries) < len(plan.units) and (
            wave := _next_wave(cfg.corpus, plan, summaries, input_bytes)
        ):
            tasks = [ScanTask(unit=unit, corpus=cfg.corpus, out=out, key=key) for unit in wave]
            for summary in engine.map(scan_unit, tasks):
                advance(summary["text_bytes"] if by_text else input_bytes[len(summaries)])
                summaries.append(summary)
    return Scanned(key=key, units=plan.units[: len(summaries)], summaries=summaries)


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


# Pass 2.


def _decide(cfg: DataConfig, out: Path, scanned: Scanned) -> tuple[Path, dict[str, Any]]:
    """Write the verdict tables; returns their folder and its summary, with the funnel of passes 1 and 2."""
    deciding = cfg.deciding()
    key = _key(
        version=DECIDE_VERSION, scan=scanned.key, units=len(scanned.units), rules=deciding["rules"],
        held_out=deciding["held_out"],
    )  # fmt: skip
    folder = out / "verdicts" / key
    done = folder / "summary.json"
    quarantine = out / "quarantine" / scanned.key
    summary = read_done(done)
    if summary is None:
        table = load_signals(out, scanned)
        bad = load_bad_records(out, scanned)
        if cfg.corpus.max_text_bytes is not None:
            table, bad = draw(table, bad, cfg.corpus.max_text_bytes)
        funnel = scan_funnel(table, bad)
        check_quarantine(cfg, quarantine, funnel, bad)
        summary = write_verdicts(cfg, folder, table, funnel)
    else:
        check_quarantine(cfg, quarantine, summary["funnel"][0], [])
    return folder, summary


# Pass 3.


def _tokenizer(
    cfg: TokenizerConfig, out: Path, scan_key: str, verdicts: Path, decided: dict[str, Any], *, quiet: bool
) -> TokenizerEntry:
    """Train a tokenizer, or take the one that `cfg.path` names."""
    if cfg.path is not None:
        given = Tokenizer.load(Path(cfg.path))
        relative = f"tokenizer/{given.fingerprint[:KEY_LETTERS]}"
        model = Path(cfg.path) / MODEL_NAME if Path(cfg.path).is_dir() else Path(cfg.path)
        if read_done(out / relative / FACTS_NAME) is None:
            _write_tokenizer(out / relative, model.read_bytes(), {"given": True})
        decoded = given.decode(given.encode(EXACTNESS_PROBE))
        if decoded != EXACTNESS_PROBE:
            log.warning(
                "tokenizer.path=%s does not give back the text that it encodes: %r becomes %r. Bits per byte "
                "count bytes of the text as it was",
                cfg.path,
                EXACTNESS_PROBE,
                decoded,
            )
    else:
        key = _key(
            kind=KIND,
            version=TRAIN_VERSION,
            settings=asdict(cfg),
            documents=decided["documents_digest"],
            library=version("sentencepiece"),
        )
        relative = f"tokenizer/{key}"
        if read_done(out / relative / FACTS_NAME) is None:
            _train_tokenizer(cfg, out, relative, scan_key, verdicts, quiet=quiet)
    tokenizer = Tokenizer.load(out / relative)
    return TokenizerEntry(
        path=relative,
        kind=KIND,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
    )


def _train_tokenizer(
    cfg: TokenizerConfig, out: Path, relative: str, scan_key: str, verdicts: Path, *, quiet: bool
) -> None:
    with pa.memory_map(str(verdicts / "train.arrow")) as handle:
        table = pa.ipc.open_file(handle).read_all()
        order = np.argsort(split_order(digests(table, "content"), cfg.seed, "tokenizer"), kind="stable")
        text_bytes = table.column("text_bytes").to_numpy()[order]
        reached = int(np.searchsorted(np.cumsum(text_bytes), cfg.sample_bytes))
        num_drawn = min(reached + 1, len(order))
        sample = table.take(pa.array(np.sort(order[:num_drawn])))
        num_sample_bytes = int(text_bytes[:num_drawn].sum())
        with progress("tokenizer", total=num_sample_bytes, unit="B", quiet=quiet) as advance:
            model = train_tokenizer(_texts(sample, out, scan_key, advance), cfg)
    facts = {"given": False, "num_sample_documents": num_drawn, "num_sample_bytes": num_sample_bytes}
    _write_tokenizer(out / relative, model, facts)


def _texts(sample: pa.Table, out: Path, scan_key: str, advance: Callable[[float], None]) -> Iterator[str]:
    for text, offsets in texts_of(sample, out, scan_key):
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):  # noqa: RUF007
            advance(int(end - start))
            yield text[start:end].tobytes().decode()


def _write_tokenizer(folder: Path, model: bytes, facts: dict[str, Any]) -> None:
    (folder / FACTS_NAME).unlink(missing_ok=True)  # of a model that was lost
    with atomic_write(folder / MODEL_NAME) as handle:
        handle.write(model)
    tokenizer = Tokenizer.load(folder)
    facts |= {
        "kind": KIND,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": hash_file(folder / MODEL_NAME),
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
    }
    write_done(folder / FACTS_NAME, facts, [folder / MODEL_NAME])


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    folder: str
    """Relative to the data folder."""
    shards: list[ShardEntry]
    held_out_text: str
    num_checked: int
    num_differing: int


def _tokenize(
    cfg: DataConfig, out: Path, engine: Engine, scan_key: str, verdicts: Path, decided: dict[str, Any],
    tokenizer: TokenizerEntry, *, quiet: bool,
) -> Tokenized:  # fmt: skip
    total = sum(decided["text_bytes"].values())
    key = _key(
        version=TOKENIZE_VERSION, documents=decided["documents_digest"], tokenizer=tokenizer.fingerprint,
        shards=asdict(cfg.shards),
    )  # fmt: skip
    folder = f"shards/{key}"
    shard_bytes = cfg.shards.text_bytes or min(
        max(total // NUM_SHARDS_AIM, SMALLEST_SHARD_BYTES), LARGEST_SHARD_BYTES
    )
    tasks = [
        task
        for split in SPLITS
        for task in _shard_tasks(out, folder, split, scan_key, verdicts, tokenizer, shard_bytes)
    ]
    summaries = []
    with progress("tokenize", total=total, unit="B", quiet=quiet) as advance:
        for summary in engine.map(tokenize_shard, tasks):
            advance(summary["shard"]["text_bytes"])
            summaries.append(summary)
    held_out_text = f"{folder}/held_out.jsonl.zst"
    if not (out / held_out_text).is_file():
        _write_held_out_text(out, held_out_text, scan_key, verdicts)
    return Tokenized(
        folder=folder,
        shards=[ShardEntry(**summary["shard"]) for summary in summaries],
        held_out_text=held_out_text,
        num_checked=sum(summary["checked"] for summary in summaries),
        num_differing=sum(summary["differing"] for summary in summaries),
    )


def _shard_tasks(
    out: Path,
    folder: str,
    split: str,
    scan_key: str,
    verdicts: Path,
    tokenizer: TokenizerEntry,
    shard_bytes: int,
) -> list[TokenizeTask]:
    """Cut a split where its text passes a multiple of `shard_bytes`: a function of the documents alone."""
    path = verdicts / f"{split}.arrow"
    with pa.memory_map(str(path)) as handle:
        text_bytes = pa.ipc.open_file(handle).read_all().column("text_bytes").to_numpy()
    shard_of = (np.cumsum(text_bytes) - text_bytes) // shard_bytes
    starts = np.flatnonzero(np.diff(shard_of, prepend=-1))
    return [
        TokenizeTask(
            out=out,
            prefix=f"{folder}/{split}-{number:05d}",
            split=split,
            scan_key=scan_key,
            verdicts=path,
            first=int(first),
            last=int(last),
            tokenizer=out / tokenizer.path,
        )
        for number, (first, last) in enumerate(
            zip(starts, np.append(starts[1:], len(text_bytes)), strict=True)
        )
    ]


def _write_held_out_text(out: Path, relative: str, scan_key: str, verdicts: Path) -> None:
    """Write id and normalised text of every held-out document, for comparisons with gzip and xz."""
    with pa.memory_map(str(verdicts / "held_out.arrow")) as handle:
        table = pa.ipc.open_file(handle).read_all()
        ids = iter(table.column("id").to_pylist())
        with (
            atomic_write(out / relative) as target,
            zstandard.ZstdCompressor(level=3).stream_writer(target, closefd=False) as writer,
        ):
            for text in _texts(table, out, scan_key, lambda _: None):
                line = json.dumps({"id": next(ids).hex(), "text": text}, ensure_ascii=False)
                writer.write(f"{line}\n".encode())


# Pass 4.


def _pack(cfg: DataConfig, out: Path, tokenized: Tokenized) -> list[PackEntry]:
    key = _key(shards=[[shard.sha256, shard.idx_sha256] for shard in tokenized.shards])
    entries = []
    for seq_len in sorted(cfg.pack.seq_lens):
        folder = f"packs/{key}/seq{seq_len}"
        done = out / folder / "packs.json"
        finished = read_done(done)
        if finished is None:
            finished = {"packs": []}
            for split in SPLITS:
                shards = [shard for shard in tokenized.shards if shard.split == split]
                num_tokens = sum(shard.num_tokens for shard in shards)
                if split == "train" and num_tokens < seq_len:
                    raise DataError(
                        f"the training split holds {num_tokens:,} tokens, less than one row of "
                        f"pack.seq_lens={seq_len}; give more text, or lower pack.seq_lens"
                    )
                pack = plan_rows([ShardReader(out / shard.path).doc_lengths for shard in shards], seq_len)
                finished["packs"].append(asdict(write_pack(out, folder, split, seq_len, pack)))
            write_done(done, finished, sorted((out / folder).glob("*.npy")))
        entries += [PackEntry(**entry) for entry in finished["packs"]]
    return entries


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
    funnel = [*decided["funnel"], tokenize_funnel, *(_pack_funnel(pack, shards) for pack in packs)]
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
        versions=_versions(),
        held_out_text=tokenized.held_out_text,
        tool_version=_tool_version(),
    )


def _pack_funnel(pack: PackEntry, shards: list[ShardEntry]) -> dict[str, Any]:
    """Tokens that come in are targets, or the first of their document, which nothing predicts."""
    own = [shard for shard in shards if shard.split == pack.split]
    num_tokens, num_documents = sum(s.num_tokens for s in own), sum(s.num_documents for s in own)
    return {
        "pass": f"pack {pack.split} seq_len={pack.seq_len}",
        "in": {"tokens": num_tokens},
        "kept": {"tokens": pack.num_target_tokens},
        "dropped": {"first_of_document": {"tokens": num_documents}},
    }


def _key(**parts: Any) -> str:
    return hash_json(parts)[:KEY_LETTERS]


def _warm_up() -> None:
    """Compile the kernels, or load them, before workers start."""
    kernels.warm_up()
    python_docs.extract([b'"""a"""\n# b\n'])
    words.warm_up()


def _versions() -> dict[str, str]:
    names = ("numba", "numpy", "pyarrow", "sentencepiece", "xxhash", "zstandard")
    return {"python": platform.python_version(), "unicode": unicodedata.unidata_version} | {
        name: version(name) for name in names
    }


def _tool_version() -> str:
    try:
        return version("llmtrain")
    except PackageNotFoundError:
        return "source tree"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FolderLock(out)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, LaunchError) or error.errno in DISK_FULL:
            raise
        raise DataError(f"out={out} cannot be written: {error.strerror}; give another out=FOLDER") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_full_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        raise DataError(
            f"no space left for {out}: {written:,} bytes written, {free_bytes(out):,} bytes free on its "
            "file system. Free some, or give another out=FOLDER; the same command then goes on where it was"
        ) from error
