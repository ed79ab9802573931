"""Line edits: which lines of a document go, and which parts of lines, in one compiled pass over the bytes.

C4's rules in the order of tensorflow/datasets@0560e686 text/c4_utils.py `clean_page`, then RefinedWeb's in
the order of mlfoundations/dclm@83830119 dclm_baseline_refinedweb.yaml. Where we differ from the two:
docs/data_rules.md. Whatever goes is counted under one reason, lines and bytes, and the bytes add up to the
difference in length.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled_lean
from llmtrain.data.filters.config import EditsConfig
from llmtrain.data.text.sentences import (
    CLASS,
    IS_DECIMAL,
    IS_DIGIT,
    IS_UPPER,
    IS_WORD,
    SPACE,
    TABLE_SIZE,
    character,
    count_sentences,
    decode,
    sentence_tables,
)
from llmtrain.errors import DataError

EDIT_REASONS = (
    "white_space",
    "blank_line",
    "long_word",
    "citation",
    "no_terminal_mark",
    "few_words",
    "javascript",
    "policy",
    "uppercase_line",
    "numeric_line",
    "counter_line",
    "one_word_line",
    "navigation",
)
"""What bytes can go for. For white_space, citation and navigation the count is of lines that lost a part."""
(
    _WHITE_SPACE,
    _BLANK,
    _LONG_WORD,
    _CITATION,
    _NO_MARK,
    _FEW_WORDS,
    _HAS_JAVASCRIPT,
    _HAS_POLICY,
    _UPPERCASE,
    _NUMERIC,
    _COUNTER,
    _ONE_WORD,
    _NAVIGATION,
) = range(13)
EDIT_SIGNALS = (
    "num_sentences",
    "num_lorem_ipsum_lines",
    "num_curly_bracket_lines",
    "num_bad_words",
    "num_line_words",
    "num_removed_line_words",
)
"""Columns of `Edited.flags`: numbers that only the line edits can tell. The last two count words, split on
white space, that begin with a letter or digit: those that RefinedWeb's edits met, and those they took."""
(_NUM_SENTENCES, _NUM_LOREM_LINES, _NUM_CURLY_LINES, _NUM_BAD_WORDS, _NUM_LINE_WORDS, _NUM_REMOVED_WORDS) = (
    range(6)
)


@dataclass(frozen=True, kw_only=True)
class Edited:
    """Documents after the line edits, back to back."""

    text: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    is_changed: npt.NDArray[np.bool_]
    removed: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    """Lines and bytes of each document that went, by reason; over all reasons the bytes are the difference
    in length. Empty where no edit is on."""
    flags: npt.NDArray[np.int64]
    """[documents, len(EDIT_SIGNALS)]"""


class _Switches(NamedTuple):
    """EditsConfig as the kernel takes it: -1 is off."""

    strip_lines: bool
    max_blank_lines: int
    max_word_chars: int
    strip_citations: bool
    has_terminal_marks: bool
    min_words: int
    javascript: bool
    policy: bool
    refinedweb: bool
    max_uppercase: float
    numeric: bool
    counter: bool
    one_word: bool
    max_navigation_words: int
    page_signals: bool
    bad_words: bool
    inside_words: bool


class _BadWords(NamedTuple):
    """An Aho-Corasick automaton over classes of characters."""

    classes: npt.NDArray[np.uint16]
    """Of a character; both cases of a letter have one. 0 is in no word."""
    next_state: npt.NDArray[np.int32]
    """[states, classes]"""
    num_chars: npt.NDArray[np.int32]
    """Of the word that ends in a state; 0 where none does."""
    shorter: npt.NDArray[np.int32]
    """The state of the next shorter word that ends there too; 0 where none does."""


_SPACE, _SLOW = 1, 2
_BRACKET, _JAVASCRIPT, _POLICY, _LOREM, _CURLY = 1, 2, 4, 8, 16


