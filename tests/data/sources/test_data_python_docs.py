from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.sources import python_docs


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
