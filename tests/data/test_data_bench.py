from __future__ import annotations

import pytest

from llmtrain.bench import data
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


def test_the_benchmark_of_data_takes_no_options() -> None:
    with pytest.raises(ConfigError, match="takes no options"):
        data.run(BenchConfig(topic="data", options={"x": 1}))
