"""Words against the rules of UAX #29 written out plainly, and their hashes against plain Python."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.text import unicode_tables as unicode
from llmtrain.data.text.unicode_tables import entry_of
from llmtrain.data.text.utf8 import Bytes
from llmtrain.data.text.words import (
    IS_ALPHABETIC,
    IS_ALPHANUMERIC,
    IS_WORD,
    Offsets,
    Words,
    split_words,
    words_of_spans,
)

MIXED = (
    "ab Z09_.,:;'\"-#\n\t\r é’ß\u0301\u200d\u200eא'\"カーｱ日あ😀👍🏽🇫🇷\u00a0\u202f\u3000กำИ·١,٫K\u0130Ⓐ\u2028"
)
ASCII = "aaaabbZ019_.,:;'\"- \n\t()"
TEXT = st.text(alphabet=MIXED, max_size=60) | st.text(alphabet=ASCII, max_size=120) | st.text(max_size=40)


def joined(texts: list[bytes]) -> tuple[Bytes, Offsets]:
    """Texts back to back, and where each begins and the last ends."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.frombuffer(bytearray().join(texts), dtype=np.uint8), offsets


def split(*texts: str) -> Words:
    return split_words(*joined([text.encode() for text in texts]))


def words_in(text: str) -> list[str]:
    raw, words = text.encode(), split(text)
    return [raw[a:b].decode() for a, b in zip(words.starts, words.ends, strict=True)]


def is_boundary(classes: list[str], entries: list[int], at: int) -> bool:
    """Whether UAX #29 breaks between characters at - 1 and at: its rules, in its order."""
    newlines, ignored = {"CR", "LF", "Newline"}, {"Extend", "Format", "ZWJ"}
    letters = {"ALetter", "Hebrew_Letter"}
    letter_marks = {"MidLetter", "MidNumLet", "Single_Quote"}
    number_marks = {"MidNum", "MidNumLet", "Single_Quote"}
    left, right = classes[at - 1], classes[at]
    if (left, right) == ("CR", "LF"):  # WB3
        return False
    if left in newlines or right in newlines:  # WB3a, WB3b
        return True
    if left == "ZWJ" and entries[at] & unicode.PICTOGRAPHIC:  # WB3c
        return False
    if left == right == "WSegSpace":  # WB3d
        return False
    if right in ignored:  # WB4
        return False

    before = [at for at in range(at) if classes[at] not in ignored or at == 0 or classes[at - 1] in newlines]
    after = [at for at in range(at, len(classes)) if classes[at] not in ignored]
    left = classes[before[-1]]
    left_2 = classes[before[-2]] if len(before) > 1 else ""
    right_2 = classes[after[1]] if len(after) > 1 else ""
    joined_pairs = (
        (letters, letters),  # WB5
        ({"Hebrew_Letter"}, {"Single_Quote"}),  # WB7a
        ({"Numeric"}, {"Numeric"}),  # WB8
        (letters, {"Numeric"}),  # WB9
        ({"Numeric"}, letters),  # WB10
        ({"Katakana"}, {"Katakana"}),  # WB13
        ({*letters, "Numeric", "Katakana", "ExtendNumLet"}, {"ExtendNumLet"}),  # WB13a
        ({"ExtendNumLet"}, {*letters, "Numeric", "Katakana"}),  # WB13b
    )
    if any(left in lefts and right in rights for lefts, rights in joined_pairs):
        return False
    joined_threes = (
        (letters, letter_marks, letters),  # WB6, WB7
        ({"Hebrew_Letter"}, {"Double_Quote"}, {"Hebrew_Letter"}),  # WB7b, WB7c
        ({"Numeric"}, number_marks, {"Numeric"}),  # WB11, WB12
    )
    for first, middle, last in joined_threes:
        if left in first and right in middle and right_2 in last:
            return False
        if left_2 in first and left in middle and right in last:
            return False
    if left == right == "Regional_Indicator":  # WB15, WB16
        run = 0
        while run < len(before) and classes[before[-1 - run]] == "Regional_Indicator":
            run += 1
        return run % 2 == 0
    return True  # WB999


