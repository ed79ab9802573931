"""Data sets of the `datasets` library: by rows, or streamed shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from llmtrain.data.document import BadRecord, Document, Record
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.data.sources.rows import MAX_ROWS_A_BATCH, check_columns, rows
from llmtrain.data.sources.slices import Digest, Slice
from llmtrain.errors import DataError

_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
"""What its builders raise of a damaged file: OSError, JSON's and Arrow's own, missing columns."""


def dataset_slices(cfg: CorpusConfig, unit_bytes: int) -> tuple[list[Slice], list[Any]]:
    """Slices of a data set, and what identifies it."""
    return _shard_slices(cfg, unit_bytes) if cfg.streaming else _row_slices(cfg, unit_bytes)


def _name(cfg: CorpusConfig) -> str:
    return "/".join(part for part in (cfg.dataset, cfg.dataset_config, cfg.dataset_split) if part)


def _source(cfg: CorpusConfig) -> str:
    return str(cfg.dataset).rstrip("/").split("/")[-1]


def _row_slices(cfg: CorpusConfig, unit_bytes: int) -> tuple[list[Slice], list[Any]]:
    dataset = _open_dataset(cfg)
    check_columns(f"data set {cfg.dataset!r}", dataset.features.arrow_schema, cfg)
    num_rows = len(dataset)
    row_bytes = max(1, (dataset.data.nbytes or 0) // max(1, dataset.data.num_rows))
    step = max(1, unit_bytes // row_bytes)
    slices = [
        Slice(
            path=str(cfg.dataset),
            name=_name(cfg),
            source=_source(cfg),
            start=start,
            end=min(start + step, num_rows),
            num_bytes=row_bytes * (min(start + step, num_rows) - start),
        )
        for start in range(0, num_rows, step)
    ]
    return slices, [dataset._fingerprint]  # the one identity of a data set's content; there is no public name


def _shard_slices(cfg: CorpusConfig, unit_bytes: int) -> tuple[list[Slice], list[Any]]:
    """One slice for each shard, which is what the library can read on its own: mostly one file. Records are
    numbered inside their shard. How long a shard is nobody knows beforehand; it counts as one unit."""
    dataset = _open_dataset(cfg)
    if dataset.features is not None:
        check_columns(f"data set {cfg.dataset!r}", dataset.features.arrow_schema, cfg)
    slices = [
        Slice(
            path=str(cfg.dataset),
            name=f"{_name(cfg)}#{number}/{dataset.num_shards}",
            source=_source(cfg),
            start=number,
            end=number + 1,
            num_bytes=unit_bytes,
        )
        for number in range(dataset.num_shards)
    ]
    version = None if dataset.info.version is None else str(dataset.info.version)
    return slices, [dataset.num_shards, version, dataset.info.dataset_size]


def _open_dataset(cfg: CorpusConfig) -> Any:  # Any: `datasets` is untyped
    return _cached_dataset(
        cfg.dataset or "",
        cfg.dataset_config,
        cfg.dataset_split,
        cfg.dataset_revision,
        tuple(cfg.dataset_files),
        is_on_disk=cfg.dataset_on_disk,
        is_streamed=cfg.streaming,
    )


@lru_cache(maxsize=1)
def _cached_dataset(
    path: str,
    config: str | None,
    split: str | None,
    revision: str | None,
    files: tuple[str, ...],
    *,
    is_on_disk: bool,
    is_streamed: bool,
) -> Any:  # Any: `datasets` is untyped
    import datasets  # noqa: PLC0415 - takes over a second, and only this format needs it

    try:
        if is_on_disk:
            opened = datasets.load_from_disk(path)
            if isinstance(opened, datasets.DatasetDict) and split in opened:
                opened = opened[split]
        else:
            opened = datasets.load_dataset(
                path,
                config,
                split=split,
                revision=revision,
                data_files=list(files) or None,
                streaming=is_streamed,
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set {path!r} cannot be opened: {error}") from error
    if isinstance(opened, dict):
        raise DataError(
            f"data set {path!r} has no split {split!r}; set corpus.dataset_split to one of {sorted(opened)}"
        )
    return opened


def read_dataset(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    if cfg.streaming:
        yield from _read_shard(piece, digest, cfg)
        return
    num_read = 0
    try:
        for record in _read_rows(piece, cfg):
            num_read += 1
            yield record
    except (OSError, pa.ArrowException) as error:
        for _ in range(max(1, piece.end - piece.start - num_read)):
            yield BadRecord("corrupt_archive", 0, str(error))


def _read_rows(piece: Slice, cfg: CorpusConfig) -> Iterator[Record]:
    outer = {name if name in _open_dataset(cfg).column_names else name.split(".")[0] for name in cfg.columns}
    dataset = _open_dataset(cfg).select_columns(sorted(outer)).with_format("arrow")
    starts = range(piece.start, piece.end, MAX_ROWS_A_BATCH)
    tables = (dataset[start : min(start + MAX_ROWS_A_BATCH, piece.end)] for start in starts)
    yield from rows((batch for table in tables for batch in table.to_batches()), piece.start, cfg)


def _read_shard(piece: Slice, digest: Digest, cfg: CorpusConfig) -> Iterator[Record]:
    """Read a shard. Its texts are hashed, for nobody sees the bytes that they come from."""
    row = 0
    try:
        shard = _open_dataset(cfg).shard(num_shards=_open_dataset(cfg).num_shards, index=piece.start)
        for table in shard.with_format("arrow").iter(batch_size=MAX_ROWS_A_BATCH):
            for batch in table.to_batches():
                check_columns(f"data set {cfg.dataset!r}", batch.schema, cfg)
                for record in rows(iter([batch]), row, cfg):
                    row += 1
                    if isinstance(record, Document):
                        digest.add(record.position, record.text)
                    yield record
    except DataError:
        raise
    except _READ_ERRORS as error:
        yield BadRecord("corrupt_archive", 0, f"{type(error).__name__}: {error}")
