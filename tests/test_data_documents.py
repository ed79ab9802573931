"""What docs/ says of the data folder and of large corpora agrees with the code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from scaling_table import PAGE, filled, rates_of

from llmtrain.data.content.config import PII_KINDS
from llmtrain.data.dedup.config import NearConfig
from llmtrain.data.dedup.units import DOCUMENT
from llmtrain.data.document import BAD_REASONS, SKIP_REASONS
from llmtrain.data.folder import LISTINGS, PARTS
from llmtrain.data.text.edit import EDIT_SIGNALS
from llmtrain.data.text.measure import EDITED_SIGNALS, SIGNALS
from llmtrain.data.verdicts import VERDICTS

DOCS = Path(__file__).parents[1] / "docs"


def quoted(name: str) -> set[str]:
    """Everything between backquotes of a page."""
    return set(re.findall(r"`([^`\n]+)`", (DOCS / name).read_text(encoding="utf-8")))


def test_every_column_of_signals_and_verdicts_is_explained() -> None:
    known = quoted("data_format.md")
    between = {f"duplicate_{size}gram_chars" for size in range(6, 10)}
    for name in (*SIGNALS, *EDIT_SIGNALS, *EDITED_SIGNALS, *VERDICTS.names):
        assert name in known | between, f"docs/data_format.md does not explain {name}"
    assert set(PII_KINDS) <= known


def test_every_reason_of_the_quarantine_is_explained() -> None:
    assert {*BAD_REASONS, *SKIP_REASONS} <= quoted("data_format.md")


def test_every_folder_and_listing_is_in_the_picture() -> None:
    picture = (DOCS / "data_format.md").read_text(encoding="utf-8").partition("## Keys")[0]
    for name in (*(f"{part}/" for part in PARTS), *LISTINGS):
        assert name in picture, f"docs/data_format.md does not show {name}"


def test_the_index_takes_the_bytes_that_are_documented() -> None:
    assert f"for each kept document {DOCUMENT.itemsize} bytes" in (DOCS / "data_format.md").read_text()


def test_the_tutorials_table_of_bands_is_the_formula() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    found = re.search(r"\| true similarity \|(.*)\|\n\|[-|]+\n((?:\| found by .*\n)+)", text)
    assert found is not None
    similarities = [float(cell) for cell in found[1].split("|")]
    rows = re.findall(r"found by (\d+) bands x (\d+) rows \|(.*)\|", found[2])
    assert len(rows) == 2
    for bands, per_band, cells in rows:
        num = int(bands) * int(per_band)
        near = replace(NearConfig(), num_permutations=num, bands=int(bands), rows=int(per_band))
        expected = [f"{near.candidate_probability(similarity):.2f}" for similarity in similarities]
        assert [cell.strip() for cell in cells.split("|")] == expected


def test_the_tables_of_large_corpora_are_computed_from_the_rates_above_them() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(rates_of(page)) == page.count("| `RATE_") + page.count("| `SIZE_") + page.count("| `SHARE_")
    assert filled(page) == page, "run `python tests/data/scaling_table.py`, which writes them anew"


def test_another_rate_gives_another_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(re.sub(r"(`RATE_scan` \| )[\d.]+", r"\g<1>3.0", page)) != page


def test_the_layout_names_every_file_of_the_data_room() -> None:
    text = (DOCS / "layout.md").read_text(encoding="utf-8").partition("## The data room's files")[2]
    names = {
        name for name in re.findall(r"`([\w/.]+)`", text.partition("\n## ")[0]) if name.endswith((".py", "/"))
    }
    data = DOCS.parent / "llmtrain/data"
    files = {path.name for path in data.rglob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in data.glob("*/__init__.py")}
    assert names == files | folders
