"""Exact SentencePiece BPE at the speed of a table lookup.

A merge of BPE always gives a piece of the vocabulary. So where no piece holds bytes a and b side by side, no
merge ever crosses an a|b in the text, and the text may be cut there: encoding the parts one by one gives
the ids of the whole. The parts are few ("words", mostly with the space in front), so each distinct one
is encoded by SentencePiece once and looked up afterwards. The text is cut as the model normalises it, and
the table of side-by-side bytes is read off its pieces; `why_not_exact` names models for which the argument
does not hold. The caller still compares documents with SentencePiece as it goes (`differing`).
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.tokenizer.sentencepiece_model import ESCAPED_BYTES, SPACE_MARK, SentencePieceTokenizer
from llmtrain.data.tokenizer.tokenizer import Ids, Tokenizer

MAX_STORE_BYTES = 64 << 20
"""Bytes of distinct words kept; past it the store starts anew. Decides memory, never ids."""
START_CAPACITY = 1 << 16

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


PROBES = (
    "a", " a", "a b", "  a  b ", "\n\n", "\r\n", "\t", "\x00", "<s></s><unk>", "<0x0A>", "\u2581", " \u2581a",
    "\ufdd0\ufdd1", "\ufb01 \uff21\uff11", "e\u0301", "\u00a0x\u3000y", "日本語", "123 4567", "😀",
    "aaaaaaaaaaaa", "",
)  # fmt: skip


def why_not_exact(tokenizer: Tokenizer) -> str | None:
    """Why words of this tokenizer cannot be looked up, or None if they can."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return f"it is a {tokenizer.kind} tokenizer"
    if tokenizer.kind != "sentencepiece_bpe":
        return "it is a Unigram model, whose best path depends on the whole sentence"
    if not tokenizer.proto.normalizer_spec.escape_whitespaces:
        return "it leaves spaces as they are (escape_whitespaces=false)"
    if not tokenizer.byte_ids:
        return "it has no byte fallback, and makes one token of unknown characters side by side"
    unused = sum(piece.type == piece.UNUSED for piece in tokenizer.proto.pieces)
    if unused:
        return f"{unused} of its pieces are marked as unused, which fall apart as their neighbours have it"
    core = tokenizer.core()
    for text in PROBES:
        if core.encode(tokenizer.normalised_bytes(text.encode())) != tokenizer.processor.encode(text):
            return f"it does not encode {text!r} as it does the normalised text"
    return None


