"""Shards of tokens in Megatron's `.bin`/`.idx` byte layout, one document per sequence, and block sums.

Layout as read by Megatron-LM at d98e8a64 (`megatron/core/datasets/indexed_dataset.py`) and GPT-NeoX at
ea7aefd8; the bytes are in docs/data_format.md. The `.bin` file has no header: token ids, little endian,
documents back to back, EOS the last token of each. uint16 only up to a vocabulary of 65,499, the one
choice on which both code paths of Megatron agree.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.data.manifest import SUM_BLOCK_BYTES, lineage_file, shard_files, sums_file
from llmtrain.errors import DataError
from llmtrain.files import atomic_write, fsync_folder, temporary_beside

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_VERSION = 1
IDX_HEADER_BYTES = 34
DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
"""Megatron's codes of integers. It has two more, 6 and 7 for floats, which are no token ids."""
WRITTEN_DTYPES = ("uint16", "int32")
MAX_UINT16_VOCAB = 65_499
MAX_DOCUMENT_TOKENS = 2**31 - 1

TokenIds = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> str:
    """Name of the dtype that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= MAX_UINT16_VOCAB else "int32"


def idx_bytes(doc_lengths: npt.NDArray[np.int64], dtype: str) -> bytes:
    """The whole `.idx` file of documents with these numbers of tokens."""
    num_documents = len(doc_lengths)
    item_bytes = np.dtype(dtype).itemsize
    pointers = np.zeros(num_documents, dtype="<i8")
    np.cumsum(doc_lengths[:-1] * item_bytes, out=pointers[1:])
    return b"".join(
        (
            IDX_MAGIC,
            np.array(IDX_VERSION, dtype="<u8").tobytes(),
            np.array(DTYPE_CODES[dtype], dtype="u1").tobytes(),
            np.array([num_documents, num_documents + 1], dtype="<u8").tobytes(),
            doc_lengths.astype("<i4").tobytes(),
            pointers.tobytes(),
            np.arange(num_documents + 1, dtype="<i8").tobytes(),
        )
    )


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a closed shard holds."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    max_id: int
    num_eos: int
    sha256: str
    idx_sha256: str
    xxh3_128: str
    sums_xxh3_128: str


class BlockSums:
    """xxh3_64 of each SUM_BLOCK_BYTES of a file that is written piece by piece."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._block = xxhash.xxh3_64()
        self._filled = 0

    def update(self, payload: bytes) -> None:
        view = memoryview(payload)
        while len(view):
            part = view[: SUM_BLOCK_BYTES - self._filled]
            self._block.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == SUM_BLOCK_BYTES:
                self._end_block()

    def finish(self) -> bytes:
        """The .sums file: little-endian u64, one a block, the last block maybe shorter."""
        if self._filled:
            self._end_block()
        return np.array(self._sums, dtype="<u8").tobytes()

    def _end_block(self) -> None:
        self._sums.append(self._block.intdigest())
        self._block.reset()
        self._filled = 0


