"""Length and repetition rules of Gopher (Rae et al. 2021, arXiv:2112.11446, section A.1.1 and table A1).

Two differences from the paper: words are split on white space, and the repeated n-grams of 5 to 10 words
are left out. Signals are columns; each rule answers for all documents at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.filters.config import RulesConfig

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
