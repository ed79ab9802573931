"""Which tokenizer a run uses: the one that `tokenizer.path` names, or one trained on a sample of what is
kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmtrain.data.config import TokenizerConfig
from llmtrain.data.decide import split_order
from llmtrain.data.dedup.exact import halves
from llmtrain.data.folder import key_of, read_done, write_done
from llmtrain.data.manifest import TokenizerEntry
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME, MODEL_NAME, Tokenizer
from llmtrain.data.tokenizer.train import KIND, TRAIN_VERSION, train_tokenizer
from llmtrain.data.verdicts import Verdicts, digests
from llmtrain.files import atomic_write, hash_file
from llmtrain.progress import progress

log = logging.getLogger(__name__)

EXACTNESS_PROBE = "a  b\t\n c\uff11\ufb01 "
"""What tokenizers that normalise or trim do not give back: runs of white space, compatibility characters."""


def choose_tokenizer(
    cfg: TokenizerConfig, verdicts: Verdicts, decided: dict[str, Any], *, quiet: bool
) -> TokenizerEntry:
    """Train a tokenizer, or take the one that `cfg.path` names."""
    out = verdicts.out
    if cfg.path is not None:
        relative = _given(cfg.path, out)
    else:
        key = key_of(
            kind=KIND,
            version=TRAIN_VERSION,
            settings=asdict(cfg),
            documents=decided["documents_digest"],
            library=version("sentencepiece"),
        )
        relative = f"tokenizer/{key}"
        if read_done(out / relative / FACTS_NAME) is None:
            _train(cfg, out / relative, verdicts, decided["text_bytes"]["train"], quiet=quiet)
    tokenizer = Tokenizer.load(out / relative)
    return TokenizerEntry(
        path=relative,
        kind=KIND,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
    )


def _given(path: str, out: Path) -> str:
    given = Tokenizer.load(Path(path))
    relative = f"tokenizer/{given.fingerprint[:16]}"
    model = Path(path) / MODEL_NAME if Path(path).is_dir() else Path(path)
    if read_done(out / relative / FACTS_NAME) is None:
        _write(out / relative, model.read_bytes(), {"given": True})
    decoded = given.decode(given.encode(EXACTNESS_PROBE))
    if decoded != EXACTNESS_PROBE:
        log.warning(
            "tokenizer.path=%s does not give back the text that it encodes: %r becomes %r. Bits per byte "
            "count bytes of the text as it was",
            path,
            EXACTNESS_PROBE,
            decoded,
        )
    return relative


def _train(cfg: TokenizerConfig, folder: Path, verdicts: Verdicts, train_bytes: int, *, quiet: bool) -> None:
    sample = _sample(verdicts, cfg, train_bytes)
    num_bytes = int(sample.column("text_bytes").to_numpy().sum())
    with progress("tokenizer", total=num_bytes, unit="B", quiet=quiet) as advance:
        model = train_tokenizer(_texts(verdicts, sample, advance), cfg)
    facts = {"given": False, "num_sample_documents": sample.num_rows, "num_sample_bytes": num_bytes}
    _write(folder, model, facts)


def _sample(verdicts: Verdicts, cfg: TokenizerConfig, train_bytes: int) -> pa.Table:
    """Training documents, in order: those with the smallest hashes, until they reach `sample_bytes`.

    Holds those below a share of all hashes, which grows until they suffice.
    """
    share = 1.5 * cfg.sample_bytes / max(1, train_bytes)
    while True:
        parts, orders = [], []
        for batch in verdicts.batches("train"):
            _, low = halves(digests(batch, "content"))
            order = split_order(low, cfg.seed, "tokenizer")
            drawn = order < np.uint64(share * 2.0**64) if share < 1 else np.ones(len(order), dtype=np.bool_)
            parts.append(pa.Table.from_batches([batch]).filter(pa.array(drawn)))
            orders.append(order[drawn])
        table = pa.concat_tables(parts).combine_chunks()
        by_order = np.argsort(np.concatenate(orders), kind="stable")
        filled = np.cumsum(table.column("text_bytes").to_numpy()[by_order])
        reached = int(np.searchsorted(filled, cfg.sample_bytes))
        if reached < len(filled) or share >= 1:
            return table.take(pa.array(np.sort(by_order[: reached + 1])))
        share *= 4


def _texts(verdicts: Verdicts, rows: pa.Table, advance: Callable[[float], None]) -> Iterator[str]:
    for _, (text, offsets), _ in verdicts.documents(rows):
        for start, end in pairwise(offsets):
            advance(int(end - start))
            yield text[start:end].tobytes().decode()


def _write(folder: Path, model: bytes, facts: dict[str, Any]) -> None:
    (folder / FACTS_NAME).unlink(missing_ok=True)  # of a model that was lost
    with atomic_write(folder / MODEL_NAME) as handle:
        handle.write(model)
    tokenizer = Tokenizer.load(folder)
    facts |= {
        "kind": KIND,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": hash_file(folder / MODEL_NAME),
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
    }
    write_done(folder / FACTS_NAME, facts, [folder / MODEL_NAME])