class ShardWriter:
    """Write one shard. Its files appear at `close`, whole; without it (a crash, an error) nothing appears."""

    def __init__(self, prefix: Path, dtype: str, vocab_size: int, *, eos_id: int) -> None:
        if dtype not in WRITTEN_DTYPES:
            raise DataError(f"shards hold {' or '.join(WRITTEN_DTYPES)}, not {dtype}")
        self.prefix = prefix
        self.dtype = dtype
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin_path, self._idx_path = shard_files(prefix)
        self._temporary = temporary_beside(self._bin_path)
        self._handle = open(self._temporary, "wb")  # noqa: SIM115 - closed in close() or abort()
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_128()
        self._sums = BlockSums()
        self._num_bytes = 0
        self._max_id = 0
        self._num_eos = 0

    def add(self, token_ids: TokenIds) -> None:
        """Append one document; its last token is EOS."""
        self.add_many(token_ids, np.array([len(token_ids)], dtype=np.int64))

    def add_many(self, token_ids: TokenIds, doc_lengths: npt.NDArray[np.int64]) -> None:
        """Append documents that lie back to back in `token_ids`, with these numbers of tokens.

        Raises:
            DataError: a document without a token or of too many, one that does not end in EOS, or an id
            outside the vocabulary or past what the dtype holds.
        """
        if len(doc_lengths) == 0:
            return
        if int(doc_lengths.min()) < 1 or int(doc_lengths.max()) > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"documents of {self.prefix} have {int(doc_lengths.min())} to {int(doc_lengths.max())} "
                f"tokens; a shard holds 1 to {MAX_DOCUMENT_TOKENS:,}"
            )
        ends = np.cumsum(doc_lengths)
        assert int(ends[-1]) == len(token_ids), "lengths of documents do not add up to the tokens"
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"token ids {low}..{high} of {self.prefix} are outside the vocabulary of {self.vocab_size}"
            )
        largest = int(np.iinfo(self.dtype).max)
        if high > largest:
            raise DataError(
                f"token id {high} of {self.prefix} does not fit into {self.dtype}, which ends at {largest}; "
                "write the shard as int32"
            )
        unfinished = np.flatnonzero(token_ids[ends - 1] != self.eos_id)
        if len(unfinished):
            number = int(unfinished[0])
            raise DataError(
                f"document {number} of those given to {self.prefix} ends in id "
                f"{int(token_ids[ends[number] - 1])}, not in EOS, {self.eos_id}"
            )
        payload = token_ids.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes()
        self._handle.write(payload)
        self._sha256.update(payload)
        self._xxh3.update(payload)
        self._sums.update(payload)
        self._num_bytes += len(payload)
        self._max_id = max(self._max_id, high)
        self._num_eos += int(np.count_nonzero(token_ids == self.eos_id))
        self._lengths.append(np.asarray(doc_lengths, dtype=np.int64))

    def close(self) -> ShardResult:
        """Make the files durable and visible, `.bin` first and `.idx` last."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int64)
        if len(lengths) == 0:
            self.abort()
            raise DataError(f"shard {self.prefix} would hold no document")
        index, sums = idx_bytes(lengths, self.dtype), self._sums.finish()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        contents = {sums_file(self.prefix): sums, self._idx_path: index}
        temporaries = {path: temporary_beside(path) for path in contents}
        try:
            for path, content in contents.items():
                with open(temporaries[path], "wb") as handle:
                    handle.write(content)
                    handle.flush()
                    os.fsync(handle.fileno())
            self._temporary.replace(self._bin_path)
            for path, temporary in temporaries.items():
                temporary.replace(path)
        except BaseException:
            for temporary in (self._temporary, *temporaries.values()):
                temporary.unlink(missing_ok=True)
            raise
        fsync_folder(self.prefix.parent)
        return ShardResult(
            num_documents=len(lengths),
            num_tokens=int(lengths.sum()),
            num_bytes=self._num_bytes,
            max_id=self._max_id,
            num_eos=self._num_eos,
            sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            xxh3_128=self._xxh3.hexdigest(),
            sums_xxh3_128=xxhash.xxh3_128_hexdigest(sums),
        )

    def abort(self) -> None:
        """Leave nothing behind."""
        self._handle.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if not self._handle.closed:
            self.abort()


def index_shard(prefix: Path, dtype: str, doc_lengths: npt.NDArray[np.int64], *, eos_id: int) -> ShardResult:
    """Write the .idx and .sums files of a .bin file that is there, and count and hash what it holds."""
    bin_path, idx_path = shard_files(prefix)
    sha256, xxh3, sums = hashlib.sha256(), xxhash.xxh3_128(), BlockSums()
    max_id, num_eos = 0, 0
    with open(bin_path, "rb") as handle:
        while payload := handle.read(4 * SUM_BLOCK_BYTES):
            for digest in (sha256, xxh3, sums):
                digest.update(payload)
            tokens = np.frombuffer(payload, dtype=np.dtype(dtype).newbyteorder("<"))
            max_id = max(max_id, int(tokens.max()))
            num_eos += int(np.count_nonzero(tokens == eos_id))
    index, all_sums = idx_bytes(doc_lengths, dtype), sums.finish()
    for path, content in ((sums_file(prefix), all_sums), (idx_path, index)):
        with atomic_write(path) as target:
            target.write(content)
    return ShardResult(
        num_documents=len(doc_lengths),
        num_tokens=int(doc_lengths.sum()),
        num_bytes=bin_path.stat().st_size,
        max_id=max_id,
        num_eos=num_eos,
        sha256=sha256.hexdigest(),
        idx_sha256=hashlib.sha256(index).hexdigest(),
        xxh3_128=xxh3.hexdigest(),
        sums_xxh3_128=xxhash.xxh3_128_hexdigest(all_sums),
    )


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a document of a shard came from."""

    document_id: str
    source: str
    path: str
    record: int
    """1-based number of the record in its file: line, row, or block; 1 when the file is the document."""


