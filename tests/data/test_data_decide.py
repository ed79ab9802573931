from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.config import HeldOutConfig
from llmtrain.data.decide import KEPT, Verdicts, decide
from llmtrain.data.dedup.exact import survivors
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.gopher import SETTING_OF_REASON
from llmtrain.data.text.kernels import SIGNALS
from llmtrain.errors import ConfigError, DataError

NO_RULES = RulesConfig(**{field.name: None for field in fields(RulesConfig) if field.name != "exact_dedup"})


def digests(numbers: list[int]) -> np.ndarray:
    """One 16-byte digest a number; their order is not the numbers'."""
    return np.array(
        [[(number * 37 + at * 11) % 251 for at in range(16)] for number in numbers], dtype=np.uint8
    ).reshape(-1, 16)


def random_digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, 16), dtype=np.uint8)


def columns(count: int, **values: int) -> dict[str, np.ndarray]:
    """Signals of `count` ordinary documents; the first one has `values`."""
    ordinary = {
        "num_chars": 1000,
        "num_words": 100,
        "num_word_chars": 500,
        "num_lines": 10,
        "num_paragraphs": 10,
    }
    found = {name: np.full(count, ordinary.get(name, 0), dtype=np.int64) for name in (*SIGNALS, "num_bytes")}
    found["num_bytes"][:] = 1000
    for name, value in values.items():
        found[name][0] = value
    return found


def reason_of_first(rules: RulesConfig, **values: int) -> str | None:
    verdicts = decide(columns(9, **values), random_digests(9), random_digests(9, 1), rules, HeldOutConfig())
    number = int(verdicts.reason[0])
    return None if number == KEPT else verdicts.reasons[number]


@pytest.mark.parametrize(
    ("reason", "at_bound", "beyond"),
    [
        ("too_short", {"num_words": 50, "num_word_chars": 250}, {"num_words": 49, "num_word_chars": 250}),
        (
            "too_long",
            {"num_words": 100_000, "num_word_chars": 500_000},
            {"num_words": 100_001, "num_word_chars": 500_000},
        ),
        ("short_words", {"num_word_chars": 300}, {"num_word_chars": 299}),
        ("long_words", {"num_word_chars": 1000}, {"num_word_chars": 1001}),
        ("duplicate_lines", {"num_duplicate_lines": 3}, {"num_duplicate_lines": 4}),
        ("duplicate_line_chars", {"num_duplicate_line_chars": 200}, {"num_duplicate_line_chars": 201}),
        ("duplicate_paragraphs", {"num_duplicate_paragraphs": 3}, {"num_duplicate_paragraphs": 4}),
        (
            "duplicate_paragraph_chars",
            {"num_duplicate_paragraph_chars": 200},
            {"num_duplicate_paragraph_chars": 201},
        ),
        ("top_2gram", {"top_2gram_chars": 200}, {"top_2gram_chars": 201}),
        ("top_3gram", {"top_3gram_chars": 180}, {"top_3gram_chars": 181}),
        ("top_4gram", {"top_4gram_chars": 160}, {"top_4gram_chars": 161}),
    ],
)
def test_bounds_are_inclusive_and_null_switches_them_off(
    reason: str, at_bound: dict[str, int], beyond: dict[str, int]
) -> None:
    assert reason_of_first(RulesConfig(), **at_bound) is None
    assert reason_of_first(RulesConfig(), **beyond) == reason
    assert reason_of_first(NO_RULES, **beyond) is None


def test_every_rule_has_a_setting() -> None:
    settings = {field.name for field in fields(RulesConfig)} - {"exact_dedup"}
    assert set(SETTING_OF_REASON.values()) <= settings


def test_a_document_without_words_is_empty_even_without_rules() -> None:
    assert reason_of_first(NO_RULES, num_words=0) == "empty"


def test_a_document_is_dropped_for_one_reason_the_first() -> None:
    found = columns(9, num_words=3, num_word_chars=3, num_duplicate_lines=9)
    verdicts = decide(found, random_digests(9), random_digests(9, 1), RulesConfig(), HeldOutConfig())
    assert verdicts.dropped(found["num_bytes"]) == {"too_short": {"documents": 1, "bytes": 1000}}


CONTENTS = st.lists(st.integers(0, 4), max_size=12)


