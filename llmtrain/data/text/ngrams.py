"""Repeated word n-grams of a document, n = 2 to 10, in one descent from the short to the long.

Where n + 1 words stand twice, so do the n words at either end. So only the positions whose n-gram and whose
neighbour's n-gram occur more than once need be looked at for n + 1: in prose the pairs cost a lookup for each
word, the triples one for four words, and the rest almost nothing. Nothing is approximate but that n-grams are
told apart by 64-bit hashes of their words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmtrain.compiled import compiled_lean
from llmtrain.data.text.lines import table_mask
from llmtrain.data.text.utf8 import PRIME

TOP_SIZES = (2, 3, 4)
DUPLICATE_SIZES = (5, 6, 7, 8, 9, 10)
_LARGEST_TOP = TOP_SIZES[-1]
_LARGEST = DUPLICATE_SIZES[-1]


@compiled_lean
def _chars(num_chars: Any, first: Any, size: Any) -> Any:
    chars = np.int64(0)
    for word in range(first, first + size):
        chars += num_chars[word]
    return chars


@compiled_lean
def repeated_ngrams(
    hashes: Any,
    num_chars: Any,
    table: Any,
    keys: Any,
    counts: Any,
    level: Any,
    seen: Any,
    places: Any,
    out: Any,
) -> None:
    """Fill `out` for one document: characters of the most frequent 2-, 3- and 4-gram, then characters in
    repeated 5- to 10-grams.

    The most frequent n-gram is the first to appear among those of the highest count, even if that is one; its
    characters, with a space between words, count as often as it occurs. Repeated n-grams: from the first
    word on, an n-gram met before adds the characters of its words, and the next to be looked at begins behind
    it; any other is put down as met, and the next begins one word later.

    Args:
        hashes, num_chars: of the document's words.
        table, keys, counts, level, seen, places: room for as many items as the document has words;
            `table` for twice as many, rounded up to a power of two.
    """
    num_words = len(hashes)
    out[:] = 0
    for size in range(2, _LARGEST_TOP + 1):
        if num_words >= size:
            out[size - 2] = _chars(num_chars, 0, size) + size - 1
    if num_words < 3:
        return

    # Level n of a position: its n-gram is known to occur more than once.
    level[:num_words] = 0
    mask = table_mask(num_words)
    table[: mask + 1] = 0
    best: Any = 1
    best_at: Any = 0
    at: Any
    for at in range(num_words - 1):
        key = hashes[at] * PRIME + hashes[at + 1]
        key ^= key >> np.uint64(32)
        keys[at] = key
        slot: Any = np.int64(key) & mask
        while table[slot] and keys[table[slot] - 1] != key:
            slot = (slot + 1) & mask
        found = table[slot] - 1
        if found < 0:
            table[slot] = at + 1
            counts[at] = 1
        else:
            level[at] = level[found] = 2
            counts[found] += 1
            if counts[found] > best or (counts[found] == best and found < best_at):
                best, best_at = counts[found], found
    if best == 1:
        return
    out[0] = best * (_chars(num_chars, best_at, 2) + 1)

    num_places = 0
    for at in range(num_words - 2):
        places[num_places] = at
        num_places += level[at] & level[at + 1] & 2 != 0
    seen[:num_words] = 0
    for size in range(3, _LARGEST + 1):
        if num_places < 2:
            break
        mask = table_mask(num_places)
        table[: mask + 1] = 0
        best, best_at = 1, 0
        next_at = 0
        repeated = np.int64(0)
        for number in range(num_places):
            at = np.int64(places[number])
            key = keys[at] * PRIME + hashes[at + size - 1]
            key ^= key >> np.uint64(32)
            keys[at] = key
            slot = np.int64(key) & mask
            while table[slot] and keys[table[slot] - 1] != key:
                slot = (slot + 1) & mask
            found = np.int64(table[slot]) - 1
            if found < 0:
                table[slot] = at + 1
                counts[at] = 1
                found = at
            else:
                level[at] = level[found] = size
                counts[found] += 1
                if counts[found] > best or (counts[found] == best and found < best_at):
                    best, best_at = counts[found], found
            if size > _LARGEST_TOP and at >= next_at:
                if seen[found] == size:
                    repeated += _chars(num_chars, at, size)
                    next_at = at + size
                else:
                    seen[found] = size
        if best == 1:
            break
        if size <= _LARGEST_TOP:
            out[size - 2] = best * (_chars(num_chars, best_at, size) + size - 1)
        else:
            out[size - 2] = repeated
        kept = 0
        for number in range(num_places):
            at = np.int64(places[number])
            places[kept] = at
            kept += level[at] == size and at + size < num_words and level[at + 1] == size
        num_places = kept
