"""Files of tokens that other frameworks wrote, opened: where the tokens lie and where documents end.

Layouts: Megatron-LM at d98e8a64 (`megatron/core/datasets/indexed_dataset.py`), datatrove at e1cae821
(`pipeline/tokens/tokenizer.py`), dolma at 110eaee6 (`python/dolma/tokenizer/memmap_writer.py`).
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain.data.formats.config import TokenFormat, TokenType
from llmtrain.data.shards import ShardIndex
from llmtrain.errors import DataError

SUFFIX = {TokenFormat.megatron: ".bin", TokenFormat.datatrove: ".ds", TokenFormat.olmo: ".npy"}
SCAN_TOKENS = 1 << 22
UINT16_VOCAB = 65_536
"""datatrove and dolma take 16 bits up to here."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DocumentRow:
    """What dolma's table says of a document."""

    id: str
    source: str
    record: int


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """One file of tokens."""

    path: Path
    dtype: str
    """`uint8` to `int64`, as numpy names them; little endian."""
    lengths: Int64
    """Tokens of each document; documents lie back to back."""
    rows: list[DocumentRow] | None = None

    def tokens(self) -> npt.NDArray[np.generic]:
        """All of them, mapped."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        if not self.path.stat().st_size:
            return np.zeros(0, dtype=dtype)
        return np.memmap(self.path, dtype=dtype, mode="r")


def companions(path: Path, kind: TokenFormat) -> list[Path]:
    """The files that go with a file of tokens, those that are there."""
    beside = {
        TokenFormat.megatron: [path.with_suffix(".idx")],
        TokenFormat.datatrove: [Path(f"{path}.index"), Path(f"{path}.metadata")],
        TokenFormat.olmo: [path.with_suffix(".csv.gz")],
    }
    return [each for each in beside[kind] if each.is_file()]


def open_foreign(
    path: Path, kind: TokenFormat, *, token_type: TokenType | None, vocab_size: int, eos_id: int
) -> Foreign:
    """Open a file of tokens.

    Args:
        token_type: for formats that do not say.
        vocab_size: decides the type where nothing else does.
        eos_id: ends documents where no file says where they end.

    Raises:
        DataError: a companion file is missing or does not fit the tokens.
    """
    if kind is TokenFormat.megatron:
        return _megatron(path)
    if kind is TokenFormat.datatrove:
        return _datatrove(path, token_type, vocab_size)
    return _olmo(path, token_type, vocab_size, eos_id)


def _megatron(path: Path) -> Foreign:
    idx_path = path.with_suffix(".idx")
    if not idx_path.is_file():
        raise DataError(f"{idx_path} is missing, so nothing says where the documents of {path} end")
    index = ShardIndex(idx_path)
    lengths = index.doc_lengths.astype(np.int64)
    if (lengths < 0).any() or not np.array_equal(index.starts(), np.cumsum(lengths) - lengths):
        raise DataError(f"{idx_path}: sequences do not lie back to back")
    begins = index.document_indices()
    if not (len(begins) and begins[0] == 0 and begins[-1] == len(lengths) and (np.diff(begins) >= 0).all()):
        raise DataError(f"{idx_path}: its document indices do not rise from 0 to {len(lengths):,} sequences")
    ends = np.concatenate([[0], np.cumsum(lengths)])[begins]
    return _checked(Foreign(path=path, dtype=index.dtype, lengths=np.diff(ends)))


def _datatrove(path: Path, token_type: TokenType | None, vocab_size: int) -> Foreign:
    index_path, metadata = Path(f"{path}.index"), Path(f"{path}.metadata")
    if not index_path.is_file():
        raise DataError(f"{index_path} is missing, so nothing says where the documents of {path} end")
    if token_type is None and metadata.is_file():
        size = metadata.read_text(encoding="utf-8").partition("\n")[0].rpartition("|")[2]
        token_type = {"2": TokenType.uint16, "4": TokenType.uint32}.get(size)
    if index_path.stat().st_size % 8:
        raise DataError(f"{index_path} has {index_path.stat().st_size} bytes, no multiple of 8")
    ends = np.fromfile(index_path, dtype="<u8").astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if (lengths < 0).any():
        raise DataError(f"{index_path}: the ends of documents do not rise")
    return _checked(Foreign(path=path, dtype=_type_name(token_type, vocab_size), lengths=lengths))


def _olmo(path: Path, token_type: TokenType | None, vocab_size: int, eos_id: int) -> Foreign:
    dtype = _type_name(token_type, vocab_size)
    table = path.with_suffix(".csv.gz")
    if not table.is_file():
        return _checked(Foreign(path=path, dtype=dtype, lengths=_lengths_by_eos(path, dtype, eos_id)))
    lengths, rows, at = [], [], 0
    with gzip.open(table, "rt", encoding="utf-8", newline="") as handle:
        for number, line in enumerate(csv.reader(handle), start=1):
            try:
                start, end, id_, source, record = int(line[0]), int(line[1]), *line[2:5]
                rows.append(DocumentRow(id=id_, source=source, record=int(record)))
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{table}, line {number} is not start,end,id,src,loc: {','.join(line)[:80]!r} ({error})"
                ) from None
            if start != at or end < start:
                raise DataError(f"{table}, line {number}: tokens {start} to {end} do not follow on {at}")
            lengths.append(end - start)
            at = end
    return _checked(Foreign(path=path, dtype=dtype, lengths=np.array(lengths, dtype=np.int64), rows=rows))


def _lengths_by_eos(path: Path, dtype: str, eos_id: int) -> Int64:
    tokens = Foreign(path=path, dtype=dtype, lengths=np.zeros(0, dtype=np.int64)).tokens()
    ends = [
        first + 1 + np.flatnonzero(tokens[first : first + SCAN_TOKENS] == eos_id)
        for first in range(0, len(tokens), SCAN_TOKENS)
    ]
    found = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    if found[-1] < len(tokens):
        found = np.append(found, len(tokens))
    return np.diff(found)


def _type_name(given: TokenType | None, vocab_size: int) -> str:
    if given is not None:
        return given.name
    return "uint16" if vocab_size <= UINT16_VOCAB else "uint32"


def _checked(found: Foreign) -> Foreign:
    told, size = int(found.lengths.sum()), found.path.stat().st_size
    if told * np.dtype(found.dtype).itemsize != size:
        raise DataError(
            f"{found.path} has {size:,} bytes; {len(found.lengths):,} documents with {told:,} tokens of "
            f"{found.dtype} need {told * np.dtype(found.dtype).itemsize:,}. Is it cut, or of another "
            "token_type?"
        )
    return found