@given(CONTENTS, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_dedup_is_idempotent_and_order_free(contents: list[int], shuffle: object) -> None:
    content, ids = digests(contents), random_digests(len(contents))
    alive = np.ones(len(contents), dtype=np.bool_)
    kept = survivors(content, ids, alive)
    assert kept.sum() == len(set(contents))
    assert (survivors(content, ids, kept) == kept).all()
    for number in np.flatnonzero(kept):
        twins = [ids[at].tobytes() for at in range(len(contents)) if contents[at] == contents[number]]
        assert ids[number].tobytes() == min(twins)
    order = np.random.default_rng(len(contents)).permutation(len(contents))
    assert (survivors(content[order], ids[order], alive) == kept[order]).all()


def test_a_dropped_document_does_not_take_its_twin_along() -> None:
    content, ids = digests([1, 1]), np.array([[0] * 16, [9] * 16], dtype=np.uint8)
    assert survivors(content, ids, np.array([False, True])).tolist() == [False, True]


def held_out_of(content: np.ndarray, held_out: HeldOutConfig) -> Verdicts:
    count = len(content)
    return decide(columns(count), content, random_digests(count, 1), RulesConfig(), held_out)


def test_the_held_out_split_follows_the_text_not_the_order() -> None:
    content = random_digests(2000)
    verdicts = held_out_of(content, HeldOutConfig(fraction=0.1))
    assert 140 < verdicts.is_held_out.sum() < 260  # 200 expected, 4.5 standard deviations
    backwards = held_out_of(content[::-1].copy(), HeldOutConfig(fraction=0.1))
    assert (backwards.is_held_out[::-1] == verdicts.is_held_out).all()
    other = held_out_of(content, HeldOutConfig(fraction=0.1, seed=1))
    assert (other.is_held_out != verdicts.is_held_out).any()


def test_equal_texts_stay_on_one_side_of_the_split() -> None:
    signals, rules = columns(30), RulesConfig(exact_dedup=False)
    signals["num_bytes"][:] = 100
    contents = digests([number // 5 for number in range(30)])
    for max_bytes in range(50, 3000, 50):
        held_out = HeldOutConfig(fraction=0.9, max_bytes=max_bytes)
        verdicts = decide(signals, contents, random_digests(30), rules, held_out)
        by_text = verdicts.is_held_out.reshape(6, 5)
        assert (by_text == by_text[:, :1]).all()
        assert 0 < by_text.sum() <= max(max_bytes // 100, 5)
    with pytest.raises(
        DataError, match="30 of 30 documents are left, all of the same text, and two different"
    ):
        decide(signals, digests([1] * 30), random_digests(30), rules, HeldOutConfig())


def test_the_held_out_split_has_a_bound_and_never_less_than_one_document() -> None:
    content = random_digests(2000)
    assert held_out_of(content, HeldOutConfig(fraction=0.5, max_bytes=3500)).is_held_out.sum() == 3
    assert held_out_of(content, HeldOutConfig(fraction=0.5, max_bytes=1)).is_held_out.sum() == 1
    assert held_out_of(content[:2], HeldOutConfig(fraction=1e-9)).is_held_out.sum() == 1
    assert held_out_of(content[:2], HeldOutConfig(fraction=0.999)).is_held_out.sum() == 1


def test_when_nothing_is_left_the_message_counts_the_reasons() -> None:
    found = columns(4)
    found["num_words"][:3] = 2
    found["num_words"][3] = 0
    with pytest.raises(
        DataError, match=r"0 of 4 documents are left.*too_short 3, empty 1.*rules.min_words=50"
    ):
        decide(found, random_digests(4), random_digests(4, 1), RulesConfig(), HeldOutConfig())


def test_one_document_left_is_too_few() -> None:
    with pytest.raises(
        DataError, match=r"1 of 3 documents are left, and two different ones are needed.*duplicate 2$"
    ):
        decide(columns(3), digests([7, 7, 7]), random_digests(3), RulesConfig(), HeldOutConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_words": 9, "max_words": 5}, "rules.min_words=9 is above rules.max_words=5"),
        ({"max_top_2gram_char_fraction": 1.5}, "rules.max_top_2gram_char_fraction=1.5 must lie in 0..1"),
    ],
)
def test_bounds_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RulesConfig(**settings)  # type: ignore[arg-type]
