"""What a source yields: documents and bad records, and what normalising does to a text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_LINE_END = re.compile("\r\n?")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")

BAD_REASONS = {
    "absurd_length": "longer than corpus.max_document_bytes",
    "broken_json": "not a JSON value",
    "corrupt_archive": "compressed data or Parquet that does not decode: what follows in it is lost",
    "invalid_utf8": "bytes, or half a surrogate pair, that are not UTF-8",
    "missing_field": "an object without the text field",
    "truncated_archive": "compressed data that ends too early: what came before is used, the rest is lost",
    "unreadable_file": "a file that cannot be opened or read",
    "wrong_type": "not an object, or a text field that is not text",
}
"""Why a record goes to the quarantine."""


@dataclass(slots=True)
class Document:
    text: bytes
    """UTF-8, if the record is good; checked later."""
    position: int
    """Byte of the (decompressed) file at which it begins, or its row: does not depend on the cut into
    slices."""
    source: str | None
    """None: the slice's source."""


@dataclass(slots=True)
class BadRecord:
    reason: str
    num_bytes: int
    detail: str


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
