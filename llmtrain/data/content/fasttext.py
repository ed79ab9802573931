"""fastText models: reading and writing their files, and predicting over batches of documents.

Written from the format and the arithmetic of facebookresearch/fastText@1142dc4 (v0.9.2; src/fasttext.cc,
dictionary.cc, loss.cc, densematrix.cc, quantmatrix.cc, productquantizer.cc): supervised models, dense (.bin)
and quantised (.ftz), with softmax, hierarchical softmax, negative sampling or one-vs-all. Methods: Joulin et
al. 2016, arXiv:1607.01759 (classifier) and arXiv:1612.03651 (quantised).

A text counts as one line: every white space character of ASCII parts words, line ends too, and the word
`</s>` ends it. A dense matrix stays in its file, mapped into memory, so workers share it. Where a model has
fewer outputs than dimensions, each input row is multiplied with the output matrix once, at loading: the
outputs are linear in the rows, so a text costs that many numbers a word and not `dim`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.errors import DataError
from llmtrain.files import atomic_write

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

LABEL_PREFIX = "__label__"
END_OF_TEXT = "</s>"
_PREFIX_BYTES = np.frombuffer(LABEL_PREFIX.encode(), dtype=np.uint8)

_MAGIC = 793712314
_VERSION = 12
_ARGS = struct.Struct("<12id")
_COUNTS = struct.Struct("<iiiqq")
_SUPERVISED = 3
_HIERARCHICAL, _NEGATIVE, _SOFTMAX, _ONE_VS_ALL = 1, 2, 3, 4
_CENTROIDS = 256
_PROJECTION_ROWS = 1 << 16
_MOST_WORD_NGRAMS = 64

_FNV_START = np.uint32(2166136261)
_FNV_PRIME = np.uint32(16777619)
_NGRAM_FACTOR = np.uint64(116049371)
END_HASH = np.uint32(3617362777)
"""Of `</s>`."""


@dataclass(kw_only=True)
class FastTextModel:
    """What the file holds. `inputs` has a row for each word, then one for each bucket (or what is left of
    them); `outputs` one for each label, or each inner node of the label tree."""

    path: Path
    words: list[bytes]
    labels: list[str]
    label_counts: Offsets
    word_ngrams: int
    min_chars: int
    max_chars: int
    """0: no n-grams of characters."""
    buckets: int
    loss: int
    kept_buckets: npt.NDArray[np.int32] | None
    """For a pruned model: row behind the words for each bucket, -1 when it is gone."""
    inputs: Floats
    outputs: Floats


class _Reader:
    """Fields of a model file, with an error that names the file when it ends too early."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self.path, self.handle = path, handle

    def take(self, num_bytes: int) -> bytes:
        data = self.handle.read(num_bytes)
        if len(data) < num_bytes:
            raise DataError(f"{self.path} ends too early to be a fastText model; copy or train it again")
        return data

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def dense(self) -> Floats:
        """A matrix, mapped from the file. Its numbers need not lie at a multiple of four bytes."""
        num_rows, width = self.unpack("<qq")
        self.refuse_size(num_rows, width)
        start, num_bytes = self.handle.tell(), 4 * num_rows * width
        self.handle.seek(0, 2)
        if self.handle.tell() < start + num_bytes:
            raise DataError(f"{self.path} ends too early to be a fastText model; copy or train it again")
        self.handle.seek(start + num_bytes)
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", offset=start, shape=(num_bytes,))
        return np.ndarray((num_rows, width), dtype="<f4", buffer=mapped.data)

    def refuse_size(self, num_rows: int, width: int) -> None:
        if not (0 <= num_rows < 1 << 31 and 0 < width < 1 << 16):
            raise DataError(
                f"{self.path}: {num_rows} rows and {width} columns: no fastText model, or a damaged one"
            )

    def quantizer(self) -> tuple[int, int, int, Floats]:
        width, num_parts, part, last = self.unpack("<iiii")
        self.refuse_size(num_parts, width)
        if part < 1 or last < 1 or (num_parts - 1) * part + last != width:
            raise DataError(f"{self.path}: a quantiser of {num_parts} parts of {part} for {width}: damaged")
        centroids = np.frombuffer(self.take(4 * width * _CENTROIDS), dtype="<f4")
        return num_parts, part, last, centroids

    def quantized(self) -> Floats:
        """A matrix, from codes of product quantisation."""
        (has_norms, num_rows, width, num_codes) = self.unpack("<?qqi")
        self.refuse_size(num_rows, width)
        codes = np.frombuffer(self.take(num_codes), dtype=np.uint8)
        num_parts, part, last, centroids = self.quantizer()
        if num_codes != num_rows * num_parts:
            raise DataError(f"{self.path}: {num_codes} codes for {num_rows} rows of {num_parts}: damaged")
        codes = codes.reshape(num_rows, num_parts)
        matrix = np.empty((num_rows, width), dtype=np.float32)
        for number in range(num_parts):
            part_width = last if number == num_parts - 1 else part
            table = centroids[number * _CENTROIDS * part :][: _CENTROIDS * part_width]
            matrix[:, number * part : number * part + part_width] = table.reshape(_CENTROIDS, part_width)[
                codes[:, number]
            ]
        if has_norms:
            norm_codes = np.frombuffer(self.take(num_rows), dtype=np.uint8)
            matrix *= self.quantizer()[3][norm_codes][:, None]
        return matrix


