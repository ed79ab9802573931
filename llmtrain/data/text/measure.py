"""The numbers that rules look at: one row of signals a document.

Definitions follow datatrove 0.10.1 (`pipeline/filters/`: gopher_quality_filter.py,
gopher_repetition_filter.py, fineweb_quality_filter.py, c4_filters.py) so that, given its words, rules decide
as it does. Characters are code points. Lines are what `str.splitlines` gives (`num_all_lines` and its like),
or what is between runs of line feeds (`num_lines`), or between single ones (`edited_…`). One difference is
deliberate: two runs of n words are equal where their words are, not where they only spell the same together.
With datatrove's words, that changed a `duplicate_…gram_chars` of 54 among 2,751 documents (UDHR, PEPs,
manuals) by at most 1.2% of their characters, and no decision.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled_lean
from llmtrain.data.text import unicode_tables as unicode
from llmtrain.data.text.lines import (
    content_end,
    content_start,
    count_characters,
    count_lines,
    count_repeats,
    ends_with_ellipsis,
    last_character,
    line_end,
    num_chars_in,
    starts_with_bullet,
    table_size,
)
from llmtrain.data.text.ngrams import repeated_ngrams
from llmtrain.data.text.utf8 import Bytes, absorbed, as_kernels_read, code_point_at, entry_of, hash_bytes
from llmtrain.data.text.words import IS_ALPHABETIC, IS_WORD, Offsets, Words, split_words

SIGNALS = (
    "num_chars",
    "num_alphabetic_chars",
    "num_alphanumeric_chars",
    "num_uppercase_chars",
    "num_digit_chars",
    "num_hashes",
    "num_ellipses",
    "num_all_lines",
    "longest_line_chars",
    "num_bullet_lines",
    "num_ellipsis_lines",
    "num_line_chars",
    "num_lines",
    "num_duplicate_lines",
    "num_duplicate_line_chars",
    "num_paragraphs",
    "num_duplicate_paragraphs",
    "num_duplicate_paragraph_chars",
    "num_segments",
    "num_words",
    "num_word_chars",
    "num_alphabetic_words",
    "num_stop_words",
    "num_distinct_stop_words",
    "top_2gram_chars",
    "top_3gram_chars",
    "top_4gram_chars",
    "duplicate_5gram_chars",
    "duplicate_6gram_chars",
    "duplicate_7gram_chars",
    "duplicate_8gram_chars",
    "duplicate_9gram_chars",
    "duplicate_10gram_chars",
)
"""Columns of `measure`.

- `num_alphabetic_chars` to `num_digit_chars`: as `str.isalpha`, `isalnum`, `isupper`, `isdigit`.
- `num_hashes`: `#`; `num_ellipses`: `...` without overlaps, and `…`.
- `num_all_lines`: lines of `str.splitlines`; `longest_line_chars`, `num_line_chars`: characters of the
  longest and of all of them, without line ends.
- `num_bullet_lines`: of those, lines that begin with `-` or `•` behind white space; `num_ellipsis_lines`:
  lines that end with `...` or `…` before white space.
- `num_lines`: parts between runs of line feeds (`re.split("\\n+")`); an empty one only before line feeds
  that begin the text and behind those that end it. Duplicates stood before.
- `num_paragraphs`: of the text without white space at its ends, parts between two line feeds or more.
- `num_segments`: all words. `num_words`: those that are no punctuation (IS_WORD); `num_word_chars`: their
  characters. `num_alphabetic_words`: those with a letter.
- `num_stop_words`: words equal to one of STOP_WORDS, letter for letter; `num_distinct_stop_words`: how many
  of the eight occur.
- `top_2gram_chars` to `duplicate_10gram_chars`: `ngrams.repeated_ngrams`."""

EDITED_SIGNALS = (
    "edited_num_chars",
    "edited_num_words",
    "edited_num_segments",
    "edited_num_newlines",
    "edited_num_lines",
    "edited_num_terminal_lines",
    "edited_num_short_lines",
    "edited_num_duplicate_line_chars",
    "edited_third_longest_line_chars",
)
"""Columns of `measure_edited`, of lines between line feeds.

- `edited_num_lines`: with more than white space; the three behind it count among these.
- `edited_num_terminal_lines`: the last character ends a sentence (TERMINAL of unicode_tables).
- `edited_num_short_lines`: at most `short_line_chars` characters.
- `edited_num_duplicate_line_chars`: characters of lines that stood before.
- `edited_third_longest_line_chars`: among all lines; 0 where there are fewer than three."""

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Rae et al. 2021 (Gopher, arXiv:2112.11446), section A.1.1."""

Signals = npt.NDArray[np.int64]

_IN_TEXT = SIGNALS.index("num_segments")
_NGRAMS = SIGNALS.index("top_2gram_chars")


