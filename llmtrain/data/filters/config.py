"""Settings of the rules: bounds on signals, and the line edits before them. stdlib only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class EditsConfig:
    """Lines that go before a document is judged, and parts of lines. All off: the text stays as it is.

    C4: Raffel et al. 2020 (JMLR 21(140), section 2.2) as the code that made the data set has it,
    tensorflow/datasets@0560e686 text/c4_utils.py. RefinedWeb: Penedo et al. 2023 (arXiv:2306.01116, section
    G.2) as mlfoundations/dclm@15af3ce5 baselines/mappers/modifiers.py has it. The order is fixed, and a line
    goes under the first that hits: docs/data_rules.md.
    """

    strip_lines: bool = False
    """White space at both ends of a line goes, and lines end wherever Python's str.splitlines ends them (C4).
    Off: lines end at a line feed only."""
    max_blank_lines: int | None = None
    """Blank lines in a row that stay; 0 removes all (C4). No other edit touches a blank line."""
    max_word_chars: int | None = None
    """A line with a longer word goes (C4: 1000)."""
    strip_citations: bool = False
    """`[12]`, `[]`, `[edit]` and `[citation needed]` go from a line (C4)."""
    terminal_marks: str | None = None
    """A line that does not end in one of these characters goes, and so does one that ends in `...`
    (C4: `.?!"`)."""
    min_words_per_line: int | None = None
    """A line with fewer words, split on white space, goes (C4: 5)."""
    drop_javascript_lines: bool = False
    """A line with `javascript`, in any case, goes (C4)."""
    drop_policy_lines: bool = False
    """A line with `terms of use`, `privacy policy`, `cookie policy`, `uses cookies`, `use of cookies` or `use
    cookies`, in any case, goes (C4)."""
    max_line_uppercase_fraction: float | None = None
    """A line with more capitals among its characters goes (DCLM: 0.5)."""
    drop_numeric_lines: bool = False
    """A line of digits alone goes (RefinedWeb)."""
    drop_counter_lines: bool = False
    """A line like `3 likes` or `1.2K shares` goes (RefinedWeb; the nouns are DCLM's)."""
    drop_one_word_lines: bool = False
    """A line with fewer than two words goes (RefinedWeb)."""
    max_navigation_line_words: int | None = None
    """From a line of at most so many words, `items in cart` anywhere, `read more...` at its end and `sign-in`
    at its start go, in any case; a line that is blank then goes (RefinedWeb: 10)."""
    count_page_signals: bool = False
    """Count sentences, and lines with `lorem ipsum` or a curly bracket. rules.min_sentences,
    rules.max_lorem_ipsum_lines and rules.max_curly_bracket_lines need it."""
    bad_words_file: str | None = None
    """Words and phrases to be counted for rules.max_bad_words, one a line; none is shipped."""
    bad_words_inside_words: bool = False
    """Find them inside words too, for languages without spaces (C4: Japanese, Thai, Chinese)."""
    short_line_chars: int = 30
    """A line of at most so many characters is short, for rules.max_edited_short_line_fraction (FineWeb)."""

    def __post_init__(self) -> None:
        for name in (
            "max_blank_lines",
            "max_word_chars",
            "min_words_per_line",
            "max_navigation_line_words",
            "short_line_chars",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"edits.{name}={value} must be 0 or more")
        share = self.max_line_uppercase_fraction
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"edits.max_line_uppercase_fraction={share} must lie in 0..1{_NULL}")
        if self.terminal_marks == "":
            raise ConfigError(f"edits.terminal_marks is empty: every line would go{_NULL}")


_NULL = ", or be null to switch it off"