def edit_lines(text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], cfg: EditsConfig) -> Edited:
    """Edit documents that lie back to back, and count what rules ask about their lines.

    Raises:
        DataError: edits.bad_words_file cannot be read or holds no word.
    """
    num_documents = len(offsets) - 1
    switches = _switches(cfg)
    flags = np.zeros((num_documents, len(EDIT_SIGNALS)), dtype=np.int64)
    if not _is_any_on(cfg):
        return Edited(
            text=text,
            offsets=offsets,
            is_changed=np.zeros(num_documents, dtype=np.bool_),
            removed={},
            flags=flags,
        )
    table, mark_bytes = sentence_tables()
    marks = np.array(sorted({ord(mark) for mark in cfg.terminal_marks or ""}), dtype=np.int64)
    removed = np.zeros((2, len(EDIT_REASONS), num_documents), dtype=np.int64)
    out = np.empty(len(text), dtype=np.uint8)
    out_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    is_changed = np.zeros(num_documents, dtype=np.bool_)
    _edit(
        text,
        offsets,
        switches,
        _byte_flags(switches),
        table,
        mark_bytes,
        marks,
        _automaton(cfg.bad_words_file, _version(cfg.bad_words_file)),
        out,
        out_offsets,
        is_changed,
        removed,
        flags,
    )
    return Edited(
        text=out[: out_offsets[-1]],
        offsets=out_offsets,
        is_changed=is_changed,
        removed={
            reason: (removed[0, number], removed[1, number]) for number, reason in enumerate(EDIT_REASONS)
        },
        flags=flags,
    )


def _is_any_on(cfg: EditsConfig) -> bool:
    off = EditsConfig(
        bad_words_inside_words=cfg.bad_words_inside_words, short_line_chars=cfg.short_line_chars
    )
    return cfg != off


def _switches(cfg: EditsConfig) -> _Switches:
    def bound(value: int | None) -> int:
        return -1 if value is None else value

    uppercase = cfg.max_line_uppercase_fraction
    return _Switches(
        strip_lines=cfg.strip_lines,
        max_blank_lines=bound(cfg.max_blank_lines),
        max_word_chars=bound(cfg.max_word_chars),
        strip_citations=cfg.strip_citations,
        has_terminal_marks=cfg.terminal_marks is not None,
        min_words=bound(cfg.min_words_per_line),
        javascript=cfg.drop_javascript_lines,
        policy=cfg.drop_policy_lines,
        refinedweb=(
            cfg.drop_numeric_lines
            or cfg.drop_counter_lines
            or cfg.drop_one_word_lines
            or cfg.max_navigation_line_words is not None
            or uppercase is not None
        ),
        max_uppercase=-1.0 if uppercase is None else float(uppercase),
        numeric=cfg.drop_numeric_lines,
        counter=cfg.drop_counter_lines,
        one_word=cfg.drop_one_word_lines,
        max_navigation_words=bound(cfg.max_navigation_line_words),
        page_signals=cfg.count_page_signals,
        bad_words=cfg.bad_words_file is not None,
        inside_words=cfg.bad_words_inside_words,
    )


def _byte_flags(on: _Switches) -> npt.NDArray[np.uint8]:
    """What a byte asks of the scan: _SPACE, and _SLOW for all that need a second look."""
    flags = np.zeros(256, dtype=np.uint8)
    flags[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = _SPACE
    slow = [10, 0xC2, 0xE1, 0xE2, 0xE3]  # these begin the white space beyond ASCII
    if on.strip_lines:
        slow += [11, 12, 13, 28, 29, 30]  # line ends of str.splitlines
    if on.strip_citations:
        slow += b"["
    if on.javascript:
        slow += b"jJ"
    if on.policy:
        slow += b"kKvVfF"
    if on.page_signals:
        slow += b"pP{"
    flags[slow] |= _SLOW
    return flags


def _version(path: str | None) -> tuple[int, int] | None:
    """What changes when the file does; None when it is not there."""
    try:
        found = Path(path or "").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=2)
