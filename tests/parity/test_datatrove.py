"""Our keep or drop equals datatrove's, rule by rule, on text nobody here wrote, with its words for both.

Needs datatrove (`pip install llmtrain[rivals]`), in this Python or in the one that LLMTRAIN_DATATROVE_PYTHON
names. What differs on purpose is named here, and counted in docs/data_rules.md.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llmtrain.data.document import normalize
from llmtrain.data.filters import chain
from llmtrain.data.filters.config import EditsConfig, RulesConfig
from llmtrain.data.text.edit import EDIT_SIGNALS, Edited, edit_lines
from llmtrain.data.text.measure import EDITED_SIGNALS, SIGNALS, measure, measure_edited
from llmtrain.data.text.words import Words, words_of_spans

pytestmark = pytest.mark.slow

IS_HERE = find_spec("datatrove") is not None and find_spec("spacy") is not None
PYTHON = os.environ.get("LLMTRAIN_DATATROVE_PYTHON") or (sys.executable if IS_HERE else None)
CORPORA = Path(__file__).parents[3] / "shared/corpora"
SCRIPT = Path(__file__).parent / "datatrove_decisions.py"
MOST_CHARS = 20_000
BAD_WORDS = "gil\nhuman rights\ntyrant\nthou art\n猫\ndeprecated\n"
"""Stands for a list of bad words: words that these texts have."""
OFF = {rule.setting: None for rule in chain.RULES}
LINE_EDITS: dict[str, dict[str, Any]] = {
    "strip_lines": {},
    "long_word": {"max_word_chars": 40},
    "citation": {"strip_citations": True},
    "no_terminal_mark": {"terminal_marks": ".?!\"'", "max_blank_lines": 0},
    "few_words": {"min_words_per_line": 5, "max_blank_lines": 0},
    "javascript": {"drop_javascript_lines": True},
    "policy": {"drop_policy_lines": True},
}
PAPER = {
    "max_blank_lines": 0,
    "max_word_chars": 1000,
    "strip_citations": True,
    "terminal_marks": ".?!\"'",
    "min_words_per_line": 5,
    "drop_javascript_lines": True,
    "drop_policy_lines": True,
    "count_page_signals": True,
}
FINEWEB = PAPER | {"terminal_marks": None, "min_words_per_line": 3}
RULES: dict[str, dict[str, Any]] = {
    "too_short": {"min_words": 50},
    "too_long": {"max_words": 1000},
    "short_words": {"min_mean_word_length": 3},
    "long_words": {"max_mean_word_length": 10},
    "many_hashes or many_ellipses": {"max_hash_word_ratio": 0.1, "max_ellipsis_word_ratio": 0.1},
    "bullet_lines": {"max_bullet_line_fraction": 0.9},
    "ellipsis_lines": {"max_ellipsis_line_fraction": 0.3},
    "few_alphabetic_words": {"min_alphabetic_word_fraction": 0.8},
    "few_distinct_stop_words": {"min_distinct_stop_words": 2},
    "duplicate_lines": {"max_duplicate_line_fraction": 0.3},
    "duplicate_paragraphs": {"max_duplicate_paragraph_fraction": 0.3},
    "duplicate_line_chars": {"max_duplicate_line_char_fraction": 0.2},
    "duplicate_paragraph_chars": {"max_duplicate_paragraph_char_fraction": 0.2},
    "top_2gram": {"max_top_2gram_char_fraction": 0.2},
    "top_3gram": {"max_top_3gram_char_fraction": 0.18},
    "top_4gram": {"max_top_4gram_char_fraction": 0.16},
    **{
        f"duplicate_{size}gram": {f"max_duplicate_{size}gram_char_fraction": (20 - size) / 100}
        for size in range(5, 11)
    },
    "few_terminal_lines": {"min_edited_terminal_line_fraction": 0.12},
    "short_lines": {"max_edited_short_line_fraction": 0.67},
    "edited_duplicate_line_chars": {"max_edited_duplicate_line_char_fraction": 0.1},
    "edited_duplicate_line_chars at 0.01": {"max_edited_duplicate_line_char_fraction": 0.01},
    "many_newlines": {"max_edited_newline_word_ratio": 0.3},
    "lorem_ipsum": {"max_lorem_ipsum_lines": 0},
    "curly_bracket": {"max_curly_bracket_lines": 0},
    "bad_words": {"max_bad_words": 0},
    "few_long_lines": {"min_edited_third_longest_line_chars": 200},
    # Bounds at which these texts differ more.
    "short_words at 4": {"min_mean_word_length": 4},
    "long_words at 6": {"max_mean_word_length": 6},
    "many_hashes or many_ellipses at 0.01": {
        "max_hash_word_ratio": 0.01,
        "max_ellipsis_word_ratio": 0.01,
    },
    "bullet_lines at 0.1": {"max_bullet_line_fraction": 0.1},
    "ellipsis_lines at 0.01": {"max_ellipsis_line_fraction": 0.01},
    "duplicate_lines at 0.05": {"max_duplicate_line_fraction": 0.05},
    "duplicate_paragraphs at 0.02": {"max_duplicate_paragraph_fraction": 0.02},
    "duplicate_line_chars at 0.02": {"max_duplicate_line_char_fraction": 0.02},
    "duplicate_paragraph_chars at 0.002": {"max_duplicate_paragraph_char_fraction": 0.002},
    "duplicate_10gram at 0.01": {"max_duplicate_10gram_char_fraction": 0.01},
}


def joined(texts: list[bytes]) -> tuple[Any, Any]:
    """Texts back to back, as the compiled loops take them."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(bytearray().join(texts), dtype=np.uint8), offsets


