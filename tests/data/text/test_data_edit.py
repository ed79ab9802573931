"""Line edits against plain Python, and the sums of what they take."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.filters.config import EditsConfig
from llmtrain.data.text.edit import EDIT_REASONS, EDIT_SIGNALS, edit_lines
from llmtrain.errors import DataError

C4 = EditsConfig(
    strip_lines=True,
    max_blank_lines=0,
    max_word_chars=1000,
    strip_citations=True,
    terminal_marks='.?!"',
    min_words_per_line=5,
    drop_javascript_lines=True,
    drop_policy_lines=True,
    count_page_signals=True,
)
REFINEDWEB = EditsConfig(
    max_blank_lines=1,
    max_line_uppercase_fraction=0.5,
    drop_numeric_lines=True,
    drop_counter_lines=True,
    drop_one_word_lines=True,
    max_navigation_line_words=10,
)
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
COUNTER = re.compile(
    r"\W*\d[,.\d]*[kmb]?\s+(?:likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|"
    r"downloads|views|followers)\W*"
)


def joined(texts: list[bytes]) -> tuple[Any, Any]:
    """Texts back to back, as the compiled loops take them."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(bytearray().join(texts), dtype=np.uint8), offsets


def edited(text: str, cfg: EditsConfig) -> tuple[str, dict[str, tuple[int, int]], dict[str, int]]:
    """One document's text, removals by reason, and signals."""
    result = edit_lines(*joined([text.encode()]), cfg)
    removed = {
        reason: (int(lines[0]), int(num_bytes[0]))
        for reason, (lines, num_bytes) in result.removed.items()
        if lines[0] or num_bytes[0]
    }
    signals = dict(zip(EDIT_SIGNALS, result.flags[0].tolist(), strict=True))
    after = result.text.tobytes().decode()
    assert bool(result.is_changed[0]) == (after != text)
    assert sum(num_bytes for _, num_bytes in removed.values()) == len(text.encode()) - len(after.encode())
    return after, removed, signals


def plain_edits(text: str, cfg: EditsConfig) -> tuple[str, Counter[str]]:
    """The order of docs/data_rules.md, line by line."""
    kept: list[str] = []
    removed: Counter[str] = Counter()
    if not text:
        return "", removed
    lines = text.splitlines() if cfg.strip_lines else text.split("\n")
    if cfg.strip_lines and text and text.splitlines(keepends=True)[-1] != lines[-1]:
        lines.append("")
    for line in lines:
        line = line.strip() if cfg.strip_lines else line
        if not line.strip():
            run = next((n for n, before in enumerate(reversed(kept)) if before.strip()), len(kept))
            is_first = removed.total() > 0 and not any(before.strip() for before in kept)
            if (cfg.max_blank_lines is not None and run >= cfg.max_blank_lines) or is_first:
                removed["blank_line"] += 1
            else:
                kept.append(line)
            continue
        reason, line = plain_line(line, cfg)
        if reason is None:
            kept.append(line)
        else:
            removed[reason] += 1
    if "\n".join(kept) != text:
        while kept and not kept[-1].strip():
            kept.pop()
            removed["blank_line"] += 1
    return "\n".join(kept), removed


def plain_line(line: str, cfg: EditsConfig) -> tuple[str | None, str]:
    if cfg.max_word_chars is not None and max(map(len, line.split())) > cfg.max_word_chars:
        return "long_word", line
    if cfg.strip_citations and CITATION.search(line):
        line = CITATION.sub("", line)
        line = line.strip() if cfg.strip_lines else line
        if not line.strip():
            return "citation", line
    folded = line.lower()
    words = line.split()
    if cfg.terminal_marks and (not line.endswith(tuple(cfg.terminal_marks)) or line.endswith("...")):
        return "no_terminal_mark", line
    if cfg.min_words_per_line is not None and len(words) < cfg.min_words_per_line:
        return "few_words", line
    if cfg.drop_javascript_lines and "javascript" in folded:
        return "javascript", line
    if cfg.drop_policy_lines and any(phrase in folded for phrase in POLICY):
        return "policy", line
    share = cfg.max_line_uppercase_fraction
    if share is not None and sum(map(str.isupper, line)) / len(line) > share:
        return "uppercase_line", line
    if cfg.drop_numeric_lines and all(map(str.isdigit, line)):
        return "numeric_line", line
    if cfg.drop_counter_lines and COUNTER.fullmatch(folded):
        return "counter_line", line
    if cfg.drop_one_word_lines and len(words) < 2:
        return "one_word_line", line
    if cfg.max_navigation_line_words is not None and len(words) <= cfg.max_navigation_line_words:
        shorter = re.sub(r"\s?items in cart", "", line, flags=re.IGNORECASE | re.ASCII)
        shorter = re.sub(r"\s?read more(\.\.\.|…)$", "", shorter, flags=re.IGNORECASE)
        shorter = re.sub(r"^sign-in\s?", "", shorter, flags=re.IGNORECASE)
        if not shorter.strip():
            return "navigation", line
        line = shorter
    return None, line


