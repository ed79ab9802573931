"""What a line is to deduplication: its hash, and how copies are cut out of a text.

Two lines are equal when their texts are, after white space at both ends is cut and letters are lower-cased,
one code point to one. Digits and punctuation count, unlike in CCNet (Wenzek et al. 2020, arXiv:1911.00359,
section 3.1). Only line feeds end lines. Hashes have 64 bits: of 1.25e10 different lines, a terabyte of text,
about 4 pairs are taken for equal.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled, compiled_lean
from llmtrain.data.dedup.config import LineConfig, LineUnit
from llmtrain.data.text.unicode_tables import tables
from llmtrain.data.text.utf8 import HIGH, ONES, as_kernels_read
from llmtrain.errors import DataError

LINE_DTYPE = np.dtype([("hash", "<u8"), ("row", "<i4"), ("start", "<i4"), ("end", "<i4")])
"""A line of document `row`: bytes start..end - 1 of its text, without the line end."""
SPAN_DTYPE = np.dtype([("row", "<i4"), ("start", "<i4"), ("end", "<i4")])
"""A line, or a paragraph, to remove."""

Lines = npt.NDArray[np.void]
Spans = npt.NDArray[np.void]

_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX2 = np.uint64(0xBF58476D1CE4E5B9)
_MIX3 = np.uint64(0x94D049BB133111EB)


@cache
def _lower_table() -> npt.NDArray[np.int32]:
    """The lower case of each code point, up to the last that has one."""
    shifts = tables().lower[tables().lower_pages].ravel()
    points = np.arange(len(shifts), dtype=np.int32)
    return (points + shifts)[: np.flatnonzero(shifts)[-1] + 1]


@compiled_lean
def _space_width(text: Any, at: int, end: int) -> int:
    """Bytes of the white space character at `at`, as str.isspace sees it; 0 for any other."""
    byte = text[at]
    if byte <= 32:
        return 1 if byte == 32 or 9 <= byte <= 13 or byte >= 28 else 0
    if byte < 0xC2 or byte > 0xE3:
        return 0
    if byte == 0xC2:
        return 2 if at + 1 < end and (text[at + 1] == 0xA0 or text[at + 1] == 0x85) else 0
    if byte < 0xE1 or at + 2 >= end:
        return 0
    second, third = text[at + 1], text[at + 2]
    if byte == 0xE1:
        return 3 if second == 0x9A and third == 0x80 else 0
    if byte == 0xE2:
        if second == 0x80 and (0x80 <= third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF):
            return 3
        return 3 if second == 0x81 and third == 0x9F else 0
    return 3 if second == 0x80 and third == 0x80 else 0


@compiled_lean
def _trimmed(text: Any, start: int, end: int) -> Any:
    """Where the text between two positions begins and ends without the white space around it."""
    while start < end:
        byte = text[np.uint64(start)]
        if byte == 32:
            start += 1
        elif 32 < byte < 0xC2:
            break
        else:
            width = _space_width(text, start, end)
            if width == 0:
                break
            start += width
    while start < end:
        byte = text[np.uint64(end - 1)]
        if byte == 32:
            end -= 1
        elif 32 < byte < 0x80:
            break
        else:
            width = 1 if byte < 0x80 else (2 if end - start >= 2 and text[end - 2] == 0xC2 else 3)
            if end - width < start or _space_width(text, end - width, end) != width:
                break
            end -= width
    return start, end


@compiled_lean
def _eight(text: Any, at: int) -> Any:
    """Eight bytes from `at` on as one number, the first the lowest. The compiler makes one load of it."""
    here = np.uint64(at)  # unsigned: no test for an index from the end
    word = np.uint64(text[here]) | np.uint64(text[here + np.uint64(1)]) << np.uint64(8)
    word |= np.uint64(text[here + np.uint64(2)]) << np.uint64(16)
    word |= np.uint64(text[here + np.uint64(3)]) << np.uint64(24)
    word |= np.uint64(text[here + np.uint64(4)]) << np.uint64(32)
    word |= np.uint64(text[here + np.uint64(5)]) << np.uint64(40)
    word |= np.uint64(text[here + np.uint64(6)]) << np.uint64(48)
    return word | np.uint64(text[here + np.uint64(7)]) << np.uint64(56)


@compiled_lean
def _line_end(text: Any, at: int, end: int) -> int:
    """Where the next line feed is, or `end`."""
    while at + 8 <= end:
        differs = _eight(text, at) ^ (ONES * np.uint64(10))
        if (differs - ONES) & ~differs & HIGH:  # one of the bytes is 0
            break
        at += 8
    while at < end and text[at] != 10:
        at += 1
    return at


@compiled_lean
def _mixed(state: Any, word: Any) -> Any:
    state = (state ^ word) * _MIX2
    return state ^ (state >> np.uint64(29))


@compiled_lean
def _hash_text(text: Any, at: int, end: int, lower: Any, state: Any, word: Any, num_bits: Any) -> Any:
    """Take text[at:end], lower-cased, into a hash: its `state`, and the `num_bits` of `word` that wait."""
    num_chars = 0
    while at < end:
        if at + 8 <= end:
            eight = _eight(text, at)
            if eight & HIGH == 0:
                # 0x20 for each byte in A..Z: those above "@" and not above "Z", eight at a time.
                is_upper = (eight + ONES * np.uint64(0x3F)) & ~(eight + ONES * np.uint64(0x25)) & HIGH
                eight |= is_upper >> np.uint64(2)
                state = _mixed(state, word | eight << num_bits)
                word = eight >> (np.uint64(64) - num_bits) if num_bits > 0 else np.uint64(0)
                num_chars += 8
                at += 8
                continue
        lead = text[at]
        point = np.int64(lead)
        width = 1
        if lead >= 0xF0 and at + 3 < end:
            point = (point & 7) << 18 | np.int64(text[at + 1] & 63) << 12
            point |= np.int64(text[at + 2] & 63) << 6 | np.int64(text[at + 3] & 63)
            width = 4
        elif lead >= 0xE0 and at + 2 < end:
            point = (point & 15) << 12 | np.int64(text[at + 1] & 63) << 6 | np.int64(text[at + 2] & 63)
            width = 3
        elif lead >= 0xC0 and at + 1 < end:
            point = (point & 31) << 6 | np.int64(text[at + 1] & 63)
            width = 2
        if point < len(lower):
            point = np.int64(lower[point])
        at += width
        num_chars += 1
        # A code point beyond ASCII enters as three bytes, of which the last is above 0x7F.
        put = np.uint64(point) if point < 0x80 else np.uint64(point | 0x800000)
        num_put = np.uint64(8) if point < 0x80 else np.uint64(24)
        word |= put << num_bits
        num_bits += num_put
        if num_bits >= 64:
            state = _mixed(state, word)
            num_bits -= np.uint64(64)
            word = put >> (num_put - num_bits) if num_bits > 0 else np.uint64(0)
    return state, word, num_bits, num_chars


@compiled
def _hash_lines(text: Any, offsets: Any, lower: Any, min_chars: int, is_by_paragraph: bool) -> Any:
    """Columns of LINE_DTYPE."""
    num_documents = len(offsets) - 1
    capacity = num_documents
    for at in range(offsets[0], offsets[num_documents]):
        capacity += text[at] == 10
    hashes = np.empty(capacity, dtype=np.uint64)
    rows = np.empty(capacity, dtype=np.int32)
    starts = np.empty(capacity, dtype=np.int32)
    ends = np.empty(capacity, dtype=np.int32)
    filled = 0
    for document in range(num_documents):
        begin, end = offsets[document], offsets[document + 1]
        at = begin
        state, word, num_bits, num_chars = _MIX, np.uint64(0), np.uint64(0), 0
        start, stop = begin, begin  # of the line or paragraph
        has_lines = False
        while at <= end:
            line_end = _line_end(text, at, end)
            first, last = _trimmed(text, at, line_end)
            if first < last:
                if not has_lines:
                    start = at
                    has_lines = True
                else:  # lines of a paragraph are joined by line feeds
                    word |= np.uint64(10) << num_bits
                    num_bits += np.uint64(8)
                    num_chars += 1
                    if num_bits == 64:
                        state, word, num_bits = _mixed(state, word), np.uint64(0), np.uint64(0)
                stop = line_end
                state, word, num_bits, more = _hash_text(text, first, last, lower, state, word, num_bits)
                num_chars += more
            if has_lines and (not is_by_paragraph or first == last or line_end == end):
                if num_chars >= min_chars:
                    state = _mixed(state, word) ^ num_bits
                    state = (state ^ (state >> np.uint64(30))) * _MIX2
                    state = (state ^ (state >> np.uint64(27))) * _MIX3
                    hashes[filled] = state ^ (state >> np.uint64(31))
                    rows[filled] = document
                    starts[filled] = start - begin
                    ends[filled] = stop - begin
                    filled += 1
                state, word, num_bits, num_chars = _MIX, np.uint64(0), np.uint64(0), 0
                has_lines = False
            at = line_end + 1
    return hashes[:filled], rows[:filled], starts[:filled], ends[:filled]


def line_hashes(text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], cfg: LineConfig) -> Lines:
    """The lines, or paragraphs, of a batch that have at least `min_chars` characters, in order.

    A paragraph is a run of lines that are not blank; its hash is that of its lines, each without the white
    space at its ends. `row` is the document's number in the batch.
    """
    text, _ = as_kernels_read(text)
    offsets = np.array(offsets, dtype=np.int64)  # of one type too: those from Arrow are read-only
    columns = _hash_lines(text, offsets, _lower_table(), cfg.min_chars, cfg.unit is LineUnit.paragraph)
    lines = np.empty(len(columns[0]), dtype=LINE_DTYPE)
    for name, column in zip(LINE_DTYPE.names or (), columns, strict=True):
        lines[name] = column
    return lines


@compiled_lean
def _is_blank(text: Any, at: int, end: int) -> bool:
    first, last = _trimmed(text, at, end)
    return bool(first == last)


@compiled_lean
def _copy(source: Any, at: int, end: int, out: Any, filled: int) -> int:
    """Append bytes at..end - 1; returns how many there are now."""
    for place in range(end - at):
        out[filled + place] = source[at + place]
    return filled + end - at


@compiled
def _remove(text: Any, offsets: Any, rows: Any, starts: Any, ends: Any) -> Any:
    num_documents = len(offsets) - 1
    out = np.empty(offsets[num_documents] - offsets[0], dtype=np.uint8)
    out_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    filled = 0
    span = 0
    for document in range(num_documents):
        begin, end = offsets[document], offsets[document + 1]
        first = filled
        at = begin
        has_spans = False
        while span < len(rows) and rows[span] == document:
            has_spans = True
            start = begin + starts[span]
            filled = _copy(text, at, start, out, filled)
            at = min(begin + ends[span] + 1, end)  # with its line end
            span += 1
            last_line = filled - 1
            while last_line > first and out[last_line - 1] != 10:
                last_line -= 1
            if filled == first or _is_blank(out, last_line, filled):
                # What is before is blank, or nothing: blank lines after it would be one break too many.
                while at < end:
                    line_end = _line_end(text, at, end)
                    if not _is_blank(text, at, line_end):
                        break
                    at = min(line_end + 1, end)
        filled = _copy(text, at, end, out, filled)
        if has_spans:
            while filled > first and (out[filled - 1] == 10 or out[filled - 1] == 32 or out[filled - 1] == 9):
                filled -= 1
        out_offsets[document + 1] = filled
    return out[:filled], out_offsets


def remove_spans(
    text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], spans: Spans
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Cut lines or paragraphs out of the documents of a batch. Bytes removed of a document: the difference of
    its lengths.

    Each goes with its line end. Where that leaves blank lines on both sides of the cut, those after it go
    too, so two breaks become one; so do blank lines that would begin a document, and white space that would
    end it. Documents without spans are copied as they are.

    Args:
        spans: of SPAN_DTYPE, sorted; `row` is the document's number in the batch, start and end are those of
            whole lines.

    Raises:
        DataError: a span lies outside its document, or before the one ahead of it.
    """
    rows, starts, ends = (np.ascontiguousarray(spans[name]) for name in ("row", "start", "end"))
    if len(rows):
        lengths = offsets[1:] - offsets[:-1]
        is_known = (rows >= 0) & (rows < len(lengths))
        wrong = ~is_known | (starts < 0) | (ends < starts) | (ends > lengths[np.where(is_known, rows, 0)])
        wrong[1:] |= (rows[1:] < rows[:-1]) | ((rows[1:] == rows[:-1]) & (starts[1:] <= ends[:-1]))
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"span {at} to remove, bytes {starts[at]}..{ends[at]} of document {rows[at]}, does not fit "
                f"the {len(lengths)} documents of the batch or the span before it: the texts and the spans "
                "are of different runs; delete the folder of line deduplication and run again"
            )
    text, _ = as_kernels_read(text)
    offsets = np.array(offsets, dtype=np.int64)
    result: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] = _remove(text, offsets, rows, starts, ends)
    return result


def spans_of_rows(spans: Spans, rows: npt.NDArray[np.int64]) -> Spans:
    """The spans of some documents of a unit, for `remove_spans` of a batch that holds just those.

    Args:
        spans: of a whole unit, sorted; `row` counts from the start of the unit.
        rows: the batch's documents, ascending, as rows of the unit.
    """
    at = np.searchsorted(rows, spans["row"])
    is_there = at < len(rows)
    is_there[is_there] = rows[at[is_there]] == spans["row"][is_there]
    found = spans[is_there].copy()
    found["row"] = at[is_there]
    return found
