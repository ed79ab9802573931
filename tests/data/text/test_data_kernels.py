"""Compiled loops against plain Python, and the scanner of Python sources against `ast`."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.document import normalize
from llmtrain.data.sources import python_docs
from llmtrain.data.text.kernels import SIGNALS
from llmtrain.data.text.signals import measure_batch

SPACES = "\n\n\t  \r\x85\u00a0\u2003\u2028\u3000\u205f\u1680"
ALPHABET = f"{SPACES}ab B.\x00\x0b\x0c\x1f\x7f\ufeffé\u0301e日😀\u2581\u0300"
TEXT = st.text(alphabet=ALPHABET, max_size=80) | st.text(max_size=40)
REPETITIVE = st.lists(st.sampled_from(["a", "b b", "ab", "é x", "", " ", "a b ab"]), max_size=30).map(
    "\n".join
)


def plain_signals(text: str) -> dict[str, int]:
    """The definitions, as they stand in docs/data_format.md."""
    words = text.split()
    lines = [line for line in text.split("\n") if line.strip()]
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    blocks = [tuple(paragraph) for paragraph in paragraphs if paragraph]
    again_lines = [line for at, line in enumerate(lines) if line in lines[:at]]
    again_blocks = [block for at, block in enumerate(blocks) if block in blocks[:at]]
    found = {
        "num_chars": len(text),
        "num_words": len(words),
        "num_word_chars": sum(map(len, words)),
        "num_lines": len(lines),
        "num_duplicate_lines": len(again_lines),
        "num_duplicate_line_chars": sum(map(len, again_lines)),
        "num_paragraphs": len(blocks),
        "num_duplicate_paragraphs": len(again_blocks),
        "num_duplicate_paragraph_chars": sum(len(line) for block in again_blocks for line in block),
    }
    for size in (2, 3, 4):
        grams = Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
        most = max(grams.values(), default=0)
        longest = max((len(" ".join(gram)) for gram, count in grams.items() if count == most), default=0)
        found[f"top_{size}gram_chars"] = most * longest if most > 1 else 0
    return found


@given(st.lists(TEXT, max_size=5))
@example(["\r\x00\n", "e\x00\u0301", "\ufeff\n x \n", "\u2000", "\x85a"])
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_scan_normalises_as_the_definition_says(texts: list[str]) -> None:
    measured = measure_batch([text.encode() for text in texts])
    ends = measured.offsets.tolist()
    found = [measured.text[a:b].tobytes().decode() for a, b in pairwise(ends)]
    assert found == [normalize(text) for text in texts]


@given(TEXT)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)


@given(st.lists(TEXT | REPETITIVE, max_size=5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_signals_equal_their_definitions(texts: list[str]) -> None:
    measured = measure_batch([text.encode() for text in texts])
    for text, row in zip(texts, measured.signals.tolist(), strict=True):
        assert dict(zip(SIGNALS, row, strict=True)) == plain_signals(normalize(text))


def test_white_space_is_what_python_says_it_is() -> None:
    spaces = [character for character in map(chr, range(0x3100)) if character.isspace()]
    others = ["\u200b", "\u180e", "\u2060", "é", "\u20ac", "\u3001"]
    texts = [f"a{character}b" for character in (*spaces, *others)]
    rows = measure_batch([text.encode() for text in texts]).signals
    assert rows[:, SIGNALS.index("num_words")].tolist() == [len(normalize(text).split()) for text in texts]


def test_signals_of_a_document_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    long = " ".join(texts) + "\n" + "\n".join(texts)
    batch = [long, *texts[:10], long, *texts[:10]]
    rows = measure_batch([text.encode() for text in batch]).signals.tolist()
    alone = [measure_batch([text.encode()]).signals.tolist()[0] for text in batch]
    assert rows == alone


def test_text_that_is_not_utf8_is_set_apart_with_its_reason() -> None:
    measured = measure_batch([b"good", b"bad \xff", "gut ä".encode()])
    assert measured.kept == [0, 2]
    assert "0xff" in measured.invalid[1]
    assert measured.text.tobytes().decode() == "goodgut ä"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""One.\n\n    Two\n      three\n    """\nx = 1\n', "One.\n\nTwo\n  three"),
        ("#!/bin/python\n# a\n#b\n\n## c\n#\nx = 1  # behind code\n# d\n", "a\nb\n\nc\n\nd"),
        ("x = '''# no\n# comment'''\n", ""),
        ("f(\n    # in brackets\n    1)\n", "in brackets"),
        ("def f():\n    r'raw \\d'\n    'a' + 'b'\n    return '#'\n", "raw \\d"),
        ('x = 1\n"""Of an attribute."""\n', "Of an attribute."),
        ('b"""bytes"""\nf"""format"""\n', ""),
        ("'''never closed\n# x\n", ""),
        ("x = 'not closed\n# after\n", "after"),
        ('"""\\\nContinued.\n"""', "Continued."),
        ("def f():\n\t'''a\n\t\tb\n\t'''\n", "a\nb"),
        ("x = \\\n'string'\n# y\n", "y"),
        ("'a'; 'b'\n", "a"),
        ("", ""),
        ("#", ""),
        ("'", ""),
    ],
)
def test_docstrings_and_comments_are_found(source: str, expected: str) -> None:
    assert python_docs.extract([source.encode()]) == [expected.encode()]


@given(st.lists(st.text(alphabet="'\"#\\ \n\tr(ax)", max_size=40), max_size=4))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_can_be_scanned_and_files_do_not_touch_each_other(sources: list[str]) -> None:
    raw = [source.encode() for source in sources]
    assert python_docs.extract(raw) == [python_docs.extract([source])[0] for source in raw]


def test_the_scanner_finds_the_docstrings_that_ast_finds() -> None:
    """99.9% of those without escapes, word for word; the rest are statements that share a line."""
    num_found = num_all = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::2]:
        source = path.read_bytes()
        lines = source.split(b"\n")
        text = python_docs.extract([source])[0].decode(errors="replace")
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Expr(value=ast.Constant(value=str(value))):
                    pass
                case _:
                    continue
            if b"\\" in b"".join(lines[node.lineno - 1 : node.end_lineno]):
                continue
            num_all += 1
            trimmed = re.sub(r"[ \t]+(?=\n|$)", "", inspect.cleandoc(value)).strip("\n")
            num_found += trimmed in text
    assert num_all > 1500
    assert num_found >= 0.999 * num_all


def test_the_draw_is_a_function_of_names_and_seed() -> None:
    files = python_docs.installed_files()
    drawn = python_docs.draw_order(files, 0)
    assert sorted(drawn, key=lambda file: file.name) == files
    assert python_docs.draw_order(files[::-1], 0) == drawn
    assert python_docs.draw_order(files, 1) != drawn
    assert {file.source for file in files} >= {"python", "numpy"}
