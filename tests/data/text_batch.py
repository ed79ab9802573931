"""Texts back to back as kernels take them, for tests that hypothesis drives and so may use no fixture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def text_batch(texts: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    parts = [text.encode() for text in texts]
    return np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum([0, *map(len, parts)], dtype=np.int64)