class Theirs(NamedTuple):
    """What datatrove_decisions.py wrote."""

    decisions: dict[str, list[bool]]
    texts: dict[str, list[str]]
    sentences: list[int]
    words: Words


def documents() -> Iterator[str]:
    """Prose, drama, law in 500 languages, a Japanese novel, Python sources and manuals; none of it ours."""
    for name in ("shakespeare", "rust_book", "udhr_languages", "peps"):
        with gzip.open(CORPORA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)
    with gzip.open(CORPORA / "wagahai_ja.txt.gz", "rt", encoding="utf-8") as file:
        novel = file.read().split("\n")
    yield from ("\n".join(novel[first : first + 20]) for first in range(0, len(novel), 20))
    paths = sysconfig.get_paths()
    sources = sorted(Path(paths["stdlib"]).glob("*.py"))
    sources += sorted(Path(paths["stdlib"]).glob("idlelib/*.txt"))
    sources += sorted(Path("/usr/share/doc").glob("*/copyright"))[:150]
    for folder in ("numpy", "pyarrow", "torch/nn"):
        sources += sorted((Path(paths["purelib"]) / folder).glob("*.py"))[:60]
    for path in sources:
        text = path.read_bytes()
        try:
            yield text.decode()
        except UnicodeDecodeError:
            continue


@pytest.fixture(scope="module")
def texts() -> list[str]:
    if PYTHON is None:
        pytest.skip("no datatrove: pip install llmtrain[rivals]")
    if not CORPORA.is_dir():
        pytest.skip(f"no texts at {CORPORA}")
    found = (normalize(text) for text in documents() if len(text) <= MOST_CHARS)
    return [text for text in found if text.strip()]


@pytest.fixture(scope="module")
def batch(texts: list[str]) -> tuple[Any, Any]:
    return joined([text.encode() for text in texts])


@pytest.fixture(scope="module")
def theirs(texts: list[str], batch: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    folder = tmp_path_factory.mktemp("datatrove")
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)
    (folder / "bad_words.txt").write_text(BAD_WORDS, encoding="utf-8")
    arguments = [str(PYTHON), str(SCRIPT), "documents.jsonl", "bad_words.txt", "."]
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    spans = {
        name: np.fromfile(folder / f"{name}.int64", dtype=np.int64) for name in ("starts", "ends", "offsets")
    }
    words = words_of_spans(
        *batch, spans["starts"].astype(np.int32), spans["ends"].astype(np.int32), spans["offsets"]
    )
    return Theirs(
        *(json.loads((folder / f"{name}.json").read_text()) for name in ("decisions", "texts", "sentences")),
        words=words,
    )


