"""Which tokenizer a run uses: the one that `tokenizer.path` names, or one trained on a sample of what is
kept."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmtrain.data.config import TokenizerConfig
from llmtrain.data.decide import split_order
from llmtrain.data.dedup.exact import halves
from llmtrain.data.folder import key_of, read_done, write_done
from llmtrain.data.manifest import TokenizerEntry
from llmtrain.data.tokenizer.load import load_tokenizer, model_file
from llmtrain.data.tokenizer.sentencepiece_model import MODEL_NAME
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME
from llmtrain.data.tokenizer.train import TRAIN_VERSION, train_tokenizer
from llmtrain.data.verdicts import Verdicts, digests
from llmtrain.errors import DataError
from llmtrain.files import atomic_write, plain
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
        relative = take_given(cfg, out)
    else:
        key = key_of(
            version=TRAIN_VERSION,
            settings=plain(cfg),
            documents=decided["documents_digest"],
            library=version("sentencepiece"),
        )
        relative = f"tokenizer/{key}"
        if read_done(out / relative / FACTS_NAME) is None:
            _train(cfg, out / relative, verdicts, quiet=quiet)
    return entry_of(out, relative)


def entry_of(out: Path, relative: str) -> TokenizerEntry:
    """What the manifest says of the tokenizer in this folder."""
    tokenizer = load_tokenizer(out / relative)
    return TokenizerEntry(
        path=relative,
        kind=tokenizer.kind,
        file=tokenizer.file_name,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        special_ids=tokenizer.special_ids,
    )


def take_given(cfg: TokenizerConfig, out: Path) -> str:
    """Copy the tokenizer of `cfg.path` into the data folder, and return where it lies there."""
    assert cfg.path is not None, "the caller looked"
    model = model_file(Path(cfg.path))
    given = load_tokenizer(model, eos_id=cfg.given_eos_id)
    relative = f"tokenizer/{given.fingerprint[:16]}"
    if cfg.given_eos_id is not None:
        relative += f"-eos{cfg.given_eos_id}"
    if read_done(out / relative / FACTS_NAME) is None:
        facts = {"given": True, "given_eos_id": given.eos_id}
        _write(out / relative, given.file_name, model.read_bytes(), facts)
    decoded = given.decode(given.encode(EXACTNESS_PROBE))
    if decoded != EXACTNESS_PROBE:
        log.warning(
            "tokenizer.path=%s does not give back the text that it encodes: %r becomes %r. Bits per byte "
            "count bytes of the text as it was",
            cfg.path,
            EXACTNESS_PROBE,
            decoded,
        )
    return relative


def _train(cfg: TokenizerConfig, folder: Path, verdicts: Verdicts, *, quiet: bool) -> None:
    sample = _sample(verdicts, cfg)
    num_bytes = int(sample.column("text_bytes").to_numpy().sum())
    with progress("tokenizer", total=num_bytes, unit="B", quiet=quiet) as advance:
        model = train_tokenizer(_texts(verdicts, sample, advance), cfg)
    by_source = sample.group_by("source").aggregate([("text_bytes", "sum")]).sort_by("source").to_pylist()
    facts = {
        "given": False,
        "num_sample_documents": sample.num_rows,
        "num_sample_bytes": num_bytes,
        "sample_bytes_by_source": {row["source"]: row["text_bytes_sum"] for row in by_source},
    }
    _write(folder, MODEL_NAME, model, facts)


def _sample(verdicts: Verdicts, cfg: TokenizerConfig) -> pa.Table:
    """Training documents, in order: of each source those whose ids have the smallest hashes, until they reach
    its part of `sample_bytes`. Without weights all sources are one.

    Raises:
        DataError: a weight for a source that is not there; names those that are.
    """
    text_bytes = _bytes_by_source(verdicts)
    if unknown := cfg.source_weights.keys() - text_bytes.keys():
        raise DataError(
            f"tokenizer.source_weights names {sorted(unknown)}; sources with documents to train on are "
            f"{sorted(text_bytes)}"
        )
    total = sum(cfg.source_weights.values())
    parts = []
    for source, weight in cfg.source_weights.items() or [(None, 1.0)]:
        wanted = cfg.sample_bytes * weight / (total or 1.0)
        there = sum(text_bytes.values()) if source is None else text_bytes[source]
        if weight > 0:
            parts.append(_smallest(verdicts, cfg.seed, source, wanted, wanted / max(1, there)))
    chosen = pa.concat_tables(parts)
    return chosen.take(pa.array(np.argsort(chosen.column("place").to_numpy(), kind="stable"))).drop("place")


def _bytes_by_source(verdicts: Verdicts) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for batch in verdicts.batches("train"):
        grouped = pa.Table.from_batches([batch]).group_by("source").aggregate([("text_bytes", "sum")])
        for row in grouped.to_pylist():
            sums[row["source"]] += row["text_bytes_sum"]
    return dict(sums)


def _smallest(verdicts: Verdicts, seed: int, source: str | None, wanted: float, share: float) -> pa.Table:
    """Documents of a source with the smallest hashes, at least `wanted` bytes or all; `place` is their row.

    Holds those below a share of all hashes, which grows until they suffice.
    """
    share = 1.5 * share
    while True:
        parts, orders, num_seen = [], [], 0
        for batch in verdicts.batches("train"):
            _, low = halves(digests(batch, "id"))
            order = split_order(low, seed, "tokenizer")
            drawn = order < np.uint64(share * 2.0**64) if share < 1 else np.ones(len(order), dtype=np.bool_)
            if source is not None:
                drawn &= pc.equal(batch.column("source"), source).to_numpy(zero_copy_only=False)
            place = pa.array(num_seen + np.arange(len(order)))
            parts.append(pa.Table.from_batches([batch]).append_column("place", place).filter(pa.array(drawn)))
            orders.append(order[drawn])
            num_seen += len(order)
        table = pa.concat_tables(parts).combine_chunks()
        by_order = np.argsort(np.concatenate(orders), kind="stable")
        filled = np.cumsum(table.column("text_bytes").to_numpy()[by_order])
        reached = int(np.searchsorted(filled, wanted))
        if reached < len(filled) or share >= 1:
            return table.take(pa.array(by_order[: reached + 1]))
        share *= 4


def _texts(verdicts: Verdicts, rows: pa.Table, advance: Callable[[float], None]) -> Iterator[str]:
    for _, (text, offsets), _ in verdicts.documents(rows):
        for start, end in pairwise(offsets):
            advance(int(end - start))
            yield text[start:end].tobytes().decode()


def _write(folder: Path, name: str, model: bytes, facts: dict[str, Any]) -> None:
    (folder / FACTS_NAME).unlink(missing_ok=True)  # of a model that was lost
    with atomic_write(folder / name) as handle:
        handle.write(model)
    tokenizer = load_tokenizer(folder / name, eos_id=facts.get("given_eos_id"))
    facts |= {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "special_ids": tokenizer.special_ids,
    }
    write_done(folder / FACTS_NAME, facts, [folder / name])
