"""A learned quality score: a fastText classifier of good documents against ordinary ones, and its training.

The method of DCLM (Li et al. 2024, arXiv:2406.11794, section 4.4): documents that one wants more of against
documents as the crawl brings them, a bag of words and word pairs, and the best tenth kept. Training follows
fastText's (facebookresearch/fastText@1142dc4, src/fasttext.cc, model.cc, loss.cc): stochastic gradient
descent over one document at a time, softmax, a rate that falls linearly to 0. It differs in three ways: one
thread and a seed decide everything, so the same input gives the same bytes; documents come in the order of a
hash, not of the files; and rows of n-grams that no training document has are 0, not random, so unseen n-grams
add nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.compiled import compiled
from llmtrain.data.content import fasttext
from llmtrain.data.content.config import QualityConfig, TrainQualityConfig
from llmtrain.data.content.files import open_text
from llmtrain.data.content.sample import NUM_PIECES, spread
from llmtrain.errors import ConfigError, DataError, unknown_name
from llmtrain.files import plain, write_json

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

POSITIVE = "__label__positive"
NEGATIVE = "__label__negative"
TOP_SHARE = 0.1
"""The share of ordinary documents that the recorded threshold keeps: DCLM's tenth."""


class Classifier:
    """Probabilities of a model's one label for documents in a batch."""

    def __init__(self, predictor: fasttext.Predictor, label: str, sample_bytes: int | None) -> None:
        if label not in predictor.labels:
            raise ConfigError(f"content.quality.label: {unknown_name('label', label, predictor.labels)}")
        self._predictor = predictor
        self._label = predictor.labels.index(label)
        self._sample_bytes = sample_bytes

    @classmethod
    def load(cls, cfg: QualityConfig) -> Classifier:
        """Read the model that `cfg` names.

        Raises:
            DataError: a model file that cannot be used. ConfigError: a label that it does not have.
        """
        if cfg.model is None:
            raise ConfigError("content.quality.model is null: name a model file, or do not load it")
        predictor = fasttext.Predictor(fasttext.read_model(Path(cfg.model)))
        return cls(predictor, cfg.label, cfg.sample_bytes)

    def scores(self, text: Bytes, offsets: Offsets) -> Floats:
        """The label's probability for each document: 0 to 1, 0 for one without a known feature."""
        if self._sample_bytes is not None:
            text, offsets = spread(text, offsets, self._sample_bytes, NUM_PIECES)
        return self._predictor.probability(text, offsets, self._label)