class ShardReader:
    """Read one shard through memory maps; no token is loaded before it is asked for.

    Shards that Megatron-LM or GPT-NeoX wrote open, too, in any of its integer types, and with several
    sequences a document: a document here is one of their sequences.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        bin_path, idx_path = shard_files(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path} is missing; run `llmtrain data` again, or restore the file")
        self.index = ShardIndex(idx_path)
        self.dtype = self.index.dtype
        self.num_documents = self.index.num_documents
        self.doc_lengths = self.index.doc_lengths
        """Tokens of each document, EOS counted."""
        item_bytes = np.dtype(self.dtype).itemsize
        self.num_tokens = self.index.num_tokens
        if bin_path.stat().st_size != self.num_tokens * item_bytes:
            raise DataError(
                f"{bin_path} has {bin_path.stat().st_size:,} bytes, "
                f"its index says {self.num_tokens * item_bytes:,}"
            )
        dtype = np.dtype(self.dtype).newbyteorder("<")
        self._tokens: TokenIds = (
            np.memmap(bin_path, dtype=dtype, mode="r") if self.num_tokens else np.zeros(0, dtype=dtype)
        )
        self._lineage: dict[str, list[Any]] | None = None

    def tokens(self, start: int, length: int) -> TokenIds:
        """A copy of `length` tokens from token number `start` of the shard."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise DataError(
                f"tokens {start}..{start + length} of {self.prefix} are outside its {self.num_tokens}"
            )
        return np.array(self._tokens[start : start + length])

    def document(self, number: int) -> TokenIds:
        """All tokens of document `number`, EOS included."""
        return self.tokens(self.document_start(number), int(self.doc_lengths[number]))

    def document_at(self, token: int) -> int:
        """Number of the document that holds token number `token`."""
        return self.index.document_at(token)

    def document_start(self, number: int) -> int:
        """Number of the first token of document `number`."""
        return self.index.start(number)

    def lineage(self, number: int) -> Lineage:
        """Where document `number` came from; reads `<prefix>.docs.parquet` at the first call."""
        if self._lineage is None:
            import pyarrow.parquet as pq  # noqa: PLC0415 - 40 MB that a reader of tokens does not need

            table = pq.read_table(lineage_file(self.prefix))
            self._lineage = table.select(["id", "source", "path", "record"]).to_pydict()
        columns = self._lineage
        return Lineage(
            document_id=columns["id"][number],
            source=columns["source"][number],
            path=columns["path"][number],
            record=columns["record"][number],
        )


class ShardIndex:
    """An `.idx` file, mapped: where documents begin. Nothing of it is copied, however many there are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as handle:
            header = handle.read(IDX_HEADER_BYTES)
        if len(header) < IDX_HEADER_BYTES or not header.startswith(IDX_MAGIC):
            raise DataError(f"{path} is not a shard index: it begins with {header[:9]!r}, not {IDX_MAGIC!r}")
        version = int.from_bytes(header[9:17], "little")
        names = {code: name for name, code in DTYPE_CODES.items()}
        if version != IDX_VERSION or header[17] not in names:
            raise DataError(
                f"{path} has version {version} and dtype code {header[17]}; known: 1, with {names}"
            )
        self.dtype = names[header[17]]
        self.item_bytes = np.dtype(self.dtype).itemsize
        self.num_documents = int.from_bytes(header[18:26], "little")
        num_indices = int.from_bytes(header[26:34], "little")
        expected = IDX_HEADER_BYTES + 12 * self.num_documents + 8 * num_indices
        if path.stat().st_size != expected:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, {self.num_documents} documents need {expected}"
            )
        self.num_indices = num_indices
        self.content = np.asarray(
            np.memmap(path, dtype="u1", mode="r")
        )  # compiled loops know plain arrays best
        self._pointers_at = IDX_HEADER_BYTES + 4 * self.num_documents
        self.doc_lengths: npt.NDArray[np.int32] = self.content[IDX_HEADER_BYTES : self._pointers_at].view(
            "<i4"
        )

    @property
    def num_tokens(self) -> int:
        """Where the last document ends."""
        if not self.num_documents:
            return 0
        return self.start(self.num_documents - 1) + int(self.doc_lengths[-1])

    def start(self, number: int) -> int:
        """Number of the first token of document `number`."""
        at = self._pointers_at + 8 * number
        return int.from_bytes(self.content[at : at + 8].tobytes(), "little") // self.item_bytes

    def document_at(self, token: int) -> int:
        """Number of the document that holds token number `token`."""
        return bisect.bisect_right(range(self.num_documents), token, key=self.start) - 1

    def starts(self) -> npt.NDArray[np.int64]:
        """Of every document: number of its first token."""
        end = self._pointers_at + 8 * self.num_documents
        return self.content[self._pointers_at : end].view("<i8").astype(np.int64) // self.item_bytes

    def document_indices(self) -> npt.NDArray[np.int64]:
        """The sequences at which Megatron's documents begin, and after the last their number."""
        begin = self._pointers_at + 8 * self.num_documents
        return self.content[begin : begin + 8 * self.num_indices].view("<i8").astype(np.int64)
