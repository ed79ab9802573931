"""Signals against plain Python."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.text import measure as kernels
from llmtrain.data.text import unicode_tables as unicode
from llmtrain.data.text.measure import EDITED_SIGNALS, SIGNALS, STOP_WORDS, measure, measure_edited
from llmtrain.data.text.utf8 import Bytes
from llmtrain.data.text.words import IS_ALPHABETIC, IS_WORD, Offsets, split_words, words_of_spans

PIECES = (
    *(
        "the",
        "of",
        "a",
        "b",
        "c d",
        "The",
        "I.",
        "1,2",
        "#",
        "##",
        "...",
        "....",
        "…",
        "-",
        "•",
        " -",
        "é",
        "日本",
    ),
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\n\n",
        "\n\n\n",
        " \n",
        "\r\n",
        "\r",
        "\x0b",
        "\x1c",
        "\x85",
        "\u2028",
        "\u00a0",
    ),
    *(
        "\u3000",
        "word",
        "and more words",
        "a b a b a b",
        "x",
        "?",
        "!",
        "。",
        "😀",
        "aBcDeFgH12345678",
        "Ⅷ",
        "²",
    ),
)
TEXT = (
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
    | st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join)
    | st.lists(st.sampled_from(["a b", "a", "", "b", " ", "a  b", "a."]), max_size=30).map("\n".join)
    | st.text(alphabet=st.characters(exclude_categories=("Cs", "Cn")), max_size=60)
)
"""Cn: characters younger than this Python's Unicode, which our tables know."""
REPETITIVE = st.lists(st.sampled_from("aaabbc"), max_size=80).map(" ".join)


