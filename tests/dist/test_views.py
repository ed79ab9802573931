"""Ranks that see different folders under one name find out before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from ranks import run_ranks

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.write import ALONE, save_checkpoint

WORKER = Path(__file__).with_name("views_worker.py")


def saved(folder: Path, number: float) -> Path:
    pieces = [Piece("weight", "w", (3,), 0, np.full(3, number, np.float32))]
    return save_checkpoint(folder, step=1, pieces=pieces, state={}, ranks=ALONE, config=SaveConfig())


def told(*paths: Path) -> list[str]:
    return run_ranks(WORKER, *map(str, paths), num_ranks=2)


def test_another_or_no_checkpoint_under_the_same_name_is_named(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", 1.0), saved(tmp_path / "other", 2.0)
    copy = tmp_path / "copy"
    shutil.copytree(one, copy)
    assert told(one, copy) == ["the same", "the same"]
    first, second = told(one, other)
    assert "is not the same on all ranks: rank 0 has a manifest of sha256" in first
    assert "rank 1: " in first
    assert second == "left"
    first, second = told(one, tmp_path / "missing")
    assert f"{tmp_path / 'missing' / 'COMMITTED'} cannot be read: No such file or directory" in first
    assert "all must see the same run.folder" in first