@dataclass(kw_only=True)
class RulesConfig:
    """Bounds on a document's signals; null switches one off, and 0 is 0. A value equal to a bound is kept.

    Each rule with its source, formula and presets: docs/data_rules.md. Sets of bounds that were published:
    conf/rules/.
    """

    languages: list[str] | None = None
    """Codes of the languages that are kept."""
    min_language_score: float | None = None
    """Of the language that was found (FineWeb and DCLM: 0.65)."""
    max_blocked_urls: int | None = None
    """0 drops documents whose URL is on a block list."""

    min_words: int | None = None
    """Words that are not punctuation alone."""
    max_words: int | None = None
    min_mean_word_length: float | None = None
    """Characters a word."""
    max_mean_word_length: float | None = None
    max_hash_word_ratio: float | None = None
    """`#` signs over words and symbols."""
    max_ellipsis_word_ratio: float | None = None
    """`...` and `…` over words and symbols."""
    max_symbol_word_ratio: float | None = None
    """`#` signs and ellipses together, over words and symbols (DCLM)."""
    max_bullet_line_fraction: float | None = None
    """Lines that start with `•` or `-`."""
    max_ellipsis_line_fraction: float | None = None
    """Lines that end with `...` or `…`."""
    min_alphabetic_word_fraction: float | None = None
    """Words with a letter, over words and symbols."""
    min_distinct_stop_words: int | None = None
    """Different ones of the, be, to, of, and, that, have, with."""
    min_stop_words: int | None = None
    """The same words, each use counted (DCLM)."""

    max_duplicate_line_fraction: float | None = None
    """Non-empty lines that were there before, over all of them."""
    max_duplicate_paragraph_fraction: float | None = None
    """Paragraphs (between blank lines) that were there before, over all of them."""
    max_duplicate_line_char_fraction: float | None = None
    max_duplicate_paragraph_char_fraction: float | None = None
    max_top_2gram_char_fraction: float | None = None
    """Characters inside the word pair that occurs most often, if it occurs twice."""
    max_top_3gram_char_fraction: float | None = None
    max_top_4gram_char_fraction: float | None = None
    max_duplicate_5gram_char_fraction: float | None = None
    """Characters inside runs of five words that were there before."""
    max_duplicate_6gram_char_fraction: float | None = None
    max_duplicate_7gram_char_fraction: float | None = None
    max_duplicate_8gram_char_fraction: float | None = None
    max_duplicate_9gram_char_fraction: float | None = None
    max_duplicate_10gram_char_fraction: float | None = None

    max_lorem_ipsum_lines: int | None = None
    """0 drops documents with `lorem ipsum`."""
    max_curly_bracket_lines: int | None = None
    """0 drops documents with `{`."""
    min_sentences: int | None = None
    """In the lines that are left."""
    max_bad_words: int | None = None
    """Words of edits.bad_words_file in the lines that are left; 0 drops documents with one."""
    min_edited_third_longest_line_chars: int | None = None
    """200 asks for three lines of 200 characters (mC4)."""

    min_edited_terminal_line_fraction: float | None = None
    """Lines that end in a terminal mark of any script, among those that are left."""
    max_edited_short_line_fraction: float | None = None
    """Lines of at most edits.short_line_chars characters, among those that are left."""
    max_edited_duplicate_line_char_fraction: float | None = None
    """Characters in lines that were there before, among those that are left, line ends not counted."""
    max_edited_newline_word_ratio: float | None = None
    """Line ends over words and symbols, in what is left."""

    max_removed_word_fraction: float | None = None
    """Words that RefinedWeb's line edits took, over those they met."""

    max_line_chars: int | None = None
    """Characters of the longest line."""
    max_mean_line_chars: float | None = None
    """Characters a line, line ends not counted."""
    min_alphanumeric_char_fraction: float | None = None
    min_alphabetic_char_fraction: float | None = None
    """Letters alone; Python's `str.isalpha`."""

    min_quality: float | None = None
    """Score of the classifier of content.quality."""
    max_contaminated_ngrams: int | None = None
    """N-grams shared with an evaluation set; 0 drops every document that has one."""

    def __post_init__(self) -> None:
        for low, high in (("min_words", "max_words"), ("min_mean_word_length", "max_mean_word_length")):
            at_least, at_most = getattr(self, low), getattr(self, high)
            if at_least is not None and at_most is not None and at_least > at_most:
                raise ConfigError(
                    f"rules.{low}={at_least} is above rules.{high}={at_most}; null switches one off"
                )
        for name, value in asdict(self).items():
            if isinstance(value, bool | list) or value is None:
                continue
            if name.endswith("_fraction") and not 0 <= value <= 1:
                raise ConfigError(f"rules.{name}={value} must lie in 0..1, or be null to switch the rule off")
            if name != "min_quality" and not value >= 0:
                raise ConfigError(
                    f"rules.{name}={value} must be 0 or more, or be null to switch the rule off"
                )
        if self.languages == []:
            raise ConfigError("rules.languages is empty: every document would go; null keeps all languages")


def check_rules(rules: RulesConfig, edits: EditsConfig) -> None:
    """Raise if a rule asks for a signal that the edits do not count."""
    for name in ("min_sentences", "max_lorem_ipsum_lines", "max_curly_bracket_lines"):
        value = getattr(rules, name)
        if value is not None and not edits.count_page_signals:
            raise ConfigError(
                f"rules.{name}={value} needs edits.count_page_signals=true, which counts what it asks for"
            )
    if rules.max_bad_words is not None and edits.bad_words_file is None:
        raise ConfigError(
            f"rules.max_bad_words={rules.max_bad_words} needs edits.bad_words_file, with one word a line"
        )
    if rules.max_removed_word_fraction is not None and not _has_refinedweb_edits(edits):
        raise ConfigError(
            f"rules.max_removed_word_fraction={rules.max_removed_word_fraction} needs one of RefinedWeb's "
            f"edits: {', '.join(REFINEDWEB_EDITS)}"
        )


REFINEDWEB_EDITS = (
    "edits.max_line_uppercase_fraction",
    "edits.drop_numeric_lines",
    "edits.drop_counter_lines",
    "edits.drop_one_word_lines",
    "edits.max_navigation_line_words",
)


def _has_refinedweb_edits(edits: EditsConfig) -> bool:
    return any(getattr(edits, name.removeprefix("edits.")) not in (None, False) for name in REFINEDWEB_EDITS)
