"""A trained SentencePiece model, with an exact round trip: decode(encode(text)) == text for every text.

SentencePiece writes a space as U+2581, so it reads a literal U+2581 in the text as a space. Here that
character is cut out of the text and becomes its three UTF-8 bytes as byte pieces, which decode to it
again. Control pieces (`</s>`) in the text stay text: they become ordinary pieces, never the control id.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from llmtrain.errors import DataError
from llmtrain.files import hash_file, read_json

MODEL_NAME = "tokenizer.model"
FACTS_NAME = "facts.json"
SPACE_MARK = "\u2581"
"""How SentencePiece writes a space inside a piece."""

Ids = npt.NDArray[np.int32]


class Tokenizer:
    """SentencePiece BPE with byte fallback, identity normalisation and no dummy prefix."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, fingerprint: str) -> None:
        self.processor = processor
        self.fingerprint = fingerprint
        """sha256 of the model file."""
        self.vocab_size: int = processor.get_piece_size()
        self.eos_id: int = processor.eos_id()
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if self.eos_id < 0 or any(not processor.is_byte(id_) for id_ in self.byte_ids):
            raise DataError(
                "the tokenizer needs an EOS piece and byte fallback; train it with `llmtrain data`"
            )
        if processor.is_unknown(processor.piece_to_id(SPACE_MARK)):
            raise DataError(
                "the tokenizer has no piece for the space and would write it as the bytes of U+2581; "
                "train it with `llmtrain data`"
            )
        self._space_mark_ids = np.array([self.byte_ids[byte] for byte in SPACE_MARK.encode()], dtype=np.int32)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a tokenizer's folder, or a model file, and compare it with its recorded fingerprint."""
        model = path / MODEL_NAME if path.is_dir() else path
        if not model.is_file():
            raise DataError(
                f"no tokenizer at {path}; run `llmtrain data` first, or give the folder of {MODEL_NAME}"
            )
        fingerprint = hash_file(model)
        facts = model.with_name(FACTS_NAME)
        if facts.is_file():
            _check_fingerprint(model, fingerprint, facts)
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{model} is not a SentencePiece model: {error}") from error
        return cls(processor, fingerprint)

    def encode(self, text: str) -> Ids:
        """Ids of `text`, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """Ids of each text, without BOS or EOS."""
        cut = [text.split(SPACE_MARK) for text in texts]
        try:
            flat = [part.encode() for parts in cut for part in parts]
        except UnicodeEncodeError as error:
            raise DataError(f"text with half a surrogate pair is not UTF-8: {error}") from error
        ids = self.processor.encode(flat, num_threads=1)
        ids_of_parts = iter(np.array(part, dtype=np.int32) for part in ids)
        return [self._join([next(ids_of_parts) for _ in parts]) for parts in cut]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        """Text of `ids`. Control ids (EOS) vanish; bytes that are not UTF-8 become U+FFFD."""
        decoded: str = self.processor.decode([int(id_) for id_ in ids])
        return decoded

    def _join(self, parts: list[Ids]) -> Ids:
        if len(parts) == 1:
            return parts[0]
        marks = [self._space_mark_ids] * (2 * len(parts) - 1)
        marks[::2] = parts
        return np.concatenate(marks)


def _check_fingerprint(model: Path, fingerprint: str, facts: Path) -> None:
    mend = f"delete {model.parent} and run `llmtrain data` again, or restore the file"
    try:
        recorded = read_json(facts)["fingerprint"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{facts} is damaged ({error!r}); {mend}") from error
    if recorded != fingerprint:
        raise DataError(
            f"{model} is damaged: its sha256 is {fingerprint}, {FACTS_NAME} says {recorded}; {mend}"
        )