@compiled
def _count_words(text: Any, offsets: Any) -> Any:
    """Every token's word number, in order; where each word first stands; and where documents' tokens end."""
    capacity = 1 << 16
    slots = np.full(capacity, -1, dtype=np.int32)
    hashes = np.empty(capacity, dtype=np.uint32)
    starts = np.empty(capacity, dtype=np.int64)
    ends = np.empty(capacity, dtype=np.int64)
    tokens = np.empty(len(text) // 2 + 1, dtype=np.int32)
    token_ends = np.empty(len(offsets) - 1, dtype=np.int64)
    num_words = 0
    num_tokens = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            while at < end and fasttext.is_space(text[at]):
                at += 1
            begin = at
            while at < end and not fasttext.is_space(text[at]):
                at += 1
            if begin == at:
                break
            hashed = fasttext.hash_word(text, begin, at)
            slot = np.int64(hashed) & (capacity - 1)
            while slots[slot] >= 0:
                word = slots[slot]
                if hashes[word] == hashed and ends[word] - starts[word] == at - begin:
                    same = True
                    for shift in range(at - begin):
                        if text[starts[word] + shift] != text[begin + shift]:
                            same = False
                            break
                    if same:
                        break
                slot = (slot + 1) & (capacity - 1)
            if slots[slot] < 0:
                slots[slot] = num_words
                hashes[num_words], starts[num_words], ends[num_words] = hashed, begin, at
                num_words += 1
                tokens[num_tokens] = num_words - 1
                num_tokens += 1
                if 2 * num_words > capacity:
                    capacity *= 2
                    slots = np.full(capacity, -1, dtype=np.int32)
                    hashes = np.concatenate((hashes, np.empty(capacity - len(hashes), dtype=np.uint32)))
                    starts = np.concatenate((starts, np.empty(capacity - len(starts), dtype=np.int64)))
                    ends = np.concatenate((ends, np.empty(capacity - len(ends), dtype=np.int64)))
                    for word in range(num_words):
                        slot = np.int64(hashes[word]) & (capacity - 1)
                        while slots[slot] >= 0:
                            slot = (slot + 1) & (capacity - 1)
                        slots[slot] = word
            else:
                tokens[num_tokens] = slots[slot]
                num_tokens += 1
        token_ends[document] = num_tokens
    return (
        tokens[:num_tokens].copy(),
        token_ends,
        hashes[:num_words].copy(),
        starts[:num_words].copy(),
        ends[:num_words].copy(),
    )


@compiled
def _learn(
    tokens: Any,
    token_ends: Any,
    rows: Any,
    hashes: Any,
    labels: Any,
    end_row: int,
    end_hash: Any,
    num_words: int,
    inputs: Any,
    outputs: Any,
    is_used: Any,
    word_ngrams: int,
    buckets: int,
    epochs: int,
    learning_rate: float,
) -> float:
    """Descend over all documents, `epochs` times. Changes inputs, outputs, is_used.

    `rows` and `hashes` are those of word numbers; a row of -1 is a word that is left out.

    Returns:
        The mean loss of the last epoch.
    """
    dim = inputs.shape[1]
    num_labels = outputs.shape[0]
    num_documents = len(token_ends)
    most = 1
    before = np.int64(0)
    for document in range(num_documents):
        most = max(most, token_ends[document] - before + 1)
        before = token_ends[document]
    features = np.empty(most * word_ngrams, dtype=np.int64)
    history = np.empty(64, dtype=np.uint64)
    hidden = np.empty(dim, dtype=np.float32)
    gradient = np.empty(dim, dtype=np.float32)
    scores = np.empty(num_labels, dtype=np.float32)
    total = epochs * (len(tokens) + num_documents)
    done = 0
    loss = 0.0
    for _ in range(epochs):
        loss = 0.0
        first: Any = np.int64(0)
        for document in range(num_documents):
            last = token_ends[document]
            num_features = 0
            for number in range(first, last + 1):
                if number < last:
                    row, hashed = rows[tokens[number]], hashes[tokens[number]]
                else:
                    row, hashed = end_row, end_hash
                if row >= 0:
                    features[num_features] = row
                    num_features += 1
                for length in range(min(word_ngrams - 1, number - first), 0, -1):
                    gram = fasttext.extend_ngram(history[length], hashed)
                    history[length + 1] = gram
                    features[num_features] = num_words + fasttext.word_ngram_row(gram, buckets)
                    num_features += 1
                history[1] = np.uint64(np.int64(np.int32(hashed)))
            rate = np.float32(learning_rate * (1.0 - done / total))
            done += last - first + 1
            first = last
            hidden[:] = 0
            for feature in range(num_features):
                row_of = inputs[features[feature]]
                is_used[features[feature]] = True
                for column in range(dim):
                    hidden[column] += row_of[column]
            for column in range(dim):
                hidden[column] /= np.float32(num_features)
            highest = np.float32(-1e30)
            for label in range(num_labels):
                dot = np.float32(0)
                for column in range(dim):
                    dot += outputs[label, column] * hidden[column]
                scores[label] = dot
                highest = max(highest, dot)
            normalizer = np.float32(0)
            for label in range(num_labels):
                scores[label] = np.exp(scores[label] - highest)
                normalizer += scores[label]
            gradient[:] = 0
            for label in range(num_labels):
                probability = scores[label] / normalizer
                target = np.float32(1) if label == labels[document] else np.float32(0)
                if label == labels[document]:
                    loss -= np.log(max(probability, np.float32(1e-10)))
                step = rate * (target - probability)
                for column in range(dim):
                    gradient[column] += step * outputs[label, column]
                    outputs[label, column] += step * hidden[column]
            for column in range(dim):
                gradient[column] /= np.float32(num_features)
            for feature in range(num_features):
                row_of = inputs[features[feature]]
                for column in range(dim):
                    row_of[column] += gradient[column]
    return loss / num_documents


@dataclass(kw_only=True)
class _Side:
    """One label's documents: those to learn from and those held out, each ordered by hash."""

    training: list[tuple[int, bytes]]
    held_out: list[tuple[int, bytes]]
    num_documents: int
    num_duplicates: int
    num_empty: int


def train(cfg: TrainQualityConfig) -> dict[str, Any]:
    """Train, measure on held-out documents, write the model to `cfg.out` and the facts beside it as JSON.

    The same input and settings give the same bytes on one kind of machine.

    Returns:
        The facts: counts of documents, precision, recall and area under the curve on held-out documents, and
        the score above which a tenth of the held-out negatives lies.

    Raises:
        DataError: a file that cannot be read, or a side with fewer than two documents.
    """
    good = _read_side("positives", cfg.positives, cfg)
    ordinary = _read_side("negatives", cfg.negatives, cfg)
    known = {hashed for hashed, _ in good.training + good.held_out}
    num_on_both_sides = 0
    for documents in (ordinary.training, ordinary.held_out):
        num_before = len(documents)
        documents[:] = [pair for pair in documents if pair[0] not in known]
        num_on_both_sides += num_before - len(documents)
    for name, side in (("positives", good), ("negatives", ordinary)):
        if not side.training or not side.held_out:
            raise DataError(
                f"{name}={getattr(cfg, name)} give {len(side.training)} different documents to train on and "
                f"{len(side.held_out)} to hold out (held_out={cfg.held_out}), those of both sides left out; "
                "give more text"
            )
    rows = sorted([(hashed, 0, text) for hashed, text in good.training]
                  + [(hashed, 1, text) for hashed, text in ordinary.training])  # fmt: skip
    loss = _fit(cfg, [text for _, _, text in rows], np.array([label for _, label, _ in rows], dtype=np.int32))
    predictor = fasttext.Predictor(fasttext.read_model(Path(cfg.out)))
    scores = [
        predictor.probability(*_batch([text for _, text in side.held_out]), 0) for side in (good, ordinary)
    ]
    facts = {
        "settings": plain(cfg),
        "model_xxh3": xxhash.xxh3_128_hexdigest(Path(cfg.out).read_bytes()),
        "label": POSITIVE,
        "last_epoch_loss": loss,
        "documents_on_both_sides": num_on_both_sides,
        **{
            name: {
                "documents": side.num_documents,
                "empty": side.num_empty,
                "duplicates": side.num_duplicates,
                "trained_on": len(side.training),
                "held_out": len(side.held_out),
            }
            for name, side in (("positives", good), ("negatives", ordinary))
        },
        "held_out": figures(*scores),
    }
    write_json(Path(cfg.out).with_suffix(".json"), facts)
    return facts


def figures(positives: Floats, negatives: Floats) -> dict[str, float]:
    """How well scores tell positives from negatives: precision and recall at 0.5, the area under the ROC
    curve (the share of pairs in the right order, ties as half), and where the negatives' top tenth begins."""
    true_positives, false_positives = int((positives >= 0.5).sum()), int((negatives >= 0.5).sum())
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    up_to = np.searchsorted(ordered, positives, side="right")
    threshold = float(np.quantile(negatives, 1 - TOP_SHARE, method="higher"))
    return {
        "precision": true_positives / max(true_positives + false_positives, 1),
        "recall": true_positives / len(positives),
        "auc": float((below + up_to).sum() / (2 * len(positives) * len(negatives))),
        "threshold_top_10_percent": threshold,
        "recall_at_threshold": float((positives >= threshold).mean()),
    }


def _read_side(name: str, paths: list[str], cfg: TrainQualityConfig) -> _Side:
    documents: dict[int, bytes] = {}
    num_documents = num_empty = 0
    for path in paths:
        for text in _texts(Path(path), cfg.text_field):
            num_documents += 1
            normal = b" ".join(text.split())
            if not normal:
                num_empty += 1
                continue
            documents[xxhash.xxh3_64_intdigest(normal, cfg.seed)] = normal
    if num_documents < 2:
        raise DataError(f"{name}={paths} hold {num_documents} documents; give at least two")
    ordered = sorted(documents.items())[: cfg.max_documents]
    num_held_out = min(max(round(cfg.held_out * len(ordered)), 1), len(ordered) - 1)
    # Another hash decides: the order of the first one is that of training.
    drawn = sorted(ordered, key=lambda pair: (xxhash.xxh3_64_intdigest(pair[1], cfg.seed + 1), pair[0]))
    held_out = {hashed for hashed, _ in drawn[:num_held_out]}
    return _Side(
        training=[pair for pair in ordered if pair[0] not in held_out],
        held_out=[pair for pair in ordered if pair[0] in held_out],
        num_documents=num_documents,
        num_duplicates=num_documents - num_empty - len(documents),
        num_empty=num_empty,
    )


def _texts(path: Path, field: str) -> Iterator[bytes]:
    """Documents of a file: a JSON object a line, or, when its name does not say JSONL, a document a line."""
    is_json = ".jsonl" in path.name or ".ndjson" in path.name or ".json" in path.name
    for number, line in enumerate(open_text(path), start=1):
        if not is_json:
            yield line.encode()
            continue
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: no JSON object with a field {field!r} ({type(error).__name__}); "
                "mend the line, or name the field with text_field=..."
            ) from None
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: {field!r} is {type(text).__name__}, not text")
        yield text.encode(errors="replace")


