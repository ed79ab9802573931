"""The manifest: what training may read. A file that it does not name does not exist for a run.

It holds counts, sizes and hashes of every shard and pack, the tokenizer's fingerprint, the funnel (what each
pass took in, kept and dropped, by reason) and the resolved config. The shards are rows of a table beside
it, so that a hundred thousand of them open in milliseconds. Nothing in it depends on the time, the machine
or the number of workers: the same text and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.errors import DataError
from llmtrain.files import HASH_BLOCK_BYTES, atomic_write, hash_file, hash_json, read_json, write_json

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TABLE_PREFIX = "shards-"
"""`shards-<hash>.npy` beside the manifest has its shards; the hash is that of the table, so an old manifest
keeps its own until a new one has taken its place."""
SUM_BLOCK_BYTES = 1 << 20
"""Bytes of a .bin file that one sum in its .sums file is for."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: `<path>.bin`, `<path>.idx`, `<path>.sums` and `<path>.docs.parquet`."""

    path: str
    """Prefix of its files, relative to the data folder: `<folder>/<split>-<number>`, numbers from 00000."""
    split: str
    """`train` or `held_out`."""
    num_documents: int
    num_tokens: int
    """EOS of every document counted."""
    num_bytes: int
    """Size of the .bin file."""
    max_id: int
    """Largest token id."""
    num_eos: int
    """Tokens that are EOS. More than documents where a text held one as a token."""
    sha256: str
    """Of the .bin file."""
    idx_sha256: str
    xxh3_128: str
    """Of the .bin file."""
    sums_xxh3_128: str
    """Of the .sums file: xxh3_64 of each MiB of the .bin file, what a block is compared with."""
    text_bytes: int
    """UTF-8 bytes of the normalised documents that it encodes."""


_HASHES = {"sha256": 32, "idx_sha256": 32, "xxh3_128": 16, "sums_xxh3_128": 16}
_COUNTS = ("num_documents", "num_tokens", "num_bytes", "text_bytes", "max_id", "num_eos")
RECORD = np.dtype(
    [("split", "u1"), *((name, "<i8") for name in _COUNTS), *((name, f"V{n}") for name, n in _HASHES.items())]
)
"""A row of the table: `split` is a position in the manifest's list of splits, hashes are raw bytes."""


class ShardTable(Sequence[ShardEntry]):
    """Shards as columns; an entry is made when it is asked for. Shards of a split are numbered in order."""

    def __init__(self, folder: str, splits: tuple[str, ...], records: npt.NDArray[Any]) -> None:
        self.folder = folder
        """That holds their files, relative to the data folder."""
        self.splits = splits
        self.records = records
        self._numbers = np.zeros(len(records), dtype=np.int64)
        for code in range(len(splits)):
            of_split = records["split"] == code
            self._numbers[of_split] = np.arange(int(of_split.sum()))

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> ShardTable:
        """Columns of these entries."""
        rows = list(entries)
        splits = tuple(dict.fromkeys(entry.split for entry in rows))
        folder = rows[0].path.rpartition("/")[0] if rows else ""
        records = np.zeros(len(rows), dtype=RECORD)
        for at, entry in enumerate(rows):
            hashes = (np.void(bytes.fromhex(getattr(entry, name))) for name in _HASHES)
            counts = (getattr(entry, name) for name in _COUNTS)
            records[at] = (splits.index(entry.split), *counts, *hashes)
        table = cls(folder, splits, records)
        for at, entry in enumerate(rows):
            if table.path(at) != entry.path:
                raise DataError(
                    f"shard {at} is at {entry.path}, but shard files are named {table.path(at)}: all in one "
                    "folder, numbered in the manifest's order"
                )
        return table

    def path(self, at: int) -> str:
        """Prefix of a shard's files, relative to the data folder."""
        name = f"{self.splits[self.records['split'][at]]}-{self._numbers[at]:05d}"
        return f"{self.folder}/{name}" if self.folder else name

    def split(self, name: str) -> ShardTable:
        """The shards of one split."""
        code = self.splits.index(name) if name in self.splits else len(self.splits)
        return self._part(np.flatnonzero(self.records["split"] == code))

    def content_hash(self) -> str:
        """sha256 of what decides their tokens: splits, and the hashes of .bin and .idx in their order."""
        digest = hashlib.sha256("\0".join(self.splits).encode())
        for name in ("split", "sha256", "idx_sha256"):
            digest.update(np.ascontiguousarray(self.records[name]).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, at: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, at: slice) -> ShardTable: ...
    def __getitem__(self, at: int | slice) -> ShardEntry | ShardTable:
        if isinstance(at, slice):
            return self._part(np.arange(len(self))[at])
        record = self.records[at]
        return ShardEntry(
            path=self.path(at),
            split=self.splits[record["split"]],
            **cast(dict[str, Any], {name: int(record[name]) for name in _COUNTS}),
            **{name: record[name].tobytes().hex() for name in _HASHES},
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self.content_hash())

    def _part(self, places: npt.NDArray[np.int64]) -> ShardTable:
        part = ShardTable.__new__(ShardTable)
        part.folder, part.splits = self.folder, self.splits
        part.records, part._numbers = self.records[places], self._numbers[places]
        return part


