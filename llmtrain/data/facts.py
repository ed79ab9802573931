"""What a data run writes for people: `facts.json`, read by `llmtrain report` and `llmtrain data explain`.

A `FactsBuilder` is fed unit by unit with columns and holds tables whose size depends on the number of rules,
reasons, sources and languages, never on the number of documents. Whatever it counts is an exact sum, and what
it draws (documents to show) is chosen by the hash of the document's id, so the facts are the same for any cut
into units, any order of them, and any tree of merges. Only the times in it differ from run to run.

Parts that a run does not have are absent: a reader takes what is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtrain import rng
from llmtrain.files import write_json

FACTS_NAME = "facts.json"
FACTS_VERSION = 1
KEPT = -1
"""Reason of a document that stays."""
SNIPPET_CHARS = 400
NUM_KEPT_SAMPLES = 6
NUM_DROPPED_SAMPLES = 3
"""Of each reason."""
NUM_CLUSTERS_SHOWN = 2
"""Of each class of sizes."""
NUM_MEMBERS_SHOWN = 3
"""Of a cluster, beside its survivor."""
NUM_SOURCES_SHOWN = 200
"""Sources with a row of their own in facts.json, the largest first; the others are one row."""
CLUSTER_SIZES = (2, 3, 5, 10, 30, 100, 1000)
"""Smallest size of each class of clusters."""

Ints = npt.NDArray[np.int64]
Names: TypeAlias = Any  # list[str] or a column of pyarrow, which has no types
LookUp = Callable[[Ints], Sequence[Mapping[str, Any]]]
"""From document numbers, ascending, to their `id` (hex), `source`, `path`, `record` and `text` (str, bytes or
None)."""


class Scale(Enum):
    """How a signal's values are laid into bins. The bins are fixed, so that sums of histograms are exact."""

    fraction = "fraction"
    """Of 0 to 1: exactly 0, then hundredths, each with its upper end."""
    count = "count"
    """Whole numbers: each to 20 by itself, then 20 bins a factor of ten, to 1e12."""
    amount = "amount"
    """Positive numbers of any size: exactly 0, then 20 bins a factor of ten from 0.001 to 1e12."""


_EDGES = {
    Scale.fraction: np.arange(101) / 100,
    Scale.count: np.append(np.arange(21), np.round(10.0 ** (np.arange(27, 241) / 20))) + 0.5,
    Scale.amount: 10.0 ** (np.arange(-60, 241) / 20),
}


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A bound of a rule that is in force."""

    reason: str
    """Under which the rule drops."""
    setting: str
    """As a user types it: `rules.min_words`."""
    value: float
    drops: str
    """`below` or `above` the value."""
    source: str = ""
    """Paper and table."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that rules look at: what a histogram shows."""

    name: str
    title: str
    """A few words for the chart's head."""
    unit: str = ""
    scale: Scale = Scale.amount
    thresholds: tuple[Threshold, ...] = ()


def edges_of(measure: Measure) -> npt.NDArray[np.float64]:
    """The bins of a measure: those of its scale, the nearest edge moved to each threshold.

    So no bin holds documents of both sides. Bins hold their upper edge, as a document at a bound "at most" is
    kept; for a bound "at least" the edge is the number just under it.
    """
    edges = np.array(_EDGES[measure.scale], dtype=np.float64)
    for bound in measure.thresholds:
        if measure.scale is Scale.count:
            cut = math.ceil(bound.value) - 0.5 if bound.drops == "below" else math.floor(bound.value) + 0.5
        else:
            cut = float(np.nextafter(bound.value, -np.inf)) if bound.drops == "below" else bound.value
        if edges[0] < cut < edges[-1]:
            edges[1 + np.argmin(np.abs(edges[1:-1] - cut))] = cut
    return edges


