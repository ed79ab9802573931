"""TensorBoard's event files, written from metrics.jsonl by a process that only reads the run's files.

The format is small, and written here by hand: the package that defines it is large, and only whoever looks at
the files needs it. A file is a sequence of frames: length (8 bytes, little-endian) and its checksum, then the
bytes and their checksum; a checksum is a masked CRC-32C (TensorFlow, tensorflow/core/lib/io/record_writer.h
and lib/hash/crc32c.h). The bytes are an Event in Protocol Buffers' encoding (tensorflow/core/util/event.proto
and framework/summary.proto); field numbers below are theirs. Tests read the files with TensorBoard's own
reader where it is installed.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import as_number

FOLDER_NAME = "tensorboard"
FILE_PREFIX = "events.out.tfevents"
VERSION = b"brain.Event:2"
"""What the first event of a file says; readers refuse other files."""
SESSION_START = 1
"""SessionLog.START: readers drop what was recorded from its step on, which a restart has undone."""
CRC_POLYNOMIAL = 0x82F63B78
"""CRC-32C, reflected (RFC 3720, section 12.1)."""
CRC_MASK = 0xA282EAD8
GROUPS = {
    "step": "train",
    "eval": "eval",
    "checkpoint": "checkpoint",
    "plan": "plan",
    "ranks": "ranks",
    "mixture": "mixture",
    "grads": "grads",
    "memory": "memory",
}
"""Kind of record to the group that its numbers are shown in."""
NO_CURVES = {"step", "attempt", "time", "tokens", "position"}
"""Numbers that say where a record is, not how the run does."""


class EventFile:
    """Appends events to a new file in `folder`. Scalars are float32, as TensorBoard keeps them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"{FILE_PREFIX}.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._handle = open(self.path, "wb")  # noqa: SIM115  open as long as this object
        self._write(_bytes_field(3, VERSION), step=0, at=now)

    def scalars(self, values: Mapping[str, float], *, step: int, at: float) -> None:
        """Add one point to each curve; `at` is Unix seconds."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in values.items()
        )
        self._write(_bytes_field(5, summary), step=step, at=at)

    def restart(self, *, step: int, at: float) -> None:
        """Void every point at `step` and later."""
        self._write(_bytes_field(7, b"\x08" + _varint(SESSION_START)), step=step, at=at)

    def flush(self) -> None:
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, content: bytes, *, step: int, at: float) -> None:
        event = b"\x09" + struct.pack("<d", at) + b"\x10" + _varint(step) + content
        length = struct.pack("<Q", len(event))
        self._handle.write(length + _checksum(length) + event + _checksum(event))


class TensorBoardSink:
    """Turns records into events, in the order of metrics.jsonl."""

    def __init__(self, events: EventFile) -> None:
        self._events = events
        self._attempt: int | None = None

    def take(self, records: Iterable[Record]) -> None:
        """Write them, and make what was written visible to readers."""
        for record in records:
            at = as_number(record.get("time")) or 0.0
            if self._attempt is not None and record["attempt"] != self._attempt:
                undone_from = record["step"] + (record["kind"] != "step")
                self._events.restart(step=undone_from, at=at)
            self._attempt = record["attempt"]
            values = scalars_of(record)
            if values:
                self._events.scalars(values, step=record["step"], at=at)
        self._events.flush()


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's finite numbers, named `group/field`; events have none: what they say is in the report."""
    group = GROUPS.get(record["kind"])
    if group is None:
        return {}
    return {
        f"{group}/{name.removeprefix(f'{group}_')}": number
        for name, value in record.items()
        if name not in NO_CURVES and (number := as_number(value)) is not None
    }


def clear(folder: Path) -> None:
    """Remove the event files of an earlier call: what is written next begins at the run's first step."""
    for path in folder.glob(f"{FILE_PREFIX}.*"):
        path.unlink(missing_ok=True)


def _bytes_field(number: int, content: bytes) -> bytes:
    """A length-delimited field of Protocol Buffers."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _checksum(content: bytes) -> bytes:
    """CRC-32C of `content`, rotated and shifted as the format wants it."""
    table = _crc_table()
    crc = 0xFFFFFFFF
    for (pair,) in struct.iter_unpack("<H", content[: len(content) & ~1]):
        crc = crc >> 16 ^ table[(crc ^ pair) & 0xFFFF]
    if len(content) & 1:
        crc = crc >> 8 ^ table[(crc ^ content[-1]) << 8 & 0xFFFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + CRC_MASK) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> list[int]:
    """What two bytes do to the checksum: half as many turns of the loop as with one."""
    single = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (CRC_POLYNOMIAL if value & 1 else 0)
        single.append(value)
    firsts = (single[pair & 0xFF] ^ pair >> 8 for pair in range(1 << 16))
    return [single[first & 0xFF] ^ first >> 8 for first in firsts]
