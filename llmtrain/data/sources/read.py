"""From a corpus's settings to work units, and from a unit to documents and bad records.

A unit is a list of slices of files. Cutting elsewhere gives the same records in the same order: a line
belongs to the slice in which it begins, and compressed files and row groups are never cut.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from llmtrain.data.document import BadRecord, Document, utf8
from llmtrain.data.folder import is_output
from llmtrain.data.sources import python_docs
from llmtrain.data.sources.config import CorpusConfig, Format, TextUnit
from llmtrain.errors import DataError

READ_BYTES = 1 << 20
ROWS_A_BATCH = 1000
MAX_ESCAPE_FACTOR = 6
"""Bytes of a JSON line for each byte of its text, at worst: `\\u0000`."""
MAX_ZSTD_WINDOW = 1 << 31
"""The largest that zstd itself writes (`--ultra --long=31`); a frame says how much it needs."""

Record = Document | BadRecord | None
"""None: a blank line, which is no record but counts in the numbering."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of one file."""

    path: str
    """Where to read it."""
    name: str
    """What lineage calls it, and document ids are made of."""
    source: str
    start: int
    """First byte or row; lines that begin before it belong to the slice before."""
    end: int
    """Byte or row to stop at, excluded."""
    num_bytes: int
    """Input bytes, for progress and balance."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one call of the scan reads."""

    number: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    units: list[Unit]
    fingerprint: list[Any]
    """JSON of what identifies the input: names, sizes and change times."""


def plan_units(cfg: CorpusConfig, unit_bytes: int, *, out: Path | None = None) -> Plan:
    """List the input, cut it and group the pieces into units of about `unit_bytes`.

    Args:
        out: data folder whose own files are no input, should they lie inside corpus.paths.
    """
    if cfg.format is Format.python_docs:
        slices, fingerprint = _python_docs_slices(cfg)
    elif cfg.format is Format.datasets:
        slices, fingerprint = _dataset_slices(cfg, unit_bytes)
    else:
        paths = find_files(cfg.paths, out=out)
        stats = [path.stat() for path in paths]
        fingerprint = [
            [utf8(str(path)), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)
        ]
        cut = _row_group_slices if cfg.format is Format.parquet else _byte_slices
        slices = [piece for path in paths for piece in cut(path, cfg, unit_bytes)]
    return Plan(units=_group(slices, unit_bytes), fingerprint=fingerprint)


def find_files(patterns: list[str], *, out: Path | None = None) -> list[Path]:
    """Files that the patterns name, each once, sorted; what a run into `out` wrote is left out.

    A folder stands for every file inside it, but hidden ones, as in a glob. A file that is reached by
    several names counts under the first of them.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        literal = Path(pattern)
        matches = [literal] if literal.exists() else [Path(name) for name in glob(pattern, recursive=True)]
        files = [file for match in matches for file in _files_of(match)]
        if not files:
            what = "is a folder without files" if matches else "matches no file"
            raise DataError(f"corpus.paths: {pattern!r} {what} (looked from {Path.cwd()})")
        for file in files:
            real = file.resolve()
            if out is None or not is_output(out, real):
                found[real] = min(file, found.get(real, file))
    return sorted(found.values())


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for inside in path.rglob("*"):
            is_hidden = any(part.startswith(".") for part in inside.relative_to(path).parts)
            if not is_hidden and inside.is_file():
                yield inside


def read_unit(unit: Unit, cfg: CorpusConfig) -> Iterator[tuple[Slice, Iterator[Record]]]:
    """Yield each slice with its records. A slice's records must be used up before the next is asked for."""
    if cfg.format is Format.python_docs:
        yield from _read_python_docs(unit)
        return
    reader: dict[Format, Callable[[Slice, CorpusConfig], Iterator[Record]]] = {
        Format.jsonl: _read_jsonl,
        Format.parquet: _read_parquet,
        Format.text: _read_text,
        Format.datasets: _read_dataset,
    }
    for piece in unit.slices:
        num_rows = piece.end - piece.start if cfg.format in (Format.parquet, Format.datasets) else 0
        yield piece, _guarded(reader[cfg.format](piece, cfg), num_rows)


def _guarded(records: Iterator[Record], num_rows: int) -> Iterator[Record]:
    """Turn an error of the file itself into bad records: one for each row that is lost, or one."""
    num_read = 0
    try:
        for record in records:
            num_read += 1
            yield record
    except (OSError, pa.ArrowException) as error:
        is_unreadable = isinstance(error, OSError) and error.errno is not None  # Arrow's own have none
        reason = "unreadable_file" if is_unreadable else "corrupt_archive"
        for _ in range(max(1, num_rows - num_read)):
            yield BadRecord(reason, 0, str(error))


