"""fastText models: files of the original tool are read and predict as it does, ours are read back.

`fasttext/` holds models of a few words that fastText 0.9.2 trained on made-up syllables, and in expected.json
every label's probability that it gave for some texts (`predict` with k=-1; it adds 1e-5 to a softmax).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.content.fasttext import (
    END_OF_TEXT,
    Predictor,
    label_tree,
    read_model,
    write_model,
)
from llmtrain.errors import DataError

MODELS = Path(__file__).parent / "fasttext"
EXPECTED = json.loads((MODELS / "expected.json").read_text(encoding="utf-8"))
TOLERANCE = {name: 8e-3 if name == "one_vs_all.bin" else 3e-5 for name in EXPECTED["models"]}
"""fastText looks the sigmoid of one-vs-all up in 512 steps from -8 to 8; ours is computed."""
HEADER = struct.pack("<ii", 793712314, 12)


def arguments(**changed: int) -> bytes:
    values = {"dim": 2, "ws": 5, "epoch": 1, "min_count": 1, "neg": 5, "word_ngrams": 1, "loss": 3, "kind": 3}
    values |= {"buckets": 0, "min_chars": 0, "max_chars": 0, "rate": 100} | changed
    return struct.pack("<12id", *values.values(), 1e-4)


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_probabilities_are_those_of_fasttext(name: str, batch_of: Any) -> None:
    predictor = Predictor(read_model(MODELS / name))
    text, offsets = batch_of(EXPECTED["texts"])
    best, probability = predictor.best(text, offsets)
    for number, expected in enumerate(EXPECTED["models"][name]):
        if not expected:
            assert best[number] == -1
            continue
        most = max(expected.values())
        assert probability[number] == pytest.approx(min(most, 1), abs=TOLERANCE[name])
        assert expected[predictor.labels[best[number]]] == pytest.approx(most, abs=1e-6)
    for label, label_name in enumerate(predictor.labels):
        given = [one.get(label_name, 0.0) for one in EXPECTED["models"][name]]
        assert predictor.probability(text, offsets, label) == pytest.approx(given, abs=TOLERANCE[name])


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_a_document_does_not_depend_on_its_neighbours(name: str, batch_of: Any) -> None:
    predictor = Predictor(read_model(MODELS / name))
    texts = EXPECTED["texts"]
    together = predictor.best(*batch_of(texts))[1]
    alone = [predictor.best(*batch_of([text]))[1][0] for text in texts]
    assert together.tolist() == alone


def test_line_ends_part_words_like_spaces(batch_of: Any) -> None:
    predictor = Predictor(read_model(MODELS / "softmax.bin"))
    _, probability = predictor.best(*batch_of(["ka lo mi ra", "ka\nlo\n\nmi\tra\n"]))
    assert probability[0] == probability[1]


def test_what_is_written_is_read_back(tmp_path: Path, batch_of: Any) -> None:
    path = tmp_path / "m.bin"
    inputs = np.arange(15, dtype=np.float32).reshape(5, 3) / 10
    outputs = np.array([[1, 0, 0], [0, 1, 0]], dtype=np.float32)
    words = [(b"ka", 7), (END_OF_TEXT.encode(), 3), ("é".encode(), 1)]
    write_model(
        path,
        words,
        [("__label__a", 2), ("__label__b", 1)],
        inputs,
        outputs,
        word_ngrams=2,
        buckets=2,
        epochs=5,
        min_count=1,
        num_tokens=11,
    )
    model = read_model(path)
    assert model.words == [word for word, _ in words]
    assert model.labels == ["__label__a", "__label__b"]
    assert model.label_counts.tolist() == [2, 1]
    assert (model.inputs == inputs).all()
    assert (model.outputs == outputs).all()
    hidden = inputs[[2, 1]].mean(axis=0)  # é, </s>; of their pair only the bucket is unknown here
    wanted = [np.exp(value) for value in outputs @ hidden]
    model.word_ngrams = 1
    given = Predictor(model).probability(*batch_of(["é"]), 0)
    assert given[0] == pytest.approx(wanted[0] / sum(wanted), abs=1e-6)


def test_a_word_that_begins_as_a_label_is_not_text(batch_of: Any) -> None:
    predictor = Predictor(read_model(MODELS / "softmax.bin"))
    _, probability = predictor.best(*batch_of(["ka lo", "__label__never ka lo"]))
    assert probability[0] == probability[1]


def test_the_label_tree_joins_the_rarest_first() -> None:
    left, right = label_tree(np.array([50, 20, 10, 5]))
    assert left.tolist()[4:] == [3, 4, 5]
    assert right.tolist()[4:] == [2, 1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends too early to be a fastText model"),
        (b"12 300\nthe 0.1 0.2 ", "is not a fastText model: it begins with .*; give a .bin or .ftz file"),
        (HEADER + arguments()[:20], "ends too early"),
        (HEADER + arguments(kind=2), "holds word vectors, not a classifier"),
        (HEADER + arguments(word_ngrams=64), "n-grams of 64 words"),
        (HEADER + arguments() + struct.pack("<iiiqq", 3, 1, 1, 9, -1), "1 words and 1 labels do not make 3"),
        (HEADER + arguments() + struct.pack("<iiiqq", 2, 1, 1, 9, -1) + b"ka", "ends too early"),
    ],
)
def test_a_file_that_is_no_classifier_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_model(path)


def entries() -> bytes:
    counts = struct.pack("<iiiqq", 2, 1, 1, 9, -1)
    return counts + b"ka" + struct.pack("<xqb", 5, 0) + b"__label__a" + struct.pack("<xqb", 5, 1)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (struct.pack("<?qq", False, -1, 2), "-1 rows and 2 columns: no fastText model"),
        (struct.pack("<?qq", False, 9, 2) + bytes(8), "ends too early"),
        (
            struct.pack("<?qq2f", False, 1, 2, 0, 0) + struct.pack("<?qq", False, 2, 2) + bytes(16),
            r"matrices of \(1, 2\) and \(2, 2\) do not fit 1 labels",
        ),
        (
            struct.pack("<??qqi", True, False, 1, 2, 1) + bytes(1) + struct.pack("<iiii", 2, 2, 2, 2),
            "a quantiser of 2 parts of 2 for 2: damaged",
        ),
        (
            struct.pack("<??qqi", True, False, 3, 2, 1)
            + bytes(1)
            + struct.pack("<iiii", 2, 1, 2, 2)
            + bytes(4 * 2 * 256),
            "1 codes for 3 rows of 1: damaged",
        ),
    ],
)
def test_damaged_matrices_are_refused(tmp_path: Path, matrices: bytes, message: str) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(HEADER + arguments() + entries() + matrices)
    with pytest.raises(DataError, match=message):
        read_model(path)


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_every_cut_of_a_model_is_refused(name: str, tmp_path: Path) -> None:
    whole = (MODELS / name).read_bytes()
    path = tmp_path / "m.bin"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_model(path)


def test_word_vectors_are_told_from_classifiers() -> None:
    with pytest.raises(DataError, match=r"vectors\.bin holds word vectors, not a classifier"):
        read_model(MODELS / "vectors.bin")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the fastText model .*none\.bin: No such file"):
        read_model(tmp_path / "none.bin")
