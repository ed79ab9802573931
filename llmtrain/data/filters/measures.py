"""What the report draws of the rules: each number that one of them compares, with the bounds in force.

Rules that look at the same number share a histogram. A rule that is off has one too, without a threshold, so
that a bound can be chosen from what is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.facts import Measure, Scale, Threshold
from llmtrain.data.filters.chain import RULES, Signals, value
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.rule import Bound, Rule

_IN_0_TO_1 = ("_fraction", "_ratio", "_score", "_quality")
"""Endings of settings whose values are, or nearly always are, between 0 and 1."""


def measures_of(cfg: RulesConfig) -> list[Measure]:
    """One measure for each number that rules compare, in the order of the rules. Its name is the formula."""
    return [
        Measure(
            name=rules[0].formula,
            title=_in_words(rules[0].formula),
            unit=_unit(rules[0]),
            scale=_scale(rules[0]),
            thresholds=tuple(
                Threshold(
                    reason=rule.reason,
                    setting=f"rules.{rule.setting}",
                    value=float(bound),
                    drops="below" if rule.bound is Bound.at_least else "above",
                    source=rule.source,
                )
                for rule in rules
                if (bound := getattr(cfg, rule.setting)) is not None
            ),
        )
        for rules in _by_formula().values()
    ]


def values_of(signals: Signals) -> dict[str, npt.NDArray[np.float64]]:
    """Values of all measures whose signals are there, by name: `values` of `FactsBuilder.add_unit`."""
    return {
        formula: value(rules[0], signals)
        for formula, rules in _by_formula().items()
        if all(name in signals for name in rules[0].signals)
    }


def _by_formula() -> dict[str, list[Rule]]:
    found: dict[str, list[Rule]] = {}
    for rule in RULES:
        if rule.bound is not Bound.one_of:
            found.setdefault(rule.formula, []).append(rule)
    return found


def _scale(rule: Rule) -> Scale:
    if rule.setting.endswith(_IN_0_TO_1):
        return Scale.fraction
    return Scale.count if rule.over is None else Scale.amount


def _unit(rule: Rule) -> str:
    if rule.over is not None and rule.setting.endswith("_fraction"):
        return f"share of {_in_words(rule.over)}"
    return _in_words(rule.formula)


def _in_words(formula: str) -> str:
    """`num_word_chars / num_words` as `word characters / words`."""
    swapped: dict[str, Any] = {"chars": "characters", "num": None}
    words = formula.replace("_", " ").replace("(", "( ").split()
    return " ".join(swapped.get(word, word) for word in words if swapped.get(word, word)).replace("( ", "(")
