"""Rules that DCLM's reading of RefinedWeb has beyond Gopher's (Li et al. 2024, arXiv:2406.11794).

Bounds and order: mlfoundations/dclm@83830119 baselines_configs/dclm_baseline_refinedweb.yaml. Its line edits
are in text/edit.py.
"""

from __future__ import annotations

from llmtrain.data.filters.rule import Bound, Rule

_DCLM = "Li et al. 2024 (DCLM, arXiv:2406.11794); mlfoundations/dclm@83830119 dclm_baseline_refinedweb.yaml"

RULES = (
    Rule(
        reason="many_symbols",
        setting="max_symbol_word_ratio",
        bound=Bound.at_most,
        counted=("num_hashes", "num_ellipses"),
        over="num_segments",
        source=f"{_DCLM}, symbol_ratio_filter",
    ),
    Rule(
        reason="few_stop_words",
        setting="min_stop_words",
        bound=Bound.at_least,
        counted=("num_stop_words",),
        source=f"{_DCLM}, stop_word_filter with count_unique: False",
    ),
    Rule(
        reason="removed_words",
        setting="max_removed_word_fraction",
        bound=Bound.at_most,
        counted=("num_removed_line_words",),
        over="num_line_words",
        source=f"{_DCLM}, word_removal_ratio_filter; Penedo et al. 2023 (arXiv:2306.01116), section G.2",
    ),
)
