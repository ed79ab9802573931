from __future__ import annotations

from typing import Any

import pytest

from llmtrain.data.dedup.config import DedupConfig, NearConfig
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, r"dedup\.near\.rows=0 must be at least 1"),
        ({"max_cluster": 0}, r"dedup\.near\.max_cluster=0 must be at least 1"),
        (
            {"bands": 15},
            r"dedup\.near\.bands\*rows=15\*8=120 must not exceed dedup\.near\.num_permutations=112",
        ),
        ({"num_permutations": 65_536}, r"num_permutations=65536 must be at most 65535; 112 to 256 are usual"),
        ({"threshold": 0.0}, r"dedup\.near\.threshold=0\.0 must lie above 0 and up to 1"),
        ({"threshold": 1.1}, r"dedup\.near\.threshold=1\.1 must lie above 0 and up to 1"),
        ({"margin_standard_errors": -1.0}, r"margin_standard_errors=-1\.0 and .*sample_pairs=100 must be"),
        ({"sample_pairs": -1}, r"sample_pairs=-1 must be at least 0"),
        ({"max_key_documents": 1}, r"dedup\.near\.max_key_documents=1 must be at least 2"),
    ],
)
def test_settings_of_near_duplicates_that_cannot_be_right_are_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        NearConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_source_removal": 1.5}, r"dedup\.max_source_removal=1\.5 must lie in 0\.\.1, or be null"),
        ({"min_source_documents": 0}, r"dedup\.min_source_documents=0 must be at least 1"),
        ({"partition_bytes": 1023}, r"dedup\.partition_bytes=1023 must be at least 1024"),
    ],
)
def test_settings_of_deduplication_that_cannot_be_right_are_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DedupConfig(**changes)


def test_the_curve_of_the_bands_is_the_published_one() -> None:
    """Leskovec, Rajaraman and Ullman, section 3.4; for 14 x 8, README of datatrove's FineWeb example."""
    near = NearConfig()
    assert near.band_threshold == pytest.approx(0.719, abs=5e-4)
    for similarity, probability in ((0.7, 0.56), (0.75, 0.77), (0.8, 0.92), (0.85, 0.988)):
        assert near.candidate_probability(similarity) == pytest.approx(probability, abs=0.006)
    assert NearConfig(num_permutations=9000, bands=450, rows=20).band_threshold == pytest.approx(
        0.737, abs=5e-4
    )


def test_the_margin_is_in_standard_errors_and_at_least_one_place() -> None:
    assert NearConfig(threshold=0.7).margin == pytest.approx(2.5 * (0.7 * 0.3 / 112) ** 0.5)
    assert NearConfig(threshold=1.0).margin == pytest.approx(1 / 112)
    assert NearConfig(margin_standard_errors=0).margin == pytest.approx(1 / 112)
