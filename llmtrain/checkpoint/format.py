"""What a checkpoint is on the disk, without reading or writing one. docs/checkpoints.md has the bytes.

A checkpoint is a set of logical tensors, each named by (kind, canonical parameter name). A rank hands over
the pieces it owns, as ranges of the flattened logical tensor; nothing on disk knows of dp, tp, pp or ZeRO.

    checkpoints/step-00000120/
        rank-00000.safetensors ...  a rank's pieces
        manifest.json               state, shapes, dtypes; file, offset and xxh3_128 of every piece
        COMMITTED                   name and sha256 of the manifest: the checkpoint is there
        UNFINISHED                  while it is being saved or deleted

Contents are hashed by xxh3_128, and sha256 guards only the manifest, which holds those hashes: sha256 runs at
1.2 GB/s a core where xxh3_128 runs at 14 (measured on a Xeon with SHA extensions), slower than one NVMe disk
writes. Both find damage; neither is meant against an attacker, who could rewrite the marker too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmtrain.errors import CheckpointError

FORMAT = "llmtrain checkpoint"
FORMAT_VERSION = 4
MARKER_FILE = "COMMITTED"
UNFINISHED_FILE = "UNFINISHED"
STEP_NAME = re.compile(r"step-(\d{8,})")
NUMBERED = re.compile(r"\.(\d+)\.(?:safetensors|json)$")
MARKER = re.compile(rb"([0-9a-f]{64})  (manifest[.0-9]*\.json)\n")

SAFETENSORS_DTYPES = {
    "|b1": "BOOL",
    "|i1": "I8",
    "|u1": "U8",
    "<i2": "I16",
    "<u2": "U16",
    "<i4": "I32",
    "<u4": "U32",
    "<i8": "I64",
    "<u8": "U64",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
}
"""numpy's type string -> the name in a header."""
HEADER_ALIGNMENT = 64
"""Bytes that the data begins at a multiple of: any element type and cache line."""
MAX_LISTED = 4
"""Ranks or tensors that a message names before it only counts the rest."""


class Elsewhere(Protocol):
    """Numbers that do not lie in host memory yet, 1-D. numpy takes them for an array, by copying them."""

    ndim: int
    size: int
    dtype: np.dtype[Any]
    itemsize: int
    nbytes: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]: ...

    def __getitem__(self, part: slice) -> Elsewhere: ...

    def copy_into(self, into: np.ndarray[Any, Any]) -> None: ...


@dataclass(frozen=True)
class Piece:
    """A range of one logical tensor, owned by one rank."""

    kind: str
    """What it is to the run: weight, exp_avg, exp_avg_sq."""
    name: str
    """Canonical parameter name, equal in every layout."""
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    start: int
    """Where `values` begins in the flattened (row-major) logical tensor."""
    values: np.ndarray[Any, Any] | Elsewhere
    """1-D. May be empty: that says only that the tensor exists."""


FlatSource = Callable[[str, str, int, np.ndarray[Any, Any]], None]
"""(kind, parameter name, start, into): fill the 1-D `into` with the flattened logical tensor's elements from
`start` on."""


@dataclass(frozen=True)
class Row:
    """A piece as it lies in its rank's file: `length` elements from `start` of its tensor, at byte
    `offset`."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    """numpy's type string, little-endian."""
    start: int
    length: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_bytes(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.kind} {self.name}[{self.start}:{self.end}]"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def file_name(rank: int, number: int = 0) -> str:
    return f"rank-{rank:05d}{_numbered(number)}.safetensors"


def manifest_name(number: int = 0) -> str:
    return f"manifest{_numbered(number)}.json"


def _numbered(number: int) -> str:
    return f".{number}" if number else ""


def free_number(taken: Iterable[str]) -> int:
    """Of a save in a folder that holds the files `taken`, of older saves of the same step."""
    numbers = [int(found[1]) if (found := NUMBERED.search(name)) else 0 for name in taken]
    return max(numbers, default=-1) + 1


# -- a rank's file


