"""Settings of `llmtrain data`: where text comes from, which documents stay, and how they become rows.
stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmtrain.data.content.config import ContentConfig
from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.engines.config import EngineConfig
from llmtrain.data.filters.config import EditsConfig, RulesConfig, check_rules
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.errors import ConfigError
from llmtrain.files import plain


class StopAfter(Enum):
    decide = "decide"
    """Verdicts, facts and the report; no text is written."""
    documents = "documents"
    """Kept documents as Parquet files, listed in documents.json."""
    pack = "pack"
    """Shards of tokens and packs, listed in manifest.json."""


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


class TokenizerModel(Enum):
    """SentencePiece's algorithms (Kudo and Richardson 2018, arXiv:1808.06226)."""

    bpe = "bpe"
    unigram = "unigram"


@dataclass(kw_only=True)
class TokenizerConfig:
    """A tokenizer to use, or how to train one. Where `path` is set, only `given_eos_id` has an effect beside
    it."""

    path: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, or the folder of one, used as it is; null: train
    one."""
    given_eos_id: int | None = None
    """Id that ends a document, where the model of `path` names none."""
    model_type: TokenizerModel = TokenizerModel.bpe
    vocab_size: int = 8192
    """Pieces, with 256 for bytes and those with ids below."""
    sample_bytes: int = 10_000_000
    """Text to train on: kept training documents, drawn by the hash of their id until they reach this much,
    or all."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """Shares of the sample by source; empty: documents as they come. A source that is not named has none, one
    that is too small gives what it has."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that get a piece of their own, 0.98 to 1; the rest become bytes."""
    byte_fallback: bool = True
    """Whether a character without a piece becomes its UTF-8 bytes. Without, it is unk_id and lost."""
    split_digits: bool = True
    """Whether every digit is a piece of its own, as in LLaMA (arXiv:2302.13971, section 2.1)."""
    user_symbols: list[str] = field(default_factory=list)
    """Strings that are one token each wherever the text has them."""
    unk_id: int = 0
    eos_id: int = 1
    """Ends every document."""
    bos_id: int | None = None
    """null: there is none. Documents do not begin with it in any case; it is for those who prompt."""
    pad_id: int | None = None
    fim: bool = False
    """Whether there are the three sentinels of fill-in-the-middle."""
    mask: bool = False
    """Whether there is a mask for masked language modelling."""
    num_sentinels: int = 0
    """Sentinels of span corruption; T5 has 100."""
    seed: int = 0

    def __post_init__(self) -> None:
        ids = [id_ for id_ in (self.unk_id, self.eos_id, self.bos_id, self.pad_id) if id_ is not None]
        if sorted(ids) != list(range(len(ids))):
            raise ConfigError(
                f"tokenizer.unk_id={self.unk_id}, eos_id={self.eos_id}, bos_id={self.bos_id} and "
                f"pad_id={self.pad_id} must be 0 to {len(ids) - 1} in any order: they come first"
            )
        num_fixed = len(ids) + 256 * self.byte_fallback + len(self.user_symbols)
        num_fixed += 3 * self.fim + self.mask + self.num_sentinels
        if self.vocab_size <= num_fixed:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} must be at least {num_fixed + 1}: "
                f"{num_fixed} pieces are fixed"
            )
        if self.sample_bytes < 1 or self.num_sentinels < 0:
            raise ConfigError(
                f"tokenizer.sample_bytes={self.sample_bytes} must be at least 1, and "
                f"tokenizer.num_sentinels={self.num_sentinels} at least 0"
            )
        if not 0.98 <= self.character_coverage <= 1:  # SentencePiece's own bounds
            raise ConfigError(f"tokenizer.character_coverage={self.character_coverage} must lie in 0.98..1")
        if any(not symbol for symbol in self.user_symbols) or len(set(self.user_symbols)) < len(
            self.user_symbols
        ):
            raise ConfigError(f"tokenizer.user_symbols={self.user_symbols} must be different and not empty")
        if self.source_weights and not (
            min(self.source_weights.values()) >= 0 and sum(self.source_weights.values()) > 0
        ):
            raise ConfigError(
                f"tokenizer.source_weights={self.source_weights} must be positive, or 0 to leave out"
            )
        if self.given_eos_id is not None and self.path is None:
            raise ConfigError(
                f"tokenizer.given_eos_id={self.given_eos_id} is for a model of tokenizer.path; one that is "
                f"trained has tokenizer.eos_id={self.eos_id}"
            )