def _automaton(path: str | None, version: tuple[int, int] | None) -> _BadWords:
    """The words of a file, as it was in this version."""
    words: list[str] = []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read edits.bad_words_file={path}: {error}; give a UTF-8 file with one word a line"
            ) from error
        words = sorted({line.strip().lower() for line in lines} - {""})
        if not words:
            raise DataError(
                f"edits.bad_words_file={path} holds no word; give one a line, or null for no list"
            )
    letters = {letter: number for number, letter in enumerate(sorted(set("".join(words))), start=1)}
    classes = np.zeros(TABLE_SIZE, dtype=np.uint16)
    for letter, number in letters.items():
        for form in (letter, letter.upper(), letter.title()):
            if len(form) == 1 and form.lower() == letter and ord(form) < TABLE_SIZE:
                classes[ord(form)] = number
    # A trie, then, breadth first, where to go on when the next character does not fit.
    edges: list[dict[int, int]] = [{}]
    num_chars = [0]
    for word in words:
        state = 0
        for letter in word:
            number = letters[letter]
            if number not in edges[state]:
                edges[state][number] = len(edges)
                edges.append({})
                num_chars.append(0)
            state = edges[state][number]
        num_chars[state] = len(word)
    next_state = np.zeros((len(edges), len(letters) + 1), dtype=np.int32)
    shorter = np.zeros(len(edges), dtype=np.int32)
    fallback = [0] * len(edges)
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        next_state[state] = next_state[fallback[state]] if state else 0
        back = fallback[state]
        shorter[state] = back if num_chars[back] else shorter[back]
        for number, target in edges[state].items():
            fallback[target] = int(next_state[fallback[state], number]) if state else 0
            waiting.append(target)
        for number, target in edges[state].items():
            next_state[state, number] = target
    return _BadWords(
        classes=classes,
        next_state=next_state,
        num_chars=np.array(num_chars, dtype=np.int32),
        shorter=shorter,
    )


def _bytes_of(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytearray(text.encode()), dtype=np.uint8)


_JAVASCRIPT_WORD = _bytes_of("javascript")
_LOREM_WORDS = _bytes_of("lorem ipsum")
_COOKIE = _bytes_of("cookie")
_COOKIE_POLICY = _bytes_of("cookie policy")
_USE_COOKIES = _bytes_of("use cookies")
_USES_COOKIES = _bytes_of("uses cookies")
_USE_OF_COOKIES = _bytes_of("use of cookies")
_PRIVACY_POLICY = _bytes_of("privacy policy")
_TERMS_OF_USE = _bytes_of("terms of use")
_FOLLOWERS = np.zeros(256, dtype=np.uint8)
_FOLLOWERS[[*b"jJkKvVfFpP"]] = [*b"aaiiaa  ss"]
"""What follows the rare letter of a phrase: java, cookie, privacy, `of `, ipsum."""
_EDIT_MARK = _bytes_of("[edit]")
_CITATION_NEEDED = _bytes_of("[citation needed]")
_ITEMS_IN_CART = _bytes_of("items in cart")
_READ_MORE = _bytes_of("read more...")
_READ_MORE_ELLIPSIS = _bytes_of("read more…")
_SIGN_IN = _bytes_of("sign-in")
_NOUNS = _bytes_of(
    "likes shares comments retweets reposts quotes bookmarks upvotes downvotes downloads views followers "
)
"""What counters count (dclm modifiers.py, counter_line_modifier)."""


@compiled_lean
def _is_at(text: Any, at: int, begin: int, end: int, phrase: Any) -> bool:
    """Whether the phrase stands at `at`, in any case of its ASCII letters."""
    if at < begin or at + len(phrase) > end:
        return False
    for number in range(len(phrase)):
        byte = text[at + number]
        if 65 <= byte <= 90:
            byte += 32
        if byte != phrase[number]:
            return False
    return True


