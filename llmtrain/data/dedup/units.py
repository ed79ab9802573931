"""What the stages of deduplication know of documents: tables in files, addressed by dense numbers.

A unit is a run of documents first..first + num_documents - 1. Its tables are .npy files, read in short
stretches and never mapped whole, so the memory of a task does not grow with the corpus.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError
from llmtrain.files import atomic_write, read_json, write_json

Records = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]

DOCUMENT = np.dtype(
    [
        ("alive", "?"),
        ("is_previous", "?"),
        ("rank", "<f8"),
        ("id_high", "<u8"),
        ("id_low", "<u8"),
        ("content_high", "<u8"),
        ("content_low", "<u8"),
        ("source", "<i4"),
    ]
)
"""A row of a unit's `documents`. `alive`: not dropped yet. `is_previous`: kept by an earlier run. `rank`: of
several copies the one with the highest stays. The id and the hash of the text are 128 bits each."""

DUPLICATE = np.dtype([("document", "<i8"), ("survivor", "<i8"), ("cluster_size", "<i4")])
"""A row of a list of documents to remove, sorted by document. `cluster_size` counts the survivor too."""

STRETCH_BYTES = 1 << 20
"""Most that is read at once of a table."""
GAP_BYTES = 1 << 14
"""Rows nearer to each other than this are read in one go."""


@dataclass(frozen=True)
class DedupUnit:
    number: int
    first: int
    num_documents: int
    documents: Path
    """.npy [num_documents] of DOCUMENT."""
    signatures: Path | None = None
    """.npy uint32 [num_documents, num_permutations]."""
    lines: Path | None = None
    ngrams: Path | None = None

    @property
    def end(self) -> int:
        return self.first + self.num_documents


class DocumentTexts(Protocol):
    """Reads texts back. Picklable: tasks carry it."""

    def texts(self, documents: Ints) -> tuple[npt.NDArray[np.uint8], Ints]:
        """The texts of these documents (dense numbers, ascending), back to back, and where each starts."""
        ...


def check_units(units: Sequence[DedupUnit]) -> None:
    """Raise unless the units follow each other without gaps, from document 0 on."""
    first = 0
    for unit in units:
        if unit.first != first:
            raise DataError(
                f"unit {unit.number} of deduplication starts at document {unit.first}, but the units before "
                f"it end at {first}; give the units in order and without gaps"
            )
        first = unit.end


def write_units(path: Path, units: Sequence[DedupUnit]) -> None:
    """Write the list once, so that tasks carry its path only."""
    rows = [
        [
            unit.number,
            unit.first,
            unit.num_documents,
            *(
                None if table is None else str(table)
                for table in (unit.documents, unit.signatures, unit.lines, unit.ngrams)
            ),
        ]
        for unit in units
    ]
    write_json(path, rows)


def read_units(path: Path) -> list[DedupUnit]:
    return [
        DedupUnit(number, first, num, *(None if table is None else Path(table) for table in tables))  # type: ignore[arg-type]
        for number, first, num, *tables in read_json(path)
    ]


@dataclass(frozen=True)
class Table:
    """An .npy file of rows, read in parts."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data_start: int

    @staticmethod
    def open(path: Path, num_rows: int | None) -> Table:
        """Raises DataError when the file is no .npy, was cut, or has not `num_rows` rows (None: any)."""
        try:
            with open(path, "rb") as handle:
                version = np.lib.format.read_magic(handle)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, is_fortran, dtype = read(handle)
                data_start = handle.tell()
                num_bytes = handle.seek(0, 2) - data_start
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a table ({error}); delete it and run again") from error
        wanted = dtype.itemsize * int(np.prod(shape))
        if is_fortran or num_rows not in (None, shape[0]) or num_bytes != wanted:
            raise DataError(
                f"{path} holds {num_bytes} bytes of rows and says shape {shape}, which is {wanted} bytes; "
                f"expected {num_rows or 'any'} rows; delete it and run again"
            )
        return Table(path, dtype, shape, data_start)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:]))

    def read(self, start: int, end: int) -> npt.NDArray[Any]:
        """Rows start..end - 1."""
        width = int(np.prod(self.shape[1:]))
        flat = np.fromfile(
            self.path,
            dtype=self.dtype,
            count=(end - start) * width,
            offset=self.data_start + start * self.row_bytes,
        )
        return flat.reshape(end - start, *self.shape[1:])

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Rows start..end - 1 in blocks of at most STRETCH_BYTES, each with the row it starts at."""
        step = max(1, STRETCH_BYTES // self.row_bytes)
        for at in range(start, end, step):
            yield at, self.read(at, min(end, at + step))

    def take(self, rows: Ints, out: npt.NDArray[Any]) -> None:
        """Copy these rows (ascending) into `out`. What lies between them is skipped when it is long."""
        if len(rows) == 0:
            return
        step = max(1, STRETCH_BYTES // self.row_bytes)
        gap = max(1, GAP_BYTES // self.row_bytes)
        is_cut = (np.diff(rows) > gap) | (np.diff(rows // step) > 0)
        cuts = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(rows)]
        with open(self.path, "rb", buffering=0) as handle:
            for at, to in itertools.pairwise(cuts):
                first = int(rows[at])
                handle.seek(self.data_start + first * self.row_bytes)
                read = handle.read((int(rows[to - 1]) + 1 - first) * self.row_bytes)
                block = np.frombuffer(read, dtype=self.dtype).reshape(-1, *self.shape[1:])
                out[at:to] = block[rows[at:to] - first]


class RowWriter:
    """Writes an .npy file of rows block by block. It appears when the `with` block ends without an error.

    `shape` is that of a row.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...] = ()) -> None:
        self.path = path
        self.dtype = dtype
        self.shape = shape
        self.num_rows = 0
        self._context = atomic_write(path)

    def _header(self) -> bytes:
        header = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self.shape),
        }
        np.lib.format.write_array_header_1_0(header, described)  # leaves room for a count of 20 digits
        return header.getvalue()

    def __enter__(self) -> RowWriter:
        self._handle: IO[Any] = self._context.__enter__()
        self._num_header = self._handle.write(self._header())
        return self

    def append(self, rows: npt.NDArray[Any]) -> None:
        assert (rows.dtype, rows.shape[1:]) == (self.dtype, self.shape), f"{rows.dtype} {rows.shape}"
        self.num_rows += len(rows)
        self._handle.write(np.ascontiguousarray(rows).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # the file goes, too, when these last bytes find no room
            stack.push(self._context)
            if error is not None:
                raise error
            header = self._header()
            assert len(header) == self._num_header, "the header has room for the count"
            self._handle.seek(0)
            self._handle.write(header)


def _by_unit(units: Sequence[DedupUnit], documents: Ints) -> Iterator[tuple[DedupUnit, slice]]:
    """The units that hold these documents (ascending), each with its slice of them."""
    ends = np.searchsorted(documents, [unit.end for unit in units])
    start = 0
    for unit, end in zip(units, ends.tolist(), strict=True):
        if end > start:
            yield unit, slice(start, end)
        start = end


def gather_documents(units: Sequence[DedupUnit], documents: Ints) -> Records:
    """The DOCUMENT rows of these documents, ascending."""
    out: Records = np.empty(len(documents), dtype=DOCUMENT)
    for unit, part in _by_unit(units, documents):
        Table.open(unit.documents, unit.num_documents).take(documents[part] - unit.first, out[part])
    return out


def gather_signatures(
    units: Sequence[DedupUnit], documents: Ints, num_permutations: int
) -> npt.NDArray[np.uint32]:
    """The signatures of these documents, ascending: uint32 [len(documents), num_permutations]."""
    out = np.empty((len(documents), num_permutations), dtype=np.uint32)
    for unit, part in _by_unit(units, documents):
        signature_table(unit, num_permutations).take(documents[part] - unit.first, out[part])
    return out


def signature_table(unit: DedupUnit, num_permutations: int) -> Table:
    if unit.signatures is None:
        raise DataError(
            f"unit {unit.number} has no signatures; scan again with dedup.near.enabled=true, "
            "or set it to false"
        )
    table = Table.open(unit.signatures, unit.num_documents)
    if table.dtype != np.uint32 or table.shape[1:] != (num_permutations,):
        raise DataError(
            f"{unit.signatures} holds {table.dtype} of shape {table.shape}, not uint32 signatures of "
            f"dedup.near.num_permutations={num_permutations}; scan again"
        )
    return table


def best_first(rows: Records) -> Ints:
    """Order in which documents are kept: earlier runs' first, then the highest rank, then the smallest id."""
    return np.lexsort((rows["id_low"], rows["id_high"], -rows["rank"], ~rows["is_previous"]))
