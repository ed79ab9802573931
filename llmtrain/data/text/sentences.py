"""Where sentences end: the default rules of Unicode's UAX #29 (revision 43, section 5), inside one line.

A sentence ends after a mark of any script (`.`, `?`, `!`, `。`, `।`, `؟`, ...) with the quotes, brackets
and spaces that follow it, and at the end of the line. It does not end after a full stop that a digit follows
(`3.14`), that stands between letters before a capital (`U.S`), or whose next letter is a small one
(`e.g. this`), nor before a comma, colon, semicolon or dash. Abbreviations are not known: `Mr. Smith` is two.

Classes of characters: marks, continuations and closing marks by the ranges below (Sentence_Break of Unicode
17, as the package regex 2026.11.15 has it); the others from unicode_tables.py, small letters also from
`str.islower`. One table of a byte a character serves the line edits too.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled_lean
from llmtrain.data.text import unicode_tables

_S_TERM = (
    "21 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 "
    "17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F "
    "203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 "
    "A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE12 FE15-FE16 FE56-FE57 FF01 FF1F FF61 10A56-10A57 "
    "10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 "
    "1123B-1123C 112A9 113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 "
    "11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 "
    "16D6E-16D6F 16E98 1BC9F 1DA88"
)
_A_TERM = "2E 2024 FE52 FF0E"
_S_CONTINUE = (
    "2C-2D 3A-3B 37E 55D 60C-60D 7F8 1802 1808 2013-2014 3001 FE10-FE11 FE13-FE14 FE31-FE32 FE50-FE51 "
    "FE54-FE55 FE58 FE63 FF0C-FF0D FF1A-FF1B FF64"
)
_CLOSE = (
    "22 27-29 5B 5D 7B 7D AB BB F3A-F3D 169B-169C 2018-201F 2039-203A 2045-2046 207D-207E 208D-208E "
    "2308-230B 2329-232A 275B-2760 2768-2775 27C5-27C6 27E6-27EF 2983-2998 29D8-29DB 29FC-29FD 2E00-2E0D "
    "2E1C-2E1D 2E20-2E29 2E42 2E55-2E5C 2E62-2E63 3008-3011 3014-301B 301D-301F FD3E-FD3F FE17-FE18 "
    "FE35-FE44 FE47-FE48 FE59-FE5E FF08-FF09 FF3B FF3D FF5B FF5D FF5F-FF60 FF62-FF63 1F676-1F678"
)

OTHER, S_TERM, A_TERM, S_CONTINUE, CLOSE, SPACE, UPPER, LOWER, LETTER, NUMERIC, EXTEND = range(11)
"""Sentence_Break of a character: the low four bits of its entry in the table. EXTEND includes Format."""
CLASS = 0x0F
IS_UPPER = 0x10
"""str.isupper"""
IS_DIGIT = 0x20
"""str.isdigit: superscripts too"""
IS_DECIMAL = 0x40
r"""str.isdecimal: the `\d` of a regular expression"""
IS_WORD = 0x80
r"""str.isalnum, or an underscore: the `\w` of a regular expression"""

TABLE_SIZE = 0x20000
"""Characters beyond are ideographs up to U+323AF, and nothing else that a rule asks for."""


@functools.cache
def character_table() -> npt.NDArray[np.uint8]:
    """Class and bits of every character below TABLE_SIZE."""
    found = unicode_tables.tables()
    codes = np.arange(TABLE_SIZE)
    pages, cells = codes >> unicode_tables.PAGE_BITS, codes & (unicode_tables.PAGE - 1)
    entries = found.entries[found.pages[pages], cells]
    lower = codes + found.lower[found.lower_pages[pages], cells]
    word_break = entries & unicode_tables.WORD_BREAK

    def has(bit: int) -> Any:
        return entries & np.uint16(bit) != 0

    is_small = np.array([chr(code).islower() for code in range(TABLE_SIZE)])
    is_small[lower[lower != codes]] = True
    is_numeric = word_break == unicode_tables.NUMERIC
    combining = (unicode_tables.EXTEND, unicode_tables.ZWJ, unicode_tables.FORMAT)
    table = np.full(TABLE_SIZE, OTHER, dtype=np.uint8)
    for kind, chosen in (
        (LETTER, has(unicode_tables.ALPHABETIC)),
        (LOWER, is_small),
        (UPPER, has(unicode_tables.UPPERCASE) | (has(unicode_tables.CASED) & ~is_small)),
        (NUMERIC, is_numeric),
        (SPACE, has(unicode_tables.SPACE)),
        (EXTEND, np.isin(word_break, combining) | (codes == 0x200B)),
        (LETTER, (codes >= 0x10D0) & (codes < 0x1100) | (codes >= 0x1C90) & (codes < 0x1CC0)),  # Georgian
    ):
        table[chosen] = kind
    for kind, ranges in ((S_TERM, _S_TERM), (A_TERM, _A_TERM), (S_CONTINUE, _S_CONTINUE), (CLOSE, _CLOSE)):
        for span in ranges.split():
            first, _, last = span.partition("-")
            table[int(first, 16) : int(last or first, 16) + 1] = kind
    table[has(unicode_tables.UPPERCASE)] |= IS_UPPER
    table[has(unicode_tables.DIGIT)] |= IS_DIGIT
    table[is_numeric & has(unicode_tables.DIGIT)] |= IS_DECIMAL
    table[has(unicode_tables.ALPHABETIC | unicode_tables.NUMBER) | (codes == ord("_"))] |= IS_WORD
    return table


@functools.cache
def _mark_bytes() -> npt.NDArray[np.bool_]:
    """Bytes that a mark's UTF-8 can begin with."""
    kinds = character_table() & CLASS
    marks = np.flatnonzero((kinds == S_TERM) | (kinds == A_TERM))
    first = np.zeros(256, dtype=np.bool_)
    first[[chr(code).encode()[0] for code in marks]] = True
    return first


