"""From the steps of a run to its `facts.json`: what `llmtrain report` draws of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtrain.data.content.config import PII_KINDS, DecontaminationConfig
from llmtrain.data.content.decontaminate import PAIR, EvalIndex
from llmtrain.data.dedup.near import NearResult, Pair
from llmtrain.data.dedup.units import DUPLICATE, DedupUnit
from llmtrain.data.docs import StoredTexts
from llmtrain.data.facts import KEPT, FactsBuilder, sample_of
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.measures import measures_of, values_of
from llmtrain.data.scan import unit_files
from llmtrain.data.verdicts import Scanned, digests, flat
from llmtrain.files import atomic_write

NUM_PAIRS_SHOWN = 8
"""Near-duplicate pairs with their texts, of those accepted and of those rejected."""
DUPLICATES = {"duplicate": "exact", "near_duplicate": "near"}
"""Reasons of the steps that find clusters, and what their members have in common."""


def facts_of_unit(
    table: pa.Table,
    signals: Mapping[str, npt.NDArray[Any]],
    outcomes: npt.NDArray[Any],
    *,
    first: int,
    rules: RulesConfig,
    reasons: Sequence[str],
) -> FactsBuilder:
    """Collect what one unit tells.

    Args:
        table: its signals.
        signals: the same as arrays.
        outcomes: decide.OUTCOME rows.
        first: number of its first document.
    """
    builder = FactsBuilder(reasons, measures_of(rules), duplicate_reasons=DUPLICATES)
    builder.add_unit(
        first=first,
        ids=digests(table, "id"),
        num_bytes=signals["num_bytes"],
        reason=outcomes["reason"],
        source=flat(table, "source"),
        values=values_of(signals),
        language=flat(table, "language") if "language" in table.column_names else None,
        read_bytes=signals["raw_bytes"],
        left_bytes=np.where(outcomes["reason"] == KEPT, outcomes["num_bytes"], 0),
    )
    for reason, kind in DUPLICATES.items():
        rows = np.flatnonzero(outcomes["reason"] == reasons.index(reason))
        found = np.empty(len(rows), dtype=DUPLICATE)
        found["document"] = first + rows
        for name in ("survivor", "cluster_size"):
            found[name] = outcomes[name][rows]
        if len(found):
            builder.add_duplicates(kind, found)
    masked = {
        kind: int(signals[f"num_pii_{kind}"].sum()) for kind in PII_KINDS if f"num_pii_{kind}" in signals
    }
    builder.add_counts("pii", {kind: count for kind, count in masked.items() if count})
    removed = {
        name.removeprefix("removed_").removesuffix("_bytes"): {
            "lines": int(signals[name.removesuffix("_bytes") + "_lines"].sum()),
            "bytes": int(values.sum()),
        }
        for name, values in signals.items()
        if name.startswith("removed_") and name.endswith("_bytes")
    }
    builder.add_counts("edits", {reason: counts for reason, counts in removed.items() if counts["lines"]})
    return builder


def save(builder: FactsBuilder, path: Path) -> None:
    with atomic_write(path) as stream:
        pickle.dump(builder, stream)


def joined(paths: Sequence[Path]) -> FactsBuilder:
    """The sum of what the units told. The files are this run's own."""
    total: FactsBuilder | None = None
    for path in paths:
        with open(path, "rb") as stream:
            builder = pickle.load(stream)
        if total is None:
            total = builder
        else:
            total.merge(builder)
    assert total is not None, "a run has at least one unit"
    return total


SHOWN = ("slice", "record", "id", "content", "source")
"""The first columns of a unit's signals."""


