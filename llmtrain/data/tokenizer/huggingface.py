"""A `tokenizer.json` of the tokenizers library, behind the same interface as a SentencePiece model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llmtrain.data.tokenizer.tokenizer import Ids, Tokenizer, special_ids, utf8
from llmtrain.errors import DataError

JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"


class HuggingFaceTokenizer(Tokenizer):
    """Special tokens in a text stay text; added tokens that are not special are pieces like any other."""

    kind = "huggingface"
    file_name = JSON_NAME

    def __init__(
        self, content: bytes, *, names: dict[str, str], name: str = "the file", eos_id: int | None = None
    ) -> None:
        """
        Args:
            names: from tokenizer_config.json: `eos_token`, `bos_token`, `pad_token`, `unk_token`.
            eos_id: the token that ends a document, where `names` has none.
        """
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
            facts = json.loads(content)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{name} is not a tokenizer.json: {error}") from error
        self.tokenizer.encode_special_tokens = True  # <s> in a text is text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        own = {which: self._id_of(names.get(f"{which}_token")) for which in ("eos", "bos", "pad", "unk")}
        chosen = own["eos"] if eos_id is None else eos_id
        if chosen is None or not 0 <= chosen < self.vocab_size:
            raise DataError(
                f"{name} does not say which token ends a document: put {CONFIG_NAME} with an eos_token "
                f"beside it, or give one of its {self.vocab_size} ids as tokenizer.given_eos_id "
                f"(now {eos_id})"
            )
        self.eos_id, self.bos_id, self.pad_id, self.unk_id = chosen, own["bos"], own["pad"], own["unk"]
        added = facts.get("added_tokens") or []
        self.special_ids = special_ids((token["content"], token["id"]) for token in added if token["special"])
        self._control_ids = {token["id"] for token in added if token["special"]}
        self._is_byte_level = "ByteLevel" in json.dumps(facts.get("decoder"))

    @classmethod
    def load(cls, path: Path, *, eos_id: int | None = None) -> HuggingFaceTokenizer:
        beside = path.with_name(CONFIG_NAME)
        facts: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        names = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in facts.items()
            if key.endswith("_token") and value is not None and not isinstance(value, bool)
        }
        return cls(path.read_bytes(), names=names, name=str(path), eos_id=eos_id)

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        utf8(texts)
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        decoded: str = self.tokenizer.decode([int(id_) for id_ in ids], skip_special_tokens=True)
        return decoded

    def pieces(self, ids: Ids) -> list[bytes]:
        return [self._bytes_of(id_) for id_ in ids.tolist()]

    @property
    def fallback_ids(self) -> Ids:
        ids = [self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(0x80, 0x100)]
        known = [id_ for id_ in (*ids, self.unk_id) if id_ is not None]
        return np.array(known, dtype=np.int32)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.tokenizer.token_to_id(token)

    def _bytes_of(self, id_: int) -> bytes:
        if id_ in self._control_ids:
            return b""
        token = self.tokenizer.id_to_token(id_) or ""
        if self._is_byte_level and all(char in BYTE_OF for char in token):
            return bytes(BYTE_OF[char] for char in token)
        return self.decode([id_]).encode()


def _byte_letters() -> dict[str, int]:
    """How byte-level BPE writes bytes as characters (Radford et al. 2019, GPT-2): printable ones of Latin-1
    as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


BYTE_OF = _byte_letters()
