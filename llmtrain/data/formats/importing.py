"""`llmtrain data import`: other frameworks' files of tokens as a data folder.

Two passes over the files, a unit each. The first looks at every token: what is wrong is told, of all files,
before anything is written. The second links a file whose documents all go to one split and can stay as they
are, and writes its documents anew otherwise.
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from llmtrain.data.config import TokenizerConfig
from llmtrain.data.engines.engine import Engine, make_engine
from llmtrain.data.flow import check_closes
from llmtrain.data.folder import (
    disk_full_explained,
    key_of,
    locked,
    read_done,
    remove_leftovers,
    write_done,
)
from llmtrain.data.formats.config import ImportConfig, TokenFormat
from llmtrain.data.formats.foreign import SUFFIX, UINT16_VOCAB, companions
from llmtrain.data.formats.look import LookTask, Source, look_at, masks
from llmtrain.data.formats.write import WriteTask, text_of, write_shard
from llmtrain.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    write_manifest,
)
from llmtrain.data.plan_packs import pack_funnel, plan_packs
from llmtrain.data.provenance import tool_version, versions
from llmtrain.data.shards import (
    MAX_UINT16_VOCAB,
    WRITTEN_DTYPES,
    ShardReader,
    token_dtype,
)
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.verdicts import SPLITS
from llmtrain.data.vocabulary import entry_of, take_given
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import atomic_write, hash_json, plain, read_json
from llmtrain.progress import progress

log = logging.getLogger(__name__)

IMPORT_VERSION = 2
"""Part of the folders' keys: raise it when the same files would give other shards."""
SAME_BYTES = {"uint32": "int32"}
"""Types that differ for ids only which no vocabulary has."""

Int64 = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class ImportReport:
    out: Path
    manifest: Manifest
    num_files: int
    num_linked: int
    """Shards whose .bin is the file itself."""
    num_appended: int
    """EOS that documents got."""
    num_empty: int
    """Documents without a token, left out."""


def import_tokens(cfg: ImportConfig, *, quiet: bool = False) -> ImportReport:
    """Make a data folder of the files that `cfg` names.

    Raises:
        ConfigError: paths that name nothing. DataError: files that do not fit together, a token outside the
        vocabulary, documents without EOS, a folder that `llmtrain data` wrote, no space.
    """
    out = Path(cfg.out)
    load_tokenizer(Path(cfg.tokenizer), eos_id=cfg.eos_id)  # what is wrong with it is told first
    held_out = _expand(cfg.held_out, cfg.kind)
    held_out_files = {path.resolve() for path in held_out}
    train = [path for path in _expand(cfg.paths, cfg.kind) if path.resolve() not in held_out_files]
    paths = [*train, *held_out]
    if not train:
        raise ConfigError(f"held_out names every file of paths: nothing is left to train on ({paths})")
    with disk_full_explained(out), locked(out), make_engine(cfg.engine) as engine:
        _refuse_text(out)
        remove_leftovers(out)
        engine.share(out)
        settings = TokenizerConfig(path=cfg.tokenizer, given_eos_id=cfg.eos_id)
        tokenizer = entry_of(out, take_given(settings, out))
        sources = [
            Source(
                path=path.absolute(), kind=cfg.kind, token_type=cfg.token_type,
                is_held_out=number >= len(train), out=out, tokenizer=out / tokenizer.path,
                eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size,
            )
            for number, path in enumerate(paths)
        ]  # fmt: skip
        looks, seen = _look(cfg, out, sources, tokenizer, engine, quiet=quiet)
        written = _write(cfg, out, sources, looks, seen, tokenizer, engine, quiet=quiet)
        shards = [ShardEntry(**summary["shard"]) for summary in written]
        packs = plan_packs(cfg.pack, out, shards)
        held_out_text = _held_out_text(out, tokenizer, [s for s in shards if s.split == "held_out"])
        num_appended = sum(summary["appended"] for summary in written)
        num_empty = sum(look["empty"] for look in seen)
        documents, tokens = (sum(look[name] for look in seen) for name in ("documents", "tokens"))
        funnel = [
            {
                "pass": "import",
                "in": {"documents": documents, "tokens": tokens},
                "kept": {"documents": documents - num_empty, "tokens": tokens},
                "dropped": {"empty": {"documents": num_empty, "tokens": 0}} if num_empty else {},
                "appended_eos": num_appended,
            },
            *(pack_funnel(pack, shards) for pack in packs),
        ]
        for entry in funnel:
            check_closes(entry)
        config = {
            name: value
            for name, value in plain(cfg).items()
            if name not in ("out", "engine", "paths", "held_out", "tokenizer")
        }
        manifest = Manifest(
            format_version=FORMAT_VERSION, corpus=cfg.name,
            dtype=_dtype(seen, tokenizer.vocab_size), tokenizer=tokenizer, shards=shards, packs=packs,
            funnel=funnel, config=config, config_hash=hash_json(config),
            input_hash=hash_json([[source.path.name, look["xxh3_128"]] for source, look in
                                  zip(sources, seen, strict=True)]),
            versions=versions(), held_out_text=held_out_text, tool_version=tool_version(),
        )  # fmt: skip
        write_manifest(out, manifest)
    return ImportReport(
        out=out,
        manifest=manifest,
        num_files=len(sources),
        num_linked=sum(summary["linked"] for summary in written),
        num_appended=num_appended,
        num_empty=num_empty,
    )


