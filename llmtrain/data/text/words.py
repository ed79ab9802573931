"""Words of many documents at once: the word segments of UAX #29, and their hashes.

A word here is a segment between two word boundaries of Unicode's text segmentation (UAX #29, rules WB1 to
WB999, no tailoring, no dictionary), with two changes. White space at either end of a segment is left off,
with the marks that hang on it, and what is then empty is not listed. Neighbouring segments without a letter
or a number are one: "...", "-----" and "?!" count once. So each Chinese character and each Hiragana is a word
of its own, and Thai, Lao and Khmer, which write no spaces, are cut between letters.

ASCII is read eight bytes at a time; a segment that touches anything else goes through the full rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba.cpython.unsafe.numbers import trailing_zeros

from llmtrain.compiled import compiled_lean
from llmtrain.data.text import unicode_tables as unicode
from llmtrain.data.text.utf8 import (
    HIGH,
    LOW_7,
    ONES,
    Bytes,
    as_kernels_read,
    code_point_at,
    entry_of,
    folded_ascii_hash,
    folded_hash,
    hash_bytes,
    load,
)
from llmtrain.data.text.word_breaks import segment_at

IS_WORD = 1
"""Bit of `Words.kind`: a character is no punctuation (as datatrove counts it)."""
IS_ALPHABETIC = 2
"""Bit of `Words.kind`: a character is a letter."""
IS_ALPHANUMERIC = 4
"""Bit of `Words.kind`: a character is a letter or a number. Symbol segments are those without it."""

Offsets = npt.NDArray[np.int64]


class Words(NamedTuple):
    """The words of a batch of documents, in order."""

    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    """Byte positions in the batch's text; word w is text[starts[w]:ends[w]]."""
    num_chars: npt.NDArray[np.int32]
    """Code points."""
    kind: npt.NDArray[np.uint8]
    """IS_WORD, IS_ALPHABETIC, IS_ALPHANUMERIC."""
    hash: npt.NDArray[np.uint64]
    """Of the bytes: `hash_bytes`. Two words of one length up to 8 bytes never share it."""
    folded: npt.NDArray[np.uint64]
    """Of the lower-cased bytes (simple lower-casing: one code point to one)."""
    offsets: Offsets
    """The words of document d are offsets[d]:offsets[d + 1]."""


def split_words(text: Bytes, offsets: Offsets) -> Words:
    """Words of documents in UTF-8; document d is text[offsets[d]:offsets[d + 1]]."""
    assert offsets[-1] < 2**31, f"a batch of {offsets[-1]} bytes: positions of words have 32 bits"
    padded, eight = as_kernels_read(text)
    word_offsets = np.empty(len(offsets), dtype=np.int64)
    num_bytes = int(offsets[-1] - offsets[0])
    for capacity in (num_bytes // 2 + 1, num_bytes):  # only text like "a,b,c" has more than a word to 2 bytes
        columns = [np.empty(capacity, dtype=dtype) for dtype in _COLUMNS]
        if _split(padded, eight, offsets, _CLASSES, *(*unicode.tables(), *columns, word_offsets)):
            break
    starts, ends, num_chars, kind, hashes, folded = (column[: word_offsets[-1]] for column in columns)
    return Words(starts, ends, num_chars, kind, hashes, folded, word_offsets)


def words_of_spans(
    text: Bytes,
    offsets: Offsets,
    starts: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int32],
    word_offsets: Offsets,
) -> Words:
    """What `split_words` tells of words, for the spans that another tokenizer found.

    Spans are byte positions in `text`, on character boundaries, not empty; those of document d are
    word_offsets[d]:word_offsets[d + 1]. They may overlap or repeat: nothing is merged and nothing dropped.
    """
    if len(offsets) != len(word_offsets) or word_offsets[-1] != len(starts) or len(starts) != len(ends):
        raise ValueError(
            f"{len(offsets) - 1} documents; word offsets of {len(word_offsets) - 1}, up to "
            f"{word_offsets[-1]}; {len(starts)} starts and {len(ends)} ends; give a start and an end for "
            "each word, and for each document the number of words up to its end, after a first 0"
        )
    starts, ends = starts.astype(np.int32), ends.astype(np.int32)
    num_chars, kind, hashes, folded = (np.empty(len(starts), dtype=dtype) for dtype in _COLUMNS[2:])
    _describe(*as_kernels_read(text), starts, ends, *unicode.tables(), num_chars, kind, hashes, folded)
    return Words(starts, ends, num_chars, kind, hashes, folded, word_offsets.astype(np.int64))


