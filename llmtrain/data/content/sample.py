"""Pieces spread over long documents, so that what a classifier costs has a bound."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmtrain.compiled import compiled

NUM_PIECES = 8


@compiled
def spread(text: Any, offsets: Any, sample_bytes: int, num_pieces: int) -> Any:
    """At most `sample_bytes` of each document: all of it, or pieces at even distances with a space between.

    The first piece begins where the document does and the last ends where it does. Pieces begin and end
    between characters, and after a space or line end when there is one within 32 bytes.

    Returns:
        text and offsets of the samples.
    """
    num_documents = len(offsets) - 1
    total = 0
    for document in range(num_documents):
        total += min(offsets[document + 1] - offsets[document], sample_bytes)
    out = np.empty(total, dtype=np.uint8)
    out_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    filled = 0
    for document in range(num_documents):
        begin, end = offsets[document], offsets[document + 1]
        if end - begin <= sample_bytes:
            out[filled : filled + end - begin] = text[begin:end]
            filled += end - begin
        else:
            piece_bytes = sample_bytes // num_pieces
            for piece in range(num_pieces):
                at = begin + (end - begin - piece_bytes) * piece // (num_pieces - 1)
                stop = at + piece_bytes - 1  # the last byte is the space between
                if piece > 0:
                    for shift in range(32):
                        if at + shift < stop and (text[at + shift - 1] == 32 or text[at + shift - 1] == 10):
                            at += shift
                            break
                while at < stop and (text[at] & 0xC0) == 0x80:
                    at += 1
                while stop > at and (text[stop] & 0xC0) == 0x80:
                    stop -= 1
                out[filled : filled + stop - at] = text[at:stop]
                filled += stop - at
                out[filled] = 32
                filled += 1
        out_offsets[document + 1] = filled
    return out[:filled].copy(), out_offsets
