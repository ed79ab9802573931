"""Evaluation items in the training text: which documents hold n-grams of words of which items.

Word n-grams as in Brown et al. 2020 (GPT-3, arXiv:2005.14165, appendix C: 13 words, lower case, without
punctuation). Words are those of `llmtrain.data.text.words`, for items and documents alike, so white space,
case and punctuation make no difference. N-grams are told apart by 64-bit hashes: with 10^6 of them in the
index, one in 2 * 10^13 words of text is taken for one by mistake.

The scan stores the counts and the pairs of `EvalIndex.matches`; a rule drops documents by the count; `report`
puts the pairs of all documents together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.content.config import DecontaminationConfig, EvaluationConfig
from llmtrain.data.content.files import open_text
from llmtrain.data.document import normalize, utf8
from llmtrain.data.text.words import IS_WORD, Words, split_words
from llmtrain.errors import DataError, unknown_name

PAIR = np.dtype([("document", "<i8"), ("item", "<i4"), ("ngram", "<i8"), ("word", "<i8")])
"""An n-gram of an item in a document: document of the batch, item, n-gram (both numbers of the index), and
the number of its first word among the document's words. Once for each n-gram, where it stands first."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_BITS_A_KEY = 32
_LAST_WORDS = 1 << 14
_LISTED_DOCUMENTS = 100


@dataclass(frozen=True, kw_only=True)
class EvalItem:
    set_title: str
    id: str
    num_words: int
    num_ngrams: int
    """Different ones in the index: those of more items than `max_items` are not."""


class Matches(NamedTuple):
    """What documents of a batch share with evaluation items."""

    counts: npt.NDArray[np.int64]
    """Positions of each document at which an n-gram of some item ends."""
    pairs: npt.NDArray[Any]
    """Rows of PAIR, sorted by document, item, ngram."""