@dataclass(kw_only=True)
class Histogram:
    """Documents by value: [kept or dropped, bin].

    Bins: below 0, exactly 0, each interval, above, undefined.
    """

    edges: npt.NDArray[np.float64]
    counts: Ints

    @classmethod
    def empty(cls, measure: Measure) -> Histogram:
        edges = edges_of(measure)
        return cls(edges=edges, counts=np.zeros((2, len(edges) + 3), dtype=np.int64))

    def add(self, values: npt.NDArray[np.float64], is_kept: npt.NDArray[np.bool_]) -> None:
        edges = self.edges
        # An interval holds its upper edge, as a document at the bound of a rule "at most" is kept.
        bins = np.searchsorted(edges, values, side="left") + 1
        bins[(bins == 1) & (values > 0)] = 2  # positive, under the first edge: the first interval
        bins[values == 0] = 1
        bins[values < 0] = 0
        bins[np.isnan(values)] = len(edges) + 2
        for row, mask in enumerate((is_kept, ~is_kept)):
            self.counts[row] += np.bincount(bins[mask], minlength=self.counts.shape[1])

    def as_json(self) -> dict[str, Any]:
        """Without the empty bins at both ends. `edges` has one more value than `kept` and `dropped`."""
        edges, inside = self.edges, self.counts[:, 2:-2]
        used = np.flatnonzero(inside.any(axis=0))
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        shown: dict[str, Any] = {
            "edges": [float(f"{edge:.6g}") for edge in edges[first : last + 1]] if len(used) else [],
            "kept": inside[0, first:last].tolist(),
            "dropped": inside[1, first:last].tolist(),
        }
        for name, column in (("below_zero", 0), ("zero", 1), ("above", -2), ("undefined", -1)):
            kept, dropped = self.counts[:, column].tolist()
            if kept or dropped:
                shown[name] = {"kept": kept, "dropped": dropped}
        return shown


@dataclass(kw_only=True)
class Crosstab:
    """Documents and bytes of each name by reason: [1 + reason, documents or bytes], kept first."""

    num_reasons: int
    rows: dict[str, Ints] = field(default_factory=dict)

    def add(self, names: Names, reason: Ints, num_bytes: Ints) -> None:
        coded = _coded(names)
        width = self.num_reasons + 1
        cell = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64) * width + reason + 1
        known = coded.dictionary.to_pylist()
        documents = np.bincount(cell, minlength=len(known) * width).reshape(len(known), width)
        size = np.bincount(cell, weights=num_bytes, minlength=len(known) * width)  # exact below 2**53
        both = np.stack([documents, size.reshape(len(known), width).astype(np.int64)], axis=2)
        for name, counts in zip(known, both, strict=True):
            if name in self.rows:
                self.rows[name] += counts
            else:
                self.rows[name] = counts

    def merge(self, other: Crosstab) -> None:
        for name, counts in other.rows.items():
            self.rows[name] = self.rows[name] + counts if name in self.rows else counts.copy()

    def as_json(self, name: str, reasons: Sequence[str], shown: int | None = None) -> list[dict[str, Any]]:
        """One row a name, the most bytes first; what is past `shown` becomes one row without a name."""
        ordered = sorted(self.rows.items(), key=lambda item: (-int(item[1][:, 1].sum()), item[0]))
        cut = len(ordered) if shown is None else shown
        rows = [{name: key, **_by_reason(counts, reasons)} for key, counts in ordered[:cut]]
        if rest := [counts for _, counts in ordered[cut:]]:
            rows.append({name: None, "num_names": len(rest), **_by_reason(sum(rest, 0 * rest[0]), reasons)})
        return rows


@dataclass(kw_only=True)
class Draw:
    """The `size` documents with the smallest hashes: the same ones whatever came first."""

    size: int
    documents: list[tuple[int, int]] = field(default_factory=list)
    """(hash, number), ascending."""

    def add(self, hashes: npt.NDArray[np.uint64], numbers: Ints) -> None:
        if len(hashes) > self.size:
            lowest = np.argpartition(hashes, self.size - 1)[: self.size]
            hashes, numbers = hashes[lowest], numbers[lowest]
        found = zip(hashes.tolist(), numbers.tolist(), strict=True)
        self.documents = sorted([*self.documents, *found])[: self.size]

    def merge(self, other: Draw) -> None:
        self.documents = sorted([*self.documents, *other.documents])[: self.size]