class WordEncoder:
    """Encode documents through a store of distinct words. `why_not_exact` must have nothing against it."""

    _slots: npt.NDArray[np.int32]  # number of a word + 1; 0 is empty
    _word_hash: npt.NDArray[np.uint64]
    _word_start: Ints
    _arena: Bytes  # the words' bytes
    _num_words: int
    _num_arena_bytes: int
    _ids: Ids
    _ids_start: Ints
    _num_ids: int

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self.tokenizer = tokenizer
        self.joined = joined_bytes(tokenizer)
        self._core = tokenizer.core()
        self._reset()

    def encode(self, text: Bytes, doc_offsets: Ints) -> tuple[Ids, Ints]:
        """Encode documents `text[doc_offsets[d]:doc_offsets[d + 1]]` and append EOS to each.

        Returns:
            token ids of all documents back to back, and the number of tokens of each.
        """
        text, doc_offsets = self._normalised(text, doc_offsets)
        num_documents = len(doc_offsets) - 1
        if self._num_arena_bytes > MAX_STORE_BYTES:
            self._reset()
        self._reserve_arena(len(text))
        words = np.empty(len(text), dtype=np.int32)
        word_ends = np.empty(num_documents, dtype=np.int64)
        first_new = self._num_words
        at, document, num_words_out = int(doc_offsets[0]), 0, 0
        while True:
            at, document, num_words_out, self._num_words, self._num_arena_bytes = _cut_and_look_up(
                text, doc_offsets, self.joined, self._slots, self._word_hash, self._word_start, self._arena,
                words, word_ends, at, document, num_words_out, self._num_words, self._num_arena_bytes,
            )  # fmt: skip
            if document == num_documents:
                break
            self._grow_table()
        self._encode_new_words(first_new)
        lengths = _token_counts(words, word_ends, self._ids_start)
        ids = _gather(words, word_ends, lengths, self._ids_start, self._ids, self.tokenizer.eos_id)
        return ids, lengths

    def differing(self, text: Bytes, doc_offsets: Ints, ids: Ids, lengths: Ints, documents: Ints) -> int:
        """How many of these documents SentencePiece itself encodes differently. The answer must be 0."""
        ends = np.cumsum(lengths)
        texts = [bytes(text[doc_offsets[d] : doc_offsets[d + 1]]).decode() for d in documents]
        expected = self.tokenizer.encode_batch(texts)
        found = [ids[ends[d] - lengths[d] : ends[d] - 1] for d in documents]
        return sum(not np.array_equal(a, b) for a, b in zip(expected, found, strict=True))

    def _normalised(self, text: Bytes, doc_offsets: Ints) -> tuple[Bytes, Ints]:
        """The documents as core() takes them. Writable, so that kernels meet one type."""
        whole = text.tobytes()
        marks = (*ESCAPED_BYTES,)
        if self.tokenizer.is_plain and not any(mark in whole for mark in marks):
            return np.array(text), np.array(doc_offsets)
        documents = [
            self.tokenizer.normalised_bytes(part)
            if not self.tokenizer.is_plain or any(mark in part for mark in marks)
            else part
            for part in (whole[a:b] for a, b in pairwise(doc_offsets.tolist()))
        ]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in documents], dtype=np.int64)])
        return np.frombuffer(bytearray(b"".join(documents)), dtype=np.uint8), offsets.astype(np.int64)

    def _reset(self) -> None:
        self._slots = np.zeros(2 * START_CAPACITY, dtype=np.int32)
        self._word_hash = np.zeros(START_CAPACITY, dtype=np.uint64)
        self._word_start = np.zeros(START_CAPACITY + 1, dtype=np.int64)
        self._arena = np.zeros(1 << 20, dtype=np.uint8)
        self._num_words = 0
        self._num_arena_bytes = 0
        self._ids = np.zeros(1 << 20, dtype=np.int32)
        self._ids_start = np.zeros(START_CAPACITY + 1, dtype=np.int64)
        self._num_ids = 0

    def _reserve_arena(self, num_bytes: int) -> None:
        needed = self._num_arena_bytes + num_bytes
        if needed > len(self._arena):
            self._arena = _grown(self._arena, max(needed, 2 * len(self._arena)))

    def _grow_table(self) -> None:
        capacity = 2 * len(self._word_hash)
        self._word_hash = _grown(self._word_hash, capacity)
        self._word_start = _grown(self._word_start, capacity + 1)
        self._ids_start = _grown(self._ids_start, capacity + 1)
        self._slots = np.zeros(2 * capacity, dtype=np.int32)
        _fill_slots(self._slots, self._word_hash, self._num_words)

    def _encode_new_words(self, first_new: int) -> None:
        if first_new == self._num_words:
            return
        start = int(self._word_start[first_new])
        raw = self._arena[start : int(self._word_start[self._num_words])].tobytes()
        cuts = (self._word_start[first_new : self._num_words + 1] - start).tolist()
        encoded = self._core.encode([raw[a:b] for a, b in pairwise(cuts)], num_threads=1)
        counts = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        new_ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(counts.sum()))
        if self._num_ids + len(new_ids) > len(self._ids):
            self._ids = _grown(self._ids, 2 * (self._num_ids + len(new_ids)))
        self._ids[self._num_ids : self._num_ids + len(new_ids)] = new_ids
        self._ids_start[first_new + 1 : self._num_words + 1] = self._num_ids + np.cumsum(counts)
        self._num_ids += len(new_ids)


def joined_bytes(tokenizer: SentencePieceTokenizer) -> npt.NDArray[np.bool_]:
    """Table [256, 256]: whether some piece holds byte b right after byte a, or b continues a character."""
    joined = np.zeros((256, 256), dtype=np.bool_)
    joined[:, 0x80:0xC0] = True  # never cut inside a UTF-8 character
    for piece in tokenizer.proto.pieces:
        if piece.type in (piece.NORMAL, piece.USER_DEFINED):
            letters = np.frombuffer(piece.piece.replace(SPACE_MARK, " ").encode(), dtype=np.uint8)
            joined[letters[:-1], letters[1:]] = True
    return joined