_IS_CASED = 128
"""Bit of `Words.kind` until its hashes are taken: lower-casing changes it."""
_COLUMNS: tuple[type[Any], ...] = (np.int32, np.int32, np.int32, np.uint8, np.uint64, np.uint64)
_LETTER, _DIGIT, _UNDERSCORE, _SPACE, _BEYOND, _MID_LETTER, _MID_NUMBER = (1 << bit for bit in range(7))
_CONNECTS = _LETTER | _DIGIT | _UNDERSCORE


def _classes() -> npt.NDArray[np.uint8]:
    """What the ASCII road needs to know of each byte."""
    classes = np.zeros(256, dtype=np.uint8)
    classes[0x80:] = _BEYOND
    for byte in range(0x80):
        character = chr(byte)
        if character.isalpha():
            classes[byte] = _LETTER
        elif character.isdigit():
            classes[byte] = _DIGIT
        elif character.isspace():
            classes[byte] = _SPACE
    classes[ord("_")] = _UNDERSCORE
    classes[ord(":")] = _MID_LETTER
    classes[[ord(","), ord(";")]] = _MID_NUMBER
    classes[[ord("."), ord("'")]] = _MID_LETTER | _MID_NUMBER
    return classes


_CLASSES = _classes()


@compiled_lean
def _hash_words(
    text: Any,
    eight: Any,
    starts: Any,
    ends: Any,
    lower_pages: Any,
    lower: Any,
    num_chars: Any,
    kinds: Any,
    hashes: Any,
    folded: Any,
    first: Any,
    last: Any,
) -> None:
    """Fill in the hashes of words first to last - 1, and clear their bit _IS_CASED."""
    for word in range(first, last):
        start, end = np.int64(starts[word]), np.int64(ends[word])
        hashes[word] = hash_bytes(text, eight, start, end)
        if not kinds[word] & _IS_CASED:
            folded[word] = hashes[word]
            continue
        kinds[word] ^= _IS_CASED
        if num_chars[word] == end - start:
            folded[word] = folded_ascii_hash(text, eight, start, end)
        else:
            folded[word] = folded_hash(text, start, end, lower_pages, lower)


@compiled_lean
def _kind(flags: Any) -> int:
    kind = IS_WORD if flags & unicode.PLAIN else 0
    if flags & unicode.ALPHABETIC:
        kind |= IS_ALPHABETIC
    if flags & (unicode.ALPHABETIC | unicode.NUMBER):
        kind |= IS_ALPHANUMERIC
    if flags & unicode.CASED:
        kind |= _IS_CASED
    return kind


@compiled_lean
def _describe(
    text: Any,
    eight: Any,
    starts: Any,
    ends: Any,
    pages: Any,
    entries: Any,
    lower_pages: Any,
    lower: Any,
    num_chars: Any,
    kinds: Any,
    hashes: Any,
    folded: Any,
) -> None:
    """Fill in what there is to know of spans."""
    for word in range(len(starts)):
        start: Any = np.int64(starts[word])
        end: Any = np.int64(ends[word])
        at, chars, flags = start, 0, 0
        while at < end:
            code, width = code_point_at(text, at)
            flags |= entry_of(code, pages, entries)
            at += width
            chars += 1
        num_chars[word] = chars
        kinds[word] = _kind(flags)
    _hash_words(
        *(text, eight, starts, ends, lower_pages, lower, num_chars, kinds, hashes, folded, 0, len(starts))
    )