@dataclass(kw_only=True)
class Clusters:
    """Duplicates of one kind by the size of their cluster, and a few clusters of each class of sizes."""

    num_removed: dict[int, int] = field(default_factory=dict)
    """By cluster size: documents that are not the survivor."""
    shown: dict[int, dict[tuple[int, int], tuple[int, list[int]]]] = field(default_factory=dict)
    """By class: (hash, survivor) to the cluster's size and its lowest members."""

    def add(self, duplicates: npt.NDArray[Any]) -> None:
        sizes, counts = np.unique(duplicates["cluster_size"], return_counts=True)
        for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            self.num_removed[size] = self.num_removed.get(size, 0) + count
        for low, high in _classes():
            inside = (duplicates["cluster_size"] >= low) & (duplicates["cluster_size"] < high)
            self._add_class(low, duplicates[inside])

    def _add_class(self, low: int, duplicates: npt.NDArray[Any]) -> None:
        """A cluster among the lowest at the end was among them all the time, so no member is missed."""
        if not len(duplicates):
            return
        shown = self.shown.setdefault(low, {})
        hashes = mixed(duplicates["survivor"].astype(np.uint64))
        bound = max(shown)[0] if len(shown) == NUM_CLUSTERS_SHOWN else 2**64 - 1
        for at in np.flatnonzero(hashes <= np.uint64(bound))[np.argsort(hashes[hashes <= np.uint64(bound)])]:
            key = (int(hashes[at]), int(duplicates["survivor"][at]))
            if key not in shown and len(shown) == NUM_CLUSTERS_SHOWN:
                if key > max(shown):
                    break  # the hashes ascend: none of the rest is shown
                del shown[max(shown)]
            size, members = shown.get(key, (int(duplicates["cluster_size"][at]), []))
            shown[key] = (size, sorted({*members, int(duplicates["document"][at])})[:NUM_MEMBERS_SHOWN])

    def merge(self, other: Clusters) -> None:
        for size, count in other.num_removed.items():
            self.num_removed[size] = self.num_removed.get(size, 0) + count
        for low, clusters in other.shown.items():
            mine = self.shown.setdefault(low, {})
            for key, (size, members) in clusters.items():
                both = sorted({*mine.get(key, (size, []))[1], *members})
                mine[key] = (size, both[:NUM_MEMBERS_SHOWN])
            for key in sorted(mine)[NUM_CLUSTERS_SHOWN:]:
                del mine[key]

    def as_json(self) -> dict[str, Any]:
        rows = []
        for low, high in _classes():
            inside = {size: count for size, count in self.num_removed.items() if low <= size < high}
            if inside:
                rows.append(
                    {
                        "from": min(inside),
                        "to": max(inside),
                        "clusters": sum(math.ceil(count / (size - 1)) for size, count in inside.items()),
                        "removed": sum(inside.values()),
                    }
                )
        return {"sizes": rows, "largest": max(self.num_removed, default=0)}


