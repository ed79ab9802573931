"""The topics that measure files run, and report what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.bench import checkpoints, tokens
from llmtrain.bench.table import BenchConfig
from llmtrain.errors import ConfigError


@pytest.mark.slow
def test_checkpoint_topic_measures_save_restore_verify_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "NUM_REPEATS", 1)
    monkeypatch.setattr(checkpoints, "TENSOR_BYTES", 1 << 20)
    rows = checkpoints.run(BenchConfig(topic="checkpoints", scale=0.01, options={"folder": str(tmp_path)}))
    promised = ["async_stall_share,", "reshard_extra_memory", "save_vs_plain_write", "load_vs_plain_read"]
    promised += ["save_load_vs_deepspeed,", "save_load_vs_dcp,"]
    assert [row.name.split(" ")[0] for row in rows] == [*promised, "save", "restore", "verify", "xxh3_128,"]
    assert [row.unit for row in rows] == ["x"] * 6 + ["MB/s"] * 4
    assert all(row.value > 0 and row.ratio is not None for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_tokens_topic_measures_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 100_000)
    monkeypatch.setattr(tokens, "COMPUTE_S", 0.001)
    monkeypatch.setattr(tokens, "REPEATS", 1)
    rows = {
        row.name: row
        for row in tokens.run(BenchConfig(topic="tokens", scale=0.02, options={"rivals": False}))
    }
    promised = {
        "bpe_docs_differing", "bpe_vs_sentencepiece", "loader_startup_s", "loader_startup_mb",
        "loader_mtokens_per_s", "packing_mdocs_per_s", "order_us_per_row", "bpe_peak_mb",
    }  # fmt: skip
    assert promised <= rows.keys()
    assert rows["bpe_docs_differing"].value == 0
    assert all(row.value > 0 for name, row in rows.items() if name != "bpe_docs_differing")


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'options.texts'"):
        tokens.run(BenchConfig(topic="tokens", options={"text": "x"}))
    with pytest.raises(ConfigError, match=r"did you mean 'options.folder'"):
        checkpoints.run(BenchConfig(topic="checkpoints", options={"fodler": "x"}))
