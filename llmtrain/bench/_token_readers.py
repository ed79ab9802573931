"""Rivals that read rows of tokens at random: Megatron-LM's, MosaicML's and Lightning's readers.

Each is given the tokens of our shards in its own format, and handed over as a function from row numbers to
an int64 batch. They want other versions of what we pin, so they are installed without what they ask for;
docs/dependencies.md has the command.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
ReadRows = Callable[[Int64], Int64]
"""Row numbers [N] to tokens [N, row_tokens]."""

CHUNK_ROWS = 4096
"""Rows a file of the rivals' formats."""


def megatron(shards: list[tuple[Path, Int64]], row_tokens: int) -> ReadRows:
    """megatron-core's IndexedDataset over our own files; rows are put together from documents as its
    GPTDataset does it, from an index made beforehand.

    Args:
        shards: prefix of each shard, and the tokens of each of its documents.
    """
    reader = importlib.import_module("megatron.core.datasets.indexed_dataset")
    opened = [reader.IndexedDataset(str(prefix)) for prefix, _ in shards]
    pieces: list[tuple[Any, list[tuple[int, int, int]]]] = []
    for dataset, (_, doc_lengths) in zip(opened, shards, strict=True):
        starts = np.concatenate([[0], np.cumsum(doc_lengths)])
        for begin in range(0, int(starts[-1]) - row_tokens + 1, row_tokens):
            pieces.append((dataset, list(_documents(starts, begin, begin + row_tokens))))

    def read(rows: Int64) -> Int64:
        return np.stack(
            [
                np.concatenate([dataset.get(*piece) for piece in parts])
                for dataset, parts in (pieces[row] for row in rows.tolist())
            ]
        ).astype(np.int64)

    return read


def _documents(starts: Int64, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(document, offset in it, tokens) of each part of the tokens begin..end."""
    document = int(np.searchsorted(starts, begin, side="right")) - 1
    while begin < end:
        last = min(end, int(starts[document + 1]))
        if last > begin:
            yield document, begin - int(starts[document]), last - begin
        begin, document = last, document + 1


def mds(folder: Path, rows: Tokens) -> ReadRows:
    """mosaicml-streaming's MDS shards, a column of one row of tokens, read from the local disk."""
    # Its image data sets, which `import streaming` brings along, ask for torchvision; nothing here does.
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    streaming = importlib.import_module("streaming")
    kind = f"ndarray:{rows.dtype.name}:{rows.shape[1]}"
    with streaming.MDSWriter(out=str(folder), columns={"tokens": kind}, size_limit=1 << 26) as writer:
        for row in rows:
            writer.write({"tokens": row})
    dataset = streaming.LocalDataset(str(folder))

    def read(chosen: Int64) -> Int64:
        return np.stack([dataset[row]["tokens"] for row in chosen.tolist()]).astype(np.int64)

    return read


def litdata(folder: Path, rows: Tokens) -> ReadRows:
    """litdata's TokensLoader over chunks that its own writer wrote."""
    lit = importlib.import_module("litdata")
    cache = importlib.import_module("litdata.streaming.cache")
    torch = importlib.import_module("torch")
    row_tokens = rows.shape[1]
    folder.mkdir(parents=True)
    writer = cache.Cache(
        str(folder), chunk_size=CHUNK_ROWS * row_tokens, item_loader=lit.TokensLoader(block_size=row_tokens)
    )
    for number, row in enumerate(rows):
        writer[number] = torch.from_numpy(row.astype(np.int32))  # torch has few functions for uint16
    writer.done()
    writer.merge()
    dataset = lit.StreamingDataset(
        str(folder), item_loader=lit.TokensLoader(block_size=row_tokens), shuffle=False
    )

    def read(chosen: Int64) -> Int64:
        read_rows: Int64 = torch.stack([dataset[row] for row in chosen.tolist()]).long().numpy()
        return read_rows

    return read
