"""What the compiled loops know of each Unicode character: one 16-bit entry, looked up in two steps.

The entries are in `unicode_properties.txt`, made by this module run as a program and read when first asked
for: the same on every Python, which the standard library's are not. Word_Break and Extended_Pictographic are
those of UAX #29; letters, numbers and white space those of `str`; punctuation and terminal marks those that
datatrove 0.10.1 (`utils/text.py`) counts by, so that rules named after it can decide as it does.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib import import_module
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

UNICODE_VERSION = "18.0"
FILE_NAME = "unicode_properties.txt"
NUM_CODE_POINTS = 0x110000
PAGE_BITS = 8
PAGE = 1 << PAGE_BITS

WORD_BREAKS = (
    "Other",
    "CR",
    "LF",
    "Newline",
    "Extend",
    "ZWJ",
    "Format",
    "Katakana",
    "Hebrew_Letter",
    "ALetter",
    "Single_Quote",
    "Double_Quote",
    "MidNumLet",
    "MidLetter",
    "MidNum",
    "Numeric",
    "ExtendNumLet",
    "Regional_Indicator",
    "WSegSpace",
)
"""The position of a Word_Break class is its number: bits 0 to 4 of an entry."""
OTHER, CR, LF, NEWLINE, EXTEND, ZWJ, FORMAT, KATAKANA, HEBREW_LETTER, ALETTER = range(10)
SINGLE_QUOTE, DOUBLE_QUOTE, MID_NUM_LET, MID_LETTER, MID_NUM, NUMERIC = range(10, 16)
EXTEND_NUM_LET, REGIONAL_INDICATOR, WSEG_SPACE = range(16, 19)
WORD_BREAK = 0x1F

PICTOGRAPHIC = 1 << 5
"""Extended_Pictographic."""
ALPHABETIC = 1 << 6
"""General category L, as `str.isalpha`."""
NUMBER = 1 << 7
"""Has a numeric value, as `str.isnumeric`; with ALPHABETIC it is `str.isalnum`."""
DIGIT = 1 << 8
"""As `str.isdigit`."""
UPPERCASE = 1 << 9
"""As `str.isupper`."""
CASED = 1 << 10
"""Lower-casing gives another character."""
SPACE = 1 << 11
"""As `str.isspace`."""
PLAIN = 1 << 12
"""Not in datatrove's punctuation: a word with such a character is no symbol."""
TERMINAL = 1 << 13
"""Ends a sentence."""

_PUNCTUATION = (
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    "\u00ab\u00b4\u00bb\u2013\u2014\u2019\u201c\u201d\u201e\u2026\u2236\u2501\u25ba\u3001\u3002"
    "\u3008\u3009\u300a\u300b\u300c\u300d\u3010\u3011\uff01\uff05\uff08\uff09\uff0c\uff0e\uff11\uff1a\uff1b\uff1f\uff5e"
)
_CONTROLS = (*range(9), 11, 12, *range(13, 32), *range(127, 160))
"""datatrove@0.10.1 `utils/text.py` PUNCTUATION, which leaves out tab and LF; U+FF11, a digit, is in it."""
_NOT_TERMINAL = (
    "\u1b4e\u1b4f\u1b7f\u2024\u2cf9\u2cfa\u2cfb\u2e60\u2e61\ufe12\ufe15\ufe16"
    "\U000113d4\U000113d5\U00016d6e\U00016d6f"
)
_TERMINAL_TOO = "\u17d6\u17d9\u17da"
"""How datatrove's TERMINAL_PUNCTUATION differs from Sentence_Terminal of Unicode 18."""


class Tables(NamedTuple):
    """The entry of code point c is `entries[pages[c >> 8], c & 255]`; lower-cased it is
    `lower[lower_pages[c >> 8], c & 255]`."""

    pages: npt.NDArray[np.uint8]
    entries: npt.NDArray[np.uint16]
    lower_pages: npt.NDArray[np.uint8]
    lower: npt.NDArray[np.int32]


@cache
def tables() -> Tables:
    """Those of the file. Loading takes some milliseconds."""
    starts, values = [], []
    lower = np.zeros(NUM_CODE_POINTS, dtype=np.int32)
    for line in (files("llmtrain.data.text") / FILE_NAME).read_text(encoding="ascii").splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("lower"):
            first, last, step, shift = (int(part) for part in line.split()[1:])
            lower[first : last + 1 : step] = shift
        else:
            start, value = line.split()
            starts.append(int(start, 16))
            values.append(int(value, 16))
    entries = np.repeat(np.array(values, dtype=np.uint16), np.diff([*starts, NUM_CODE_POINTS]))
    return Tables(*_paged(entries), *_paged(lower))


