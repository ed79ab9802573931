"""Documents of made-up words for the tests of near-duplicates, and the tables that a scan writes of them.

A word is a number, and eight hexadecimal digits of text, so splitting is a view of the bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.data.dedup.config import DedupConfig, NearConfig
from llmtrain.data.dedup.minhash import signatures
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit
from llmtrain.errors import DataError


class FixedWords(NamedTuple):
    kind: npt.NDArray[np.uint8]
    folded: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.int64]


def split_fixed(text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> FixedWords:
    folded = np.ascontiguousarray(text).view("<u8") * np.uint64(0x9E3779B97F4A7C15)
    return FixedWords(np.ones(len(folded), dtype=np.uint8), folded ^ (folded >> np.uint64(31)), offsets // 8)


def text_of(words: Sequence[int]) -> bytes:
    return b"".join(b"%08x" % word for word in words)


@dataclass
class StoredTexts:
    """`None` stands for a document whose text is gone."""

    stored: list[bytes | None]
    num_read: list[int] = field(default_factory=list)

    def texts(self, documents: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        assert (np.diff(documents) > 0).all()
        self.num_read.append(len(documents))
        found = []
        for document in documents.tolist():
            text = self.stored[document]
            if text is None:
                raise DataError(f"the text of document {document} is gone")
            found.append(text)
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in found])]).astype(np.int64)
        return np.frombuffer(b"".join(found), dtype=np.uint8), offsets


def signatures_of(documents: Sequence[bytes], cfg: NearConfig) -> npt.NDArray[np.uint32]:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in documents])]).astype(np.int64)
    words = split_fixed(np.frombuffer(b"".join(documents), dtype=np.uint8), offsets)
    return signatures(words, cfg.num_permutations, cfg.shingle_words)


def rows_of(num: int, **columns: Any) -> npt.NDArray[np.void]:
    """DOCUMENT rows; ids grow with the document unless given."""
    rows = np.zeros(num, dtype=DOCUMENT)
    rows["alive"] = True
    rows["id_low"] = np.arange(num)
    for name, values in columns.items():
        rows[name] = values
    return rows


def write_tables(
    folder: Path, rows: npt.NDArray[np.void], signed: npt.NDArray[np.uint32], cuts: Sequence[int] = ()
) -> list[DedupUnit]:
    """Units that end at `cuts` and at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [0, *cuts, len(rows)]
    units = []
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        documents, path = folder / f"documents-{number}.npy", folder / f"signatures-{number}.npy"
        np.save(documents, rows[first:end])
        np.save(path, signed[first:end])
        units.append(DedupUnit(number, first, end - first, documents, path))
    return units


def small_config(**changes: Any) -> DedupConfig:
    """Few permutations, so small corpora meet everything: chance candidates, margins, long runs."""
    near = {
        "enabled": True,
        "num_permutations": 32,
        "bands": 8,
        "rows": 4,
        "shingle_words": 3,
        "max_key_documents": 12,
    }
    near |= changes.pop("near", {})
    return DedupConfig(near=NearConfig(**near), **changes)


def edited(words: npt.NDArray[np.int64], num_edits: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """A copy with some words replaced by new ones."""
    copy = words.copy()
    copy[draw.choice(len(words), num_edits, replace=False)] = draw.integers(2**30, 2**31, num_edits)
    return copy


def families(num_families: int, draw: np.random.Generator, num_words: int = 60) -> list[bytes]:
    """Originals, each with up to nine copies of copies, edited a little or much: chains and stars."""
    documents = []
    for _ in range(num_families):
        family = [draw.integers(0, 2**30, num_words)]
        for _ in range(int(draw.integers(0, 10))):
            family.append(edited(family[int(draw.integers(len(family)))], int(draw.integers(0, 9)), draw))
        documents += [text_of(words.tolist()) for words in family]
    return documents