def read_model(path: Path) -> FastTextModel:
    """Read a supervised model.

    Raises:
        DataError: a file that is missing, cut, no fastText model, or one of word vectors.
    """
    try:
        handle = open(path, "rb")  # noqa: SIM115 - closed below; the error is of opening alone
    except OSError as error:
        raise DataError(f"cannot read the fastText model {path}: {error.strerror}") from None
    with handle:
        reader = _Reader(path, handle)
        magic, version = reader.unpack("<ii")
        if magic != _MAGIC or version > _VERSION:
            raise DataError(
                f"{path} is not a fastText model: it begins with {magic}, {version}, not with {_MAGIC} and "
                f"at most {_VERSION}; give a .bin or .ftz file, not .vec"
            )
        dim, _, _, _, _, word_ngrams, loss, kind, buckets, min_chars, max_chars, _, _ = _ARGS.unpack(
            reader.take(_ARGS.size)
        )
        if kind != _SUPERVISED:
            raise DataError(f"{path} holds word vectors, not a classifier; train one with train-quality")
        if word_ngrams >= _MOST_WORD_NGRAMS or buckets < 0:
            raise DataError(
                f"{path}: n-grams of {word_ngrams} words in {buckets} buckets: damaged, or more than is read "
                f"here ({_MOST_WORD_NGRAMS - 1} words)"
            )
        if version == 11:
            max_chars = 0  # as fastText.cc does: such classifiers had none
        size, num_words, num_labels, _, num_pruned = _COUNTS.unpack(reader.take(_COUNTS.size))
        if not (size == num_words + num_labels and num_words >= 0 and num_labels > 0):
            raise DataError(f"{path}: {num_words} words and {num_labels} labels do not make {size}: damaged")
        names, counts = _read_entries(reader, size)
        kept = None
        if num_pruned >= 0:
            pairs = np.frombuffer(reader.take(8 * num_pruned), dtype="<i4").reshape(-1, 2)
            kept = np.full(max(buckets, 1), -1, dtype=np.int32)
            kept[pairs[:, 0]] = pairs[:, 1]
        (is_quantized,) = reader.unpack("<?")
        inputs = reader.quantized() if is_quantized else reader.dense()
        (is_output_quantized,) = reader.unpack("<?")
        outputs = reader.quantized() if is_quantized and is_output_quantized else reader.dense()
    if inputs.shape[1] != dim or outputs.shape != (num_labels, dim):
        raise DataError(
            f"{path}: matrices of {inputs.shape} and {outputs.shape} do not fit {num_labels} labels of "
            f"dimension {dim}: damaged"
        )
    return FastTextModel(
        path=path,
        words=names[:num_words],
        labels=[name.decode(errors="replace") for name in names[num_words:]],
        label_counts=np.array(counts[num_words:], dtype=np.int64),
        word_ngrams=word_ngrams,
        min_chars=min_chars,
        max_chars=max_chars,
        buckets=buckets,
        loss=loss,
        kept_buckets=kept,
        inputs=inputs,
        outputs=np.ascontiguousarray(outputs, dtype=np.float32).copy(),
    )


def _read_entries(reader: _Reader, size: int) -> tuple[list[bytes], list[int]]:
    """Words and labels with their counts: each its bytes, a zero, the count and a type byte."""
    names: list[bytes] = []
    counts: list[int] = []
    rest = b""
    while len(names) < size:
        zero = rest.find(b"\0")
        if zero < 0 or len(rest) < zero + 10:
            more = reader.handle.read(1 << 20)
            if not more:
                reader.take(1)
            rest += more
            continue
        at = 0
        while len(names) < size and zero >= 0 and len(rest) >= zero + 10:
            names.append(rest[at:zero])
            counts.append(int.from_bytes(rest[zero + 1 : zero + 9], "little", signed=True))
            at = zero + 10
            zero = rest.find(b"\0", at)
        rest = rest[at:]
    reader.handle.seek(-len(rest), 1)
    return names, counts


