"""Normalising: the first loop over the bytes of many documents at once.

Documents lie back to back in one uint8 array; `offsets[d]:offsets[d + 1]` is document d. Input is UTF-8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmtrain.compiled import compiled


@compiled
def clean(text: Any, offsets: Any) -> Any:
    """Unify line ends, strip control characters and byte order marks, trim.

    CR LF and CR become LF. U+0000..U+001F but tab and LF, U+007F..U+009F and U+FEFF vanish. So do LF at the
    start of a document, and spaces, tabs and LF at its end.

    Returns:
        text, offsets, and whether each document holds a byte above 0x7F before cleaning.
    """
    num_documents = len(offsets) - 1
    out = np.empty(offsets[-1] - offsets[0], dtype=np.uint8)
    out_offsets = np.zeros(num_documents + 1, dtype=np.int64)
    non_ascii = np.zeros(num_documents, dtype=np.bool_)
    filled = 0
    for document in range(num_documents):
        at, end = offsets[document], offsets[document + 1]
        first = filled
        while at < end:
            byte = text[at]
            if byte >= 0x80:
                non_ascii[document] = True
                if byte == 0xC2 and at + 1 < end and 0x80 <= text[at + 1] <= 0x9F:
                    at += 2
                    continue
                if byte == 0xEF and at + 2 < end and text[at + 1] == 0xBB and text[at + 2] == 0xBF:
                    at += 3
                    continue
            elif byte == 13:
                byte = np.uint8(10)
                if at + 1 < end and text[at + 1] == 10:
                    at += 1
            elif (byte < 32 and byte != 9 and byte != 10) or byte == 127:
                at += 1
                continue
            if byte != 10 or filled > first:
                out[filled] = byte
                filled += 1
            at += 1
        while filled > first and (out[filled - 1] == 10 or out[filled - 1] == 32 or out[filled - 1] == 9):
            filled -= 1
        out_offsets[document + 1] = filled
    return out[:filled].copy(), out_offsets, non_ascii
