"""Web archives: pages of WARC files (ISO 28500) and texts of WET files, through fastwarc and resiliparse.

One record of the archive is one record here: a page of status 200 that is HTML or plain text becomes a
document, everything else is skipped with its reason. A record that is cut or damaged ends the file: what
follows cannot be found again.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastwarc.stream_io import BrotliReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, detect_mime, map_encoding_to_html5

from llmtrain.data.document import BadRecord, Document, Record, Skipped, utf8
from llmtrain.data.sources.config import CorpusConfig, Extraction
from llmtrain.data.sources.markup import MAX_WORK, extraction_work
from llmtrain.data.sources.slices import BadInput, Digest, Slice
from llmtrain.data.sources.streams import SliceBytes, blocks
from llmtrain.errors import ConfigError, DataError

MAX_HEADER_BYTES = 64 << 10
HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("text/plain",)

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)? +(\d{3})")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHUNK_HEAD = re.compile(rb"\r?\n?([0-9a-fA-F]{1,15})[^\r\n]*\r?\n")


def read_warc(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    extract = _extractor(cfg.extraction)
    try:
        with SliceBytes(piece, digest) as raw:
            stream = _Stream(blocks(raw, is_start=True, max_expansion=cfg.max_expansion))
            yield from _records(stream, extract, cfg)
    except BadInput as error:
        yield BadRecord(error.reason, 0, str(error))


def _records(stream: _Stream, extract: Callable[[str], str], cfg: CorpusConfig) -> Iterator[Record]:
    with _format_errors(stream):
        archive: Any = ArchiveIterator(
            stream, parse_http=False, stream_detect=False, max_header_len=MAX_HEADER_BYTES
        )
    while True:
        with _format_errors(stream):
            record = next(archive, None)
            block = None if record is None else _block_of(record, cfg)
        if record is None:
            return
        stream.last_record = record.stream_pos
        yield _read_record(record, block, extract, cfg)


@contextmanager
def _format_errors(stream: _Stream) -> Iterator[None]:
    """Turn what fastwarc says of a damaged archive into BadInput; what its stream raises goes through it."""
    try:
        yield
    except BaseException as error:
        is_format = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None)
        is_panic = type(error).__name__ == "PanicException"  # Rust's; its class cannot be imported
        if isinstance(error, DataError) or not (is_format or is_panic):
            raise
        place = "from its start on"
        if stream.last_record is not None:
            place = f"behind the record at byte {stream.last_record:,}"
        detail = f"{error}; the file is lost {place}"
        raise BadInput("corrupt_archive", detail) from error


class _Stream(io.RawIOBase):
    """Blocks as a file that fastwarc reads from."""

    def __init__(self, found: Iterator[bytes]) -> None:
        self._blocks = found
        self._rest = b""
        self.position = 0
        self.last_record: int | None = None
        """Where the last record began that was whole."""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes: what is there of the present block."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        found, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        self.position += len(found)
        return found


def _block_of(record: WarcRecord, cfg: CorpusConfig) -> bytes | None:
    """What a record holds, if it may be a page and is not too long."""
    declared = record.content_length
    length = record.headers.get("Content-Length") or ""
    if not length.strip().isdigit() or int(length) != declared:
        raise BadInput("corrupt_archive", f"a record whose Content-Length is {utf8(length)!r}")
    block = None
    if not declared or record.reader is None:
        block, num_bytes = b"", 0
    elif _may_be_page(record) and declared <= cfg.max_document_bytes:
        block = record.reader.read(declared)
        num_bytes = len(block)
    else:
        num_bytes = record.reader.consume(declared)
    if num_bytes < declared:
        raise BadInput("truncated_archive", f"a record of {declared:,} bytes ends after {num_bytes:,}")
    return block


def _may_be_page(record: WarcRecord) -> bool:
    is_response = record.record_type == WarcRecordType.response and record.is_http
    return is_response or record.record_type == WarcRecordType.conversion


def _read_record(
    record: WarcRecord, block: bytes | None, extract: Callable[[str], str], cfg: CorpusConfig
) -> Record:
    if not _may_be_page(record):
        return Skipped("not_a_page", record.content_length, f"a record of type {record.record_type}")
    if block is None:
        num_bytes = record.content_length
        return BadRecord("absurd_length", num_bytes, f"a record of {num_bytes:,} bytes")
    headers = record.headers
    content_type = headers.get("Content-Type") or ""
    is_wet = record.record_type == WarcRecordType.conversion
    if is_wet and not content_type.startswith(TEXT_TYPES):
        return Skipped("not_text", len(block), f"a conversion of type {utf8(content_type)}")
    found = block if is_wet else _page_text(block, extract, cfg)
    if isinstance(found, BadRecord):
        return found
    if not found.strip():
        return Skipped("no_text", len(block), "nothing is left after extraction")
    url = (headers.get("WARC-Target-URI") or "").strip("<>")
    date = headers.get("WARC-Date")
    metadata = {"warc_date": utf8(date)} if date else None
    return Document(found, record.stream_pos, None, utf8(url) or None, metadata)


def _page_text(block: bytes, extract: Callable[[str], str], cfg: CorpusConfig) -> bytes | BadRecord:
    """Text of an HTTP response, or why it has none."""
    head_end = _HEAD_END.search(block, 0, MAX_HEADER_BYTES)
    head, body = (block[: head_end.start()], block[head_end.end() :]) if head_end else (block, b"")
    status = _STATUS.match(head)
    if status is None:
        return BadRecord("broken_page", len(block), f"no HTTP status line: {head[:80]!r}")
    if status[1] != b"200":
        return Skipped("http_status", len(block), f"status {status[1].decode()}")
    headers = _http_headers(head)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind not in (*HTML_TYPES, *TEXT_TYPES):
        return Skipped("not_text", len(block), f"a page of type {utf8(kind)}")
    try:
        body = _decoded(body, headers, cfg.max_document_bytes)
    except BadInput as error:
        return BadRecord(error.reason, len(block), str(error))
    kind = kind or detect_mime(body)
    if kind not in (*HTML_TYPES, *TEXT_TYPES):
        return Skipped("not_text", len(block), f"a page that looks like {kind}")
    text = _text_of(body, headers.get("content-type", ""))
    if kind in HTML_TYPES:
        if (work := extraction_work(body)) > MAX_WORK:
            detail = f"tags are nested or filled so that extraction would take minutes: {work:,} steps"
            return BadRecord("absurd_nesting", len(block), detail)
        try:
            text = extract(text)
        except Exception as error:  # the parsers have errors of their own
            return BadRecord("broken_page", len(block), f"{type(error).__name__}: {error}")
    return text.encode(errors="replace")


def _http_headers(head: bytes) -> dict[str, str]:
    """The last of each header, by its name in lower case."""
    lines = head.decode("latin-1").splitlines()[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _decoded(body: bytes, headers: dict[str, str], limit: int) -> bytes:
    """Undo Transfer-Encoding and Content-Encoding. Archives often keep these headers although the body is
    decoded already, so a body that does not look encoded is taken as it is.

    Raises:
        BadInput: it does not decode, or to more than `limit` bytes.
    """
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _unchunked(body)
    encodings = headers.get("content-encoding", "").lower()
    looks_decoded = body.lstrip().startswith(b"<")
    try:
        if "gzip" in encodings and body.startswith(b"\x1f\x8b"):
            body = zlib.decompressobj(wbits=31).decompress(body, limit + 1)
        elif "deflate" in encodings and not looks_decoded:
            wbits = 15 if body.startswith(b"\x78") else -15  # some servers leave zlib's header out
            body = zlib.decompressobj(wbits=wbits).decompress(body, limit + 1)
        elif encodings == "br" and not looks_decoded:
            body = BrotliReader(io.BytesIO(body)).read(limit + 1)
    except (zlib.error, OSError) as error:
        raise BadInput("broken_page", f"a body that is no {encodings}: {error}") from error
    if len(body) > limit:
        raise BadInput("absurd_length", f"a page that unpacks to more than {limit:,} bytes")
    return body


def _unchunked(body: bytes) -> bytes:
    """The chunks of RFC 9112, section 7.1, joined; the body itself when it is not in chunks."""
    parts: list[bytes] = []
    at = 0
    while head := _CHUNK_HEAD.match(body, at):
        num_bytes = int(head[1], 16)
        if num_bytes == 0:
            return b"".join(parts)
        parts.append(body[head.end() : head.end() + num_bytes])
        at = head.end() + num_bytes
    return b"".join(parts) if parts and at >= len(body) else body


def _text_of(body: bytes, content_type: str) -> str:
    """Decode by the server's charset if that fits, else by the page's own, else by a guess."""
    declared = _CHARSET.search(content_type)
    if declared and (name := map_encoding_to_html5(declared[1], fallback_utf8=False)):
        try:
            return body.decode(name)
        except (LookupError, ValueError):  # unknown, or wrong
            pass
    encoding = detect_encoding(body, from_html_meta=True) or "utf-8"
    return bytes_to_str(body, encoding, fallback_encodings=["utf-8", "windows-1252"])


def _extractor(extraction: Extraction) -> Callable[[str], str]:
    if extraction is Extraction.trafilatura:
        try:
            import trafilatura  # noqa: PLC0415 - an optional dependency, of an extra
        except ImportError as error:
            raise ConfigError(
                f"corpus.extraction=trafilatura needs the package trafilatura ({error}): "
                "`pip install llmtrain[trafilatura]`, or set corpus.extraction=resiliparse"
            ) from error
        return lambda page: trafilatura.extract(page, favor_precision=True, include_comments=False) or ""
    is_main = extraction is Extraction.resiliparse
    return lambda page: extract_plain_text(page, main_content=is_main)
