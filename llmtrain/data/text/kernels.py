"""Compiled loops over the bytes of many documents at once: normalising, and the numbers that rules need.

Documents lie back to back in one uint8 array; `offsets[d]:offsets[d + 1]` is document d. Input is UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])

SIGNALS = (
    "num_chars",
    "num_words",
    "num_word_chars",
    "num_lines",
    "num_duplicate_lines",
    "num_duplicate_line_chars",
    "num_paragraphs",
    "num_duplicate_paragraphs",
    "num_duplicate_paragraph_chars",
    "top_2gram_chars",
    "top_3gram_chars",
    "top_4gram_chars",
)
"""Columns of `measure`. Definitions: docs/data_format.md."""

_FNV_START = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def compiled(function: Function) -> Function:
    """Compile with numba, keeping machine code on disk where some folder for it can be written."""
    return _compiled(function)


def compiled_lean(function: Function) -> Function:
    """`compiled` without the counting of references to arrays: for loops that make no array.

    The counting is atomic and happens at each call: words are split at 40 MB/s with it, 200 without.
    What such a loop writes comes in as arguments; a new array inside it would never be freed.
    """
    return _compiled(function, _nrt=False)


def _compiled(function: Function, **options: Any) -> Function:
    try:
        result: Function = numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder to cache in: each process compiles anew
        result = numba.njit(nogil=True, **options)(function)
    return result


@compiled
def clean(text: Any, offsets: Any) -> Any:
    """Unify line ends, strip control characters and byte order marks, trim.

    CR LF and CR become LF. U+0000..U+001F but tab and LF, U+007F..U+009F and U+FEFF vanish. So do LF at the
    start of a document, and spaces, tabs and LF at its end.

    Returns:
        text, offsets, and whether each document holds a byte above 0x7F before cleaning.
    """
    num_documents = len(offsets) - 1
    out = np.empty(offsets[-1] - offsets[0], dtype=np.uint8)
    out_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    non_ascii = np.zeros(num_documents, dtype=np.bool_)
    filled = 0
    for document in range(num_documents):
        at, end = offsets[document], offsets[document + 1]
        first = filled
        while at < end:
            byte = text[at]
            if byte >= 0x80:
                non_ascii[document] = True
                if byte == 0xC2 and at + 1 < end and 0x80 <= text[at + 1] <= 0x9F:
                    at += 2
                    continue
                if byte == 0xEF and at + 2 < end and text[at + 1] == 0xBB and text[at + 2] == 0xBF:
                    at += 3
                    continue
            elif byte == 13:
                byte = np.uint8(10)
                if at + 1 < end and text[at + 1] == 10:
                    at += 1
            elif (byte < 32 and byte != 9 and byte != 10) or byte == 127:
                at += 1
                continue
            if byte != 10 or filled > first:
                out[filled] = byte
                filled += 1
            at += 1
        while filled > first and (out[filled - 1] == 10 or out[filled - 1] == 32 or out[filled - 1] == 9):
            filled -= 1
        out_offsets[document + 1] = filled
    return out[:filled].copy(), out_offsets, non_ascii


@compiled
def _space_width(text: Any, at: int, end: int) -> int:
    """Bytes of the white space character at `at`, as Python's str.isspace sees it; 0 for any other."""
    byte = text[at]
    if byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31:
        return 1
    if byte < 0xC2:
        return 0
    if byte == 0xC2:
        return 2 if at + 1 < end and (text[at + 1] == 0xA0 or text[at + 1] == 0x85) else 0
    if at + 2 >= end:
        return 0
    second, third = text[at + 1], text[at + 2]
    if byte == 0xE2:
        if second == 0x80 and (0x80 <= third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF):
            return 3
        return 3 if second == 0x81 and third == 0x9F else 0
    if byte == 0xE1:
        return 3 if second == 0x9A and third == 0x80 else 0
    if byte == 0xE3:
        return 3 if second == 0x80 and third == 0x80 else 0
    return 0


