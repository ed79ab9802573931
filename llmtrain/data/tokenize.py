"""Pass 3: kept documents to shards of tokens, with their lineage.

A unit is a shard: a run of documents of one split. Ids are SentencePiece's own. For BPE they come from a
look-up of words, and the first documents of each shard and one in CHECK_EVERY after them are also encoded by
SentencePiece itself. If one differs, the whole shard is done again by SentencePiece, and the manifest's
funnel counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data.docs import TextBatch
from llmtrain.data.folder import read_done, write_done
from llmtrain.data.manifest import ShardEntry, lineage_file, shard_files, sums_file
from llmtrain.data.shards import ShardWriter, token_dtype
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from llmtrain.data.tokenizer.tokenizer import Ids, Tokenizer
from llmtrain.data.tokenizer.words import WordEncoder, why_not_exact
from llmtrain.data.verdicts import Verdicts
from llmtrain.files import atomic_write

log = logging.getLogger(__name__)

TOKENIZE_VERSION = 3
"""Part of the folder's key: raise it when the same documents would give other tokens."""
CHECK_FIRST = 25
CHECK_FIRST_OF_RUN = 2000
"""Of the first shard of a split, whose documents are the first that a run encodes."""
CHECK_EVERY = 10_000
ENCODE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class TokenizeTask:
    verdicts: Verdicts
    prefix: str
    """Of the shard's files, relative to the data folder."""
    split: str
    first: int
    """First row of the split's table."""
    last: int
    """Row to stop at, excluded."""
    tokenizer: Path


def tokenize_shard(task: TokenizeTask) -> dict[str, Any]:
    """Write one shard unless that is done. Returns its manifest entry and how many documents were checked."""
    prefix = task.verdicts.out / task.prefix
    done = prefix.with_name(f"{prefix.name}.json")
    if (finished := read_done(done)) is not None:
        return finished
    tokenizer = load_tokenizer(task.tokenizer)
    rows = task.verdicts.rows(task.split, task.first, task.last)
    encoder = _encoder(tokenizer)
    counts, summary = _write_tokens(task, tokenizer, rows, encoder)
    if summary["differing"]:
        log.warning(
            "%d checked documents of %s differ from SentencePiece; encoding it anew",
            summary["differing"],
            prefix,
        )
        counts, again = _write_tokens(task, tokenizer, rows, None)
        summary["shard"] = again["shard"]
    lineage = rows.select(["id", "source", "path", "record", "text_bytes"])
    for name in ("num_tokens", "num_fallback_tokens"):
        lineage = lineage.append_column(name, pa.array(counts[name], pa.int64()))
    ids = pa.array([digest.hex() for digest in lineage.column("id").to_pylist()], pa.string())
    lineage_path = lineage_file(prefix)
    with atomic_write(lineage_path) as handle:
        pq.write_table(lineage.set_column(0, "id", ids), handle, compression="zstd")
    summary["fertility"] = _fertility(lineage.append_column("language", task.verdicts.languages(rows)))
    write_done(done, summary, [*shard_files(prefix), sums_file(prefix), lineage_path])
    return summary


def _fertility(lineage: pa.Table) -> list[dict[str, Any]]:
    """Documents, bytes, tokens and fallback tokens by source and language (null: not identified)."""
    measures = ["text_bytes", "num_tokens", "num_fallback_tokens"]
    sums = lineage.group_by(["source", "language"]).aggregate(
        [*((name, "sum") for name in measures), ("id", "count")]
    )
    return [
        {
            "source": row["source"],
            "language": row["language"],
            "documents": row["id_count"],
            **{name: row[f"{name}_sum"] for name in measures},
        }
        for row in sums.sort_by([("source", "ascending"), ("language", "ascending")]).to_pylist()
    ]


