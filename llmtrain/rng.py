"""Named random streams: what is random is a function of a seed and a name, never of what ran before.

rng.stream(seed, "init", "layers.3.attention.wq.weight")
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def key(seed: int, *names: str | int) -> int:
    """Return 64 bits that depend on `seed` and on every name, by BLAKE2b. Equal on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return a generator (Philox, counter-based) whose numbers depend only on `seed` and `names`."""
    return np.random.Generator(np.random.Philox(key=key(seed, *names)))


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64 bits in which each decides about half of them: splitmix64's finalizer (Steele, Lea
    and Flood 2014, OOPSLA, figure 16)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
