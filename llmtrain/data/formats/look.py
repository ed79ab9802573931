"""The first pass of an import: what is in a file of tokens, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from llmtrain import rng
from llmtrain.data.folder import read_done, write_done
from llmtrain.data.formats.config import TokenFormat, TokenType
from llmtrain.data.formats.foreign import Foreign, open_foreign
from llmtrain.errors import DataError
from llmtrain.files import atomic_write

GROUP_TOKENS = 1 << 22
"""Tokens that are looked at together."""
HALVES_TOKENS = 64
"""So many tokens with zeros at every second place are no text."""
NO_ID = bytes(16)
"""Of a document without a token."""

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of tokens, and how to open it."""

    path: Path
    kind: TokenFormat
    token_type: TokenType | None
    is_held_out: bool
    """As a whole."""
    out: Path
    tokenizer: Path
    eos_id: int
    vocab_size: int

    def open(self) -> Foreign:
        return open_foreign(
            self.path,
            self.kind,
            token_type=self.token_type,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
        )


@dataclass(frozen=True, kw_only=True)
class LookTask:
    source: Source
    ids: str
    """File for the documents' ids, relative to the data folder."""
    seed: int


def look_at(task: LookTask) -> dict[str, Any]:
    """Count what is in a file, and write the ids of its documents: xxh3_128 of their tokens as int32, or
    zeros for a document without a token. EOS at the end is left out, so that a document has the same id
    before and after it gets one."""
    path = task.source.out / task.ids
    done = path.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        return finished
    source = task.source
    digest = xxhash.xxh3_128()
    look: dict[str, Any] = {
        "documents": 0, "tokens": 0, "empty": 0, "without_eos": 0, "first_without_eos": None, "problems": [],
        "smallest_draw": 2**64 - 1, "dtype": None,
    }  # fmt: skip
    ids = []
    try:
        foreign = source.open()
    except DataError as error:
        return {**look, "problems": [str(error)]}
    look["dtype"] = foreign.dtype
    for first, lengths, tokens in groups(foreign):
        digest.update(np.ascontiguousarray(tokens).data)
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= source.vocab_size):
            look["problems"] = [
                f"{source.path} holds token {int(tokens.max())} (smallest: {int(tokens.min())}); the "
                f"vocabulary of {source.tokenizer} has {source.vocab_size:,}. Was it made with another "
                "tokenizer, or is it of another token_type?"
            ]
            return look
        if foreign.dtype == "uint16" and len(tokens) >= HALVES_TOKENS and not tokens[1::2].any():
            look["problems"] = [f"{source.path}: every second token is 0; are they token_type=uint32?"]
            return look
        ends = np.cumsum(lengths)
        is_there = lengths > 0
        lacks = is_there.copy()
        lacks[is_there] = tokens[ends[is_there] - 1] != source.eos_id
        if lacks.any() and look["first_without_eos"] is None:
            look["first_without_eos"] = first + int(np.flatnonzero(lacks)[0])
        look["documents"] += len(lengths)
        look["tokens"] += len(tokens)
        look["empty"] += int((~is_there).sum())
        look["without_eos"] += int(lacks.sum())
        raw = tokens.astype("<i4")
        bare = ends - (is_there & ~lacks)
        for begin, end, is_document in zip(
            (ends - lengths).tolist(), bare.tolist(), is_there.tolist(), strict=True
        ):
            ids.append(xxhash.xxh3_128_digest(raw[begin:end].data) if is_document else NO_ID)
    if look["documents"] == look["empty"]:
        return {**look, "problems": [f"{source.path} holds no document"]}
    table = np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)
    look["xxh3_128"] = digest.hexdigest()
    look["lengths_xxh3_128"] = lengths_hash(foreign)
    look["smallest_draw"] = int(draws(table, task.seed)[table.any(axis=1)].min())
    with atomic_write(path) as handle:
        np.save(handle, table, allow_pickle=False)
    write_done(done, look, [path])
    return look


def lengths_hash(foreign: Foreign) -> str:
    """xxh3_128 of where the documents of a file end, whatever file says so."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(foreign.lengths, dtype="<i8").data)


def draws(ids: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint64]:
    """64 uniform bits a document, from its id [n, 16]: equal documents are drawn together."""
    low = np.ascontiguousarray(ids).view("<u8")[:, 0].astype(np.uint64)
    return rng.mix(low ^ np.uint64(rng.key(seed, "held_out")))


def groups(foreign: Foreign) -> Iterator[tuple[int, Int64, npt.NDArray[Any]]]:
    """(first document, lengths, tokens) of documents that make about GROUP_TOKENS, or one longer."""
    ends = np.cumsum(foreign.lengths)
    tokens, first = foreign.tokens(), 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + GROUP_TOKENS, side="right")))
        yield first, foreign.lengths[first:last], tokens[begin : int(ends[last - 1])]
        first = last


def masks(ids: npt.NDArray[np.uint8], limit: int | None, seed: int, *, is_held_out: bool) -> dict[str, Mask]:
    """Which documents of a file go to which split; one without a token goes to none.

    Args:
        ids: of its documents, [n, 16].
        limit: documents with a draw up to it are held out; None: whole files are.
    """
    is_there = ids.any(axis=1)
    held = np.full(len(ids), is_held_out) if limit is None else draws(ids, seed) <= np.uint64(limit)
    return {"train": is_there & ~held, "held_out": is_there & held}