class EvalIndex:
    """The n-grams of evaluation sets."""

    def __init__(self, items: list[EvalItem], keys: npt.NDArray[np.uint64], key_items: npt.NDArray[np.int64],
                 sizes: npt.NDArray[np.int64], last_words: npt.NDArray[np.uint64],
                 num_short: dict[str, int], num_ignored: int) -> None:  # fmt: skip
        self.items = items
        self.num_short = num_short
        """Items of each set without a text of `min_words`: not looked for."""
        self.num_ignored = num_ignored
        """N-grams that occur in too many items."""
        self.sizes = sizes
        """Lengths of n-grams, in words: those of shorter texts, and `ngram_words`."""
        distinct, first = np.unique(keys, return_index=True)
        self.num_ngrams = len(distinct)
        self._item_offsets = np.append(first, len(keys)).astype(np.int64)
        self._key_items = key_items
        self._powers = np.array([_power(int(size)) for size in sizes], dtype=np.uint64)
        self._bits, self._keys, self._numbers = _table(distinct)
        self._last_words = last_words

    @classmethod
    def load(cls, cfg: DecontaminationConfig) -> EvalIndex:
        """Read the evaluation sets that `cfg` names.

        Raises:
            DataError: a set that is missing, damaged, lacks a field, or has no item to look for.
        """
        rows: list[tuple[str, str, int]] = []
        keys: list[npt.NDArray[np.uint64]] = []
        owners: list[npt.NDArray[np.int64]] = []
        last_words = np.zeros(_LAST_WORDS, dtype=np.uint64)
        num_short: dict[str, int] = {}
        for one in cfg.sets:
            num_items, num_short[one.title] = 0, 0
            for name, texts in _items(one):
                num_items += 1
                hashes, num_words = _item_keys(texts, cfg, last_words)
                if not len(hashes):
                    num_short[one.title] += 1
                    continue
                keys.append(hashes)
                owners.append(np.full(len(hashes), len(rows), dtype=np.int64))
                rows.append((one.title, name, num_words))
            if num_items == num_short[one.title]:
                raise DataError(
                    f"the evaluation set {one.title} has {num_items} items and none with a text of "
                    f"{cfg.min_words} words in the fields {one.fields}; check fields, or lower "
                    "content.decontamination.min_words"
                )
        key = np.concatenate(keys) if keys else np.zeros(0, dtype=np.uint64)
        owner = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)
        order = np.lexsort((owner, key))
        key, owner = key[order], owner[order]
        distinct, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        kept = (
            counts <= cfg.max_items if cfg.max_items is not None else np.ones(len(distinct), dtype=np.bool_)
        )
        key, owner = key[kept[inverse]], owner[kept[inverse]]
        per_item = np.bincount(owner, minlength=len(rows)).tolist()
        items = [
            EvalItem(set_title=title, id=name, num_words=num_words, num_ngrams=num_ngrams)
            for (title, name, num_words), num_ngrams in zip(rows, per_item, strict=True)
        ]
        return cls(
            items,
            key,
            owner,
            np.flatnonzero([int(np.bitwise_or.reduce(last_words)) >> size & 1 for size in range(64)]),
            last_words,
            num_short,
            int((~kept).sum()),
        )

    def matches(self, words: Words) -> Matches:
        """N-grams of evaluation items in the documents whose words are given."""
        num_documents = len(words.offsets) - 1
        counts = np.zeros(num_documents, dtype=np.int64)
        if not self.num_ngrams:
            return Matches(counts, np.zeros(0, dtype=PAIR))
        hits = np.empty((1024, 3), dtype=np.int64)
        while True:
            num_hits = _probe(
                words.folded,
                words.kind,
                words.offsets,
                self.sizes,
                self._powers,
                self._bits,
                self._keys,
                self._numbers,
                self._last_words,
                counts,
                hits,
            )
            if num_hits <= len(hits):
                break
            hits = np.empty((num_hits, 3), dtype=np.int64)
        return Matches(counts, self._pairs(hits[:num_hits]))

    def _pairs(self, hits: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A row for each item that has the n-gram of a hit (document, n-gram, first word)."""
        order = np.lexsort((hits[:, 2], hits[:, 1], hits[:, 0]))
        hits = hits[order]
        if len(hits):
            is_first = np.ones(len(hits), dtype=np.bool_)
            is_first[1:] = (hits[1:, :2] != hits[:-1, :2]).any(axis=1)
            hits = hits[is_first]
        first = self._item_offsets[hits[:, 1]]
        num_items = self._item_offsets[hits[:, 1] + 1] - first
        which = np.repeat(np.arange(len(hits)), num_items)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(num_items) - num_items, num_items)
        pairs = np.empty(len(which), dtype=PAIR)
        pairs["document"], pairs["ngram"], pairs["word"] = hits[which].T
        pairs["item"] = self._key_items[first[which] + nth]
        return pairs[np.lexsort((pairs["ngram"], pairs["item"], pairs["document"]))]

    def report(self, pairs: npt.NDArray[Any], document_ids: Sequence[str]) -> dict[str, Any]:
        """What was found, for people: each set's counts, and the items that share an n-gram with a document.

        Args:
            pairs: rows of PAIR of any number of batches, `document` an index into `document_ids`.
            document_ids: names of documents.

        Returns:
            JSON values. `sets`: items, items left out as too short, items found in part and in half or more.
            `items`, the most found first: set, id, words, n-grams, how many different ones of them were found
            and their share, in how many documents, and of those the first hundred, the one with most first.
        """
        sets = {
            title: {"items": 0, "items_too_short": short, "items_found": 0, "items_half_found": 0}
            for title, short in self.num_short.items()
        }
        for item in self.items:
            sets[item.set_title]["items"] += 1
        distinct = np.unique(pairs[["item", "document", "ngram"]])
        ends = np.flatnonzero(np.diff(distinct["item"])) + 1
        items: list[dict[str, Any]] = []
        for rows in np.split(distinct, ends) if len(distinct) else []:
            item = self.items[int(rows["item"][0])]
            num_found = len(np.unique(rows["ngram"]))
            documents, counts = np.unique(rows["document"], return_counts=True)
            order = np.lexsort((documents, -counts))
            sets[item.set_title]["items_found"] += 1
            sets[item.set_title]["items_half_found"] += 2 * num_found >= item.num_ngrams
            items.append(
                {
                    "set": item.set_title,
                    "id": item.id,
                    "words": item.num_words,
                    "ngrams": item.num_ngrams,
                    "ngrams_found": num_found,
                    "share": num_found / item.num_ngrams,
                    "num_documents": len(documents),
                    "documents": [
                        {"id": document_ids[int(documents[at])], "ngrams": int(counts[at])}
                        for at in order[:_LISTED_DOCUMENTS]
                    ],
                }
            )
        items.sort(key=lambda row: (-row["share"], -row["ngrams_found"], row["set"], row["id"]))
        return {"sets": sets, "ngrams": self.num_ngrams, "ngrams_ignored": self.num_ignored, "items": items}


def _items(cfg: EvaluationConfig) -> Iterator[tuple[str, list[str]]]:
    """Name and texts of each item."""
    for number, row in enumerate(_rows(cfg)):
        where = f"item {number} of the evaluation set {cfg.title}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is {type(row).__name__}, not an object with fields")
        texts = [text for field in cfg.fields for text in _texts(row, field, where)]
        name = str(number) if cfg.id_field is None else str(_value(row, cfg.id_field, where))
        yield name, ["\n".join(texts)] if cfg.joined else texts


def _value(row: dict[str, Any], field: str, where: str) -> Any:
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            known = value if isinstance(value, dict) else {}
            raise DataError(f"{where} lacks {field!r}: {unknown_name('field', part, map(str, known))}")
        value = value[part]
    return value


def _texts(row: dict[str, Any], field: str, where: str) -> Iterator[str]:
    value = _value(row, field, where)
    for text in value if isinstance(value, list) else [value]:
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"{where}: {field!r} is {type(text).__name__}, not text or a list of texts")
        yield text


def _rows(cfg: EvaluationConfig) -> Iterator[Any]:
    if cfg.path is not None:
        for number, line in enumerate(open_text(Path(cfg.path)), start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{cfg.path}, line {number}: not JSON ({error}); mend or remove the line"
                ) from None
        return
    import datasets  # noqa: PLC0415 - takes over a second, and only these sets need it

    assert cfg.dataset is not None
    try:
        if (Path(cfg.dataset) / "state.json").exists() or (Path(cfg.dataset) / "dataset_dict.json").exists():
            opened = datasets.load_from_disk(cfg.dataset)
            if isinstance(opened, dict):
                if cfg.split not in opened:
                    raise DataError(
                        f"the evaluation set {cfg.title}: {unknown_name('split', cfg.split, opened)}"
                    )
                opened = opened[cfg.split]
        else:
            opened = datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the evaluation set {cfg.title} cannot be opened: {error}") from error
    yield from opened


def _item_keys(
    texts: list[str], cfg: DecontaminationConfig, last_words: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], int]:
    """Different keys of an item's n-grams, and the item's words. Notes in `last_words` with which words
    n-grams of a length end: bit `size` at the word's place."""
    parts = [normalize(utf8(text)).encode() for text in texts]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    words = split_words(np.frombuffer(b"".join(parts), dtype=np.uint8), offsets)
    keys = []
    num_words = 0
    for number in range(len(parts)):
        rows = slice(words.offsets[number], words.offsets[number + 1])
        folded = words.folded[rows][words.kind[rows] & IS_WORD != 0]
        num_words += len(folded)
        if len(folded) >= cfg.min_words:
            size = min(cfg.ngram_words, len(folded))
            keys.append(_grams(folded, size, _power(size)))
            last_words[folded[size - 1 :] & np.uint64(_LAST_WORDS - 1)] |= np.uint64(1 << size)
    distinct = np.unique(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.uint64)
    return distinct, num_words


def _power(size: int) -> np.uint64:
    """_BASE to the power of `size`, modulo 2^64."""
    return np.uint64(pow(int(_BASE), size, 1 << 64))


@compiled
def _key(prefix: Any, earlier: Any, power: Any, size: int) -> Any:
    """Key of the n-gram between two prefixes: a polynomial of its words' hashes, stirred."""
    key = (prefix - earlier * power) ^ np.uint64(size)
    key = (key ^ (key >> np.uint64(32))) * _MIX
    return key ^ (key >> np.uint64(29))


@compiled
def _grams(folded: Any, size: int, power: Any) -> Any:
    """Keys of all n-grams of `size` words."""
    keys = np.empty(len(folded) - size + 1, dtype=np.uint64)
    prefix = np.zeros(len(folded) + 1, dtype=np.uint64)
    for word in range(len(folded)):
        prefix[word + 1] = prefix[word] * _BASE + folded[word]
        if word + 1 >= size:
            keys[word + 1 - size] = _key(prefix[word + 1], prefix[word + 1 - size], power, size)
    return keys


@compiled
def _table(keys: Any) -> Any:
    """Bits that say in one look that a key is surely absent, and an open hash table: slot -> key, number."""
    num_bits = 1 << 16
    while num_bits < _BITS_A_KEY * len(keys):
        num_bits *= 2
    bits = np.zeros(num_bits // 64, dtype=np.uint64)
    capacity = 16
    while capacity < 2 * len(keys):
        capacity *= 2
    slots = np.zeros(capacity, dtype=np.uint64)
    numbers = np.full(capacity, -1, dtype=np.int64)
    for number in range(len(keys)):
        key = keys[number]
        bit = key & np.uint64(num_bits - 1)
        bits[bit >> np.uint64(6)] |= np.uint64(1) << (bit & np.uint64(63))
        slot = np.int64(key >> np.uint64(20)) & (capacity - 1)
        while numbers[slot] >= 0:
            slot = (slot + 1) & (capacity - 1)
        slots[slot] = key
        numbers[slot] = number
    return bits, slots, numbers


@compiled
def _number(key: Any, bits: Any, keys: Any, numbers: Any) -> int:
    """The key's number, or -1."""
    bit = key & np.uint64(64 * len(bits) - 1)
    if (bits[bit >> np.uint64(6)] >> (bit & np.uint64(63))) & np.uint64(1) == 0:
        return -1
    mask = len(keys) - 1
    slot = np.int64(key >> np.uint64(20)) & mask
    while numbers[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    number: int = numbers[slot]
    return number


@compiled
def _probe(
    folded: Any,
    kind: Any,
    offsets: Any,
    sizes: Any,
    powers: Any,
    bits: Any,
    keys: Any,
    numbers: Any,
    last_words: Any,
    counts: Any,
    hits: Any,
) -> int:
    """Fill `counts`, and `hits` with document, n-gram and first word; return how many hits there are, also
    when that is more than `hits` holds."""
    most = np.int64(0)
    for document in range(len(offsets) - 1):
        most = max(most, offsets[document + 1] - offsets[document])
    prefix = np.zeros(most + 1, dtype=np.uint64)
    place = np.zeros(most + 1, dtype=np.int64)
    last_mask = np.uint64(len(last_words) - 1)
    num_hits = 0
    for document in range(len(offsets) - 1):
        first = offsets[document]
        num_words = 0
        count = 0
        last = np.uint64(0)
        for word in range(first, offsets[document + 1]):
            if kind[word] & IS_WORD == 0:
                continue
            place[num_words] = word - first
            num_words += 1
            last = last * _BASE + folded[word]
            prefix[num_words] = last
            ends = last_words[folded[word] & last_mask]
            if ends == 0:
                continue
            is_hit = False
            for at in range(len(sizes)):
                size = sizes[at]
                if (ends >> np.uint64(size)) & np.uint64(1) == 0 or num_words < size:
                    continue
                number = _number(_key(last, prefix[num_words - size], powers[at], size), bits, keys, numbers)
                if number >= 0:
                    is_hit = True
                    if num_hits < len(hits):
                        hits[num_hits] = document, number, place[num_words - size]
                    num_hits += 1
            count += is_hit
        counts[document] = count
    return num_hits
