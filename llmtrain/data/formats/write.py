"""The second pass of an import: a file's documents of one split as a shard, linked or written."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llmtrain.data.folder import read_done, write_done
from llmtrain.data.formats.links import link_or_copy
from llmtrain.data.formats.look import LookTask, groups, lengths_hash, masks
from llmtrain.data.manifest import ShardEntry, lineage_file, shard_files, sums_file
from llmtrain.data.shards import ShardWriter, index_shard
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.errors import DataError
from llmtrain.files import atomic_write

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WriteTask:
    look: LookTask
    xxh3_128: str
    """Of the file's tokens when they were looked at."""
    lengths_xxh3_128: str
    split: str
    prefix: str
    """Of the shard, relative to the data folder."""
    dtype: str
    limit: int | None
    """Documents with a draw up to this are held out; None: whole files are."""
    can_link: bool
    """Whether the file's tokens are the shard's, byte for byte."""
    name: str


def write_shard(task: WriteTask) -> dict[str, Any]:
    """Link or write a shard unless that is done.

    Raises:
        DataError: the file is no longer what it was when it was looked at.
    """
    source = task.look.source
    prefix = source.out / task.prefix
    done = prefix.with_name(f"{prefix.name}.json")
    if (finished := read_done(done)) is not None:
        return finished
    tokenizer, foreign = load_tokenizer(source.tokenizer), source.open()
    _check_unchanged(task, "document lengths", task.lengths_xxh3_128, lengths_hash(foreign))
    table = np.load(source.out / task.look.ids)
    mask = masks(table, task.limit, task.look.seed, is_held_out=source.is_held_out)[task.split]
    num_appended, is_link, all_lengths, text_bytes = 0, False, [], []
    digest = xxhash.xxh3_128()
    exact = task.split == "held_out"  # their text is written out, and must be as long as we say
    with ExitStack() as stack:
        writer = None
        if not task.can_link:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            writer = stack.enter_context(
                ShardWriter(prefix, task.dtype, source.vocab_size, eos_id=source.eos_id)
            )
        for first, lengths, tokens in groups(foreign):
            digest.update(np.ascontiguousarray(tokens).data)
            chosen = mask[first : first + len(lengths)]
            if not chosen.any():
                continue
            if not chosen.all():
                tokens, lengths = tokens[np.repeat(chosen, lengths)], lengths[chosen]
            if writer is not None:
                tokens, lengths, more = with_eos(tokens, lengths, source.eos_id)
                num_appended += more
                writer.add_many(tokens, lengths)
            all_lengths.append(lengths)
            text_bytes.append(text_lengths(tokenizer, tokens, lengths, exact=exact))
        _check_unchanged(task, "tokens", task.xxh3_128, digest.hexdigest())
        doc_lengths = np.concatenate(all_lengths)
        if writer is None:
            is_link = link_or_copy(source.path, shard_files(prefix)[0])
            result = index_shard(prefix, task.dtype, doc_lengths, eos_id=source.eos_id)
        else:
            result = writer.close()
    lineage_path = lineage_file(prefix)
    numbers, sizes = np.flatnonzero(mask), np.concatenate(text_bytes)
    rows = [foreign.rows[number] for number in numbers.tolist()] if foreign.rows is not None else None
    lineage = pa.table(
        {
            "id": [row.id for row in rows] if rows else [table[n].tobytes().hex() for n in numbers.tolist()],
            "source": pa.array([task.name] * len(numbers), pa.string()),
            "path": [row.source for row in rows] if rows else [str(source.path)] * len(numbers),
            "record": pa.array([row.record for row in rows] if rows else numbers + 1, pa.int64()),
            "text_bytes": pa.array(sizes, pa.int64()),
            "num_tokens": pa.array(doc_lengths, pa.int64()),
        }
    )
    with atomic_write(lineage_path) as handle:
        pq.write_table(lineage, handle, compression="zstd")
    shard = ShardEntry(path=task.prefix, split=task.split, text_bytes=int(sizes.sum()), **asdict(result))
    summary = {"shard": asdict(shard), "linked": is_link, "appended": num_appended}
    write_done(done, summary, [*shard_files(prefix), sums_file(prefix), lineage_path])
    return summary


def _check_unchanged(task: WriteTask, what: str, expected: str, found: str) -> None:
    """The look may be of an earlier run, and a file may change without its size and time of change."""
    if found != expected:
        source = task.look.source
        raise DataError(
            f"{source.path} changed since it was looked at: the xxh3_128 of its {what} was {expected} and is "
            f"{found} now. Restore the file and import again; if it is right as it is, delete "
            f"{(source.out / task.look.ids).parent} first"
        )


def with_eos(tokens: npt.NDArray[Any], lengths: Int64, eos_id: int) -> tuple[npt.NDArray[Any], Int64, int]:
    """The same documents, each with EOS at its end; and how many got one."""
    ends = np.cumsum(lengths)
    lacks = tokens[ends - 1] != eos_id
    if not lacks.any():
        return tokens, lengths, 0
    wide = tokens.astype(np.int64)
    return np.insert(wide, ends[lacks], eos_id), lengths + lacks, int(lacks.sum())


def text_lengths(tokenizer: Tokenizer, tokens: npt.NDArray[Any], lengths: Int64, *, exact: bool) -> Int64:
    """UTF-8 bytes of each document's text: of the text itself if `exact`, else summed over its pieces."""
    ends = np.cumsum(lengths)
    if not exact:
        return np.add.reduceat(piece_bytes(tokenizer)[tokens], ends - lengths, dtype=np.int64)
    spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return np.array([len(text_of(tokenizer, tokens[begin:end]).encode()) for begin, end in spans])


def text_of(tokenizer: Tokenizer, tokens: npt.NDArray[Any]) -> str:
    return b"".join(tokenizer.pieces(tokens.astype(np.int32))).decode(errors="replace")


PIECE_BYTES: dict[str, Int64] = {}
"""By the tokenizer's fingerprint; one at most."""


def piece_bytes(tokenizer: Tokenizer) -> Int64:
    """Bytes of text that each token stands for."""
    if tokenizer.fingerprint not in PIECE_BYTES:
        PIECE_BYTES.clear()
        one_by_one = np.arange(tokenizer.vocab_size, dtype=np.int32).reshape(-1, 1)
        PIECE_BYTES[tokenizer.fingerprint] = np.array(
            [len(tokenizer.pieces(one)[0]) for one in one_by_one], dtype=np.int64
        )
    return PIECE_BYTES[tokenizer.fingerprint]
