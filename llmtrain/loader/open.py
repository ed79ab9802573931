"""From settings to the rows of a run: one data folder, or several behind one numbering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain import rng
from llmtrain.data.manifest import Manifest, read_manifest
from llmtrain.errors import DataError
from llmtrain.files import hash_json
from llmtrain.loader.config import LoaderConfig, OnExhausted, SourceConfig
from llmtrain.loader.dataset import MAX_OPEN_SHARDS, Row, Rows
from llmtrain.loader.mixture import Mixture, Source
from llmtrain.loader.objectives import make_view
from llmtrain.loader.order import Locality

ONLY = "data"
"""Name of the one source that data.folder is."""


class MixedRows:
    """Rows of several sources, numbered one source after the other."""

    def __init__(self, parts: Mapping[str, Rows]) -> None:
        self.parts = dict(parts)
        rows = list(self.parts.values())
        self.seq_len = rows[0].seq_len
        self.num_rows = sum(each.num_rows for each in rows)
        self.text_bytes = sum(each.text_bytes for each in rows)
        self.num_target_tokens = sum(each.num_target_tokens for each in rows)
        self._rows: list[Rows] = rows
        self._starts = np.cumsum([0, *(each.num_rows for each in rows)])

    def read_many(self, rows: npt.NDArray[np.integer[Any]]) -> Row:
        """Return these rows, in this order, as arrays [len(rows), seq_len]."""
        at = np.asarray(rows, dtype=np.int64)
        owner = self.owners(at)
        numbers: list[int] = np.unique(owner).tolist()
        if len(numbers) == 1:
            return self._rows[numbers[0]].read_many(at - self._starts[numbers[0]])
        shape = len(at), self.seq_len
        whole = {
            name: np.empty(shape, dtype=np.int32 if name == "segments" else np.int64)
            for name in ("tokens", "targets", "positions", "segments")
        }
        for number in numbers:
            chosen = owner == number
            part = self._rows[number].read_many(at[chosen] - self._starts[number])
            for name, array in whole.items():
                array[chosen] = getattr(part, name)
        return Row(**whole)

    def owners(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of the source of each row."""
        if rows.size == 0 or rows.min() < 0 or rows.max() >= self.num_rows:
            raise DataError(f"rows {rows.tolist()} asked of a mixture that has 0 to {self.num_rows - 1}")
        return np.searchsorted(self._starts, rows, side="right") - 1

    def place(self, row: int) -> tuple[str, int]:
        """Name of the row's source, and its number there."""
        [owner] = self.owners(np.array([row])).tolist()
        return list(self.parts)[owner], row - int(self._starts[owner])


@dataclass(frozen=True)
class OpenData:
    """What a run reads."""

    manifests: dict[str, Manifest]
    """By source."""
    folders: dict[str, Path]
    train: MixedRows
    held_out: MixedRows
    order: Mixture
    hash: str
    """Of what decides every token of every row, and which row is where; not of the seed."""

    @property
    def manifest(self) -> Manifest:
        """The first source's: what all sources share is in it."""
        return next(iter(self.manifests.values()))


def open_data(cfg: LoaderConfig, *, seed: int) -> OpenData:
    """Open the data folders of a run. No shard is read.

    Raises:
        DataError: a folder without a manifest or without the pack; sources with different tokenizers.
        ConfigError: weights that name no source.
    """
    sources = cfg.sources or {ONLY: SourceConfig(folder=str(cfg.folder))}
    folders = {name: Path(source.folder) for name, source in sources.items()}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    first = next(iter(manifests))
    for name, manifest in manifests.items():
        if manifest.tokenizer.fingerprint != manifests[first].tokenizer.fingerprint:
            raise DataError(
                f"{folders[name]} was made with another tokenizer than {folders[first]}: fingerprints "
                f"{manifest.tokenizer.fingerprint[:12]} and {manifests[first].tokenizer.fingerprint[:12]}; "
                f"make one of them again with tokenizer.path set to the other's"
            )
    max_open = max(1, MAX_OPEN_SHARDS // len(sources))
    splits = {
        split: MixedRows(
            {
                name: Rows(
                    folders[name],
                    manifest,
                    split,
                    cfg.seq_len,
                    cfg.packing,
                    verify=cfg.verify,
                    max_open=max_open,
                )
                for name, manifest in manifests.items()
            }
        )
        for split in ("train", "held_out")
    }
    for rows in splits["train"].parts.values():
        rows.view = make_view(
            cfg.objective,
            manifests[first].tokenizer.special_ids,
            key=rng.key(seed, "objective", rows.hash),
            eos_id=manifests[first].tokenizer.eos_id,
            vocab_size=manifests[first].tokenizer.vocab_size,
        )
    order = _order(cfg, sources, splits["train"], seed)
    hashes = [each.hash(cfg.seq_len, cfg.packing.name) for each in manifests.values()]
    whole = hash_json([order.hash, hashes, cfg.objective.deciding()])
    return OpenData(manifests, folders, splits["train"], splits["held_out"], order, whole)


def open_same(cfg: LoaderConfig, *, seed: int, expected: str) -> OpenData:
    """`open_data`, on a rank that must see what rank 0 saw.

    Raises:
        DataError: the hash is not `expected`.
    """
    data = open_data(cfg, seed=seed)
    if data.hash != expected:
        where = ", ".join(map(str, data.folders.values()))
        raise DataError(
            f"the data in {where} has the hash {data.hash[:12]} here, and {expected[:12]} on rank 0; give "
            "all nodes the same files"
        )
    return data


def _order(cfg: LoaderConfig, sources: Mapping[str, SourceConfig], train: MixedRows, seed: int) -> Mixture:
    listed = []
    for name, source in sources.items():
        rows = train.parts[name]
        epochs = cfg.max_epochs if source.max_epochs is None else source.max_epochs
        cap = int(epochs * rows.num_rows) if cfg.sources else None  # of one folder check_train speaks
        listed.append(Source(name=name, num_rows=rows.num_rows, hash=rows.hash, max_rows=cap))
    stages: list[tuple[int, dict[str, float]]] = [
        (-(-stage.from_tokens // cfg.seq_len), dict(stage.weights)) for stage in cfg.stages
    ]
    if not stages:
        weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
        stages = [(0, weights)]
    locality = None
    if cfg.locality is not None:
        locality = Locality(group_rows=cfg.locality.group_rows, window_groups=cfg.locality.window_groups)
    return Mixture(
        listed,
        stages,
        seed=seed,
        block_rows=cfg.block_rows,
        redistribute=cfg.on_exhausted is OnExhausted.redistribute,
        locality=locality,
    )
