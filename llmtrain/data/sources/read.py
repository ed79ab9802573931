"""From a corpus's settings to work units, and from a unit to documents and bad records.

A unit is a list of slices of files. Cutting elsewhere gives the same records in the same order: a line
belongs to the slice in which it begins, and compressed files, archives and row groups are never cut.

A file must stay as it was listed until it is read: it is looked at before and after, and a file that changed
in between stops the run. Damage that was there from the start does not: it becomes bad records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from llmtrain.data.document import BadRecord, Document, Record
from llmtrain.data.sources import library, lines, python_docs, rows, web
from llmtrain.data.sources.config import CorpusConfig, Format, TextUnit
from llmtrain.data.sources.files import check_unchanged, list_files
from llmtrain.data.sources.slices import Digest, Plan, Records, Slice, Unit, hash_bytes

READERS: dict[Format, Callable[[Slice, Digest, CorpusConfig], Iterator[Record]]] = {
    Format.jsonl: lines.read_jsonl,
    Format.parquet: rows.read_parquet,
    Format.text: lines.read_text,
    Format.warc: web.read_warc,
    Format.datasets: library.read_dataset,
}


def plan_units(cfg: CorpusConfig, unit_bytes: int, *, out: Path | None = None) -> Plan:
    """List the input, cut it and group the pieces into units of about `unit_bytes`.

    Args:
        out: data folder whose own files are no input, should they lie inside corpus.paths.

    Raises:
        DataError: a path that matches nothing, a file system that cannot be reached, a table without the
        columns that are asked for.
    """
    if cfg.format is Format.python_docs:
        slices, fingerprint = _python_docs_slices(cfg)
    elif cfg.format is Format.datasets:
        slices, fingerprint = library.dataset_slices(cfg, unit_bytes)
    else:
        files = list_files(cfg.paths, out=out)
        fingerprint = [[file.name, file.num_bytes, file.version] for file in files]
        is_cut_anywhere = cfg.format is Format.jsonl or (
            cfg.format is Format.text and cfg.text_unit is TextUnit.line
        )
        slices = [
            piece
            for file in files
            for piece in (
                rows.row_group_slices(file, cfg)
                if cfg.format is Format.parquet
                else lines.cut_file(file, unit_bytes=unit_bytes, is_cut_anywhere=is_cut_anywhere)
            )
        ]
    return Plan(units=_group(slices, unit_bytes), fingerprint=fingerprint)


def _group(slices: list[Slice], unit_bytes: int) -> list[Unit]:
    """Put neighbours together until a unit has `unit_bytes`."""
    ends, filled = [], 0
    for piece in slices:
        ends.append(filled // unit_bytes)
        filled += piece.num_bytes
    parts = groupby(zip(ends, slices, strict=True), key=lambda item: item[0])
    return [
        Unit(number=number, slices=tuple(piece for _, piece in part))
        for number, (_, part) in enumerate(parts)
    ]


def read_unit(unit: Unit, cfg: CorpusConfig) -> Iterator[tuple[Slice, Records]]:
    """Yield each slice with its records. A slice's records must be used up before the next is asked for.

    Raises:
        DataError: a file that changed since it was listed, when its first or after its last slice of the unit
        is read; a remote file that cannot be read.
    """
    if cfg.format is Format.python_docs:
        yield from _read_python_docs(unit)
        return
    for _, pieces in groupby(unit.slices, key=lambda piece: piece.path):
        for number, piece in enumerate(pieces):
            if number == 0:
                check_unchanged(piece.path, piece.version)
            digest = Digest()
            has_digest = cfg.format is not Format.datasets or cfg.streaming
            yield piece, Records(_guarded(piece, digest, cfg), digest if has_digest else None)
        check_unchanged(piece.path, piece.version)


def _guarded(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    """Turn an error of the disk into a bad record."""
    try:
        yield from READERS[cfg.format](piece, digest, cfg)
    except OSError as error:
        yield BadRecord("unreadable_file", 0, str(error))


# This Python installation.


def _python_docs_slices(cfg: CorpusConfig) -> tuple[list[Slice], list[Any]]:
    files = python_docs.draw_order(python_docs.installed_files(), cfg.draw_seed)
    slices = [
        Slice(
            path=file.path,
            name=file.name,
            source=file.source,
            start=0,
            end=file.num_bytes,
            num_bytes=file.num_bytes,
            version=file.version,
        )
        for file in files
    ]
    return slices, [[file.name, file.num_bytes, file.version] for file in files]


def _read_python_docs(unit: Unit) -> Iterator[tuple[Slice, Records]]:
    contents: list[bytes | BadRecord] = []
    for piece in unit.slices:
        check_unchanged(piece.path, piece.version)
        try:
            contents.append(Path(piece.path).read_bytes())
        except OSError as error:
            contents.append(BadRecord("unreadable_file", 0, str(error)))
        check_unchanged(piece.path, piece.version)
    is_code = [piece.path.endswith(".py") for piece in unit.slices]
    code = [text for text, flag in zip(contents, is_code, strict=True) if flag and isinstance(text, bytes)]
    extracted = iter(python_docs.extract(code))
    for piece, content, flag in zip(unit.slices, contents, is_code, strict=True):
        if isinstance(content, BadRecord):
            yield piece, Records(iter([content]), Digest())
        else:
            document = Document(next(extracted) if flag else content, 0, None)
            yield piece, Records(iter([document]), hash_bytes(content))
