"""Settings of `llmtrain data`: where text comes from, which documents stay, and how they become rows.
stdlib only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from llmtrain.data.engines.config import EngineConfig
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.sources.config import CorpusConfig
from llmtrain.errors import ConfigError


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