def plain_words(text: str) -> list[str]:
    """The definition in the docstring of the module."""
    entries = [entry_of(ord(character)) for character in text]
    classes = [unicode.WORD_BREAKS[entry & unicode.WORD_BREAK] for entry in entries]
    ends = [at for at in range(1, len(text)) if is_boundary(classes, entries, at)] + [len(text)] * bool(text)
    found: list[tuple[int, int]] = []
    start = 0
    for end in ends:
        base, content = "", []
        for at in range(start, end):
            if classes[at] not in ("Extend", "Format", "ZWJ") or not base:
                base = text[at]
            if not base.isspace():
                content.append(at)
        start = end
        if not content:
            continue
        first, last = content[0], content[-1] + 1
        if (
            found
            and found[-1][1] == first
            and is_symbol(text[first:last])
            and is_symbol(text[slice(*found[-1])])
        ):
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return [text[first:last] for first, last in found]


def is_symbol(word: str) -> bool:
    return not any(entry_of(ord(character)) & (unicode.ALPHABETIC | unicode.NUMBER) for character in word)


def plain_hash(raw: bytes) -> int:
    mask = 2**64 - 1
    state = seed = 0x9E3779B97F4A7C15
    blocks = [raw[at : at + 8] for at in range(0, len(raw), 8)]
    for block in blocks[:-1]:
        state = ((state ^ int.from_bytes(block, "little")) * 0xD6E8FEB86659FD93) & mask
        state ^= state >> 32
    last = int.from_bytes(blocks[-1].rjust(8, b"\0"), "little")
    state = ((state ^ last ^ (len(raw) * seed & mask)) * 0xD6E8FEB86659FD93) & mask
    state = ((state ^ (state >> 32)) * 0xFF51AFD7ED558CCD) & mask
    return state ^ (state >> 29)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The quick (“brown”) fox can’t jump 32.3 feet, right?", None),
        ("it's 'tis don’t e.g. a:b 3.14 1,000.50 12:30 x_1 __init__", None),
        ("... ----- ?! «—» \u202f! --x-- a...b", None),
        ("naïve café e\u0301 ＡＢ ﬁn ſ", "naïve|café|e\u0301|ＡＢ|ﬁn|ſ"),
        ("Съешь ещё этих булок, да выпей чаю", "Съешь|ещё|этих|булок|,|да|выпей|чаю"),
        ("Ὦ Ζεῦ, ἄνδρα μοι ἔννεπε·", "Ὦ|Ζεῦ|,|ἄνδρα|μοι|ἔννεπε|·"),
        ('צה"ל הוא ג\'ירפה, ש"ס.', 'צה"ל|הוא|ג\'ירפה|,|ש"ס|.'),
        ("السَّلامُ عليكم، ١٢٣٫٤", "السَّلامُ|عليكم|،|١٢٣٫٤"),
        ("नमस्ते दुनिया। क्षत्रिय", "नमस्ते|दुनिया|।|क्षत्रिय"),
        ("আমি বাংলায় গান গাই।", "আমি|বাংলায়|গান|গাই|।"),
        ("தமிழ் மொழி", "தமிழ்|மொழி"),
        ("ไทย", "ไ|ท|ย"),
        ("日本語カタカナひらがなＡＢＣ", "日|本|語|カタカナ|ひ|ら|が|な|ＡＢＣ"),
        ("我爱北京，天安门。", "我|爱|北|京|，|天|安|门|。"),
        ("한국어 텍스트입니다.", "한국어|텍스트입니다|."),
        ("ქართული ენა, Հայերեն լեզու։", "ქართული|ენა|,|Հայերեն|լեզու|։"),
        ("አማርኛ ቋንቋ። ᏣᎳᎩ", "አማርኛ|ቋንቋ|።|ᏣᎳᎩ"),
        ("👨‍👩‍👧 🇫🇷🇩🇪x 👍🏽👍 a\u200d😀", "👨‍👩‍👧|🇫🇷🇩🇪|x|👍🏽👍|a\u200d😀"),
        ("«\u202fmot\u202f» 10\u202f000 \u200ex", "«|mot|»|10\u202f000|x"),
        ("a\r\nb\u2028c\x0bd\x85e", "a|b|c|d|e"),
        ("", ""),
        (" \n\t\u3000", ""),
    ],
)
def test_segments_of_many_scripts(text: str, expected: str | None) -> None:
    found = words_in(text)
    assert found == plain_words(text)
    assert expected is None or found == [word for word in expected.split("|") if word]


