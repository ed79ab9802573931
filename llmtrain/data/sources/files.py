"""Files of the input, here or behind a URL: which there are, how to open them, whether they changed.

URLs are fsspec's (s3://, gs://, hf://, http://, memory://, ...). Credentials and other settings of a file
system come from where fsspec looks: its environment variables and `~/.config/fsspec`
(https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration), never from the config of a
run, which is saved in clear.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from llmtrain.data.document import utf8
from llmtrain.data.folder import is_output
from llmtrain.errors import DataError

PAUSES_S = (1.0, 5.0, 20.0)
"""How long to wait before a remote file is asked again."""
REMOTE_BLOCK_BYTES = 4 << 20
"""What one request to a remote file asks for."""
VERSION_KEYS = (
    "ETag",
    "etag",
    "checksum",
    "md5Hash",
    "generation",
    "blob_id",
    "Content-MD5",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "created",
)
"""What file systems of fsspec call that by which a changed file shows; which of them there are differs."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    path: str
    """A path or a URL."""
    num_bytes: int
    """0 when a server does not say."""
    version: str
    may_seek: bool
    """Whether it may be read from any byte on."""

    @property
    def name(self) -> str:
        return utf8(self.path)

    @property
    def source(self) -> str:
        return utf8(base_name(self.path).split(".")[0])


def is_url(path: str) -> bool:
    return "://" in path


def base_name(path: str) -> str:
    """The last part of a path or URL, without what follows `?` in a URL."""
    if is_url(path):
        return unquote(urlsplit(path).path.rstrip("/").rpartition("/")[2])
    return os.path.basename(path)


def list_files(patterns: list[str], *, out: Path | None = None) -> list[InputFile]:
    """Files that the patterns name, each once, sorted by path; what a run into `out` wrote is left out."""
    plain = [pattern.removeprefix("file://") for pattern in patterns]
    local = [pattern for pattern in plain if not is_url(pattern)]
    found = {str(path): _local_file(path) for path in find_files(local, out=out)}
    for pattern in plain:
        if is_url(pattern):
            found |= {file.path: file for file in _remote_files(pattern)}
    return [found[path] for path in sorted(found)]


