"""Which packed tokens a run reads. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.errors import ConfigError


@dataclass(kw_only=True)
class LoaderConfig:
    """Rows come from the packs that `llmtrain data` wrote for this seq_len."""

    folder: str
    """Folder that holds manifest.json, as `llmtrain data` printed it."""
    seq_len: int
    """Tokens a row. The folder must hold a pack of this length."""
    max_epochs: float = 4.0
    """Most often a row may be seen; a run that needs more is refused. Up to 4 repeats cost almost nothing
    (Muennighoff et al. 2023, arXiv:2305.16264, section 6)."""
    verify_shards: bool = True
    """Whether rank 0 compares every shard's bytes with the manifest's hash before the first step (about 1
    GB/s)."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2: a token and its target")
        if self.max_epochs <= 0:
            raise ConfigError(f"data.max_epochs={self.max_epochs} must be above 0")