@dataclass(kw_only=True)
class DocumentsConfig:
    """Parquet files of kept documents; only with stop_after=documents."""

    file_bytes: int = 512 << 20
    """Text a file."""
    zstd_level: int = 1
    """pyarrow's own default; 3 makes files an eighth smaller and takes a third longer."""

    def __post_init__(self) -> None:
        if self.file_bytes < 1:
            raise ConfigError(f"documents.file_bytes={self.file_bytes} must be at least 1")
        if not 1 <= self.zstd_level <= 22:
            raise ConfigError(f"documents.zstd_level={self.zstd_level} must lie in 1..22")


@dataclass(kw_only=True)
class ShardsConfig:
    text_bytes: int | None = None
    """Text a shard; null: a 64th of the corpus, but 8 MiB to 1 GiB."""

    def __post_init__(self) -> None:
        if self.text_bytes is not None and self.text_bytes < 1:
            raise ConfigError(f"shards.text_bytes={self.text_bytes} must be at least 1, or null")


class Packing(Enum):
    """How documents become rows."""

    concat = "concat"
    """Back to back, cut every seq_len tokens: no padding, and the documents at the borders are cut."""
    best_fit = "best_fit"
    """Only documents longer than a row are cut; a row has a little padding (Ding et al. 2024,
    arXiv:2404.10830)."""
    padded = "padded"
    """One document a row, and much padding."""


@dataclass(kw_only=True)
class PackConfig:
    """Packs are plans, not copies, so several cost little."""

    seq_lens: list[int] = field(default_factory=lambda: [512])
    """Tokens a row; a pack for each."""
    strategies: list[Packing] = field(default_factory=lambda: [Packing.concat])
    """How documents become rows; a pack for each."""
    window_documents: int = 1_000_000
    """Documents that best_fit looks at together: more make less padding, and take 100 bytes each."""

    def __post_init__(self) -> None:
        if not self.strategies or len(set(self.strategies)) < len(self.strategies):
            names = ",".join(strategy.name for strategy in self.strategies)
            raise ConfigError(f"pack.strategies=[{names}] must name at least one, and none of them twice")
        if self.window_documents < 1:
            raise ConfigError(f"pack.window_documents={self.window_documents} must be at least 1")
        if not self.seq_lens or min(self.seq_lens) < 2 or len(set(self.seq_lens)) < len(self.seq_lens):
            raise ConfigError(f"pack.seq_lens={self.seq_lens} must name different lengths of at least 2")


@dataclass(kw_only=True)
class DataConfig:
    """Everything `llmtrain data` needs."""

    corpus: CorpusConfig
    edits: EditsConfig = field(default_factory=EditsConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    measure: bool = True
    """Whether the numbers that rules of Gopher, FineWeb, DCLM and code compare are measured. Without them a
    run that only deduplicates reads a third faster, and such a rule is refused."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stop_after: StopAfter = StopAfter.pack
    max_quarantine_share: float = 0.01
    """Share of records that may be bad; above it the run stops and says where they lie."""
    out: str
    """Folder to write."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_quarantine_share <= 1:
            raise ConfigError(f"max_quarantine_share={self.max_quarantine_share} must lie in 0..1")
        check_rules(self.rules, self.edits)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the output's bytes, as JSON values."""
        values: dict[str, Any] = plain(self)
        for name in ("engine", "out", "max_quarantine_share", "stop_after"):
            del values[name]
        for name in ("partition_bytes", "write_index", "max_source_removal", "min_source_documents"):
            del values["dedup"][name]
        del values["dedup"]["near"]["sample_pairs"]
        return values
