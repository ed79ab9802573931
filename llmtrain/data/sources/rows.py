"""Tables: Parquet files by row group.

Only the columns that are asked for are read, and hashed. Rows come in small batches, so that memory follows
the length of texts, not the size of a row group.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmtrain.data.document import BadRecord, Document, Record
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.data.sources.fields import as_text
from llmtrain.data.sources.files import InputFile, is_url, open_file
from llmtrain.data.sources.slices import BadInput, Digest, Slice
from llmtrain.data.sources.streams import EXPANSION_FLOOR_BYTES, SliceBytes
from llmtrain.errors import DataError

MAX_ROWS_A_BATCH = 64
"""Enough that a batch costs little (some 50 us), and few when every text is near the limit."""
BATCH_BYTES = 4 << 20
BUFFER_BYTES = 1 << 20

MAX_LOST_ROWS = 1_000_000
"""Of a row group, to be written down: a damaged file may claim any number."""

_ERRORS = (OSError, pa.ArrowException, ValueError, OverflowError)
"""What pyarrow raises of a damaged file."""


def row_group_slices(file: InputFile, cfg: CorpusConfig) -> list[Slice]:
    """One slice for each row group; they are never cut."""
    common = {"path": file.path, "name": file.name, "source": file.source, "version": file.version}
    try:
        with _open_parquet(file.path) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except DataError:
        raise
    except _ERRORS:  # reading it fails again, and is counted there
        return [Slice(**common, start=0, end=0, num_bytes=file.num_bytes)]
    check_columns(file.path, schema, cfg)
    slices, row = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        end = row + max(0, group.num_rows)
        if end > row:
            slices.append(Slice(**common, start=row, end=end, num_bytes=max(1, group.total_byte_size)))
        row = end
    return slices


def check_columns(where: str, schema: pa.Schema, cfg: CorpusConfig) -> None:
    """Raise DataError unless `schema` has the columns of the config, and the text's holds text."""
    for name in cfg.columns:
        _check_column(where, schema, name)
    kind: Any = _field_type(schema, cfg.text_field)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not _is_text(kind):
        raise DataError(
            f"column {cfg.text_field!r} of {where} holds {kind}, not text; set corpus.text_field to another"
        )


def _check_column(where: str, schema: pa.Schema, name: str) -> None:
    if schema.names.count(name) > 1:
        raise DataError(f"{where} has {schema.names.count(name)} columns {name!r}; rename all but one")
    if _field_type(schema, name) is None:
        raise DataError(
            f"{where} has no column {name!r}; columns: {', '.join(schema.names)}. "
            "Set corpus.text_field (and corpus.source_field, corpus.url_field, corpus.metadata_fields) to "
            "the ones that hold the text (and what goes with it)"
        )


def _field_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    if name in schema.names:
        return schema.field(name).type
    outer, *path = name.split(".")
    if schema.names.count(outer) != 1:
        return None
    kind = schema.field(outer).type
    for part in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _open_parquet(path: str) -> pq.ParquetFile:
    if is_url(path):
        return pq.ParquetFile(pa.PythonFile(open_file(path), mode="r"), pre_buffer=True)
    return pq.ParquetFile(pa.OSFile(os.fsencode(path)), buffer_size=BUFFER_BYTES)  # a name may be no UTF-8


