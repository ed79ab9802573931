"""What the shards of a data folder hold, and whether every byte of them is what it should be.

Nothing is mended. A damaged shard can be put away, and the command that made the folder, `llmtrain data` or
`llmtrain data import`, with the same settings writes it anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data.folder import locked
from llmtrain.data.manifest import (
    Manifest,
    ShardEntry,
    lineage_file,
    pack_problems,
    read_manifest,
    shard_files,
    shard_problems,
    sums_file,
)
from llmtrain.data.shards import ShardIndex, ShardReader
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.trace import OutputFormat, shard_named
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import write_json
from llmtrain.progress import progress

QUARANTINE = "quarantine/shards"
BLOCK_TOKENS = 1 << 22


@dataclass(kw_only=True)
class InspectConfig:
    """Which shards to look at."""

    folder: str | None = None
    """The data folder."""
    prefix: str | None = None
    """In place of `folder`: path of a .bin and .idx without the suffix, as Megatron-LM's tools take it."""
    shard: str | None = None
    """A shard's number in its split, its name (`train-00003`) or its path; null: all."""
    split: str = "train"
    """Only beside a number in `shard`."""
    content: bool = True
    """Whether every byte is read; else only that files are there in their sizes."""
    quarantine: bool = False
    """Whether damaged shards are moved to `quarantine/shards` of the folder, with what was wrong."""
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.prefix is None):
            raise ConfigError(
                f"give folder or prefix, one of them: folder={self.folder}, prefix={self.prefix}"
            )
        if self.prefix is not None and (self.shard is not None or self.quarantine):
            raise ConfigError(
                f"prefix={self.prefix} is one shard and no data folder; leave shard and quarantine out"
            )


@dataclass(kw_only=True)
class ShardFindings:
    """One shard."""

    path: str
    split: str
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    max_id: int | None = None
    num_eos: int | None = None
    """None: not known without a tokenizer."""
    sources: dict[str, int] = field(default_factory=dict)
    """Documents by source."""
    problems: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Inspection:
    shards: list[ShardFindings]
    problems: list[str] = field(default_factory=list)
    """Of the folder as a whole: tokenizer, packs."""
    quarantined: list[str] = field(default_factory=list)
    made_by: str | None = None
    """The command that made the folder."""

    @property
    def num_problems(self) -> int:
        return len(self.problems) + sum(len(shard.problems) for shard in self.shards)


def inspect_shards(cfg: InspectConfig) -> Inspection:
    """Look at the shards that `cfg` names.

    Raises:
        DataError: no such folder, shard or prefix. LaunchError: files are to be moved, and somebody writes
        the folder.
    """
    if cfg.prefix is not None:
        return Inspection(shards=[_bare(Path(cfg.prefix), content=cfg.content)])
    folder = Path(str(cfg.folder))
    manifest = read_manifest(folder)
    with locked(folder) if cfg.quarantine else nullcontext():
        return _folder(cfg, folder, manifest)


def as_json(found: Inspection) -> dict[str, Any]:
    return asdict(found)


def _folder(cfg: InspectConfig, folder: Path, manifest: Manifest) -> Inspection:
    entries = list(manifest.shards) if cfg.shard is None else [shard_named(manifest, cfg.shard, cfg.split)]
    is_import = bool(manifest.funnel) and manifest.funnel[0]["pass"] == "import"
    found = Inspection(shards=[], made_by="llmtrain data import" if is_import else "llmtrain data")
    total = sum(entry.num_bytes for entry in entries)
    quiet = cfg.format is OutputFormat.json
    with progress("inspect", total=total, unit="B", quiet=quiet) as advance:
        for entry in entries:
            found.shards.append(_shard(folder, manifest, entry, content=cfg.content))
            advance(entry.num_bytes)
    if cfg.shard is None:
        found.problems += _whole(folder, manifest, content=cfg.content)
    if cfg.quarantine:
        for shard in found.shards:
            if shard.problems:
                found.quarantined.append(_put_away(folder, shard))
    return found


def _shard(folder: Path, manifest: Manifest, entry: ShardEntry, *, content: bool) -> ShardFindings:
    shard = ShardFindings(
        path=entry.path,
        split=entry.split,
        dtype=manifest.dtype,
        num_documents=entry.num_documents,
        num_tokens=entry.num_tokens,
        num_bytes=entry.num_bytes,
        max_id=entry.max_id,
        num_eos=entry.num_eos,
        problems=list(shard_problems(folder, entry, content=content)),
    )
    if content and not shard.problems:  # what hashes cannot tell: whether the right things were written
        shard.problems += _inside(folder / entry.path, manifest, entry)
        path = lineage_file(folder / entry.path)
        try:
            sources = pq.read_table(path, columns=["source"]).column("source").to_pylist()
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            shard.problems.append(f"{path} cannot be read: {str(error).partition(chr(10))[0]}")
            return shard
        if len(sources) != entry.num_documents:
            shard.problems.append(
                f"{path} tells of {len(sources):,} documents, the shard has {entry.num_documents:,}"
            )
        shard.sources = dict(Counter(sources).most_common())
    return shard


