"""Views of rows: what they hide can be put back, and every choice follows from the key and the row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmtrain.data.config import Packing
from llmtrain.errors import ConfigError
from llmtrain.loader.config import ObjectiveConfig, ObjectiveKind
from llmtrain.loader.dataset import NO_TARGET, Row, Rows
from llmtrain.loader.objectives import (
    FillInTheMiddle,
    MaskedTokens,
    SpanCorruption,
    make_view,
    num_real_tokens,
)

EOS_ID, VOCAB_SIZE, SEQ_LEN = 2, 1000, 64
PREFIX, MIDDLE, SUFFIX, MASK = 2000, 2001, 2002, 2003
SPECIAL = {"fim_prefix": PREFIX, "fim_middle": MIDDLE, "fim_suffix": SUFFIX, "mask": MASK}
SPECIAL |= {f"sentinel_{number}": 3000 + number for number in range(20)}


@pytest.fixture(params=list(Packing))
def block(request: pytest.FixtureRequest, make_corpus: Callable[..., Any]) -> Row:
    """All rows of documents from one token to several rows, by each way of packing."""
    lengths = np.random.default_rng(5).integers(1, 90, 60).tolist()
    corpus = make_corpus("corpus", [lengths, [1, 2, 3, 4, 5, 200]], seq_len=SEQ_LEN)
    rows = Rows(corpus.folder, corpus.manifest, "train", SEQ_LEN, request.param)
    return rows.read_many(np.arange(rows.num_rows))


def numbers(block: Row) -> np.ndarray:
    return np.arange(len(block.tokens))


def segments_of(block: Row) -> list[tuple[int, slice]]:
    """(row, place) of every piece of a document; not of padding."""
    real = num_real_tokens(block, EOS_ID)
    found = []
    for row, segments in enumerate(block.segments):
        for number in np.unique(segments).tolist():
            places = np.flatnonzero(segments == number)
            if places[0] < real[row]:
                found.append((row, slice(int(places[0]), int(places[-1]) + 1)))
    return found


def fim(**settings: Any) -> FillInTheMiddle:
    cfg = ObjectiveConfig(kind=ObjectiveKind.fim, **settings)
    return FillInTheMiddle(cfg, SPECIAL, key=7, eos_id=EOS_ID)


def put_back(tokens: list[int]) -> tuple[list[int], bool, int]:
    """(text, whether the suffix came first, length of the middle) of a piece that was turned round."""
    suffix_at, middle_at = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert tokens[0] == PREFIX
    assert middle_at > suffix_at
    suffix, end = tokens[suffix_at + 1 : middle_at], tokens[middle_at + 1 :]
    if suffix_at > 1:  # prefix, suffix, middle
        return [*tokens[1:suffix_at], *end, *suffix], False, len(end)
    return [*end, *suffix], True, len(end)


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_the_middle_put_back_gives_the_document_less_three_tokens(block: Row, spm_rate: float) -> None:
    seen = fim(fim_rate=1.0, spm_rate=spm_rate)(numbers(block), block)
    turned = 0
    for row, place in segments_of(block):
        before, after = block.tokens[row, place].tolist(), seen.tokens[row, place].tolist()
        end = [EOS_ID] if before[-1] == EOS_ID else []
        text = before[: len(before) - len(end)]
        if len(text) <= 3:
            assert after == before
            continue
        assert after[len(after) - len(end) :] == end, "EOS stays last"
        found, _, _ = put_back(after[: len(after) - len(end)])
        assert found == text[:-3]
        turned += 1
        targets = seen.targets[row, place].tolist()
        assert targets[:-1] == after[1:]
        assert targets[-1] == NO_TARGET
    assert turned > 50
    assert (seen.positions == block.positions).all()
    assert (seen.segments == block.segments).all()


def test_padding_stays_as_it_is(block: Row) -> None:
    seen = fim(fim_rate=1.0)(numbers(block), block)
    for row, real in enumerate(num_real_tokens(block, EOS_ID).tolist()):
        assert (seen.tokens[row, real:] == block.tokens[row, real:]).all()
        assert (seen.targets[row, real:] == NO_TARGET).all()


def test_rates_and_cuts_are_those_asked_for() -> None:
    """4,000 documents of 20 tokens: shares of turned and of suffix-first within 4 standard deviations, and
    every length of the middle as often as two uniform cuts make it."""
    rows, kept = 4000, 17
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, 20))
    targets = np.concatenate([tokens[:, 1:], np.full((rows, 1), NO_TARGET)], axis=1)
    positions = np.broadcast_to(np.arange(20), (rows, 20))
    block = Row(tokens, targets, positions, np.zeros((rows, 20), dtype=np.int32))
    seen = fim(fim_rate=0.6, spm_rate=0.25)(np.arange(rows), block)
    turned = [line.tolist() for line in seen.tokens if PREFIX in line]
    assert abs(len(turned) - 0.6 * rows) < 4 * math.sqrt(rows * 0.24)
    found = [put_back(line) for line in turned]
    # An empty prefix looks like suffix first: (2 * 18 - 1) / 18^2 of the others.
    expected = 0.25 + 0.75 * 35 / 324
    assert abs(sum(is_spm for _, is_spm, _ in found) - expected * len(found)) < 4 * math.sqrt(len(found) / 4)
    psm = Counter(length for _, is_spm, length in found if not is_spm)
    total = sum(psm.values())
    ways = {length: 2 * (kept - length) if length else kept for length in range(kept)}  # with a prefix
    chi_square = sum(
        (psm[length] - total * way / sum(ways.values())) ** 2 / (total * way / sum(ways.values()))
        for length, way in ways.items()
    )
    assert chi_square < 17 + 4 * math.sqrt(2 * 17)


def test_a_rate_of_0_changes_nothing(block: Row) -> None:
    seen = fim(fim_rate=0.0)(numbers(block), block)
    assert (seen.tokens == block.tokens).all()
    assert (seen.targets == block.targets).all()


VIEWS = {
    "fim": fim(),
    "masked_lm": MaskedTokens(
        ObjectiveConfig(kind=ObjectiveKind.masked_lm), SPECIAL, key=7, eos_id=EOS_ID, vocab_size=VOCAB_SIZE
    ),
}


@pytest.mark.parametrize("name", list(VIEWS))
def test_a_row_looks_the_same_in_any_company(block: Row, name: str) -> None:
    view = VIEWS[name]
    whole = view(numbers(block), block)
    some = np.array([5, 0, 9, 3])
    part = Row(block.tokens[some], block.targets[some], block.positions[some], block.segments[some])
    again = view(some, part)
    assert (again.tokens == whole.tokens[some]).all()
    assert (again.targets == whole.targets[some]).all()
    assert (view(some + 1, part).tokens != again.tokens).any(), "another row has other choices"


def test_the_rows_themselves_are_left_alone(block: Row) -> None:
    before = block.tokens.copy(), block.targets.copy()
    for view in VIEWS.values():
        view(numbers(block), block)
    assert (block.tokens == before[0]).all()
    assert (block.targets == before[1]).all()


def test_masked_tokens_are_the_targets_and_nothing_else_is(block: Row) -> None:
    seen = VIEWS["masked_lm"](numbers(block), block)
    hidden = seen.targets != NO_TARGET
    assert (seen.targets[hidden] == block.tokens[hidden]).all()
    assert (seen.tokens[~hidden] == block.tokens[~hidden]).all()
    assert (block.tokens[hidden] != EOS_ID).all(), "ends and padding are never hidden"


def test_shares_of_masked_tokens_are_berts() -> None:
    tokens = np.random.default_rng(1).integers(3, VOCAB_SIZE, (400, 512))
    block = Row(tokens, np.full_like(tokens, NO_TARGET), tokens, np.zeros(tokens.shape, dtype=np.int32))
    seen = VIEWS["masked_lm"](np.arange(400), block)
    hidden = seen.targets != NO_TARGET
    num_hidden = int(hidden.sum())
    assert abs(num_hidden - 0.15 * tokens.size) < 4 * math.sqrt(tokens.size * 0.15 * 0.85)
    kinds = {
        0.8: int((seen.tokens[hidden] == MASK).sum()),
        0.1: int(((seen.tokens != tokens) & (seen.tokens != MASK) & hidden).sum()),
    }
    for share, count in kinds.items():
        expected = share * num_hidden * (1 - 1 / VOCAB_SIZE if share == 0.1 else 1)
        assert abs(count - expected) < 4 * math.sqrt(num_hidden * share * (1 - share))


def corruption(seq_len: int = SEQ_LEN, **settings: Any) -> SpanCorruption:
    cfg = ObjectiveConfig(kind=ObjectiveKind.span_corruption, **settings)
    return SpanCorruption(cfg, SPECIAL, key=7, eos_id=EOS_ID, seq_len=seq_len)


def test_spans_put_back_give_the_row(block: Row) -> None:
    view = corruption()
    found = view(numbers(block), block)
    real = num_real_tokens(block, EOS_ID)
    sentinels = set(view.sentinels.tolist())
    for row in range(len(block.tokens)):
        inputs = found.inputs[row, : found.num_inputs[row]].tolist()
        targets = found.targets[row, : found.num_targets[row]].tolist()
        assert inputs[-1] == targets[-1] == EOS_ID
        assert (found.inputs[row, found.num_inputs[row] :] == EOS_ID).all()
        assert (found.targets[row, found.num_targets[row] :] == NO_TARGET).all()
        spans: dict[int, list[int]] = {}
        for token in targets[:-1]:
            if token in sentinels:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        whole: list[int] = []
        for token in inputs[:-1]:
            whole += spans[token] if token in sentinels else [token]
        assert whole == block.tokens[row, : real[row]].tolist()
        assert [token for token in inputs if token in sentinels] == list(spans)
        assert all(spans.values()), "no span is empty"
        noise = sum(map(len, spans.values()))
        assert noise == (max(1, round(0.15 * real[row])) if real[row] > 1 else 0)


def test_every_way_to_cut_is_as_likely() -> None:
    """Rows of 20 tokens lose 6 in 2 spans: 5 ways to cut those, 13 to cut the rest, all 65 as often."""
    rows = 6500
    tokens = np.broadcast_to(np.arange(100, 120), (rows, 20))
    block = Row(tokens, tokens, tokens, np.zeros((rows, 20), dtype=np.int32))
    found = corruption(20, span_rate=0.3)(np.arange(rows), block)
    seen = Counter(map(tuple, found.inputs.tolist()))
    assert len(seen) == 65
    chi_square = sum((count - 100) ** 2 / 100 for count in seen.values())
    assert chi_square < 64 + 4 * math.sqrt(2 * 64)


def test_what_the_tokenizer_lacks_is_named() -> None:
    def made(kind: ObjectiveKind, special: dict[str, int]) -> Any:
        return make_view(ObjectiveConfig(kind=kind), special, key=0, eos_id=EOS_ID, vocab_size=10)

    assert made(ObjectiveKind.causal, {}) is None
    assert isinstance(made(ObjectiveKind.fim, SPECIAL), FillInTheMiddle)
    with pytest.raises(ConfigError, match=r"kind=fim needs the tokens fim_middle, and .* tokenizer.fim=true"):
        made(ObjectiveKind.fim, {"fim_prefix": 1, "fim_suffix": 2})
    with pytest.raises(ConfigError, match=r"needs the tokens mask, and the tokenizer has no special ones"):
        made(ObjectiveKind.masked_lm, {})
    with pytest.raises(ConfigError, match="makes an input and a target of each row"):
        made(ObjectiveKind.span_corruption, SPECIAL)
    with pytest.raises(ConfigError, match=r"sentinel_20, .*num_sentinels=26"):
        corruption(512)


@pytest.mark.parametrize("settings", [{"fim_rate": 1.5}, {"mask_rate": -0.1}, {"mean_span_tokens": 0.5}])
def test_shares_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    [name] = settings
    with pytest.raises(ConfigError, match=f"data.objective.{name}="):
        ObjectiveConfig(**settings)
