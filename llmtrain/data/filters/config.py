"""Settings of the rules: bounds on signals. stdlib only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class RulesConfig:
    """Bounds on a document's signals; null switches one off. A value equal to a bound is kept.

    Lengths: Rae et al. 2021 (Gopher, arXiv:2112.11446), section A.1.1. Repetition: its table A1.
    Fractions of characters count every character of the document, white space too.
    """

    min_words: int | None = 50
    """Words, split on white space."""
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    """Characters a word."""
    max_mean_word_length: float | None = 10.0
    max_duplicate_line_fraction: float | None = 0.30
    """Non-empty lines that were there before, over all of them."""
    max_duplicate_line_char_fraction: float | None = 0.20
    max_duplicate_paragraph_fraction: float | None = 0.30
    """Paragraphs (between blank lines) that were there before, over all of them."""
    max_duplicate_paragraph_char_fraction: float | None = 0.20
    max_top_2gram_char_fraction: float | None = 0.20
    """Characters inside the word pair that occurs most often, if it occurs twice."""
    max_top_3gram_char_fraction: float | None = 0.18
    max_top_4gram_char_fraction: float | None = 0.16
    exact_dedup: bool = True
    """Whether of documents with equal normalised text only the one with the smallest id stays."""

    def __post_init__(self) -> None:
        for low, high in (("min_words", "max_words"), ("min_mean_word_length", "max_mean_word_length")):
            at_least, at_most = getattr(self, low), getattr(self, high)
            if at_least is not None and at_most is not None and at_least > at_most:
                raise ConfigError(
                    f"rules.{low}={at_least} is above rules.{high}={at_most}; null switches one off"
                )
        for name, value in asdict(self).items():
            if name.endswith("_fraction") and value is not None and not 0 <= value <= 1:
                raise ConfigError(f"rules.{name}={value} must lie in 0..1, or be null to switch the rule off")
