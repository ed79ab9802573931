"""One batch of raw texts to the text that training reads, and every number that a rule needs.

    bytes -> clean, NFC -> words -> signals -> line edits -> private data masked -> words and signals of what
    is left
          -> language, quality, URL, evaluation items -> hash, MinHash signature, line and n-gram hashes

Everything is a function of one document and the settings, so batches and work units leave no trace.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain.data.content import pii
from llmtrain.data.content.config import PII_KINDS, ContentConfig
from llmtrain.data.content.decontaminate import EvalIndex
from llmtrain.data.content.language import Identifier
from llmtrain.data.content.quality import Classifier
from llmtrain.data.content.urls import BlockList
from llmtrain.data.dedup.config import LineConfig, NgramConfig
from llmtrain.data.dedup.line_text import line_hashes
from llmtrain.data.dedup.minhash import signatures
from llmtrain.data.dedup.ngrams import ngram_hashes
from llmtrain.data.filters.config import EditsConfig
from llmtrain.data.text import kernels
from llmtrain.data.text.edit import EDIT_SIGNALS, edit_lines
from llmtrain.data.text.measure import EDITED_SIGNALS, SIGNALS, measure, measure_edited
from llmtrain.data.text.words import IS_WORD, Words, split_words
from llmtrain.errors import DataError
from llmtrain.files import hash_file, hash_json, plain

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SignalsConfig:
    """What decides the text and the numbers of a document."""

    edits: EditsConfig
    measure: bool
    content: ContentConfig
    num_permutations: int
    """Of MinHash signatures; 0: none are made."""
    shingle_words: int
    lines: LineConfig
    ngrams: NgramConfig
    files: dict[str, str] = field(default_factory=dict)
    """Hashes of the models and lists that `edits` and `content` name: a worker that serves several runs loads
    a changed one again."""


def available(cfg: SignalsConfig) -> set[str]:
    """Names of the signals that documents will have."""
    content = cfg.content
    names = {"edited_num_segments", *EDIT_SIGNALS}
    if cfg.measure:
        names.update(SIGNALS, EDITED_SIGNALS)
    if content.language.enabled:
        names.update(("language", "language_score"))
    if content.quality.model is not None:
        names.add("quality")
    if content.urls.is_on:
        names.add("url_blocked")
    if content.decontamination.is_on:
        names.add("num_contaminated_ngrams")
    return names


class Tools:
    """What a process loads once: models, lists, evaluation items. None where the setting is off."""

    def __init__(self, cfg: SignalsConfig) -> None:
        self.cfg = cfg
        content = cfg.content
        self.identifier = Identifier.load(content.language) if content.language.enabled else None
        self.classifier = Classifier.load(content.quality) if content.quality.model else None
        self.block_list = BlockList.load(content.urls) if content.urls.is_on else None
        self.eval_index = EvalIndex.load(content.decontamination) if content.decontamination.is_on else None


_TOOLS: dict[str, Tools] = {}


def tools_for(cfg: SignalsConfig) -> Tools:
    """The tools of these settings, loaded once a process.

    Raises:
        DataError: a file that is not the one that the run began with.
    """
    key = hash_json(plain(cfg))
    if key not in _TOOLS:
        _TOOLS.clear()
        tools = Tools(cfg)
        for name, known in cfg.files.items():
            if not Path(name).is_file() or hash_file(Path(name)) != known:
                raise DataError(
                    f"{name} changed while this run was on, and some documents were measured with what it "
                    "was; run the same command again, which begins with what it is now"
                )
        _TOOLS[key] = tools
    return _TOOLS[key]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Documents that are valid UTF-8, as training reads them, back to back."""

    text: Bytes
    offsets: Offsets
    columns: dict[str, npt.NDArray[Any]]
    """Signals by name, one value a document."""
    languages: list[str] | None
    """None without language identification."""
    content: list[bytes]
    """xxh3_128 of each text."""
    kept: list[int]
    """Which of the raw texts these are."""
    invalid: dict[int, str]
    """Raw texts that are not UTF-8, and why."""
    signatures: npt.NDArray[np.uint32] | None
    lines: npt.NDArray[Any] | None
    ngrams: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]] | None
    """Hashes, document after document, and how many each has."""
    matches: npt.NDArray[Any] | None
    """Of evaluation items."""


