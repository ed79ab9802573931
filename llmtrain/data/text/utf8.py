"""How compiled loops read UTF-8: by eights, by characters, and as hashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled_lean
from llmtrain.data.text import unicode_tables as unicode

Bytes = npt.NDArray[np.uint8]

ONES = np.uint64(0x0101010101010101)
HIGH = np.uint64(0x8080808080808080)
LOW_7 = np.uint64(0x7F7F7F7F7F7F7F7F)
_SEED = np.uint64(0x9E3779B97F4A7C15)
PRIME = np.uint64(0xD6E8FEB86659FD93)
_PRIME_2 = np.uint64(0xFF51AFD7ED558CCD)
"""Odd 64-bit constants: of splitmix64, of Pelle Evensen's rrmxmx, of MurmurHash3."""


def as_kernels_read(text: Bytes) -> tuple[Bytes, npt.NDArray[np.uint64]]:
    """The bytes, at least 16, in one piece that may be written to, and a view of them by eights.

    Item i of the view is bytes i to i + 7 as a little-endian number: read it with `load`. Always these two
    types, since kernels are compiled anew for each other one.
    """
    if len(text) < 16:
        text = np.concatenate([text, np.zeros(16 - len(text), dtype=np.uint8)])
    elif not (text.flags.writeable and text.flags.c_contiguous):
        text = text.copy()
    return text, np.ndarray(len(text) - 7, dtype="<u8", buffer=text, strides=(1,))


@compiled_lean
def load(text: Any, eight: Any, at: Any) -> Any:
    """Bytes at to at + 7 as a number, zeros behind the end of the text."""
    if at < len(eight):
        return eight[at]
    found = np.uint64(0)
    for place in range(min(8, len(text) - at)):
        found |= np.uint64(text[at + place]) << np.uint64(8 * place)
    return found


@compiled_lean
def hash_bytes(text: Any, eight: Any, start: Any, end: Any) -> Any:
    """64-bit hash of the bytes from start to end, at least one. The same on every machine."""
    length = end - start
    state = _SEED
    left = length
    while left > 8:
        state = absorbed(state, load(text, eight, start))
        start += 8
        left -= 8
    return last_hash(state, load(text, eight, start) << np.uint64(64 - 8 * left), length)


@compiled_lean
def folded_ascii_hash(text: Any, eight: Any, start: Any, end: Any) -> Any:
    """`hash_bytes` of the lower-cased bytes, all of them ASCII."""
    length = end - start
    state = _SEED
    left = length
    while left > 8:
        state = absorbed(state, _lower_cased(load(text, eight, start)))
        start += 8
        left -= 8
    return last_hash(state, _lower_cased(load(text, eight, start) << np.uint64(64 - 8 * left)), length)


@compiled_lean
def _lower_cased(block: Any) -> Any:
    """Eight ASCII bytes, lower-cased."""
    capitals = (block + _FROM_A) & ~(block + _PAST_Z) & HIGH
    return block | (capitals >> np.uint64(2))


_FROM_A, _PAST_Z = np.uint64(0x80 - ord("A")) * ONES, np.uint64(0x7F - ord("Z")) * ONES


@compiled_lean
def absorbed(state: Any, block: Any) -> Any:
    """The state of a hash after 8 more bytes, where at least one will follow."""
    state = (state ^ block) * PRIME
    return state ^ (state >> np.uint64(32))


@compiled_lean
def last_hash(state: Any, block: Any, length: Any) -> Any:
    """The hash, from its last 1 to 8 bytes, which are the high ones of `block`, the low ones being zero."""
    state = (state ^ block ^ (np.uint64(length) * _SEED)) * PRIME
    state ^= state >> np.uint64(32)
    state *= _PRIME_2
    return state ^ (state >> np.uint64(29))


@compiled_lean
def code_point_at(text: Any, at: Any) -> Any:
    """The character at a byte position of valid UTF-8, and how many bytes it takes."""
    byte: Any = np.int64(text[at])
    if byte < 0x80:
        return byte, 1
    if byte < 0xE0:
        return (byte & 0x1F) << 6 | (np.int64(text[at + 1]) & 0x3F), 2
    tail = (np.int64(text[at + 1]) & 0x3F) << 6 | (np.int64(text[at + 2]) & 0x3F)
    if byte < 0xF0:
        return (byte & 0x0F) << 12 | tail, 3
    return (byte & 0x07) << 18 | tail << 6 | (np.int64(text[at + 3]) & 0x3F), 4


@compiled_lean
def entry_of(code: Any, pages: Any, entries: Any) -> Any:
    """What `unicode_tables` says of a character."""
    return np.int64(entries[pages[code >> unicode.PAGE_BITS], code & (unicode.PAGE - 1)])


@compiled_lean
def folded_hash(text: Any, start: Any, end: Any, lower_pages: Any, lower: Any) -> Any:
    """`hash_bytes` of the lower-cased characters."""
    state, block = _SEED, np.uint64(0)
    length = in_block = 0
    while start < end:
        code, width = code_point_at(text, start)
        start += width
        code += lower[lower_pages[code >> unicode.PAGE_BITS], code & (unicode.PAGE - 1)]
        num_tails = 0 if code < 0x80 else 1 if code < 0x800 else 2 if code < 0x10000 else 3
        lead = (0, 0xC0, 0xE0, 0xF0)[num_tails]
        for place in range(num_tails, -1, -1):
            byte = code >> 6 * place
            byte = (lead | byte) if place == num_tails else (0x80 | byte & 0x3F)
            if in_block == 8:
                state = absorbed(state, block)
                block, in_block = np.uint64(0), 0
            block |= np.uint64(byte) << np.uint64(8 * in_block)
            in_block += 1
            length += 1
    return last_hash(state, block << np.uint64(64 - 8 * in_block), length)
