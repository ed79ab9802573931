"""The kernels of line deduplication against plain Python: what counts as a line, and how it is cut out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dedup.config import LineConfig, LineUnit
from llmtrain.data.dedup.line_text import LINE_DTYPE, SPAN_DTYPE, line_hashes, remove_spans, spans_of_rows
from llmtrain.data.text.kernels import clean
from llmtrain.errors import DataError

WHITE = " \t\x0b\x1c\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000"
PIECES = st.sampled_from(
    (*WHITE, "\n", "\n", "\n\n", "a", "A", "Z[@`{", "lower", "LoWeR cAsE text", "0123456789", "é", "É", "ß",
     "İ", "ПРИВЕТ мир", "ΣΊΣΥΦΟΣ", "日本語のテキスト", "😀", "𐐀𐐨", "}", "-- ", "abcdefgh" * 3, "ABCDEFGH")
)  # fmt: skip
TEXTS = st.lists(st.lists(PIECES, max_size=25).map("".join), max_size=5)


def joined(texts: list[str]) -> tuple[Any, Any]:
    raw = [text.encode() for text in texts]
    offsets = np.zeros(len(raw) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in raw], out=offsets[1:])
    return np.frombuffer(bytearray().join(raw), dtype=np.uint8), offsets


def split(text: Any, offsets: Any) -> list[str]:
    raw = text.tobytes()
    return [
        raw[begin:end].decode() for begin, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    ]


def lowered(text: str) -> str:
    return "".join(character.lower()[0] for character in text)  # of one code point: a dotted I has two


def lines_of(text: str, by_paragraph: bool) -> list[tuple[str, int, int]]:
    """Normalised text, start and end, in bytes, of each line or paragraph that is not blank."""
    found = []
    at = 0
    gathered: list[tuple[str, int, int]] = []
    for line in [*text.split("\n"), ""]:
        end = at + len(line.encode())
        if line.strip():
            gathered.append((lowered(line.strip()), at, end))
        if gathered and (not by_paragraph or not line.strip()):
            found.append(("\n".join(part[0] for part in gathered), gathered[0][1], gathered[-1][2]))
            gathered = []
        at = end + 1
    return found


@given(TEXTS, st.sampled_from(LineUnit), st.integers(1, 12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_lines_are_equal_when_their_stripped_lower_cased_texts_are(
    texts: list[str], unit: LineUnit, min_chars: int
) -> None:
    lines = line_hashes(*joined(texts), LineConfig(unit=unit, min_chars=min_chars))
    expected = [
        (row, *line)
        for row, text in enumerate(texts)
        for line in lines_of(text, unit is LineUnit.paragraph)
        if len(line[0]) >= min_chars
    ]
    assert lines.dtype == LINE_DTYPE
    places = [(row, start, end) for row, _, start, end in expected]
    assert list(zip(*(lines[name].tolist() for name in ("row", "start", "end")), strict=True)) == places
    hashes: dict[str, set[int]] = {}
    for (_, normalised, _, _), hashed in zip(expected, lines["hash"].tolist(), strict=True):
        hashes.setdefault(normalised, set()).add(hashed)
    assert all(len(same) == 1 for same in hashes.values())
    assert len(set.union(set(), *hashes.values())) == len(hashes)


def test_the_hash_of_a_line_never_changes() -> None:
    """Indexes of earlier runs hold such hashes."""
    texts = ["  The QUICK brown fox jumps over the lazy dog 42\t", "Съешь ещё этих булок", "a" * 64]
    lines = line_hashes(*joined(texts), LineConfig(min_chars=1))
    assert [f"{value:016x}" for value in lines["hash"].tolist()] == [
        "4ffdbfaa6e4960d2",
        "1edcd78dc0528d59",
        "256aa53c1e2bc48e",
    ]


def test_a_line_hashes_alike_wherever_it_stands() -> None:
    line = "Some line of text that is long enough; über 40 Zeichen"
    texts = [line, f"x\n{line}", f"x\ny\n   {line.upper()} \nz", "\n" * 7 + line + "\n"]
    lines = line_hashes(*joined(texts), LineConfig(min_chars=20))
    assert len(lines) == 4
    assert len(set(lines["hash"].tolist())) == 1


def test_bytes_that_are_no_utf8_do_no_harm() -> None:
    text = np.array([0xC3, 10, 0xE2, 0x80, 10, 0xF0, 0x9F, 0x98, 10, 0x80, 0xFF, 0xC2], dtype=np.uint8)
    lines = line_hashes(text, np.array([0, len(text)]), LineConfig(min_chars=1))
    assert lines["start"].tolist() == [0, 2, 5, 9]


@pytest.mark.parametrize(
    ("text", "removed", "left"),
    [
        ("A\nB\nC", "B", "A\nC"),
        ("A\nB\nC", "A", "B\nC"),
        ("A\nB\nC", "C", "A\nB"),
        ("A\nB\nC", "AC", "B"),
        ("A\nB\nC", "ABC", ""),
        ("A\n\nB\n\nC", "B", "A\n\nC"),
        ("A\nB\n\nC", "B", "A\n\nC"),
        ("A\n\nB\nC", "B", "A\n\nC"),
        ("A\n\nB\nC\n\nD", "BC", "A\n\nD"),
        ("A\n\nB\n\nC\n\nD", "BC", "A\n\nD"),
        ("A\n \t\nB\n\xa0\nC", "B", "A\n \t\nC"),
        ("A\n\nB\nC", "A", "B\nC"),
        ("  A\n\n\n  B\nC", "A", "  B\nC"),
        ("A\n\nB", "B", "A"),
        ("A  \n\t\nB", "B", "A"),
        ("A\n\n\nB\n\nC\n\n\n\nD", "B", "A\n\n\nC\n\n\n\nD"),
        ("A", "A", ""),
    ],
)
def test_a_cut_leaves_one_break_where_there_was_one(text: str, removed: str, left: str) -> None:
    lines = line_hashes(*joined([text]), LineConfig(min_chars=1))
    raw = text.encode()
    is_removed = [raw[line["start"] : line["end"]].decode().strip() in removed for line in lines]
    cut, offsets = remove_spans(*joined([text]), lines[is_removed][["row", "start", "end"]])
    assert split(cut, offsets) == [left]


def test_a_paragraph_is_cut_whole() -> None:
    text = "One line.\n\n  Two\n  lines of it.\n \nThree."
    lines = line_hashes(*joined([text]), LineConfig(min_chars=1, unit=LineUnit.paragraph))
    cut, offsets = remove_spans(*joined([text]), lines[1:2][["row", "start", "end"]])
    assert split(cut, offsets) == ["One line.\n\nThree."]


@given(TEXTS, st.sampled_from(LineUnit), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_removal_keeps_all_other_lines_and_a_clean_text_stays_clean(
    texts: list[str], unit: LineUnit, draw: Any
) -> None:
    text, offsets, _ = clean(*joined(texts))
    lines = line_hashes(text, offsets, LineConfig(min_chars=1, unit=unit))
    is_removed = np.array([draw.random() < 0.4 for _ in lines], dtype=np.bool_)
    cut, cut_offsets = remove_spans(text, offsets, lines[is_removed][["row", "start", "end"]])
    after = line_hashes(cut, cut_offsets, LineConfig(min_chars=1, unit=unit))
    assert after[["hash", "row"]].tolist() == lines[~is_removed][["hash", "row"]].tolist()
    again, again_offsets, _ = clean(cut, cut_offsets)
    assert again.tobytes() == cut.tobytes()
    assert again_offsets.tolist() == cut_offsets.tolist()
    before, left = split(text, offsets), split(cut, cut_offsets)
    for row in set(range(len(texts))) - set(lines["row"][is_removed].tolist()):
        assert before[row] == left[row]


@pytest.mark.parametrize(
    "span", [(2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2, 1), (1, 0, 4), (0, 2, 3)], ids=str
)
def test_spans_of_other_texts_are_refused(span: tuple[int, int, int]) -> None:
    spans = np.array([(0, 0, 2), span], dtype=SPAN_DTYPE)
    with pytest.raises(DataError, match=r"span 1 to remove, bytes .* of document .* different runs"):
        remove_spans(*joined(["abcd", "abc"]), spans)


def test_texts_that_may_not_be_written_to_are_read_as_well() -> None:
    text, offsets = joined(["Some line.\nAnother line.", "Some line."])
    lines = line_hashes(text, offsets, LineConfig(min_chars=1))
    text.flags.writeable = offsets.flags.writeable = False
    again = line_hashes(text, offsets, LineConfig(min_chars=1))
    assert again.tolist() == lines.tolist()
    cut, ends = remove_spans(text, offsets, lines[:1][["row", "start", "end"]])
    assert split(cut, ends) == ["Another line.", "Some line."]


def test_removing_nothing_changes_nothing() -> None:
    texts = ["", "a\n\n\nb  ", "\n"]
    text, offsets = joined(texts)
    cut, cut_offsets = remove_spans(text, offsets, np.empty(0, dtype=SPAN_DTYPE))
    assert split(cut, cut_offsets) == texts
    cut, cut_offsets = remove_spans(text[:0], offsets[:1], np.empty(0, dtype=SPAN_DTYPE))
    assert len(cut) == 0
    assert cut_offsets.tolist() == [0]


def test_spans_of_a_unit_are_renumbered_for_a_batch() -> None:
    spans = np.array([(0, 1, 2), (3, 0, 5), (3, 6, 9), (7, 0, 1)], dtype=SPAN_DTYPE)
    found = spans_of_rows(spans, np.array([1, 3, 7]))
    assert found.tolist() == [(1, 0, 5), (1, 6, 9), (2, 0, 1)]
    assert spans_of_rows(spans, np.array([], dtype=np.int64)).tolist() == []
    assert spans["row"].tolist() == [0, 3, 3, 7]


def test_batches_of_one_document_hash_as_one_batch(batch_of: Callable[..., Any]) -> None:
    texts = [f"line {number}\nsecond line of {number}\n\nand more of it" for number in range(7)]
    cfg = LineConfig(min_chars=5)
    whole = line_hashes(*batch_of(texts), cfg)
    alone = np.concatenate([line_hashes(*batch_of([text]), cfg) for text in texts])
    assert whole[["hash", "start", "end"]].tolist() == alone[["hash", "start", "end"]].tolist()
