"""The bytes that docs/data_format.md shows are those that the writers write."""

from __future__ import annotations

from pathlib import Path

from worked_example import example

PAGE = Path(__file__).resolve().parents[2] / "docs/data_format.md"


def test_the_bytes_on_the_page_are_those_that_are_written() -> None:
    assert f"\n{example()}\n" in PAGE.read_text(encoding="utf-8"), (
        "run `python tests/data/worked_example.py`, and put what it prints into docs/data_format.md"
    )