def sentence_tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """What `count_sentences` takes after the span."""
    return character_table(), _mark_bytes()


@compiled_lean
def decode(text: Any, at: Any) -> Any:
    """Code point at `at`, and its width in bytes. The text is valid UTF-8."""
    byte = np.int64(text[at])
    if byte < 0x80:
        return byte, 1
    if byte < 0xE0:
        return (byte & 0x1F) << 6 | (np.int64(text[at + 1]) & 0x3F), 2
    if byte < 0xF0:
        return (byte & 0x0F) << 12 | (np.int64(text[at + 1]) & 0x3F) << 6 | (np.int64(text[at + 2]) & 0x3F), 3
    code = (byte & 0x07) << 18 | (np.int64(text[at + 1]) & 0x3F) << 12
    return code | (np.int64(text[at + 2]) & 0x3F) << 6 | (np.int64(text[at + 3]) & 0x3F), 4


@compiled_lean
def character(code: Any, table: Any) -> Any:
    """A character's entry in the table; ideographs beyond it are letters."""
    if code < TABLE_SIZE:
        return np.int64(table[code])
    return IS_WORD | LETTER if code <= 0x323AF else EXTEND if 0xE0001 <= code <= 0xE01EF else OTHER


@compiled_lean
def _class_before(text: Any, begin: int, at: int, table: Any) -> Any:
    """Class of the last character in text[begin:at] that is not combining."""
    while at > begin:
        at -= 1
        while at > begin and 0x80 <= text[at] < 0xC0:
            at -= 1
        code, _ = decode(text, at)
        kind = character(code, table) & CLASS
        if kind != EXTEND:
            return kind
    return OTHER


@compiled_lean
def _is_small_letter_next(text: Any, at: int, end: int, table: Any) -> bool:
    """Whether the next letter is a small one, with no mark before it (SB8)."""
    while at < end:
        code, width = decode(text, at)
        kind = character(code, table) & CLASS
        if kind == LOWER:
            return True
        if kind in (UPPER, LETTER, S_TERM, A_TERM):
            return False
        at += width
    return False


@compiled_lean
def count_sentences(text: Any, begin: int, end: int, table: Any, mark_bytes: Any) -> Any:
    """Sentences in one line, text[begin:end]: 0 for white space alone."""
    count = 0
    is_open = False  # something but white space since the last end
    at: Any = begin
    while at < end:
        plain, stop, one = np.uintp(at), np.uintp(end), np.uintp(1)
        while plain < stop and not mark_bytes[text[plain]]:
            is_open = is_open or text[plain] > 32
            plain += one
        at = np.int64(plain)
        if at == end:
            break
        code, width = decode(text, at)
        mark = character(code, table) & CLASS
        is_open = is_open or mark != SPACE
        if mark != S_TERM and mark != A_TERM:
            at += width
            continue
        before = _class_before(text, begin, at, table) if mark == A_TERM else OTHER
        at += width
        spaces = False
        closed = False
        small_letter_next = mark == A_TERM and _is_small_letter_next(text, at, end, table)
        while at < end:
            code, width = decode(text, at)
            kind = character(code, table) & CLASS
            if kind == EXTEND:  # SB5
                at += width
                continue
            if mark == A_TERM and not closed and not spaces:
                if kind == NUMERIC:  # SB6
                    break
                if kind == UPPER and (before in (UPPER, LOWER)):  # SB7
                    break
            if small_letter_next or kind in (S_CONTINUE, S_TERM, A_TERM):  # SB8, SB8a
                break
            if kind == SPACE:  # SB9, SB10
                spaces = True
            elif kind == CLOSE and not spaces:  # SB9
                closed = True
            else:  # SB11
                count += 1
                is_open = False
                break
            at += width
    return count + (1 if is_open else 0)
