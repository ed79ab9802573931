"""From a token back to its document and file: the functions behind `llmtrain data trace`.

A position is a token of a shard, a token of a split (its shards back to back), or a row of a pack. The
shard's index says which document holds it, `<prefix>.docs.parquet` where that document came from, and the
lengths of the pieces before it which bytes of the text it stands for. Nothing but the data folder is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from llmtrain.data.config import Packing
from llmtrain.data.manifest import Manifest, ShardEntry, lineage_file, read_manifest
from llmtrain.data.pack import open_plan
from llmtrain.data.shards import ShardReader
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.errors import ConfigError, DataError, unknown_name

CONTEXT_BYTES = 80
"""Of the text before and after what was asked for."""
MAX_TOKENS = 1 << 20
"""That one call traces."""


class OutputFormat(Enum):
    text = "text"
    json = "json"


@dataclass(kw_only=True)
class TraceConfig:
    """Which tokens to trace: `shard` and `token`, `split` and `token`, or `row` of a pack."""

    folder: str | None = None
    """The data folder."""
    shard: str | None = None
    """A shard's number in its split, its name (`train-00003`) or its path; null: `token` counts over the
    split."""
    split: str = "train"
    """No effect when `shard` is a name or a path."""
    token: int | None = None
    """Position of the first token, from 0: in the shard, in the split, or in the row when `row` is given."""
    length: int = 1
    """Tokens to trace from there on. No effect on a row without `token`: that is traced whole."""
    row: int | None = None
    """Row of the pack, from 0. The loader's shuffle is not applied: this is the row's place in the pack."""
    seq_len: int | None = None
    """The pack's row length; null: that of the only pack."""
    packing: Packing = Packing.concat
    """How the pack's documents became rows."""
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        if self.folder is None:
            raise ConfigError("nothing to trace in: give folder=DATA_FOLDER")
        if self.token is None and self.row is None:
            raise ConfigError("nothing to trace: give token=POSITION (with shard= or split=), or row=NUMBER")
        if self.row is not None and self.shard is not None:
            raise ConfigError(
                f"row={self.row} is a row of a split's pack, which has no shard={self.shard}; leave one out"
            )
        for name in ("token", "row"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name}={value} must be at least 0")
        if not 1 <= self.length <= MAX_TOKENS:
            raise ConfigError(f"length={self.length} must lie in 1..{MAX_TOKENS}")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A run of tokens inside one document, and where that came from."""

    split: str
    shard: str
    """Path of its prefix in the data folder."""
    token: int
    """Position of the first token in the shard."""
    num_tokens: int
    document: int
    """Number of the document in the shard."""
    document_tokens: int
    """EOS counted."""
    token_in_document: int
    document_id: str
    source: str
    path: str
    record: int
    """1-based number of the record in its file."""
    text_bytes: int
    """Of the whole document."""
    byte_start: int
    """Of the run, in the document's text. An end-of-document token stands for no byte."""
    byte_end: int
    char_start: int
    """Whole characters before the run; a character whose bytes the run only begins is not in it."""
    char_end: int
    is_exact: bool
    """Whether the tokens of the whole document give its text back, so that the spans are those of the text.
    Not with a tokenizer that normalises; then they are those of the decoded tokens."""
    text: str
    """Of the run."""
    before: str
    after: str


def trace(cfg: TraceConfig) -> list[Traced]:
    """Trace what `cfg` asks for: one entry for each document that the tokens touch, in order.

    Raises:
        DataError: no such shard, row or position, or a damaged folder.
    """
    folder = Path(str(cfg.folder))
    tracer = _Tracer(folder, read_manifest(folder))
    return tracer.traced(_runs(cfg, folder, tracer.manifest))


def trace_rows(
    folder: Path, rows: Sequence[int], *, split: str, seq_len: int, packing: Packing
) -> list[list[Traced]]:
    """Trace rows of a pack: for each the documents it holds pieces of, in the order of its segments."""
    tracer = _Tracer(folder, read_manifest(folder))
    asked = (
        TraceConfig(folder=str(folder), split=split, row=row, seq_len=seq_len, packing=packing)
        for row in rows
    )
    return [tracer.traced(_runs_of_row(cfg, folder, tracer.manifest)) for cfg in asked]


def as_json(found: list[Traced]) -> list[dict[str, Any]]:
    return [asdict(run) for run in found]


def shard_named(manifest: Manifest, name: str, split: str) -> ShardEntry:
    """The shard with this number in its split, this name, or this path (with or without a suffix)."""
    if name.isdecimal():
        shards = manifest.split_shards(split)
        if not shards:
            raise DataError(unknown_name("split", split, manifest.splits))
        if int(name) >= len(shards):
            raise DataError(f"shard={name} is past the last: split {split} has shards 0 to {len(shards) - 1}")
        return shards[int(name)]
    wanted = re.sub(r"\.(bin|idx|docs\.parquet|json)$", "", name)
    for shard in manifest.shards:
        if shard.path == wanted or Path(shard.path).name == Path(wanted).name:
            return shard
    raise DataError(unknown_name("shard", name, [Path(shard.path).name for shard in manifest.shards]))


