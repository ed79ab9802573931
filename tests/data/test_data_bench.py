from __future__ import annotations

import pytest

from llmtrain.bench import _datatrove, data
from llmtrain.bench.table import BenchConfig
from llmtrain.errors import ConfigError


@pytest.mark.slow
def test_the_benchmark_of_data_has_a_row_for_each_pass_and_its_rivals() -> None:
    rows = {row.name: row for row in data.run(BenchConfig(topic="data", scale=0.05))}
    for corpus in ("python_docs", "jsonl"):
        for name in ("scan", "decide", "train tokenizer", "tokenize", "pack"):
            assert rows[f"{corpus}: {name}"].value > 0
        assert rows[f"{corpus}: the whole step but training the tokenizer; limit: the promise"].limit == 10
    assert rows["encode, equal ids; rival: SentencePiece, one thread"].rival
    for name in ("end_to_end_mb_per_s_core", "scan_worker_peak_mb"):
        assert rows[name].value > 0
        assert rows[name].limit
    ratios = ("signals_vs_datatrove", "minhash_vs_datatrove", "dedup_vs_datatrove")
    assert all((name in rows) == _datatrove.is_installed() for name in ratios)


def test_the_benchmark_of_data_knows_its_options() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'options\.x'"):
        data.run(BenchConfig(topic="data", options={"x": 1}))


def test_all_presets_together_edit_lines_and_bound_every_kind_of_signal() -> None:
    edits, rules = data.all_presets()
    assert edits.terminal_marks == '.?!"'
    bounds = (rules.min_words, rules.max_duplicate_10gram_char_fraction, rules.min_sentences)
    assert bounds == (50, 0.1, 3)
    assert rules.max_edited_short_line_fraction == 0.67
