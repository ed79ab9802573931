"""All rules in the order in which a document meets them, and what they drop.

Rules are pure functions of signals: a changed bound never reads text again. A document's reason is the first
rule that drops it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.filters import c4, code, dclm, fineweb, gopher
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.rule import Bound, Rule
from llmtrain.errors import DataError

Signals = Mapping[str, npt.NDArray[Any]]
"""A column a signal. `language` holds codes (text); every other one numbers."""

_SOURCE_RULES = (
    Rule(
        reason="url_blocked",
        setting="max_blocked_urls",
        bound=Bound.at_most,
        counted=("url_blocked",),
        source="Penedo et al. 2023 (RefinedWeb, arXiv:2306.01116), section 3.1 and G.1",
    ),
    Rule(
        reason="wrong_language",
        setting="languages",
        bound=Bound.one_of,
        counted=("language",),
        source="Penedo et al. 2023 (RefinedWeb, arXiv:2306.01116), section 3.1",
    ),
    Rule(
        reason="low_language_score",
        setting="min_language_score",
        bound=Bound.at_least,
        counted=("language_score",),
        source="Penedo et al. 2024 (FineWeb, arXiv:2406.17557), section 3.3: 0.65",
    ),
)
_MODEL_RULES = (
    Rule(
        reason="low_quality",
        setting="min_quality",
        bound=Bound.at_least,
        counted=("quality",),
        source="Li et al. 2024 (DCLM, arXiv:2406.11794), section 4.4",
    ),
    Rule(
        reason="contaminated",
        setting="max_contaminated_ngrams",
        bound=Bound.at_most,
        counted=("num_contaminated_ngrams",),
        source="Brown et al. 2020 (GPT-3, arXiv:2005.14165), appendix C: 13-grams",
    ),
)

RULES = (
    *_SOURCE_RULES,
    *gopher.QUALITY_RULES,
    *gopher.REPETITION_RULES,
    *c4.RULES,
    *fineweb.RULES,
    *dclm.RULES,
    *code.RULES,
    *_MODEL_RULES,
)
SETTING_OF_REASON = {rule.reason: rule.setting for rule in RULES}


def value(rule: Rule, signals: Signals) -> npt.NDArray[np.float64]:
    """The number that the rule compares, for every document; NaN for a rule on text (`one of`).

    Raises:
        DataError: `signals` lacks a column.
    """
    for name in rule.signals:
        if name not in signals:
            raise DataError(
                f"the rule {rule.reason} (rules.{rule.setting}) needs the signal {name}, which these "
                f"documents do not have; switch on what measures it, or set rules.{rule.setting}=null"
            )
    if rule.bound is Bound.one_of:
        return np.full(len(signals[rule.counted[0]]), np.nan)
    counted: npt.NDArray[Any] = sum((signals[name] for name in rule.counted[1:]), signals[rule.counted[0]])
    if rule.over is None:
        return counted.astype(np.float64)
    over = signals[rule.over]
    if rule.less is not None:
        over = over - signals[rule.less]
    return counted / np.maximum(over, 1)


def dropped_by(signals: Signals, cfg: RulesConfig) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Yield the reason of every rule that is on, and the documents it drops. A value equal to a bound stays.

    Raises:
        DataError: a rule is on whose signal is not there.
    """
    for rule in RULES:
        bound = getattr(cfg, rule.setting)
        if bound is None:
            continue
        values = value(rule, signals)
        if rule.bound is Bound.one_of:
            yield rule.reason, ~np.isin(signals[rule.counted[0]], bound)
        elif rule.bound is Bound.at_least:
            yield rule.reason, ~(values >= bound)  # a score that is no number drops too
        else:
            yield rule.reason, ~(values <= bound)