PIECES = st.sampled_from(
    [
        "a",
        "the cat",
        "Öl",
        "日本。",
        "ЖЖ",
        "12",
        "٣",
        "1,2K",
        "3 likes",
        "4.5k Views!",
        "SALE NOW",
        "x y z w v",
        "[12]",
        "[]",
        "[edit]",
        "[ed",
        "[citation needed]",
        "[٣]",
        "javaScript",
        "java[1]script",
        "Lorem ipsum",
        "{",
        "}",
        "use cookies",
        "Uses Cookies",
        "cookie policy",
        "cookies",
        "privacy policy",
        "Terms of use",
        "use of cookies",
        "items in cart",
        "2 Items in Cart",
        "read more...",
        "Read more…",
        "sign-in",
        "Sign-in here",
        "end.",
        "end?",
        "end!",
        'end"',
        "wait...",
        "wait…",
        "mmmmmmmmmmmm",
        "\xa0",
        "\u3000",
        "\t",
        " ",
        "  ",
        "\u2028",
        "\r\n",
        "\r",
        "\x0b",
        "\x85",
        "_",
        "é'",
    ]
)
LINES = st.lists(PIECES, max_size=8).map(" ".join) | st.lists(PIECES, max_size=5).map("".join)
TEXTS = st.lists(LINES | st.just(""), max_size=8).map("\n".join)
CONFIGS = st.builds(
    EditsConfig,
    strip_lines=st.booleans(),
    max_blank_lines=st.none() | st.integers(0, 2),
    max_word_chars=st.none() | st.just(9),
    strip_citations=st.booleans(),
    terminal_marks=st.none() | st.just('.?!"。'),
    min_words_per_line=st.none() | st.integers(0, 4),
    drop_javascript_lines=st.booleans(),
    drop_policy_lines=st.booleans(),
    max_line_uppercase_fraction=st.none() | st.sampled_from([0.0, 0.3, 0.5]),
    drop_numeric_lines=st.booleans(),
    drop_counter_lines=st.booleans(),
    drop_one_word_lines=st.booleans(),
    max_navigation_line_words=st.none() | st.sampled_from([3, 10]),
    count_page_signals=st.booleans(),
)


@settings(max_examples=600, deadline=None)
@given(text=TEXTS, cfg=CONFIGS)
@example(text="a\n\n\nb\n", cfg=EditsConfig(max_blank_lines=1))
@example(text="\n\nonly. these words stay here.\nx\n\n", cfg=C4)
@example(text="[1]\n[2]\n", cfg=EditsConfig(strip_citations=True))
def test_edits_equal_the_plain_ones_and_their_bytes_add_up(text, cfg):
    after, removed, _ = edited(text, cfg)
    if cfg == EditsConfig():
        assert after == text
        return
    expected, reasons = plain_edits(text, cfg)
    assert after == expected
    parts = ("white_space", "citation", "navigation")  # these also count lines that lost a part
    for reason in EDIT_REASONS:
        if reason not in parts:
            assert removed.get(reason, (0, 0))[0] == reasons[reason], reason


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5))
def test_documents_of_a_batch_are_edited_alone(texts):
    both = dataclasses.replace(C4, drop_one_word_lines=True, max_navigation_line_words=10)
    whole = edit_lines(*joined([text.encode() for text in texts]), both)
    ends = whole.offsets.tolist()
    for number, text in enumerate(texts):
        alone, _, signals = edited(text, both)
        assert whole.text[ends[number] : ends[number + 1]].tobytes().decode() == alone
        assert dict(zip(EDIT_SIGNALS, whole.flags[number].tolist(), strict=True)) == signals


def test_without_edits_the_same_arrays_come_back():
    text, offsets = joined([b" a \n\n\n b", b""])
    result = edit_lines(text, offsets, EditsConfig(short_line_chars=5, bad_words_inside_words=True))
    assert result.text is text
    assert result.offsets is offsets
    assert not result.is_changed.any()
    assert result.removed == {}
    assert result.flags.tolist() == [[0] * len(EDIT_SIGNALS)] * 2


def test_each_line_goes_under_the_first_rule_that_hits():
    text = "\n".join(
        [
            "A line of five words. [1]",
            "",
            f"A long {'x' * 1001} word is in here.",
            "no mark at the end of this",
            "it just trails off like this...",
            "Too few words.",
            "Please enable JavaScript to see this page.",
            "We use cookies on all of our pages.",
            "[edit]",
            '  And this line is the last "one"',
        ]
    )
    after, removed, signals = edited(text, C4)
    assert after == 'A line of five words.\nAnd this line is the last "one"'
    assert {reason: lines for reason, (lines, _) in removed.items()} == {
        "white_space": 1,
        "blank_line": 1,
        "long_word": 1,
        "citation": 2,
        "no_terminal_mark": 2,
        "few_words": 1,
        "javascript": 1,
        "policy": 1,
    }
    assert removed["few_words"] == (1, len("Too few words.\n"))
    assert removed["citation"] == (2, len(" [1]") + len("[edit]\n"))
    assert signals["num_sentences"] == 2