class LookUp:
    """Finds documents by number, to be shown."""

    def __init__(self, out: Path, scanned: Scanned, units: Sequence[DedupUnit], texts: StoredTexts) -> None:
        self._out = out
        self._scanned = scanned
        self._units = units
        self._texts = texts
        self._before = list(scanned.records_before())

    def __call__(self, documents: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """`id`, `source`, `path`, `record` and `text` of each (numbers ascending). Of documents of an earlier
        run there is an id alone."""
        firsts = np.array([unit.first for unit in self._units], dtype=np.int64)
        of = np.searchsorted(firsts, documents, side="right") - 1
        shown: list[dict[str, Any]] = []
        for unit in np.unique(of).tolist():
            numbers = documents[of == unit]
            if unit < len(self._scanned.units):
                shown += self._of_this_run(unit, numbers, numbers - firsts[unit])
            else:
                shown += [self._of_earlier_run(unit, number) for number in numbers.tolist()]
        return shown

    def _of_this_run(
        self, unit: int, numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> list[dict[str, Any]]:
        with pa.memory_map(str(unit_files(self._out, self._scanned.key, unit).signals)) as handle:
            options = pa.ipc.IpcReadOptions(included_fields=list(range(len(SHOWN))))
            table = pa.ipc.open_file(handle, options=options).read_all().take(pa.array(rows))
        text, offsets = self._texts.texts(numbers)
        shown = []
        for at, row in enumerate(table.to_pylist()):
            piece = self._scanned.units[unit].slices[row["slice"]]
            shown.append(
                {
                    "id": row["id"].hex(),
                    "source": row["source"],
                    "path": piece.name,
                    "record": row["record"] + self._before[unit][row["slice"]],
                    "text": text[offsets[at] : offsets[at + 1]].tobytes(),
                }
            )
        return shown

    def _of_earlier_run(self, unit: int, number: int) -> dict[str, Any]:
        row = np.load(self._units[unit].documents, mmap_mode="r")[number - self._units[unit].first]
        digest = f"{int(row['id_high']):016x}{int(row['id_low']):016x}"
        return {"id": digest, "source": "an earlier run", "path": "", "record": 0, "text": None}


def near_facts(
    near: NearResult, look_up: Callable[[npt.NDArray[np.int64]], Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """What the comparison of similar texts tells: its counts, and the sample of pairs, those nearest to the
    threshold first. The first NUM_PAIRS_SHOWN of each kind have their texts."""
    kinds = {
        "accepted": sorted(near.accepted, key=_likeness),
        "rejected": sorted(near.rejected, key=_likeness, reverse=True),
    }
    shown = [pair for pairs in kinds.values() for pair in pairs[:NUM_PAIRS_SHOWN]]
    numbers = np.unique(np.array([[p.document, p.other] for p in shown], dtype=np.int64))
    found = dict(zip(numbers.tolist(), look_up(numbers) if len(numbers) else (), strict=True))
    facts: dict[str, Any] = {"counts": near.counts}
    for kind, pairs in kinds.items():
        facts[kind] = [asdict(pair) for pair in pairs]
        for entry in facts[kind][:NUM_PAIRS_SHOWN]:
            entry["documents"] = [sample_of(found[entry[name]]) for name in ("document", "other")]
    return facts


def _likeness(pair: Pair) -> tuple[float, str, str]:
    """The similarity that decided, and what makes the order one."""
    likeness = pair.agreement if pair.similarity is None else pair.similarity
    return likeness, pair.document_id, pair.other_id


def decontamination_report(
    cfg: DecontaminationConfig, out: Path, scanned: Scanned, ids: Sequence[Path]
) -> dict[str, Any]:
    """What of each evaluation item was found, and where. Holds the matches of all documents.

    Args:
        ids: DOCUMENT rows of each unit.
    """
    names: list[str] = []
    parts = [np.zeros(0, dtype=PAIR)]
    for unit, path in zip(scanned.units, ids, strict=True):
        pairs = np.load(unit_files(out, scanned.key, unit.number).matches)
        documents = np.load(path, mmap_mode="r")
        pairs = pairs[pairs["document"] < len(documents)]
        rows, places = np.unique(pairs["document"], return_inverse=True)
        pairs["document"] = len(names) + places
        found = documents[rows]
        names += [f"{int(row['id_high']):016x}{int(row['id_low']):016x}" for row in found]
        parts.append(pairs)
    return EvalIndex.load(cfg).report(np.concatenate(parts), names)
