"""metrics.jsonl while it is being written: whole lines as they come, from any moment of a run on."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from llmtrain.errors import DataError
from llmtrain.tracking.metrics import Record

CHUNK_BYTES = 8 << 20


class MetricsFollower:
    """Reads what was appended since the last look.

    Only whole lines are taken: a half-written one is read again at the next look, when the writer has
    finished it, or a resume has cut it off. The file is opened anew each time, because a network file system
    shows another host's lines only then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        """Grows when the file turns out to be another one, or was cut: what was read before is void."""
        self.num_bad_lines = 0
        """Lines that are no records."""
        self.is_behind = False
        """Whether the last look may have left whole lines unread."""
        self.modified: float | None = None
        """When the file was written to, at the last look: Unix seconds by the file system's clock."""
        self._offset = 0
        self._inode: int | None = None

    def new_records(self) -> list[Record]:
        """Up to 8 MiB of new records, in order. Nothing while there is no file.

        Raises:
            DataError: the file may not be read.
        """
        try:
            return parse_lines(self._new_lines(), self)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read: {error.strerror}; ask its owner for the right to, or look from "
                "a host that can"
            ) from None

    def _new_lines(self) -> bytes:
        """Whole lines past the offset, and the offset moved behind them."""
        with open(self.path, "rb") as handle:
            status = os.fstat(handle.fileno())
            if self._inode not in (None, status.st_ino) or status.st_size < self._offset:
                self.generation += 1
                self._offset = 0
            self._inode, self.modified = status.st_ino, status.st_mtime
            handle.seek(self._offset)
            length = CHUNK_BYTES
            chunk = handle.read(length)
            while b"\n" not in chunk and len(chunk) == length:
                length *= 2
                chunk += handle.read(length - len(chunk))
        end = chunk.rfind(b"\n") + 1
        self._offset += end
        self.is_behind = len(chunk) == length
        return chunk[:end]


def parse_lines(text: bytes, counter: MetricsFollower | None = None) -> list[Record]:
    """The records among whole lines; others are left out, and counted where there is a counter."""
    records = []
    for line in text.split(b"\n"):
        if not line.strip():
            continue
        record = parse_line(line)
        if record is not None:
            records.append(record)
        elif counter is not None:
            counter.num_bad_lines += 1
    return records


def parse_line(line: bytes) -> Record | None:
    """One record, or None for anything else: a torn line, or JSON of another kind."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_record = (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("attempt"), int)
    )
    return record if is_record else None
