"""What a run keeps of the documents that stayed, so that a later run needs none of their text.

Of each: its id, the hash of its text, its rank, and its signature. A later run reads them as units of
documents with `is_previous`, which stay whatever comes, and against which its own are compared. Where two
signatures agree about as often as the threshold, the text would decide, but is not there: the signatures do
(counted as `num_without_text`).

Documents that an earlier run removed are not kept. So a new document that is like a removed one, but not like
the one that stayed for it, stays too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.minhash import VERSION
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, RowWriter, Table, signature_table
from llmtrain.data.engines.engine import Engine
from llmtrain.data.folder import read_done, write_done
from llmtrain.errors import DataError
from llmtrain.files import hash_file, hash_json, read_json, write_json

INDEX_NAME = "index.json"
FILE_DOCUMENTS = 1 << 18
"""Documents of one pair of files, before those that did not stay are left out."""


@dataclass(frozen=True)
class IndexTask:
    """Some units, and for each an .npy of booleans: which documents stayed."""

    units: tuple[DedupUnit, ...]
    kept: tuple[Path, ...]
    num_permutations: int | None
    """None: without signatures."""
    documents: Path
    signatures: Path
    done: Path
    key: str


def write_part(task: IndexTask) -> dict[str, Any]:
    """Write the tables of the documents that stayed."""
    with RowWriter(task.documents, DOCUMENT) as documents:
        for unit, kept_path in zip(task.units, task.kept, strict=True):
            kept = Table.open(kept_path, unit.num_documents)
            for at, block in Table.open(unit.documents, unit.num_documents).stretches(0, unit.num_documents):
                stays = kept.read(at, at + len(block)) & ~block["is_previous"]
                rows = block[stays]
                rows["alive"], rows["is_previous"], rows["source"] = True, True, -1
                documents.append(rows)
    files = [task.documents]
    if task.num_permutations is not None:
        files.append(task.signatures)
        with RowWriter(task.signatures, np.dtype("<u4"), (task.num_permutations,)) as signatures:
            for unit, kept_path in zip(task.units, task.kept, strict=True):
                kept = Table.open(kept_path, unit.num_documents)
                rows_table = Table.open(unit.documents, unit.num_documents)
                table = signature_table(unit, task.num_permutations)
                for at, block in table.stretches(0, unit.num_documents):
                    end = at + len(block)
                    stays = kept.read(at, end) & ~rows_table.read(at, end)["is_previous"]
                    signatures.append(block[stays])
    summary = {"key": task.key, "num_documents": documents.num_rows}
    write_done(task.done, summary, files)
    return summary


def write_index(
    units: Sequence[DedupUnit], kept: Sequence[Path], cfg: DedupConfig, engine: Engine, folder: Path
) -> int:
    """Write what a later run needs; return the number of documents in it.

    Args:
        units: of this run; documents of earlier runs among them are left out, their own index has them.
        kept: for each unit an .npy of booleans: which documents stayed after everything.
        folder: for this index alone; the one that `dedup.previous` of a later run names.
    """
    num_permutations = cfg.near.num_permutations if cfg.near.enabled else None
    settings = {
        "minhash_version": VERSION,
        "num_permutations": num_permutations,
        "shingle_words": cfg.near.shingle_words if cfg.near.enabled else None,
    }
    key = hash_json(
        [settings, [(unit.first, hash_file(path)) for unit, path in zip(units, kept, strict=True)]]
    )
    tasks: list[IndexTask] = []
    group: list[int] = []
    for at, unit in enumerate(units):
        group.append(at)
        is_last = at == len(units) - 1
        if (
            is_last
            or sum(units[number].num_documents for number in group) + unit.num_documents > FILE_DOCUMENTS
        ):
            name = f"{len(tasks):06d}"
            tasks.append(
                IndexTask(
                    units=tuple(units[number] for number in group),
                    kept=tuple(kept[number] for number in group),
                    num_permutations=num_permutations,
                    documents=folder / f"documents-{name}.npy",
                    signatures=folder / f"signatures-{name}.npy",
                    done=folder / f"done-{name}.json",
                    key=key,
                )
            )
            group = []
    missing = [task for task in tasks if (read_done(task.done) or {}).get("key") != key]
    for _ in engine.map(write_part, missing):
        pass
    counts = [(read_done(task.done) or {})["num_documents"] for task in tasks]
    write_json(folder / INDEX_NAME, {**settings, "num_documents": counts})
    return sum(counts)


def read_index(folder: Path, cfg: DedupConfig, *, first: int, number: int) -> list[DedupUnit]:
    """The units of an earlier run's index: documents numbered from `first` on, units from `number`.

    Raises:
        DataError: there is no index, or its signatures do not compare with those of `cfg`.
    """
    path = folder / INDEX_NAME
    try:
        index = read_json(path)
        version, num_permutations = index["minhash_version"], index["num_permutations"]
        shingle_words, counts = index["shingle_words"], index["num_documents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"dedup.previous names {folder}, but {path} is no index of an earlier run ({error!r}); name the "
            "folder of an index, or run the earlier one again"
        ) from error
    wanted = (VERSION, cfg.near.num_permutations, cfg.near.shingle_words)
    if cfg.near.enabled and (version, num_permutations, shingle_words) != wanted:
        raise DataError(
            f"the index {folder} of dedup.previous has signatures of version {version} with "
            f"num_permutations={num_permutations} and shingle_words={shingle_words}, which do not compare "
            f"with version {VERSION}, dedup.near.num_permutations={wanted[1]} and "
            f"dedup.near.shingle_words={wanted[2]}; take its settings, leave it out of dedup.previous, or "
            "run the earlier one again"
        )
    units = []
    for at, num_documents in enumerate(counts):
        documents, signatures = folder / f"documents-{at:06d}.npy", folder / f"signatures-{at:06d}.npy"
        unit = DedupUnit(
            number=number + at,
            first=first,
            num_documents=num_documents,
            documents=documents,
            signatures=signatures if num_permutations is not None else None,
        )
        Table.open(documents, num_documents)
        if unit.signatures is not None:
            signature_table(unit, num_permutations)
        units.append(unit)
        first += num_documents
    return units


def previous_units(cfg: DedupConfig, units: Sequence[DedupUnit]) -> list[DedupUnit]:
    """The units of all indexes that `dedup.previous` names, to be appended to those of this run."""
    first, number = (units[-1].end, units[-1].number + 1) if units else (0, 0)
    found: list[DedupUnit] = []
    for folder in cfg.previous:
        found += read_index(Path(folder), cfg, first=first, number=number)
        if found:
            first, number = found[-1].end, found[-1].number + 1
    return found
