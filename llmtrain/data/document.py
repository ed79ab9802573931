"""What a source yields: documents and bad records, and what normalising does to a text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_LINE_END = re.compile("\r\n?")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")

BAD_REASONS = {
    "absurd_length": "longer than corpus.max_document_bytes",
    "absurd_nesting": "JSON or HTML with so many parts that reading it would take gigabytes or minutes",
    "broken_json": "not a JSON value",
    "broken_page": "an HTTP response whose body does not decode, or HTML that cannot be parsed",
    "corrupt_archive": "compressed data, WARC or Parquet that does not decode: what follows in it is lost",
    "invalid_utf8": "bytes, or half a surrogate pair, that are not UTF-8",
    "missing_field": "an object without the text field",
    "truncated_archive": "compressed data that ends too early: what came before is used, the rest is lost",
    "unreadable_file": "a file that cannot be opened or read",
    "wrong_type": "not an object, or a text field that is not text",
    "zip_bomb": "data that grows beyond corpus.max_expansion when it is unpacked: the rest is left out",
}
"""Why a record goes to the quarantine."""

SKIP_REASONS = {
    "http_status": "an HTTP response whose status is not 200",
    "no_text": "a page without text, or without main content",
    "not_a_page": "a WARC record that holds no page: a request, metadata, a revisit",
    "not_text": "an HTTP response that is neither HTML nor plain text",
}
"""Why a record that is whole is still no document. Most records of a crawl are like that."""


@dataclass(slots=True)
class Document:
    text: bytes
    """UTF-8, if the record is good; checked later."""
    position: int
    """Byte of the (decompressed) file at which it begins, or its row: does not depend on the cut into
    slices."""
    source: str | None
    """None: the slice's source."""
    url: str | None = None
    metadata: dict[str, str] | None = None
    """What corpus.metadata_fields asks for, as text; numbers, lists and objects as JSON. None: nothing of
    it."""


@dataclass(slots=True)
class BadRecord:
    reason: str
    num_bytes: int
    detail: str


@dataclass(slots=True)
class Skipped(BadRecord):
    """A record that is in order but not what a corpus consists of. It is counted and written down like a bad
    one, under one of SKIP_REASONS, but does not count against max_quarantine_share."""


Record = Document | BadRecord | None
"""What a source yields. None: a blank line, which is no record but counts in the numbering."""


def utf8(text: str) -> str:
    """`text` with what UTF-8 cannot hold (half a surrogate pair, a byte of a file name) spelled out."""
    return text.encode(errors="backslashreplace").decode()


def normalize(text: str) -> str:
    """NFC with LF line ends, without control characters and byte order marks, trimmed.

    The definition; the scan does the same in compiled loops. Idempotent. LF at the start and spaces,
    tabs and LF at the end go; tabs and LF elsewhere stay.
    """
    without_controls = _CONTROL.sub("", _LINE_END.sub("\n", text))
    return unicodedata.normalize("NFC", without_controls.lstrip("\n").rstrip(" \t\n"))