def find_files(patterns: list[str], *, out: Path | None = None) -> list[Path]:
    """Files on this machine that the patterns name, each once, sorted; what a run into `out` wrote is left
    out.

    A folder stands for every file inside it, but hidden ones, as in a glob. A file that is reached by
    several names counts under the first of them.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        literal = Path(pattern)
        matches = [literal] if literal.exists() else [Path(name) for name in glob(pattern, recursive=True)]
        files = [file for match in matches for file in _files_of(match)]
        if not files:
            what = "is a folder without files" if matches else "matches no file"
            raise DataError(f"corpus.paths: {pattern!r} {what} (looked from {Path.cwd()})")
        for file in files:
            real = file.resolve()
            if out is None or not is_output(out, real):
                found[real] = min(file, found.get(real, file))
    return sorted(found.values())


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for inside in path.rglob("*"):
            is_hidden = any(part.startswith(".") for part in inside.relative_to(path).parts)
            if not is_hidden and inside.is_file():
                yield inside


def _local_file(path: Path) -> InputFile:
    stat = path.stat()
    return InputFile(
        path=str(path), num_bytes=stat.st_size, version=version_of_stat(stat), may_seek=path.is_file()
    )


def version_of_stat(stat: os.stat_result) -> str:
    return f"{stat.st_size:,} bytes, changed at {stat.st_mtime_ns} ns"


def _remote_files(pattern: str) -> list[InputFile]:
    system, inside = _file_system(pattern)
    is_http = pattern.startswith(("http://", "https://"))
    try:
        if "*" in pattern or (not is_http and any(mark in pattern for mark in "?[")):
            infos = list(system.glob(inside, detail=True).values())
        elif not is_http and system.isdir(inside):
            infos = list(system.find(inside, detail=True).values())
        else:
            infos = [system.info(inside)]
    except FileNotFoundError:
        infos = []
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(pattern, error) from error
    files = [_remote_file(system, info) for info in infos if info["type"] == "file"]
    if not files:
        raise DataError(
            f"corpus.paths: {pattern!r} matches no file; look at it with another tool, such as "
            f"`python -c \"import fsspec; print(fsspec.open_files('{pattern}'))\"`"
        )
    return files


def _file_system(url: str) -> tuple[Any, str]:  # Any: fsspec is untyped
    try:
        system, inside = fsspec.url_to_fs(url)
    except ImportError as error:  # says which package, as in: Install s3fs to access S3
        raise DataError(
            f"{url!r} needs a package that is not installed: {error}. Install it beside llmtrain with pip"
        ) from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise DataError(f"{url!r} cannot be opened: {error}; known: {known}") from error
    return system, inside


def _remote_file(system: Any, info: dict[str, Any]) -> InputFile:
    size = info.get("size")
    return InputFile(
        path=system.unstrip_protocol(info["name"]),
        num_bytes=size or 0,
        version=next(iter(_versions_of_info(info).values())),
        may_seek=bool(size) and info.get("partial", True),
    )


def _versions_of_info(info: dict[str, Any]) -> dict[str, str]:
    """What tells the state of a remote file, by the mark that is used; the best mark first."""
    size = "unknown size" if info.get("size") is None else f"{info['size']:,} bytes"
    marks = {key: info[key] for key in VERSION_KEYS if info.get(key) is not None}
    plain = {key: mark.timestamp() if isinstance(mark, datetime) else mark for key, mark in marks.items()}
    return {key: f"{size}, {key} {mark}" for key, mark in plain.items()} | {"": size}


def check_unchanged(path: str, version: str | None) -> None:
    """Raise DataError unless the file is as it was when it was listed. None: it was not listed."""
    if version is None:
        return
    try:
        now = _version_now(path, version)
    except FileNotFoundError:
        raise DataError(
            f"{utf8(path)} is gone; it had {version} when this run listed its input. Put it back, or run the "
            "same command again to go on without it"
        ) from None
    if now != version:
        raise DataError(
            f"{utf8(path)} changed while this run was on: {version} when it was listed, {now} now. What was "
            "read of it is thrown away; run the same command again, which lists the input anew"
        )


def _version_now(path: str, version: str) -> str:
    """The present state, by the mark that `version` was made of. A listing of a folder may have marks that
    asking for one file does not give; then the size must do."""
    if not is_url(path):
        return version_of_stat(os.stat(path))
    system, inside = _file_system(path)
    system.invalidate_cache()
    try:
        versions = _versions_of_info(system.info(inside))
    except FileNotFoundError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(path, error) from error
    size, _, mark = version.partition(", ")
    key = mark.split(" ")[0]
    if key in versions:
        return versions[key]
    return version if size == versions[""] else versions[""]


def open_file(path: str, *, in_order: bool = False) -> io.BufferedReader:
    """Open for reading; the caller closes it.

    Args:
        in_order: the file is read from its first byte to its last, so a server need not know ranges.

    Raises:
        OSError: a file on this machine that cannot be opened. DataError: one behind a URL.
    """
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(_RemoteFile(path, in_order=in_order), REMOTE_BLOCK_BYTES)


class _RemoteFile(io.RawIOBase):
    """A file behind a URL. What fails is tried again from where it was; what fails for good is a DataError,
    not a lost document: the run goes on there when it is started again."""

    def __init__(self, path: str, *, in_order: bool) -> None:
        self.path = path
        self.position = 0
        system, inside = _file_system(path)
        self._seekable = not (in_order and path.startswith(("http://", "https://")))
        options = {"block_size": REMOTE_BLOCK_BYTES, "cache_type": "readahead"} if self._seekable else {}
        self._open: Callable[[], Any] = lambda: system.open(inside, "rb", **(options or {"block_size": 0}))
        self._inner: Any = None  # Any: fsspec is untyped

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._tried(lambda inner: inner.size)
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        def read(inner: Any) -> bytes:
            if inner.tell() != self.position:
                inner.seek(self.position)
            found: bytes = inner.read(len(buffer))
            return found

        content = self._tried(read)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def _tried(self, ask: Any) -> Any:
        for pause in (*PAUSES_S, None):
            try:
                if self._inner is None:
                    self._inner = self._open()
                return ask(self._inner)
            except Exception as error:  # each file system has errors of its own
                is_final = isinstance(error, FileNotFoundError | PermissionError) or pause is None
                if is_final or (self.position and not self._seekable):
                    raise _unreadable(self.path, error) from error
                self._drop()
                time.sleep(pause or 0)
        raise AssertionError("the last try returns or raises")

    def _drop(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.close()

    def close(self) -> None:
        self._drop()
        super().close()


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read: {type(error).__name__}: {error}. See that it can be reached; the same "
        "command then goes on where it was"
    )
