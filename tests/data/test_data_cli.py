"""`llmtrain data` as a user types it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

from llmtrain.data.manifest import read_manifest


def llmtrain_data(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return forked.verb("data", *overrides, cwd=tmp_path)


def test_a_corpus_becomes_a_folder_and_a_summary(
    tmp_path: Path, write_jsonl: Callable[..., Path], texts: list[str]
) -> None:
    write_jsonl([*texts, "short"])
    done = llmtrain_data(
        tmp_path,
        "corpus=jsonl",
        "corpus.paths=[*.jsonl]",
        "rules.min_words=50",
        "tokenizer.vocab_size=600",
        "pack.seq_lens=[64,128]",
        "engine.workers=1",
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "data/jsonl")
    assert {pack.seq_len for pack in manifest.packs} == {64, 128}
    for expected in ("What became of corpus jsonl", "too short", "bytes a token", "next      llmtrain train"):
        assert expected in done.stdout
    assert "scan: " in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["corpus=python_dogs"],
            "error: unknown option of corpus 'python_dogs'; did you mean 'python_docs'?",
        ),
        (["corpus=jsonl"], "error: corpus=jsonl needs corpus.paths"),
        (["corpus=text", "corpus.paths=[nowhere/*]"], "error: corpus.paths: 'nowhere/*' matches no file"),
        (["rules.min_word=3"], "error: unknown setting 'rules.min_word'; did you mean 'rules.min_words'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path, overrides: list[str], message: str) -> None:
    done = llmtrain_data(tmp_path, *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
