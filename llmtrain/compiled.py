"""Loops over arrays, compiled by numba, and when its cached machine code may be used again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

ROOT = Path(__file__).parents[1]
_IMPORT = re.compile(r"^from (llmtrain[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


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
    """Hash of a module's source and of all it imports of `llmtrain`, however far.

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