def test_english_words_are_as_one_would_read_them() -> None:
    assert words_in("It's (not) 3.14, e.g. x_1... -- right?!") == [
        *("It's", "(", "not", ")", "3.14", ",", "e.g", ".", "x_1", "...", "--", "right", "?!")
    ]


@given(TEXT)
@example("a.\u0301b '\u200da ' \u0301a \u200d😀 \n\u0301")
@example("1.1 1.a a.1 a_.b 1,'2 '' a''b a:.b א\"א א\"b א' א'1")
@example("abcdefgh abcdefgh.ijklmnop_1234567.x 12345678,12345678")
@settings(max_examples=500, deadline=None, derandomize=True)
def test_segments_are_those_of_the_rules(text: str) -> None:
    assert words_in(text) == plain_words(text)


@given(st.lists(TEXT, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_words_of_a_document_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    together = split(*texts)
    begin = 0
    for number, text in enumerate(texts):
        alone = split(text)
        own = slice(together.offsets[number], together.offsets[number + 1])
        assert (together.starts[own] - begin).tolist() == alone.starts.tolist()
        for name in ("num_chars", "kind", "hash", "folded"):
            assert getattr(together, name)[own].tolist() == getattr(alone, name).tolist()
        begin += len(text.encode())


@given(TEXT)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_counts_kinds_and_hashes_are_those_of_the_text_of_a_word(text: str) -> None:
    found = split(text)
    for number, word in enumerate(words_in(text)):
        assert found.num_chars[number] == len(word)
        assert found.hash[number] == plain_hash(word.encode())
        plain = any(entry_of(ord(character)) & unicode.PLAIN for character in word)
        assert bool(found.kind[number] & IS_WORD) == plain
        if any(unicodedata.category(character) == "Cn" for character in word):
            continue  # younger than this Python's Unicode, not than our table's
        assert bool(found.kind[number] & IS_ALPHABETIC) == any(map(str.isalpha, word))
        assert bool(found.kind[number] & IS_ALPHANUMERIC) == any(map(str.isalnum, word))
        lower = "".join("i" if character == "\u0130" else character.lower() for character in word)
        assert found.folded[number] == plain_hash(lower.encode())


@given(TEXT)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_spans_from_outside_get_the_same_description(text: str) -> None:
    raw, offsets = joined([text.encode(), b"x y"])
    words = split_words(raw, offsets)
    again = words_of_spans(raw, offsets, words.starts, words.ends, words.offsets)
    for name, column in words._asdict().items():
        assert getattr(again, name).dtype == column.dtype
        assert getattr(again, name).tolist() == column.tolist()


def test_spans_that_do_not_fit_their_documents_are_refused() -> None:
    raw, offsets = joined([b"a b"])
    spans = np.array([0, 2], dtype=np.int32)
    with pytest.raises(
        ValueError, match="1 documents; word offsets of 1, up to 3; 2 starts and 2 ends; give"
    ):
        words_of_spans(raw, offsets, spans, spans + 1, np.array([0, 3]))


def test_text_that_may_not_be_written_to_is_read_too() -> None:
    raw = np.frombuffer(b"a word, and another one", dtype=np.uint8)
    assert len(split_words(raw, np.array([0, len(raw)])).starts) == 6


def test_more_words_than_half_the_bytes_fit() -> None:
    assert words_in("a,b," * 50) == list("a,b," * 50)


def test_the_table_of_characters_is_what_its_maker_writes() -> None:
    pytest.importorskip("regex", reason="the properties of Unicode 18 come from the package regex")
    file = unicode.files("llmtrain.data.text") / unicode.FILE_NAME
    assert file.read_text(encoding="ascii") == unicode.properties_text()
