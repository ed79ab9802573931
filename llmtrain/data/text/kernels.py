"""Loops over the bytes of many documents at once: how they are compiled, and the first of them, normalising.

Documents lie back to back in one uint8 array; `offsets[d]:offsets[d + 1]` is document d. Input is UTF-8.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

ROOT = Path(__file__).parents[3]
_IMPORT = re.compile(r"^from (llmtrain\.data[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


def compiled(function: Function) -> Function:
    """Compile with numba, keeping machine code on disk where some folder for it can be written."""
    return _compiled(function)


def compiled_lean(function: Function) -> Function:
    """`compiled` without the counting of references to arrays: for loops that make no array.

    The counting is atomic and happens at each call: words are split at 40 MB/s with it, 200 without.
    What such a loop writes comes in as arguments; a new array inside it would never be freed.
    """
    return _compiled(function, _nrt=False)


def _compiled(function: Function, **options: Any) -> Function:
    try:
        result: Any = numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder to cache in: each process compiles anew
        return cast(Function, numba.njit(nogil=True, **options)(function))
    cache_file = result._cache._cache_file  # no public name; a test notices when it goes
    cache_file._source_stamp = source_stamp(function.__module__)
    return cast(Function, result)


@cache
def source_stamp(module: str, root: Path = ROOT) -> bytes:
    """Hash of a module's source and of all it imports of `llmtrain.data`, however far.

    numba looks at the file of a function alone: it would go on using machine code that holds a function of
    another file as it was.

    Args:
        root: the folder that holds `llmtrain`.
    """
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if name not in seen and path.is_file():
            seen[name] = path.read_text(encoding="utf-8")
            for package, names in _IMPORT.findall(seen[name]):
                waiting.append(package)
                waiting += [f"{package}.{each}" for each in re.findall(r"\w+", names)]
    return hashlib.sha256("\0".join(text for _, text in sorted(seen.items())).encode()).digest()


@compiled
def clean(text: Any, offsets: Any) -> Any:
    """Unify line ends, strip control characters and byte order marks, trim.

    CR LF and CR become LF. U+0000..U+001F but tab and LF, U+007F..U+009F and U+FEFF vanish. So do LF at the
    start of a document, and spaces, tabs and LF at its end.

    Returns:
        text, offsets, and whether each document holds a byte above 0x7F before cleaning.
    """
    num_documents = len(offsets) - 1
    out = np.empty(offsets[-1] - offsets[0], dtype=np.uint8)
    out_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    non_ascii = np.zeros(num_documents, dtype=np.bool_)
    filled = 0
    for document in range(num_documents):
        at, end = offsets[document], offsets[document + 1]
        first = filled
        while at < end:
            byte = text[at]
            if byte >= 0x80:
                non_ascii[document] = True
                if byte == 0xC2 and at + 1 < end and 0x80 <= text[at + 1] <= 0x9F:
                    at += 2
                    continue
                if byte == 0xEF and at + 2 < end and text[at + 1] == 0xBB and text[at + 2] == 0xBF:
                    at += 3
                    continue
            elif byte == 13:
                byte = np.uint8(10)
                if at + 1 < end and text[at + 1] == 10:
                    at += 1
            elif (byte < 32 and byte != 9 and byte != 10) or byte == 127:
                at += 1
                continue
            if byte != 10 or filled > first:
                out[filled] = byte
                filled += 1
            at += 1
        while filled > first and (out[filled - 1] == 10 or out[filled - 1] == 32 or out[filled - 1] == 9):
            filled -= 1
        out_offsets[document + 1] = filled
    return out[:filled].copy(), out_offsets, non_ascii
