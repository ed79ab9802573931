from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit


@pytest.fixture(scope="session")
def new_folder() -> Callable[[], Any]:
    """Temporary folders for examples of Hypothesis, in memory where that can be: many small files."""
    in_memory = Path("/dev/shm")

    def make() -> Any:
        return TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None)

    return make


@pytest.fixture(scope="session")
def made_up_documents() -> Callable[..., Any]:
    """DOCUMENT rows: many ids share the high half, many ranks and contents are equal."""

    def make(count: int, seed: int, num_contents: int = 5) -> Any:
        draw = np.random.default_rng(seed)
        rows = np.zeros(count, dtype=DOCUMENT)
        rows["alive"] = draw.random(count) < 0.8
        rows["is_previous"] = draw.random(count) < 0.2
        rows["rank"] = draw.choice([0.0, -0.0, -1.5, 3e300, -np.inf, np.inf, 0.1, np.nan], count)
        rows["id_high"] = draw.integers(0, 3, count)
        rows["id_low"] = draw.permutation(count)
        content = draw.integers(0, num_contents, count).astype(np.uint64)
        rows["content_high"] = content // np.uint64(2) * np.uint64(0x9E3779B97F4A7C15)
        rows["content_low"] = content
        return rows

    return make


@pytest.fixture(scope="session")
def cut_units() -> Callable[..., list[DedupUnit]]:
    """Write DOCUMENT rows as units that end at `cuts`, in `folder`."""

    def make(
        folder: Path, rows: Any, cuts: list[int], first: int = 0, **tables: list[Path]
    ) -> list[DedupUnit]:
        units = []
        bounds = [0, *sorted(cuts), len(rows)]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            path = folder / f"documents-{number}.npy"
            np.save(path, rows[start:end])
            more = {name: paths[number] for name, paths in tables.items()}
            units.append(DedupUnit(number, first + start, end - start, path, **more))
        return units

    return make


@pytest.fixture(scope="session")
def small_tasks() -> Callable[[int], DedupConfig]:
    """Settings with fewer bytes a task than a user may set."""

    def make(partition_bytes: int) -> DedupConfig:
        cfg = DedupConfig()
        cfg.partition_bytes = partition_bytes
        return cfg

    return make
