"""Pass 4: shards to packs, one for each split, row length and strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtrain.data.config import PackConfig, Packing
from llmtrain.data.folder import key_of, read_done, write_done
from llmtrain.data.manifest import PackEntry, ShardEntry, shard_files
from llmtrain.data.pack import write_plan
from llmtrain.data.shards import ShardIndex
from llmtrain.data.verdicts import SPLITS
from llmtrain.errors import DataError

PACK_VERSION = 2
"""Part of the folder's key: raise it when the same shards would give another plan."""


def plan_packs(cfg: PackConfig, out: Path, shards: Sequence[ShardEntry]) -> list[PackEntry]:
    """Plan a pack of every split, row length and strategy that `cfg` names, unless that is done."""
    content = [[shard.sha256, shard.idx_sha256] for shard in shards]
    entries = []
    for seq_len in sorted(cfg.seq_lens):
        for strategy in cfg.strategies:
            window = cfg.window_documents if strategy is Packing.best_fit else None
            key = key_of(version=PACK_VERSION, shards=content, window_documents=window)
            folder = f"packs/{key}/seq{seq_len}-{strategy.name}"
            done = out / folder / "packs.json"
            finished = read_done(done)
            if finished is None:
                packs = [_plan(cfg, out, folder, shards, split, seq_len, strategy) for split in SPLITS]
                finished = {"packs": [asdict(pack) for pack in packs]}
                write_done(done, finished, sorted((out / folder).glob("*.npy")))
            entries += [PackEntry(**entry) for entry in finished["packs"]]
    return entries


def _plan(
    cfg: PackConfig, out: Path, folder: str, shards: Sequence[ShardEntry], split: str, seq_len: int,
    strategy: Packing,
) -> PackEntry:  # fmt: skip
    own = [shard for shard in shards if shard.split == split]
    num_tokens = sum(shard.num_tokens for shard in own)
    if split == "train" and num_tokens < seq_len:
        raise DataError(
            f"the training split holds {num_tokens:,} tokens, less than one row of "
            f"pack.seq_lens={seq_len}; give more text, or lower pack.seq_lens"
        )
    lengths = (ShardIndex(shard_files(out / shard.path)[1]).doc_lengths for shard in own)
    return write_plan(out, folder, split, seq_len, strategy, lengths, window_documents=cfg.window_documents)


def pack_funnel(pack: PackEntry, shards: Sequence[ShardEntry]) -> dict[str, Any]:
    """A pack's entry in the funnel. Tokens that come in are targets, or the first of their document, which
    nothing predicts."""
    own = [shard for shard in shards if shard.split == pack.split]
    num_tokens, num_documents = sum(s.num_tokens for s in own), sum(s.num_documents for s in own)
    return {
        "pass": f"pack {pack.split} seq_len={pack.seq_len} {pack.strategy}",
        "in": {"tokens": num_tokens},
        "kept": {"tokens": pack.num_target_tokens},
        "dropped": {"first_of_document": {"tokens": num_documents}},
    }
