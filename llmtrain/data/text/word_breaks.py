"""The word boundary rules of UAX #29 (Unicode Text Segmentation, WB1 to WB999), for any script."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled_lean
from llmtrain.data.text import unicode_tables as unicode
from llmtrain.data.text.utf8 import code_point_at, entry_of

_AFTER_LETTER = (
    1 << unicode.HEBREW_LETTER | 1 << unicode.ALETTER | 1 << unicode.NUMERIC | 1 << unicode.EXTEND_NUM_LET
)
_ANYTHING = 31
"""Stands in for the class before the next character where a look ahead has shown that the two join."""


def _joins() -> npt.NDArray[np.int64]:
    """For each class of Word_Break, those that join behind it in any context (WB3d, 5, 8 to 10, 13)."""
    joins = np.zeros(32, dtype=np.int64)
    joins[[unicode.HEBREW_LETTER, unicode.ALETTER, unicode.NUMERIC]] = _AFTER_LETTER
    joins[unicode.KATAKANA] = 1 << unicode.KATAKANA | 1 << unicode.EXTEND_NUM_LET
    joins[unicode.EXTEND_NUM_LET] = _AFTER_LETTER | 1 << unicode.KATAKANA
    joins[unicode.WSEG_SPACE] = 1 << unicode.WSEG_SPACE
    joins[_ANYTHING] = -1
    return joins


_JOINS = _joins()
_LETTERS = 1 << unicode.HEBREW_LETTER | 1 << unicode.ALETTER
_IGNORED = 1 << unicode.EXTEND | 1 << unicode.ZWJ | 1 << unicode.FORMAT
_NEWLINES = 1 << unicode.CR | 1 << unicode.LF | 1 << unicode.NEWLINE
_MID_LETTERS = 1 << unicode.MID_LETTER | 1 << unicode.MID_NUM_LET | 1 << unicode.SINGLE_QUOTE
_MID_NUMBERS = 1 << unicode.MID_NUM | 1 << unicode.MID_NUM_LET | 1 << unicode.SINGLE_QUOTE


@compiled_lean
def _next_class(text: Any, at: Any, end: Any, pages: Any, entries: Any) -> Any:
    """Bit of the class of the first character from `at` on that WB4 does not ignore; 0 if there is none."""
    while at < end:
        code, width = code_point_at(text, at)
        bit = 1 << (entry_of(code, pages, entries) & unicode.WORD_BREAK)
        if not bit & _IGNORED:
            return bit
        at += width
    return 0


@compiled_lean
def segment_at(text: Any, at: Any, end: Any, pages: Any, entries: Any) -> Any:
    """The segment that begins at `at`, by all rules of UAX #29.

    Returns:
        where it ends; where it begins and ends without white space, -1 and -1 if nothing is left;
        the entries of those characters, or-ed; and how many they are.
    """
    first = last = -1
    flags = new_flags = chars = new_chars = 0
    start, before, actual_before = at, unicode.OTHER, unicode.OTHER
    num_regional = 0
    hangs_on_space = False
    while at < end:
        code, width = code_point_at(text, at)
        found = entry_of(code, pages, entries)
        word_break = found & unicode.WORD_BREAK
        bit = 1 << word_break
        is_ignored = bit & _IGNORED != 0
        if at == start:
            before = word_break
        elif bit & _NEWLINES or 1 << actual_before & _NEWLINES:
            if not (actual_before == unicode.CR and word_break == unicode.LF):
                break
            before = word_break
        elif not is_ignored:
            if actual_before == unicode.ZWJ and found & unicode.PICTOGRAPHIC:
                before = word_break
            elif before == unicode.WSEG_SPACE and actual_before != unicode.WSEG_SPACE:
                break
            elif _JOINS[before] & bit:
                before = word_break
            elif before == unicode.REGIONAL_INDICATOR == word_break:
                if num_regional % 2 == 0:
                    break
            elif 1 << before & _LETTERS and bit & _MID_LETTERS:
                if _next_class(text, at + width, end, pages, entries) & _LETTERS:
                    before = _ANYTHING
                elif before == unicode.HEBREW_LETTER and word_break == unicode.SINGLE_QUOTE:
                    before = word_break
                else:
                    break
            elif before == unicode.HEBREW_LETTER and word_break == unicode.DOUBLE_QUOTE:
                if _next_class(text, at + width, end, pages, entries) != 1 << unicode.HEBREW_LETTER:
                    break
                before = _ANYTHING
            elif before == unicode.NUMERIC and bit & _MID_NUMBERS:
                if _next_class(text, at + width, end, pages, entries) != 1 << unicode.NUMERIC:
                    break
                before = _ANYTHING
            else:
                break
        actual_before = word_break
        if word_break == unicode.REGIONAL_INDICATOR:
            num_regional += 1
        if not is_ignored:
            hangs_on_space = found & unicode.SPACE != 0
        if first >= 0 or not hangs_on_space:
            new_flags |= found
            new_chars += 1
            if first < 0:
                first = at
        at += width
        if not hangs_on_space:
            flags, chars, last = new_flags, new_chars, at
    return at, first, last, flags, chars
