"""Checkpoints: what training waits for, and save, verify and restore beside torch.save and the plain disk."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from llmtrain.bench import checkpoint_rivals
from llmtrain.bench._reshard_peak import measure
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.write import ALONE
from llmtrain.train.state import fill_all

KINDS = ("weight", "exp_avg", "exp_avg_sq")
TENSOR_BYTES = 16 << 20
NUM_REPEATS = 5


def run(config: BenchConfig) -> list[Row]:
    """Options: folder, on the disk to measure (default: the temporary folder); rivals=false leaves out the
    rows beside DeepSpeed and DCP, which take minutes."""
    config.only_options("folder", "rivals")
    num_layers = config.scaled(8)
    side = int((TENSOR_BYTES // 4) ** 0.5)
    random = np.random.default_rng(config.seed)
    tensors = {
        (kind, f"blocks.{layer}.weight"): random.standard_normal((side, side), dtype=np.float32)
        for kind in KINDS
        for layer in range(num_layers)
    }
    num_bytes = sum(values.nbytes for values in tensors.values())
    as_torch = {f"{kind}/{name}": torch.from_numpy(values) for (kind, name), values in tensors.items()}

    with tempfile.TemporaryDirectory(dir=config.option("folder", tempfile.gettempdir())) as name:
        folder = Path(name)
        rivals = checkpoint_rivals.rows(config, folder) if config.option("rivals", True) else []
        plain, rival, fresh = folder / "plain.bin", folder / "rival.pt", folder / "fresh"

        pieces = [
            Piece(kind, each, values.shape, 0, values.reshape(-1)) for (kind, each), values in tensors.items()
        ]
        blocking = Saver(folder, ALONE, SaveConfig(keep_last=1, in_background=False))
        background = Saver(folder / "background", ALONE, SaveConfig(keep_last=1))

        def save_ours() -> None:
            blocking.save(1, pieces, {})

        # All three keep the older file until the new one is on the disk.
        def save_rival() -> None:
            with open(fresh, "wb") as handle:
                torch.save(as_torch, handle)
                handle.flush()
                os.fsync(handle.fileno())
            fresh.replace(rival)

        def save_plain() -> None:
            with open(fresh, "wb", buffering=0) as handle:
                for values in tensors.values():
                    handle.write(values.data)
                os.fsync(handle.fileno())
            fresh.replace(plain)

        # One after the other in each round, so that a slow moment of the disk meets all three.
        save_s = _medians([save_ours, save_rival, save_plain])
        reshard = measure(
            folder / "reshard", num_tensors=config.scaled(24), tensor_bytes=config.scaled(64) << 20
        )
        stalls = []
        for _ in range(NUM_REPEATS + 1):
            for values in tensors.values():
                values *= 0.999  # as the optimizer does just before
            background.save(1, pieces, {})
            background.finish()  # the next one waits for nothing: what is left is the copy
            stalls += [saved.wait_s + saved.copy_s for saved in background.take_saved()]
        stall_s = statistics.median(stalls[1:])
        reader = CheckpointReader(folder / "step-00000001")

        memory = [(*key, 0, torch.zeros(values.size)) for key, values in tensors.items()]

        def restore_ours() -> None:
            fill_all(memory, reader.read_into)

        def restore_rival() -> None:
            torch.load(rival)

        def read_plain() -> None:
            with open(plain, "rb", buffering=0) as handle:
                for *_, into in memory:
                    handle.readinto(into.numpy().view(np.uint8).data)

        restore_s = _medians([restore_ours, restore_rival, read_plain])
        verify_s, read_s = _medians([reader.verify, read_plain])

    content = next(iter(tensors.values())).data
    sha256_s, xxh3_s = _medians(
        [lambda: hashlib.sha256(content).digest(), lambda: xxhash.xxh3_128_digest(content)]
    )
    unit = "MB/s"
    size = f"{num_bytes / 1e6:.0f} MB"
    mb, tensor_mb = num_bytes / 1e6, content.nbytes / 1e6
    return [
        Row(
            name="async_stall_share, training waits, of a blocking save",
            value=stall_s / save_s[0],
            unit="x",
            limit=0.1,
        ),
        Row(
            name="reshard_extra_memory / largest tensor, of 24 tensors of 64 MiB",
            value=reshard,
            unit="x",
            limit=2.0,
        ),
        Row(name="save_vs_plain_write", value=save_s[2] / save_s[0], unit="x", limit=0.7),
        Row(name="load_vs_plain_read", value=restore_s[2] / restore_s[0], unit="x", limit=0.7),
        *rivals,
        Row(
            name=f"save {size}, hashed, read back, durable; rival: torch.save + fsync; limit: write + fsync",
            value=mb / save_s[0],
            unit=unit,
            rival=mb / save_s[1],
            limit=mb / save_s[2],
        ),
        Row(
            name="restore from the page cache, hashed; rival: torch.load, no hash; limit: read",
            value=mb / restore_s[0],
            unit=unit,
            rival=mb / restore_s[1],
            limit=mb / restore_s[2],
        ),
        Row(
            name="verify from the page cache; limit: read", value=mb / verify_s, unit=unit, limit=mb / read_s
        ),
        Row(
            name="xxh3_128, for contents; rival: sha256, for the manifest",
            value=tensor_mb / xxh3_s,
            unit=unit,
            rival=tensor_mb / sha256_s,
        ),
    ]


def _medians(works: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each, over interleaved repeats after one that warms up."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(NUM_REPEATS + 1):
        for work, seconds in zip(works, taken, strict=True):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in taken]