def joined(texts: list[bytes]) -> tuple[Bytes, Offsets]:
    """Texts back to back, and where each begins and the last ends."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.frombuffer(bytearray().join(texts), dtype=np.uint8), offsets


def repeats(items: list[str]) -> tuple[int, int]:
    again = [item for at, item in enumerate(items) if item in items[:at]]
    return len(again), sum(map(len, again))


def plain_ngrams(words: list[str]) -> dict[str, int]:
    found = {}
    for size in (2, 3, 4):
        grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
        counts = Counter(grams)
        best = max(grams, key=lambda gram: counts[gram], default=())  # of several, the first
        found[f"top_{size}gram_chars"] = len(" ".join(best)) * counts[best]
    for size in range(5, 11):
        met, at, chars = set(), 0, 0
        while at + size <= len(words):
            gram = tuple(words[at : at + size])
            if gram in met:
                chars += len("".join(gram))
                at += size
            else:
                met.add(gram)
                at += 1
        found[f"duplicate_{size}gram_chars"] = chars
    return found


def plain_signals(text: str, words: list[str], kinds: list[int]) -> dict[str, int]:
    lines = text.splitlines()
    parts = re.split("\n+", text)
    paragraphs = re.split("\n{2,}", text.strip())
    return {
        "num_chars": len(text),
        "num_alphabetic_chars": sum(map(str.isalpha, text)),
        "num_alphanumeric_chars": sum(map(str.isalnum, text)),
        "num_uppercase_chars": sum(map(str.isupper, text)),
        "num_digit_chars": sum(map(str.isdigit, text)),
        "num_hashes": text.count("#"),
        "num_ellipses": text.count("...") + text.count("…"),
        "num_all_lines": len(lines),
        "longest_line_chars": max(map(len, lines), default=0),
        "num_bullet_lines": sum(line.lstrip().startswith(("-", "•")) for line in lines),
        "num_ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines),
        "num_line_chars": sum(map(len, lines)),
        "num_lines": len(parts),
        "num_duplicate_lines": repeats(parts)[0],
        "num_duplicate_line_chars": repeats(parts)[1],
        "num_paragraphs": len(paragraphs),
        "num_duplicate_paragraphs": repeats(paragraphs)[0],
        "num_duplicate_paragraph_chars": repeats(paragraphs)[1],
        "num_segments": len(words),
        "num_words": sum(kind & IS_WORD for kind in kinds),
        "num_word_chars": sum(len(word) for word, kind in zip(words, kinds, strict=True) if kind & IS_WORD),
        "num_alphabetic_words": sum(bool(kind & IS_ALPHABETIC) for kind in kinds),
        "num_stop_words": sum(word in STOP_WORDS for word in words),
        "num_distinct_stop_words": len({*words} & {*STOP_WORDS}),
        **plain_ngrams(words),
    }


def plain_edited(text: str, words: list[str], kinds: list[int], short_line_chars: int) -> dict[str, int]:
    all_lines = text.split("\n")
    lines = [line for line in all_lines if line.strip()]
    lengths = sorted(map(len, all_lines), reverse=True)
    return {
        "edited_num_chars": len(text),
        "edited_num_words": sum(kind & IS_WORD for kind in kinds),
        "edited_num_segments": len(words),
        "edited_num_newlines": text.count("\n"),
        "edited_num_lines": len(lines),
        "edited_num_terminal_lines": sum(
            bool(unicode.entry_of(ord(line[-1])) & unicode.TERMINAL) for line in lines
        ),
        "edited_num_short_lines": sum(len(line) <= short_line_chars for line in lines),
        "edited_num_duplicate_line_chars": repeats(lines)[1],
        "edited_third_longest_line_chars": lengths[2] if len(lengths) > 2 else 0,
    }


def measured(texts: list[str]) -> list[tuple[dict[str, int], dict[str, int], list[str], list[int]]]:
    """Signals before and after edits, the words and their kinds."""
    raw, offsets = joined([text.encode() for text in texts])
    words = split_words(raw, offsets)
    rows = measure(raw, offsets, words).tolist()
    edited_rows = measure_edited(raw, offsets, words, 3).tolist()
    found = []
    for number, (row, edited) in enumerate(zip(rows, edited_rows, strict=True)):
        own = range(words.offsets[number], words.offsets[number + 1])
        spelled = [raw[words.starts[word] : words.ends[word]].tobytes().decode() for word in own]
        kinds = [int(words.kind[word]) for word in own]
        found.append(
            (
                dict(zip(SIGNALS, row, strict=True)),
                dict(zip(EDITED_SIGNALS, edited, strict=True)),
                spelled,
                kinds,
            )
        )
    return found


def assert_plain(texts: list[str]) -> None:
    for text, (row, edited, words, kinds) in zip(texts, measured(texts), strict=True):
        assert row == plain_signals(text, words, kinds)
        assert edited == plain_edited(text, words, kinds, 3)


@given(st.lists(TEXT, max_size=4))
@example(
    ["", "\n", "\n\n", "a\n", "\na", " ", "\u2028", "a\u2028", "  \n \n a\n\n a \n\n\n", "\r\n\r\n", "\n\r"]
)
@example(
    ["..... ... .... …...x" + "." * 20 + "a..", "a.......", "é...", "abcdef..", ".é..", "......é", "." * 64]
)
@example(["the the of to be The and and that have with with", "a b a b a b a b", "x"])
@settings(max_examples=400, deadline=None, derandomize=True)
def test_signals_equal_their_definitions(texts: list[str]) -> None:
    assert_plain(texts)


@given(
    REPETITIVE
    | st.lists(st.sampled_from(["a b c d e f", "g", "a b c", "h i j k"]), max_size=40).map(" ".join)
)
@example(" ".join("abcdefghij" * 2))
@example(" ".join("abcde" * 6))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_repeated_ngrams_equal_their_definition(text: str) -> None:
    assert_plain([text])


def test_long_text_with_repeats_far_apart_equals_the_definition() -> None:
    draw = np.random.default_rng(0)
    vocabulary = np.array(["the", "of", *(f"w{number}" for number in range(300))])
    lines = [" ".join(draw.choice(vocabulary, size=draw.integers(1, 20))) for _ in range(200)]
    texts = ["\n".join(draw.choice(lines, size=150)) for _ in range(3)]
    texts.append("\n\n".join(draw.choice(lines[:20], size=60)))
    assert_plain(texts)


@given(st.lists(TEXT | REPETITIVE, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_signals_of_a_document_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    assert measured(texts) == [measured([text])[0] for text in texts]


def test_words_of_another_tokenizer_are_what_counts() -> None:
    raw, offsets = joined([b"the cat the cat"])
    starts = np.array([0, 4, 8, 12], dtype=np.int32)
    words = words_of_spans(raw, offsets, starts, starts + np.array([3, 1, 3, 1], np.int32), np.array([0, 4]))
    row = dict(zip(SIGNALS, measure(raw, offsets, words)[0].tolist(), strict=True))
    assert (row["num_words"], row["num_word_chars"], row["num_stop_words"]) == (4, 8, 2)
    assert row["top_2gram_chars"] == 2 * len("the c")


def test_no_documents_have_no_signals() -> None:
    raw, offsets = joined([])
    words = split_words(raw, offsets)
    assert measure(raw, offsets, words).shape == (0, len(SIGNALS))
    assert measure_edited(raw, offsets, words, 30).shape == (0, len(EDITED_SIGNALS))


@pytest.mark.parametrize("mark", ["。", "?", "۔", "।", "።", "…"])
def test_sentences_end_in_many_scripts(mark: str) -> None:
    _, edited, _, _ = measured([f"abc{mark}"])[0]
    assert edited["edited_num_terminal_lines"] == (mark != "…")


def test_warming_up_leaves_nothing_to_compile() -> None:
    kernels.warm_up()
    before = [len(kernel.signatures) for kernel in (kernels._measure_text, kernels._measure_words)]
    measured(["some text\n", "more"])
    assert before == [len(kernel.signatures) for kernel in (kernels._measure_text, kernels._measure_words)]
