"""What a model is asked to predict, as views of the same rows: fill in the middle, masked tokens, spans.

Every choice follows from a key and the row's number, so a row looks the same on any rank, at any restart, in
every epoch. A view has the shape of what it views: it writes no token beside the row, and drops what has no
room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain import rng
from llmtrain.compiled import compiled_lean
from llmtrain.errors import ConfigError
from llmtrain.loader.config import ObjectiveConfig, ObjectiveKind
from llmtrain.loader.dataset import NO_TARGET, Row

_GOLDEN = 0x9E3779B97F4A7C15
NUM_SENTINELS = 3
"""Tokens that fill-in-the-middle adds to a document, and so drops from its end."""
MASKED, REPLACED = 0.8, 0.1
"""Of the tokens that are predicted: shares that become the mask, and any token; the rest stay (Devlin et al.
2019, arXiv:1810.04805, section 3.1)."""

Int64 = npt.NDArray[np.int64]


class View(Protocol):
    """Rows as they were read, and their numbers in the pack, to what the model gets."""

    def __call__(self, rows: Int64, block: Row) -> Row: ...


def make_view(
    cfg: ObjectiveConfig, special_ids: Mapping[str, int], *, key: int, eos_id: int, vocab_size: int
) -> View | None:
    """The view of an objective; None for causal, which needs none.

    Args:
        special_ids: of the tokenizer, by name.
        key: of the seed and of what the rows hold.

    Raises:
        ConfigError: the tokenizer lacks a token that the objective needs; span corruption, whose rows have
            two parts (`SpanCorruption`).
    """
    if cfg.kind is ObjectiveKind.fim:
        return FillInTheMiddle(cfg, special_ids, key=key, eos_id=eos_id)
    if cfg.kind is ObjectiveKind.masked_lm:
        return MaskedTokens(cfg, special_ids, key=key, eos_id=eos_id, vocab_size=vocab_size)
    if cfg.kind is ObjectiveKind.span_corruption:
        raise ConfigError(
            "data.objective.kind=span_corruption makes an input and a target of each row, for an encoder and "
            "a decoder; llmtrain.loader.objectives.SpanCorruption gives them"
        )
    return None


class FillInTheMiddle:
    """Documents whose middle comes last (Bavarian et al. 2022, arXiv:2207.14255, sections 3 and 4.2).

    Each piece of a document in a row is cut at two places, any as likely as any other, at the rate asked
    for. Prefix, suffix, middle (PSM): `<pre> prefix <suf> suffix <mid> middle`; suffix first (SPM, their
    variant 2): `<pre> <suf> suffix <mid> prefix middle`. EOS stays at the end. The sentinels take the room
    of the piece's last three tokens; a piece of three tokens or fewer stays as it is.
    """

    def __init__(
        self, cfg: ObjectiveConfig, special_ids: Mapping[str, int], *, key: int, eos_id: int
    ) -> None:
        names = ("fim_prefix", "fim_middle", "fim_suffix")
        self.sentinels = np.array(needed(special_ids, names, cfg.kind, "fim=true"), dtype=np.int64)
        self.rates = np.array([cfg.fim_rate, cfg.spm_rate])
        self.key = key
        self.eos_id = eos_id

    def __call__(self, rows: Int64, block: Row) -> Row:
        tokens, targets = block.tokens.copy(), block.targets.copy()
        _fill_in_the_middle(
            states(self.key, rows),
            self.rates,
            self.sentinels,
            self.eos_id,
            block.segments,
            np.empty(tokens.shape[1], dtype=np.int64),
            tokens,
            targets,
        )
        return Row(tokens, targets, block.positions, block.segments)


class MaskedTokens:
    """Some tokens are hidden, and those are the targets (Devlin et al. 2019, arXiv:1810.04805). EOS and
    padding are never among them."""

    def __init__(
        self, cfg: ObjectiveConfig, special_ids: Mapping[str, int], *, key: int, eos_id: int, vocab_size: int
    ) -> None:
        [self.mask_id] = needed(special_ids, ("mask",), cfg.kind, "mask=true")
        self.rate = cfg.mask_rate
        self.key = key
        self.eos_id = eos_id
        self.vocab_size = vocab_size

    def __call__(self, rows: Int64, block: Row) -> Row:
        tokens, targets = block.tokens.copy(), np.full_like(block.targets, NO_TARGET)
        shares = np.array([self.rate, MASKED, MASKED + REPLACED])
        _mask_tokens(
            states(self.key, rows), shares, self.mask_id, self.eos_id, self.vocab_size, tokens, targets
        )
        return Row(tokens, targets, block.positions, block.segments)


@dataclass(frozen=True)
class Corrupted:
    """What an encoder reads and a decoder writes. Rows are as long as the longest may be."""

    inputs: Int64
    """[rows, input_len]; EOS, which fills up the rest, at the end."""
    num_inputs: Int64
    targets: Int64
    """[rows, target_len]; EOS at the end, then -100."""
    num_targets: Int64


class SpanCorruption:
    """Spans of tokens are taken out, each for a sentinel, and told after that sentinel (Raffel et al. 2020,
    arXiv:1910.10683, section 3.1.4).

    As their code has it: a row of n tokens loses round(rate n), in round(that / mean) spans; first comes a
    stretch that stays, last one that goes, and all ways to cut both are as likely.
    """

    def __init__(
        self,
        cfg: ObjectiveConfig,
        special_ids: Mapping[str, int],
        *,
        key: int,
        eos_id: int,
        seq_len: int,
    ) -> None:
        self.rate = cfg.span_rate
        self.mean = cfg.mean_span_tokens
        noise, spans = self._counts(seq_len)
        names = [f"sentinel_{number}" for number in range(spans)]
        hint = f"num_sentinels={spans}, or raise data.objective.mean_span_tokens"
        self.sentinels = np.array(needed(special_ids, names, cfg.kind, hint), dtype=np.int64)
        self.key = key
        self.eos_id = eos_id
        self.seq_len = seq_len
        # Of fewer tokens at most as many stay, for as many spans: widths of a full row hold any.
        self.input_len, self.target_len = seq_len - noise + spans + 1, noise + spans + 1

    def __call__(self, rows: Int64, block: Row) -> Corrupted:
        lengths = num_real_tokens(block, self.eos_id)
        noise, spans = self._counts(lengths)
        inputs = np.full((len(rows), self.input_len), self.eos_id, dtype=np.int64)
        targets = np.full((len(rows), self.target_len), NO_TARGET, dtype=np.int64)
        _corrupt(
            states(self.key, rows), block.tokens, lengths, noise, spans, self.sentinels, self.eos_id,
            np.empty((2, self.seq_len), dtype=np.int64), inputs, targets,
        )  # fmt: skip
        return Corrupted(inputs, lengths - noise + spans + 1, targets, noise + spans + 1)

    def _counts(self, num_tokens: Any) -> tuple[Any, Any]:
        """Tokens and spans that go, of rows of so many; a row of one token loses none."""
        noise = np.minimum(np.maximum(np.rint(num_tokens * self.rate), 1), np.maximum(num_tokens - 1, 0))
        spans = np.minimum(np.maximum(np.rint(noise / self.mean), 1), np.minimum(noise, num_tokens - noise))
        return np.int64(noise), np.int64(spans)


def needed(
    special_ids: Mapping[str, int], names: tuple[str, ...] | list[str], kind: ObjectiveKind, setting: str
) -> list[int]:
    """Ids of these tokens.

    Raises:
        ConfigError: one that the tokenizer has not.
    """
    missing = [name for name in names if name not in special_ids]
    if missing:
        raise ConfigError(
            f"data.objective.kind={kind.name} needs the tokens {', '.join(missing)}, and the tokenizer has "
            f"{', '.join(special_ids) or 'no special ones'}; train one with tokenizer.{setting}"
        )
    return [special_ids[name] for name in names]


def states(key: int, rows: Int64) -> npt.NDArray[np.uint64]:
    """Of each row, where its own stream of random numbers begins."""
    return rng.mix(rng.mix(rows.astype(np.uint64) * np.uint64(_GOLDEN)) ^ np.uint64(key))


def num_real_tokens(block: Row, eos_id: int) -> Int64:
    """Tokens of each row before its padding. (Padding is EOS without a target, in the row's last segment. A
    last segment of one real EOS looks the same, and counts as padding.)"""
    is_last = block.segments == block.segments[:, -1:]
    may_be = is_last & (block.tokens == eos_id) & (block.targets == NO_TARGET)
    num_last = is_last.sum(axis=1)
    seq_len = block.tokens.shape[1]
    real: Int64 = np.where(may_be.sum(axis=1) == num_last, seq_len - num_last, seq_len)
    return real


@compiled_lean
def _uniform(state: Any, number: int) -> float:
    """Number `number` of a stream, in [0, 1): splitmix64."""
    value = state + np.uint64(number + 1) * np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value = value ^ (value >> np.uint64(31))
    return float(value >> np.uint64(11)) / 9007199254740992.0


@compiled_lean
def _fill_in_the_middle(
    streams: Any,
    rates: Any,
    sentinels: Any,
    eos_id: int,
    segments: Any,
    scratch: Any,
    tokens: Any,
    targets: Any,
) -> None:
    seq_len = tokens.shape[1]
    for row in range(len(tokens)):
        stream, drawn, begin = streams[row], 0, 0
        while begin < seq_len:
            end = begin + 1
            while end < seq_len and segments[row, end] == segments[row, begin]:
                end += 1
            has_eos = tokens[row, end - 1] == eos_id
            length = end - begin - (1 if has_eos else 0)
            is_padding = length > 1 and targets[row, begin] == NO_TARGET
            if length > NUM_SENTINELS and not is_padding and _uniform(stream, drawn) < rates[0]:
                kept = length - NUM_SENTINELS
                one = int(_uniform(stream, drawn + 1) * (kept + 1))
                other = int(_uniform(stream, drawn + 2) * (kept + 1))
                low, high = min(one, other), max(one, other)
                is_spm = _uniform(stream, drawn + 3) < rates[1]
                _put(tokens[row, begin : begin + length], scratch, 0)
                line = tokens[row]
                line[begin] = sentinels[0]
                at = begin + 1
                if not is_spm:
                    at = _put(scratch[:low], line, at)
                line[at] = sentinels[2]
                at = _put(scratch[high:kept], line, at + 1)
                line[at] = sentinels[1]
                _put(scratch[0 if is_spm else low : high], line, at + 1)
                _put(tokens[row, begin + 1 : end], targets[row], begin)
                targets[row, end - 1] = NO_TARGET
            drawn += 4
            begin = end


@compiled_lean
def _mask_tokens(
    streams: Any, shares: Any, mask_id: int, eos_id: int, vocab_size: int, tokens: Any, targets: Any
) -> None:
    for row in range(len(tokens)):
        for at in range(tokens.shape[1]):
            token = tokens[row, at]
            if token == eos_id or _uniform(streams[row], 3 * at) >= shares[0]:
                continue
            targets[row, at] = token
            kind = _uniform(streams[row], 3 * at + 1)
            if kind < shares[1]:
                tokens[row, at] = mask_id
            elif kind < shares[2]:
                tokens[row, at] = int(_uniform(streams[row], 3 * at + 2) * vocab_size)


@compiled_lean
def _corrupt(
    streams: Any, tokens: Any, lengths: Any, noise: Any, spans: Any, sentinels: Any, eos_id: int,
    scratch: Any, inputs: Any, targets: Any,
) -> None:  # fmt: skip
    for row in range(len(tokens)):
        _cut(streams[row], 0, lengths[row] - noise[row], spans[row], scratch[0])
        _cut(streams[row], tokens.shape[1], noise[row], spans[row], scratch[1])
        at, into, out = 0, 0, 0
        for span in range(spans[row]):
            stays, goes = scratch[0, span], scratch[1, span]
            into = _put(tokens[row, at : at + stays], inputs[row], into)
            at += stays
            inputs[row, into] = targets[row, out] = sentinels[span]
            into += 1
            out = _put(tokens[row, at : at + goes], targets[row], out + 1)
            at += goes
        _put(tokens[row, at : lengths[row]], inputs[row], into)  # of a row from which nothing goes
        targets[row, out] = eos_id


@compiled_lean
def _put(source: Any, into: Any, at: int) -> int:
    """Write `source` from place `at` on. Returns where it ends."""
    for number in range(len(source)):
        into[at + number] = source[number]
    return at + len(source)


@compiled_lean
def _cut(stream: Any, drawn: int, total: int, parts: int, sizes: Any) -> None:
    """Cut `total` into `parts` of at least 1, every way as likely: the borders are a sample without
    replacement (Knuth, The Art of Computer Programming, volume 2, 3.4.2, algorithm S)."""
    part, begin, wanted = 0, 0, parts - 1
    for border in range(1, total):
        if _uniform(stream, drawn + border) * (total - border) < wanted:
            sizes[part] = border - begin
            part += 1
            begin = border
            wanted -= 1
    if parts > 0:
        sizes[part] = total - begin
