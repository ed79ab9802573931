"""Histograms of what rules compare, with the bounds in force."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from llmtrain.data.facts import KEPT, FactsBuilder, Scale
from llmtrain.data.filters.chain import RULES, dropped_by
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.measures import measures_of, values_of
from llmtrain.data.filters.rule import Bound

ALL_OFF = RulesConfig(**{field.name: None for field in fields(RulesConfig) if "dedup" not in field.name})


def columns(num_documents: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    names = {name for rule in RULES for name in rule.signals}
    return {name: draw.integers(0, 200, num_documents) for name in sorted(names)}


def test_every_rule_on_numbers_is_in_one_measure() -> None:
    measures = measures_of(ALL_OFF)
    assert len({measure.name for measure in measures}) == len(measures)
    assert {rule.formula for rule in RULES if rule.bound is not Bound.one_of} == {m.name for m in measures}
    assert not any(measure.thresholds for measure in measures)
    assert set(values_of(columns(3))) == {measure.name for measure in measures}


def test_rules_on_the_same_number_share_a_measure() -> None:
    [words] = [
        measure
        for measure in measures_of(RulesConfig(min_words=50, max_words=900))
        if measure.name == "num_words"
    ]
    assert (words.title, words.unit, words.scale) == ("words", "words", Scale.count)
    assert [(t.setting, t.value, t.drops, t.reason) for t in words.thresholds] == [
        ("rules.min_words", 50.0, "below", "too_short"),
        ("rules.max_words", 900.0, "above", "too_long"),
    ]


def test_titles_and_units_are_words() -> None:
    named = {measure.name: measure for measure in measures_of(ALL_OFF)}
    length = named["num_word_chars / num_words"]
    assert (length.title, length.scale) == ("word characters / words", Scale.amount)
    lines = named["num_duplicate_lines / num_lines"]
    assert (lines.unit, lines.scale) == ("share of lines", Scale.fraction)


def test_a_measure_without_its_signals_has_no_values() -> None:
    assert list(values_of({"num_words": np.array([1])})) == ["num_words"]


def test_the_side_of_a_threshold_holds_what_its_rule_drops() -> None:
    """For every rule alone: kept documents lie on one side of it, dropped ones on the other."""
    signals = columns(400)
    for rule in RULES:
        if rule.bound is Bound.one_of:
            continue
        bound = 0.25 if rule.setting.endswith(("_fraction", "_ratio", "_score", "_quality")) else 40
        cfg = RulesConfig(**{**vars(ALL_OFF), rule.setting: bound})
        [(reason, mask)] = dropped_by(signals, cfg)
        builder = FactsBuilder([reason], measures_of(cfg))
        builder.add_unit(
            first=0,
            ids=np.zeros((400, 16), dtype=np.uint8),
            num_bytes=np.ones(400, dtype=np.int64),
            reason=np.where(mask, 0, KEPT),
            source=["s"] * 400,
            values=values_of(signals),
        )
        counts = builder.histograms[rule.formula].counts
        assert counts.sum(axis=1).tolist() == [(~mask).sum(), mask.sum()], rule.setting
        assert not (counts[0] * counts[1]).any(), rule.setting
