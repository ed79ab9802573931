"""Sentence ends of every script, against UAX #29's own examples."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from llmtrain.data.text import sentences
from llmtrain.data.text.sentences import count_sentences, sentence_tables


def count(line: str) -> int:
    text = np.frombuffer(bytearray(line.encode()), dtype=np.uint8)
    return int(count_sentences(text, 0, len(text), *sentence_tables()))


@pytest.mark.parametrize(
    "line",
    [  # UAX #29, revision 43, table 3 (sentence boundaries): no boundary inside
        "c.d",
        "3.4",
        "U.S",
        "the resp. leaders are",
        "etc.)’ ‘(the",
        "etc., and",
        "“Go, go.” he said",
        "a... b",
    ],
)
def test_no_sentence_ends_inside(line):
    assert count(line) == 1


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("", 0),
        (" \t\u3000", 0),
        ("no mark at all", 1),
        ("One. Two", 2),
        ("One. Two.", 2),
        ("One? two! three", 3),
        ("The resp. Leaders are", 2),
        ("etc.)’ ‘(The", 2),
        ("What?! and so", 2),
        ("Mr. Smith", 2),
        ("字。 字。字", 3),
        ("吾輩は猫である。名前はまだ無い。", 2),
        ("यह एक वाक्य है। यह दूसरा है।", 2),
        ("هل هذا سؤال؟ نعم.", 2),
        ("Ἦ. \u0301Ἦ", 2),
        ("= = =", 1),
        ("She said “See spot run.”  John shook his head.", 2),
    ],
)
def test_sentences_end_at_the_marks_of_every_script(line, number):
    assert count(line) == number


def test_the_table_agrees_with_python_where_python_knows_the_character():
    table = sentences.character_table()
    for code in range(sentences.TABLE_SIZE):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Cs") or code == 0x19DA:  # a digit since Unicode 15.1
            continue
        entry = int(table[code])
        assert bool(entry & sentences.IS_UPPER) == character.isupper(), hex(code)
        assert bool(entry & sentences.IS_DIGIT) == character.isdigit(), hex(code)
        assert bool(entry & sentences.IS_DECIMAL) == character.isdecimal(), hex(code)
        assert bool(entry & sentences.IS_WORD) == (character.isalnum() or character == "_"), hex(code)
        assert (entry & sentences.CLASS == sentences.SPACE) == character.isspace(), hex(code)
