"""The manifest: what training may read. A file that it does not name does not exist for a run.

It holds counts, sizes and hashes of every shard and pack, the tokenizer's fingerprint, the funnel (what each
pass took in, kept and dropped, by reason) and the resolved config. Nothing in it depends on the time,
the machine or the number of workers: the same text and settings give the same bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from llmtrain.errors import DataError
from llmtrain.files import HASH_BLOCK_BYTES, hash_file, hash_json, read_json, write_json

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: `<path>.bin`, `<path>.idx` and `<path>.docs.parquet`."""

    path: str
    """Prefix of its files, relative to the data folder."""
    split: str
    """`train` or `held_out`."""
    num_documents: int
    num_tokens: int
    """EOS of every document counted."""
    num_bytes: int
    """Size of the .bin file."""
    sha256: str
    """Of the .bin file."""
    idx_sha256: str
    xxh3_128: str
    """Of the .bin file; what a start-up check compares."""
    text_bytes: int
    """UTF-8 bytes of the normalised documents that it encodes."""


@dataclass(frozen=True, kw_only=True)
class PackEntry:
    """One pack: `<path>/<split>.rows.npy` and `<path>/<split>.spans.npy`."""

    path: str
    """Folder, relative to the data folder."""
    split: str
    seq_len: int
    num_rows: int
    num_target_tokens: int
    """Sum over documents of their tokens less one: the last token of a document has no target."""
    rows_sha256: str
    spans_sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    path: str
    """Folder, relative to the data folder."""
    kind: str
    vocab_size: int
    fingerprint: str
    """sha256 of the model file."""
    eos_id: int
    bos_id: int | None
    """None: no document begins with a special token."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `llmtrain data` wrote into one folder."""

    format_version: int
    corpus: str
    dtype: str
    """Of token ids in .bin files: `uint16`, or `int32` for a vocabulary above 65,499."""
    tokenizer: TokenizerEntry
    shards: list[ShardEntry]
    """In the order that packs count them, split by split."""
    packs: list[PackEntry]
    funnel: list[dict[str, Any]]
    """Per pass: its name, and documents, bytes and (where there are any) tokens: in, kept, dropped by
    reason."""
    config: dict[str, Any]
    """Every setting that decides the bytes. Not among them: folders, workers, sizes of work units."""
    config_hash: str
    versions: dict[str, str]
    held_out_text: str
    """Relative path of a .jsonl.zst with `id` and `text` of every held-out document, in shard order."""
    tool_version: str
    input_hash: str = ""
    """Of `input.json`: name, size and hash of every file that was read. "": written before there was one."""

    def hash(self, seq_len: int) -> str:
        """Return sha256 of what decides the tokens of every row of `seq_len`: shards, its packs, tokenizer.

        Packs of other lengths leave it as it is.
        """
        return hash_json(
            {
                "dtype": self.dtype,
                "tokenizer": self.tokenizer.fingerprint,
                "shards": [[shard.split, shard.sha256, shard.idx_sha256] for shard in self.shards],
                "packs": [
                    [pack.split, pack.seq_len, pack.rows_sha256, pack.spans_sha256]
                    for pack in self.packs
                    if pack.seq_len == seq_len
                ],
            }
        )

    def pack(self, split: str, seq_len: int) -> PackEntry:
        """Return the pack of `split` with rows of `seq_len` tokens."""
        for pack in self.packs:
            if (pack.split, pack.seq_len) == (split, seq_len):
                return pack
        known = sorted({pack.seq_len for pack in self.packs if pack.split == split})
        if not known:
            raise DataError(f"the manifest has no pack of split {split!r}; splits: {self.splits}")
        raise DataError(
            f"no pack of split {split!r} has seq_len={seq_len}; there are {known}. Choose one of them, "
            f"or add it with `llmtrain data pack.seq_lens={[*known, seq_len]}`".replace(", ", ",")
        )

    def split_shards(self, split: str) -> list[ShardEntry]:
        """The shards of `split`, in the order that a span's `shard` counts them."""
        return [shard for shard in self.shards if shard.split == split]

    @property
    def splits(self) -> list[str]:
        return sorted({shard.split for shard in self.shards})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a data folder."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise DataError(f"data folder {folder} {what}; run `llmtrain data` first, or to its end")
    try:
        value = read_json(path)
        version = value["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format_version={version}, this llmtrain reads {FORMAT_VERSION}; "
                "run `llmtrain data` again"
            )
        return _manifest_from_json(value)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete it and run `llmtrain data` again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: the last act of `llmtrain data`."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def verify(folder: Path, manifest: Manifest, *, content: bool) -> None:
    """Check that every file of the manifest is there in its size; with `content`, that its bytes are
    right, too.

    Reading everything goes at the speed of the disk or about 2 GB/s.

    Raises:
        DataError: names the first file that is wrong, what was expected and what was found.
    """
    tokenizer = folder / manifest.tokenizer.path / "tokenizer.model"
    _check_exists(tokenizer)
    _check_exists(folder / manifest.held_out_text)
    if content:
        _check_hash(tokenizer, "sha256", manifest.tokenizer.fingerprint, hash_file(tokenizer))
    for shard in manifest.shards:
        prefix = folder / shard.path
        bin_path, idx_path = shard_files(prefix)
        _check_size(bin_path, shard.num_bytes)
        _check_size(idx_path, 34 + 20 * shard.num_documents + 8)
        _check_exists(prefix.with_name(f"{prefix.name}.docs.parquet"))
        if content:
            _check_hash(bin_path, "xxh3_128", shard.xxh3_128, xxh3_of_file(bin_path))
            _check_hash(idx_path, "sha256", shard.idx_sha256, hash_file(idx_path))
    for pack in manifest.packs:
        for kind, expected in (("rows", pack.rows_sha256), ("spans", pack.spans_sha256)):
            path = folder / pack.path / f"{pack.split}.{kind}.npy"
            _check_exists(path)
            if content:
                _check_hash(path, "sha256", expected, hash_file(path))


def shard_files(prefix: Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a shard prefix."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def xxh3_of_file(path: Path) -> str:
    """xxh3_128 of the file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while block := handle.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _manifest_from_json(value: dict[str, Any]) -> Manifest:
    known = {field.name for field in fields(Manifest)}
    values = {name: value[name] for name in known}
    values["tokenizer"] = TokenizerEntry(**value["tokenizer"])
    values["shards"] = [ShardEntry(**entry) for entry in value["shards"]]
    values["packs"] = [PackEntry(**entry) for entry in value["packs"]]
    return Manifest(**values)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"{path} is missing, but the manifest names it; run `llmtrain data` again, or restore the file"
        )


def _check_size(path: Path, expected: int) -> None:
    _check_exists(path)
    found = path.stat().st_size
    if found != expected:
        raise DataError(f"{path} has {found:,} bytes, the manifest says {expected:,}; {_MEND}")


def _check_hash(path: Path, kind: str, expected: str, found: str) -> None:
    if found != expected:
        raise DataError(f"{path} is damaged: its {kind} is {found}, the manifest says {expected}; {_MEND}")


_MEND = "delete the folder it lies in and run `llmtrain data` again, or restore the file"
