"""Shards of tokens in Megatron's `.bin`/`.idx` byte layout, one document per sequence.

Layout as read by Megatron-LM at d98e8a64 (`megatron/core/datasets/indexed_dataset.py`) and GPT-NeoX at
ea7aefd8; the bytes are in docs/data_format.md. The `.bin` file has no header: token ids, little endian,
documents back to back, EOS the last token of each. uint16 only up to a vocabulary of 65,499, the one
choice on which both code paths of Megatron agree.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import xxhash

from llmtrain.data.manifest import shard_files
from llmtrain.errors import DataError
from llmtrain.files import fsync_folder, temporary_beside

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_VERSION = 1
IDX_HEADER_BYTES = 34
DTYPE_CODES = {"uint16": 8, "int32": 4}
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
    sha256: str
    idx_sha256: str
    xxh3_128: str


class ShardWriter:
    """Write one shard. Its files appear at `close`, whole; without it (a crash, an error) nothing appears."""

    def __init__(self, prefix: Path, dtype: str, vocab_size: int) -> None:
        if dtype not in DTYPE_CODES:
            raise DataError(f"shards hold {' or '.join(DTYPE_CODES)}, not {dtype}")
        self.prefix = prefix
        self.dtype = dtype
        self.vocab_size = vocab_size
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin_path, self._idx_path = shard_files(prefix)
        self._temporary = temporary_beside(self._bin_path)
        self._handle = open(self._temporary, "wb")  # noqa: SIM115 - closed in close() or abort()
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_128()
        self._num_bytes = 0

    def add(self, token_ids: TokenIds) -> None:
        """Append one document; its last token should be EOS."""
        self.add_many(token_ids, np.array([len(token_ids)], dtype=np.int64))

    def add_many(self, token_ids: TokenIds, doc_lengths: npt.NDArray[np.int64]) -> None:
        """Append documents that lie back to back in `token_ids`, with these numbers of tokens."""
        if len(doc_lengths) == 0:
            return
        if int(doc_lengths.min()) < 1 or int(doc_lengths.max()) > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"documents of {self.prefix} have {int(doc_lengths.min())} to {int(doc_lengths.max())} "
                f"tokens; a shard holds 1 to {MAX_DOCUMENT_TOKENS:,}"
            )
        assert int(doc_lengths.sum()) == len(token_ids), "lengths of documents do not add up to the tokens"
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"token ids {low}..{high} of {self.prefix} are outside the vocabulary of {self.vocab_size}"
            )
        payload = token_ids.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes()
        self._handle.write(payload)
        self._sha256.update(payload)
        self._xxh3.update(payload)
        self._num_bytes += len(payload)
        self._lengths.append(np.asarray(doc_lengths, dtype=np.int64))

    def close(self) -> ShardResult:
        """Make both files durable and visible, `.bin` first."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int64)
        if len(lengths) == 0:
            self.abort()
            raise DataError(f"shard {self.prefix} would hold no document")
        index = idx_bytes(lengths, self.dtype)
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        index_temporary = temporary_beside(self._idx_path)
        try:
            with open(index_temporary, "wb") as handle:
                handle.write(index)
                handle.flush()
                os.fsync(handle.fileno())
            self._temporary.replace(self._bin_path)
            index_temporary.replace(self._idx_path)
        except BaseException:
            index_temporary.unlink(missing_ok=True)
            self._temporary.unlink(missing_ok=True)
            raise
        fsync_folder(self.prefix.parent)
        return ShardResult(
            num_documents=len(lengths),
            num_tokens=int(lengths.sum()),
            num_bytes=self._num_bytes,
            sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            xxh3_128=self._xxh3.hexdigest(),
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


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a document of a shard came from."""

    document_id: str
    source: str
    path: str
    record: int
    """1-based number of the record in its file: line, row, or block; 1 when the file is the document."""


class ShardReader:
    """Read one shard through memory maps; no token is loaded before it is asked for."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        bin_path, idx_path = shard_files(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path} is missing; run `llmtrain data` again, or restore the file")
        with open(idx_path, "rb") as handle:
            header = handle.read(IDX_HEADER_BYTES)
        if len(header) < IDX_HEADER_BYTES or not header.startswith(IDX_MAGIC):
            raise DataError(
                f"{idx_path} is not a shard index: it begins with {header[:9]!r}, not {IDX_MAGIC!r}"
            )
        version = int.from_bytes(header[9:17], "little")
        names = {code: name for name, code in DTYPE_CODES.items()}
        if version != IDX_VERSION or header[17] not in names:
            raise DataError(
                f"{idx_path} has version {version} and dtype code {header[17]}; known: 1, with {names}"
            )
        self.dtype = names[header[17]]
        self.num_documents = int.from_bytes(header[18:26], "little")
        expected = IDX_HEADER_BYTES + 20 * self.num_documents + 8
        if idx_path.stat().st_size != expected:
            raise DataError(
                f"{idx_path} has {idx_path.stat().st_size} bytes, "
                f"{self.num_documents} documents need {expected}"
            )
        index = np.memmap(idx_path, dtype="u1", mode="r")
        lengths_end = IDX_HEADER_BYTES + 4 * self.num_documents
        self.doc_lengths: npt.NDArray[np.int32] = index[IDX_HEADER_BYTES:lengths_end].view("<i4")
        """Tokens of each document, EOS counted."""
        item_bytes = np.dtype(self.dtype).itemsize
        self._starts = index[lengths_end : lengths_end + 8 * self.num_documents].view("<i8") // item_bytes
        self.num_tokens = int(self.doc_lengths.sum(dtype=np.int64))
        if bin_path.stat().st_size != self.num_tokens * item_bytes:
            raise DataError(
                f"{bin_path} has {bin_path.stat().st_size:,} bytes, "
                f"its index says {self.num_tokens * item_bytes:,}"
            )
        self._tokens = np.memmap(bin_path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")
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
        return int(np.searchsorted(self._starts, token, side="right")) - 1

    def document_start(self, number: int) -> int:
        """Number of the first token of document `number`."""
        return int(self._starts[number])

    def lineage(self, number: int) -> Lineage:
        """Where document `number` came from; reads `<prefix>.docs.parquet` at the first call."""
        if self._lineage is None:
            table = pq.read_table(self.prefix.with_name(f"{self.prefix.name}.docs.parquet"))
            self._lineage = table.select(["id", "source", "path", "record"]).to_pydict()
        columns = self._lineage
        return Lineage(
            document_id=columns["id"][number],
            source=columns["source"][number],
            path=columns["path"][number],
            record=columns["record"][number],
        )