def test_page_signals_are_counted_on_lines_that_c4_would_have_kept_so_far():
    text = (
        "Lorem ipsum dolor sit amet now.\nlorem ipsum without a mark\nA { bracket in javascript code here.\n"
    )
    text += "A { bracket in a line of text."
    _, _, signals = edited(text, C4)
    assert signals["num_lorem_ipsum_lines"] == 1
    assert signals["num_curly_bracket_lines"] == 1
    assert signals["num_sentences"] == 2


def test_refinedwebs_edits_count_the_words_they_took():
    text = "\n".join(
        [
            "A plain line of text stays.",
            "BUY NOW or never",
            "ALL OF THIS IS LOUD",
            "12345",
            "1,234 likes",
            "One",
            "",
            "",
            "",
            "3 items in cart",
            "The news of today read more...",
            "Sign-in here or there",
            "a - b",
        ]
    )
    after, removed, signals = edited(text, REFINEDWEB)
    assert after.split("\n") == [
        "A plain line of text stays.",
        "BUY NOW or never",
        "",
        "3",
        "The news of today",
        "here or there",
        "a - b",
    ]
    assert {reason: lines for reason, (lines, _) in removed.items()} == {
        "blank_line": 2,
        "uppercase_line": 1,
        "numeric_line": 1,
        "counter_line": 1,
        "one_word_line": 1,
        "navigation": 3,
    }
    words = [word for word in text.split() if word[0].isalnum()]
    left = [word for word in after.split() if word[0].isalnum()]
    assert signals["num_line_words"] == len(words)
    assert signals["num_removed_line_words"] == len(words) - len(left)


def bad_words_config(tmp_path: Path, content: str, **changes: Any) -> EditsConfig:
    path = tmp_path / f"words{len(list(tmp_path.iterdir()))}.txt"
    path.write_text(content, encoding="utf-8")
    return EditsConfig(bad_words_file=str(path), **changes)


def test_bad_words_are_found_whole_in_any_case_and_phrases_too(tmp_path):
    cfg = bad_words_config(tmp_path, "darn\n\nhe\nshe\nhers\nвот Те\ntwo words\n")
    text = "Darn, she said; DARN!\nundarned adhere darn_ 1darn\nВОТ ТЕ раз\ntwo  words\ntwo words"
    _, _, signals = edited(text, cfg)
    assert signals["num_bad_words"] == 5  # darn twice, she, the Russian one, the phrase


def test_bad_words_are_found_inside_words_if_asked(tmp_path):
    cfg = bad_words_config(tmp_path, "he\nshe\nhers\n猫\n", bad_words_inside_words=True)
    _, _, signals = edited("ushers 吾輩は猫である", cfg)
    assert signals["num_bad_words"] == 4


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.text(alphabet="abé ", min_size=1, max_size=4), min_size=1, max_size=6), text=TEXTS)
@example(words=["a", "aba", "ba"], text="abaaba a ba aba")
def test_bad_words_equal_a_regular_expression(words, text, tmp_path_factory):
    words = sorted({word.strip() for word in words} - {""})
    if not words:
        return
    cfg = bad_words_config(tmp_path_factory.mktemp("words"), "\n".join(words))
    text = text.replace("1", "a").replace("e", "b")
    _, _, signals = edited(text, cfg)
    expected = sum(
        len(re.findall(rf"(?<!\w)(?={re.escape(word)}(?!\w))", line.lower()))
        for word in words
        for line in text.split("\n")
    )
    assert signals["num_bad_words"] == expected


def test_a_list_of_bad_words_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(DataError, match=r"cannot read edits\.bad_words_file=nowhere\.txt.*one word a line"):
        edited("a", EditsConfig(bad_words_file="nowhere.txt"))
    with pytest.raises(DataError, match=r"edits\.bad_words_file=.* holds no word; give one a line, or null"):
        edited("a", bad_words_config(tmp_path, "\n \n"))


def test_texts_of_many_documents_keep_their_order():
    texts = [f"Line number {number} has five words.\nshort\n".encode() for number in range(300)]
    result = edit_lines(*joined(texts), C4)
    assert len(result.offsets) == 301
    lines = result.text.tobytes().decode().replace(".Line", ".\nLine").split("\n")
    assert lines == [f"Line number {number} has five words." for number in range(300)]
    assert np.all(result.removed["few_words"][0] == 0)
    assert np.all(result.removed["no_terminal_mark"][0] == 1)