def write_model(
    path: Path,
    words: Sequence[tuple[bytes, int]],
    labels: Sequence[tuple[str, int]],
    inputs: Floats,
    outputs: Floats,
    *,
    word_ngrams: int,
    buckets: int,
    epochs: int,
    min_count: int,
    num_tokens: int,
) -> None:
    """Write a supervised model with a softmax, readable by fastText. Words and labels come with counts."""
    dim = inputs.shape[1]
    args = (dim, 5, epochs, min_count, 5, word_ngrams, _SOFTMAX, _SUPERVISED, buckets, 0, 0, 100)
    with atomic_write(path) as handle:
        handle.write(struct.pack("<ii", _MAGIC, _VERSION))
        handle.write(_ARGS.pack(*args, 1e-4))
        handle.write(_COUNTS.pack(len(words) + len(labels), len(words), len(labels), num_tokens, -1))
        for word, count in words:
            handle.write(word + struct.pack("<xqb", count, 0))
        for label, count in labels:
            handle.write(label.encode() + struct.pack("<xqb", count, 1))
        for matrix in (inputs, outputs):
            handle.write(struct.pack("<?qq", False, *matrix.shape))
            handle.write(np.ascontiguousarray(matrix, dtype="<f4").data)


class Predictor:
    """The likeliest label, or the probability of one, for documents in a batch."""

    def __init__(self, model: FastTextModel) -> None:
        self.labels = model.labels
        self._settings = (model.word_ngrams, model.min_chars, model.max_chars, model.buckets)
        self._loss = model.loss
        joined = b"".join(model.words)
        self._word_text = np.frombuffer(joined, dtype=np.uint8)
        lengths = np.array([len(word) for word in model.words], dtype=np.int64)
        self._word_offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        self._slots = index_words(self._word_text, self._word_offsets)
        self._end = _find_end(model.words)
        kept = model.kept_buckets
        self._kept = np.zeros(0, dtype=np.int32) if kept is None else kept
        self._is_pruned = kept is not None
        self._tree = label_tree(model.label_counts) if model.loss == _HIERARCHICAL else _no_tree()
        num_outputs, dim = model.outputs.shape
        self._is_projected = num_outputs < dim
        if self._is_projected:
            self._inputs: Floats = _project(model.inputs, model.outputs)
            self._outputs: Floats = np.eye(num_outputs, dtype=np.float32)
        else:
            self._inputs, self._outputs = model.inputs, model.outputs

    def _run(self, text: Bytes, offsets: Offsets, label: int) -> tuple[Offsets, Floats]:
        best, probability = _predict(
            text,
            offsets,
            self._word_text,
            self._word_offsets,
            self._slots,
            self._end,
            *self._settings,
            self._kept,
            self._is_pruned,
            self._inputs,
            self._outputs,
            self._is_projected,
            self._loss,
            *self._tree,
            label,
        )
        return best, probability

    def best(self, text: Bytes, offsets: Offsets) -> tuple[Offsets, Floats]:
        """Number of the likeliest label, -1 for a text without a known feature, and its probability."""
        return self._run(text, offsets, -1)

    def probability(self, text: Bytes, offsets: Offsets, label: int) -> Floats:
        """Probability of label number `label`; 0 for a text without a known feature."""
        return self._run(text, offsets, label)[1]


def _find_end(words: list[bytes]) -> int:
    name = END_OF_TEXT.encode()
    return words.index(name) if name in words else -1


def _project(inputs: Floats, outputs: Floats) -> Floats:
    """inputs @ outputs.T, a block of rows at a time: the inputs may be larger than memory."""
    projected = np.empty((len(inputs), len(outputs)), dtype=np.float32)
    for start in range(0, len(inputs), _PROJECTION_ROWS):
        block = np.asarray(inputs[start : start + _PROJECTION_ROWS], dtype=np.float64)
        projected[start : start + _PROJECTION_ROWS] = block @ outputs.T.astype(np.float64)
    return projected


def _no_tree() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)


