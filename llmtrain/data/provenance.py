"""Which versions made a data folder."""

from __future__ import annotations

import platform
import unicodedata
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of Python, Unicode and what decides bytes."""
    names = ("numba", "numpy", "pyarrow", "sentencepiece", "xxhash", "zstandard")
    return {"python": platform.python_version(), "unicode": unicodedata.unidata_version} | {
        name: version(name) for name in names
    }


def tool_version() -> str:
    """Of llmtrain."""
    try:
        return version("llmtrain")
    except PackageNotFoundError:
        return "source tree"