@compiled_lean
def _phrase_around(text: Any, at: Any, begin: int, end: int) -> int:
    """The bit of the phrase whose rare letter stands at `at`."""
    byte = text[at] | 0x20
    if byte == 106:  # j
        return _JAVASCRIPT if _is_at(text, at, begin, end, _JAVASCRIPT_WORD) else 0
    if byte == 112:  # lorem i-p-sum
        return _LOREM if _is_at(text, at - 7, begin, end, _LOREM_WORDS) else 0
    if byte == 118:  # pri-v-acy
        return _POLICY if _is_at(text, at - 3, begin, end, _PRIVACY_POLICY) else 0
    if byte == 102:  # terms o-f
        return _POLICY if _is_at(text, at - 7, begin, end, _TERMS_OF_USE) else 0
    if not _is_at(text, at - 3, begin, end, _COOKIE):  # coo-k-ie
        return 0
    is_policy = (
        _is_at(text, at - 3, begin, end, _COOKIE_POLICY)
        or _is_at(text, at - 7, begin, end, _USE_COOKIES)
        or _is_at(text, at - 8, begin, end, _USES_COOKIES)
        or _is_at(text, at - 10, begin, end, _USE_OF_COOKIES)
    )
    return _POLICY if is_policy else 0


@compiled_lean
def _scan(
    text: Any, begin: int, end: int, flags: Any, followers: Any, enough: int, all_line_ends: bool
) -> Any:
    """To the end of the line: where it ends, how wide the line end is (0: the text ends), words, phrases.

    Words are counted up to `enough` only. Unsigned positions spare a test for negative ones.
    """
    at, stop, one = np.uintp(begin), np.uintp(end), np.uintp(1)
    num_words = 0
    found = 0
    gap = 1
    while True:
        if num_words < enough:
            while at < stop:
                flag = flags[text[at]]
                if flag & _SLOW:
                    break
                space = flag & _SPACE
                num_words += gap & (space ^ 1)
                gap = space
                at += one
        else:
            while at < stop and not flags[text[at]] & _SLOW:
                at += one
        if at >= stop:
            return np.int64(at), 0, num_words, found
        byte = text[at]
        if byte == 10:
            return np.int64(at), 1, num_words, found
        if byte >= 0xC2:
            code, width = decode(text, np.int64(at))
            if code == 0x2028 or code == 0x2029 or code == 0x85:
                if all_line_ends:
                    return np.int64(at), width, num_words, found
                gap = 1
            elif (
                code == 0xA0
                or code == 0x1680
                or 0x2000 <= code <= 0x200A
                or code == 0x202F
                or code == 0x205F
                or code == 0x3000
            ):
                gap = 1
            else:
                num_words += gap
                gap = 0
            at += np.uintp(width)
            continue
        if byte < 32:
            width = 2 if byte == 13 and at + one < stop and text[at + one] == 10 else 1
            return np.int64(at), width, num_words, found
        if byte == 91:
            found |= _BRACKET
        elif byte == 123:
            found |= _CURLY
        elif at + one < stop and text[at + one] | 0x20 == followers[byte]:
            found |= _phrase_around(text, np.int64(at), begin, end)
        num_words += gap
        gap = 0
        at += one


@compiled_lean
def _copy(text: Any, begin: int, end: int, out: Any, filled: int) -> int:
    """Copy text[begin:end] to out[filled:], which may be the same array further on; where the copy ends."""
    source, target = np.uintp(begin), np.uintp(filled)
    for number in range(np.uintp(end - begin)):
        out[target + number] = text[source + number]
    return filled + end - begin


@compiled_lean
def _space_before(text: Any, begin: int, end: int, table: Any) -> int:
    """Bytes of the white space character that ends at `end`; 0 for any other."""
    if end <= begin:
        return 0
    at = end - 1
    while at > begin and 0x80 <= text[at] < 0xC0:
        at -= 1
    code, _ = decode(text, at)
    return end - at if character(code, table) & CLASS == SPACE else 0


@compiled_lean
def _stripped(text: Any, begin: int, end: int, table: Any) -> Any:
    """The span without the white space at its ends."""
    while begin < end:
        if 32 < text[begin] < 127:
            break
        code, width = decode(text, begin)
        if character(code, table) & CLASS != SPACE:
            break
        begin += width
    while end > begin:
        if 32 < text[end - 1] < 127:
            break
        width = _space_before(text, begin, end, table)
        if width == 0:
            break
        end -= width
    return begin, end