@dataclass(frozen=True, kw_only=True)
class PackEntry:
    """One pack. With strategy concat its rows are arithmetic; else `<path>/<split>.rows.npy` and
    `<path>/<split>.spans.npy` say what they hold."""

    path: str
    """Folder, relative to the data folder; "" for concat."""
    split: str
    seq_len: int
    strategy: str
    """`concat`, `best_fit` or `padded`."""
    num_rows: int
    num_target_tokens: int
    """Sum over documents of their tokens less one: the last token of a document has no target."""
    num_padding: int
    """Positions of rows that hold no token."""
    num_cut_documents: int
    """Documents in several rows although one row would have held them."""
    num_long_documents: int
    """Documents of more tokens than a row has."""
    rows_sha256: str | None = None
    spans_sha256: str | None = None


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
    """Documents do not begin with it."""
    file: str = "tokenizer.model"
    """Name of the model file in `path`."""
    special_ids: dict[str, int] = field(default_factory=dict)
    """Ids of control pieces by name: fim_prefix, fim_middle, fim_suffix, mask, sentinel_0, ..."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `llmtrain data` wrote into one folder."""

    format_version: int
    corpus: str
    dtype: str
    """Of token ids in .bin files: `uint16`, or `int32` for a vocabulary above 65,499."""
    tokenizer: TokenizerEntry
    shards: Sequence[ShardEntry]
    """In the order that packs count them, split by split; kept as a ShardTable."""
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
    """Of `input.json`: name, size and hash of every file that was read. "": made from shards, not text."""

    def __post_init__(self) -> None:
        if not isinstance(self.shards, ShardTable):
            object.__setattr__(self, "shards", ShardTable.of(self.shards))

    @property
    def table(self) -> ShardTable:
        """The shards as columns."""
        return cast(ShardTable, self.shards)

    def hash(self, seq_len: int, strategy: str = "concat") -> str:
        """Return sha256 of what decides the tokens of every row of `seq_len`: shards, its packs, tokenizer.

        Packs of other lengths and strategies leave it as it is.
        """
        return hash_json(
            {
                "dtype": self.dtype,
                "tokenizer": self.tokenizer.fingerprint,
                "shards": self.table.content_hash(),
                "packs": [
                    [pack.split, pack.seq_len, pack.rows_sha256, pack.spans_sha256]
                    for pack in self.packs
                    if (pack.seq_len, pack.strategy) == (seq_len, strategy)
                ],
            }
        )

    def pack(self, split: str, seq_len: int, strategy: str = "concat") -> PackEntry:
        """Return the pack of `split` with rows of `seq_len` tokens, packed by `strategy`."""
        for pack in self.packs:
            if (pack.split, pack.seq_len, pack.strategy) == (split, seq_len, strategy):
                return pack
        of_split = [pack for pack in self.packs if pack.split == split]
        if not of_split:
            raise DataError(f"the manifest has no pack of split {split!r}; splits: {self.splits}")
        lengths = sorted({pack.seq_len for pack in of_split if pack.strategy == strategy})
        if not lengths:
            known = sorted({pack.strategy for pack in of_split})
            raise DataError(
                f"no pack of split {split!r} has strategy {strategy}; there are {known}. Choose one of them, "
                f"or add it with `llmtrain data pack.strategies=[{','.join([*known, strategy])}]`"
            )
        wanted = ",".join(map(str, [*lengths, seq_len]))
        raise DataError(
            f"no pack of split {split!r} has seq_len={seq_len}; there are {lengths}. Choose one of them, "
            f"or add it with `llmtrain data pack.seq_lens=[{wanted}]`"
        )

    def split_shards(self, split: str) -> ShardTable:
        """The shards of `split`, in the order that a span's `shard` counts them."""
        return self.table.split(split)

    @property
    def splits(self) -> list[str]:
        return sorted(self.table.splits)


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
        return _manifest_from_json(folder, value)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete it and run `llmtrain data` again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: the last act of `llmtrain data`. Tables of earlier ones go after it."""
    table = io.BytesIO()
    np.save(table, manifest.table.records, allow_pickle=False)
    digest = hashlib.sha256(table.getvalue()).hexdigest()
    path = folder / f"{TABLE_PREFIX}{digest[:16]}.npy"
    with atomic_write(path) as handle:
        handle.write(table.getvalue())
    values = {entry.name: getattr(manifest, entry.name) for entry in fields(manifest)}
    values["tokenizer"] = asdict(manifest.tokenizer)
    values["packs"] = [asdict(pack) for pack in manifest.packs]
    values["shards"] = {
        "table": path.name,
        "table_sha256": digest,
        "folder": manifest.table.folder,
        "splits": list(manifest.table.splits),
        "num_shards": len(manifest.table),
        "num_tokens": int(manifest.table.records["num_tokens"].sum()),
    }
    write_json(folder / MANIFEST_NAME, values)
    for other in folder.glob(f"{TABLE_PREFIX}*.npy"):
        if other != path:
            other.unlink(missing_ok=True)


def verify(folder: Path, manifest: Manifest, *, content: bool) -> None:
    """Check that every file of the manifest is there in its size; with `content`, that its bytes are
    right, too.

    Reading everything goes at the speed of the disk or about 2 GB/s.

    Raises:
        DataError: names the first file that is wrong, what was expected and what was found.
    """
    tokenizer = folder / manifest.tokenizer.path / manifest.tokenizer.file
    _check_exists(tokenizer)
    _check_exists(folder / manifest.held_out_text)
    if content:
        _check_hash(tokenizer, "sha256", manifest.tokenizer.fingerprint, hash_file(tokenizer))
    for shard in manifest.shards:
        for problem in shard_problems(folder, shard, content=content):
            raise DataError(f"{problem}; {MEND}")
    for pack in manifest.packs:
        for problem in pack_problems(folder, pack, content=content):
            raise DataError(f"{problem}; {MEND}")


def shard_problems(folder: Path, shard: ShardEntry, *, content: bool) -> Iterator[str]:
    """What is wrong with a shard's files, a sentence a file."""
    prefix = folder / shard.path
    bin_path, idx_path = shard_files(prefix)
    sums_path, lineage = sums_file(prefix), lineage_file(prefix)
    num_blocks = -(-shard.num_bytes // SUM_BLOCK_BYTES)
    sizes = {
        bin_path: shard.num_bytes,
        idx_path: 34 + 20 * shard.num_documents + 8,
        sums_path: 8 * num_blocks,
    }
    wrong = dict.fromkeys(sizes, False)
    for path, expected in (*sizes.items(), (lineage, None)):
        if not path.is_file():
            yield f"{path} is missing, but the manifest names it"
        elif expected is not None and (found := path.stat().st_size) != expected:
            yield f"{path} has {found:,} bytes, the manifest says {expected:,}"
        else:
            continue
        wrong[path] = True
    if not content:
        return
    if not wrong[sums_path] and (found_hash := xxh3_of_file(sums_path)) != shard.sums_xxh3_128:
        yield f"{sums_path} is damaged: its xxh3_128 is {found_hash}, the manifest says {shard.sums_xxh3_128}"
        wrong[sums_path] = True
    if not wrong[bin_path]:
        if wrong[sums_path]:
            if (found_hash := xxh3_of_file(bin_path)) != shard.xxh3_128:
                told = shard.xxh3_128
                yield f"{bin_path} is damaged: its xxh3_128 is {found_hash}, the manifest says {told}"
        else:
            yield from block_problems(bin_path, sums_path)
    if not wrong[idx_path] and (found_hash := hash_file(idx_path)) != shard.idx_sha256:
        yield f"{idx_path} is damaged: its sha256 is {found_hash}, the manifest says {shard.idx_sha256}"


def block_problems(bin_path: Path, sums_path: Path) -> Iterator[str]:
    """The blocks of a .bin file that are not what its .sums file says, in one sentence."""
    sums = np.fromfile(sums_path, dtype="<u8").tolist()
    bad: list[tuple[int, int, int]] = []
    with open(bin_path, "rb", buffering=0) as handle:
        for number, expected in enumerate(sums):
            found = xxhash.xxh3_64_intdigest(handle.read(SUM_BLOCK_BYTES))
            if found != expected:
                bad.append((number, expected, found))
    if bad:
        number, expected, found = bad[0]
        yield damaged_block(bin_path, number, expected=expected, found=found, num_more=len(bad) - 1)


def damaged_block(path: Path, number: int, *, expected: int, found: int, num_more: int = 0) -> str:
    """Which bytes of a .bin file are wrong."""
    begin = number * SUM_BLOCK_BYTES
    more = f" {num_more} more blocks of it are damaged, too." if num_more else ""
    return (
        f"{path} is damaged between byte {begin:,} and {begin + SUM_BLOCK_BYTES:,}: the block's xxh3_64 is "
        f"{found:016x}, its .sums file says {expected:016x}{more}"
    )


def pack_problems(folder: Path, pack: PackEntry, *, content: bool) -> Iterator[str]:
    """What is wrong with the files of a pack, a sentence a file."""
    for kind, expected in (("rows", pack.rows_sha256), ("spans", pack.spans_sha256)):
        path = folder / pack.path / f"{pack.split}.{kind}.npy"
        if expected is None:
            continue
        if not path.is_file():
            yield f"{path} is missing, but the manifest names it"
        elif content and (found := hash_file(path)) != expected:
            yield f"{path} is damaged: its sha256 is {found}, the manifest says {expected}"


def shard_files(prefix: Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a shard prefix."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def sums_file(prefix: Path) -> Path:
    """The .sums file of a shard prefix."""
    return prefix.with_name(f"{prefix.name}.sums")


def lineage_file(prefix: Path) -> Path:
    """The table that says where each document of a shard came from."""
    return prefix.with_name(f"{prefix.name}.docs.parquet")


def xxh3_of_file(path: Path) -> str:
    """xxh3_128 of the file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while block := handle.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _manifest_from_json(folder: Path, value: dict[str, Any]) -> Manifest:
    values = {entry.name: value[entry.name] for entry in fields(Manifest)}
    values["tokenizer"] = TokenizerEntry(**value["tokenizer"])
    values["shards"] = _read_table(folder, value["shards"])
    values["packs"] = [PackEntry(**entry) for entry in value["packs"]]
    return Manifest(**values)


def _read_table(folder: Path, listed: dict[str, Any]) -> ShardTable:
    path = folder / listed["table"]
    _check_exists(path)
    content = path.read_bytes()
    _check_hash(path, "sha256", listed["table_sha256"], hashlib.sha256(content).hexdigest())
    records = np.load(io.BytesIO(content), allow_pickle=False)
    return ShardTable(listed["folder"], tuple(listed["splits"]), records)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"{path} is missing, but the manifest names it; run `llmtrain data` again, or restore the file"
        )


def _check_hash(path: Path, kind: str, expected: str, found: str) -> None:
    if found != expected:
        raise DataError(f"{path} is damaged: its {kind} is {found}, the manifest says {expected}; {MEND}")


MEND = (
    "delete the folder it lies in and run the command that made it again (`llmtrain data` or "
    "`llmtrain data import`), or restore the file"
)
