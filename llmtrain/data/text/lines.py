"""Lines and characters of a document, as compiled loops see them.

ASCII is taken eight bytes at a time: a byte's test leaves its answer in the byte's high bit, and sums of such
bits are taken by one multiplication. White space is that of `str.isspace`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from llmtrain.compiled import compiled_lean
from llmtrain.data.text import unicode_tables as unicode
from llmtrain.data.text.utf8 import HIGH, LOW_7, ONES, code_point_at, entry_of, load

_LINE_FEEDS = np.uint64(10) * ONES
_TABS = np.uint64(9) * ONES
_DOTS = np.uint64(ord(".")) * ONES
_HASHES = np.uint64(ord("#")) * ONES
_CASE = np.uint64(0x20) * ONES
_FROM_SPACE = np.uint64(0x80 - 0x20) * ONES
_FROM_A, _PAST_Z = np.uint64(0x80 - ord("a")) * ONES, np.uint64(0x7F - ord("z")) * ONES
_FROM_0, _PAST_9 = np.uint64(0x80 - ord("0")) * ONES, np.uint64(0x7F - ord("9")) * ONES
"""FROM and PAST, added to a byte below 0x80, set its high bit from (after) that character on."""
_SEVEN, _TWO, _EIGHT, _TOP_BYTE = np.uint64(7), np.uint64(2), np.uint64(8), np.uint64(56)
ELLIPSIS, BULLET = 0x2026, 0x2022


@compiled_lean
def _num_bytes(high_bits: Any) -> Any:
    """How many bytes have their high bit set; no other bit may be."""
    return np.int64(((high_bits >> _SEVEN) * ONES) >> _TOP_BYTE)


@compiled_lean
def line_end(text: Any, eight: Any, at: Any, end: Any) -> Any:
    """Where the line that begins at `at` ends (at a line feed or the end), and how many characters it has."""
    chars = 0
    feeds = np.uint64(0)
    while feeds == 0:
        block = load(text, eight, at)
        others = block ^ _LINE_FEEDS
        feeds = ~(((others & LOW_7) + LOW_7) | others) & HIGH
        if end - at < 8:
            feeds |= HIGH << np.uint64(8 * (end - at))
        line = (feeds - np.uint64(1)) & ~feeds
        chars -= _num_bytes(block & ~(block << np.uint64(1)) & HIGH & line)  # those that continue a character
        width = np.int64(trailing_zeros(feeds)) >> 3  # 64, so 8 bytes, where no bit is set
        chars += width
        at += width
    return at, chars


@compiled_lean
def num_chars_in(text: Any, at: Any, end: Any) -> Any:
    chars = 0
    while at < end:
        chars += text[at] & 0xC0 != 0x80
        at += 1
    return chars


@compiled_lean
def content_start(text: Any, at: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Position of the first character that is no white space, or the end."""
    while at < end:
        code, width = code_point_at(text, at)
        if not entry_of(code, pages, entries) & unicode.SPACE:
            break
        at += width
    return at


@compiled_lean
def last_character(text: Any, start: Any, end: Any) -> Any:
    """Position of the last character before `end`."""
    end -= 1
    while end > start and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


