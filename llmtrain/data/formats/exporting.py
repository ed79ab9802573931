"""`llmtrain data export`: shards for other frameworks. Tokens are hard links, small files are written."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from llmtrain.data.formats.config import ExportConfig, TokenFormat
from llmtrain.data.formats.foreign import SUFFIX
from llmtrain.data.formats.links import link_or_copy
from llmtrain.data.manifest import Manifest, lineage_file, read_manifest, shard_files, verify
from llmtrain.data.shards import ShardReader
from llmtrain.data.verdicts import SPLITS
from llmtrain.errors import DataError, unknown_name
from llmtrain.files import atomic_write, read_json, write_json
from llmtrain.progress import progress
from llmtrain.units import format_count

LISTING = "export.json"
"""What is exported. It comes first, so that an export that was killed is known for one; `done` comes last."""


@dataclass(kw_only=True)
class ExportReport:
    out: Path
    num_files: dict[str, int]
    """Of tokens, by split."""
    num_tokens: dict[str, int]
    num_linked: int
    token_type: str
    """What the reader must be told, or will find."""


def export_tokens(cfg: ExportConfig, *, quiet: bool = False) -> ExportReport:
    """Write `<out>/<split>/<shard>` of each shard, as `cfg.kind` has it.

    Raises:
        DataError: no such split, a shard that is missing, or a folder that holds another export or other
        things.
    """
    folder, out = Path(cfg.folder), Path(cfg.out)
    manifest = read_manifest(folder)
    verify(folder, manifest, content=False)
    splits = cfg.splits or [split for split in SPLITS if split in manifest.splits]
    for split in splits:
        if split not in manifest.splits:
            raise DataError(unknown_name("split", split, manifest.splits))
    token_type = TOKEN_TYPE[cfg.kind].get(manifest.dtype, manifest.dtype)
    listing = {
        "kind": cfg.kind.name,
        "token_type": token_type,
        "vocab_size": manifest.tokenizer.vocab_size,
        "eos_id": manifest.tokenizer.eos_id,
        "tokenizer": f"tokenizer/{manifest.tokenizer.file}",
        "tokenizer_sha256": manifest.tokenizer.fingerprint,
        "content": manifest.table.content_hash(),
    }
    _refuse_another(out, listing)
    write_json(out / LISTING, listing | {"done": False})
    report = ExportReport(out=out, num_files={}, num_tokens={}, num_linked=0, token_type=token_type)
    tokenizer = folder / manifest.tokenizer.path / manifest.tokenizer.file
    link_or_copy(tokenizer, out / str(listing["tokenizer"]))
    shards = [shard for split in splits for shard in manifest.split_shards(split)]
    with progress("export", total=len(shards), unit="shards", quiet=quiet) as advance:
        for shard in shards:
            reader = ShardReader(folder / shard.path)
            target = out / shard.split / f"{Path(shard.path).name}{SUFFIX[cfg.kind]}"
            BESIDE[cfg.kind](reader, target, manifest)
            report.num_linked += link_or_copy(shard_files(folder / shard.path)[0], target)
            report.num_files[shard.split] = report.num_files.get(shard.split, 0) + 1
            report.num_tokens[shard.split] = report.num_tokens.get(shard.split, 0) + shard.num_tokens
            advance(1)
    write_json(out / LISTING, listing | {"done": True})
    return report


def _refuse_another(out: Path, listing: dict[str, object]) -> None:
    if not (out / LISTING).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"out={out} holds other things; give a folder that is new, empty or an export")
        return
    try:
        found = read_json(out / LISTING)
    except ValueError:
        found = None
    if found not in (listing, listing | {"done": False}, listing | {"done": True}):
        raise DataError(f"{out} holds an export of other shards or of another kind; give another out=FOLDER")


def _megatron(reader: ShardReader, target: Path, _manifest: Manifest) -> None:
    link_or_copy(shard_files(reader.prefix)[1], target.with_suffix(".idx"))


def _datatrove(reader: ShardReader, target: Path, manifest: Manifest) -> None:
    """Cumulative ends in tokens as u64; the name and token size, the number of tokens, and that in words."""
    ends = np.cumsum(reader.doc_lengths, dtype=np.int64)
    with atomic_write(Path(f"{target}.index")) as handle:
        handle.write(ends.astype("<u8").tobytes())
    size = np.dtype(reader.dtype).itemsize
    count = reader.num_tokens
    with atomic_write(Path(f"{target}.metadata"), "w") as handle:
        handle.write(f"tokenizer/{manifest.tokenizer.file}|{size}\n{count}\n{format_count(count)}")


def _olmo(reader: ShardReader, target: Path, _manifest: Manifest) -> None:
    """start,end,id,src,loc of each document, without a head line."""
    lineage = pq.read_table(lineage_file(reader.prefix))
    ends = np.cumsum(reader.doc_lengths, dtype=np.int64)
    columns = [(ends - reader.doc_lengths).tolist(), ends.tolist()]
    columns += [lineage.column(name).to_pylist() for name in ("id", "path", "record")]
    with (
        atomic_write(target.with_suffix(".csv.gz")) as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        csv.writer(text).writerows(zip(*columns, strict=True))


BESIDE: dict[TokenFormat, Callable[[ShardReader, Path, Manifest], None]] = {
    TokenFormat.megatron: _megatron,
    TokenFormat.datatrove: _datatrove,
    TokenFormat.olmo: _olmo,
}
"""What writes the files beside the tokens."""
TOKEN_TYPE = {
    TokenFormat.megatron: {},
    TokenFormat.datatrove: {"int32": "uint32"},
    TokenFormat.olmo: {"int32": "uint32"},
}
"""Where another name says the same bytes: no id is so large that the sign matters."""