def _paged(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    rows = values.reshape(-1, PAGE)
    distinct: dict[bytes, int] = {}
    pages = np.array([distinct.setdefault(row.tobytes(), len(distinct)) for row in rows], dtype=np.uint8)
    first = [int(np.argmax(pages == page)) for page in range(len(distinct))]
    return pages, np.ascontiguousarray(rows[first])


def entry_of(code_point: int) -> int:
    """The entry of one character."""
    found = tables()
    return int(found.entries[found.pages[code_point >> PAGE_BITS], code_point & (PAGE - 1)])


def properties_text() -> str:
    """The content of `unicode_properties.txt`.

    `START ENTRY` in hexadecimal for each run of equal entries, then `lower FIRST LAST STEP SHIFT` in decimal.
    Needs the package regex (development only), which knows the properties of Unicode 18. Lower-casing is
    simple, one character to one: that of `str.lower`, and regex's for capitals younger than this Python's.
    """
    regex: Any = import_module("regex")

    def members(pattern: str) -> npt.NDArray[np.bool_]:
        found = np.zeros(NUM_CODE_POINTS, dtype=np.bool_)
        found[[match.start() for match in regex.finditer(pattern, every)]] = True
        return found

    # Surrogates are no characters of a text; U+E000 stands for them, and their entry is set to 0 below.
    every = "".join(chr(at) if not 0xD800 <= at < 0xE000 else "\ue000" for at in range(NUM_CODE_POINTS))
    entries = np.zeros(NUM_CODE_POINTS, dtype=np.uint16)
    for number, name in enumerate(WORD_BREAKS):
        entries[members(rf"\p{{Word_Break={name}}}")] = number
    no_punctuation = np.ones(NUM_CODE_POINTS, dtype=np.bool_)
    no_punctuation[[*map(ord, _PUNCTUATION), *_CONTROLS, *map(ord, _TERMINAL_TOO)]] = False
    terminal = members(r"\p{Sentence_Terminal}")
    terminal[[*map(ord, _NOT_TERMINAL)]] = False
    terminal[[*map(ord, _TERMINAL_TOO)]] = True
    shifts = _lower_shifts(regex)
    for bit, chosen in (
        (PICTOGRAPHIC, members(r"\p{Extended_Pictographic}")),
        (ALPHABETIC, members(r"\p{L}")),
        (NUMBER, members(r"\P{Numeric_Type=None}")),
        (DIGIT, members(r"[\p{Numeric_Type=Decimal}\p{Numeric_Type=Digit}]")),
        (UPPERCASE, members(r"\p{Uppercase}")),
        (CASED, shifts != 0),
        (SPACE, members(r"[\s\x1c-\x1f]")),
        (PLAIN, no_punctuation & ~terminal),
        (TERMINAL, terminal),
    ):
        entries[chosen] |= bit
    entries[0xD800:0xE000] = 0

    lines = [f"# Properties of Unicode {UNICODE_VERSION}; made by llmtrain/data/text/unicode_tables.py"]
    at = 0
    for entry, run in groupby(entries.tolist()):
        lines.append(f"{at:x} {entry:x}")
        at += sum(1 for _ in run)
    pairs = [(at, int(shifts[at])) for at in np.flatnonzero(shifts).tolist()]
    while pairs:
        first, shift = pairs[0]
        step, length = 1, 0
        for try_step in (1, 2):
            count = 1
            while pairs[count : count + 1] == [(first + count * try_step, shift)]:
                count += 1
            if count > length:
                step, length = try_step, count
        lines.append(f"lower {first} {pairs[length - 1][0]} {step} {shift}")
        pairs = pairs[length:]
    return "\n".join(lines) + "\n"


def _lower_shifts(regex: Any) -> npt.NDArray[np.int32]:
    shifts = np.zeros(NUM_CODE_POINTS, dtype=np.int32)
    is_lower, is_upper = regex.compile(r"\p{Ll}"), regex.compile(r"\p{Lu}")
    for at in range(NUM_CODE_POINTS):
        character = chr(at)
        lower = character.lower()[0]  # only U+0130 has two: i and a dot above
        if lower == character and unicodedata.category(character) == "Cn" and is_upper.match(character):
            cases = [chr(case) for case in regex._regex.get_all_cases(regex.IGNORECASE.value, at)]
            lower = next((case for case in cases if is_lower.match(case)), character)
        shifts[at] = ord(lower) - at
    return shifts


if __name__ == "__main__":
    Path(__file__).with_name(FILE_NAME).write_text(properties_text(), encoding="ascii")