@compiled_lean
def _has_long_word(text: Any, begin: int, end: int, most: int, table: Any) -> bool:
    num_chars = 0
    at = begin
    while at < end:
        code, width = decode(text, at)
        num_chars = 0 if character(code, table) & CLASS == SPACE else num_chars + 1
        if num_chars > most:
            return True
        at += width
    return False


@compiled_lean
def _without_citations(text: Any, begin: int, end: int, out: Any, filled: int, table: Any) -> Any:
    """Copy to out[filled:] all but the citations; where the copy ends."""
    at = begin
    while at < end:
        if text[at] == 91:
            after = at + 1
            while after < end:
                code, width = decode(text, after)
                if not character(code, table) & IS_DECIMAL:
                    break
                after += width
            if after < end and text[after] == 93:
                at = after + 1
                continue
            # These two are matched in their own case, as C4's expression does.
            for phrase in (_EDIT_MARK, _CITATION_NEEDED):
                same = at + len(phrase) <= end
                number = 0
                while same and number < len(phrase):
                    same = text[at + number] == phrase[number]
                    number += 1
                if same:
                    after = -1
                    at += len(phrase)
                    break
            if after == -1:
                continue
        out[filled] = text[at]
        filled += 1
        at += 1
    return filled


@compiled_lean
def _ends_in_mark(text: Any, begin: int, end: int, marks: Any) -> bool:
    """Whether the last character is a terminal mark, and the line does not end in `...`."""
    if end == begin:
        return False
    if end - begin >= 3 and text[end - 1] == 46 and text[end - 2] == 46 and text[end - 3] == 46:
        return False
    at = end - 1
    while at > begin and 0x80 <= text[at] < 0xC0:
        at -= 1
    code, _ = decode(text, at)
    for mark in marks:  # noqa: SIM110 - a generator does not compile
        if code == mark:
            return True
    return False


@compiled_lean
def _profile(text: Any, begin: int, end: int, table: Any) -> Any:
    """Characters, capitals, digits, words on white space, and those that begin with a letter or digit."""
    num_chars = num_upper = num_digits = num_words = num_counted = 0
    gap = True
    at = begin
    while at < end:
        code, width = decode(text, at)
        entry = character(code, table)
        num_chars += 1
        num_upper += 1 if entry & IS_UPPER else 0
        num_digits += 1 if entry & IS_DIGIT else 0
        space = entry & CLASS == SPACE
        if gap and not space:
            num_words += 1
            num_counted += 1 if entry & IS_WORD and code != 95 else 0
        gap = space
        at += width
    return num_chars, num_upper, num_digits, num_words, num_counted


@compiled_lean
def _is_counter(text: Any, begin: int, end: int, table: Any) -> bool:
    r"""Whether the line is a number, with k, m or b after it, and what it counts; signs around do not matter:
    `^\W*\d[,.\d]*[kmb]?\s+(likes|...)\W*$`."""
    at = begin
    while at < end:
        code, width = decode(text, at)
        entry = character(code, table)
        if entry & IS_WORD:
            if not entry & IS_DECIMAL:
                return False
            break
        at += width
    if at >= end:
        return False
    while at < end:
        code, width = decode(text, at)
        if not (character(code, table) & IS_DECIMAL or code == 44 or code == 46):
            break
        at += width
    if at < end and (text[at] | 0x20 == 107 or text[at] | 0x20 == 109 or text[at] | 0x20 == 98):
        at += 1
    num_spaces = 0
    while at < end:
        code, width = decode(text, at)
        if character(code, table) & CLASS != SPACE:
            break
        num_spaces += 1
        at += width
    if num_spaces == 0:
        return False
    noun = 0
    while noun < len(_NOUNS):
        length = 0
        while _NOUNS[noun + length] != 32:
            length += 1
        if _is_at(text, at, begin, end, _NOUNS[noun : noun + length]):
            after = at + length
            while after < end:
                code, width = decode(text, after)
                if character(code, table) & IS_WORD:
                    break
                after += width
            if after >= end:
                return True
        noun += length + 1
    return False


