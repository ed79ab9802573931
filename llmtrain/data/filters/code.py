"""Rules for files of source code: those that Codex began with and The Stack's and RedPajama's code share."""

from __future__ import annotations

from llmtrain.data.filters.rule import Bound, Rule

_CODE = (
    "Chen et al. 2021 (Codex, arXiv:2107.03374), section 3.1; bigcode-project/bigcode-dataset@1bf72fa9 "
    "preprocessing/arguments.py; togethercomputer/RedPajama-Data@f54b86f2 github_run_filter.py"
)

RULES = (
    Rule(
        reason="long_line",
        setting="max_line_chars",
        bound=Bound.at_most,
        counted=("longest_line_chars",),
        source=_CODE,
    ),
    Rule(
        reason="long_lines",
        setting="max_mean_line_chars",
        bound=Bound.at_most,
        counted=("num_line_chars",),
        over="num_all_lines",
        source=_CODE,
    ),
    Rule(
        reason="few_alphanumeric_chars",
        setting="min_alphanumeric_char_fraction",
        bound=Bound.at_least,
        counted=("num_alphanumeric_chars",),
        over="num_chars",
        source=_CODE,
    ),
    Rule(
        reason="few_alphabetic_chars",
        setting="min_alphabetic_char_fraction",
        bound=Bound.at_least,
        counted=("num_alphabetic_chars",),
        over="num_chars",
        source="bigcode-project/bigcode-dataset@014784c5 preprocessing/filtering.py, the alpha filter",
    ),
)