@compiled_lean
def content_end(text: Any, start: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Position behind the last character that is no white space, or the start."""
    while end > start:
        at = last_character(text, start, end)
        code, _ = code_point_at(text, at)
        if not entry_of(code, pages, entries) & unicode.SPACE:
            break
        end = at
    return end


@compiled_lean
def starts_with_bullet(text: Any, start: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Whether a line begins with `-` or `•`, behind white space."""
    at = content_start(text, start, end, pages, entries)
    if at == end:
        return False
    code, _ = code_point_at(text, at)
    return code == 0x2D or code == BULLET


@compiled_lean
def ends_with_ellipsis(text: Any, start: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Whether a line ends with `...` or `…`, before white space."""
    end = content_end(text, start, end, pages, entries)
    if end - start < 3:
        return False
    last, middle, first = text[end - 1], text[end - 2], text[end - 3]
    return (first == 0x2E == middle == last) or (first == 0xE2 and middle == 0x80 and last == 0xA6)


@compiled_lean
def count_characters(text: Any, eight: Any, start: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Numbers of characters, and whether `str.splitlines` sees another line end than the line feed.

    The numbers: all, letters, letters or numbers, upper-case, digits, `#`; then ellipses (`...` without
    overlaps, and `…`).
    """
    chars: Any = 0
    letters = alphanumeric = capitals = digits = hashes = ellipses = chars
    is_odd = False
    at = dots_done = start
    while at < end:
        if text[at] >= 0x80:
            code, width = code_point_at(text, at)
            entry: Any = entry_of(code, pages, entries)
            at += width
            chars += 1
            letters += entry & unicode.ALPHABETIC != 0
            alphanumeric += entry & (unicode.ALPHABETIC | unicode.NUMBER) != 0
            capitals += entry & unicode.UPPERCASE != 0
            digits += entry & unicode.DIGIT != 0
            ellipses += code == ELLIPSIS
            is_odd |= is_line_end(code)
            continue
        block = load(text, eight, at)
        beyond = block & HIGH
        if end - at < 8:
            beyond |= HIGH << np.uint64(8 * (end - at))
        run = (beyond - np.uint64(1)) & ~beyond & HIGH
        low = block & LOW_7
        small = low | _CASE
        letter = (small + _FROM_A) & ~(small + _PAST_Z) & run
        in_letters = _num_bytes(letter)
        in_digits = _num_bytes((low + _FROM_0) & ~(low + _PAST_9) & run)
        letters += in_letters
        digits += in_digits
        alphanumeric += in_letters + in_digits
        capitals += _num_bytes(letter & ~(low << _TWO))
        hashes += _num_bytes(~((low ^ _HASHES) + LOW_7) & run)
        controls = ~(low + _FROM_SPACE) & run
        if controls:
            controls &= ((low ^ _LINE_FEEDS) + LOW_7) & ((low ^ _TABS) + LOW_7)
        width = np.int64(trailing_zeros(beyond)) >> 3
        if controls:
            for place in range(at, at + width):
                is_odd |= is_line_end(np.int64(text[place])) and text[place] != 10
        dots = ~((low ^ _DOTS) + LOW_7) & run
        if dots & (dots >> _EIGHT) or (dots >> np.uint64(63) and at + 8 < end and text[at + 8] == 0x2E):
            place = max(at, dots_done)
            while place < at + width:
                first = place
                while place < end and text[place] == 0x2E:
                    place += 1
                ellipses += (place - first) // 3
                place += 1
            dots_done = place
        chars += width
        at += width
    return (chars, letters, alphanumeric, capitals, digits, hashes, ellipses), is_odd


@compiled_lean
def is_line_end(code: Any) -> Any:
    """Whether `str.splitlines` ends a line at this character."""
    return 10 <= code <= 13 or 28 <= code <= 30 or code == 0x85 or code == 0x2028 or code == 0x2029


@compiled_lean
def count_lines(text: Any, start: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Of the lines of `str.splitlines`: how many, the longest one's characters, how many begin with a bullet,
    how many end with an ellipsis; and the characters of all."""
    num_lines = longest = bullets = ellipses = all_chars = chars = 0
    at = first = start
    while at < end:
        code, width = code_point_at(text, at)
        is_end = is_line_end(code)
        behind = at + width
        if code == 13 and behind < end and text[behind] == 10:
            behind += 1
        chars += not is_end
        if is_end or behind == end:
            last = at if is_end else end
            num_lines += 1
            longest = max(longest, chars)
            all_chars += chars
            bullets += starts_with_bullet(text, first, last, pages, entries)
            ellipses += ends_with_ellipsis(text, first, last, pages, entries)
            first, chars = behind, 0
        at = behind
    return num_lines, longest, bullets, ellipses, all_chars


@compiled_lean
def count_repeats(keys: Any, chars: Any, num_items: Any, table: Any) -> Any:
    """How many items stood before (an equal key at a lower number), and their characters.

    `table` has room for twice the items, rounded up to a power of two.
    """
    mask = table_mask(num_items)
    table[: mask + 1] = 0
    num_repeats = repeated_chars = 0
    for item in range(num_items):
        slot: Any = np.int64(keys[item]) & mask
        while table[slot] and keys[table[slot] - 1] != keys[item]:
            slot = (slot + 1) & mask
        if table[slot]:
            num_repeats += 1
            repeated_chars += chars[item]
        else:
            table[slot] = item + 1
    return num_repeats, repeated_chars


@compiled_lean
def table_mask(num_items: Any) -> Any:
    """One less than the slots of a hash table for so many items: a power of two, at least twice as many."""
    slots = 16
    while slots < 2 * num_items:
        slots *= 2
    return slots - 1


def table_size(num_items: int) -> int:
    """Slots for `num_items` at most."""
    return int(table_mask.py_func(num_items)) + 1  # type: ignore[attr-defined]
