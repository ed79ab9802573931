from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.config import DataConfig, PackConfig, TokenizerConfig
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.tokenizer.sentencepiece_model import MODEL_NAME, SentencePieceTokenizer
from llmtrain.data.tokenizer.train import train_tokenizer

SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "ne",
    "tu",
    "ra",
    "so",
    "ve",
    "din",
    "par",
    "tel",
    "mor",
    "ish",
    "and",
    "the",
    "of",
    "to",
    "in",
    "ion",
]


def made_up_text(seed: int, num_words: int = 120) -> str:
    """Sentences of made-up words, with line ends, indentation, digits and a few characters beyond ASCII."""
    draw = random.Random(seed)
    words = []
    for number in range(num_words):
        word = "".join(draw.choices(SYLLABLES, k=draw.randint(1, 3)))
        word += draw.choice(["", "", "", "", ",", ".", ".\n", ":\n    ", " = 42", " é", " 日本"])
        words.append(word.capitalize() if number % 11 == 0 else word)
    return " ".join(words)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [made_up_text(seed) for seed in range(120)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / MODEL_NAME).write_bytes(train_tokenizer(texts, TokenizerConfig(vocab_size=600)))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(tokenizer_folder / MODEL_NAME)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(documents: list[Any], name: str = "texts.jsonl") -> Path:
        lines = (json.dumps(value if isinstance(value, dict) else {"text": value}) for value in documents)
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def jsonl_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Settings for a small JSONL corpus, inline and with a small vocabulary."""

    def make(path: Path | str, **changes: Any) -> DataConfig:
        corpus = changes.pop("corpus", {})
        values: dict[str, Any] = {
            "corpus": CorpusConfig(name="jsonl", format=Format.jsonl, paths=[str(path)], **corpus),
            "rules": RulesConfig(min_words=50, max_duplicate_line_fraction=0.3),
            "tokenizer": TokenizerConfig(vocab_size=600),
            "pack": PackConfig(seq_lens=[64]),
            "engine": EngineConfig(kind=EngineKind.inline),
            "out": str(tmp_path / "out"),
        }
        return DataConfig(**(values | changes))

    return make


@pytest.fixture
def batch_of() -> Callable[[list[str]], tuple[Any, Any]]:
    """Texts back to back as kernels take them."""

    def make(texts: list[str]) -> tuple[Any, Any]:
        raw = [text.encode() for text in texts]
        offsets = np.zeros(len(raw) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in raw], out=offsets[1:])
        return np.frombuffer(bytearray().join(raw), dtype=np.uint8), offsets

    return make