def _inside(prefix: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """Whether the documents are where the index has them, end in EOS, and are in the vocabulary."""
    bin_path, idx_path = shard_files(prefix)
    try:
        reader = ShardReader(prefix)
    except DataError as error:
        yield str(error)
        return
    yield from _index_problems(reader.index)
    if reader.dtype != manifest.dtype:
        yield f"{idx_path} says {reader.dtype}, the manifest {manifest.dtype}"
    counts = {"num_documents": reader.num_documents, "num_tokens": reader.num_tokens}
    eos_id, num_eos, highest = manifest.tokenizer.eos_id, 0, 0
    for first in range(0, reader.num_tokens, BLOCK_TOKENS):
        tokens = reader.tokens(first, min(BLOCK_TOKENS, reader.num_tokens - first))
        num_eos += int(np.count_nonzero(tokens == eos_id))
        highest = max(highest, int(tokens.max()))
    if highest >= manifest.tokenizer.vocab_size:
        yield f"{bin_path} holds token {highest}, the vocabulary has {manifest.tokenizer.vocab_size}"
    counts |= {"num_eos": num_eos, "max_id": highest}
    for name, count in counts.items():
        if count != getattr(entry, name):
            yield f"{bin_path} has {name}={count:,}, the manifest says {getattr(entry, name):,}"
    ends = reader.index.starts() + reader.doc_lengths - 1
    raw = np.memmap(bin_path, dtype=np.dtype(reader.dtype), mode="r")
    unfinished = np.flatnonzero(raw[ends] != eos_id)
    if len(unfinished):
        yield (
            f"{bin_path}: {len(unfinished):,} documents do not end in EOS, the first is document "
            f"{int(unfinished[0])}"
        )


def _index_problems(index: ShardIndex) -> Iterator[str]:
    starts, lengths = index.starts(), index.doc_lengths.astype(np.int64)
    gaps = np.flatnonzero(starts[1:] != (starts + lengths)[:-1])
    if len(starts) and (starts[0] != 0 or len(gaps) or int(lengths.min()) < 0):
        where = int(gaps[0]) + 1 if len(gaps) else 0
        yield f"{index.path}: documents do not lie back to back, first at document {where}"


def _whole(folder: Path, manifest: Manifest, *, content: bool) -> Iterator[str]:
    """What is wrong with what all shards share."""
    try:
        found = load_tokenizer(folder / manifest.tokenizer.path).fingerprint
        if found != manifest.tokenizer.fingerprint:
            told = manifest.tokenizer.fingerprint
            yield f"the tokenizer's fingerprint is {found}, the manifest says {told}"
    except DataError as error:
        yield str(error)
    for pack in manifest.packs:
        yield from pack_problems(folder, pack, content=content)


def _bare(prefix: Path, *, content: bool) -> ShardFindings:
    """A shard that no manifest tells of."""
    reader = ShardReader(prefix)
    shard = ShardFindings(
        path=str(prefix),
        split="",
        dtype=reader.dtype,
        num_documents=reader.num_documents,
        num_tokens=reader.num_tokens,
        num_bytes=reader.num_tokens * np.dtype(reader.dtype).itemsize,
        problems=list(_index_problems(reader.index)),
    )
    if content and not shard.problems and reader.num_tokens:
        raw = np.memmap(shard_files(prefix)[0], dtype=np.dtype(reader.dtype), mode="r")
        shard.max_id = int(raw.max())
    return shard


def _put_away(folder: Path, shard: ShardFindings) -> str:
    """Move all files of a shard, the one that says it is done first. One of the same name that was put away
    before stays: the next is `<name>-2`."""
    prefix, into = folder / shard.path, folder / QUARANTINE
    into.mkdir(parents=True, exist_ok=True)
    taken = {path.name.partition(".")[0] for path in into.iterdir()}
    name, number = prefix.name, 2
    while name in taken:
        name, number = f"{prefix.name}-{number}", number + 1
    done = prefix.with_name(f"{prefix.name}.json")
    for path in (done, *shard_files(prefix), sums_file(prefix), lineage_file(prefix)):
        if path.is_file():
            path.replace(into / f"{name}{path.name.removeprefix(prefix.name)}")
    write_json(into / f"{name}.reason.json", {"path": shard.path, "problems": shard.problems})
    return str(into / name)