@pytest.fixture(scope="module")
def signals(
    batch: tuple[Any, Any], theirs: Theirs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Every signal of the documents as they are, on datatrove's words."""
    bad_words = tmp_path_factory.mktemp("words") / "bad_words.txt"
    bad_words.write_text(BAD_WORDS, encoding="utf-8")
    pages = edited(batch, count_page_signals=True, bad_words_file=str(bad_words))
    columns: dict[str, Any] = {}
    for names, values in (
        (SIGNALS, measure(*batch, theirs.words)),
        (EDITED_SIGNALS, measure_edited(*batch, theirs.words, 30)),
        (EDIT_SIGNALS, pages.flags),
    ):
        columns |= dict(zip(names, values.T, strict=True))
    return columns


def edited(batch: tuple[Any, Any], **edits: Any) -> Edited:
    return edit_lines(*batch, EditsConfig(**({"strip_lines": True} | edits)))


def texts_of(result: Edited) -> list[str]:
    whole, ends = result.text.tobytes(), result.offsets.tolist()
    return [whole[first:last].decode() for first, last in pairwise(ends)]


def test_there_are_documents_enough_and_every_rule_drops_and_keeps_some(texts, theirs):
    assert len(texts) >= 5000
    for rule in RULES:
        num_dropped = sum(theirs.decisions[rule])
        assert num_dropped < len(texts), rule
        print(f"{rule}: datatrove drops {num_dropped:,} of {len(texts):,}")


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_drops_what_datatrove_drops(rule, signals, theirs, texts):
    ours = np.zeros(len(texts), dtype=np.bool_)
    for _, mask in chain.dropped_by(signals, RulesConfig(**(OFF | RULES[rule]))):
        ours |= mask
    different = np.flatnonzero(ours != np.array(theirs.decisions[rule]))
    examples = [(int(number), bool(ours[number]), texts[number][:200]) for number in different[:5]]
    assert not len(different), f"{rule}: {len(different)} of {len(texts)} differ, such as {examples}"


@pytest.mark.parametrize("rule", LINE_EDITS)
def test_a_line_edit_leaves_the_text_that_datatrove_leaves(rule, batch, theirs):
    ours = texts_of(edited(batch, **LINE_EDITS[rule]))
    expected = theirs.texts[rule]
    if rule == "citation":  # ours takes the white space at the ends too, and lines with nothing else
        ours, expected = ([shown(text) for text in texts] for texts in (ours, expected))
    assert [text.strip() for text in ours] == expected


def shown(text: str) -> str:
    """The lines without the white space around them."""
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())


def different_pages(batch: tuple[Any, Any], theirs: Theirs, name: str, edits: dict[str, Any]) -> list[int]:
    """Documents whose text or page decision is not datatrove's. A dropped page has no text to compare."""
    result = edited(batch, **edits)
    flags = dict(zip(EDIT_SIGNALS, result.flags.T, strict=True))
    dropped = (flags["num_lorem_ipsum_lines"] > 0) | (flags["num_curly_bracket_lines"] > 0)
    pairs = zip(dropped.tolist(), theirs.decisions[name], texts_of(result), theirs.texts[name], strict=True)
    return [
        number
        for number, (ours_drops, theirs_drops, ours, text) in enumerate(pairs)
        if ours_drops != theirs_drops or (not ours_drops and ours != text)
    ]


@pytest.mark.parametrize(("name", "edits"), [("c4_paper", PAPER), ("fineweb_code", FINEWEB)])
def test_all_edits_together_leave_the_same_text_if_citations_go_first(name, edits, batch, theirs):
    assert different_pages(batch, theirs, f"{name}, citations first", edits) == []


@pytest.mark.parametrize(("name", "edits"), [("c4_paper", PAPER), ("fineweb_code", FINEWEB)])
def test_what_differs_has_a_citation(name, edits, batch, theirs, texts):
    """datatrove leaves the space before a citation, and then finds no terminal mark at the end; it counts the
    words of a line before the citations go."""
    different = different_pages(batch, theirs, name, edits)
    print(f"{name}: {len(different)} of {len(texts)} differ, all with a citation")
    assert all("[" in texts[number] for number in different)
    assert len(different) < len(texts) // 50


def test_sentences_differ_in_few_decisions(batch, theirs, texts):
    """datatrove's English splitter is spaCy's, ours UAX #29: how often that changes the rule's answer."""
    ours = edited(batch, **PAPER).flags[:, EDIT_SIGNALS.index("num_sentences")]
    reference = np.array(theirs.sentences)
    for least in (3, 5):
        different = (ours < least) != (reference < least)
        print(f"min_sentences={least}: {different.sum()} of {len(texts)} decisions differ")
        assert different.mean() < 0.05
    print(
        "ours less theirs:",
        sorted(Counter((ours - reference).tolist()).items(), key=lambda item: -item[1])[:9],
    )
