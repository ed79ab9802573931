"""From a classifier that a user trains to documents that its score drops."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from llmtrain.data.config import DataConfig, StopAfter
from llmtrain.data.content.config import ContentConfig, QualityConfig
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.pipeline import run


def test_a_trained_classifier_keeps_the_documents_it_was_taught_to_like(
    tmp_path: Path, write_jsonl: Callable[..., Path], jsonl_config: Callable[..., DataConfig]
) -> None:
    good = [f"a careful proof of lemma {number} with every step explained in order" for number in range(60)]
    bad = [f"click here now buy cheap deal {number} limited offer click again today" for number in range(60)]
    write_jsonl(good[:50], "good.jsonl")
    write_jsonl(bad[:50], "bad.jsonl")
    model = tmp_path / "model.bin"
    command = [
        sys.executable, "-m", "llmtrain.cli.main", "data", "train-quality", "positives=[good.jsonl]",
        "negatives=[bad.jsonl]", f"out={model}", "dim=8", "buckets=1000", "epochs=20",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"content.quality.model={model}" in done.stdout
    assert json.loads(model.with_suffix(".json").read_text())["held_out"]["precision"] > 0.9
    cfg = jsonl_config(
        write_jsonl([*good[50:], *bad[50:]], "mixed.jsonl"),
        rules=RulesConfig(min_quality=0.5),
        content=ContentConfig(quality=QualityConfig(model=str(model))),
        stop_after=StopAfter.documents,
    )
    report = run(cfg, quiet=True)
    kept = [
        text
        for file in report.documents
        for text in pq.read_table(report.out / file.path)["text"].to_pylist()
    ]
    assert sorted(kept) == sorted(good[50:])
    assert report.funnel[1]["dropped"]["low_quality"]["documents"] == 10
