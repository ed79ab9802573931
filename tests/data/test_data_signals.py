from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.content.config import (
    ContentConfig,
    DecontaminationConfig,
    EvaluationConfig,
    LanguageConfig,
    PiiConfig,
    UrlsConfig,
)
from llmtrain.data.dedup.config import LineConfig, NgramConfig
from llmtrain.data.document import normalize
from llmtrain.data.filters.config import EditsConfig
from llmtrain.data.signals import Measured, SignalsConfig, Tools, measure_batch

SPACES = "\n\n\t  \r\x85\u00a0\u2003\u2028\u3000\u205f\u1680"
ALPHABET = f"{SPACES}ab B.\x00\x0b\x0c\x1f\x7f\ufeffé\u0301e日😀\u2581\u0300"
TEXT = st.text(alphabet=ALPHABET, max_size=80) | st.text(max_size=40)


def settings_of(**changes: object) -> SignalsConfig:
    values = {
        "edits": EditsConfig(), "measure": True, "content": ContentConfig(), "num_permutations": 0,
        "shingle_words": 5, "lines": LineConfig(), "ngrams": NgramConfig(),
    }  # fmt: skip
    return SignalsConfig(**(values | changes))  # type: ignore[arg-type]


def measured(texts: list[str | bytes], cfg: SignalsConfig | None = None) -> Measured:
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return measure_batch(raw, [None] * len(raw), Tools(cfg or settings_of()))


def texts_of(found: Measured) -> list[str]:
    return [found.text[a:b].tobytes().decode() for a, b in pairwise(found.offsets.tolist())]


@given(st.lists(TEXT, max_size=5))
@example(["\r\x00\n", "e\x00\u0301", "\ufeff\n x \n", "\u2000", "\x85a"])
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_scan_normalises_as_the_definition_says(texts: list[str]) -> None:
    assert texts_of(measured(texts)) == [normalize(text) for text in texts]


@given(TEXT)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)


def test_text_that_is_not_utf8_is_set_apart_with_its_reason() -> None:
    found = measured([b"good", b"bad \xff", "gut ä"])
    assert found.kept == [0, 2]
    assert "0xff" in found.invalid[1]
    assert texts_of(found) == ["good", "gut ä"]


def everything_on(tmp_path) -> SignalsConfig:
    items = tmp_path / "items.jsonl"
    items.write_text('{"question": "how many legs do seven grey cats have when two of them sleep"}\n')
    blocked = tmp_path / "blocked.txt"
    blocked.write_text("bad.example\n")
    edits = EditsConfig(
        strip_lines=True,
        max_blank_lines=0,
        terminal_marks=".?!",
        min_words_per_line=3,
        count_page_signals=True,
    )
    content = ContentConfig(
        language=LanguageConfig(enabled=True),
        pii=PiiConfig(email="<EMAIL>"),
        urls=UrlsConfig(block=[str(blocked)]),
        decontamination=DecontaminationConfig(sets=[EvaluationConfig(path=str(items), fields=["question"])]),
    )
    lines, ngrams = LineConfig(enabled=True, min_chars=5), NgramConfig(enabled=True, num_words=3)
    return settings_of(edits=edits, content=content, num_permutations=16, lines=lines, ngrams=ngrams)


def test_a_document_comes_out_the_same_in_any_company(tmp_path, texts: list[str]) -> None:
    tools = Tools(everything_on(tmp_path))
    batch = [
        *texts[:12], "Mail me at jane.doe@mail.com about it.\nshort\nA line that stays here.",
        "Tell me: how many legs do seven grey cats have when two of them sleep? I do not know.",
        "", "Ein kurzer deutscher Satz, der bleibt.",
    ]  # fmt: skip
    raw, urls = [text.encode() for text in batch], ["http://www.bad.example/x", *[None] * (len(batch) - 1)]
    together = measure_batch(list(raw), urls, tools)
    for number, (text, url) in enumerate(zip(raw, urls, strict=True)):
        alone = measure_batch([text], [url], tools)
        assert texts_of(alone) == texts_of(together)[number : number + 1]
        assert alone.content == together.content[number : number + 1]
        assert alone.languages == together.languages[number : number + 1]
        for name, values in together.columns.items():
            np.testing.assert_array_equal(alone.columns[name], values[number : number + 1], err_msg=name)
        np.testing.assert_array_equal(alone.signatures[0], together.signatures[number])
        lines = together.lines[together.lines["row"] == number]
        assert alone.lines[["hash", "start", "end"]].tolist() == lines[["hash", "start", "end"]].tolist()
    assert together.columns["url_blocked"].tolist() == [True] + [False] * (len(batch) - 1)
    assert "<EMAIL>" in texts_of(together)[12]
    assert "short" not in texts_of(together)[12]
    assert together.columns["num_contaminated_ngrams"][13] > 0
    assert together.languages[-1] == "de"


def test_bytes_before_and_after_edits_and_masks_add_up(tmp_path, texts: list[str]) -> None:
    found = measured([*texts[:20], "jane.doe@mail.com said so to me.\nx\n"], everything_on(tmp_path))
    removed = sum(
        values for name, values in found.columns.items() if name.startswith("removed_") and "bytes" in name
    )
    left = found.columns["clean_bytes"] - removed
    masked = len("jane.doe@mail.com") - len("<EMAIL>")
    assert (left[:-1] == found.columns["num_bytes"][:-1]).all()
    assert left[-1] - masked == found.columns["num_bytes"][-1]


@pytest.mark.parametrize("number", [0, 1])
def test_no_documents_give_no_rows(number: int) -> None:
    found = measured([b"\xff"] * number)
    assert len(found.kept) == 0
    assert all(len(values) == 0 for values in found.columns.values())
