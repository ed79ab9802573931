"""Every entry of the runbook quotes what the code says, and names a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs" / "runbook.md").read_text().splitlines()
    if line.startswith("|") and not line.startswith(("| symptom", "|---"))
]
ENTRIES = [pytest.param(says, test, id=symptom) for symptom, says, _, test in ROWS]


def spoken() -> str:
    """Every string of the package, those that are split over lines put together; a value is one space."""
    texts = []
    for path in sorted((ROOT / "llmtrain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


SPOKEN = spoken()


@pytest.mark.parametrize(("says", "test"), ENTRIES)
def test_an_entry_is_true(says: str, test: str) -> None:
    (words,) = re.fullmatch(r"`([^`]+)`", says).groups()  # type: ignore[union-attr]
    assert words in SPOKEN, f"nothing says {words!r} any more"
    path, _, name = test.strip("`").partition("::")
    text = (ROOT / path).read_text()
    assert not name or f"def {name}(" in text


def test_the_runbook_has_entries_for_what_hurts() -> None:
    assert len(ROWS) >= 14
