"""Settings of content: what is refused, and that everything is off by default."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.data.content.config import (
    ContentConfig,
    DecontaminationConfig,
    EvaluationConfig,
    LanguageConfig,
    PiiConfig,
    QualityConfig,
    TrainQualityConfig,
)
from llmtrain.errors import ConfigError

SET = EvaluationConfig(path="a.jsonl", fields=["text"])


def test_everything_is_off_by_default() -> None:
    cfg = ContentConfig()
    assert not cfg.language.enabled
    assert cfg.quality.model is None
    assert not cfg.pii.is_on
    assert not cfg.urls.is_on
    assert not cfg.decontamination.is_on


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (
            LanguageConfig,
            {"sample_bytes": 63},
            r"content\.language\.sample_bytes=63 must be at least 64, or null",
        ),
        (
            QualityConfig,
            {"sample_bytes": 1},
            r"content\.quality\.sample_bytes=1 must be at least 64, or null",
        ),
        (QualityConfig, {"label": ""}, r"content\.quality\.label is empty"),
        (
            PiiConfig,
            {"email": "x@example.com"},
            r"content\.pii\.email='x@example\.com' must be letters .* <EMAIL>",
        ),
        (PiiConfig, {"phone": "PHONE"}, r"content\.pii\.phone='PHONE' must be letters .* <PHONE>"),
        (
            PiiConfig,
            {"assigned_secrets": True},
            r"assigned_secrets=true has no effect while content\.pii\.api_key",
        ),
        (
            EvaluationConfig,
            {"fields": ["a"]},
            r"needs path or dataset, and not both: got path=None, dataset=None",
        ),
        (EvaluationConfig, {"path": "a", "dataset": "b", "fields": ["a"]}, "got path=a, dataset=b"),
        (EvaluationConfig, {"path": "a"}, "the evaluation set a needs fields"),
        (EvaluationConfig, {"path": "a", "fields": ["a"], "subset": "s"}, "subset=s goes with dataset only"),
        (
            DecontaminationConfig,
            {"ngram_words": 1},
            r"content\.decontamination\.ngram_words=1 must lie in 2\.\.63",
        ),
        (
            DecontaminationConfig,
            {"ngram_words": 4},
            r"need 1 <= min_words <= ngram_words, got .*min_words=5, ngr",
        ),
        (DecontaminationConfig, {"max_items": 0}, r"max_items=0 must be at least 1, or null"),
        (DecontaminationConfig, {"sets": [SET, SET]}, r"names a\.jsonl 2 times; give each a name"),
        (TrainQualityConfig, {"positives": []}, r"positives is empty; name the files"),
        (TrainQualityConfig, {"out": "m.ftz"}, r"out=m\.ftz must end in \.bin"),
        (TrainQualityConfig, {"dim": 0}, "dim=0 must be at least 1"),
        (TrainQualityConfig, {"word_ngrams": 64}, "word_ngrams=64 must be at most 5"),
        (TrainQualityConfig, {"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        (TrainQualityConfig, {"held_out": 1.0}, "held_out=1.0 must lie between 0 and 1"),
        (TrainQualityConfig, {"max_documents": 1}, "max_documents=1 must be at least 2, or null"),
    ],
)
def test_bad_settings_are_refused(make: Any, values: dict[str, Any], message: str) -> None:
    if make is TrainQualityConfig:
        values = {"positives": ["a"], "negatives": ["b"], "out": "m.bin"} | values
    with pytest.raises(ConfigError, match=message):
        make(**values)
