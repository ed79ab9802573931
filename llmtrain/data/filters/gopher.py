"""Quality and repetition rules of Gopher (Rae et al. 2021, arXiv:2112.11446, section A.1.1 and table A1).

What counts as word, line and paragraph, and how the numbers are taken, is as datatrove 0.10.1 has it
(pipeline/filters/gopher_quality_filter.py, gopher_repetition_filter.py): docs/data_rules.md.
"""

from __future__ import annotations

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