@compiled_lean
def _connected_end(text: Any, eight: Any, at: Any, end: Any) -> Any:
    """End of the run of ASCII letters, digits and underscores at `at`, and what words need to know of it: the
    bits PLAIN, ALPHABETIC, NUMBER and CASED of its characters, or-ed."""
    letters = digits = capitals = others = np.uint64(0)
    while others == 0:
        block = load(text, eight, at)
        low = block & LOW_7
        small = low | _SMALL
        letter = (small + _FROM_A) & ~(small + _PAST_Z)
        digit = (low + _FROM_0) & ~(low + _PAST_9)
        underscore = ~((low ^ _UNDERSCORES) + LOW_7)
        others = (~(letter | digit | underscore) | block) & HIGH
        if end - at < 8:
            others |= HIGH << np.uint64(8 * (end - at))
        run = (others - np.uint64(1)) & ~others & HIGH  # of the bytes before the first other one
        letters |= letter & run
        digits |= digit & run
        capitals |= letter & ~(low << np.uint64(2)) & run
        at += np.int64(trailing_zeros(others)) >> 3  # 64, so 8 bytes, where no bit is set
    flags = 0
    if letters:
        flags = unicode.PLAIN | unicode.ALPHABETIC
    if digits:
        flags |= unicode.PLAIN | unicode.NUMBER
    if capitals:
        flags |= unicode.CASED
    return at, flags


_SMALL = np.uint64(0x20) * ONES
_FROM_A, _PAST_Z = np.uint64(0x80 - ord("a")) * ONES, np.uint64(0x7F - ord("z")) * ONES
_FROM_0, _PAST_9 = np.uint64(0x80 - ord("0")) * ONES, np.uint64(0x7F - ord("9")) * ONES
_UNDERSCORES = np.uint64(ord("_")) * ONES
"""Added to a byte below 0x80, the four in the middle set its high bit from that character on."""


@compiled_lean
def _split(
    text: Any,
    eight: Any,
    offsets: Any,
    classes: Any,
    pages: Any,
    entries: Any,
    lower_pages: Any,
    lower: Any,
    starts: Any,
    ends: Any,
    num_chars: Any,
    kinds: Any,
    hashes: Any,
    folded: Any,
    word_offsets: Any,
) -> Any:
    """Fill the arrays of `Words`; False where they are too short."""
    filled = 0
    word_offsets[0] = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            first = stop = at
            flags = 0
            is_ascii = True
            found = np.int64(classes[text[at]])
            if found & _CONNECTS:
                stop, flags = _connected_end(text, eight, at, end)
                while stop < end:
                    mark = np.int64(classes[text[stop]])
                    if not mark & (_MID_LETTER | _MID_NUMBER | _BEYOND):
                        break
                    behind = np.int64(classes[text[stop + 1]]) if stop + 1 < end else 0
                    if (mark | behind) & _BEYOND:
                        is_ascii = False
                        break
                    both = np.int64(classes[text[stop - 1]]) & behind
                    if not (both & _LETTER and mark & _MID_LETTER) and not (
                        both & _DIGIT and mark & _MID_NUMBER
                    ):
                        break
                    stop, more = _connected_end(text, eight, stop + 1, end)
                    flags |= more
            elif found & _SPACE:
                at += 1
                if at == end or text[at] < 0x80:
                    continue
                at -= 1
                is_ascii = False
            else:
                while stop < end and not classes[text[stop]] & (_CONNECTS | _SPACE | _BEYOND):
                    stop += 1
                if stop < end and text[stop] >= 0x80:  # it may hang on the last symbol
                    stop -= 1
                is_ascii = stop > at
            last = stop
            chars = stop - first
            if not is_ascii:
                stop, first, last, flags, chars = segment_at(text, at, end, pages, entries)
            at = stop
            if first < 0:
                continue
            kind = _kind(flags)
            if not kind & IS_ALPHANUMERIC and filled > word_offsets[document]:
                word = filled - 1
                if ends[word] == first and not kinds[word] & IS_ALPHANUMERIC:
                    ends[word] = last
                    num_chars[word] += chars
                    kinds[word] |= kind
                    continue
            if filled == len(starts):
                return False
            starts[filled] = first
            ends[filled] = last
            num_chars[filled] = chars
            kinds[filled] = kind
            filled += 1
        _hash_words(
            *(text, eight, starts, ends, lower_pages, lower, num_chars, kinds, hashes, folded),
            *(word_offsets[document], filled),
        )
        word_offsets[document + 1] = filled
    return True
