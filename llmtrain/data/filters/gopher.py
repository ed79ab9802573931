"""Quality and repetition rules of Gopher (Rae et al. 2021, arXiv:2112.11446, section A.1.1 and table A1).

What counts as word, line and paragraph, and how the numbers are taken, is as datatrove 0.10.1 has it
(pipeline/filters/gopher_quality_filter.py, gopher_repetition_filter.py): docs/data_rules.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.rule import Bound, Rule

_QUALITY = "Rae et al. 2021 (arXiv:2112.11446), section A.1.1, quality filtering"
_REPETITION = "Rae et al. 2021 (arXiv:2112.11446), table A1"

QUALITY_RULES = (
    Rule(
        reason="too_short",
        setting="min_words",
        bound=Bound.at_least,
        counted=("num_words",),
        source=_QUALITY,
    ),
    Rule(
        reason="too_long",
        setting="max_words",
        bound=Bound.at_most,
        counted=("num_words",),
        source=_QUALITY,
    ),
    Rule(
        reason="short_words",
        setting="min_mean_word_length",
        bound=Bound.at_least,
        counted=("num_word_chars",),
        over="num_words",
        source=_QUALITY,
    ),
    Rule(
        reason="long_words",
        setting="max_mean_word_length",
        bound=Bound.at_most,
        counted=("num_word_chars",),
        over="num_words",
        source=_QUALITY,
    ),
    Rule(
        reason="many_hashes",
        setting="max_hash_word_ratio",
        bound=Bound.at_most,
        counted=("num_hashes",),
        over="num_segments",
        source=_QUALITY,
    ),
    Rule(
        reason="many_ellipses",
        setting="max_ellipsis_word_ratio",
        bound=Bound.at_most,
        counted=("num_ellipses",),
        over="num_segments",
        source=_QUALITY,
    ),
    Rule(
        reason="bullet_lines",
        setting="max_bullet_line_fraction",
        bound=Bound.at_most,
        counted=("num_bullet_lines",),
        over="num_all_lines",
        source=_QUALITY,
    ),
    Rule(
        reason="ellipsis_lines",
        setting="max_ellipsis_line_fraction",
        bound=Bound.at_most,
        counted=("num_ellipsis_lines",),
        over="num_all_lines",
        source=_QUALITY,
    ),
    Rule(
        reason="few_alphabetic_words",
        setting="min_alphabetic_word_fraction",
        bound=Bound.at_least,
        counted=("num_alphabetic_words",),
        over="num_segments",
        source=_QUALITY,
    ),
    Rule(
        reason="few_distinct_stop_words",
        setting="min_distinct_stop_words",
        bound=Bound.at_least,
        counted=("num_distinct_stop_words",),
        source=_QUALITY,
    ),
)
REPETITION_RULES = (
    Rule(
        reason="duplicate_lines",
        setting="max_duplicate_line_fraction",
        bound=Bound.at_most,
        counted=("num_duplicate_lines",),
        over="num_lines",
        source=_REPETITION,
    ),
    Rule(
        reason="duplicate_paragraphs",
        setting="max_duplicate_paragraph_fraction",
        bound=Bound.at_most,
        counted=("num_duplicate_paragraphs",),
        over="num_paragraphs",
        source=_REPETITION,
    ),
    Rule(
        reason="duplicate_line_chars",
        setting="max_duplicate_line_char_fraction",
        bound=Bound.at_most,
        counted=("num_duplicate_line_chars",),
        over="num_chars",
        source=_REPETITION,
    ),
    Rule(
        reason="duplicate_paragraph_chars",
        setting="max_duplicate_paragraph_char_fraction",
        bound=Bound.at_most,
        counted=("num_duplicate_paragraph_chars",),
        over="num_chars",
        source=_REPETITION,
    ),
    *(
        Rule(
            reason=f"top_{size}gram",
            setting=f"max_top_{size}gram_char_fraction",
            bound=Bound.at_most,
            counted=(f"top_{size}gram_chars",),
            over="num_chars",
            source=_REPETITION,
        )
        for size in (2, 3, 4)
    ),
    *(
        Rule(
            reason=f"duplicate_{size}gram",
            setting=f"max_duplicate_{size}gram_char_fraction",
            bound=Bound.at_most,
            counted=(f"duplicate_{size}gram_chars",),
            over="num_chars",
            source=_REPETITION,
        )
        for size in range(5, 11)
    ),
)

Columns = Mapping[str, npt.NDArray[np.int64]]
Mask = npt.NDArray[np.bool_]

UPPER_BOUNDS = (
    ("too_long", "max_words", "num_words", None),
    ("long_words", "max_mean_word_length", "num_word_chars", "num_words"),
    ("duplicate_lines", "max_duplicate_line_fraction", "num_duplicate_lines", "num_lines"),
    ("duplicate_line_chars", "max_duplicate_line_char_fraction", "num_duplicate_line_chars", "num_chars"),
    (
        "duplicate_paragraphs",
        "max_duplicate_paragraph_fraction",
        "num_duplicate_paragraphs",
        "num_paragraphs",
    ),
    (
        "duplicate_paragraph_chars",
        "max_duplicate_paragraph_char_fraction",
        "num_duplicate_paragraph_chars",
        "num_chars",
    ),
    ("top_2gram", "max_top_2gram_char_fraction", "top_2gram_chars", "num_chars"),
    ("top_3gram", "max_top_3gram_char_fraction", "top_3gram_chars", "num_chars"),
    ("top_4gram", "max_top_4gram_char_fraction", "top_4gram_chars", "num_chars"),
)
"""Reason, setting, signal, and the signal that it is divided by."""
LOWER_BOUNDS = (
    ("too_short", "min_words", "num_words", None),
    ("short_words", "min_mean_word_length", "num_word_chars", "num_words"),
)
SETTING_OF_REASON = {reason: setting for reason, setting, _, _ in (*LOWER_BOUNDS, *UPPER_BOUNDS)}


def dropped_by(signals: Columns, cfg: RulesConfig) -> Iterator[tuple[str, Mask]]:
    """Yield each rule's reason and the documents that it drops. A value equal to a bound stays."""
    for bounds, sign in ((LOWER_BOUNDS, -1), (UPPER_BOUNDS, 1)):
        for reason, setting, signal, divisor in bounds:
            bound = getattr(cfg, setting)
            if bound is not None:
                value: npt.NDArray[Any] = signals[signal]
                if divisor is not None:
                    value = value / np.maximum(signals[divisor], 1)
                yield reason, sign * value > sign * bound