def _batch(texts: Iterable[bytes]) -> tuple[Bytes, Offsets]:
    parts = list(texts)
    lengths = np.array([0, *map(len, parts)], dtype=np.int64)
    return np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum(lengths)


def _fit(cfg: TrainQualityConfig, texts: list[bytes], labels: npt.NDArray[np.int32]) -> float:
    """Learn from documents in their order and write the model. Returns the last epoch's mean loss."""
    text, offsets = _batch(texts)
    tokens, token_ends, hashes, starts, ends = _count_words(text, offsets)
    counts = np.bincount(tokens, minlength=len(hashes))
    kept = np.flatnonzero(counts >= cfg.min_count)
    kept = kept[np.argsort(-counts[kept], kind="stable")]
    # As in fastText: the end of a text is a word, and words come in falling order of counts.
    end_row = int(np.searchsorted(-counts[kept], -len(texts), side="left"))
    words = [(text[starts[word] : ends[word]].tobytes(), int(counts[word])) for word in kept.tolist()]
    words.insert(end_row, (fasttext.END_OF_TEXT.encode(), len(texts)))
    rows = np.full(len(hashes), -1, dtype=np.int64)
    places = np.arange(len(kept), dtype=np.int64)
    rows[kept] = places + (places >= end_row)
    num_buckets = cfg.buckets if cfg.word_ngrams > 1 else 0
    random = np.random.default_rng(cfg.seed)
    inputs = random.random((len(words) + num_buckets, cfg.dim), dtype=np.float32)
    inputs *= np.float32(2 / cfg.dim)
    inputs -= np.float32(1 / cfg.dim)
    outputs = np.zeros((2, cfg.dim), dtype=np.float32)
    is_used = np.zeros(len(inputs), dtype=np.bool_)
    log.info("training on %s documents, %s words, %s different", len(texts), len(tokens), len(words))
    loss = _learn(
        tokens,
        token_ends,
        rows,
        hashes,
        labels,
        end_row,
        fasttext.END_HASH,
        len(words),
        inputs,
        outputs,
        is_used,
        cfg.word_ngrams,
        max(num_buckets, 1),
        cfg.epochs,
        cfg.learning_rate,
    )
    inputs[~is_used] = 0
    fasttext.write_model(
        Path(cfg.out),
        words,
        [(POSITIVE, int((labels == 0).sum())), (NEGATIVE, int((labels == 1).sum()))],
        inputs,
        outputs,
        word_ngrams=cfg.word_ngrams,
        buckets=num_buckets,
        epochs=cfg.epochs,
        min_count=cfg.min_count,
        num_tokens=len(tokens) + len(texts),
    )
    return float(loss)
