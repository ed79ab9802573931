"""Text to token ids and back, whatever made the vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError

FACTS_NAME = "facts.json"

Ids = npt.NDArray[np.int32]

SPECIAL_NAMES = {
    "<fim_prefix>": "fim_prefix",
    "<fim_middle>": "fim_middle",
    "<fim_suffix>": "fim_suffix",
    "<|fim_prefix|>": "fim_prefix",
    "<|fim_middle|>": "fim_middle",
    "<|fim_suffix|>": "fim_suffix",
    "\u2581<PRE>": "fim_prefix",
    "\u2581<MID>": "fim_middle",
    "\u2581<SUF>": "fim_suffix",
    "<mask>": "mask",
    "[MASK]": "mask",
}
"""Pieces that objectives look for, as StarCoder, Qwen, Code Llama, and BERT name them; T5's sentinels are
<extra_id_0>, <extra_id_1>, ..."""


class Tokenizer(ABC):
    """What the rest of the project asks of a tokenizer. Ids are int32, without BOS or EOS."""

    kind: str
    """`sentencepiece_bpe`, `sentencepiece_unigram` or `huggingface`."""
    file_name: str
    """Of the one file that is the model."""
    fingerprint: str
    """sha256 of that file."""
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None
    unk_id: int | None
    special_ids: dict[str, int]
    """fim_prefix, fim_middle, fim_suffix, mask, sentinel_0, ...: those that there are."""

    def encode(self, text: str) -> Ids:
        """Ids of `text`. Control pieces in it (`</s>`) are text like any other."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """Ids of each text."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | Ids) -> str:
        """Text of `ids`. Control ids (EOS) vanish; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def pieces(self, ids: Ids) -> list[bytes]:
        """The bytes of text that each of these tokens stands for, in their place among the others."""

    @property
    @abstractmethod
    def fallback_ids(self) -> Ids:
        """Ids that stand for a byte of a character that has no piece, or for any such character."""


def utf8(texts: list[str]) -> list[bytes]:
    """The texts' bytes.

    Raises:
        DataError: half a surrogate pair, which has none.
    """
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise DataError(f"text with half a surrogate pair is not UTF-8: {error}") from error


def special_ids(pieces: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Of control pieces and their ids: those that objectives look for, by our names."""
    found = {}
    for piece, id_ in pieces:
        number = piece.removeprefix("<extra_id_").removesuffix(">")
        if piece in SPECIAL_NAMES:
            found[SPECIAL_NAMES[piece]] = id_
        elif piece == f"<extra_id_{number}>" and number.isdecimal():
            found[f"sentinel_{number}"] = id_
    return found
