"""What datatrove decides on each document, rule by rule. Run by datatrove's own Python, not by pytest.

    python datatrove_decisions.py DOCUMENTS.jsonl BAD_WORDS.txt FOLDER

Every filter runs with all rules but one switched off, because it stops at the first that hits. Writes
decisions.json (rule: [is dropped]), texts.json (line rule: [text left]), sentences.json (sentences a
document), and datatrove's words as byte spans.
"""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4BadWordsFilter,
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    c4_filters,
)
from datatrove.utils.text import split_into_sentences, split_into_words

QUALITY_OFF = dict.fromkeys(
    [
        "min_doc_words",
        "max_doc_words",
        "min_avg_word_length",
        "max_avg_word_length",
        "max_symbol_word_ratio",
        "max_bullet_lines_ratio",
        "max_ellipsis_lines_ratio",
        "max_non_alpha_words_ratio",
        "min_stop_words",
    ]
)
QUALITY = {
    "too_short": {"min_doc_words": 50},
    "too_long": {"max_doc_words": 1000},  # 100,000 would drop nothing here
    "short_words": {"min_avg_word_length": 3},
    "long_words": {"max_avg_word_length": 10},
    "many_hashes or many_ellipses": {"max_symbol_word_ratio": 0.1},
    "bullet_lines": {"max_bullet_lines_ratio": 0.9},
    "ellipsis_lines": {"max_ellipsis_lines_ratio": 0.3},
    "few_alphabetic_words": {"max_non_alpha_words_ratio": 0.8},
    "few_distinct_stop_words": {"min_stop_words": 2},
    # Bounds at which these texts differ more.
    "short_words at 4": {"min_avg_word_length": 4},
    "long_words at 6": {"max_avg_word_length": 6},
    "many_hashes or many_ellipses at 0.01": {"max_symbol_word_ratio": 0.01},
    "bullet_lines at 0.1": {"max_bullet_lines_ratio": 0.1},
    "ellipsis_lines at 0.01": {"max_ellipsis_lines_ratio": 0.01},
}
REPETITION_OFF = {
    **dict.fromkeys(["dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac"]),
    "top_n_grams": (),
    "dup_n_grams": (),
}
REPETITION = {
    "duplicate_lines": {"dup_line_frac": 0.3},
    "duplicate_paragraphs": {"dup_para_frac": 0.3},
    "duplicate_line_chars": {"dup_line_char_frac": 0.2},
    "duplicate_paragraph_chars": {"dup_para_char_frac": 0.2},
    **{f"top_{n}gram": {"top_n_grams": ((n, share),)} for n, share in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{f"duplicate_{n}gram": {"dup_n_grams": ((n, (20 - n) / 100),)} for n in range(5, 11)},
    "duplicate_lines at 0.05": {"dup_line_frac": 0.05},
    "duplicate_paragraphs at 0.02": {"dup_para_frac": 0.02},
    "duplicate_line_chars at 0.02": {"dup_line_char_frac": 0.02},
    "duplicate_paragraph_chars at 0.002": {"dup_para_char_frac": 0.002},
    "duplicate_10gram at 0.01": {"dup_n_grams": ((10, 0.01),)},
}
C4_OFF = {
    "remove_citations": False,
    "filter_no_terminal_punct": False,
    "min_num_sentences": -1,
    "min_words_per_line": -1,
    "max_word_length": -1,
    "filter_lorem_ipsum": False,
    "filter_javascript": False,
    "filter_curly_bracket": False,
    "filter_policy": False,
}
C4_PAPER = {
    "remove_citations": True,
    "filter_no_terminal_punct": True,
    "min_words_per_line": 5,
    "max_word_length": 1000,
    "filter_lorem_ipsum": True,
    "filter_javascript": True,
    "filter_curly_bracket": True,
    "filter_policy": True,
}
C4_PAGES = {"lorem_ipsum": {"filter_lorem_ipsum": True}, "curly_bracket": {"filter_curly_bracket": True}}
C4_LINES = {
    "strip_lines": {},
    "long_word": {"max_word_length": 40},  # 1000 would drop nothing here
    "citation": {"remove_citations": True},
    "no_terminal_mark": {"filter_no_terminal_punct": True},
    "few_words": {"min_words_per_line": 5},
    "javascript": {"filter_javascript": True},
    "policy": {"filter_policy": True},
}
FINEWEB_OFF = {
    "line_punct_thr": 0.0,
    "short_line_thr": 1.0,
    "char_duplicates_ratio": float("inf"),
    "new_line_ratio": float("inf"),
}
FINEWEB = {
    "few_terminal_lines": {"line_punct_thr": 0.12},
    "short_lines": {"short_line_thr": 0.67},
    "edited_duplicate_line_chars": {"char_duplicates_ratio": 0.1},
    "edited_duplicate_line_chars at 0.01": {"char_duplicates_ratio": 0.01},
    "many_newlines": {"new_line_ratio": 0.3},
}


def without_citations(text: str) -> str:
    """Citations and the white space they leave at a line's ends, gone before the filter looks."""
    lines = []
    for line in text.splitlines():
        if all(len(word) <= 1000 for word in line.split()):
            line = c4_filters.CITATION_REGEX.sub("", line.strip()).strip()
        lines.append(line)
    return "\n".join(lines)


def main(documents: Path, bad_words: Path, folder: Path) -> None:
    c4_filters.cached_asset_path_or_download = lambda *_, **__: str(bad_words)
    deciding = {
        **{rule: GopherQualityFilter(**(QUALITY_OFF | on)) for rule, on in QUALITY.items()},
        **{rule: GopherRepetitionFilter(**(REPETITION_OFF | on)) for rule, on in REPETITION.items()},
        **{rule: FineWebQualityFilter(**(FINEWEB_OFF | on)) for rule, on in FINEWEB.items()},
        **{rule: C4QualityFilter(**(C4_OFF | on)) for rule, on in C4_PAGES.items()},
        "few_long_lines": C4ParagraphFilter(),
        "bad_words": C4BadWordsFilter(),
    }
    editing = {rule: C4QualityFilter(**(C4_OFF | on)) for rule, on in C4_LINES.items()}
    editing["c4_paper"] = C4QualityFilter(**(C4_OFF | C4_PAPER))
    editing["fineweb_code"] = C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=-1)
    citations_first = {
        "c4_paper, citations first": C4QualityFilter(**(C4_OFF | C4_PAPER | {"remove_citations": False})),
        "fineweb_code, citations first": C4QualityFilter(
            remove_citations=False, filter_no_terminal_punct=False, min_num_sentences=-1
        ),
    }
    sentence_lines = C4QualityFilter(
        **(C4_OFF | C4_PAPER | {"filter_lorem_ipsum": False, "filter_curly_bracket": False})
    )

    decisions: dict[str, list[bool]] = {rule: [] for rule in deciding | editing | citations_first}
    texts: dict[str, list[str]] = {rule: [] for rule in editing | citations_first}
    sentences: list[int] = []
    starts, ends, offsets = array("q"), array("q"), array("q", [0])
    size = 0
    for line in documents.open(encoding="utf-8"):
        text = json.loads(line)
        for rule, one in deciding.items():
            kept = one.filter(Document(text=text, id="0"))
            decisions[rule].append(kept is not True)
        for rule, one in (editing | citations_first).items():
            before = without_citations(text) if rule in citations_first else text
            document = Document(text=before, id="0")
            decisions[rule].append(one.filter(document) is not True)
            texts[rule].append(document.text)
        document = Document(text=text, id="0")
        sentence_lines.filter(document)
        sentences.append(sum(len(split_into_sentences(line)) for line in document.text.split("\n") if line))
        at = num_bytes = 0
        for word in split_into_words(text):
            found = text.index(word, at)
            assert not text[at:found].strip(), "words come in order, with white space between"
            num_bytes += len(text[at:found].encode())
            starts.append(size + num_bytes)
            num_bytes += len(word.encode())
            ends.append(size + num_bytes)
            at = found + len(word)
        size += len(text.encode())
        offsets.append(len(starts))
    (folder / "decisions.json").write_text(json.dumps(decisions), encoding="utf-8")
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "sentences.json").write_text(json.dumps(sentences), encoding="utf-8")
    for name, values in (("starts", starts), ("ends", ends), ("offsets", offsets)):
        (folder / f"{name}.int64").write_bytes(values.tobytes())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
