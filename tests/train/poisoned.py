"""Data whose rows of one window do harm: a shard that was damaged behind its checksums' back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_folder import VOCAB_SIZE

from llmtrain.data.config import Packing
from llmtrain.data.manifest import shard_files
from llmtrain.data.pack import open_plan
from llmtrain.loader.config import LoaderConfig
from llmtrain.loader.open import open_data


def poison(folder: Path, *, seq_len: int, first: int, last: int, seed: int = 0, noise: bool = False) -> None:
    """Overwrite, in the shards, the tokens of the rows that a run with this `seed` takes at positions `first`
    to `last`: with one token again and again, or with noise.

    The order of rows hangs on the manifest, which stays, so no other row moves; a run needs
    data.verify=none, or it finds the damage first.
    """
    data = open_data(LoaderConfig(folder=str(folder), seq_len=seq_len), seed=seed)
    manifest = data.manifest
    plan = open_plan(folder, manifest, manifest.pack("train", seq_len, Packing.concat.name))
    rows = data.order.rows_at(np.arange(first, last + 1))
    shards, random = manifest.split_shards("train"), np.random.default_rng(seed)
    spans, _ = plan.spans(rows)
    for number, start, length, _ in spans.T.tolist():
        path = shard_files(folder / shards.path(number))[0]
        tokens = np.memmap(path, dtype=manifest.dtype, mode="r+")
        tokens[start : start + length] = random.integers(2, VOCAB_SIZE, length) if noise else VOCAB_SIZE - 1
        tokens.flush()