def _write_tokens(
    task: TokenizeTask, tokenizer: Tokenizer, rows: pa.Table, encoder: WordEncoder | None
) -> tuple[dict[str, npt.NDArray[np.int64]], dict[str, Any]]:
    """Write the shard's tokens; of each document, how many there are and how many stand in for a character.

    Args:
        encoder: None: every document is encoded by the tokenizer itself.
    """
    is_fallback = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    is_fallback[tokenizer.fallback_ids] = True
    all_lengths, all_fallbacks = [], []
    num_text_bytes = num_checked = num_differing = num_seen = 0
    first = CHECK_FIRST_OF_RUN if task.first == 0 else CHECK_FIRST
    dtype = token_dtype(tokenizer.vocab_size)
    prefix = task.verdicts.out / task.prefix
    with ShardWriter(prefix, dtype, tokenizer.vocab_size, eos_id=tokenizer.eos_id) as writer:
        for text, offsets in _merged(texts for _, texts, _ in task.verdicts.documents(rows)):
            num_documents = len(offsets) - 1
            if encoder is not None:
                ids, lengths = encoder.encode(text, offsets)
                numbers = np.arange(num_seen, num_seen + num_documents)
                checked = np.flatnonzero((numbers < first) | (numbers % CHECK_EVERY == 0))
                num_differing += encoder.differing(text, offsets, ids, lengths, checked)
                num_checked += len(checked)
            else:
                ids, lengths = _encode_plainly(tokenizer, text, offsets)
            writer.add_many(ids, lengths)
            all_lengths.append(lengths)
            all_fallbacks.append(
                np.add.reduceat(is_fallback[ids], np.cumsum(lengths) - lengths, dtype=np.int64)
            )
            num_seen += num_documents
            num_text_bytes += int(offsets[-1] - offsets[0])
        result = writer.close()
    shard = ShardEntry(path=task.prefix, split=task.split, text_bytes=num_text_bytes, **asdict(result))
    summary = {"shard": asdict(shard), "checked": num_checked, "differing": num_differing}
    counts = {"num_tokens": all_lengths, "num_fallback_tokens": all_fallbacks}
    return {name: np.concatenate(parts) for name, parts in counts.items()}, summary


ENCODERS: dict[str, WordEncoder | None] = {}
"""By the tokenizer's fingerprint; one at most."""


def _encoder(tokenizer: Tokenizer) -> WordEncoder | None:
    """The tokenizer's look-up of words, which a process keeps from shard to shard; None where it has none."""
    if tokenizer.fingerprint not in ENCODERS:
        ENCODERS.clear()
        why_not = why_not_exact(tokenizer)
        if why_not is None and isinstance(tokenizer, SentencePieceTokenizer):
            ENCODERS[tokenizer.fingerprint] = WordEncoder(tokenizer)
        else:
            log.info("words of this tokenizer are not looked up: %s", why_not)
            ENCODERS[tokenizer.fingerprint] = None
    return ENCODERS[tokenizer.fingerprint]


def _merged(batches: Iterable[TextBatch]) -> Iterator[TextBatch]:
    """Small batches joined to about ENCODE_BYTES of text: each call of SentencePiece costs a millisecond."""
    waiting: list[TextBatch] = []
    num_bytes = 0
    for text, offsets in batches:
        waiting.append((text[offsets[0] : offsets[-1]], offsets - offsets[0]))
        num_bytes += int(offsets[-1] - offsets[0])
        if num_bytes >= ENCODE_BYTES:
            yield _joined(waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[TextBatch]) -> TextBatch:
    starts = np.cumsum([0, *(len(text) for text, _ in batches)])
    ends = [offsets[1:] + start for (_, offsets), start in zip(batches, starts, strict=False)]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    return np.concatenate([text for text, _ in batches]), offsets


def _encode_plainly(
    tokenizer: Tokenizer, text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
) -> tuple[Ids, npt.NDArray[np.int64]]:
    texts = [text[start:end].tobytes().decode() for start, end in pairwise(offsets)]
    eos = np.array([tokenizer.eos_id], dtype=np.int32)
    ids = [np.concatenate([part, eos]) for part in tokenizer.encode_batch(texts)]
    return np.concatenate(ids), np.array([len(part) for part in ids], dtype=np.int64)
