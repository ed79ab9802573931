"""Where checkpoints lie: in a folder, or behind a URL that fsspec opens (s3://, gs://, memory://, ...).

A save writes files under names that are not taken yet, and replaces nothing but markers. So an object store
needs no more than this: an object appears whole, and whoever looks after that sees it (S3: since 2020).
Everything that goes over a network is tried several times.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import fsspec

from llmtrain.errors import CheckpointError
from llmtrain.files import atomic_write, fsync_folder

log = logging.getLogger(__name__)

NUM_TRIES = 6
"""Of one request; with the pauses below, an outage of 8 seconds is sat out, on average one of 12."""
FIRST_PAUSE_S = 0.5
"""Then twice as long each time, less a random part: ranks do not come back all at once."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, CheckpointError)
"""What another try would not change."""
DISK_BLOCK_BYTES = 1 << 20
"""Read at once: what the processor's caches still hold when it is hashed."""
REQUEST_BYTES = 32 << 20
"""Read or handed over at once behind a URL, where each request waits for an answer."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Url:
    """A folder or file of another system, with as much of Path's interface as checkpoints need."""

    text: str

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.text.rstrip("/").rpartition("/")[0])


Place = Path | Url


class Ranges(Protocol):
    """An open file."""

    block_bytes: int
    """A good number to read at once."""

    def read_into(self, offset: int, into: memoryview) -> int:
        """Fill `into`, or its beginning where the file ends, and return how many bytes that were."""


def place_of(where: str | Path) -> Place:
    """What a user calls a place: a path or a URL."""
    text = str(where)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Url(text) if "://" in text else Path(text)


def names(folder: Place) -> list[str]:
    """Of the files and folders in it, sorted; none where there is no folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(folder, Path):
        with _readable(folder):
            return sorted(os.listdir(folder)) if folder.is_dir() else []

    def ask(system: Any, inside: str) -> list[str]:
        system.invalidate_cache()  # others write, too
        try:
            found = system.ls(inside, detail=False)
        except FileNotFoundError:
            return []
        inside = inside.rstrip("/")
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != inside})

    with _readable(folder):
        return _try(folder, "listing", ask)


def exists(place: Place) -> bool:
    """Whether there is such a file.

    Raises:
        CheckpointError: that cannot be found out.
    """
    if isinstance(place, Path):
        return place.exists()

    def ask(system: Any, inside: str) -> bool:
        system.invalidate_cache()
        try:  # fsspec's own `exists` takes any failure for an absence
            system.info(inside)
        except FileNotFoundError:
            return False
        return True

    with _readable(place):
        return _try(place, "asking for", ask)


def num_bytes(place: Place) -> int:
    """Of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(place, Path):
        with _opened(place) as handle:  # opening, unlike stat, makes NFS ask the server
            return os.fstat(handle.fileno()).st_size

    def ask(system: Any, inside: str) -> int:
        system.invalidate_cache()
        return int(system.info(inside)["size"])

    with _readable(place):
        return _try(place, "asking for", ask)


