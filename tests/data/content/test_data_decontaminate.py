"""Decontamination: the index against plain Python, planted items, the report, bad sets."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_batch import text_batch

from llmtrain.data.content.config import DecontaminationConfig, EvaluationConfig
from llmtrain.data.content.decontaminate import PAIR, EvalIndex
from llmtrain.data.text.words import split_words
from llmtrain.errors import DataError

EVAL = Path(__file__).parents[4] / "shared" / "corpora" / "eval"
QUESTION = "Ann has three red apples and two green pears; how many pieces of fruit has she in all?"
FILLER = "It was a bright cold day and the clocks were striking while nobody looked at them at all."


def write_items(path: Path, items: list[Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


@pytest.fixture
def index_of(tmp_path: Path) -> Any:
    """An index over texts, each an item `text`."""

    def make(texts: list[Any], **changes: Any) -> EvalIndex:
        path = write_items(tmp_path / "set.jsonl", [{"text": text} for text in texts])
        one = EvaluationConfig(path=path, fields=["text"], name="set")
        return EvalIndex.load(DecontaminationConfig(sets=[one], **changes))

    return make


def find(index: EvalIndex, texts: list[str]) -> Any:
    return index.matches(split_words(*text_batch(texts)))


def test_an_item_is_found_in_any_case_spacing_and_punctuation(index_of: Any) -> None:
    index = index_of([QUESTION])
    texts = [
        FILLER,
        f"{FILLER} {QUESTION} {FILLER}",
        QUESTION.upper().replace(" ", "\n\n"),
        "«" + QUESTION.replace(" ", " -- ").replace(";", ","),
        QUESTION.replace("apples", "plums"),
    ]
    found = find(index, texts)
    assert index.items[0].num_ngrams == 6  # 18 words
    assert found.counts.tolist() == [0, 6, 6, 6, 1]
    assert found.pairs.dtype == PAIR
    assert np.bincount(found.pairs["document"], minlength=5).tolist() == [0, 6, 6, 6, 1]
    assert set(found.pairs["item"]) == {0}
    first = found.pairs[found.pairs["document"] == 1]["word"].min()
    words = split_words(*text_batch([texts[1]]))
    assert texts[1].encode()[words.starts[first] :].startswith(b"Ann has")


def test_a_short_item_counts_as_a_whole(index_of: Any) -> None:
    index = index_of(["The cat sat on the mat.", "too short", "a b c d e f g h i j k l m n"])
    assert [item.num_ngrams for item in index.items] == [1, 2]
    assert index.num_short == {"set": 1}
    found = find(
        index, ["then the cat sat on the mat, again", "the cat sat on a mat", "too short", "a b c d e f"]
    )
    assert found.counts.tolist() == [1, 0, 0, 0]


def test_fields_are_separate_unless_joined(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(14)]
    path = write_items(
        tmp_path / "set.jsonl",
        [{"q": " ".join(words[:7]), "a": {"text": [" ".join(words[7:])]}, "key": "x1"}],
    )
    sets = {"path": path, "fields": ["q", "a.text"], "id_field": "key"}
    apart = EvalIndex.load(DecontaminationConfig(sets=[EvaluationConfig(**sets)]))
    assert (apart.items[0].num_ngrams, apart.items[0].id) == (2, "x1")
    assert find(apart, [" ".join(words[:7])]).counts.tolist() == [1]
    joined = EvalIndex.load(DecontaminationConfig(sets=[EvaluationConfig(**sets, joined=True)]))
    assert joined.items[0].num_ngrams == 2
    assert find(joined, [" ".join(words[:7]), " ".join(words)]).counts.tolist() == [0, 2]


def test_ngrams_of_many_items_are_ignored(index_of: Any) -> None:
    prompt = "Answer the following question with one of the letters that stand before the choices below. "
    texts = [prompt + QUESTION, prompt + FILLER, prompt + QUESTION.replace("apples", "plums")]
    index = index_of(texts, max_items=2)
    assert index.num_ignored > 0
    assert find(index, [prompt]).counts.tolist() == [0]
    assert find(index, [QUESTION]).counts.tolist() == [6]
    everything = index_of(texts)
    assert find(everything, [prompt]).counts[0] > 0
    assert everything.items[0].num_ngrams == index.items[0].num_ngrams + index.num_ignored


def test_without_sets_nothing_is_found() -> None:
    found = find(EvalIndex.load(DecontaminationConfig()), [QUESTION, ""])
    assert found.counts.tolist() == [0, 0]
    assert len(found.pairs) == 0


def plain(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


WORDS = st.lists(st.sampled_from(["a", "b", "Ab", "ba", "-", ", "]), max_size=12).map(" ".join)


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, max_size=4), st.integers(2, 5))
def test_counts_and_pairs_are_those_of_plain_python(
    tmp_path_factory: pytest.TempPathFactory, items: list[str], texts: list[str], size: int
) -> None:
    path = write_items(tmp_path_factory.mktemp("set") / "set.jsonl", [{"t": text} for text in items])
    cfg = DecontaminationConfig(
        sets=[EvaluationConfig(path=path, fields=["t"])], ngram_words=size, min_words=1
    )
    grams: list[set[tuple[str, ...]]] = []
    for text in items:
        words = plain(text)
        length = min(size, len(words))
        if words:
            grams.append({tuple(words[at : at + length]) for at in range(len(words) - length + 1)})
    if not grams:
        with pytest.raises(DataError, match="none with a text of 1 words"):
            EvalIndex.load(cfg)
        return
    index = EvalIndex.load(cfg)
    assert [item.num_ngrams for item in index.items] == [len(one) for one in grams]
    found = find(index, texts)
    everything = set().union(*grams)
    for number, text in enumerate(texts):
        words = plain(text)
        held = {tuple(words[at : at + n]) for n in range(1, size + 1) for at in range(len(words) - n + 1)}
        ends = [
            any(tuple(words[end - n : end]) in everything for n in range(1, min(size, end) + 1))
            for end in range(1, len(words) + 1)
        ]
        assert found.counts[number] == sum(ends)
        for item, one in enumerate(grams):
            rows = found.pairs[(found.pairs["document"] == number) & (found.pairs["item"] == item)]
            assert len(rows) == len(one & held)


def test_many_findings_in_a_batch(index_of: Any) -> None:
    index = index_of([QUESTION])
    found = find(index, [QUESTION] * 1000)
    assert (found.counts == 6).all()
    assert len(found.pairs) == 6000


def test_the_report_names_items_and_documents(index_of: Any) -> None:
    index = index_of([QUESTION, FILLER, "short"])
    found = find(
        index, [FILLER.replace("cold", "warm") + " " + QUESTION, "nothing", QUESTION.replace("red", "big")]
    )
    report = index.report(found.pairs, ["d0", "d1", "d2"])
    assert report["sets"] == {
        "set": {"items": 2, "items_too_short": 1, "items_found": 2, "items_half_found": 1}
    }
    assert report["items"][0] == {
        "set": "set", "id": "0", "words": 18, "ngrams": 6, "ngrams_found": 6, "share": 1.0,
        "num_documents": 2, "documents": [{"id": "d0", "ngrams": 6}, {"id": "d2", "ngrams": 2}],
    }  # fmt: skip
    assert (report["items"][1]["id"], report["items"][1]["num_documents"]) == ("1", 1)
    assert report["items"][1]["share"] == pytest.approx(1 / 6)
    assert index.report(found.pairs[:0], [])["items"] == []


def test_a_dataset_on_disk_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"question": [QUESTION]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "split"))
    for folder, split in (("one", "test"), ("split", "validation")):
        one = EvaluationConfig(dataset=str(tmp_path / folder), split=split, fields=["question"])
        index = EvalIndex.load(DecontaminationConfig(sets=[one]))
        assert find(index, [QUESTION]).counts.tolist() == [6]
    one = EvaluationConfig(dataset=str(tmp_path / "split"), fields=["question"])
    with pytest.raises(DataError, match=r"split: unknown split 'test'; known: validation"):
        EvalIndex.load(DecontaminationConfig(sets=[one]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"set\.jsonl, line 2: not JSON"),
        ("[1]", r"item 1 of the evaluation set s is list, not an object"),
        (
            '{"texts": "x"}',
            r"item 1 of the evaluation set s lacks 'text': unknown field 'text'; did you mean 'texts'",
        ),
        ('{"text": 3}', r"item 1 of the evaluation set s: 'text' is int, not text or a list of texts"),
    ],
)
def test_bad_items_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": QUESTION}) + "\n" + line + "\n", encoding="utf-8")
    one = EvaluationConfig(path=str(path), fields=["text"], name="s")
    with pytest.raises(DataError, match=message):
        EvalIndex.load(DecontaminationConfig(sets=[one]))


def test_sets_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    for one, message in (
        ({"path": str(tmp_path / "none.jsonl")}, r"cannot read .*none\.jsonl: No such file"),
        ({"dataset": str(tmp_path / "none")}, r"the evaluation set .*none cannot be opened"),
        (
            {"path": write_items(tmp_path / "short.jsonl", [{"text": "too short"}, {"text": None}])},
            r"short\.jsonl has 2 items and none with a text of 5 words in the fields \['text'\]",
        ),
    ):
        with pytest.raises(DataError, match=message):
            EvalIndex.load(DecontaminationConfig(sets=[EvaluationConfig(**one, fields=["text"])]))


@pytest.mark.skipif(not EVAL.exists(), reason=f"the evaluation sets {EVAL} are not here")
def test_planted_items_of_real_sets_are_found_and_nothing_else() -> None:
    cfg = DecontaminationConfig(
        sets=[
            EvaluationConfig(
                path=str(EVAL / "gsm8k_test.jsonl.gz"), fields=["question", "answer"], name="gsm8k"
            ),
            EvaluationConfig(
                path=str(EVAL / "humaneval.jsonl.gz"),
                fields=["prompt", "canonical_solution"],
                joined=True,
                id_field="task_id",
                name="humaneval",
            ),
        ]
    )
    index = EvalIndex.load(cfg)
    assert len(index.items) == 1319 + 164
    with gzip.open(EVAL / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as handle:
        questions = [json.loads(line)["question"] for line in handle]
    with gzip.open(EVAL / "humaneval.jsonl.gz", "rt", encoding="utf-8") as handle:
        tasks = [json.loads(line) for line in handle]
    texts = [
        FILLER,
        f"{FILLER}\n{questions[7]}\n{FILLER}",
        f"x = 1\n{tasks[3]['prompt']}{tasks[3]['canonical_solution']}",
    ]
    found = find(index, texts)
    assert found.counts[0] == 0
    report = index.report(found.pairs, ["a", "b", "c"])
    rows = {(row["set"], row["id"]): row for row in report["items"]}
    assert rows["humaneval", tasks[3]["task_id"]]["share"] == 1
    assert rows["humaneval", tasks[3]["task_id"]]["documents"][0]["id"] == "c"
    assert rows["gsm8k", "7"]["documents"] == [{"id": "b", "ngrams": rows["gsm8k", "7"]["ngrams_found"]}]
    assert report["sets"]["gsm8k"]["items_found"] == 1