@compiled_lean
def _without_navigation(text: Any, begin: int, end: int, table: Any) -> int:
    """Take the phrases, and one white space beside each, out of text[begin:end] in place; where it ends."""
    filled = begin
    at = begin
    while at < end:  # `items in cart`, anywhere
        if text[at] | 0x20 == 105 and _is_at(text, at, begin, end, _ITEMS_IN_CART):
            filled -= _space_before(text, begin, filled, table)
            at += len(_ITEMS_IN_CART)
            continue
        text[filled] = text[at]
        filled += 1
        at += 1
    end = filled
    for phrase in (_READ_MORE, _READ_MORE_ELLIPSIS):
        if _is_at(text, end - len(phrase), begin, end, phrase):
            end -= len(phrase)
            end -= _space_before(text, begin, end, table)
            break
    if _is_at(text, begin, begin, end, _SIGN_IN):
        skipped = begin + len(_SIGN_IN)
        if skipped < end:
            code, width = decode(text, skipped)
            if character(code, table) & CLASS == SPACE:
                skipped += width
        for at in range(skipped, end):
            text[begin + at - skipped] = text[at]
        end -= skipped - begin
    return end


@compiled_lean
def _count_bad_words(text: Any, begin: int, end: int, bad: Any, inside_words: bool, table: Any) -> int:
    """Words of the list in one line, between characters that are no part of a word unless `inside_words`."""
    count = 0
    state = 0
    at = begin
    while at < end:
        code, width = decode(text, at)
        at += width
        state = bad.next_state[state, bad.classes[code] if code < TABLE_SIZE else 0]
        ending = state if bad.num_chars[state] > 0 else bad.shorter[state]
        while ending > 0:
            is_whole = True
            if not inside_words:
                if at < end:
                    code, width = decode(text, at)
                    is_whole = not character(code, table) & IS_WORD
                first = at
                for _ in range(bad.num_chars[ending] + 1):  # to the character before the word
                    first -= 1
                    while first > begin and 0x80 <= text[first] < 0xC0:
                        first -= 1
                if first >= begin:
                    code, width = decode(text, first)
                    is_whole = is_whole and not character(code, table) & IS_WORD
            count += 1 if is_whole else 0
            ending = bad.shorter[ending]
    return count


