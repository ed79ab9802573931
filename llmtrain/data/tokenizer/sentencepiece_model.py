"""A SentencePiece model. Ids are SentencePiece's own for every text.

SentencePiece writes a space as U+2581, so it reads a literal U+2581 in a text as a space. Models that we
train escape that character before it comes to that, and SentencePiece itself undoes it when it decodes, so
decode(encode(text)) == text holds for them in every program that uses SentencePiece. Of a model that was
given, decode(encode(text)) is the text as the model normalises it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llmtrain.data.tokenizer.tokenizer import Ids, Tokenizer, special_ids, utf8
from llmtrain.errors import DataError

MODEL_NAME = "tokenizer.model"
SPACE_MARK = "\u2581"
"""How SentencePiece writes a space inside a piece."""
ESCAPE = {"\ufdd0": "\ufdd0\ufdd2", SPACE_MARK: "\ufdd0\ufdd1"}
"""In this order one after the other, or both at once: no two texts have the same escape. U+FDD0 to U+FDD2 are
noncharacters (Unicode 16, section 23.7), which text should not have; if it does, they come back, too."""
ESCAPE_CHARSMAP_SHA256 = "68ce026b7c2fe69e98cfc2eb9fc31ec2fc479eeb3ff30ecd2a23bccc81e00007"
"""Of the compiled rule in a model's normaliser. A test holds it against what SentencePiece compiles."""
ESCAPED_BYTES = {mark.encode(): escaped.encode() for mark, escaped in ESCAPE.items()}
KINDS = {1: "sentencepiece_unigram", 2: "sentencepiece_bpe"}
"""By the model file's own numbers; 3 and 4 are words and characters, which nobody trains on."""