def _group(slices: list[Slice], unit_bytes: int) -> list[Unit]:
    """Put neighbours together until a unit has `unit_bytes`."""
    ends, filled = [], 0
    for piece in slices:
        ends.append(filled // unit_bytes)
        filled += piece.num_bytes
    parts = groupby(zip(ends, slices, strict=True), key=lambda item: item[0])
    return [
        Unit(number=number, slices=tuple(piece for _, piece in part))
        for number, (_, part) in enumerate(parts)
    ]


# Lines: jsonl and text.


def _byte_slices(path: Path, cfg: CorpusConfig, unit_bytes: int) -> list[Slice]:
    size = path.stat().st_size
    may_cut = path.suffix not in (".gz", ".zst") and (
        cfg.format is Format.jsonl or cfg.text_unit is TextUnit.line
    )
    step = unit_bytes if may_cut else max(1, size)
    return [
        Slice(
            path=str(path),
            name=utf8(str(path)),
            source=utf8(path.name.split(".")[0]),
            start=start,
            end=min(start + step, size) if may_cut else size,
            num_bytes=min(step, size - start),
        )
        for start in range(0, max(1, size), step)
    ]


class _BadInput(Exception):
    """A stream that ended or broke too early."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _blocks(path: str, start: int) -> Iterator[bytes]:
    """The file's bytes from `start` on, decompressed."""
    new_decoder: Callable[[], Any] | None = None
    if path.endswith(".gz"):
        new_decoder = lambda: zlib.decompressobj(wbits=31)  # noqa: E731
    elif path.endswith(".zst"):
        new_decoder = lambda: zstandard.ZstdDecompressor(  # noqa: E731
            max_window_size=MAX_ZSTD_WINDOW
        ).decompressobj()
    with open(path, "rb") as handle:
        handle.seek(start)
        decoder = None
        may_be_padding = False
        while block := handle.read(READ_BYTES):
            if new_decoder is None:
                yield block
                continue
            while block:
                if may_be_padding and decoder is None:
                    block = block.lstrip(b"\0")  # zeros behind a gzip member, as gzip(1) skips them
                    if not block:
                        break
                decoder = new_decoder() if decoder is None else decoder
                try:
                    yield decoder.decompress(block)
                except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                    raise _BadInput("corrupt_archive", str(error)) from error
                may_be_padding = path.endswith(".gz")
                block = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
        if decoder is not None:
            raise _BadInput("truncated_archive", "the compressed data ends before its end mark")


def _lines(piece: Slice, max_bytes: int) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (position, line without its end, bytes) of each line that begins in the slice; None: over
    `max_bytes`."""
    skip_first = piece.start > 0  # a line that began before belongs to the slice before
    position = piece.start - 1 if skip_first else 0
    is_compressed = piece.path.endswith((".gz", ".zst"))
    parts: list[bytes] = []  # of the line that is not at its end yet
    num_part_bytes = 0
    for block in _blocks(piece.path, position):
        *complete, rest = block.split(b"\n")
        for line in complete:
            num_bytes = num_part_bytes + len(line)
            if skip_first:
                skip_first = False
            else:
                if position >= piece.end and not is_compressed:
                    return
                whole = b"".join([*parts, line]) if parts else line
                yield position, whole if num_bytes <= max_bytes else None, num_bytes
            position += num_bytes + 1
            parts, num_part_bytes = [], 0
        if rest:
            if num_part_bytes <= max_bytes and not skip_first:
                parts.append(rest)
            num_part_bytes += len(rest)
        if skip_first and position + num_part_bytes >= piece.end:
            return  # no line begins in this slice
    if num_part_bytes and not skip_first and (position < piece.end or is_compressed):
        yield position, b"".join(parts) if num_part_bytes <= max_bytes else None, num_part_bytes


def _read_jsonl(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    try:
        for position, line, num_bytes in _lines(piece, MAX_ESCAPE_FACTOR * cfg.max_document_bytes):
            if line is None:
                yield BadRecord("absurd_length", num_bytes, f"a line of {num_bytes:,} bytes")
            else:
                yield None if not line or line.isspace() else _parse_json(line, position, cfg)
    except _BadInput as error:
        yield BadRecord(error.reason, 0, str(error))


def _parse_json(line: bytes, position: int, cfg: CorpusConfig) -> Record:
    try:
        decoded = line.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        return BadRecord("invalid_utf8", len(line), str(error))
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return BadRecord("broken_json", len(line), str(error))
    if not isinstance(value, dict):
        return BadRecord(
            "wrong_type", len(line), f"a JSON value of type {type(value).__name__}, not an object"
        )
    if cfg.text_field not in value:
        detail = f"no field {cfg.text_field!r}; fields: {', '.join(sorted(value))}"
        return BadRecord("missing_field", len(line), detail)
    text = value[cfg.text_field]
    if not isinstance(text, str):
        detail = f"field {cfg.text_field!r} is of type {type(text).__name__}, not text"
        return BadRecord("wrong_type", len(line), detail)
    source = value.get(cfg.source_field) if cfg.source_field else None
    return _document(text, position, None if source is None else utf8(str(source)))


def _document(text: str, position: int, source: str | None) -> Record:
    try:
        return Document(text.encode(), position, source)
    except UnicodeEncodeError as error:
        return BadRecord("invalid_utf8", len(text), f"half a surrogate pair: {error}")


def _read_text(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    if cfg.text_unit is TextUnit.file:
        yield from _read_whole(piece, cfg)
        return
    try:
        yield from _text_lines(piece, cfg) if cfg.text_unit is TextUnit.line else _text_blocks(piece, cfg)
    except _BadInput as error:
        yield BadRecord(error.reason, 0, str(error))


def _text_lines(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    for position, line, num_bytes in _lines(piece, cfg.max_document_bytes):
        if line is None:
            yield BadRecord("absurd_length", num_bytes, f"a line of {num_bytes:,} bytes")
        else:
            yield Document(line, position, None) if line.strip() else None


def _text_blocks(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    block: list[bytes] = []
    block_start = num_block_bytes = 0
    for position, line, num_bytes in _lines(piece, cfg.max_document_bytes):
        if line is None or line.strip():
            if not num_block_bytes:
                block_start = position
            num_block_bytes += num_bytes + 1
            if line is not None and num_block_bytes <= cfg.max_document_bytes + 1:
                block.append(line)
        elif num_block_bytes:
            yield _block(block, num_block_bytes, block_start, cfg)
            block, num_block_bytes = [], 0
    if num_block_bytes:
        yield _block(block, num_block_bytes, block_start, cfg)


def _block(lines: list[bytes], num_bytes: int, position: int, cfg: CorpusConfig) -> Record:
    if num_bytes > cfg.max_document_bytes + 1:
        return BadRecord("absurd_length", num_bytes, f"a block of {num_bytes:,} bytes")
    return Document(b"\n".join(lines), position, None)


def _read_whole(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    parts, num_bytes = [], 0
    try:
        for block in _blocks(piece.path, 0):
            num_bytes += len(block)
            if num_bytes <= cfg.max_document_bytes:
                parts.append(block)
    except _BadInput as error:
        yield BadRecord(error.reason, num_bytes, str(error))
        return
    if num_bytes > cfg.max_document_bytes:
        yield BadRecord("absurd_length", num_bytes, f"a file of {num_bytes:,} bytes")
    else:
        yield Document(b"".join(parts), 0, None)


# Rows: parquet and datasets.


def _row_group_slices(path: Path, cfg: CorpusConfig, unit_bytes: int) -> list[Slice]:
    del unit_bytes  # a row group is never cut
    name, source = utf8(str(path)), utf8(path.stem)
    try:
        with _open_parquet(str(path)) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError):  # reading it fails again, and is counted there
        size = path.stat().st_size
        return [Slice(path=str(path), name=name, source=source, start=0, end=0, num_bytes=size)]
    for column in (cfg.text_field, *([cfg.source_field] if cfg.source_field else [])):
        _check_column(str(path), column, schema.names)
    _check_text_type(str(path), cfg.text_field, schema.field(cfg.text_field).type)
    slices, row = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        slices.append(
            Slice(
                path=str(path),
                name=name,
                source=source,
                start=row,
                end=row + group.num_rows,
                num_bytes=max(1, group.total_byte_size),
            )
        )
        row += group.num_rows
    return slices


def _open_parquet(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(pa.OSFile(os.fsencode(path)))  # bytes: a name need not be UTF-8


def _check_column(where: str, column: str, known: list[str]) -> None:
    if known.count(column) > 1:
        raise DataError(f"{where} has {known.count(column)} columns {column!r}; rename all but one")
    if column not in known:
        raise DataError(
            f"{where} has no column {column!r}; columns: {', '.join(known)}. "
            "Set corpus.text_field (and corpus.source_field) to the ones that hold the text (and its source)"
        )


def _check_text_type(where: str, column: str, kind: pa.DataType) -> None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(
            f"column {column!r} of {where} holds {kind}, not text; set corpus.text_field to another"
        )


def _read_parquet(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    with _open_parquet(piece.path) as file:
        row, groups = 0, []
        for number in range(file.metadata.num_row_groups):
            if piece.start <= row < piece.end:
                groups.append(number)
            row += file.metadata.row_group(number).num_rows
        columns = [cfg.text_field, *([cfg.source_field] if cfg.source_field else [])]
        batches = file.iter_batches(batch_size=ROWS_A_BATCH, row_groups=groups, columns=columns)
        yield from _rows(batches, piece.start, cfg)


def _rows(batches: Iterator[pa.RecordBatch], first_row: int, cfg: CorpusConfig) -> Iterator[Record]:
    row = first_row
    for batch in batches:
        texts = batch.column(cfg.text_field).cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        sources = _source_names(batch.column(cfg.source_field)) if cfg.source_field else [None] * len(texts)
        for text, source in zip(texts, sources, strict=True):
            if text is None:
                yield BadRecord("wrong_type", 0, f"column {cfg.text_field!r} is null")
            else:
                yield Document(text, row, source)
            row += 1


def _source_names(column: pa.Array) -> list[str | None]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):  # may be no UTF-8
        raw = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [None if name is None else name.decode(errors="backslashreplace") for name in raw]
    return [None if value is None else utf8(str(value)) for value in column.to_pylist()]


def _dataset_slices(cfg: CorpusConfig, unit_bytes: int) -> tuple[list[Slice], list[Any]]:
    dataset = _open_dataset(cfg)
    for column in (cfg.text_field, *([cfg.source_field] if cfg.source_field else [])):
        _check_column(f"data set {cfg.dataset!r}", column, dataset.column_names)
    _check_text_type(
        f"data set {cfg.dataset!r}", cfg.text_field, dataset.features.arrow_schema.field(cfg.text_field).type
    )
    num_rows = len(dataset)
    row_bytes = max(1, (dataset.data.nbytes or 0) // max(1, dataset.data.num_rows))
    step = max(1, unit_bytes // row_bytes)
    name = "/".join(part for part in (cfg.dataset, cfg.dataset_config, cfg.dataset_split) if part)
    slices = [
        Slice(
            path=str(cfg.dataset),
            name=name,
            source=str(cfg.dataset).rstrip("/").split("/")[-1],
            start=start,
            end=min(start + step, num_rows),
            num_bytes=row_bytes * (min(start + step, num_rows) - start),
        )
        for start in range(0, num_rows, step)
    ]
    return slices, [dataset._fingerprint]  # the one identity of a data set's content; there is no public name


def _open_dataset(cfg: CorpusConfig) -> Any:  # Any: `datasets` is untyped
    return _cached_dataset(
        cfg.dataset or "",
        cfg.dataset_config,
        cfg.dataset_split,
        tuple(cfg.dataset_files),
        cfg.dataset_on_disk,
    )


@lru_cache(maxsize=1)
def _cached_dataset(
    path: str, config: str | None, split: str | None, files: tuple[str, ...], is_on_disk: bool
) -> Any:  # Any: `datasets` is untyped
    import datasets  # noqa: PLC0415 - takes over a second, and only this format needs it

    try:
        if is_on_disk:
            opened = datasets.load_from_disk(path)
            if isinstance(opened, datasets.DatasetDict) and split in opened:
                opened = opened[split]
        else:
            opened = datasets.load_dataset(path, config, split=split, data_files=list(files) or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set {path!r} cannot be opened: {error}") from error
    if isinstance(opened, dict):
        raise DataError(
            f"data set {path!r} has no split {split!r}; set corpus.dataset_split to one of {sorted(opened)}"
        )
    return opened


def _read_dataset(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    columns = [cfg.text_field, *([cfg.source_field] if cfg.source_field else [])]
    dataset = _open_dataset(cfg).select_columns(columns).with_format("arrow")
    starts = range(piece.start, piece.end, ROWS_A_BATCH)
    tables = (dataset[start : min(start + ROWS_A_BATCH, piece.end)] for start in starts)
    yield from _rows((batch for table in tables for batch in table.to_batches()), piece.start, cfg)


# This Python installation.


def _python_docs_slices(cfg: CorpusConfig) -> tuple[list[Slice], list[Any]]:
    files = python_docs.draw_order(python_docs.installed_files(), cfg.draw_seed)
    slices = [
        Slice(
            path=file.path,
            name=file.name,
            source=file.source,
            start=0,
            end=file.num_bytes,
            num_bytes=file.num_bytes,
        )
        for file in files
    ]
    return slices, [[file.name, file.num_bytes, file.changed_ns] for file in files]


def _read_python_docs(unit: Unit) -> Iterator[tuple[Slice, Iterator[Record]]]:
    contents: list[bytes | BadRecord] = []
    for piece in unit.slices:
        try:
            contents.append(Path(piece.path).read_bytes())
        except OSError as error:
            contents.append(BadRecord("unreadable_file", 0, str(error)))
    is_code = [piece.path.endswith(".py") for piece in unit.slices]
    code = [text for text, flag in zip(contents, is_code, strict=True) if flag and isinstance(text, bytes)]
    extracted = iter(python_docs.extract(code))
    for piece, content, flag in zip(unit.slices, contents, is_code, strict=True):
        if isinstance(content, BadRecord):
            yield piece, iter([content])
        else:
            yield piece, iter([Document(next(extracted) if flag else content, 0, None)])
