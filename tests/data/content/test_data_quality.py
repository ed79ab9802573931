"""The quality classifier: training it, its figures, its scores."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.content.config import QualityConfig, TrainQualityConfig
from llmtrain.data.content.fasttext import read_model
from llmtrain.data.content.quality import NEGATIVE, POSITIVE, Classifier, figures, train
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_json

GOOD = ["theorem", "proof", "lemma", "therefore", "hence", "follows", "given", "suppose", "let", "integer"]
BAD = ["click", "buy", "now", "sale", "free", "offer", "login", "cookie", "subscribe", "cheap"]
BOTH = ["the", "a", "of", "to", "and", "in", "is", "it", "that", "for"]


def documents(words: list[str], num_documents: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(words if draw.random() < 0.3 else BOTH) for _ in range(draw.randint(10, 60)))
        for _ in range(num_documents)
    ]


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    with gzip.open(tmp_path / "good.jsonl.gz", "wt", encoding="utf-8") as handle:
        for text in documents(GOOD, 300, 1):
            handle.write(json.dumps({"text": text}) + "\n")
    (tmp_path / "bad.txt").write_text("\n".join(documents(BAD, 400, 2)), encoding="utf-8")

    def make(**changes: Any) -> TrainQualityConfig:
        values: dict[str, Any] = {
            "positives": [str(tmp_path / "good.jsonl.gz")],
            "negatives": [str(tmp_path / "bad.txt")],
            "out": str(tmp_path / "model" / "quality.bin"),
            "buckets": 500,
            "dim": 8,
        }
        return TrainQualityConfig(**(values | changes))

    return make


def test_a_trained_model_tells_the_sides_apart(settings: Any, batch_of: Any) -> None:
    cfg = settings()
    facts = train(cfg)
    assert facts["held_out"]["auc"] > 0.99
    assert facts["held_out"]["precision"] > 0.95
    assert facts["held_out"]["recall"] > 0.95
    assert facts["positives"] == {
        "documents": 300, "empty": 0, "duplicates": 0, "trained_on": 270, "held_out": 30
    }  # fmt: skip
    assert facts["negatives"]["held_out"] == 40
    assert read_json(Path(cfg.out).with_suffix(".json")) == facts
    scores = Classifier.load(QualityConfig(model=cfg.out)).scores(
        *batch_of(["suppose the lemma follows hence proof", "buy cheap offer now click the cookie", "\n"])
    )
    assert scores[0] > 0.9
    assert scores[1] < 0.1
    assert ((scores >= 0) & (scores <= 1)).all()
    unlikely = Classifier.load(QualityConfig(model=cfg.out, label=NEGATIVE))
    assert unlikely.scores(*batch_of(["buy cheap offer now"]))[0] > 0.9


def test_same_input_same_bytes_and_another_seed_other_ones(settings: Any, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.bin" for name in "abc"]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        train(settings(out=str(file), seed=seed))
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_the_order_of_the_lines_does_not_matter(settings: Any, tmp_path: Path) -> None:
    first = tmp_path / "first.bin"
    train(settings(out=str(first)))
    path = tmp_path / "bad.txt"
    path.write_text("\n".join(reversed(path.read_text(encoding="utf-8").split("\n"))), encoding="utf-8")
    second = tmp_path / "second.bin"
    train(settings(out=str(second)))
    assert first.read_bytes() == second.read_bytes()


def test_the_model_is_a_fasttext_file_in_its_order(settings: Any) -> None:
    cfg = settings(min_count=2, word_ngrams=1)
    train(cfg)
    model = read_model(Path(cfg.out))
    assert model.labels == [POSITIVE, NEGATIVE]
    assert model.label_counts.tolist() == [270, 360]
    assert model.buckets == 0
    assert len(model.inputs) == len(model.words)
    assert b"</s>" in model.words
    assert set(model.words) == {*(word.encode() for word in GOOD + BAD + BOTH), b"</s>"}


def test_rows_without_a_training_ngram_are_zero(settings: Any) -> None:
    cfg = settings(buckets=5000)
    train(cfg)
    model = read_model(Path(cfg.out))
    is_zero = ~np.asarray(model.inputs).any(axis=1)
    assert not is_zero[: len(model.words)].any()
    assert 0.5 < is_zero[len(model.words) :].mean() < 1


def test_documents_of_both_sides_empty_ones_and_copies_are_counted(settings: Any, tmp_path: Path) -> None:
    good = documents(GOOD, 300, 1)
    with (tmp_path / "bad.txt").open("a", encoding="utf-8") as handle:
        handle.write("\n" + "\n".join([*good[:3], "", "   ", documents(BAD, 1, 2)[0]]))
    facts = train(settings())
    assert facts["documents_on_both_sides"] == 3
    assert facts["negatives"]["empty"] == 2
    assert facts["negatives"]["duplicates"] == 1


def test_max_documents_bounds_each_side(settings: Any) -> None:
    facts = train(settings(max_documents=100, held_out=0.2))
    for side in ("positives", "negatives"):
        assert (facts[side]["trained_on"], facts[side]["held_out"]) == (80, 20)


def test_a_sample_of_a_long_document_is_scored(settings: Any, batch_of: Any) -> None:
    cfg = settings()
    train(cfg)
    texts = [" ".join(documents(GOOD, 50, 3)), " ".join(documents(BAD, 50, 4))]
    scores = Classifier.load(QualityConfig(model=cfg.out, sample_bytes=256)).scores(*batch_of(texts))
    assert scores[0] > 0.6 > 0.4 > scores[1]


def test_figures_of_known_scores() -> None:
    found = figures(np.array([0.9, 0.8, 0.5, 0.2], dtype=np.float32), np.arange(10, dtype=np.float32) / 10)
    assert found["precision"] == 3 / 8
    assert found["recall"] == 3 / 4
    assert found["auc"] == pytest.approx((9.5 + 8.5 + 5.5 + 2.5) / 40)
    assert found["threshold_top_10_percent"] == pytest.approx(0.9)
    assert found["recall_at_threshold"] == 1 / 4


def test_an_unknown_label_is_refused(settings: Any) -> None:
    cfg = settings()
    train(cfg)
    with pytest.raises(ConfigError, match=r"content\.quality\.label: unknown label '__label__hq'; did you"):
        Classifier.load(QualityConfig(model=cfg.out, label="__label__hq"))


def test_loading_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"content\.quality\.model is null"):
        Classifier.load(QualityConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', r"line 2: no JSON object with a field 'text' \(KeyError\)"),
        ('{"text": "a"\n', r"line 1: no JSON object with a field 'text'"),
        ("[1]\n", r"line 1: no JSON object with a field 'text' \(TypeError\)"),
        ('{"text": 3}\n', "line 1: 'text' is int, not text"),
        ('{"text": "a"}\n', "hold 1 documents; give at least two"),
        ('{"text": "a"}\n{"text": " "}\n', "give 1 different documents to train on and 0 to hold out"),
    ],
)
def test_bad_input_is_named(settings: Any, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        train(settings(positives=[str(path)]))


def test_lists_that_cannot_be_read_are_named(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        train(settings(negatives=[str(tmp_path / "none.jsonl")]))
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"latin\.txt, after line \d: not UTF-8"):
        train(settings(negatives=[str(tmp_path / "latin.txt")]))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a line\n" * 1000)[:30])
    with pytest.raises(DataError, match=r"cut\.txt\.gz, after line \d+: damaged archive"):
        train(settings(negatives=[str(tmp_path / "cut.txt.gz")]))
