"""One batch of raw texts to normalised text and the numbers that rules need."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.data.text import kernels


@dataclass(frozen=True, kw_only=True)
class MeasuredBatch:
    """Documents that are valid UTF-8, normalised, back to back."""

    text: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    signals: npt.NDArray[np.int64]
    """[documents, len(kernels.SIGNALS)]"""
    content: list[bytes]
    """xxh3_128 of each normalised text."""
    kept: list[int]
    """Which of the raw texts these are."""
    invalid: dict[int, str]
    """Raw texts that are not UTF-8, and why."""


def measure_batch(raw: list[bytes]) -> MeasuredBatch:
    """Normalise (as document.normalize does) and measure."""
    text, offsets, non_ascii = kernels.clean(*joined(raw))
    invalid: dict[int, str] = {}
    replaced: dict[int, bytes] = {}
    for number in np.flatnonzero(non_ascii).tolist():
        try:
            raw[number].decode()
        except UnicodeDecodeError as error:
            invalid[number] = str(error)
            continue
        cleaned = text[offsets[number] : offsets[number + 1]].tobytes().decode()
        if not unicodedata.is_normalized("NFC", cleaned):
            replaced[number] = unicodedata.normalize("NFC", cleaned).encode()
    kept = [number for number in range(len(raw)) if number not in invalid]
    if invalid or replaced:
        whole = text.tobytes()
        ends = offsets.tolist()
        texts = [replaced.get(number) or whole[ends[number] : ends[number + 1]] for number in kept]
        text, offsets = joined(texts)
    view = memoryview(text)
    ends = offsets.tolist()
    content = [xxhash.xxh3_128_digest(view[ends[n] : ends[n + 1]]) for n in range(len(kept))]
    return MeasuredBatch(
        text=text,
        offsets=offsets,
        signals=kernels.measure(text, offsets),
        content=content,
        kept=kept,
        invalid=invalid,
    )


def joined(texts: list[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Texts back to back, and where each begins and the last ends. Writable, so that kernels meet one
    type."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(bytearray().join(texts), dtype=np.uint8), offsets