def measure_batch(raw: list[bytes], urls: Sequence[str | None], tools: Tools) -> Measured:
    """Clean (as document.normalize does), edit, mask and measure."""
    cfg = tools.cfg
    text, offsets, kept, invalid = _cleaned(raw)
    clean_bytes = np.diff(offsets)
    words = split_words(text, offsets)
    columns: dict[str, npt.NDArray[Any]] = {"clean_bytes": clean_bytes}
    if cfg.measure:
        values = measure(text, offsets, words)
        columns |= {name: values[:, number] for number, name in enumerate(SIGNALS)}
    is_changed = np.zeros(len(kept), dtype=np.bool_)

    edited = edit_lines(text, offsets, cfg.edits)
    columns |= {name: edited.flags[:, number] for number, name in enumerate(EDIT_SIGNALS)}
    for reason, (num_lines, num_bytes) in edited.removed.items():
        columns[f"removed_{reason}_lines"], columns[f"removed_{reason}_bytes"] = num_lines, num_bytes
    text, offsets, is_changed = edited.text, edited.offsets, edited.is_changed
    if cfg.content.pii.is_on:
        text, offsets, is_masked, counts = pii.mask(text, offsets, cfg.content.pii)
        is_changed = is_changed | is_masked
        columns |= {f"num_pii_{kind}": counts[:, number] for number, kind in enumerate(PII_KINDS)}
    if is_changed.any():
        words = split_words(text, offsets)
    if cfg.measure:
        after = measure_edited(text, offsets, words, cfg.edits.short_line_chars)
        columns |= {name: after[:, number] for number, name in enumerate(EDITED_SIGNALS)}
    columns["edited_num_segments"] = np.diff(words.offsets)
    columns["num_bytes"] = np.diff(offsets)

    languages = None
    if tools.identifier is not None:
        languages, columns["language_score"] = tools.identifier.identify(text, offsets)
    if tools.classifier is not None:
        columns["quality"] = tools.classifier.scores(text, offsets)
    if tools.block_list is not None:
        columns["url_blocked"] = tools.block_list.blocked([urls[number] for number in kept])
    matches = None
    if tools.eval_index is not None:
        columns["num_contaminated_ngrams"], matches = tools.eval_index.matches(words)
    view = memoryview(text.data)
    ends = offsets.tolist()
    return Measured(
        text=text,
        offsets=offsets,
        columns=columns,
        languages=languages,
        content=[xxhash.xxh3_128_digest(view[ends[n] : ends[n + 1]]) for n in range(len(kept))],
        kept=kept,
        invalid=invalid,
        signatures=signatures(words, cfg.num_permutations, cfg.shingle_words)
        if cfg.num_permutations
        else None,
        lines=line_hashes(text, offsets, cfg.lines) if cfg.lines.enabled else None,
        ngrams=_ngrams(words, cfg.ngrams) if cfg.ngrams.enabled else None,
        matches=matches,
    )


def _cleaned(raw: list[bytes]) -> tuple[Bytes, Offsets, list[int], dict[int, str]]:
    """Normalised text of those that are UTF-8, which they are, and why the others are not."""
    text, offsets, non_ascii = kernels.clean(*joined(raw))
    invalid: dict[int, str] = {}
    replaced: dict[int, bytes] = {}
    for number in np.flatnonzero(non_ascii).tolist():
        try:
            raw[number].decode()
        except UnicodeDecodeError as error:
            invalid[number] = str(error)
            continue
        cleaned = text[offsets[number] : offsets[number + 1]].tobytes().decode()
        if not unicodedata.is_normalized("NFC", cleaned):
            replaced[number] = unicodedata.normalize("NFC", cleaned).encode()
    kept = [number for number in range(len(raw)) if number not in invalid]
    if invalid or replaced:
        whole = text.tobytes()
        ends = offsets.tolist()
        text, offsets = joined([replaced.get(n) or whole[ends[n] : ends[n + 1]] for n in kept])
    return text, offsets, kept, invalid


def joined(texts: list[bytes]) -> tuple[Bytes, Offsets]:
    """Texts back to back, and where each begins and the last ends. Writable, so that kernels meet one
    type."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(bytearray().join(texts), dtype=np.uint8), offsets


def _ngrams(words: Words, cfg: NgramConfig) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    return ngram_hashes(words.folded, (words.kind & IS_WORD) != 0, words.offsets, cfg)


def warm_up(cfg: SignalsConfig) -> None:
    """Compile, or load from disk, before the work is handed out: once, not in every worker."""
    measure_batch(
        [b"a b.\n" * 3, "\u65e5\u672c caf\u00e9 a@b.example".encode()], [None, None], tools_for(cfg)
    )