def read_bytes(place: Place) -> bytes:
    """All of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(place, Path):
        with _opened(place) as handle:
            return handle.read()
    with _readable(place):
        return _try(place, "reading", lambda system, inside: bytes(system.cat_file(inside)))


@contextmanager
def open_ranges(place: Place) -> Iterator[Ranges]:
    """Raises:
    CheckpointError: it cannot be read.
    """
    if isinstance(place, Path):
        with _opened(place) as handle:
            yield _DiskRanges(handle)
    else:
        with _readable(place):
            yield _UrlRanges(place)


def write(place: Place, chunks: Callable[[], Iterable[memoryview]]) -> None:
    """Write a new file and flush it to the disk.

    Args:
        chunks: its contents, which may be asked for again.

    Raises:
        OSError, CheckpointError: that failed; a part of the file may be there.
    """
    if isinstance(place, Path):
        with open(place, "xb", buffering=0) as handle:
            for chunk in chunks():
                write_all(handle, chunk)
            os.fsync(handle.fileno())
        return

    def send(system: Any, inside: str) -> None:
        with _created(system, inside) as handle:
            for chunk in chunks():
                for at in range(0, len(chunk), REQUEST_BYTES):
                    handle.write(chunk[at : at + REQUEST_BYTES])

    _try(place, "writing", send)


def put(place: Place, content: bytes) -> None:
    """Write a small file that appears whole or not at all, in place of what is there.

    Raises:
        OSError, CheckpointError: that failed.
    """
    if isinstance(place, Path):
        with atomic_write(place) as handle:
            handle.write(content)
        return

    def send(system: Any, inside: str) -> None:
        with _created(system, inside) as handle:
            handle.write(content)

    _try(place, "writing", send)


def replace(source: Place, target: Place) -> None:
    """Give a small file another name: on a disk in one step that takes no space, behind a URL first the new
    one, then away with the old one.

    Raises:
        OSError, CheckpointError: that failed.
    """
    if isinstance(source, Path):
        source.replace(str(target))
        fsync_folder(source.parent)
    else:
        put(target, read_bytes(source))
        delete(source)


def delete(place: Place) -> None:
    """A file. One that is gone already is no error.

    Raises:
        OSError, CheckpointError: that failed.
    """
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return

    def ask(system: Any, inside: str) -> None:
        with suppress(FileNotFoundError):
            system.rm_file(inside)

    _try(place, "deleting", ask)


def delete_folder(folder: Place) -> None:
    """One that is empty, where there is such a thing.

    Raises:
        OSError: it is not empty.
    """
    if isinstance(folder, Path):
        with suppress(FileNotFoundError):
            folder.rmdir()
        return
    system, inside = _file_system(folder)
    with suppress(Exception):  # most systems have no folders, and none minds an empty one
        system.rmdir(inside)


def flush(folder: Place) -> None:
    """Make the names in it durable."""
    if isinstance(folder, Path):
        fsync_folder(folder)


def write_all(handle: IO[bytes], content: memoryview) -> None:
    """A raw `write` may take only a part: at most 2 GiB on Linux, less on a disk that is almost full."""
    while content:
        content = content[handle.write(content) :]


class _DiskRanges:
    block_bytes = DISK_BLOCK_BYTES

    def __init__(self, handle: IO[bytes]) -> None:
        self._fd = handle.fileno()

    def read_into(self, offset: int, into: memoryview) -> int:
        done = 0
        while done < into.nbytes:
            num_read = os.preadv(self._fd, [into[done:]], offset + done)
            if num_read == 0:
                break
            done += num_read
        return done


class _UrlRanges:
    block_bytes = REQUEST_BYTES

    def __init__(self, url: Url) -> None:
        self._url = url

    def read_into(self, offset: int, into: memoryview) -> int:
        def ask(system: Any, inside: str) -> int:
            found = system.cat_file(inside, start=offset, end=offset + into.nbytes)
            into[: len(found)] = found
            return len(found)

        return _try(self._url, "reading", ask) if into.nbytes else 0


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with _readable(path), open(path, "rb", buffering=0) as handle:
        yield handle


@contextmanager
def _readable(place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else _told(error)
        if isinstance(error, FileNotFoundError):
            reason = "No such file or directory"
        raise CheckpointError(f"{place} cannot be read: {reason}") from error


@contextmanager
def _created(system: Any, inside: str) -> Iterator[Any]:
    """A new file, and the folders above it on systems that have some."""
    try:
        handle = system.open(inside, "wb")
    except FileNotFoundError:
        system.makedirs(inside.rpartition("/")[0], exist_ok=True)
        handle = system.open(inside, "wb")
    with handle:
        yield handle


def _try(url: Url, what: str, work: Callable[[Any, str], Result]) -> Result:
    """`work(file system, path inside it)`, again after a pause where it fails."""
    system, inside = _file_system(url)
    for number in range(1, NUM_TRIES + 1):
        try:
            return work(system, inside)
        except FINAL:
            raise
        except Exception as error:  # each file system has errors of its own
            if number == NUM_TRIES:
                raise CheckpointError(
                    f"{what} {url} failed {NUM_TRIES} times, last with {_told(error)}"
                ) from error
            pause = FIRST_PAUSE_S * 2 ** (number - 1) * random.uniform(0.5, 1.0)
            log.warning(
                "%s %s failed (%s); try %d of %d in %.1f s",
                *(what, url, _told(error), number + 1, NUM_TRIES, pause),
            )
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _file_system(url: Url) -> tuple[Any, str]:  # Any: fsspec is untyped
    try:
        system, inside = fsspec.url_to_fs(url.text)
    except ImportError as error:  # says which package, as in: Install s3fs to access S3
        raise CheckpointError(
            f"{url} needs a package that is not installed: {error}. Install it beside llmtrain with pip"
        ) from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise CheckpointError(f"{url} cannot be opened: {error}; known: {known}") from error
    return system, inside


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