def _grown(array: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    larger = np.zeros(capacity, dtype=array.dtype)
    larger[: len(array)] = array
    return larger


@compiled
def _cut_and_look_up(
    text: Any, doc_offsets: Any, joined: Any, slots: Any, word_hash: Any, word_start: Any, arena: Any,
    words: Any, word_ends: Any, at: int, document: int, num_out: int, num_words: int, num_arena_bytes: int,
) -> Any:  # fmt: skip
    """Cut into words from byte `at` of `document` on and write each one's number; new words go into the
    store.

    Stops early when the store is full; the returned state says where to go on.
    """
    mask = len(slots) - 1
    while document < len(word_ends):
        end = doc_offsets[document + 1]
        while at < end:
            if num_words + 1 >= len(word_hash):
                return at, document, num_out, num_words, num_arena_bytes
            hashed = np.uint64(0xCBF29CE484222325)  # FNV-1a, 64 bits
            stop = at
            while True:
                hashed = (hashed ^ np.uint64(text[stop])) * np.uint64(0x100000001B3)
                stop += 1
                if stop == end or not joined[text[stop - 1], text[stop]]:
                    break
            hashed ^= hashed >> np.uint64(29)
            slot = np.int64(hashed & np.uint64(mask))
            word = -1
            while slots[slot] != 0:
                candidate = slots[slot] - 1
                if word_hash[candidate] == hashed:
                    start = word_start[candidate]
                    if word_start[candidate + 1] - start == stop - at:
                        same = True
                        for offset in range(stop - at):
                            if arena[start + offset] != text[at + offset]:
                                same = False
                                break
                        if same:
                            word = candidate
                            break
                slot = (slot + 1) & mask
            if word < 0:
                word = num_words
                slots[slot] = word + 1
                word_hash[word] = hashed
                for offset in range(stop - at):
                    arena[num_arena_bytes + offset] = text[at + offset]
                num_arena_bytes += stop - at
                num_words += 1
                word_start[num_words] = num_arena_bytes
            words[num_out] = word
            num_out += 1
            at = stop
        word_ends[document] = num_out
        document += 1
    return at, document, num_out, num_words, num_arena_bytes


@compiled
def _fill_slots(slots: Any, word_hash: Any, num_words: int) -> None:
    mask = len(slots) - 1
    for word in range(num_words):
        slot = np.int64(word_hash[word] & np.uint64(mask))
        while slots[slot] != 0:
            slot = (slot + 1) & mask
        slots[slot] = word + 1


@compiled
def _token_counts(words: Any, word_ends: Any, ids_start: Any) -> Any:
    counts = np.empty(len(word_ends), dtype=np.int64)
    at = 0
    for document in range(len(word_ends)):
        total = 1  # EOS
        while at < word_ends[document]:
            word = words[at]
            total += ids_start[word + 1] - ids_start[word]
            at += 1
        counts[document] = total
    return counts


@compiled
def _gather(words: Any, word_ends: Any, counts: Any, ids_start: Any, ids: Any, eos_id: int) -> Any:
    out = np.empty(counts.sum(), dtype=np.int32)
    at = 0
    filled = 0
    for document in range(len(word_ends)):
        while at < word_ends[document]:
            word = words[at]
            for position in range(ids_start[word], ids_start[word + 1]):
                out[filled] = ids[position]
                filled += 1
            at += 1
        out[filled] = eos_id
        filled += 1
    return out


def warm_up() -> None:
    """Compile, or load from disk, before the work is handed out."""
    text, offsets = np.array([97], dtype=np.uint8), np.array([0, 1], dtype=np.int64)
    slots, words = np.zeros(4, dtype=np.int32), np.zeros(1, dtype=np.int32)
    word_hash, starts = np.zeros(2, dtype=np.uint64), np.zeros(3, dtype=np.int64)
    word_ends = np.zeros(1, dtype=np.int64)
    joined, arena = np.zeros((256, 256), dtype=np.bool_), np.zeros(4, dtype=np.uint8)
    _cut_and_look_up(
        text, offsets, joined, slots, word_hash, starts, arena, words, word_ends, 0, 0, 0, 0, 0
    )  # fmt: skip
    _fill_slots(slots, word_hash, 0)
    lengths = _token_counts(words, word_ends, starts)
    _gather(words, word_ends, lengths, starts, np.zeros(1, dtype=np.int32), 1)
