"""Settings of `llmtrain data import` and `llmtrain data export`. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llmtrain.data.config import PackConfig
from llmtrain.data.engines.config import EngineConfig
from llmtrain.errors import ConfigError


class TokenFormat(Enum):
    """Whose files of tokens. All are token ids back to back; what lies beside them differs."""

    megatron = "megatron"
    """`.bin` and `.idx`, of Megatron-LM, NeMo and GPT-NeoX."""
    datatrove = "datatrove"
    """`.ds` and `.ds.index`, of datatrove and nanotron."""
    olmo = "olmo"
    """`.npy` without a header, and `.csv.gz`, of dolma and OLMo."""


class TokenType(Enum):
    uint16 = "uint16"
    uint32 = "uint32"


@dataclass(kw_only=True)
class ExportConfig:
    """Shards of a data folder for another framework: hard links to the tokens, and its own small files."""

    folder: str
    """The data folder."""
    kind: TokenFormat
    out: str
    """Folder to write; one folder in it for each split. On the same file system nothing is copied."""
    splits: list[str] = field(default_factory=list)
    """`train`, `held_out`; empty: all there are."""


@dataclass(kw_only=True)
class ImportConfig:
    """Files of tokens from another framework as a data folder. Tokens are linked where they can stay as they
    are, and copied where they cannot."""

    kind: TokenFormat
    paths: list[str]
    """Files of tokens (`.bin`, `.ds`, `.npy`), prefixes without the suffix, or globs."""
    held_out: list[str] = field(default_factory=list)
    """Those of the files that are held out, in the same ways; empty: documents are drawn, and the files that
    they are drawn from copied."""
    held_out_fraction: float = 0.01
    """Expected share of documents that are drawn. No effect with `held_out`."""
    seed: int = 0
    """Of the draw."""
    tokenizer: str
    """What the tokens were made with: a SentencePiece .model, a tokenizer.json, or the folder of one."""
    eos_id: int | None = None
    """Id that ends a document; null: the tokenizer's."""
    token_type: TokenType | None = None
    """Of `.ds` and `.npy` files, which do not say; null: `.ds.metadata` does, or else by the vocabulary."""
    append_eos: bool = False
    """Whether a document that does not end in EOS gets one; without, such files are refused."""
    name: str = "imported"
    """Of the corpus."""
    pack: PackConfig = field(default_factory=PackConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: str
    """Data folder to write."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths=[] names no file; give paths=['tokens/*.bin'], or .ds or .npy")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(
                f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1, both excluded"
            )
        if self.kind is TokenFormat.megatron and self.token_type is not None:
            raise ConfigError("token_type is for .ds and .npy files; an .idx says which type its tokens have")
