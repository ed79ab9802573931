"""Settings of what is read out of a text's content: language, quality, personal data, addresses, evaluation
items. All off by default. stdlib only; the files named here are opened when work starts, not before."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llmtrain.errors import ConfigError, unknown_name

PII_KINDS = ("email", "ip_address", "phone", "api_key", "private_key")
"""Kinds of personal data and secrets, in the order of every count."""


@dataclass(kw_only=True)
class LanguageConfig:
    """Which language a document is in, and how sure that is (signals `language`, `language_score`)."""

    enabled: bool = False
    model: str | None = None
    """A fastText model whose labels are languages (lid.176.bin, lid.176.ftz, GlotLID); null: the model of the
    package py3langid (139 languages). Measured side by side in docs/data_content.md."""
    sample_bytes: int | None = 1024
    """Bytes looked at in a longer document: eight pieces spread evenly over it, cut between characters.
    null: all of it. What it costs in accuracy: docs/data_content.md."""

    def __post_init__(self) -> None:
        if self.sample_bytes is not None and self.sample_bytes < 64:
            raise ConfigError(
                f"content.language.sample_bytes={self.sample_bytes} must be at least 64, or null to read "
                "whole documents"
            )


@dataclass(kw_only=True)
class QualityConfig:
    """A fastText classifier's probability that a document is a good one (signal `quality`).

    The method of DCLM (Li et al. 2024, arXiv:2406.11794, section 4.4). Train a model with
    `llmtrain data train-quality`.
    """

    model: str | None = None
    """Model file (.bin or .ftz); null: no score."""
    label: str = "__label__positive"
    """The label whose probability is the score. (DCLM's published model calls it __label__hq.)"""
    sample_bytes: int | None = None
    """As in `language`; null: the whole document, as DCLM does."""

    def __post_init__(self) -> None:
        if not self.label:
            raise ConfigError("content.quality.label is empty; name the label of good documents")
        if self.sample_bytes is not None and self.sample_bytes < 64:
            raise ConfigError(
                f"content.quality.sample_bytes={self.sample_bytes} must be at least 64, or null to read "
                "whole documents"
            )


@dataclass(kw_only=True)
class PiiConfig:
    """Personal data and secrets, replaced by a placeholder of their kind. null leaves a kind alone.

    What counts as one, with true and false cases: docs/data_content.md.
    """

    email: str | None = None
    ip_address: str | None = None
    """Public IPv4 and IPv6 addresses. Private, loopback, documentation and other reserved ones stay."""
    phone: str | None = None
    api_key: str | None = None
    """Keys with a known shape: AWS, GitHub, GitLab, Slack, Google, OpenAI, Anthropic, Hugging Face, Stripe,
    npm, PyPI, SendGrid, and JSON web tokens."""
    private_key: str | None = None
    """PEM blocks: -----BEGIN ... PRIVATE KEY-----, the key, and the END line if it is there."""
    assigned_secrets: bool = False
    """Whether `api_key` also replaces what is assigned to a name such as secret or password and looks random
    (20 characters or more, letters and digits, at least 3.5 bits of entropy a character)."""

    def __post_init__(self) -> None:
        for kind in PII_KINDS:
            placeholder = getattr(self, kind)
            if placeholder is not None and not re.fullmatch(
                r"<[A-Za-z_|]+>|\[[A-Za-z_|]+\]|\{[A-Za-z_|]+\}", placeholder
            ):
                raise ConfigError(
                    f"content.pii.{kind}={placeholder!r} must be letters and underscores between <>, [] or "
                    f"{{}}, such as <{kind.upper()}>, which no second run takes for part of something else"
                )
        if self.assigned_secrets and self.api_key is None:
            raise ConfigError(
                "content.pii.assigned_secrets=true has no effect while content.pii.api_key is null; "
                "set it, for example to <API_KEY>"
            )

    @property
    def is_on(self) -> bool:
        return any(getattr(self, kind) is not None for kind in PII_KINDS)

    def placeholders(self) -> list[str | None]:
        """In the order of PII_KINDS."""
        return [getattr(self, kind) for kind in PII_KINDS]


@dataclass(kw_only=True)
class UrlsConfig:
    """Lists of addresses whose documents are dropped (signal `url_blocked`). None is shipped."""

    block: list[str] = field(default_factory=list)
    """Files or folders, plain or .gz. A file named `domains` holds a domain a line (the layout of the
    University of Toulouse's lists, UT1), one named `urls` an address prefix a line; any other file may hold
    both: what has a slash inside is an address prefix. A folder: every such file below it."""
    words: list[str] = field(default_factory=list)
    """Files of words, one a line: an address is blocked when one of its words, between anything but letters
    and digits, is in the list."""
    substrings: list[str] = field(default_factory=list)
    """Files of strings, one a line: an address is blocked when it holds one."""

    @property
    def is_on(self) -> bool:
        return bool(self.block or self.words or self.substrings)


@dataclass(kw_only=True)
class EvaluationConfig:
    """One evaluation set that the training text must not hold."""

    path: str | None = None
    """JSONL file, plain or .gz, .zst, .bz2, .xz."""
    dataset: str | None = None
    """Or the first argument of `datasets.load_dataset`, or a folder written by `save_to_disk`."""
    subset: str | None = None
    """Second argument of load_dataset."""
    split: str = "test"
    """Only with `dataset`."""
    fields: list[str] = field(default_factory=list)
    """Fields whose text counts; a dot goes into an object (`answer.text`). A list's strings count as one
    text each."""
    joined: bool = False
    """Whether the fields make one text, in their order, with a line end between. false: each its own, so no
    n-gram spans two."""
    id_field: str | None = None
    """Names an item in the report; null: its number, from 0."""
    name: str | None = None
    """Names the set in the report; null: the path or dataset."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(
                f"an evaluation set of content.decontamination.sets needs path or dataset, and not both: got "
                f"path={self.path}, dataset={self.dataset}"
            )
        if not self.fields:
            raise ConfigError(
                f"the evaluation set {self.title} needs fields: the names of those that hold its text, such "
                "as fields=[question,answer]"
            )
        if self.subset is not None and self.dataset is None:
            raise ConfigError(f"the evaluation set {self.title}: subset={self.subset} goes with dataset only")

    @property
    def title(self) -> str:
        return self.name or self.path or self.dataset or ""


@dataclass(kw_only=True)
class DecontaminationConfig:
    """Word n-grams that a document shares with evaluation items (signal `num_contaminated_ngrams`).

    13 words as in Brown et al. 2020 (GPT-3, arXiv:2005.14165, appendix C). Words as everywhere here, lower
    case, without punctuation and symbols.
    """

    sets: list[EvaluationConfig] = field(default_factory=list)
    ngram_words: int = 13
    """A text with fewer words counts as one n-gram of its own length."""
    min_words: int = 5
    """Texts with fewer words are left out: they would be found everywhere. The report counts them."""
    max_items: int | None = None
    """n-grams that occur in more items than this are instructions, not content, and are ignored; null: none
    is. (GPT-3 ignored those in more than 10 documents of the training set; this bound is on items.)"""

    def __post_init__(self) -> None:
        if not 2 <= self.ngram_words <= 63:
            raise ConfigError(f"content.decontamination.ngram_words={self.ngram_words} must lie in 2..63")
        if not 1 <= self.min_words <= self.ngram_words:
            raise ConfigError(
                "need 1 <= min_words <= ngram_words, got content.decontamination."
                f"min_words={self.min_words}, ngram_words={self.ngram_words}"
            )
        if self.max_items is not None and self.max_items < 1:
            raise ConfigError(
                f"content.decontamination.max_items={self.max_items} must be at least 1, or null for no bound"
            )
        titles = [one.title for one in self.sets]
        for title in titles:
            if titles.count(title) > 1:
                raise ConfigError(
                    f"content.decontamination.sets names {title} {titles.count(title)} times; give each a "
                    "name of its own, or name it once"
                )

    @property
    def is_on(self) -> bool:
        return bool(self.sets)


@dataclass(kw_only=True)
class ContentConfig:
    """What is read out of a text's content. Everything is off until asked for."""

    language: LanguageConfig = field(default_factory=LanguageConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    urls: UrlsConfig = field(default_factory=UrlsConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)


@dataclass(kw_only=True)
class TrainQualityConfig:
    """`llmtrain data train-quality`: a fastText classifier (Joulin et al. 2016, arXiv:1607.01759) of good
    documents against others."""

    positives: list[str]
    """Files of good documents: JSONL, plain or .gz, .zst, .bz2, .xz; any other file holds one a line."""
    negatives: list[str]
    """Files of ordinary ones, as many documents as positives or more."""
    text_field: str = "text"
    """JSON key of the text."""
    out: str
    """Model file to write (.bin, read by any fastText); facts go beside it as .json."""
    word_ngrams: int = 2
    """Up to how many neighbouring words make a feature. 2 as in DCLM (arXiv:2406.11794, section 4.4)."""
    dim: int = 100
    """Width of the embeddings (fastText's default)."""
    epochs: int = 5
    learning_rate: float = 0.1
    """At the start; falls linearly to 0."""
    buckets: int = 2_000_000
    """Rows that n-grams share by hash (fastText's default). The model takes 4 * dim bytes a row."""
    min_count: int = 1
    """Words that occur less often are left out."""
    held_out: float = 0.1
    """Share of the documents that is kept for the figures, drawn by the hash of their text."""
    max_documents: int | None = None
    """Documents taken from each side, the ones with the smallest hash; null: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("positives", "negatives"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; name the files, as {name}=[a.jsonl.gz,b.jsonl.gz]")
        if not self.out.endswith(".bin"):
            raise ConfigError(f"out={self.out} must end in .bin, as fastText's models do")
        for name, least in (
            ("word_ngrams", 1), ("dim", 1), ("epochs", 1), ("buckets", 1), ("min_count", 1), ("seed", 0)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.word_ngrams > 5:
            raise ConfigError(f"word_ngrams={self.word_ngrams} must be at most 5: longer ones never repeat")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be above 0")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must lie between 0 and 1, both excluded")
        if self.max_documents is not None and self.max_documents < 2:
            raise ConfigError(f"max_documents={self.max_documents} must be at least 2, or null for all")


def check_codes(codes: list[str], known: tuple[str, ...], setting: str) -> None:
    """Refuse language codes that the identifier in use never returns (`Identifier.codes`)."""
    for code in codes:
        if code not in known:
            raise ConfigError(f"{setting}: {unknown_name('language code', code, known)}")
