"""Pass 3: kept documents to shards of tokens, with their lineage.

A unit is a shard: a run of documents of one split. Ids come from a look-up of words; the first documents
of each shard and every CHECK_EVERY-th after them are also encoded by SentencePiece itself. If one
differs, the whole shard is done again by SentencePiece, and the manifest's funnel counts it.
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
from llmtrain.data.manifest import ShardEntry, shard_files
from llmtrain.data.shards import ShardWriter, token_dtype
from llmtrain.data.tokenizer.tokenizer import Ids, Tokenizer
from llmtrain.data.tokenizer.words import WordEncoder
from llmtrain.data.verdicts import Verdicts
from llmtrain.files import atomic_write

log = logging.getLogger(__name__)

TOKENIZE_VERSION = 2
"""Part of the folder's key: raise it when the same documents would give other tokens."""
CHECK_FIRST = 25
CHECK_EVERY = 400
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
    tokenizer = Tokenizer.load(task.tokenizer)
    rows = task.verdicts.rows(task.split, task.first, task.last)
    lengths, summary = _write_tokens(task, tokenizer, rows, by_words=True)
    if summary["differing"]:
        log.warning(
            "%d checked documents of %s differ from SentencePiece; encoding it anew",
            summary["differing"],
            prefix,
        )
        lengths, again = _write_tokens(task, tokenizer, rows, by_words=False)
        summary["shard"] = again["shard"]
    lineage = rows.select(["id", "source", "path", "record", "text_bytes"])
    lineage = lineage.append_column("num_tokens", pa.array(lengths, pa.int64()))
    ids = pa.array([digest.hex() for digest in lineage.column("id").to_pylist()], pa.string())
    lineage_path = prefix.with_name(f"{prefix.name}.docs.parquet")
    with atomic_write(lineage_path) as handle:
        pq.write_table(lineage.set_column(0, "id", ids), handle, compression="zstd")
    summary["tokens"] = _tokens_by_source(lineage)
    write_done(done, summary, [*shard_files(prefix), lineage_path])
    return summary


def _tokens_by_source(lineage: pa.Table) -> dict[str, int]:
    sums = lineage.group_by("source").aggregate([("num_tokens", "sum")]).sort_by("source")
    return dict(
        zip(sums.column("source").to_pylist(), sums.column("num_tokens_sum").to_pylist(), strict=True)
    )


def _write_tokens(
    task: TokenizeTask, tokenizer: Tokenizer, rows: pa.Table, *, by_words: bool
) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    encoder = _encoder(tokenizer)
    all_lengths = []
    num_text_bytes = num_checked = num_differing = num_seen = 0
    dtype = token_dtype(tokenizer.vocab_size)
    with ShardWriter(task.verdicts.out / task.prefix, dtype, tokenizer.vocab_size) as writer:
        for text, offsets in _merged(texts for _, texts, _ in task.verdicts.documents(rows)):
            num_documents = len(offsets) - 1
            if by_words:
                ids, lengths = encoder.encode(text, offsets)
                numbers = np.arange(num_seen, num_seen + num_documents)
                checked = np.flatnonzero((numbers < CHECK_FIRST) | (numbers % CHECK_EVERY == 0))
                num_differing += encoder.differing(text, offsets, ids, lengths, checked)
                num_checked += len(checked)
            else:
                ids, lengths = _encode_plainly(tokenizer, text, offsets)
            writer.add_many(ids, lengths)
            all_lengths.append(lengths)
            num_seen += num_documents
            num_text_bytes += int(offsets[-1] - offsets[0])
        result = writer.close()
    shard = ShardEntry(path=task.prefix, split=task.split, text_bytes=num_text_bytes, **asdict(result))
    summary = {"shard": asdict(shard), "checked": num_checked, "differing": num_differing}
    return np.concatenate(all_lengths), summary


ENCODERS: dict[str, WordEncoder] = {}
"""By the tokenizer's fingerprint; one at most."""


def _encoder(tokenizer: Tokenizer) -> WordEncoder:
    """The tokenizer's look-up of words, which a process keeps from shard to shard."""
    if tokenizer.fingerprint not in ENCODERS:
        ENCODERS.clear()
        ENCODERS[tokenizer.fingerprint] = WordEncoder(tokenizer)
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