def _expand(patterns: Sequence[str], kind: TokenFormat) -> list[Path]:
    """The files of tokens that paths, prefixes and globs name, sorted and each once.

    A file that is named in several ways is one. Its path stays as given, one that has the files that go with
    it beside it: they may lie beside a symbolic link.
    """
    suffix, found = SUFFIX[kind], set()
    for pattern in patterns:
        as_it_stands = [pattern] if pattern.endswith(suffix) else []
        names = [name for name in (*as_it_stands, f"{pattern}{suffix}") if Path(name).is_file()][:1]
        if not names:
            names = [name for name in glob.glob(pattern, recursive=True) if name.endswith(suffix)]
        if not names:
            raise ConfigError(f"{pattern} names no {suffix} file, which kind={kind.name} has its tokens in")
        found |= {Path(name) for name in names}
    by_file: dict[Path, Path] = {}
    for path in sorted(found, key=lambda path: (not companions(path, kind), path)):
        by_file.setdefault(path.resolve(), path)
    return sorted(by_file.values())


def _refuse_text(out: Path) -> None:
    """An import does not replace the manifest of `llmtrain data`."""
    path = out / MANIFEST_NAME
    if not path.is_file():
        return
    try:
        is_import = read_json(path)["funnel"][0]["pass"] == "import"
    except (ValueError, LookupError, TypeError):
        is_import = False
    if not is_import:
        raise DataError(
            f"{path} is not the manifest of an import, which would replace it; give another out=FOLDER, or "
            "delete it"
        )


# Look.


def _look(
    cfg: ImportConfig, out: Path, sources: list[Source], tokenizer: TokenizerEntry, engine: Engine, *,
    quiet: bool,
) -> tuple[list[LookTask], list[dict[str, Any]]]:  # fmt: skip
    files = []
    for source in sources:
        stats = [path.stat() for path in (source.path, *companions(source.path, source.kind))]
        files.append([str(source.path), *([stat.st_size, stat.st_mtime_ns] for stat in stats)])
    key = key_of(
        version=IMPORT_VERSION, files=files, tokenizer=[tokenizer.fingerprint, tokenizer.eos_id],
        token_type=cfg.token_type and cfg.token_type.name, seed=cfg.seed,
    )  # fmt: skip
    tasks = [
        LookTask(source=source, ids=f"verdicts/{key}/ids-{number:05d}.npy", seed=cfg.seed)
        for number, source in enumerate(sources)
    ]
    seen = []
    total = sum(source.path.stat().st_size for source in sources)
    with progress("look", total=total, unit="B", quiet=quiet) as advance:
        for task, look in zip(tasks, engine.map(look_at, tasks), strict=True):
            seen.append(look)
            advance(task.source.path.stat().st_size)
    problems = [problem for look in seen for problem in look["problems"]]
    for source, look in zip(sources, seen, strict=True):
        if look["without_eos"] and not cfg.append_eos:
            problems.append(
                f"{source.path}: {look['without_eos']:,} of {look['documents']:,} documents do not end in "
                f"EOS ({source.eos_id}), the first is document {look['first_without_eos']}; give the right "
                "eos_id, or append_eos=true, which adds it"
            )
    if problems:
        raise DataError("\n       ".join(problems))
    return tasks, seen