def measure(text: Bytes, offsets: Offsets, words: Words) -> Signals:
    """Signals of documents: [documents, len(SIGNALS)]. `words` are theirs, of any tokenizer."""
    signals = np.zeros((len(offsets) - 1, len(SIGNALS)), dtype=np.int64)
    padded, eight = as_kernels_read(text)
    lines = _line_memory(offsets, arrays=4)
    _measure_text(padded, eight, offsets, *(*unicode.tables()[:2], *lines, signals))

    most = int(np.diff(words.offsets).max(initial=0))
    memory = (
        np.empty(table_size(most), dtype=np.int32),
        np.empty(most, dtype=np.uint64),
        np.empty(most, dtype=np.int32),
        np.empty(most, dtype=np.uint8),
        np.empty(most, dtype=np.uint8),
        np.empty(most, dtype=np.int32),
    )
    _measure_words(
        words.hash, words.num_chars, words.kind, words.offsets, *(*_stop_words(), *memory, signals)
    )
    return signals


def measure_edited(text: Bytes, offsets: Offsets, words: Words, short_line_chars: int) -> Signals:
    """Signals of edited documents: [documents, len(EDITED_SIGNALS)]. `words` are those of the edited text."""
    signals = np.zeros((len(offsets) - 1, len(EDITED_SIGNALS)), dtype=np.int64)
    padded, eight = as_kernels_read(text)
    lines = _line_memory(offsets, arrays=2)
    _measure_edited(
        *(padded, eight, offsets, words.kind, words.offsets, short_line_chars),
        *(*unicode.tables()[:2], *lines, signals),
    )
    return signals


def warm_up() -> None:
    """Compile, or load from disk, before the work is handed out: once, not in every worker."""
    text, offsets = np.frombuffer(bytearray(b"a b\n"), dtype=np.uint8), np.array([0, 4], dtype=np.int64)
    words = split_words(text, offsets)
    measure(text, offsets, words)
    measure_edited(text, offsets, words, 30)


def _line_memory(offsets: Offsets, *, arrays: int) -> list[npt.NDArray[Any]]:
    """Room for the hashes and lengths of a document's lines, and a table to find them in.

    Lines that are not empty have a line feed between them, so there are at most half as many as bytes.
    """
    most = int(np.diff(offsets).max(initial=0)) // 2 + 1
    columns = [np.empty(most, dtype=(np.uint64, np.int32)[number % 2]) for number in range(arrays)]
    return [*columns, np.empty(table_size(most), dtype=np.int32)]


_NUM_STOP_SLOTS = 1024


