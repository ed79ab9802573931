"""Pass 2: signals to verdicts. Every document is kept for one split, or dropped for one reason.

A pure function of the signals, so a changed threshold never reads text again. The order of the reasons
is fixed: empty, the rules in the order of filters/gopher.py, duplicate. The whole table is in memory,
about 250 bytes a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain import rng
from llmtrain.data.config import HeldOutConfig
from llmtrain.data.dedup.exact import halves, survivors
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.gopher import SETTING_OF_REASON, Columns, dropped_by
from llmtrain.errors import DataError

KEPT = -1
DECIDE_VERSION = 2
"""Part of the folder's key: raise it when the same signals would give other verdicts."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    reason: npt.NDArray[np.int8]
    """Index into `reasons`, or KEPT."""
    reasons: list[str]
    is_held_out: npt.NDArray[np.bool_]
    """Only among the kept."""

    def dropped(self, num_bytes: npt.NDArray[np.int64]) -> dict[str, dict[str, int]]:
        """Documents and bytes dropped, by reason; reasons that dropped nothing are left out."""
        return {
            name: {"documents": int(mask.sum()), "bytes": int(num_bytes[mask].sum())}
            for number, name in enumerate(self.reasons)
            if (mask := self.reason == number).any()
        }


def decide(
    signals: Columns,
    content: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.uint8],
    rules: RulesConfig,
    held_out: HeldOutConfig,
) -> Verdicts:
    """Give every document its verdict.

    Raises:
        DataError: fewer than two different texts are left, one to train on and one to hold out; says what
        dropped the others.
    """
    masks = [("empty", signals["num_words"] == 0), *dropped_by(signals, rules)]
    reasons = [name for name, _ in masks] + ["duplicate"]
    reason = np.full(len(content), KEPT, dtype=np.int8)
    for number, (_, mask) in enumerate(masks):
        reason[(reason == KEPT) & mask] = number
    if rules.exact_dedup:
        alive = reason == KEPT
        reason[alive & ~survivors(content, ids, alive)] = len(masks)
    kept = reason == KEPT
    verdicts = Verdicts(
        reason=reason, reasons=reasons, is_held_out=_held_out(signals["num_bytes"], content, kept, held_out)
    )
    if not verdicts.is_held_out.any():
        raise DataError(_too_few(verdicts, signals["num_bytes"], rules))
    return verdicts


def split_order(content: npt.NDArray[np.uint8], seed: int, name: str) -> npt.NDArray[np.uint64]:
    """64 uniform bits a document, from its text's hash, the seed and a name."""
    _, low = halves(content)
    mixed = low ^ np.uint64(rng.key(seed, name))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finalizer
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _held_out(
    num_bytes: npt.NDArray[np.int64],
    content: npt.NDArray[np.uint8],
    kept: npt.NDArray[np.bool_],
    cfg: HeldOutConfig,
) -> npt.NDArray[np.bool_]:
    """Kept documents whose hash is below `fraction`, the lowest first, while they fit into max_bytes; at
    least one, if there are two texts. Equal texts, which are left without exact_dedup, stay together."""
    hashes = split_order(content, cfg.seed, "held_out")
    candidates = np.flatnonzero(kept)
    by_hash = candidates[np.argsort(hashes[candidates], kind="stable")]
    num_drawn = int((hashes[by_hash] < np.uint64(cfg.fraction * 2.0**64)).sum())
    if cfg.max_bytes is not None:
        num_drawn = min(num_drawn, int((np.cumsum(num_bytes[by_hash]) <= cfg.max_bytes).sum()))
    cuts = np.flatnonzero(np.diff(hashes[by_hash])) + 1  # where another text begins
    is_held_out = np.zeros(len(kept), dtype=np.bool_)
    if len(cuts):
        cut = cuts[max(int(np.searchsorted(cuts, num_drawn, side="right")) - 1, 0)]
        is_held_out[by_hash[:cut]] = True
    return is_held_out


def _too_few(verdicts: Verdicts, num_bytes: npt.NDArray[np.int64], rules: RulesConfig) -> str:
    dropped: list[tuple[str, Any]] = sorted(
        verdicts.dropped(num_bytes).items(), key=lambda item: -item[1]["documents"]
    )
    counts = ", ".join(f"{name} {count['documents']:,}" for name, count in dropped) or "none"
    num_kept = int((verdicts.reason == KEPT).sum())
    left = f"{num_kept:,} of {len(num_bytes):,} documents are left"
    message = (
        f"{left}{', all of the same text' if num_kept > 1 else ''}, and two different ones are needed: "
        f"one to train on and one to hold out. Dropped: {counts}"
    )
    for name, _ in dropped:
        if name in SETTING_OF_REASON:
            setting = SETTING_OF_REASON[name]
            value = getattr(rules, setting)
            return f"{message}. The first to loosen: rules.{setting}={value} (null switches it off)"
    return message
