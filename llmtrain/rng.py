"""Named random streams: what is random is a function of a seed and a name, never of what ran before.

rng.stream(seed, "init", "layers.3.attention.wq.weight")
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, *names: str | int) -> int:
    """Return 64 bits that depend on `seed` and on every name, by BLAKE2b. Equal on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return a generator (Philox, counter-based) whose numbers depend only on `seed` and `names`."""
    return np.random.Generator(np.random.Philox(key=key(seed, *names)))
