"""Files of lines: JSONL, and plain text with a document for each file, block or line.

A line belongs to the slice in which it begins, so cutting elsewhere gives the same records. No line is held
beyond a bound, whatever its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from llmtrain.data.document import BadRecord, Document, Record
from llmtrain.data.sources.config import CorpusConfig, TextUnit
from llmtrain.data.sources.fields import MISSING, as_text, find
from llmtrain.data.sources.files import InputFile, open_file
from llmtrain.data.sources.slices import BadInput, Digest, Slice
from llmtrain.data.sources.streams import (
    MAGIC_BYTES,
    PLAIN,
    SliceBytes,
    blocks,
    compression_inside,
    compression_of,
)

MAX_ESCAPE_FACTOR = 6
"""Bytes of a JSON line for each byte of its text, at worst: `\\u0000`."""
LARGE_JSON_BYTES = 1 << 20
"""A line above this is measured before it is parsed."""
MAX_JSON_STRUCTURE_BYTES = 4 << 20
"""What a large line may have besides the insides of its strings: `[],[],...` and `"ab","ab",...` take over 20
times as much memory once they are parsed, so this much takes 100 MB."""
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
"""Possessive, for else a hundred megabytes of escapes take gigabytes; a string without an end goes to the
end of the line, so that no byte is looked at twice."""
_DEEP = "Recursion limit reached"
"""What orjson says of JSON that is nested beyond 1024 levels."""


def cut_file(file: InputFile, *, unit_bytes: int, is_cut_anywhere: bool) -> list[Slice]:
    """Slices of about `unit_bytes`; one when the file is compressed, or `is_cut_anywhere` is false."""
    may_cut = is_cut_anywhere and file.may_seek and compression_of(file.path) == PLAIN
    if may_cut and file.num_bytes > unit_bytes:
        may_cut = _is_plain_inside(file.path)
    step = unit_bytes if may_cut else max(1, file.num_bytes)
    return [
        Slice(
            path=file.path,
            name=file.name,
            source=file.source,
            start=start,
            end=min(start + step, file.num_bytes),
            num_bytes=min(step, file.num_bytes - start),
            version=file.version,
        )
        for start in range(0, max(1, file.num_bytes), step)
    ]


def _is_plain_inside(path: str) -> bool:
    """Whether the file can be cut: not when it is an archive under a wrong name, which is reported once."""
    try:
        with open_file(path) as handle:
            return compression_inside(handle.read(MAGIC_BYTES)) == PLAIN
    except OSError:  # reading it fails again, and is counted there
        return False


def lines(
    piece: Slice, digest: Digest, cfg: CorpusConfig, max_bytes: int
) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (position, line without its end, bytes) of each line that begins in the slice; None: over
    `max_bytes`.

    Raises:
        BadInput: from `blocks`, when what came before is yielded.
    """
    skip_first = piece.start > 0  # a line that began before belongs to the slice before
    position = piece.start - 1 if skip_first else 0
    with SliceBytes(piece, digest, position=position) as raw:
        end = piece.end if raw.compression == PLAIN and piece.end else 1 << 62
        parts: list[bytes] = []  # of the line that is not at its end yet
        num_part_bytes = 0
        for block in blocks(raw, is_start=not skip_first, max_expansion=cfg.max_expansion):
            *complete, rest = block.split(b"\n")
            for line in complete:
                num_bytes = num_part_bytes + len(line)
                if skip_first:
                    skip_first = False
                else:
                    if position >= end:
                        return
                    if parts:
                        parts.append(line)
                        line = b"".join(parts)
                    yield position, line if num_bytes <= max_bytes else None, num_bytes
                position += num_bytes + 1
                if num_part_bytes:
                    parts, num_part_bytes = [], 0
            if rest:
                num_part_bytes += len(rest)
                if num_part_bytes > max_bytes:
                    parts = []
                elif not skip_first:
                    parts.append(rest)
            if skip_first and position + num_part_bytes >= end:
                return  # no line begins in this slice
        if num_part_bytes and not skip_first and position < end:
            yield position, b"".join(parts) if num_part_bytes <= max_bytes else None, num_part_bytes


