"""FineWeb's own rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6), on what the line edits left.

The numbers are taken as datatrove 0.10.1 pipeline/filters/fineweb_quality_filter.py takes them.
"""

from __future__ import annotations

from llmtrain.data.filters.rule import Bound, Rule

_PAPER = "Penedo et al. 2024 (FineWeb, arXiv:2406.17557), section 3.6"

RULES = (
    Rule(
        reason="few_terminal_lines",
        setting="min_edited_terminal_line_fraction",
        bound=Bound.at_least,
        counted=("edited_num_terminal_lines",),
        over="edited_num_lines",
        source=_PAPER,
    ),
    Rule(
        reason="short_lines",
        setting="max_edited_short_line_fraction",
        bound=Bound.at_most,
        counted=("edited_num_short_lines",),
        over="edited_num_lines",
        source=_PAPER,
    ),
    Rule(
        reason="edited_duplicate_line_chars",
        setting="max_edited_duplicate_line_char_fraction",
        bound=Bound.at_most,
        counted=("edited_num_duplicate_line_chars",),
        over="edited_num_chars",
        less="edited_num_newlines",
        source=_PAPER,
    ),
    Rule(
        reason="many_newlines",
        setting="max_edited_newline_word_ratio",
        bound=Bound.at_most,
        counted=("edited_num_newlines",),
        over="edited_num_segments",
        source="datatrove 0.10.1 fineweb_quality_filter.py, new_line_ratio; not in the paper",
    ),
)