def read_parquet(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    """Read one row group. What cannot be read of it counts row by row."""
    num_read, num_rows = 0, piece.end - piece.start
    try:
        for record in _read_row_group(piece, digest, cfg):
            num_read += 1
            if num_read > num_rows:
                raise BadInput("corrupt_archive", f"a row group of {num_rows:,} rows holds more")
            yield record
        if num_read < num_rows:
            raise BadInput("corrupt_archive", f"a row group of {num_rows:,} rows holds only {num_read:,}")
    except (*_ERRORS, BadInput) as error:
        if isinstance(error, DataError):
            raise
        is_unreadable = isinstance(error, OSError) and error.errno is not None  # Arrow's own have none
        reason = "unreadable_file" if is_unreadable else "corrupt_archive"
        if isinstance(error, BadInput):
            reason = error.reason
        for _ in range(min(max(1, num_rows - num_read), MAX_LOST_ROWS)):
            yield BadRecord(reason, 0, str(error))


def _read_row_group(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    if piece.end == piece.start == 0:  # it could not be opened when the input was listed
        with SliceBytes(piece, digest):
            pass
    with _open_parquet(piece.path) as file:
        row, number = 0, 0
        while number < file.metadata.num_row_groups and (
            row < piece.start or file.metadata.row_group(number).num_rows <= 0
        ):
            row += max(0, file.metadata.row_group(number).num_rows)
            number += 1
        if number == file.metadata.num_row_groups:
            return
        num_rows = max(1, file.metadata.row_group(number).num_rows)
        row_bytes = max(1, file.metadata.row_group(number).total_byte_size // num_rows)
        batches = file.iter_batches(
            batch_size=min(max(1, BATCH_BYTES // row_bytes), MAX_ROWS_A_BATCH),
            row_groups=[number],
            columns=cfg.columns,
        )
        share = num_rows / max(num_rows, file.metadata.num_rows)
        limit = share * max(EXPANSION_FLOOR_BYTES, cfg.max_expansion * _file_bytes(piece.path))
        yield from _bounded(rows(_hashed(batches, piece.start, digest), piece.start, cfg), limit)


def _file_bytes(path: str) -> int:
    with open_file(path) as handle:
        return handle.seek(0, io.SEEK_END)


def _hashed(batches: Iterator[pa.RecordBatch], first_row: int, digest: Digest) -> Iterator[pa.RecordBatch]:
    """Hash the columns as they come out. Their raw bytes could be hashed only by asking Arrow where they lie,
    and on a damaged footer that ends the process (pyarrow 26.0.1, RowGroupMetaData.column)."""
    row = first_row
    for batch in batches:
        plain = [
            column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            for column in batch.columns
        ]
        digest.add(row, pa.record_batch(plain, names=batch.schema.names).serialize())
        row += batch.num_rows
        yield batch


def _bounded(records: Iterator[Record], limit: float) -> Iterator[Record]:
    num_bytes = 0
    for record in records:
        if isinstance(record, Document):
            num_bytes += len(record.text)
            if num_bytes > limit:
                detail = f"a row group whose texts have more than {limit:,.0f} bytes"
                raise BadInput("zip_bomb", f"{detail}; raise corpus.max_expansion if that is right")
        yield record


def rows(batches: Iterator[pa.RecordBatch], first_row: int, cfg: CorpusConfig) -> Iterator[Record]:
    """Records of tables, numbered from `first_row` on."""
    row = first_row
    for batch in batches:
        texts = _text_column(batch, cfg.text_field)
        sources = _names(batch, cfg.source_field, len(texts))
        urls = _names(batch, cfg.url_field, len(texts))
        metadata = [(name, _names(batch, name, len(texts))) for name in cfg.metadata_fields]
        for at, text in enumerate(texts):
            if text is None:
                yield BadRecord("wrong_type", 0, f"column {cfg.text_field!r} is null")
            else:
                named = {name: value for name, values in metadata if (value := values[at]) is not None}
                yield Document(text, row, sources[at], urls[at], named or None)
            row += 1


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name in batch.schema.names:
        return batch.column(name)
    outer, *path = name.split(".")
    return pc.struct_field(batch.column(outer), path)


def _text_column(batch: pa.RecordBatch, name: str) -> list[bytes | None]:
    texts: list[bytes | None] = (
        _column(batch, name).cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    )
    return texts


def _names(batch: pa.RecordBatch, name: str | None, num_rows: int) -> Sequence[str | None]:
    if name is None:
        return [None] * num_rows
    column = _column(batch, name)
    if _is_text(column.type):  # may be no UTF-8
        raw = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="backslashreplace") for value in raw]
    return [as_text(value) for value in column.to_pylist()]