class FactsBuilder:
    """Collect facts unit by unit. Picklable; `merge` adds what another one collected.

    Args:
        reasons: names of the reasons to drop, in the order of the rules.
        measures: what to draw histograms of.
        duplicate_reasons: those of `reasons` that mean "another document has this text".
    """

    def __init__(
        self,
        reasons: Sequence[str],
        measures: Sequence[Measure] = (),
        duplicate_reasons: Iterable[str] = (),
    ) -> None:
        self.reasons = list(reasons)
        self.measures = list(measures)
        self.duplicate_reasons = [name for name in self.reasons if name in set(duplicate_reasons)]
        self.histograms = {measure.name: Histogram.empty(measure) for measure in measures}
        self.sources = Crosstab(num_reasons=len(self.reasons))
        self.languages = Crosstab(num_reasons=len(self.reasons))
        self.sizes: dict[str, dict[str, int]] = {"read_bytes": {}, "left_bytes": {}}
        """By name of a source."""
        self.samples = {number: Draw(size=_num_samples(number)) for number in range(KEPT, len(self.reasons))}
        self.clusters: dict[str, Clusters] = {}
        self.counts: dict[str, dict[str, Any]] = {}

    def add_unit(
        self,
        *,
        first: int,
        ids: npt.NDArray[np.uint8],
        num_bytes: Ints,
        reason: npt.NDArray[np.integer[Any]],
        source: Names,
        values: Mapping[str, npt.NDArray[np.floating[Any]]] | None = None,
        language: Names | None = None,
        read_bytes: Ints | None = None,
        left_bytes: Ints | None = None,
    ) -> None:
        """Take in the documents numbered `first`, `first` + 1, ... Any part of a unit will do.

        Args:
            first: number of the first document; numbers follow the order of the input.
            ids: [n, 16].
            num_bytes: of the text that the rules saw.
            reason: [n], index into the reasons, or KEPT.
            source: [n], name of each document's source.
            values: by name of a measure, [n]; NaN where it is not defined. A measure may have none.
            language: [n], a code for each document; None when languages were not identified.
            read_bytes: [n], of the text as it was read, before lines were edited out.
            left_bytes: [n], of the text in the end, without what was cut out later; 0 of a dropped document.
        """
        reasons = np.asarray(reason, dtype=np.int64)
        sizes = np.asarray(num_bytes, dtype=np.int64)
        is_kept = reasons == KEPT
        for measure in self.measures:
            if values is not None and measure.name in values:
                column = np.asarray(values[measure.name], dtype=np.float64)
                self.histograms[measure.name].add(column, is_kept)
        self.sources.add(source, reasons, sizes)
        if language is not None:
            self.languages.add(language, reasons, sizes)
        for part, measured in (("read_bytes", read_bytes), ("left_bytes", left_bytes)):
            if measured is not None:
                self.sizes[part] = _added(self.sizes[part], _totals(source, measured))
        hashes = mixed(np.ascontiguousarray(ids[:, 8:]).view("<u8").reshape(-1))
        numbers = np.arange(first, first + len(reasons), dtype=np.int64)
        for number in np.unique(reasons).tolist():
            mask = reasons == number
            self.samples[number].add(hashes[mask], numbers[mask])

    def add_duplicates(self, kind: str, duplicates: npt.NDArray[Any]) -> None:
        """Take in duplicates of one kind (`exact`, `near`, ...), any part of them at a time.

        Args:
            kind: what they have in common.
            duplicates: structured, `document`, `survivor` and `cluster_size`; no rows for survivors.
        """
        self.clusters.setdefault(kind, Clusters()).add(duplicates)

    def add_counts(self, part: str, counts: Mapping[str, Any]) -> None:
        """Add to the sums of a part: numbers by name, or dicts of numbers by name.

        Parts that the report knows: `pii` (by kind), `edits` (`lines` and `bytes` by reason), `quarantine`
        (`documents` and `bytes` by reason).
        """
        self.counts[part] = _added(self.counts.get(part, {}), counts)

    def merge(self, other: FactsBuilder) -> None:
        """Add everything that `other` collected under the same reasons and measures."""
        assert (self.reasons, self.measures) == (other.reasons, other.measures), "builders of different runs"
        for name, histogram in other.histograms.items():
            self.histograms[name].counts += histogram.counts
        self.sources.merge(other.sources)
        self.languages.merge(other.languages)
        for part, sizes in other.sizes.items():
            self.sizes[part] = _added(self.sizes[part], sizes)
        for number, draw in other.samples.items():
            self.samples[number].merge(draw)
        for kind, clusters in other.clusters.items():
            self.clusters.setdefault(kind, Clusters()).merge(clusters)
        for part, counts in other.counts.items():
            self.add_counts(part, counts)

    def result(self, look_up: LookUp | None = None, **parts: Any) -> dict[str, Any]:
        """Return the facts as JSON values.

        Args:
            look_up: finds the documents to show; None: no samples and no examples. Called once.
            parts: further parts, as they stand in docs/report.md (`corpus`, `funnel`, `stages`, `near`,
            `decontamination`, `folders`, `rules`); None leaves one out.
        """
        facts: dict[str, Any] = {"facts_version": FACTS_VERSION}
        facts |= {name: value for name, value in parts.items() if value is not None}
        if self.sources.rows:
            facts["sources"] = self._sources()
        if self.languages.rows:
            facts["languages"] = self.languages.as_json("language", self.reasons)
        histograms = [
            {**_plain(measure), **self.histograms[measure.name].as_json()}
            for measure in self.measures
            if self.histograms[measure.name].counts.any()
        ]
        if histograms:
            facts["histograms"] = histograms
        duplicates = {kind: clusters.as_json() for kind, clusters in sorted(self.clusters.items())}
        if look_up is not None:
            documents = self._documents_shown()
            found = dict(
                zip(documents.tolist(), map(sample_of, look_up(documents)), strict=True)
                if len(documents)
                else ()
            )
            facts["samples"] = self._samples(found)
            for kind, clusters in self.clusters.items():
                duplicates[kind]["examples"] = _examples(clusters, found)
        if duplicates:
            facts["duplicates"] = duplicates
        return facts | {part: counts for part, counts in self.counts.items() if counts}

    def _sources(self) -> list[dict[str, Any]]:
        rows = self.sources.as_json("source", self.reasons, NUM_SOURCES_SHOWN)
        for row in rows:
            if self.duplicate_reasons:
                row["duplicates"] = sum(
                    row["dropped"].get(reason, {}).get("documents", 0) for reason in self.duplicate_reasons
                )
        for part, totals in self.sizes.items():
            put_totals(rows, part, totals)
        return rows

    def _documents_shown(self) -> Ints:
        wanted = {number for draw in self.samples.values() for _, number in draw.documents}
        for clusters in self.clusters.values():
            for by_key in clusters.shown.values():
                for (_, survivor), (_, members) in by_key.items():
                    wanted |= {survivor, *members}
        return np.array(sorted(wanted), dtype=np.int64)

    def _samples(self, found: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        drawn = {
            number: [found[document] for _, document in draw.documents]
            for number, draw in self.samples.items()
            if draw.documents
        }
        return {
            "kept": drawn.pop(KEPT, []),
            "dropped": {self.reasons[number]: samples for number, samples in drawn.items()},
        }


def put_totals(rows: list[dict[str, Any]], part: str, totals: Mapping[str, int]) -> None:
    """Give the rows of sources a number more; the last row, which sources share, the sum of theirs."""
    named = [row["source"] for row in rows if row["source"] is not None]
    for row in rows if totals else ():
        row[part] = (
            totals.get(row["source"], 0)
            if row["source"] is not None
            else sum(totals.values()) - sum(totals.get(name, 0) for name in named)
        )


def write_facts(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write `facts.json` into the data folder, whole or not at all."""
    path = folder / FACTS_NAME
    write_json(path, facts)
    return path


def snippet(text: str | bytes | None, num_chars: int = SNIPPET_CHARS) -> str | None:
    """The first characters of a text, with an ellipsis when there are more."""
    if text is None:
        return None
    words = text[: 4 * num_chars + 4].decode(errors="ignore") if isinstance(text, bytes) else text
    return words if len(words) <= num_chars else f"{words[:num_chars].rstrip()}…"


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 well mixed bits each, of 0 too: a step of splitmix64."""
    return rng.mix(values + np.uint64(0x9E3779B97F4A7C15))


def _coded(names: Names) -> pa.DictionaryArray:
    column = names if isinstance(names, pa.Array | pa.ChunkedArray) else pa.array(names, pa.string())
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    coded = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    assert coded.null_count == 0, "a document without a name"
    return coded


def _totals(names: Names, values: Ints) -> dict[str, int]:
    coded = _coded(names)
    totals = np.bincount(coded.indices.to_numpy(zero_copy_only=False), weights=values)  # exact below 2**53
    return dict(zip(coded.dictionary.to_pylist(), totals.astype(np.int64).tolist(), strict=True))


def _by_reason(counts: Ints, reasons: Sequence[str]) -> dict[str, Any]:
    documents, size = counts.sum(axis=0).tolist()
    return {
        "documents": documents,
        "bytes": size,
        "kept": {"documents": int(counts[0, 0]), "bytes": int(counts[0, 1])},
        "dropped": {
            reason: {"documents": int(counts[number, 0]), "bytes": int(counts[number, 1])}
            for number, reason in enumerate(reasons, start=1)
            if counts[number, 0]
        },
    }


def _added(before: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    total = dict(before)
    for name, value in more.items():
        if isinstance(value, Mapping):
            total[name] = _added(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + int(value)
    return total


def _plain(measure: Measure) -> dict[str, Any]:
    return {
        "name": measure.name,
        "title": measure.title,
        "unit": measure.unit,
        "scale": measure.scale.name,
        "thresholds": [asdict(threshold) for threshold in measure.thresholds],
    }


def _classes() -> list[tuple[int, int]]:
    return list(zip(CLUSTER_SIZES, (*CLUSTER_SIZES[1:], 2**62), strict=True))


def _num_samples(reason: int) -> int:
    return NUM_KEPT_SAMPLES if reason == KEPT else NUM_DROPPED_SAMPLES


def sample_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as the report shows it."""
    shown = {name: document.get(name) for name in ("id", "source", "path", "record")}
    return {**shown, "text": snippet(document.get("text"))}


def _examples(clusters: Clusters, found: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"size": size, "survivor": found[survivor], "removed": [found[member] for member in members]}
        for by_key in (clusters.shown[low] for low in sorted(clusters.shown))
        for (_, survivor), (size, members) in sorted(by_key.items(), key=lambda item: (item[1][0], item[0]))
    ]