class SentencePieceTokenizer(Tokenizer):
    """One model file."""

    file_name = MODEL_NAME

    def __init__(self, model: bytes, *, name: str = "the model", eos_id: int | None = None) -> None:
        """
        Args:
            name: what messages call it.
            eos_id: the piece that ends a document, for a model that names none.
        """
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name} is not a SentencePiece model: {error}") from error
        self.proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        model_type = self.proto.trainer_spec.model_type
        if model_type not in KINDS:
            raise DataError(f"{name} has model_type {model_type}; known are {KINDS}")
        self.kind = KINDS[model_type]
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self.processor.get_piece_size()
        own = {which: _id(getattr(self.processor, f"{which}_id")()) for which in ("eos", "bos", "pad", "unk")}
        if eos_id is not None and own["eos"] not in (None, eos_id):
            raise DataError(
                f"{name} ends documents with id {own['eos']}, and {eos_id} was given; leave that out"
            )
        chosen = own["eos"] if eos_id is None else eos_id
        if chosen is None or not 0 <= chosen < self.vocab_size:
            raise DataError(
                f"{name} has no piece that ends a document (its eos_id is -1); give one of its "
                f"{self.vocab_size} ids as tokenizer.given_eos_id (now {eos_id})"
            )
        self.eos_id, self.bos_id, self.pad_id, self.unk_id = chosen, own["bos"], own["pad"], own["unk"]
        pieces = [(self.processor.id_to_piece(id_), id_) for id_ in range(self.vocab_size)]
        self.special_ids = special_ids(p for p in pieces if not self._is_normal(p[1]))
        self.byte_ids = {int(piece[3:5], 16): id_ for piece, id_ in pieces if self.processor.is_byte(id_)}
        self._piece_bytes = [self._bytes_of(piece, id_) for piece, id_ in pieces]
        spec = self.proto.normalizer_spec
        charsmap = hashlib.sha256(spec.precompiled_charsmap).hexdigest()
        self.escapes = charsmap == ESCAPE_CHARSMAP_SHA256
        """Whether the normaliser does nothing but our escape."""
        self.is_plain = (
            (self.escapes or not spec.precompiled_charsmap)
            and not spec.add_dummy_prefix
            and not spec.remove_extra_whitespaces
        )
        """Whether it does nothing to the text, but for the escape."""

    @classmethod
    def load(cls, path: Path, *, eos_id: int | None = None) -> SentencePieceTokenizer:
        return cls(path.read_bytes(), name=str(path), eos_id=eos_id)

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return self.encode_bytes(utf8(texts))

    def encode_bytes(self, texts: list[bytes]) -> list[Ids]:
        """Ids of each text of UTF-8 bytes."""
        found: list[Ids] = self.processor.encode(texts, num_threads=1, return_type="numpy")
        return [ids.astype(np.int32, copy=False) for ids in found]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        decoded: str = self.processor.decode([int(id_) for id_ in ids])
        return decoded

    def normalise(self, text: str) -> str:
        """What decode(encode(text)) gives where every character has a piece or bytes."""
        if self.escapes and self.is_plain:
            return text
        normal: str = self.processor.normalize(text).replace(SPACE_MARK, " ")
        spec = self.proto.normalizer_spec
        if spec.remove_extra_whitespaces:
            return normal.lstrip(" ")
        has_prefix = spec.add_dummy_prefix and not self.proto.trainer_spec.treat_whitespace_as_suffix
        return normal.removeprefix(" ") if has_prefix else normal

    def pieces(self, ids: Ids) -> list[bytes]:
        pieces = [self._piece_bytes[id_] for id_ in ids.tolist()]
        text = b"".join(pieces)
        if not (self.escapes and any(escaped in text for escaped in ESCAPED_BYTES.values())):
            return pieces
        # A mark has three bytes and its escape six: the last three stand for nothing.
        is_text = np.ones(len(text), dtype=np.bool_)
        original = bytearray(text)
        for mark, escaped in ESCAPED_BYTES.items():
            at = text.find(escaped)
            while at >= 0:
                original[at : at + 3] = mark
                is_text[at + 3 : at + 6] = False
                at = text.find(escaped, at + 6)
        kept = np.frombuffer(bytes(original), dtype=np.uint8)
        ends = np.cumsum([len(piece) for piece in pieces])
        return [
            kept[begin:end][is_text[begin:end]].tobytes()
            for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
        ]

    @property
    def fallback_ids(self) -> Ids:
        found = [id_ for byte, id_ in self.byte_ids.items() if byte >= 0x80]
        return np.array([*found, *([] if self.unk_id is None else [self.unk_id])], dtype=np.int32)

    def core(self) -> sentencepiece.SentencePieceProcessor:
        """The same model for text that is normalised already: core().encode(normalised) is encode(text)."""
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(self.proto)
        proto.normalizer_spec.Clear()
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def normalised_bytes(self, text: bytes) -> bytes:
        """What core() encodes in place of `text`, spaces as spaces."""
        if not self.is_plain:
            normal: str = self.processor.normalize(text.decode())
            return normal.replace(SPACE_MARK, " ").encode()
        if not self.escapes:
            return text.replace(SPACE_MARK.encode(), b" ")
        for mark, escaped in ESCAPED_BYTES.items():
            text = text.replace(mark, escaped)
        return text

    def _is_normal(self, id_: int) -> bool:
        is_control = self.processor.is_control(id_) or self.processor.is_unknown(id_)
        return not is_control and self.proto.pieces[id_].type != self.proto.SentencePiece.USER_DEFINED

    def _bytes_of(self, piece: str, id_: int) -> bytes:
        if self.processor.is_byte(id_):
            return bytes([int(piece[3:5], 16)])
        if self.processor.is_control(id_):
            return b""
        if self.processor.is_unknown(id_):
            return str(self.processor.decode([id_])).encode()
        return piece.replace(SPACE_MARK, " ").encode()


def _id(value: int) -> int | None:
    return value if value >= 0 else None


def with_escape(model: bytes) -> bytes:
    """Take out of a trained model where on this machine the rule files lay."""
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.normalization_rule_tsv = ""
        spec.name = "escape_space_mark"
    return bytes(proto.SerializeToString(deterministic=True))