@cache
def _stop_words() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Their hashes, each at the slot of its low bits, and a bit for each."""
    text = np.frombuffer(bytearray(" ".join(STOP_WORDS).encode()), dtype=np.uint8)
    hashes = split_words(text, np.array([0, len(text)], dtype=np.int64)).hash
    slots = np.zeros(_NUM_STOP_SLOTS, dtype=np.uint64)
    bits = np.zeros(_NUM_STOP_SLOTS, dtype=np.uint8)
    own = hashes & np.uint64(_NUM_STOP_SLOTS - 1)
    slots[own] = hashes
    bits[own] = 1 << np.arange(len(hashes))
    assert np.count_nonzero(bits) == len(STOP_WORDS), "two stop words share a slot: double _NUM_STOP_SLOTS"
    return slots, bits


@compiled_lean
def _measure_text(
    text: Any,
    eight: Any,
    offsets: Any,
    pages: Any,
    entries: Any,
    line_hashes: Any,
    line_chars: Any,
    paragraph_hashes: Any,
    paragraph_chars: Any,
    table: Any,
    signals: Any,
) -> None:
    """Columns before `num_segments`."""
    for document in range(len(offsets) - 1):
        begin, end = offsets[document], offsets[document + 1]
        counts, is_odd = count_characters(text, eight, begin, end, pages, entries)
        for column in range(len(counts)):
            signals[document, column] = counts[column]
        content_begin = content_start(text, begin, end, pages, entries)
        content_stop = content_end(text, content_begin, end, pages, entries)

        num_lines = num_paragraphs = 0
        in_paragraph = paragraph_length = 0
        paragraph = np.uint64(0)
        longest = bullets = ellipses = num_feeds = 0
        at = begin
        while at <= end:
            stop, chars = line_end(text, eight, at, end) if at < end else (at, 0)
            hashed = np.uint64(0)
            if stop > at:
                hashed = hash_bytes(text, eight, at, stop)
                line_hashes[num_lines] = hashed
                line_chars[num_lines] = chars
                num_lines += 1
                longest = max(longest, chars)
                if not is_odd:
                    bullets += starts_with_bullet(text, at, stop, pages, entries)
                    ellipses += ends_with_ellipsis(text, at, stop, pages, entries)
            first, last = max(at, content_begin), min(stop, content_stop)
            if first < last:
                if first > at or last < stop:
                    hashed = hash_bytes(text, eight, first, last)
                    chars = num_chars_in(text, first, last)
                paragraph = absorbed(paragraph, hashed)
                paragraph_length += chars + (in_paragraph > 0)
                in_paragraph += 1
            is_blank, is_last = stop == at, stop == end
            if in_paragraph and (is_blank or is_last):
                paragraph_hashes[num_paragraphs] = paragraph
                paragraph_chars[num_paragraphs] = paragraph_length
                num_paragraphs += 1
                in_paragraph = paragraph_length = 0
                paragraph = np.uint64(0)
            num_feeds += stop < end
            at = stop + 1

        if is_odd:
            num_all, longest, bullets, ellipses, all_chars = count_lines(text, begin, end, pages, entries)
        else:
            num_all = num_feeds + (end > begin and text[end - 1] != 10)
            all_chars = signals[document, 0] - num_feeds
        signals[document, 7] = num_all
        signals[document, 8] = longest
        signals[document, 9] = bullets
        signals[document, 10] = ellipses
        signals[document, 11] = all_chars

        has_first = end == begin or text[begin] == 10  # an empty part before, and one behind, line feeds
        has_last = end > begin and text[end - 1] == 10
        repeats, repeated_chars = count_repeats(line_hashes, line_chars, num_lines, table)
        signals[document, 12] = num_lines + has_first + has_last
        signals[document, 13] = repeats + (has_first and has_last)
        signals[document, 14] = repeated_chars
        repeats, repeated_chars = count_repeats(paragraph_hashes, paragraph_chars, num_paragraphs, table)
        signals[document, 15] = max(num_paragraphs, 1)
        signals[document, 16] = repeats
        signals[document, 17] = repeated_chars


@compiled_lean
def _measure_words(
    hashes: Any,
    num_chars: Any,
    kinds: Any,
    offsets: Any,
    stop_words: Any,
    stop_bits: Any,
    table: Any,
    keys: Any,
    counts: Any,
    level: Any,
    seen: Any,
    places: Any,
    signals: Any,
) -> None:
    """Columns from `num_segments` on."""
    for document in range(len(offsets) - 1):
        first, last = offsets[document], offsets[document + 1]
        words = word_chars = alphabetic = stops = 0
        met: Any = np.int64(0)
        for word in range(first, last):
            kind: Any = np.int64(kinds[word])
            is_word: Any = kind & IS_WORD
            words += is_word
            word_chars += is_word * num_chars[word]
            alphabetic += (kind & IS_ALPHABETIC) != 0
            hashed = hashes[word]
            slot = np.int64(hashed) & (_NUM_STOP_SLOTS - 1)
            if stop_words[slot] == hashed:
                stops += 1
                met |= np.int64(stop_bits[slot])
        signals[document, _IN_TEXT] = last - first
        signals[document, _IN_TEXT + 1] = words
        signals[document, _IN_TEXT + 2] = word_chars
        signals[document, _IN_TEXT + 3] = alphabetic
        signals[document, _IN_TEXT + 4] = stops
        for _ in range(len(STOP_WORDS)):
            signals[document, _IN_TEXT + 5] += met & 1
            met >>= 1
        repeated_ngrams(
            hashes[first:last],
            num_chars[first:last],
            table,
            keys,
            counts,
            level,
            seen,
            places,
            signals[document, _NGRAMS:],
        )


@compiled_lean
def _measure_edited(
    text: Any,
    eight: Any,
    offsets: Any,
    kinds: Any,
    word_offsets: Any,
    short_line_chars: Any,
    pages: Any,
    entries: Any,
    line_hashes: Any,
    line_chars: Any,
    table: Any,
    signals: Any,
) -> None:
    for document in range(len(offsets) - 1):
        end = offsets[document + 1]
        num_lines = terminal = short = feeds = all_chars = 0
        longest = second = third = 0
        at = offsets[document]
        while at <= end:
            stop, chars = line_end(text, eight, at, end) if at < end else (at, 0)
            all_chars += chars
            if chars > third:
                if chars > longest:
                    longest, second, third = chars, longest, second
                elif chars > second:
                    second, third = chars, second
                else:
                    third = chars
            if content_start(text, at, stop, pages, entries) < stop:
                line_hashes[num_lines] = hash_bytes(text, eight, at, stop)
                line_chars[num_lines] = chars
                num_lines += 1
                short += chars <= short_line_chars
                code, _ = code_point_at(text, last_character(text, at, stop))
                terminal += entry_of(code, pages, entries) & unicode.TERMINAL != 0
            feeds += stop < end
            at = stop + 1
        first, last = word_offsets[document], word_offsets[document + 1]
        words = 0
        for word in range(first, last):
            words += kinds[word] & IS_WORD
        _, repeated_chars = count_repeats(line_hashes, line_chars, num_lines, table)
        signals[document, 0] = all_chars + feeds
        signals[document, 1] = words
        signals[document, 2] = last - first
        signals[document, 3] = feeds
        signals[document, 4] = num_lines
        signals[document, 5] = terminal
        signals[document, 6] = short
        signals[document, 7] = repeated_chars
        signals[document, 8] = third
