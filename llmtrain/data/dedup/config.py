"""Settings of deduplication: which documents count as copies, and which of them stays. stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from llmtrain.errors import ConfigError


class Survivor(Enum):
    """Which of several copies stays. Ties go to the smallest document id; a document kept by an earlier run
    always goes first."""

    smallest_id = "smallest_id"
    longest = "longest"
    """The one with the most bytes."""
    quality = "quality"
    """The one with the highest quality score."""


class Similarity(Enum):
    """What `near.threshold` bounds, over the sets of shingles of two documents."""

    jaccard = "jaccard"
    """Size of the intersection over that of the union."""
    containment = "containment"
    """Size of the intersection over that of the smaller set: 1 for an excerpt and the text it is from."""


class LineUnit(Enum):
    line = "line"
    paragraph = "paragraph"
    """What lies between blank lines."""


@dataclass(kw_only=True)
class NearConfig:
    """Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and Ullman,
    Mining of Massive Datasets, chapter 3), with candidates verified before they are clustered."""

    enabled: bool = False
    shingle_words: int = 5
    """Words a shingle. 5: Lee et al. 2022 (arXiv:2107.06499, appendix A) and FineWeb (arXiv:2406.17557)."""
    num_permutations: int = 112
    """Numbers a signature; 4 bytes each. 112 = 14 x 8, as FineWeb."""
    bands: int = 14
    """Documents that agree in all rows of one band are candidates."""
    rows: int = 8
    """Numbers a band. The chance that a pair of similarity s is a candidate is 1 - (1 - s^rows)^bands."""
    similarity: Similarity = Similarity.jaccard
    threshold: float = 0.7
    """Candidates below it are no duplicates. The default lies just below the knee of 14 x 8, 0.72: what the
    bands find with even odds is kept if it is true, and chance hits are not."""
    margin_standard_errors: float = 2.5
    """Candidates whose signatures agree in a share this close to the threshold, in standard errors
    sqrt(t (1 - t) / num_permutations), are decided by their texts."""
    max_key_documents: int = 10_000
    """A band key that more documents have is boilerplate: they are compared with one of them only."""
    max_rounds: int = 8
    """How often those of a band key that are unlike its representative are compared with a new one."""
    max_cluster: int = 1_000
    """In a cluster with more documents, only those found like the survivor itself are removed; 1: in every
    cluster. Chains of similar pairs otherwise join what is not similar."""
    sample_pairs: int = 100
    """Pairs written to the report, of those accepted and of those rejected."""

    def __post_init__(self) -> None:
        for name in ("shingle_words", "num_permutations", "bands", "rows", "max_rounds", "max_cluster"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dedup.near.{name}={getattr(self, name)} must be at least 1")
        if self.bands * self.rows > self.num_permutations:
            raise ConfigError(
                f"dedup.near.bands*rows={self.bands}*{self.rows}={self.bands * self.rows} must not exceed "
                f"dedup.near.num_permutations={self.num_permutations}"
            )
        if self.num_permutations > 65_535:
            raise ConfigError(
                f"dedup.near.num_permutations={self.num_permutations} must be at most 65535; "
                "112 to 256 are usual"
            )
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"dedup.near.threshold={self.threshold} must lie above 0 and up to 1")
        if self.margin_standard_errors < 0 or self.sample_pairs < 0:
            raise ConfigError(
                f"dedup.near.margin_standard_errors={self.margin_standard_errors} and "
                f"dedup.near.sample_pairs={self.sample_pairs} must be at least 0"
            )
        if self.max_key_documents < 2:
            raise ConfigError(f"dedup.near.max_key_documents={self.max_key_documents} must be at least 2")

    @property
    def band_threshold(self) -> float:
        """Similarity at the knee of the bands' curve, (1 / bands)^(1 / rows)."""
        return float((1 / self.bands) ** (1 / self.rows))

    def candidate_probability(self, similarity: float) -> float:
        """The chance that a pair of this Jaccard similarity shares a band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)

    @property
    def margin(self) -> float:
        """Half the width, in similarity, of the stripe around the threshold that texts decide. At least one
        place of the signature, so that agreeing in all of them is no proof of a similarity of 1."""
        error = math.sqrt(self.threshold * (1 - self.threshold) / self.num_permutations)
        return max(self.margin_standard_errors * error, 1 / self.num_permutations)


@dataclass(kw_only=True)
class LineConfig:
    """Lines or paragraphs that are in the corpus more than once: one copy stays, the first of the document
    that the survivor key likes best. Equal are those whose texts are, stripped and lower-cased."""

    enabled: bool = False
    unit: LineUnit = LineUnit.line
    """What CCNet (arXiv:1911.00359) and Dolma (arXiv:2402.00159) call a paragraph is a line here."""
    min_chars: int = 30
    """Characters, stripped; shorter ones are never removed: list items, headings, a closing brace. Assumed,
    not measured."""
    max_removed_share: float | None = 0.8
    """A document that loses more of its bytes than this is dropped whole. Assumed, not measured. null: none
    is."""

    def __post_init__(self) -> None:
        if self.min_chars < 1:
            raise ConfigError(f"dedup.lines.min_chars={self.min_chars} must be at least 1")
        if self.max_removed_share is not None and not 0 <= self.max_removed_share <= 1:
            raise ConfigError(
                f"dedup.lines.max_removed_share={self.max_removed_share} must lie in 0..1, or be null to "
                "drop none"
            )


@dataclass(kw_only=True)
class NgramConfig:
    """Documents made of word n-grams that better documents have too: what DCLM's BFF (Li et al. 2024,
    arXiv:2406.11794, appendix; dclm@77e7bf5 dedup/bff) finds with a Bloom filter, here exactly.

    Takes 8 bytes on disk for each word scanned, and 16 more for each word of a living document while the
    stage runs."""

    enabled: bool = False
    num_words: int = 13
    """Words an n-gram; documents with fewer are left alone. 13: DCLM."""
    max_share: float = 0.8
    """A document is dropped when more of its different n-grams than this are owned by better ones. 0.8:
    DCLM."""
    keep_one_in: int = 1
    """Look at about one n-gram in so many, chosen by its hash, the same ones in every document: less disk
    and time, and shares with a standard error of sqrt(0.16 * keep_one_in / words) at 0.8. 1: all of them."""

    def __post_init__(self) -> None:
        if self.num_words < 1:
            raise ConfigError(f"dedup.ngrams.num_words={self.num_words} must be at least 1")
        if not 0 <= self.max_share <= 1:
            raise ConfigError(f"dedup.ngrams.max_share={self.max_share} must lie in 0..1")
        if self.keep_one_in < 1:
            raise ConfigError(f"dedup.ngrams.keep_one_in={self.keep_one_in} must be at least 1; 1 keeps all")


@dataclass(kw_only=True)
class DedupConfig:
    """Which copies go. Output does not depend on work units, workers, or the order of the documents."""

    exact: bool = True
    """Whether documents with equal normalised text are copies."""
    near: NearConfig = field(default_factory=NearConfig)
    lines: LineConfig = field(default_factory=LineConfig)
    ngrams: NgramConfig = field(default_factory=NgramConfig)
    survivor: Survivor = Survivor.smallest_id
    max_source_removal: float | None = 0.8
    """Share of a source's documents that near-duplicates may remove; above it the run stops and shows pairs.
    Assumed, not measured: it is there for wipe-outs (marin#6854 lost 97 % of a source). null: no bound."""
    min_source_documents: int = 1_000
    """Sources with fewer documents are not held to `max_source_removal`."""
    partition_bytes: int = 2 << 30
    """Memory of one work unit of deduplication, whatever the size of the corpus."""
    previous: list[str] = field(default_factory=list)
    """Data folders, or index folders, of earlier runs: what they kept counts as kept already, and is not read
    again. Each holds its own documents only, so name all of them."""
    write_index: bool = True
    """Whether `index/` is written, for `previous` of later runs: 46 bytes a kept document, and its
    signature."""

    def __post_init__(self) -> None:
        if self.max_source_removal is not None and not 0 <= self.max_source_removal <= 1:
            raise ConfigError(
                f"dedup.max_source_removal={self.max_source_removal} must lie in 0..1, or be null: no bound"
            )
        if self.min_source_documents < 1:
            raise ConfigError(f"dedup.min_source_documents={self.min_source_documents} must be at least 1")
        if self.partition_bytes < 1024:
            raise ConfigError(f"dedup.partition_bytes={self.partition_bytes} must be at least 1024")
