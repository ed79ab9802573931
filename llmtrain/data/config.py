"""Settings of `llmtrain data`: where text comes from, which documents stay, and how they become rows.
stdlib only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from llmtrain.errors import ConfigError


class Format(Enum):
    """How the text lies on disk."""

    python_docs = "python_docs"
    """Docstrings, comments and text files of this Python installation."""
    jsonl = "jsonl"
    """One JSON object a line; .gz and .zst are read as they are."""
    parquet = "parquet"
    text = "text"
    """Plain text, cut as `text_unit` says; .gz and .zst are read as they are."""
    datasets = "datasets"
    """Whatever `datasets.load_dataset` or `load_from_disk` opens."""


class TextUnit(Enum):
    """What one document of a plain text file is."""

    file = "file"
    block = "block"
    """Lines between blank lines."""
    line = "line"


class EngineKind(Enum):
    inline = "inline"
    """In this process, one unit after another."""
    local = "local"
    """Processes on this machine."""


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the text comes from."""

    name: str
    """Names the data folder and the manifest."""
    format: Format
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs (`**` goes into folders), in any order; each file counts once. Hidden files in
    folders, and what a run wrote into `out`, are left out. Not for python_docs and datasets."""
    text_field: str = "text"
    """JSON key or column that holds the text: jsonl, parquet, datasets."""
    source_field: str | None = None
    """JSON key or column that names a document's source; null: the file's name."""
    text_unit: TextUnit = TextUnit.file
    """Only for text."""
    max_text_bytes: int | None = None
    """Only for python_docs: files are drawn in hash order until their text reaches this many bytes;
    null: all."""
    draw_seed: int = 0
    """Only for python_docs: another seed draws other files."""
    max_document_bytes: int = 20_000_000
    """A longer record goes to the quarantine as `absurd_length`."""
    dataset: str | None = None
    """Only for datasets: first argument of load_dataset, or the folder with dataset_on_disk."""
    dataset_config: str | None = None
    dataset_split: str | None = "train"
    dataset_files: list[str] = field(default_factory=list)
    """data_files of load_dataset, for the builders json, csv, text, parquet."""
    dataset_on_disk: bool = False
    """Whether `dataset` is a folder that save_to_disk wrote."""

    def __post_init__(self) -> None:
        if self.format in (Format.jsonl, Format.parquet, Format.text) and not self.paths:
            raise ConfigError(
                f"corpus={self.format.name} needs corpus.paths, as in "
                f"`llmtrain data corpus={self.format.name} corpus.paths=[texts/*]`"
            )
        if self.format in (Format.python_docs, Format.datasets) and self.paths:
            raise ConfigError(
                f"corpus.paths has no effect with corpus.format={self.format.name}; leave it out"
            )
        if self.format is Format.datasets and self.dataset is None:
            raise ConfigError(
                "corpus=datasets needs corpus.dataset: a name on the Hub, a folder, or "
                "json|csv|text|parquet with corpus.dataset_files"
            )
        if self.max_text_bytes is not None and self.format is not Format.python_docs:
            raise ConfigError(f"corpus.max_text_bytes has no effect with corpus.format={self.format.name}")
        if self.max_text_bytes is not None and self.max_text_bytes < 1:
            raise ConfigError(f"corpus.max_text_bytes={self.max_text_bytes} must be at least 1, or null")
        if self.max_document_bytes < 1:
            raise ConfigError(f"corpus.max_document_bytes={self.max_document_bytes} must be at least 1")


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


@dataclass(kw_only=True)
class HeldOutConfig:
    """Documents that training never sees, drawn by the hash of their text."""

    fraction: float = 0.01
    """Expected share of documents. At least one document is held out when there are two."""
    max_bytes: int | None = 8 << 20
    """Stop drawing at this much text; null: no bound."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"held_out.fraction={self.fraction} must lie between 0 and 1, both excluded")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"held_out.max_bytes={self.max_bytes} must be at least 1, or null")


@dataclass(kw_only=True)
class TokenizerConfig:
    """SentencePiece BPE (Kudo and Richardson 2018, arXiv:1808.06226) with byte fallback."""

    path: str | None = None
    """Folder or model file of a tokenizer to use as it is; null: train one."""
    vocab_size: int = 8192
    """Pieces, with 256 for bytes, one for unknown and one for EOS."""
    sample_bytes: int = 10_000_000
    """Text to train on: kept training documents, drawn by hash until they reach this much, or all."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that get a piece of their own, 0.98 to 1; the rest become bytes."""
    split_digits: bool = True
    """Whether every digit is a piece of its own, as in LLaMA (arXiv:2302.13971, section 2.1)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 259:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} must be at least 259: 258 pieces are fixed"
            )
        if self.sample_bytes < 1:
            raise ConfigError(f"tokenizer.sample_bytes={self.sample_bytes} must be at least 1")
        if not 0.98 <= self.character_coverage <= 1:  # SentencePiece's own bounds
            raise ConfigError(f"tokenizer.character_coverage={self.character_coverage} must lie in 0.98..1")


@dataclass(kw_only=True)
class ShardsConfig:
    text_bytes: int | None = None
    """Text a shard; null: a 64th of the corpus, but 8 MiB to 1 GiB."""

    def __post_init__(self) -> None:
        if self.text_bytes is not None and self.text_bytes < 1:
            raise ConfigError(f"shards.text_bytes={self.text_bytes} must be at least 1, or null")


@dataclass(kw_only=True)
class PackConfig:
    seq_lens: list[int] = field(default_factory=lambda: [512])
    """Tokens a row; one pack for each. Packs are plans, not copies, so several cost little."""

    def __post_init__(self) -> None:
        if not self.seq_lens or min(self.seq_lens) < 2 or len(set(self.seq_lens)) < len(self.seq_lens):
            raise ConfigError(f"pack.seq_lens={self.seq_lens} must name different lengths of at least 2")


@dataclass(kw_only=True)
class EngineConfig:
    """How the work is spread. Nothing here changes a byte of the output."""

    kind: EngineKind = EngineKind.local
    workers: int | None = None
    """Processes; null: one for each core that this process may use."""
    unit_bytes: int = 16 << 20
    """Input bytes a work unit of the scan."""
    max_worker_deaths: int = 3
    """How often dead workers are replaced and their units done again before the run gives up."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"engine.workers={self.workers} must be at least 1, or null for one a core")
        if self.unit_bytes < 1:
            raise ConfigError(f"engine.unit_bytes={self.unit_bytes} must be at least 1")
        if self.max_worker_deaths < 0:
            raise ConfigError(f"engine.max_worker_deaths={self.max_worker_deaths} must be at least 0")


@dataclass(kw_only=True)
class DataConfig:
    """Everything `llmtrain data` needs."""

    corpus: CorpusConfig
    rules: RulesConfig = field(default_factory=RulesConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    max_quarantine_share: float = 0.01
    """Share of records that may be bad; above it the run stops and says where they lie."""
    out: str
    """Folder to write."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_quarantine_share <= 1:
            raise ConfigError(f"max_quarantine_share={self.max_quarantine_share} must lie in 0..1")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the output's bytes, as JSON values: all but `engine`, `out` and the
        share."""
        values = asdict(self)
        for name in ("engine", "out", "max_quarantine_share"):
            del values[name]
        plain: dict[str, Any] = _plain(values)
        return plain


def _plain(value: Any) -> Any:  # Any: a tree of settings
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value