def _runs(cfg: TraceConfig, folder: Path, manifest: Manifest) -> Iterator[tuple[ShardEntry, int, int]]:
    """(shard, first token, number of tokens) of what is asked for; a run may span documents."""
    if cfg.row is not None:
        yield from _runs_of_row(cfg, folder, manifest)
    elif cfg.shard is not None:
        shard = shard_named(manifest, cfg.shard, cfg.split)
        yield from _runs_over([shard], cfg, f"shard {Path(shard.path).name}")
    else:
        shards = manifest.split_shards(cfg.split)
        if not shards:
            raise DataError(unknown_name("split", cfg.split, manifest.splits))
        yield from _runs_over(shards, cfg, f"split {cfg.split}")


def _runs_over(
    shards: Sequence[ShardEntry], cfg: TraceConfig, what: str
) -> Iterator[tuple[ShardEntry, int, int]]:
    assert cfg.token is not None, "checked by TraceConfig"
    begin, num_tokens = cfg.token, sum(shard.num_tokens for shard in shards)
    if begin >= num_tokens:
        raise DataError(f"token={begin:,} is past the end: {what} has {num_tokens:,} tokens, counted from 0")
    end, before = min(begin + cfg.length, num_tokens), 0
    for shard in shards:
        first, last = max(begin - before, 0), min(end - before, shard.num_tokens)
        if first < last:
            yield shard, first, last - first
        before += shard.num_tokens


def _runs_of_row(cfg: TraceConfig, folder: Path, manifest: Manifest) -> Iterator[tuple[ShardEntry, int, int]]:
    assert cfg.row is not None, "the caller looked"
    lengths = sorted({pack.seq_len for pack in manifest.packs if pack.split == cfg.split})
    if cfg.seq_len is None and len(lengths) > 1:
        raise ConfigError(f"split {cfg.split} has packs of seq_len {lengths}; give seq_len= one of them")
    entry = manifest.pack(cfg.split, cfg.seq_len or (lengths[0] if lengths else 0), cfg.packing.name)
    if cfg.row >= entry.num_rows:
        raise DataError(
            f"row={cfg.row:,} is past the end: the pack of split {cfg.split} with seq_len={entry.seq_len} "
            f"has {entry.num_rows:,} rows, counted from 0"
        )
    spans, _ = open_plan(folder, manifest, entry).spans(np.array([cfg.row]))
    num_tokens = int(spans[2].sum())
    if cfg.token is not None and cfg.token >= num_tokens:
        raise DataError(
            f"token={cfg.token:,} is past the end: row {cfg.row:,} has {num_tokens:,} tokens, counted from 0"
        )
    begin, end = (0, num_tokens) if cfg.token is None else (cfg.token, cfg.token + cfg.length)
    shards, before = manifest.split_shards(cfg.split), 0
    for number, start, length, _ in spans.T.tolist():
        first, last = max(begin - before, 0), min(end - before, length)
        if first < last:
            yield shards[number], start + first, last - first
        before += length


class _Tracer:
    """The tokenizer and the shards that were needed so far."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._tokenizer = load_tokenizer(folder / manifest.tokenizer.path)
        self._shards: dict[str, _Shard] = {}

    def traced(self, runs: Iterator[tuple[ShardEntry, int, int]]) -> list[Traced]:
        found: list[Traced] = []
        for entry, start, length in runs:
            if entry.path not in self._shards:
                self._shards[entry.path] = _Shard(self.folder, entry)
            found += self._shards[entry.path].traced(start, length, self._tokenizer)
        return found


class _Shard:
    """A shard with where its documents came from."""

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        self.entry = entry
        self.reader = ShardReader(folder / entry.path)
        lineage = lineage_file(self.reader.prefix)
        if not lineage.is_file():
            raise DataError(f"{lineage} is missing; run `llmtrain data` again, or restore the file")
        self._documents = pq.read_table(lineage, columns=["id", "source", "path", "record", "text_bytes"])

    def traced(self, start: int, length: int, tokenizer: Tokenizer) -> Iterator[Traced]:
        """Cut a run of tokens where documents end, and place each part in its document's text."""
        end = start + length
        while start < end:
            number = self.reader.document_at(start)
            first = self.reader.document_start(number)
            tokens = self.reader.document(number)
            last = min(end, first + len(tokens))
            pieces = tokenizer.pieces(tokens)
            text = b"".join(pieces)
            ends = np.cumsum([len(piece) for piece in pieces])
            byte_start = int(ends[start - first - 1]) if start > first else 0
            byte_end = int(ends[last - first - 1])
            [document] = self._documents.slice(number, 1).to_pylist()
            yield Traced(
                split=self.entry.split,
                shard=self.entry.path,
                token=start,
                num_tokens=last - start,
                document=number,
                document_tokens=len(tokens),
                token_in_document=start - first,
                document_id=document["id"],
                source=document["source"],
                path=document["path"],
                record=document["record"],
                text_bytes=document["text_bytes"],
                byte_start=byte_start,
                byte_end=byte_end,
                char_start=_num_whole_chars(text[:byte_start]),
                char_end=_num_whole_chars(text[:byte_end]),
                is_exact=len(text) == document["text_bytes"],
                text=text[byte_start:byte_end].decode(errors="replace"),
                before=text[max(0, byte_start - CONTEXT_BYTES) : byte_start].decode(errors="ignore"),
                after=text[byte_end : byte_end + CONTEXT_BYTES].decode(errors="ignore"),
            )
            start = last


def _num_whole_chars(text: bytes) -> int:
    return len(text.decode(errors="ignore"))