def label_tree(counts: Offsets) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The Huffman tree over labels in falling order of counts: left and right child of each node; labels are
    nodes 0..n-1, the root is the last (HierarchicalSoftmaxLoss::buildTree)."""
    num_labels = len(counts)
    num_nodes = 2 * num_labels - 1
    weight = np.full(num_nodes, 10**15, dtype=np.int64)
    weight[:num_labels] = counts
    children = np.full((2, num_nodes), -1, dtype=np.int32)
    leaf, node = num_labels - 1, num_labels
    for inner in range(num_labels, num_nodes):
        for side in range(2):
            if leaf >= 0 and weight[leaf] < weight[node]:
                children[side, inner] = leaf
                leaf -= 1
            else:
                children[side, inner] = node
                node += 1
        weight[inner] = weight[children[0, inner]] + weight[children[1, inner]]
    return children[0].copy(), children[1].copy()


@compiled
def hash_word(text: Any, begin: int, end: int) -> Any:
    """FNV-1a of 32 bits with every byte sign-extended, as Dictionary::hash does."""
    hashed = _FNV_START
    for at in range(begin, end):
        byte = np.uint32(text[at])
        if byte >= 128:
            byte |= np.uint32(0xFFFFFF00)
        hashed = np.uint32((hashed ^ byte) * _FNV_PRIME)
    return hashed


@compiled
def index_words(text: Any, offsets: Any) -> Any:
    """A hash table of words: slot -> number of the word, or -1. Its size is a power of two."""
    capacity = 16
    while capacity < 2 * len(offsets):
        capacity *= 2
    slots = np.full(capacity, -1, dtype=np.int32)
    for word in range(len(offsets) - 1):
        slot = np.int64(hash_word(text, offsets[word], offsets[word + 1])) & (capacity - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (capacity - 1)
        slots[slot] = word
    return slots


@compiled
def find_word(text: Any, begin: int, end: int, hashed: Any, words: Any, offsets: Any, slots: Any) -> Any:
    """Number of the word text[begin:end], or -1."""
    mask = len(slots) - 1
    slot = np.int64(hashed) & mask
    while slots[slot] >= 0:
        word = slots[slot]
        first = offsets[word]
        if offsets[word + 1] - first == end - begin:
            same = True
            for shift in range(end - begin):
                if words[first + shift] != text[begin + shift]:
                    same = False
                    break
            if same:
                return word
        slot = (slot + 1) & mask
    return -1


@compiled
def is_space(byte: int) -> bool:
    """What parts words in fastText (Dictionary::readWord)."""
    return byte == 32 or 9 <= byte <= 13 or byte == 0


@compiled
def _is_label(text: Any, begin: int, end: int) -> bool:
    """Whether a word begins with `__label__`: it is not read as text."""
    if end - begin < len(_PREFIX_BYTES):
        return False
    at = 0
    while at < len(_PREFIX_BYTES) and text[begin + at] == _PREFIX_BYTES[at]:
        at += 1
    return at == len(_PREFIX_BYTES)


@compiled
def word_ngram_row(hashed: Any, buckets: int) -> Any:
    """Bucket of a word n-gram."""
    return np.int64(hashed % np.uint64(buckets))


@compiled
def extend_ngram(hashed: Any, word_hash: Any) -> Any:
    """Hash of a word n-gram with one word more. Word hashes count as signed (Dictionary::addWordNgrams)."""
    return hashed * _NGRAM_FACTOR + np.uint64(np.int64(np.int32(word_hash)))


@compiled
def _predict(
    text: Any,
    offsets: Any,
    word_text: Any,
    word_offsets: Any,
    slots: Any,
    end_word: int,
    word_ngrams: int,
    min_chars: int,
    max_chars: int,
    buckets: int,
    kept: Any,
    is_pruned: bool,
    inputs: Any,
    outputs: Any,
    is_projected: bool,
    loss: int,
    left: Any,
    right: Any,
    wanted: int,
) -> Any:
    """Best label (or the one wanted) and its probability for each document."""
    num_documents = len(offsets) - 1
    num_words = len(word_offsets) - 1
    num_labels = outputs.shape[0]
    width = inputs.shape[1]
    best = np.full(num_documents, -1, dtype=np.int64)
    probability = np.zeros(num_documents, dtype=np.float32)
    hidden = np.empty(width, dtype=np.float32)
    scores = np.empty(num_labels, dtype=np.float32)
    history = np.empty(
        _MOST_WORD_NGRAMS, dtype=np.uint64
    )  # hash of the n-gram that ends at the last word, by its length
    framed = np.empty(1024, dtype=np.uint8)
    nodes = np.empty(2 * num_labels, dtype=np.int32)
    node_scores = np.empty(2 * num_labels, dtype=np.float64)
    for document in range(num_documents):
        at, end = offsets[document], offsets[document + 1]
        hidden[:] = 0
        num_features = 0
        num_before = 0
        is_last = False
        while not is_last:
            while at < end and is_space(text[at]):
                at += 1
            begin = at
            hashed = _FNV_START
            while at < end and not is_space(text[at]):
                byte = np.uint32(text[at])
                if byte >= 128:
                    byte |= np.uint32(0xFFFFFF00)
                hashed = np.uint32((hashed ^ byte) * _FNV_PRIME)
                at += 1
            is_last = begin == at
            if is_last:
                word, hashed = end_word, END_HASH
            else:
                word = find_word(text, begin, at, hashed, word_text, word_offsets, slots)
                if word < 0 and _is_label(text, begin, at):
                    continue
            if word >= 0:
                for column in range(width):
                    hidden[column] += inputs[word, column]
                num_features += 1
            if max_chars > 0 and not is_last and word != end_word:
                size = at - begin + 2
                if size > len(framed):
                    framed = np.empty(2 * size, dtype=np.uint8)
                framed[0] = 60
                framed[1 : size - 1] = text[begin:at]
                framed[size - 1] = 62
                for first in range(size):
                    if (framed[first] & 0xC0) == 0x80:
                        continue
                    gram = _FNV_START
                    stop = first
                    for num_chars in range(1, max_chars + 1):
                        if stop >= size:
                            break
                        while True:
                            byte = np.uint32(framed[stop])
                            if byte >= 128:
                                byte |= np.uint32(0xFFFFFF00)
                            gram = np.uint32((gram ^ byte) * _FNV_PRIME)
                            stop += 1
                            if stop >= size or (framed[stop] & 0xC0) != 0x80:
                                break
                        if num_chars >= min_chars and not (num_chars == 1 and (first == 0 or stop == size)):
                            row = np.int64(gram % np.uint32(buckets))
                            if is_pruned:
                                row = np.int64(kept[row])
                            if row >= 0:
                                for column in range(width):
                                    hidden[column] += inputs[num_words + row, column]
                                num_features += 1
            for length in range(min(word_ngrams - 1, num_before), 0, -1):
                gram_hash = extend_ngram(history[length], hashed)
                history[length + 1] = gram_hash
                row = word_ngram_row(gram_hash, buckets)
                if is_pruned:
                    row = np.int64(kept[row])
                if row >= 0:
                    for column in range(width):
                        hidden[column] += inputs[num_words + row, column]
                    num_features += 1
            history[1] = np.uint64(np.int64(np.int32(hashed)))
            num_before += 1
        if num_features == 0:
            continue
        for column in range(width):
            hidden[column] /= np.float32(num_features)
        if loss == _HIERARCHICAL:
            highest = -1e30
            nodes[0] = 2 * num_labels - 2
            node_scores[0] = 0.0
            depth = 1
            while depth > 0:
                depth -= 1
                node, score = nodes[depth], node_scores[depth]
                if wanted < 0 and score < highest:
                    continue
                if left[node] < 0:
                    if node == wanted or (wanted < 0 and score > highest):
                        highest = score
                        best[document] = node
                    continue
                total = np.float32(0)
                for column in range(width):
                    total += outputs[node - num_labels, column] * hidden[column]
                yes = 1.0 / (1.0 + np.exp(-np.float64(total)))
                nodes[depth], node_scores[depth] = left[node], score + np.log(1.0 - yes + 1e-5)
                nodes[depth + 1], node_scores[depth + 1] = right[node], score + np.log(yes + 1e-5)
                depth += 2
            probability[document] = min(np.exp(highest), 1.0)
            continue
        top = 0
        for label in range(num_labels):
            if is_projected:
                scores[label] = hidden[label]
            else:
                total = np.float32(0)
                for column in range(width):
                    total += outputs[label, column] * hidden[column]
                scores[label] = total
            if scores[label] > scores[top]:
                top = label
        chosen = top if wanted < 0 else wanted
        best[document] = chosen
        if loss == _SOFTMAX:
            total_exp = np.float32(0)
            for label in range(num_labels):
                total_exp += np.exp(scores[label] - scores[top])
            probability[document] = np.exp(scores[chosen] - scores[top]) / total_exp
        else:
            probability[document] = 1.0 / (1.0 + np.exp(-scores[chosen]))
    return best, probability
