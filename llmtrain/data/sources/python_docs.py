"""The default corpus, which every user already has: what people wrote to people in this Python installation.

From a .py file: every string that is a statement of its own (docstrings of modules, classes, functions and
attributes) as PEP 257 trims it, and every block of lines that hold only a comment, in the file's order
with a blank line between. Escape sequences stay as they are written, comments behind code are left out.
A .md, .rst or .txt file is taken whole. The source of a document is its package; `python` is the
standard library.

A scanner of bytes finds both, about a hundred times faster than `ast` and `tokenize`; a test holds it
against `ast`.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.compiled import compiled
from llmtrain.data.document import utf8
from llmtrain.data.sources.files import version_of_stat

SUFFIXES = (".py", ".md", ".rst", ".txt")
STDLIB_SOURCE = "python"
NO_FOLDERS = ("__pycache__", "site-packages", "dist-packages")

_HASH, _LF, _CR, _BACKSLASH, _SPACE, _TAB, _FORM_FEED = 35, 10, 13, 92, 32, 9, 12


@dataclass(frozen=True, slots=True)
class InstalledFile:
    path: str
    name: str
    """`<root>/<path inside it>`: equal on every machine with the same packages."""
    source: str
    num_bytes: int
    version: str
    """Its state when it was listed."""


def installed_files() -> list[InstalledFile]:
    """Every file of the installation that may hold text, sorted by name."""
    stdlib = sysconfig.get_path("stdlib")
    roots = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    found = [file for root in (stdlib, *roots) for file in _walk(root, is_stdlib=root == stdlib)]
    return sorted({file.name: file for file in found}.values(), key=lambda file: file.name)


def draw_order(files: list[InstalledFile], seed: int) -> list[InstalledFile]:
    """The files in the order of a hash of seed and name, so that any first part of them is a fair draw."""
    return sorted(files, key=lambda file: xxhash.xxh3_128_digest(f"{seed}\x1f{file.name}".encode()))


def _walk(root: str, *, is_stdlib: bool) -> Iterator[InstalledFile]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NO_FOLDERS]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        package = inside.partition("/")[0].partition("-")[0]
        for name in names:
            if not name.endswith(SUFFIXES):
                continue
            path = os.path.join(folder, name)
            try:
                stat = os.stat(path)
            except OSError:  # a dangling link
                continue
            source = STDLIB_SOURCE if is_stdlib else name.removesuffix(".py") if inside == "." else package
            place = "python" if is_stdlib else "site-packages"
            full_name = f"{place}/{name}" if inside == "." else f"{place}/{inside}/{name}"
            yield InstalledFile(path, utf8(full_name), utf8(source), stat.st_size, version_of_stat(stat))


def extract(sources: list[bytes]) -> list[bytes]:
    """Docstrings and comments of Python sources, one text each."""
    offsets = np.zeros(len(sources) + 1, dtype=np.int64)
    np.cumsum([len(source) for source in sources], out=offsets[1:])
    joined = np.frombuffer(b"".join(sources), dtype=np.uint8)
    text, ends = _extract(joined, offsets)
    raw = text.tobytes()
    starts = np.append(0, ends)[:-1]
    return [raw[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


Bytes = npt.NDArray[np.uint8]


@compiled
def _string_end(source: Any, quote: int, end: int) -> Any:
    """Content and end of the string whose first quote is at `quote`: (start, stop, after, whether it is
    closed)."""
    mark = source[quote]
    if quote + 2 < end and source[quote + 1] == mark and source[quote + 2] == mark:
        at = quote + 3
        while at + 2 < end:
            if source[at] == _BACKSLASH:
                at += 2
            elif source[at] == mark and source[at + 1] == mark and source[at + 2] == mark:
                return quote + 3, at, at + 3, True
            else:
                at += 1
        return quote + 3, end, end, False
    at = quote + 1
    while at < end and source[at] != _LF:
        if source[at] == mark:
            return quote + 1, at, at + 1, True
        at += 2 if source[at] == _BACKSLASH else 1
    return quote + 1, min(at, end), min(at, end), False


@compiled
def _line_end(source: Any, at: int, end: int) -> int:
    while at < end and source[at] != _LF:
        at += 1
    return at


@compiled
def _right_trimmed(source: Any, start: int, stop: int) -> int:
    while stop > start and (source[stop - 1] <= _SPACE):
        stop -= 1
    return stop


@compiled
def _put_docstring(source: Any, start: int, stop: int, out: Any, filled: int) -> int:
    """Write source[start:stop] as inspect.cleandoc trims it, with trailing white space of lines removed,
    too."""
    if start + 1 < stop and source[start] == _BACKSLASH and source[start + 1] == _LF:
        start += 2
    margin = 1 << 30
    at = _line_end(source, start, stop) + 1
    while at < stop:
        line_stop = _line_end(source, at, stop)
        column = 0
        while at < line_stop and (source[at] == _SPACE or source[at] == _TAB):
            column = column + 1 if source[at] == _SPACE else column // 8 * 8 + 8
            at += 1
        if _right_trimmed(source, at, line_stop) > at:
            margin = min(margin, column)
        at = line_stop + 1
    first = filled
    at = start
    is_first_line = True
    num_blank = 0
    while at < stop:
        line_stop = _line_end(source, at, stop)
        column = 0
        while at < line_stop and (source[at] == _SPACE or source[at] == _TAB):
            column = column + 1 if source[at] == _SPACE else column // 8 * 8 + 8
            at += 1
        text_stop = _right_trimmed(source, at, line_stop)
        if text_stop > at:
            if filled > first:
                for _ in range(num_blank + 1):
                    out[filled] = _LF
                    filled += 1
            num_blank = 0
            if not is_first_line:
                for _ in range(column - margin):
                    out[filled] = _SPACE
                    filled += 1
            for position in range(at, text_stop):
                out[filled] = source[position]
                filled += 1
        else:
            num_blank += 1
        is_first_line = False
        at = line_stop + 1
    return filled


@compiled
def _separated(out: Any, first: int, filled: int) -> int:
    """Write the blank line between two blocks."""
    if filled > first:
        out[filled] = _LF
        out[filled + 1] = _LF
        filled += 2
    return filled


@compiled
def _extract(joined: Any, offsets: Any) -> Any:
    num_files = len(offsets) - 1
    # A tab of a docstring's indent may become 8 spaces; a block of 2 bytes (`#x`) brings 2 more for the
    # blank line.
    out = np.empty(1 << 16, dtype=np.uint8)
    ends = np.zeros(num_files, dtype=np.int64)
    special = np.zeros(256, dtype=np.bool_)
    for byte in (_HASH, _LF, _BACKSLASH, 34, 39, 40, 41, 91, 93, 123, 125):
        special[byte] = True
    filled = 0
    for number in range(num_files):
        at, end = offsets[number], offsets[number + 1]
        most = filled + 8 * (end - at) + 64
        if most > len(out):
            larger = np.empty(2 * most, dtype=np.uint8)
            larger[:filled] = out[:filled]
            out = larger
        first = filled
        depth = 0
        is_line_start, is_statement_start, in_comment_block = True, True, False
        while at < end:
            if is_line_start:
                is_line_start = False
                while at < end and _is_blank(joined[at]):
                    at += 1
                if at < end and joined[at] == _HASH:
                    stop = _line_end(joined, at, end)
                    is_shebang = at == offsets[number] and at + 1 < end and joined[at + 1] == 33
                    while at < stop and joined[at] == _HASH:
                        at += 1
                    if at < stop and joined[at] == _SPACE:
                        at += 1
                    text_stop = _right_trimmed(joined, at, stop)
                    if not is_shebang and (in_comment_block or text_stop > at):
                        if in_comment_block:
                            out[filled] = _LF
                            filled += 1
                        else:
                            filled = _separated(out, first, filled)
                        in_comment_block = True
                        for position in range(at, text_stop):
                            out[filled] = joined[position]
                            filled += 1
                    at = stop + 1
                    is_line_start = True
                    continue
                if in_comment_block:
                    filled = _trim_line_ends(out, first, filled)
                in_comment_block = False
                if at < end and joined[at] != _LF and depth == 0 and is_statement_start:
                    is_statement_start = False
                    quote = at
                    if (
                        joined[at] == 114 or joined[at] == 82 or joined[at] == 117 or joined[at] == 85
                    ):  # r R u U
                        quote += 1
                    if quote < end and (joined[quote] == 34 or joined[quote] == 39):
                        start, stop, after, is_closed = _string_end(joined, quote, end)
                        at = after
                        while at < end and (joined[at] == _SPACE or joined[at] == _TAB or joined[at] == _CR):
                            at += 1
                        if is_closed and (
                            at == end or joined[at] == _LF or joined[at] == _HASH or joined[at] == 59
                        ):
                            put = _separated(out, first, filled)
                            after_put = _put_docstring(joined, start, stop, out, put)
                            filled = after_put if after_put > put else filled
                continue
            byte = joined[at]
            if not special[byte]:
                at += 1
            elif byte == _LF:
                is_line_start = True
                is_statement_start = depth == 0
                at += 1
            elif byte == _HASH:
                at = _line_end(joined, at, end)
            elif byte == _BACKSLASH:
                at += 1
                while at < end and joined[at] == _CR:
                    at += 1
                at += 1
            elif byte == 34 or byte == 39:
                _, _, at, _ = _string_end(joined, at, end)
            else:
                depth = depth + 1 if byte == 40 or byte == 91 or byte == 123 else max(0, depth - 1)
                at += 1
        filled = _trim_line_ends(out, first, filled)
        ends[number] = filled
    return out[:filled].copy(), ends


@compiled
def _is_blank(byte: int) -> bool:
    return byte in (_SPACE, _TAB, _FORM_FEED, _CR)


@compiled
def _trim_line_ends(out: Any, first: int, filled: int) -> int:
    while filled > first and out[filled - 1] == _LF:
        filled -= 1
    return filled