@compiled
def _find(keys: Any, stamps: Any, mask: int, stamp: int, key: Any) -> Any:
    """Slot of `key` among the first mask + 1, or the free one where it belongs. Another stamp means free."""
    slot = np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def measure(text: Any, offsets: Any) -> Any:
    """Signals of normalised documents: int64 [documents, len(SIGNALS)].

    Words, lines and n-grams are told apart by 64-bit hashes: two different ones are taken for one about
    once in 10^11 documents of 10^4 words.
    """
    num_documents = len(offsets) - 1
    signals = np.zeros((num_documents, 12), dtype=np.int64)
    word_hash = np.empty(1024, dtype=np.uint64)
    word_chars = np.empty(1024, dtype=np.int64)
    keys = np.zeros(4096, dtype=np.uint64)
    stamps = np.zeros(4096, dtype=np.int64)
    counts = np.zeros(4096, dtype=np.int64)
    stamp = 0
    for document in range(num_documents):
        begin, end = offsets[document], offsets[document + 1]
        most_words = (end - begin) // 2 + 2
        if most_words > len(word_hash):
            word_hash = np.empty(2 * most_words, dtype=np.uint64)
            word_chars = np.empty(2 * most_words, dtype=np.int64)
        row = signals[document]

        # Lines and paragraphs. A line of white space alone ends a paragraph and is not counted.
        num_line_ends = 1
        for at in range(begin, end):
            if text[at] == 10:
                num_line_ends += 1
        capacity = 64
        while capacity < 4 * num_line_ends:
            capacity *= 2
        if capacity > len(keys):
            keys = np.zeros(capacity, dtype=np.uint64)
            stamps = np.zeros(capacity, dtype=np.int64)
            counts = np.zeros(capacity, dtype=np.int64)
        stamp += 1
        num_words = 0
        chars_before = 0
        num_chars = 0
        hashed = _FNV_START
        line_hash = _FNV_START
        line_start_chars = 0
        line_words = 0
        paragraph_hash = _FNV_START
        paragraph_chars = 0
        paragraph_lines = 0
        in_word = False
        at = begin
        while at <= end:
            is_line_end = at == end or text[at] == 10
            width = 1 if is_line_end else _space_width(text, at, end)
            if width > 0:
                if in_word:
                    word_hash[num_words] = hashed
                    word_chars[num_words] = num_chars - chars_before
                    row[2] += word_chars[num_words]
                    num_words += 1
                    line_words += 1
                    in_word = False
                if is_line_end:
                    if line_words > 0:
                        line_chars = num_chars - line_start_chars
                        key = line_hash ^ np.uint64(1)
                        slot = _find(keys, stamps, capacity - 1, stamp, key)
                        row[3] += 1
                        if stamps[slot] == stamp:
                            row[4] += 1
                            row[5] += line_chars
                        else:
                            stamps[slot] = stamp
                            keys[slot] = key
                        paragraph_hash = (paragraph_hash ^ line_hash) * _MIX
                        paragraph_hash ^= paragraph_hash >> np.uint64(31)
                        paragraph_chars += line_chars
                        paragraph_lines += 1
                    if paragraph_lines > 0 and (line_words == 0 or at == end):
                        key = paragraph_hash * _MIX
                        slot = _find(keys, stamps, capacity - 1, stamp, key)
                        row[6] += 1
                        if stamps[slot] == stamp:
                            row[7] += 1
                            row[8] += paragraph_chars
                        else:
                            stamps[slot] = stamp
                            keys[slot] = key
                        paragraph_hash = _FNV_START
                        paragraph_chars = 0
                        paragraph_lines = 0
                    if at < end:
                        num_chars += 1
                    line_hash = _FNV_START
                    line_start_chars = num_chars
                    line_words = 0
                else:
                    num_chars += 1
                    for offset in range(width):
                        line_hash = (line_hash ^ np.uint64(text[at + offset])) * _FNV_PRIME
                at += width
                continue
            byte = text[at]
            if not in_word:
                in_word = True
                hashed = _FNV_START
                chars_before = num_chars
            hashed = (hashed ^ np.uint64(byte)) * _FNV_PRIME
            line_hash = (line_hash ^ np.uint64(byte)) * _FNV_PRIME
            if byte < 0x80 or byte >= 0xC0:
                num_chars += 1
            at += 1
        row[0] = num_chars
        row[1] = num_words

        # The n-gram that occurs most often, the longest of them if several do; 0 when none occurs twice.
        capacity = 64
        while capacity < 2 * num_words:
            capacity *= 2
        if capacity > len(keys):
            keys = np.zeros(capacity, dtype=np.uint64)
            stamps = np.zeros(capacity, dtype=np.int64)
            counts = np.zeros(capacity, dtype=np.int64)
        for size in range(2, 5):
            stamp += 1
            best_count, best_chars = 1, 0
            for first in range(num_words - size + 1):
                key = np.uint64(size)
                num_gram_chars = size - 1  # the spaces between
                for word in range(first, first + size):
                    key = (key ^ word_hash[word]) * _MIX
                    key ^= key >> np.uint64(29)
                    num_gram_chars += word_chars[word]
                slot = _find(keys, stamps, capacity - 1, stamp, key)
                if stamps[slot] == stamp:
                    counts[slot] += 1
                    count = counts[slot]
                    if count > best_count or (count == best_count and num_gram_chars > best_chars):
                        best_count, best_chars = count, num_gram_chars
                else:
                    stamps[slot] = stamp
                    keys[slot] = key
                    counts[slot] = 1
            if best_count > 1:
                row[7 + size] = best_count * best_chars
    return signals


def warm_up() -> None:
    """Compile, or load from disk, before the work is handed out: once, not in every worker."""
    text = np.array([97, 32, 98, 10], dtype=np.uint8)
    offsets: npt.NDArray[np.int64] = np.array([0, 4], dtype=np.int64)
    clean(text, offsets)
    measure(text, offsets)
