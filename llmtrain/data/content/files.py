"""Lines of small side files: lists, evaluation items, documents to learn from. Plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from llmtrain.errors import DataError


def open_text(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends, decompressed by its suffix: .gz, .zst, .bz2, .xz.

    Raises:
        DataError: a file that is missing, cut, damaged, or not UTF-8.
    """
    number = 0
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):  # noqa: B007 - named in the error
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, after line {number}: not UTF-8 ({error.reason}); convert it, for example with iconv"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: damaged archive ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed. The caller closes it."""
    opened: Any
    if path.suffix == ".gz":
        opened = gzip.open(path)  # noqa: SIM115
    elif path.suffix == ".bz2":
        opened = bz2.open(path)  # noqa: SIM115
    elif path.suffix == ".xz":
        opened = lzma.open(path)  # noqa: SIM115
    elif path.suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        opened = io.BufferedReader(reader)
    else:
        opened = path.open("rb")
    result: IO[bytes] = opened
    return result
