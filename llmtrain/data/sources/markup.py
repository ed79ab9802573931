"""How much work a page is: HTML can be written so that a small page takes hours to read.

Extraction of main content takes time with the square of how deep `div` and `article` are nested, plain text
with the square of how deep lists are, and the parser with the square of the attributes of a tag (measured on
resiliparse 2.0.1: 10,000 nested `div`, 50 kB, 1.3 s; 100,000 over two minutes; 20,000 attributes, 170 kB,
0.8 s). Browsers cut a page at 512 levels (Blink's kMaximumHTMLParserDOMTreeDepth).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled

MAX_WORK = 50_000_000
"""Some two seconds. A page of a million tags under fifty levels stays below."""

_LT, _GT, _SLASH, _QUOTE, _APOSTROPHE, _EXCLAMATION, _DASH, _EQUALS = 60, 62, 47, 34, 39, 33, 45, 61


def extraction_work(page: bytes) -> int:
    """Tags, each times the open `div`, `article`, `ul`, `ol` and `dl` around it, and half the squares of the
    attributes of tags by eight: about 30 ns each."""
    return int(_extraction_work(np.frombuffer(page, dtype=np.uint8)))


@compiled
def _extraction_work(page: npt.NDArray[np.uint8]) -> int:
    n = len(page)
    depth = work = at = 0
    while at < n:
        if page[at] != _LT:
            at += 1
            continue
        at += 1
        if at + 2 < n and page[at] == _EXCLAMATION and page[at + 1] == _DASH and page[at + 2] == _DASH:
            at += 3
            while at + 2 < n and not (page[at] == _DASH and page[at + 1] == _DASH and page[at + 2] == _GT):
                at += 1
            continue
        is_end = at < n and page[at] == _SLASH
        if is_end:
            at += 1
        name, num_letters = 0, 0
        while at < n and num_letters < 8:
            letter = page[at] | 32
            if not 97 <= letter <= 122:
                break
            name = name * 32 + (letter - 96)
            num_letters += 1
            at += 1
        if num_letters == 0:
            continue
        nests = _nests(name, num_letters)
        if is_end:
            if nests and depth > 0:
                depth -= 1
        else:
            if nests:
                depth += 1
            work += depth
        num_attributes = 0
        was_space = True
        quote = 0
        while at < n:
            byte = page[at]
            if quote != 0:
                if byte == quote:
                    quote = 0
            elif byte == _GT:
                break
            elif byte in (_QUOTE, _APOSTROPHE) and page[at - 1] == _EQUALS:
                quote = byte
            elif byte <= 32 or byte == _SLASH:
                was_space = True
            elif was_space:
                was_space = False
                num_attributes += 1
            at += 1
        work += num_attributes * num_attributes // 16
    return work


@compiled
def _nests(name: int, num_letters: int) -> bool:
    """Whether a name, 5 bits a letter, is div, article, ul, ol or dl."""
    if num_letters == 2:
        return name == 21 * 32 + 12 or name == 15 * 32 + 12 or name == 4 * 32 + 12
    if num_letters == 3:
        return name == (4 * 32 + 9) * 32 + 22
    article = (((((1 * 32 + 18) * 32 + 20) * 32 + 9) * 32 + 3) * 32 + 12) * 32 + 5
    return num_letters == 7 and name == article