# Write.


def _dtype(seen: list[dict[str, Any]], vocab_size: int) -> str:
    """Of all shards: that of the files if they agree on one that Megatron reads, so that they can stay, and
    that holds every id of the vocabulary: EOS may be one that they do not have yet."""
    found = {SAME_BYTES.get(look["dtype"], look["dtype"]) for look in seen}
    one = str(found.pop()) if len(found) == 1 else ""
    if one == "uint16" and vocab_size > UINT16_VOCAB:
        return "int32"
    if one in WRITTEN_DTYPES:
        if one == "uint16" and vocab_size > MAX_UINT16_VOCAB:
            log.warning(
                "the tokens stay uint16, and the vocabulary has %d: GPT-NeoX reads uint16 only up to %d",
                *(vocab_size, MAX_UINT16_VOCAB),
            )
        return one
    return token_dtype(vocab_size)


def _write(
    cfg: ImportConfig, out: Path, sources: list[Source], looks: list[LookTask], seen: list[dict[str, Any]],
    tokenizer: TokenizerEntry, engine: Engine, *, quiet: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    dtype = _dtype(seen, tokenizer.vocab_size)
    whole = any(source.is_held_out for source in sources)
    smallest = min(look["smallest_draw"] for look in seen)
    limit = None if whole else max(int(cfg.held_out_fraction * 2.0**64), smallest)
    folder = "shards/" + key_of(
        version=IMPORT_VERSION, ids=looks[0].ids, limit=limit, dtype=dtype, append_eos=cfg.append_eos,
        content=[[look["xxh3_128"], look["lengths_xxh3_128"]] for look in seen],
        held_out=[source.is_held_out for source in sources], name=cfg.name,
    )  # fmt: skip
    tasks: dict[str, list[WriteTask]] = {split: [] for split in SPLITS}
    for look, seen_there in zip(looks, seen, strict=True):
        held = masks(np.load(out / look.ids), limit, cfg.seed, is_held_out=look.source.is_held_out)
        for split, mask in held.items():
            if mask.any():
                tasks[split].append(
                    WriteTask(
                        look=look,
                        xxh3_128=seen_there["xxh3_128"],
                        lengths_xxh3_128=seen_there["lengths_xxh3_128"],
                        split=split,
                        prefix=f"{folder}/{split}-{len(tasks[split]):05d}",
                        dtype=dtype,
                        limit=limit,
                        can_link=not any(other.any() for name, other in held.items() if name != split)
                        and not seen_there["without_eos"]
                        and SAME_BYTES.get(seen_there["dtype"], seen_there["dtype"]) == dtype,
                        name=cfg.name,
                    )
                )
    listed = [task for split in SPLITS for task in tasks[split]]
    written = []
    total = sum(look["tokens"] for look in seen)
    with progress("import", total=total, unit="tokens", quiet=quiet) as advance:
        for summary in engine.map(write_shard, listed):
            written.append(summary)
            advance(summary["shard"]["num_tokens"])
    return written


def _held_out_text(out: Path, entry: TokenizerEntry, shards: Sequence[ShardEntry]) -> str:
    """Write id and text of every held-out document, for comparisons with gzip and xz."""
    folder = shards[0].path.rpartition("/")[0]
    relative, done = f"{folder}/held_out.jsonl.zst", out / f"{folder}/held_out.json"
    if read_done(done) is not None:
        return relative
    tokenizer = load_tokenizer(out / entry.path)
    with (
        atomic_write(out / relative) as target,
        zstandard.ZstdCompressor(level=3).stream_writer(target, closefd=False) as writer,
    ):
        for shard in shards:
            reader = ShardReader(out / shard.path)
            for number in range(reader.num_documents):
                text = text_of(tokenizer, reader.document(number))
                line = {"id": reader.lineage(number).document_id, "text": text}
                writer.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
    write_done(done, {}, [out / relative])
    return relative
