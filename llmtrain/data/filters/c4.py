"""Page rules of C4 (Raffel et al. 2020, JMLR 21(140), section 2.2) and mC4 (Xue et al. 2021,
arXiv:2010.11934).

They judge what C4's line edits (text/edit.py) left, as tensorflow/datasets@0560e686 text/c4_utils.py does.
"""

from __future__ import annotations

from llmtrain.data.filters.rule import Bound, Rule

_C4 = "Raffel et al. 2020 (JMLR 21(140)), section 2.2; tensorflow/datasets@0560e686 text/c4_utils.py"

RULES = (
    Rule(
        reason="lorem_ipsum",
        setting="max_lorem_ipsum_lines",
        bound=Bound.at_most,
        counted=("num_lorem_ipsum_lines",),
        source=_C4,
    ),
    Rule(
        reason="curly_bracket",
        setting="max_curly_bracket_lines",
        bound=Bound.at_most,
        counted=("num_curly_bracket_lines",),
        source=_C4,
    ),
    Rule(
        reason="bad_words",
        setting="max_bad_words",
        bound=Bound.at_most,
        counted=("num_bad_words",),
        source=_C4,
    ),
    Rule(
        reason="few_sentences",
        setting="min_sentences",
        bound=Bound.at_least,
        counted=("num_sentences",),
        source=_C4,
    ),
    Rule(
        reason="few_long_lines",
        setting="min_edited_third_longest_line_chars",
        bound=Bound.at_least,
        counted=("edited_third_longest_line_chars",),
        source="Xue et al. 2021 (mC4, arXiv:2010.11934), section 3.1",
    ),
)
