"""Which packed tokens a run reads. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
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


class OnExhausted(Enum):
    """What a run does that would take more of a source than its max_epochs allows."""

    error = "error"
    """It does not start."""
    redistribute = "redistribute"
    """From the row at which the source has given all it may, its share goes to the others, by their
    weights."""


@dataclass(kw_only=True)
class SourceConfig:
    """One data set of a mixture."""

    folder: str
    """Folder that holds manifest.json."""
    weight: float | None = None
    """Share of rows, relative to the others'; null for all sources: by their rows. No effect with stages."""
    max_epochs: float | None = None
    """Most often a row of it may be seen; null: data.max_epochs."""

    def __post_init__(self) -> None:
        if self.max_epochs is not None and self.max_epochs <= 0:
            raise ConfigError(
                f"max_epochs={self.max_epochs} of source {self.folder} must be above 0, or null"
            )


@dataclass(kw_only=True)
class StageConfig:
    """Weights from a token count on."""

    from_tokens: int
    """Input positions consumed before the stage; the first stage begins at 0."""
    weights: dict[str, float]
    """By source; one that is not named gives nothing in this stage."""


@dataclass(kw_only=True)
class LocalityConfig:
    """Rows in two levels, for file systems on which reading here and there is slow."""

    group_rows: int = 4096
    """Neighbouring rows that stay together: 4,096 rows of 2,048 tokens are 16 MiB of uint16."""
    window_groups: int = 64
    """Groups whose rows are shuffled together: so many places of the data are read at a time."""

    def __post_init__(self) -> None:
        if self.group_rows < 1 or self.window_groups < 1:
            raise ConfigError(
                f"data.locality.group_rows={self.group_rows} and window_groups={self.window_groups} must be "
                "at least 1; data.locality=null lets any row follow any other"
            )


class ObjectiveKind(Enum):
    """What is predicted."""

    causal = "causal"
    """The next token."""
    fim = "fim"
    """The next token, after the middle of some documents was moved to their end (arXiv:2207.14255)."""
    masked_lm = "masked_lm"
    """Hidden tokens (arXiv:1810.04805); for models that see both sides."""
    span_corruption = "span_corruption"
    """Spans that were taken out (arXiv:1910.10683); for an encoder with a decoder."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """A view of the training rows; held-out rows stay causal."""

    kind: ObjectiveKind = ObjectiveKind.causal
    fim_rate: float = 0.5
    """Share of documents whose middle moves. Bavarian et al. find up to 0.9 to cost nothing (section 4)."""
    spm_rate: float = 0.5
    """Share of those that begin with the suffix."""
    mask_rate: float = 0.15
    """Share of tokens that are predicted."""
    span_rate: float = 0.15
    """Share of tokens that are taken out."""
    mean_span_tokens: float = 3.0
    """Tokens a span, on average."""

    def __post_init__(self) -> None:
        for name in ("fim_rate", "spm_rate", "mask_rate", "span_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.objective.{name}={getattr(self, name)} must lie in 0..1")
        if self.mean_span_tokens < 1:
            raise ConfigError(f"data.objective.mean_span_tokens={self.mean_span_tokens} must be at least 1")

    def deciding(self) -> dict[str, object]:
        """The settings that decide what a row becomes: those of the kind."""
        return {"kind": self.kind.name, **{name: getattr(self, name) for name in SETTINGS_OF[self.kind]}}


SETTINGS_OF: dict[ObjectiveKind, tuple[str, ...]] = {
    ObjectiveKind.causal: (),
    ObjectiveKind.fim: ("fim_rate", "spm_rate"),
    ObjectiveKind.masked_lm: ("mask_rate",),
    ObjectiveKind.span_corruption: ("span_rate", "mean_span_tokens"),
}


@dataclass(kw_only=True)
class LoaderConfig:
    """Rows come from the packs that `llmtrain data` wrote for this seq_len, of one folder or of several."""

    folder: str | None = None
    """Folder that holds manifest.json, as `llmtrain data` printed it."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """A mixture, in place of `folder`: several folders by name. All must have the same tokenizer."""
    stages: list[StageConfig] = field(default_factory=list)
    """Weights that change with the tokens consumed; empty: those of the sources, all the time."""
    on_exhausted: OnExhausted = OnExhausted.error
    block_rows: int = 4096
    """Shares of a mixture are exact over each so many rows; inside, sources follow at random."""
    locality: LocalityConfig | None = None
    """null: any row may follow any other."""
    seq_len: int
    """Tokens a row. The folders must hold a pack of this length."""
    packing: Packing = Packing.concat
    """How documents became rows: a pack of this strategy must be there."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    max_epochs: float = 4.0
    """Most often a row may be seen; a run that needs more is refused. Up to 4 repeats cost almost nothing
    (Muennighoff et al. 2023, arXiv:2305.16264, section 6)."""
    verify: Verify = Verify.start
    """When shards are compared with their checksums."""
    prefetch_steps: int = 2
    """Steps that are read ahead while one computes; 0: none."""
    accept_changed: bool = False
    """Whether a resume goes on with other data than its checkpoint names. The ledger notes it."""

    def __post_init__(self) -> None:
        if (self.folder is None) == (not self.sources):
            raise ConfigError(
                f"give data.folder or data.sources, one of them: folder={self.folder}, "
                f"sources={sorted(self.sources)}"
            )
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2: a token and its target")
        if self.max_epochs <= 0:
            raise ConfigError(f"data.max_epochs={self.max_epochs} must be above 0")
        if self.block_rows < 1 or self.prefetch_steps < 0:
            raise ConfigError(
                f"data.block_rows={self.block_rows} must be at least 1 and "
                f"data.prefetch_steps={self.prefetch_steps} at least 0"
            )
        if self.stages and not self.sources:
            raise ConfigError("data.stages gives weights to sources, and there are none; name data.sources")
        weights = [source.weight for source in self.sources.values()]
        if not self.stages and None in weights and weights != [None] * len(weights):
            raise ConfigError(
                "give every source of data.sources a weight, or none of them: "
                + ", ".join(f"{name}={source.weight}" for name, source in self.sources.items())
            )