@compiled_lean
def _edit(
    text: Any,
    offsets: Any,
    on: Any,
    flags: Any,
    table: Any,
    mark_bytes: Any,
    marks: Any,
    bad: Any,
    out: Any,
    out_offsets: Any,
    is_changed: Any,
    removed: Any,
    signals: Any,
) -> None:
    """Fills `out` to `out_offsets[-1]`, `removed` [2: lines and bytes, reasons, documents] and the others."""
    num_documents = len(offsets) - 1
    lines, num_bytes = removed[0], removed[1]
    followers = _FOLLOWERS
    enough = max(on.min_words, 1)
    filled = 0
    for document in range(num_documents):
        doc_end = offsets[document + 1]
        doc_begin = filled
        begin = offsets[document]
        num_kept = 0
        blank_run = 0  # blank lines kept since the last that is not
        text_end = filled  # where the last kept line that is not blank ends
        changed = False
        has_removed = False
        reason = -1
        more = begin < doc_end
        while more:
            line_end, width, num_words, found = _scan(
                text, begin, doc_end, flags, followers, enough, on.strip_lines
            )
            more = width > 0
            raw = line_end - begin
            first, last = begin, line_end
            reason = -1
            is_blank = num_words == 0
            line_at = filled + (1 if num_kept > 0 else 0)  # after the line feed that joins
            end_at = line_at
            num_citation_bytes = 0
            num_navigation_bytes = 0
            if on.strip_lines:
                first, last = (first, first) if is_blank else _stripped(text, first, last, table)
            if is_blank:
                if 0 <= on.max_blank_lines <= blank_run or (has_removed and text_end == doc_begin):
                    reason = _BLANK
            elif 0 <= on.max_word_chars < last - first and _has_long_word(
                text, first, last, on.max_word_chars, table
            ):
                reason = _LONG_WORD
            elif found & _BRACKET:
                end_at = _without_citations(text, first, last, out, line_at, table)
                if on.strip_lines:
                    copy_at, end_at = _stripped(out, line_at, end_at, table)
                    end_at = _copy(out, copy_at, end_at, out, line_at)
                num_citation_bytes = last - first - (end_at - line_at)
                # Read again: a citation may have hidden a phrase, or been the last word.
                _, _, num_words, found = _scan(out, line_at, end_at, flags, followers, enough, on.strip_lines)
                if num_words == 0:
                    reason = _CITATION
            if reason < 0 and end_at == line_at:
                end_at = _copy(text, first, last, out, line_at)
            if reason < 0 and not is_blank:
                if on.has_terminal_marks and not _ends_in_mark(out, line_at, end_at, marks):
                    reason = _NO_MARK
                elif num_words < on.min_words:
                    reason = _FEW_WORDS
                else:
                    signals[document, _NUM_LOREM_LINES] += 1 if found & _LOREM else 0
                    if found & _JAVASCRIPT:
                        reason = _HAS_JAVASCRIPT
                    else:
                        signals[document, _NUM_CURLY_LINES] += 1 if found & _CURLY else 0
                        if found & _POLICY:
                            reason = _HAS_POLICY
            if on.refinedweb and reason < 0 and not is_blank:
                num_chars, num_upper, num_digits, words, counted = _profile(out, line_at, end_at, table)
                left = 0
                if 0 <= on.max_uppercase < num_upper / num_chars:
                    reason = _UPPERCASE
                elif on.numeric and num_digits == num_chars:
                    reason = _NUMERIC
                elif on.counter and _is_counter(out, line_at, end_at, table):
                    reason = _COUNTER
                elif on.one_word and words < 2:
                    reason = _ONE_WORD
                else:
                    left = counted
                    if words <= on.max_navigation_words:
                        new_end = _without_navigation(out, line_at, end_at, table)
                        if new_end < end_at:
                            num_navigation_bytes = end_at - new_end
                            end_at = new_end
                            _, _, _, words, left = _profile(out, line_at, end_at, table)
                            if words == 0:
                                reason = _NAVIGATION
                signals[document, _NUM_LINE_WORDS] += counted
                signals[document, _NUM_REMOVED_WORDS] += counted - left

            if reason >= 0:  # all of it, and the line end after it
                changed = has_removed = True
                lines[reason, document] += 1
                num_bytes[reason, document] += raw + width
            else:
                if num_citation_bytes > 0:
                    lines[_CITATION, document] += 1
                    num_bytes[_CITATION, document] += num_citation_bytes
                if num_navigation_bytes > 0:
                    lines[_NAVIGATION, document] += 1
                    num_bytes[_NAVIGATION, document] += num_navigation_bytes
                num_spaces = raw - (last - first) + max(width - 1, 0)
                if num_spaces > 0:
                    lines[_WHITE_SPACE, document] += 1
                    num_bytes[_WHITE_SPACE, document] += num_spaces
                changed = changed or end_at - line_at != raw or (width > 0 and text[line_end] != 10)
                if is_blank:
                    blank_run += 1
                else:
                    blank_run = 0
                    text_end = end_at
                    if on.page_signals:
                        signals[document, _NUM_SENTENCES] += count_sentences(
                            out, line_at, end_at, table, mark_bytes
                        )
                    if on.bad_words:
                        signals[document, _NUM_BAD_WORDS] += _count_bad_words(
                            out, line_at, end_at, bad, on.inside_words, table
                        )
                if num_kept > 0:
                    out[filled] = 10
                num_kept += 1
                filled = end_at
            begin = line_end + width
        if reason >= 0 and num_kept > 0:  # the line feed before it joins nothing now
            num_bytes[reason, document] += 1
        if changed and blank_run > 0:
            lines[_BLANK, document] += blank_run
            num_bytes[_BLANK, document] += filled - text_end
            filled = text_end
        out_offsets[document + 1] = filled
        is_changed[document] = changed