def read_jsonl(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    has_extras = bool(cfg.source_field or cfg.url_field or cfg.metadata_fields)
    text_field = cfg.text_field
    try:
        for position, line, num_bytes in lines(
            piece, digest, cfg, MAX_ESCAPE_FACTOR * cfg.max_document_bytes
        ):
            if line is None:
                yield BadRecord("absurd_length", num_bytes, f"a line of {num_bytes:,} bytes")
                continue
            if not line or line.isspace():
                yield None
                continue
            value = _parse(line, position)
            if isinstance(value, BadRecord):
                yield value
                continue
            text = value.get(text_field, MISSING)
            if not isinstance(text, str):
                text = find(value, text_field)
                if not isinstance(text, str):
                    yield _no_text(text, value, text_field, num_bytes)
                    continue
            try:
                document = Document(text.encode(), position, None)
            except UnicodeEncodeError as error:
                yield BadRecord("invalid_utf8", num_bytes, f"half a surrogate pair: {error}")
                continue
            if has_extras:
                _add_extras(document, value, line, cfg)
            yield document
    except BadInput as error:
        yield BadRecord(error.reason, 0, str(error))


def _parse(line: bytes, position: int) -> dict[str, Any] | BadRecord:
    """The object on a line.

    orjson reads it, 2 to 5 times as fast as `json` (measured on documents of 3 kB and of 150 bytes). What
    orjson refuses is given to `json`, which takes more: NaN and infinities, as Python and pandas write them,
    and half surrogate pairs, which must be told from broken JSON.
    """
    if position == 0 and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    if len(line) > LARGE_JSON_BYTES and (num_bytes := _structure_bytes(line)) > MAX_JSON_STRUCTURE_BYTES:
        detail = f"{num_bytes:,} bytes of brackets, commas, quotes and numbers; parsed, "
        detail += "they take over 20 times as much memory"
        return BadRecord("absurd_nesting", len(line), detail)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as first_error:
        if _DEEP in str(first_error):
            return BadRecord("broken_json", len(line), str(first_error))
        try:
            decoded = line.decode()
        except UnicodeDecodeError as error:
            return BadRecord("invalid_utf8", len(line), str(error))
        try:
            value = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            return BadRecord("broken_json", len(line), str(error))
    if not isinstance(value, dict):
        detail = f"a JSON value of type {type(value).__name__}, not an object"
        return BadRecord("wrong_type", len(line), detail)
    return value


def _structure_bytes(line: bytes) -> int:
    """Bytes that are not inside a string."""
    return len(line) - sum(match.end() - match.start() - 2 for match in _JSON_STRING.finditer(line))


def _no_text(text: Any, value: dict[str, Any], text_field: str, num_bytes: int) -> BadRecord:
    if text is MISSING:
        detail = f"no field {text_field!r}; fields: {', '.join(sorted(value))}"
        return BadRecord("missing_field", num_bytes, detail)
    detail = f"field {text_field!r} is of type {type(text).__name__}, not text"
    return BadRecord("wrong_type", num_bytes, detail)


def _add_extras(document: Document, value: dict[str, Any], line: bytes, cfg: CorpusConfig) -> None:
    def text_of(name: str) -> str | None:
        found = find(value, name)
        if isinstance(found, float) and abs(found) >= 2.0**63:  # a large integer: orjson rounds it
            found = find(json.loads(line.decode("utf-8-sig")), name)
        return as_text(found)

    if cfg.source_field:
        document.source = text_of(cfg.source_field)
    if cfg.url_field:
        document.url = text_of(cfg.url_field)
    if cfg.metadata_fields:
        named = ((name, text_of(name)) for name in cfg.metadata_fields)
        document.metadata = {name: text for name, text in named if text is not None} or None


# Plain text.


def read_text(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    read = {TextUnit.file: _whole, TextUnit.block: _text_blocks, TextUnit.line: _text_lines}[cfg.text_unit]
    try:
        yield from read(piece, digest, cfg)
    except BadInput as error:
        yield BadRecord(error.reason, 0, str(error))


def _text_lines(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    for position, line, num_bytes in lines(piece, digest, cfg, cfg.max_document_bytes):
        if line is None:
            yield BadRecord("absurd_length", num_bytes, f"a line of {num_bytes:,} bytes")
        else:
            yield Document(line, position, None) if line.strip() else None


def _text_blocks(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    block: list[bytes] = []
    block_start = num_block_bytes = 0
    try:
        for position, line, num_bytes in lines(piece, digest, cfg, cfg.max_document_bytes):
            if line is None or line.strip():
                if not num_block_bytes:
                    block_start = position
                num_block_bytes += num_bytes + 1
                if line is not None and num_block_bytes <= cfg.max_document_bytes + 1:
                    block.append(line)
                else:
                    block = []
            elif num_block_bytes:
                yield _block(block, num_block_bytes, block_start, cfg)
                block, num_block_bytes = [], 0
    except BadInput:
        if num_block_bytes:
            yield _block(block, num_block_bytes, block_start, cfg)
        raise
    if num_block_bytes:
        yield _block(block, num_block_bytes, block_start, cfg)


def _block(found: list[bytes], num_bytes: int, position: int, cfg: CorpusConfig) -> Record:
    if num_bytes > cfg.max_document_bytes + 1:
        return BadRecord("absurd_length", num_bytes - 1, f"a block of {num_bytes - 1:,} bytes")
    return Document(b"\n".join(found), position, None)


def _whole(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    parts: list[bytes] = []
    num_bytes = 0
    with SliceBytes(piece, digest) as raw:
        try:
            for block in blocks(raw, is_start=True, max_expansion=cfg.max_expansion):
                num_bytes += len(block)
                if num_bytes <= cfg.max_document_bytes:
                    parts.append(block)
                else:
                    parts = []
        except BadInput as error:
            yield BadRecord(error.reason, num_bytes, str(error))
            return
    if num_bytes > cfg.max_document_bytes:
        yield BadRecord("absurd_length", num_bytes, f"a file of {num_bytes:,} bytes")
    else:
        yield Document(b"".join(parts), 0, None)
