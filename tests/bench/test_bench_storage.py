"""The topics that measure files run, and report what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.bench import checkpoint, loader
from llmtrain.bench.table import BenchConfig
from llmtrain.errors import ConfigError


def test_checkpoint_topic_measures_save_restore_verify_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "NUM_REPEATS", 1)
    monkeypatch.setattr(checkpoint, "TENSOR_BYTES", 1 << 20)
    rows = checkpoint.run(BenchConfig(topic="checkpoint", scale=0.01, options={"folder": str(tmp_path)}))
    assert [row.name.split(" ")[0] for row in rows] == ["save", "restore", "verify", "xxh3_128,"]
    assert {row.unit for row in rows} == {"MB/s"}
    assert all(row.value > 0 and row.ratio is not None for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_loader_topic_measures_order_rows_wait_and_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHARD_TOKENS", 100_000)
    monkeypatch.setattr(loader, "COMPUTE_S", 0.001)
    rows = loader.run(BenchConfig(topic="loader", scale=0.01))
    assert [row.unit for row in rows] == ["µs/row", "M tokens/s", "ms", "s"]
    assert all(row.value > 0 and row.ratio is not None for row in rows)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"topic loader takes no options, got options.fodler"):
        loader.run(BenchConfig(topic="loader", options={"fodler": "x"}))
    with pytest.raises(ConfigError, match=r"did you mean 'options.folder'"):
        checkpoint.run(BenchConfig(topic="checkpoint", options={"fodler": "x"}))