def lay_out(pieces: Sequence[Piece]) -> tuple[bytes, list[Row]]:
    """The header of the file that holds `pieces`, and where each lies in it.

    Raises:
        CheckpointError: a piece that is no range of its tensor, or no numbers.
    """
    placed: list[tuple[Piece, str, int]] = []
    end = 0
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "format_version": str(FORMAT_VERSION)}}
    for piece in pieces:
        dtype = _checked_dtype(piece)
        begin, end = end, end + piece.values.nbytes
        key = f"{piece.kind}/{piece.name}"
        placed.append((piece, dtype, begin))
        length = piece.values.size
        is_whole = length == math.prod(piece.shape)
        if not (length or is_whole):
            continue
        if not is_whole:
            key += f"[{piece.start}:{piece.start + length}]"
        if key in entries:
            raise CheckpointError(f"this rank brings {key} twice")
        entries[key] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(piece.shape) if is_whole else [length],
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % HEADER_ALIGNMENT)
    start = 8 + len(header)
    rows = [
        Row(p.kind, p.name, tuple(p.shape), dtype, p.start, p.values.size, start + begin)
        for p, dtype, begin in placed
    ]
    return len(header).to_bytes(8, "little") + header, rows


def _checked_dtype(piece: Piece) -> str:
    """numpy's type string of the piece as it is stored."""
    what, values = f"{piece.kind} {piece.name}", piece.values
    dtype: str = values.dtype.newbyteorder("<").str
    if values.ndim != 1 or dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"a piece of {what} is a {values.ndim}-D array of {values.dtype}; need 1-D numbers"
        )
    num_elements = math.prod(piece.shape)
    if not 0 <= piece.start <= piece.start + values.size <= num_elements:
        raise CheckpointError(
            f"a piece of {what} is elements {piece.start} to {piece.start + values.size}, "
            f"outside its shape {list(piece.shape)} of {num_elements} elements"
        )
    return dtype


# -- the manifest


def manifest(
    *, step: int, state: dict[str, Any], files: list[dict[str, Any]], tables: Sequence[Sequence[Any]]
) -> bytes:
    """manifest.json.

    Args:
        files: path and num_bytes of each rank's.
        tables: of each rank, its rows as dicts with their `xxh3_128`.

    Raises:
        CheckpointError: pieces that do not cover their tensors exactly once.
    """
    return to_json(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "state": state,
            "files": files,
            "tensors": tile(tables),
        }
    )


def marker(content: bytes, name: str) -> bytes:
    """Of the manifest `name`, in the form that `sha256sum --check COMMITTED` reads."""
    return f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()


def to_json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of the run cannot be written as JSON: {error}") from error


def tile(tables: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """kind -> name -> {shape, dtype, pieces by start}, checked: each tensor is covered exactly once."""
    tensors: dict[str, dict[str, Any]] = {}
    shapes: dict[str, list[int]] = {}
    for file, rows in enumerate(tables):
        for row in rows:
            what, shape = f"{row['kind']} {row['name']}", list(row["shape"])
            if shapes.setdefault(row["name"], shape) != shape:
                raise CheckpointError(
                    f"{what} has shape {shape} and {shapes[row['name']]} in different pieces"
                )
            fresh = {"shape": shape, "dtype": row["dtype"], "pieces": []}
            tensor = tensors.setdefault(row["kind"], {}).setdefault(row["name"], fresh)
            if tensor["dtype"] != row["dtype"]:
                raise CheckpointError(
                    f"{what} has dtype {row['dtype']} and {tensor['dtype']} in different pieces"
                )
            if row["length"]:
                stored = {key: row[key] for key in ("offset", "start", "length", "xxh3_128")}
                tensor["pieces"].append({"file": file, **stored})
    for kind, by_name in tensors.items():
        for name, tensor in by_name.items():
            tensor["pieces"].sort(key=lambda piece: piece["start"])
            _check_cover(f"{kind} {name}", tensor["pieces"], math.prod(tensor["shape"]))
    return tensors


def _check_cover(what: str, pieces: list[dict[str, Any]], num_elements: int) -> None:
    end = 0
    for piece in [*pieces, {"start": num_elements, "length": 0, "file": None}]:
        if piece["start"] > end:
            raise CheckpointError(f"no rank holds elements {end} to {piece['start']} of {what}")
        if piece["start"] < end:
            raise CheckpointError(
                f"more than one piece holds element {piece['start']} of {what}; "
                f"the second is of rank {piece['file']}"
            )
        end = piece["start"] + piece["length"]


def some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    listed = list(items)
    more = f"; and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
    return "; ".join(listed[:MAX_LISTED]) + more
