"""Which packed tokens a run reads. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmtrain.data.config import Packing
from llmtrain.errors import ConfigError


class Verify(Enum):
    """When the bytes of shards are compared with their checksums. Sizes are looked at always."""

    none = "none"
    start = "start"
    """All of them before the first step, each rank a share of them."""
    open = "open"
    """A shard when a rank first opens it."""
    touch = "touch"
    """Each MiB when it is first read: a start costs nothing, and damage stops the run at the row that needs
    it."""


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
    packing: Packing = Packing.concat
    """How documents became rows: a pack of this strategy must be there."""
    verify: Verify = Verify.start
    """When shards are compared with their checksums."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2: a token and its target")
        if self.max_epochs <= 0:
            raise ConfigError(f"data.max_epochs={self.max_epochs} must be above 0")
